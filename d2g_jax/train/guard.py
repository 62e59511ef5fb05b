"""Updates whose loss or gradient is not finite are never applied: decided inside the compiled step, named afterwards.

A step donates the buffers of its state, so the state before a bad update exists only if the program itself keeps it.
`commit` selects it there, leaf by leaf; XLA fuses the selection into the optimiser's own pass over the parameters. The
host needs no look at every step: once more updates in a row are bad than may be left out, the state stands still,
whatever is called on it, until the host fetches the metrics and finds out which update it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.train.state import UPDATES, TrainState

Metrics = dict[str, jax.Array]

OUTCOME = "outcome"
"""The metric that `commit` adds to those of an update."""
APPLIED, LEFT_OUT, STOPPED, STANDS_STILL = range(4)
"""Values of `OUTCOME`: finite; not finite, the run goes on; not finite, one too many; came after such a one."""

_TITLES = {"generator": "generator's", "discriminator": "discriminator's", "r1": "R1"}


def commit(
    update: str, allowed: int, before: TrainState, after: TrainState, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """`after` where every metric of this update is finite, and otherwise `before`.

    An update that is left out still counts as a step and its images as seen, so that the next one gets other data; the
    update that is one too many does not, nor does any after it.

    Args:
      update: one of `state.UPDATES`.
      allowed: how many updates of this kind may be left out in a row.
      before, after: of the same shapes; a leaf that is the same object in both costs nothing.
      metrics: float32 losses and gradient norms of the update. A gradient with one bad element has a bad norm.

    Returns:
      The state to go on with, and `metrics` with `OUTCOME`, float32 ().
    """
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in metrics.values()]))
    still = jnp.any(jnp.stack([before.left_out[name] > allowed for name in UPDATES]))
    in_a_row = jnp.where(still, before.left_out[update], jnp.where(finite, 0, before.left_out[update] + 1))
    stops = in_a_row > allowed
    chosen = _select(finite & ~still, after, before)
    advances = ~(stops | still)
    state = dataclasses.replace(
        chosen,
        step=_select(advances, after.step, before.step),
        images=_select(advances, after.images, before.images),
        left_out={**before.left_out, update: in_a_row},
    )
    outcome = jnp.where(still, STANDS_STILL, jnp.where(finite, APPLIED, jnp.where(stops, STOPPED, LEFT_OUT)))
    return state, metrics | {OUTCOME: outcome.astype(jnp.float32)}


def without_outcomes(steps: Sequence[tuple[int, Mapping[str, Mapping[str, Any]]]]) -> list[tuple[int, dict]]:
    """`steps` (images after the step, metrics by update) with what was measured only."""
    return [
        (images, {update: {k: v for k, v in metrics.items() if k != OUTCOME} for update, metrics in updates.items()})
        for images, updates in steps
    ]


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: n if n is o else jnp.where(condition, n, o), new, old)


def released(state: TrainState) -> TrainState:
    """The state with its counts of bad updates at zero: what a run that goes on from a stopped one starts with."""
    zero = jax.tree.map(lambda count: jnp.zeros_like(count, device=count.sharding), state.left_out)
    return dataclasses.replace(state, left_out=zero)


@dataclasses.dataclass(frozen=True)
class BadUpdate:
    """An update that was not applied. `images` is the count at the end of its step."""

    update: str
    images: int
    terms: tuple[str, ...]
    stops: bool

    def describe(self, batch_size: int) -> str:
        """Which update of which step, and which of its terms."""
        terms, verb = ", ".join(self.terms), "is" if len(self.terms) == 1 else "are"
        return (
            f"the {_TITLES[self.update]} update of step {self.images // batch_size} (images "
            f"{self.images - batch_size} to {self.images}): {terms} {verb} not finite"
        )


def bad_updates(steps: Sequence[tuple[int, Mapping[str, Mapping[str, Any]]]]) -> list[BadUpdate]:
    """The updates of fetched `steps` (images after the step, metrics by update) that were not applied, in order.

    Ends with the one that stopped the run, if one did. Trees that come from a device have their names sorted, so the
    order of a step's updates is that of `state.UPDATES`, not of the mapping.

    Raises:
      RuntimeError: the state stood still, and nothing in `steps` says why.
    """
    found = []
    for images, updates in steps:
        for update in (name for name in UPDATES if name in updates):
            metrics = updates[update]
            outcome = int(metrics[OUTCOME])
            if outcome == STANDS_STILL:
                raise RuntimeError(f"the state stood still at {images} images, and no update before says why")
            if outcome != APPLIED:
                terms = tuple(name for name, value in metrics.items() if not np.all(np.isfinite(value)))
                found.append(BadUpdate(update, images, terms, outcome == STOPPED))
                if outcome == STOPPED:
                    return found
    return found
