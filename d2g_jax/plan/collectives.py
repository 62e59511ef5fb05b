"""What a compiled program sends between devices, read from its HLO text, and the arithmetic of rings.

Ring arithmetic (Thakur, Rabenseifner and Gropp, 2005): of an array of S bytes on n devices, each receives S (n - 1) /
n in an all-gather (S the gathered array) and in a reduce-scatter (S the array before), twice that in an all-reduce, S
(n - 1) / n in an all-to-all, and S in a permutation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = re.compile(r"\d+")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_WHILE = re.compile(r" while\(.*\bcondition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.-]+(?:, %?[\w.-]+)*)\}?")


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


def by_kind(collectives: Iterable[Collective]) -> dict[str, float]:
    """Bytes received by each device under the kinds that occur."""
    totals: dict[str, float] = {}
    for collective in collectives:
        totals[collective.kind] = totals.get(collective.kind, 0.0) + collective.received_bytes
    return totals


def parse_collectives(hlo: str, devices: int) -> list[Collective]:
    """The collectives of `compiled.as_text()`, those in loops as often as XLA knows that they run.

    `devices` is the size of a group that the text leaves empty: all of them.
    """
    times = _times(hlo)
    found, current = [], ""
    for line in hlo.splitlines():
        if computation := _COMPUTATION.match(line):
            current = computation[1]
        elif instruction := _INSTRUCTION.match(line):
            shapes, kind, start = instruction.groups()
            arrays = [_bytes(*array) for array in _ARRAY.findall(shapes)]
            if start and kind != "all-reduce":  # its result holds the operands beside the results
                arrays = arrays[len(arrays) // 2 :] if kind != "collective-permute" else arrays[1:2]
            group = _group_size(line, devices)
            whole = sum(arrays) * (group if kind == "reduce-scatter" else 1)
            found.append(Collective(kind, whole, group, times.get(current, 1)))
    return found


def _times(hlo: str) -> dict[str, int]:
    """How often each computation runs in one call, by name: once, but in loops whose length XLA knows."""
    callers: dict[str, tuple[str, int]] = {}
    current = ""
    for line in hlo.splitlines():
        if computation := _COMPUTATION.match(line):
            current = computation[1]
            continue
        loop = _WHILE.search(line)
        trips = _TRIPS.search(line)
        for names in _CALLED.findall(line):
            for name in names.replace("%", "").split(", "):
                inside = bool(loop and trips and name == loop[2])
                callers[name] = current, int(trips[1]) if inside else 1

    def times(name: str) -> int:
        total = 1
        while name in callers:
            name, trips = callers[name]
            total *= trips
        return total

    return {name: times(name) for name in callers}


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
