"""What a compiled program sends between devices, read from its HLO text, and the arithmetic of rings.

Ring arithmetic (Thakur, Rabenseifner and Gropp, 2005): of an array of S bytes on n devices, each receives S (n - 1) /
n in an all-gather (S the gathered array) and in a reduce-scatter (S the array before), twice that in an all-reduce, S
(n - 1) / n in an all-to-all, and S in a permutation.
"""

from __future__ import annotations

import dataclasses
import math
import re

from d2g_jax.runtime.errors import UserError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = re.compile(r"\d+")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_WHILE = re.compile(r" while\(.*\bcondition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SCATTERED = "all-reduce-scatter"
"""Name of computations that are one operation on TPUs: an all-reduce of which each device takes a slice."""
_PIECE = re.compile(r'channel_id=(\d+).*"async_collective_fusion_config":')
"""In a TPU's text a collective that runs beside fusions stands in its start, in each of these and in its end."""
_CONSTANT = re.compile(r"^\s*%?([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"^\s*ROOT .* compare\(\S+ ?%?[\w.-]+, (?:\S+ )?%?([\w.-]+)\), direction=LT")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|%?([\w.-]+))")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation: `whole_bytes` of the whole array over `group` devices, `times` in a call."""

    kind: str
    whole_bytes: float
    group: int
    times: int = 1

    @property
    def received_bytes(self) -> float:
        """Bytes that each device receives in one call of the program."""
        return self.times * ring_bytes(self.kind, self.whole_bytes, self.group)


def ring_bytes(kind: str, whole_bytes: float, group: int) -> float:
    """Bytes that each of `group` devices receives; see above."""
    if kind == "collective-permute":
        return whole_bytes
    return (2 if kind == "all-reduce" else 1) * whole_bytes * (group - 1) / group


def parse_collectives(hlo: str, devices: int) -> list[Collective]:
    """The collectives of `compiled.as_text()`, those in loops as often as they run.

    `devices` is the size of a group that the text leaves empty: all of them. Raises `UserError` for a collective in a
    loop whose length the text does not tell.
    """
    times = _times(hlo)
    found, current, started = [], "", set()
    for line in hlo.splitlines():
        if computation := _COMPUTATION.match(line):
            current = computation[1]
        elif instruction := _INSTRUCTION.match(line):
            if piece := _PIECE.search(line):
                if piece[1] in started:
                    continue
                started.add(piece[1])
            shapes, kind, start = instruction.groups()
            arrays = [_bytes(*array) for array in _ARRAY.findall(shapes)]
            if start and kind != "all-reduce":  # its result holds the operands beside the results
                arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
            group = _group_size(line, devices)
            whole = sum(arrays) * (group if kind == "reduce-scatter" else 1)
            if kind == "all-reduce" and current.startswith(_SCATTERED):
                kind = "reduce-scatter"
            runs = times.get(current, 1)
            if runs is None:
                raise UserError(f"the compiled program has a loop of unknown length around {kind}: not countable")
            found.append(Collective(kind, whole, group, runs))
    return found


def _times(hlo: str) -> dict[str, int | None]:
    """How often each computation that another calls runs in one call of the program; None in a loop of unknown length.

    CPUs' text tells a loop's length; in TPUs' it is the constant that the loop's condition compares its counter with,
    which for `jax.lax.scan` starts at 0.
    """
    callers: dict[str, tuple[str, int | None]] = {}
    current, bounds = "", _bounds(hlo)
    for line in hlo.splitlines():
        if computation := _COMPUTATION.match(line):
            current = computation[1]
            continue
        loop, trips = _WHILE.search(line), _TRIPS.search(line)
        length = int(trips[1]) if trips else bounds.get(loop[1]) if loop else None
        for several, one in _CALLED.findall(line):
            for name in (several or one).replace("%", "").split(", "):
                callers[name] = current, length if loop and name == loop[2] else 1

    def times(name: str) -> int | None:
        total = 1
        while name in callers:
            name, trips = callers[name]
            if trips is None:
                return None
            total *= trips
        return total

    return {name: times(name) for name in callers}


def _bounds(hlo: str) -> dict[str, int]:
    """Of computations that end in "counter < constant" the constant."""
    found, current, constants = {}, "", {}
    for line in hlo.splitlines():
        if computation := _COMPUTATION.match(line):
            current, constants = computation[1], {}
        elif constant := _CONSTANT.match(line):
            constants[constant[1]] = int(constant[2])
        elif (below := _BELOW.match(line)) and below[1] in constants:
            found[current] = constants[below[1]]
    return found


def _bytes(dtype: str, dimensions: str) -> float:
    bits = 8 if dtype == "pred" else int(_BITS.search(dtype)[0])
    return bits / 8 * math.prod(int(side) for side in dimensions.split(",") if side)


def _group_size(line: str, devices: int) -> int:
    """From replica_groups={{0,1},{2,3}}, [2,4]<=[8] or mesh['a'=2,'b'=4] {'b'}; empty groups mean all devices."""
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([\d,]*\))? \{([^}]*)\}", line):
        sides = {name: int(side) for name, side in re.findall(r"'(\w+)'=(\d+)", match[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sides[name] for name, part in axes)
    return devices
