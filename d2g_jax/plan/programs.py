"""One step of training as a plan sees it: compiled for the target, or by formula from its trace."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from d2g_jax.plan import store
from d2g_jax.plan.collectives import Collective, parse_collectives
from d2g_jax.plan.targets import Target, described_tpu, libtpu_version, unpaired_libtpu
from d2g_jax.plan.trace import Cost
from d2g_jax.runtime.errors import UserError

_LESS_EFFORT = (
    {"exec_time_optimization_effort": -1.0}
    if hasattr(jax.config, "jax_exec_time_optimization_effort")
    else {"optimization_level": "O1"}  # what it is called from jax 0.11.1 on
)
COMPILER_OPTIONS = {"tpu": _LESS_EFFORT}
"""By platform. Memory and FLOPs are those of full effort to within 1%, in a quarter of the time and a third of the
host's memory."""

_MEMORY = ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "code_bytes")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """Of one call, on one device.

    Attributes:
      name: "g_regression", "g_adversarial", "d" or "r1".
      method: "compiled" or "formula".
      argument_bytes, output_bytes, alias_bytes, temp_bytes, code_bytes: of memory; outputs that take the place of
        donated arguments count as `alias_bytes` too. None where the compiler gave up.
      needed_bytes: of memory, all together, where the compiler gave up because that is more than there is.
      cost: FLOPs and bytes, counted in the trace; XLA's own count of bytes takes a loop's body once and, on TPUs, every
        copy into the chip's own memory as traffic.
      collectives: what it sends.
      compile_seconds: of the compiler; None by formula.
    """

    name: str
    method: str
    argument_bytes: float | None
    output_bytes: float | None
    alias_bytes: float | None
    temp_bytes: float | None
    code_bytes: float | None
    cost: Cost
    collectives: tuple[Collective, ...]
    needed_bytes: float | None = None
    compile_seconds: float | None = None

    @property
    def beside_arguments(self) -> float | None:
        """What a call takes while it runs beside what stays: temporaries, and outputs without a donated place."""
        if self.temp_bytes is None:
            return None
        return self.temp_bytes + self.output_bytes - self.alias_bytes

    @property
    def received_bytes(self) -> float:
        """From other devices."""
        return sum(collective.received_bytes for collective in self.collectives)


def compile_program(name: str, traced: jax.stages.Traced, cost: Cost, target: Target) -> Program:
    """Compiles a step for the target's devices, or takes what an earlier compilation of the same text said."""
    lowered = traced.lower()
    options = COMPILER_OPTIONS.get(target.chip.platform, {})
    key = {
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        "topology": target.topology,
        "options": options,
        "kept": "memory and text",
        **store.versions(),
    }
    told = f"plan: compiling {name} for {target.topology}, which may take minutes"
    facts = store.cached(key, lambda: _compile(lowered, options, told))
    collectives = tuple(parse_collectives(_unpacked(facts["text"]), target.count))
    kept = {field: facts[field] for field in (*_MEMORY, "needed_bytes", "compile_seconds")}
    return Program(name, "compiled", cost=cost, collectives=collectives, **kept)


def _compile(lowered: jax.stages.Lowered, options: Mapping[str, Any], told: str) -> dict[str, Any]:
    """Plain values for JSON: the fields of `Program` that the compiler knows, and its text.

    The text, not what is read from it: to read it in a better way must not cost an hour's compilation again.
    """
    print(told, file=sys.stderr, flush=True)
    start = time.monotonic()
    memory = dict.fromkeys(_MEMORY)
    try:
        with described_tpu():
            compiled = lowered.compile(compiler_options=dict(options))
    except JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        facts: dict[str, Any] = {"needed_bytes": needed, "text": _packed("")}
    else:
        analysis = compiled.memory_analysis()
        memory = {
            "argument_bytes": analysis.argument_size_in_bytes,
            "output_bytes": analysis.output_size_in_bytes,
            "alias_bytes": analysis.alias_size_in_bytes,
            "temp_bytes": analysis.temp_size_in_bytes,
            "code_bytes": analysis.generated_code_size_in_bytes,
        }
        facts = {"needed_bytes": None, "text": _packed(compiled_text(compiled))}
    return {**memory, **facts, "compile_seconds": round(time.monotonic() - start, 1)}


def compiled_text(compiled: jax.stages.Compiled) -> str:
    """The compiler's text; raises `UserError` where it is newer than what this jaxlib reads."""
    try:
        return compiled.as_text()
    except JaxRuntimeError as error:  # seen with libtpu 0.0.52 under jax 0.10.2, for v5p
        unpaired = unpaired_libtpu(libtpu_version()) or f"libtpu {libtpu_version()}, jax {jax.__version__}"
        raise UserError(
            f"{unpaired}: jax cannot read what it compiled ({str(error).splitlines()[0]}); pip install 'jax[tpu]' for "
            "another pair, or give --method=formula"
        ) from error


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode())).decode("ascii")


def _unpacked(packed: str) -> str:
    return gzip.decompress(base64.b64decode(packed)).decode()


def out_of_memory(message: str) -> float | None:
    """Bytes that a program would take, from the error with which XLA refuses it; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    match = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of", message)
    if match is None:
        raise UserError(f"the compiler refuses the program: {message.splitlines()[0]}")
    return float(match[1]) * _UNITS[match[2]]
