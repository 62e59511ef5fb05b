"""A plan as text, and a list of plans as a table for docs/plan.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2g_jax.plan.plan import ASSUMED_SHARE, EFFICIENCY_BAR, Plan, program_seconds
from d2g_jax.plan.programs import Program
from d2g_jax.plan.sampling import SamplingPlan
from d2g_jax.plan.targets import GIB
from d2g_jax.results.table import markdown

_FORMULA = "by formula, not compiled"


def format_plan(plan: Plan) -> str:
    """One plan: memory, programs, collectives, the time floor, weak scaling."""
    target, total = plan.target, plan.total_bytes()
    share, (data, fsdp) = plan.batch_size // target.count, plan.mesh
    beside = max((p.beside_arguments or 0.0 for p in plan.programs), default=0.0)
    verdict = f"of {_gib(target.chip.memory_bytes)}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    lines = [
        f"plan {plan.name} for {target.topology}: {target.count} devices, mesh data={data} fsdp={fsdp}, "
        f"batch {plan.batch_size} ({share} a device); {'compiled' if plan.method == 'compiled' else _FORMULA}",
        "settings  " + ", ".join(f"{name}={value}" for name, value in plan.settings.items()),
        "",
        "memory of one device, GiB",
        *(f"  {name:24}{_gib(value):>9}" for name, value in plan.resident.items()),
        f"  {'stays, as compiled':24}{_gib(plan.arguments_bytes):>9}",
        f"  {'code of all steps':24}{_gib(plan.code_bytes):>9}",
        f"  {'most beside, in a step':24}{_gib(beside):>9}",
        f"  {'total':24}{_gib(total):>9} {verdict}",
        *([f"  {'a compiler may take':24}{_gib(compiled):>9}"] if (compiled := plan.compiled_bytes()) else []),
        "",
        _programs_table(plan),
        "",
        *_collective_lines(plan),
        *_time_lines(plan),
    ]
    return "\n".join(lines)


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f}"


def _programs_table(plan: Plan) -> str:
    headings = ("step", "arguments", "outputs", "aliased", "temporaries", "code", "TFLOP", "GB moved", "GB received")
    rows = [headings + (("floor ms",) if plan.floor_seconds() else ())]
    rows += [_program_cells(program, plan) for program in plan.programs]
    refused = [
        f"  {p.name}: the compiler refuses it, {_gib(p.needed_bytes)} GiB are needed"
        for p in plan.programs
        if p.needed_bytes is not None
    ]
    return "\n".join(["one call of each step, on one device (memory in GiB)", _columns(rows), *refused])


def _program_cells(program: Program, plan: Plan) -> tuple[str, ...]:
    sizes = ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "code_bytes")
    cells = [program.name, *(_gib(getattr(program, name)) for name in sizes)]
    cost = program.cost
    cells += [f"{cost.flops / 1e12:.3f}", f"{cost.memory_bytes / 1e9:.2f}", f"{program.received_bytes / 1e9:.3f}"]
    if plan.floor_seconds():
        cells.append(f"{1e3 * max(program_seconds(program, plan.target.chip).values()):.1f}")
    return tuple(cells)


def _collective_lines(plan: Plan) -> list[str]:
    received = plan.received_bytes()
    if not received:
        return ["no collectives"]
    parts = ", ".join(f"{kind} {value / 1e9:.3f}" for kind, value in received.items())
    return [f"received from other devices in one iteration, GB a device: {parts}"]


def _time_lines(plan: Plan) -> list[str]:
    seconds, rate = plan.floor_seconds(), plan.images_per_second_per_chip()
    flops = f"{plan.flops_per_image() / 1e12:.2f} TFLOP an image"
    if seconds is None:
        return [f"{flops}; no time floor: this chip has no published peaks here"]
    lines = [
        f"{flops}; one iteration takes at least {seconds['floor']:.3f} s (products {seconds['products']:.3f}, memory "
        f"{seconds['memory']:.3f}, links {seconds['links']:.3f})",
        f"images/s a chip: at most {rate['at most']:.2f}, predicted {rate['predicted']:.2f} with products at "
        f"{ASSUMED_SHARE:.0%} of the peak and links not overlapped",
    ]
    if plan.images:
        hours = {name: plan.images / (3600 * plan.target.count * value) for name, value in rate.items()}
        lines.append(
            f"{plan.images:,} images: {hours['predicted']:.3g} hours predicted, at least {hours['at most']:.3g}"
        )
    rows = plan.weak_scaling() or []
    for row in rows:
        lines.append(
            f"  {row['chips']:4} chips: {row['received_bytes'] / 1e9:.2f} GB received, links {row['links']:.3f} s "
            f"beside {row['compute']:.3f} s, efficiency {row['efficiency']:.1%}"
        )
    if rows:
        word = "met" if rows[-1]["efficiency"] >= EFFICIENCY_BAR else "MISSED"
        lines.append(f"  at least {EFFICIENCY_BAR:.0%} at {rows[-1]['chips']} chips: {word}")
    return lines


def format_search(asked: Plan, found: Plan | None, tried: Sequence[Plan]) -> str:
    """What was tried to make a config fit, and what did, as flags that change the plan that was asked for."""
    lines = [f"tried: {_changes(asked, plan)}: {_gib(plan.total_bytes())} GiB, does not fit" for plan in tried]
    if found is None:
        changes = "change of mesh, rematerialisation, micro-batch or moments"
        end = f"no {changes} makes it fit" if not tried else f"no {changes} that was tried makes it fit"
        return "\n".join([*lines, end])
    return "\n".join([*lines, f"the cheapest change that fits: {_changes(asked, found)}", "", format_plan(found)])


def format_sampling(plans: Sequence[SamplingPlan]) -> str:
    """One-step sampling of several batches on one device, as a Markdown table with the verdict on memory below."""
    first = plans[0]
    how = "compiled" if first.method == "compiled" else _FORMULA
    headings = ("", "GiB of weights, inputs", "temporaries", "GFLOP", "GB moved", "floor ms", "of peak at most")
    rows = [(*headings, "images/s at most")]
    for plan in plans:
        rows += _sampling_rows(plan)
    limit = _gib(first.target.chip.memory_bytes)
    verdicts = [
        f"batch {plan.batch}: {_gib(plan.total_bytes())} of {limit} GiB: {'fits' if plan.fits else 'DOES NOT FIT'}"
        for plan in plans
    ]
    title = f"one-step sampling, {first.model}, {first.dtype}, one device of {first.target.topology}; {how}"
    return "\n".join([title, "", markdown(rows), "", *verdicts])


def _sampling_rows(plan: SamplingPlan) -> list[tuple[str, ...]]:
    floors, rows = plan.floors() or {}, []
    for p in plan.programs:
        row = (f"{p.name} x{plan.batch}", _gib(p.argument_bytes), _gib(p.temp_bytes), f"{p.cost.flops / 1e9:,.1f}")
        rows.append((*row, f"{p.cost.memory_bytes / 1e9:.2f}", *_floor_cells(floors.get(p.name), plan.batch)))
    if floors:
        rows.append((f"all x{plan.batch}", "", "", "", "", *_floor_cells(floors["all"], plan.batch)))
    return rows


def _floor_cells(floor: Mapping[str, float] | None, batch: int) -> tuple[str, ...]:
    if floor is None or not floor["seconds"]:  # as of the classes that a teacher of images is told
        return ("-", "-", "-")
    seconds = floor["seconds"]
    return f"{1e3 * seconds:.2f}", f"{floor['products'] / seconds:.0%}", f"{batch / seconds:,.1f}"


def _changes(asked: Plan, plan: Plan) -> str:
    """Flags for the settings that differ; `mesh.data` takes what another `mesh.fsdp` leaves."""
    changes = {name: value for name, value in plan.settings.items() if value != asked.settings[name]}
    if "mesh.fsdp" in changes:
        changes["mesh.data"] = -1
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def format_table(plans: Sequence[tuple[Plan, str]]) -> str:
    """Plans, and what each is called, as a Markdown table; below it weak scaling, of those that have it."""
    headings = ("config", "target", "how", "settings", "GiB", "fits", "TFLOP/image", "floor s")
    headings += ("images/s/chip at most", "predicted", "efficiency at 256 chips")
    table = markdown([headings, *(_row(plan, name) for plan, name in plans)])
    scaling = [row for plan, name in plans for row in _scaling_rows(plan, name)]
    if not scaling:
        return table
    headings = ("config", "target", "chips", "GB received by each", "links s", "compute s", "efficiency")
    return f"{table}\n\n{markdown([headings, *scaling])}"


def _scaling_rows(plan: Plan, name: str) -> list[tuple[str, ...]]:
    return [
        (
            plan.name,
            name,
            str(row["chips"]),
            f"{row['received_bytes'] / 1e9:.1f}",
            f"{row['links']:.3f}",
            f"{row['compute']:.2f}",
            f"{row['efficiency']:.1%}",
        )
        for row in plan.weak_scaling() or []
    ]


def _row(plan: Plan, name: str) -> tuple[str, ...]:
    seconds, rate = plan.floor_seconds(), plan.images_per_second_per_chip()
    limit, scaling = _gib(plan.target.chip.memory_bytes), plan.weak_scaling()
    return (
        plan.name,
        name,
        plan.method,
        _short(plan.settings),
        f"{_gib(plan.total_bytes())} of {limit}",
        "yes" if plan.fits else "**no**",
        f"{plan.flops_per_image() / 1e12:.1f}",
        f"{seconds['floor']:.2f}" if seconds else "-",
        f"{rate['at most']:.2f}" if rate else "-",
        f"{rate['predicted']:.2f}" if rate else "-",
        f"{scaling[-1]['efficiency']:.0%}" if scaling else "-",
    )


def _short(settings: Mapping[str, Any]) -> str:
    moments = {value for name, value in settings.items() if name.endswith("moment_dtype")}
    return (
        f"fsdp {settings['mesh.fsdp']}, remat {settings['train.remat']}, micro {settings['train.micro_batch']}, "
        f"R1 {settings['train.r1_micro_batch']}, moments {'/'.join(sorted(moments))}"
    )


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cell = lambda i, text: text.ljust(widths[i]) if i == 0 else text.rjust(widths[i])  # noqa: E731
    return "\n".join("  " + "  ".join(cell(i, text) for i, text in enumerate(row)) for row in rows)
