"""A plan: what one config takes on one target, as plain figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from d2g_jax.plan.collectives import Collective
from d2g_jax.plan.programs import Program
from d2g_jax.plan.targets import Chip, Target

ASSUMED_SHARE = 0.4
"""Of the peak, for predicted images/s; docs/plan.md says where it comes from."""

TPU_TEMPORARIES = 1.2
"""Times the formula's: what a TPU's compiler may take. Of nine whole steps 1.13 was the most: docs/plan.md."""

EFFICIENCY_SIZES = (16, 64, 256)
EFFICIENCY_BAR = 0.9
"""Of weak scaling from the first to the last of these."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures are per device and per call of a program unless they say otherwise.

    Attributes:
      name: of the config.
      target: what it is planned for.
      settings: the settings that decide memory, by their names in the config.
      batch_size: images per iteration, all devices together.
      mesh: (data, fsdp).
      resident: bytes that stay from step to step, by what they are.
      programs: the steps.
      calls: how often each runs in one iteration, once the adversary has started.
      images: of the whole run; 0 in plans that were written without.
    """

    name: str
    target: Target
    settings: Mapping[str, Any]
    batch_size: int
    mesh: tuple[int, int]
    resident: Mapping[str, float]
    programs: tuple[Program, ...]
    calls: Mapping[str, float]
    images: int = 0

    @property
    def method(self) -> str:
        """ "compiled", or "formula" if any step is."""
        return "compiled" if all(p.method == "compiled" for p in self.programs) else "formula"

    @property
    def arguments_bytes(self) -> float:
        """What stays: as the programs have it, which pads small arrays, with what no program sees."""
        beside = self.resident["VAE"] + self.resident["batches"] / 2
        seen = max((p.argument_bytes or 0.0 for p in self.programs), default=0.0)
        return max(sum(self.resident.values()), seen + beside)

    @property
    def code_bytes(self) -> float:
        """Of all steps; that of "g_regression", where it is not planned itself, as that of "g_adversarial"."""
        code = {p.name: p.code_bytes or 0.0 for p in self.programs}
        return sum(code.values()) + (0.0 if "g_regression" in code else code.get("g_adversarial", 0.0))

    def total_bytes(self) -> float:
        """At the worst moment of an iteration: what stays, all programs' code, one program's temporaries."""
        beside = max((p.beside_arguments or 0.0 for p in self.programs), default=0.0)
        total = self.arguments_bytes + self.code_bytes + beside
        return max([total, *(p.needed_bytes for p in self.programs if p.needed_bytes is not None)])

    def compiled_bytes(self) -> float | None:
        """What a compiler may take in place of the total of a formula; None for compiled plans, and beside TPUs."""
        if self.method == "compiled" or self.target.chip.platform != "tpu":
            return None
        return self.total_bytes() + (TPU_TEMPORARIES - 1) * max(p.temp_bytes for p in self.programs)

    @property
    def fits(self) -> bool:
        refused = any(p.needed_bytes is not None for p in self.programs)
        return not refused and self.total_bytes() <= self.target.chip.memory_bytes

    def flops_per_image(self) -> float:
        """Products and convolutions of one iteration on all devices, by its images."""
        flops = sum(self.calls[p.name] * p.cost.flops for p in self.programs)
        return flops * self.target.count / self.batch_size

    def received_bytes(self) -> dict[str, float]:
        """Of one iteration, by kind of collective, per device."""
        total: dict[str, float] = {}
        for program in self.programs:
            for one in program.collectives:
                total[one.kind] = total.get(one.kind, 0.0) + self.calls[program.name] * one.received_bytes
        return total

    def floor_seconds(self) -> dict[str, float] | None:
        """Least time of one iteration by what limits it; None where the chip's peaks are unknown.

        "floor" is the sum over programs of the largest of the three; no program that moves as much can do better.
        """
        chip = self.target.chip
        if chip.bf16_flops is None:
            return None
        seconds = {"products": 0.0, "memory": 0.0, "links": 0.0, "floor": 0.0}
        for program in self.programs:
            parts = program_seconds(program, chip)
            for name, value in parts.items():
                seconds[name] += self.calls[program.name] * value
            seconds["floor"] += self.calls[program.name] * max(parts.values())
        return seconds

    def images_per_second_per_chip(self) -> dict[str, float] | None:
        """ "at most": by the floor. "predicted": products at `ASSUMED_SHARE` of the peak, links not overlapped."""
        seconds = self.floor_seconds()
        if seconds is None:
            return None
        per_chip = self.batch_size / self.target.count
        predicted = max(seconds["products"] / ASSUMED_SHARE, seconds["memory"]) + seconds["links"]
        return {"at most": per_chip / seconds["floor"], "predicted": per_chip / predicted}

    def weak_scaling(self) -> list[dict[str, float]] | None:
        """The same samples per chip on more chips: `fsdp` as it is, `data` larger. Nothing overlaps: the worst case.

        For TPUs of up to 16 chips, whose links are the same in any slice; None for others.
        """
        seconds, (data, fsdp) = self.floor_seconds(), self.mesh
        smallest = EFFICIENCY_SIZES[0]
        if self.target.chip.platform != "tpu" or self.target.count > smallest or smallest % fsdp:
            return None
        compute = max(seconds["products"], seconds["memory"])
        rows = []
        for chips in EFFICIENCY_SIZES:
            received = sum(
                self.calls[p.name] * sum(c.received_bytes for c in scaled(p.collectives, data, fsdp, chips // fsdp))
                for p in self.programs
            )
            links = received / self.target.chip.link_bandwidth
            rows.append({"chips": chips, "received_bytes": received, "links": links, "seconds": compute + links})
        return [{**row, "compute": compute, "efficiency": rows[0]["seconds"] / row["seconds"]} for row in rows]


def program_seconds(program: Program, chip: Chip) -> dict[str, float]:
    """Least seconds of one call for its products, its memory traffic and its collectives, each alone."""
    cost = program.cost
    return {
        "products": cost.bfloat16_flops / chip.bf16_flops + cost.float32_flops / chip.float32_flops,
        "memory": cost.memory_bytes / chip.memory_bandwidth,
        "links": program.received_bytes / chip.link_bandwidth,
    }


def scaled(collectives: tuple[Collective, ...], data: int, fsdp: int, new_data: int) -> list[Collective]:
    """The collectives of a mesh (data, fsdp) on (new_data, fsdp).

    A group of `fsdp` devices stays. One over `data` grows with it, as does one over all devices. What is scattered over
    `fsdp` where there was no `data` axis has to be summed over it too: an all-reduce of each device's part.
    """
    found = []
    for c in collectives:
        over_all = c.kind == "all-reduce" and c.group == data * fsdp
        if over_all or (c.group == data and data > 1 and (c.apart or c.group != fsdp)):
            found.append(dataclasses.replace(c, group=c.group // data * new_data))
            continue
        found.append(c)
        if c.kind == "reduce-scatter" and data == 1 and new_data > 1:
            found.append(Collective("all-reduce", c.whole_bytes / fsdp, new_data, c.times))
    return found


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything, derived figures too, as plain values."""
    fields = dataclasses.asdict(plan)
    return {
        **fields,
        "method": plan.method,
        "total_bytes": plan.total_bytes(),
        "fits": plan.fits,
        "flops_per_image": plan.flops_per_image(),
        "received_bytes_per_iteration": plan.received_bytes(),
        "floor_seconds": plan.floor_seconds(),
        "images_per_second_per_chip": plan.images_per_second_per_chip(),
        "weak_scaling": plan.weak_scaling(),
    }


def from_json(fields: Mapping[str, Any]) -> Plan:
    """The inverse of `to_json`."""
    from d2g_jax.plan.trace import Cost

    target = Target(**{**fields["target"], "chip": Chip(**fields["target"]["chip"])})
    programs = tuple(
        Program(
            **{
                **program,
                "cost": Cost(**program["cost"]),
                "collectives": tuple(Collective(**c) for c in program["collectives"]),
            }
        )
        for program in fields["programs"]
    )
    own = {field.name: fields[field.name] for field in dataclasses.fields(Plan) if field.name in fields}
    return Plan(**{**own, "target": target, "programs": programs, "mesh": tuple(fields["mesh"])})
