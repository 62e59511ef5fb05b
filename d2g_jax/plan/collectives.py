"""What a compiled program sends between devices, read from its HLO text, and the arithmetic of rings.

Ring arithmetic (Thakur, Rabenseifner and Gropp, 2005): of an array of S bytes on n devices, each receives S (n - 1) /
n in an all-gather (S the gathered array) and in a reduce-scatter (S the array before), twice that in an all-reduce, S
(n - 1) / n in an all-to-all, and S in a permutation.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

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
    """One collective operation: `whole_bytes` of the whole array over `group` devices, `times` in a call.

    `apart`: the devices of a group are no neighbours in the mesh, as along `data` beside `fsdp`.
    """

    kind: str
    whole_bytes: float
    group: int
    times: int = 1
    apart: bool = False

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
            group, apart = _group(line, devices)
            whole = sum(arrays) * (group if kind == "reduce-scatter" else 1)
            if kind == "all-reduce" and current.startswith(_SCATTERED):
                kind = "reduce-scatter"
            runs = times.get(current, 1)
            if runs is None:
                raise UserError(f"the compiled program has a loop of unknown length around {kind}: not countable")
            found.append(Collective(kind, whole, group, runs, apart))
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


def _group(line: str, devices: int) -> tuple[int, bool]:
    """Devices of a group, all where the text has none, and whether they lie apart."""
    ids = _first_group(line)
    if ids is None:
        return devices, False
    return len(ids), sorted(ids) != list(range(min(ids), min(ids) + len(ids)))


def _first_group(line: str) -> list[int] | None:
    """Of {{0,1},{2,3}}, [2,4]<=[8], [4,2]<=[2,4]T(1,0) or mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return _numbers(match[1])
    if match := re.search(r"replica_groups=\[\d+,(\d+)\](?:<=(\[[\d,]+\](?:T\([\d,]+\))?))?", line):
        return _listed(match[2] or f"[{match[1]}]").tolist()[: int(match[1])]
    found = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", line)
    if found is None:
        return None
    taken = {name: (before, part) for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[3])}
    shape: list[int] = []
    for name, side in re.findall(r"'(\w+)'=(\d+)", found[1]):
        before, part = taken.get(name, (side, "1"))
        before, part = int(before or 1), int(part or side)
        shape += [before, part, int(side) // (before * part)]
    ids = _listed(found[2] or f"[{math.prod(shape)}]").reshape(shape)
    return ids[(0, slice(None), 0) * (len(shape) // 3)].ravel().tolist()


def _listed(text: str) -> np.ndarray:
    """The numbers that [2,4]T(1,0) or 0,1,2 stands for: int64 (N,)."""
    if match := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        sides = _numbers(match[1])
        order = _numbers(match[2]) if match[2] else range(len(sides))
        return np.arange(math.prod(sides)).reshape(sides).transpose(order).ravel()
    return np.array(_numbers(text))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
