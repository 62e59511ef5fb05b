"""The programs of `d2g sample` and `d2g pairs`, compiled ahead of time for one batch, with what is known of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from d2g_jax.bench.measure import Facts, compile_program


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """One of the functions of `draw.Programs` for one batch.

    Attributes:
      call: takes what its parameters leave open.
      facts: of its compilation.
      results: shapes with shardings: what the next program is compiled for.
    """

    call: Callable[..., Any]
    facts: Facts
    results: Any

    @classmethod
    def of(cls, program: functools.partial, *args: Any) -> Compiled:
        """A jitted function with its parameters, compiled for such arguments, or shapes with shardings for them."""
        traced, compiled, facts = compile_program(program.func, *program.args, *args)
        results = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            traced.out_info,
            compiled.output_shardings,
        )
        return cls(functools.partial(compiled, *program.args), facts, results)


def together(facts: Sequence[Facts]) -> Facts:
    """Of programs one after another."""
    return Facts(
        sum(fact.compile_seconds for fact in facts),
        max(fact.temp_bytes for fact in facts),
        facts[-1].output_bytes,
        sum(fact.flops for fact in facts),
        max(fact.peak_bytes for fact in facts),
    )
