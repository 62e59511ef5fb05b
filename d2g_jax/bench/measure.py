"""What every bench shares: programs with the facts of their compilation, timing in turns, a table and a JSON file.

Times of one run are comparable, times of two runs are not: a machine's clock and its other work change. So everything
that is compared, the other framework's counterpart included, is called in turns, and medians are reported.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from d2g_jax.plan.trace import program_cost
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.progress import Progress
from d2g_jax.runtime.runs import environment

PRODUCT = "matrix product"
"""Name of the row whose best rate counts as the device's peak; see `product_candidate` and `peaks`."""

RIVALS = ("torch", "diffusers", "transformers")
"""What the benches compare with, where it is installed; no dependencies."""

GIB = 2.0**30

_TURN_SECONDS = 1.0
_TURN_CALLS = 10


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a program without running it.

    Attributes:
      compile_seconds: tracing, lowering and compiling.
      temp_bytes: memory that the compiled program takes beside its arguments and results; None if it is several.
      output_bytes: of its results.
      flops: of one call: see `flops`.
      peak_bytes: arguments, temporaries and results together; None if it is several.
    """

    compile_seconds: float
    temp_bytes: int | None
    output_bytes: int
    flops: float
    peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """Something to time.

    Attributes:
      name, dtype: of its row.
      call: runs it once, waits, and returns the result; None when it does not run here.
      facts: None for another framework's.
      not_run: why `call` is None.
      describe: what the row says of the result besides, as a dict for JSON.
    """

    name: str
    dtype: str
    call: Callable[[], Any] | None
    facts: Facts | None = None
    not_run: str | None = None
    describe: Callable[[Any], dict[str, Any]] = lambda result: {}


def check_counts(request: Any, *flags: str) -> None:
    """Raises `UserError` unless these fields of a bench's request are 1 or more."""
    for flag in flags:
        if getattr(request, flag) < 1:
            raise UserError(f"--{flag}={getattr(request, flag)}: give 1 or more")


def compile_candidate(
    name: str,
    dtype: str,
    function: Callable[..., Any],
    *args: Any,
    describe: Callable[[Any], dict[str, Any]] = lambda result: {},
) -> Candidate:
    """Compiles `function(*args)` for the arguments at hand; a candidate without `call` when its memory is not there."""
    _, program, facts = compile_program(function, *args)
    if reason := does_not_fit(facts.temp_bytes + facts.output_bytes):
        return Candidate(name, dtype, None, facts, reason)
    return Candidate(name, dtype, lambda: jax.block_until_ready(program(*args)), facts, describe=describe)


def compile_program(function: Callable[..., Any], *args: Any) -> tuple[jax.stages.Traced, jax.stages.Compiled, Facts]:
    """`function`, compiled for such arguments, or `jax.ShapeDtypeStruct`s for them."""
    start = time.perf_counter()
    traced = jax.jit(function).trace(*args)
    program = traced.lower().compile()
    return traced, program, facts_of(traced, program, time.perf_counter() - start)


def facts_of(traced: jax.stages.Traced, program: jax.stages.Compiled, seconds: float) -> Facts:
    """What is known of a program that took so long to compile; donated arguments count once."""
    memory = program.memory_analysis()
    temp, output = memory.temp_size_in_bytes, memory.output_size_in_bytes
    peak = memory.argument_size_in_bytes + temp + output - memory.alias_size_in_bytes
    return Facts(seconds, temp, output, flops(traced), peak)


def does_not_fit(needed: float) -> str | None:
    """Why something that needs so many bytes more is not run; None where it may."""
    free = available_bytes()
    if free is None or needed <= free:
        return None
    return f"needs {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free"


def flops(traced: jax.stages.Traced) -> float:
    """Of the products and convolutions of one call of `jax.jit(f).trace(...)`, on all devices, recomputation included.

    Not XLA's count, which takes a loop for one turn of it and does not look into the kernels of accelerators.
    """
    return program_cost(traced.jaxpr).flops


def product_candidate(dtype: str) -> Candidate:
    """A large square matrix product in `dtype`: what the device can do at most."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.full((side, side), 0.5, dtype)
    return compile_candidate(PRODUCT, dtype, jnp.matmul, a, a)


def available_bytes() -> int | None:
    """Memory that a program may still take, of the first device or, where that is a CPU, the host; None if unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def time_in_turns(candidates: Sequence[Candidate], rounds: int) -> list[dict[str, Any]]:
    """One row for each candidate, in order.

    A call of each goes ahead untimed. In every round each has a turn of at most ten calls, which ends after the first
    call that is past one second: short ones get a steady median, long ones stay affordable.

    Returns:
      Dicts for JSON: `name`, `dtype`, `seconds` (median of a call), `best_seconds` (its minimum, which other work on
      the machine disturbs least), `all_seconds`, `compile_seconds`, `temp_bytes`, `peak_bytes`, `flops`,
      `share_of_peak` (see `peaks`), `not_run`, and what `describe` says. What is unknown or not run is None.
    """
    described = []
    with Progress("first calls", len(candidates), "programs") as progress:
        for candidate in progress.over(candidates):
            described.append(candidate.describe(candidate.call()) if candidate.call else {})
    seconds: list[list[float]] = [[] for _ in candidates]
    with Progress("timing", rounds, "rounds") as progress:
        for _ in progress.over(range(rounds)):
            for candidate, times in zip(candidates, seconds, strict=True):
                if candidate.call:
                    times += _turn(candidate.call)
    rows = [_row(*row) for row in zip(candidates, seconds, described, strict=True)]
    of_dtype = peaks(rows)
    for row in rows:
        row["share_of_peak"] = ratio(ratio(row["flops"] or None, row["seconds"]), of_dtype.get(row["dtype"]))
    return rows


def peaks(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """FLOP/s by dtype: what the `PRODUCT` reached in its best call.

    Its median would not do: what disturbs the product would lower the peak, and raise every share of it. So a row's
    median rate by this is a share that noise can only lower, that of the product too.
    """
    return {row["dtype"]: ratio(row["flops"], row["best_seconds"]) for row in rows if row["name"] == PRODUCT}


def _turn(call: Callable[[], Any]) -> list[float]:
    times: list[float] = []
    while len(times) < _TURN_CALLS and sum(times) < _TURN_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _row(candidate: Candidate, seconds: list[float], described: dict[str, Any]) -> dict[str, Any]:
    facts = candidate.facts
    return {
        "name": candidate.name,
        "dtype": candidate.dtype,
        "seconds": statistics.median(seconds) if seconds else None,
        "best_seconds": min(seconds, default=None),
        "all_seconds": [round(s, 7) for s in seconds],
        "compile_seconds": round(facts.compile_seconds, 3) if facts else None,
        "temp_bytes": facts.temp_bytes if facts else None,
        "peak_bytes": facts.peak_bytes if facts else None,
        "flops": facts.flops if facts else None,
        "not_run": candidate.not_run,
        **described,
    }


@dataclasses.dataclass(frozen=True)
class Bar:
    """A claim and what was measured.

    Attributes:
      claim: a sentence that names the limit.
      measured: the figure; None when it was not measured.
      met: None likewise.
    """

    claim: str
    measured: float | None
    met: bool | None

    @classmethod
    def at_least(cls, claim: str, measured: float | None, limit: float) -> Bar:
        return cls(claim, measured, None if measured is None else measured >= limit)

    @classmethod
    def at_most(cls, claim: str, measured: float | None, limit: float) -> Bar:
        return cls(claim, measured, None if measured is None else measured <= limit)


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below, or None when either was not measured."""
    return None if above is None or not below else above / below


def make_report(bench: str, settings: dict[str, Any], rows: list[dict[str, Any]], bars: Sequence[Bar]) -> dict:
    """The whole result as a dict for JSON: what ran where and when, the rows, the bars."""
    return {
        "bench": bench,
        "date": datetime.date.today().isoformat(),
        "environment": {**environment(), **_rivals(), "processor": _processor(), "load_average": _load_average()},
        "settings": settings,
        "rows": rows,
        "bars": [dataclasses.asdict(bar) for bar in bars],
    }


def _rivals() -> dict[str, str]:
    """Versions of what is installed to compare with."""
    return {name: importlib.metadata.version(name) for name in RIVALS if importlib.util.find_spec(name)}


def _processor() -> str | None:
    """The host's, which JAX calls "cpu" whatever it is."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _load_average() -> float | None:
    """Programs that wanted to run in the last five minutes: beyond the cores, times are those of a busy machine."""
    return round(os.getloadavg()[1], 2) if hasattr(os, "getloadavg") else None


def format_report(report: dict[str, Any]) -> str:
    """The report as text: a line of place and settings, the table, the bars."""
    place, settings = report["environment"], report["settings"]
    versions = ", ".join(f"{name} {place[name]}" for name in ("python", "jax", "torch", "diffusers") if place.get(name))
    host = f"{place['processor']}, {place['cores']} cores, load average {place['load_average']}"
    where = f"{report['date']}, {place['device']} ({host}), {versions}"
    how = ", ".join(f"{name}={value}" for name, value in settings.items())
    headings = ("", "dtype", "ms", "best ms", "compile s", "temp MiB", "peak MiB", "GFLOP", "of peak", "value")
    table = _table([headings, *(_cells(row) for row in report["rows"])])
    notes = [f"{row['name']} {row['dtype']}: not run: {row['not_run']}" for row in report["rows"] if row["not_run"]]
    return "\n".join([f"bench {report['bench']}: {how}", where, "", table, *notes, "", *_bar_lines(report)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    show = lambda key, factor, form: "-" if row.get(key) is None else format(row[key] * factor, form)  # noqa: E731
    numbers = (
        show("seconds", 1e3, ".2f"),
        show("best_seconds", 1e3, ".2f"),
        show("compile_seconds", 1, ".1f"),
        show("temp_bytes", 2**-20, ".1f"),
        show("peak_bytes", 2**-20, ".1f"),
        show("flops", 1e-9, ".2f"),
        show("share_of_peak", 100, ".0f") + ("" if row["share_of_peak"] is None else "%"),
        show("value", 1, ".6f"),
    )
    return row["name"], row["dtype"], *numbers


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cell = lambda i, text: text.ljust(widths[i]) if i < 2 else text.rjust(widths[i])  # noqa: E731
    return "\n".join("  ".join(cell(i, text) for i, text in enumerate(line)).rstrip() for line in lines)


def _bar_lines(report: dict[str, Any]) -> list[str]:
    words = {True: "met", False: "MISSED", None: "not measured"}
    lines = []
    for bar in report["bars"]:
        figure = "" if bar["measured"] is None else f": {bar['measured']:.4g}"
        lines.append(f"{words[bar['met']]:13}{bar['claim']}{figure}")
    return lines
