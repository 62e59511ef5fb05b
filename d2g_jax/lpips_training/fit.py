"""One supervised training loop, data-parallel over all devices, that goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2g_jax.diffusion import noise
from d2g_jax.pipeline import weights
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime import runs
from d2g_jax.runtime.ahead import one_ahead
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.interrupt import StopRequests
from d2g_jax.runtime.progress import Progress

CHECKPOINT = "checkpoint.safetensors"

Loss = Callable[[Any, dict[str, jax.Array], jax.Array], jax.Array]
"""(parameters, batch, key) -> scalar."""

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a training goes.

    Attributes:
      optimizer: with its schedule, which counts updates from 0.
      steps: updates in all.
      batch_size: rows of a batch, a multiple of the devices.
      seed: of the initial weights, the choice of rows and the loss' keys.
      folder: gets `checkpoint.safetensors` and `metrics.jsonl`; None keeps nothing, and a stopped training is lost.
      save_every: steps between checkpoints.
    """

    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int
    seed: int
    folder: Path | None = None
    save_every: int = 1000


def fit(
    loss: Loss,
    params: Any,
    batch_at: Callable[[int], Batch],
    recipe: Recipe,
    *,
    label: str,
    encode: Callable[[Batch], Batch] = lambda batch: batch,
    project: Callable[[Any], Any] = lambda params: params,
    ema: float = 0.0,
) -> Any:
    """Trains `params`; with `recipe.folder` the same call after an interruption gives the result of an unbroken run.

    Args:
      loss: pure; its key is a function of (seed, label, step).
      params: float32 tree.
      batch_at: host batch of a step, a pure function of it. Called one step ahead, in another thread: it must not
        use the devices.
      label: the config section that the recipe is from, as its job calls it; named in messages and part of the loss'
        keys.
      encode: from what `batch_at` gives to what `loss` takes; may use the devices.
      project: applied after each update (for example to keep weights non-negative).
      ema: decay of a moving average that is returned in place of the last parameters; 0 for none.

    Returns:
      The trained parameters as host arrays.

    Raises:
      UserError: a loss that is not finite, or a checkpoint of another training.
      KeyboardInterrupt, Terminated: a signal came; with a folder, the step under way has been finished and saved.
    """
    mesh, key = meshes.make_mesh(), noise.purpose_key(recipe.seed, label)

    @jax.jit
    def update(carry: tuple[Any, Any, Any], batch: dict[str, jax.Array], step: jax.Array) -> tuple[Any, jax.Array]:
        params, average, state = carry
        value, gradient = jax.value_and_grad(loss)(params, batch, jax.random.fold_in(key, step))
        updates, state = recipe.optimizer.update(gradient, state, params)
        params = project(optax.apply_updates(params, updates))
        # Early on the average follows closely, so that the random start is forgotten.
        decay = jnp.minimum(ema, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params) if ema else average
        return (params, average, state), value

    done = {"steps": np.int64(0), "carry": (params, params if ema else {}, recipe.optimizer.init(params))}
    if recipe.folder is not None and (recipe.folder / CHECKPOINT).exists():
        done = restore_tree(recipe.folder / CHECKPOINT, done)
    first, carry = int(done["steps"]), meshes.place(done["carry"], mesh)
    with ExitStack() as opened:
        log = _Log(recipe, first, opened)
        progress = opened.enter_context(Progress(label, recipe.steps, "step", done=first, beginning="compiling"))
        batches = opened.enter_context(one_ahead((step, batch_at(step)) for step in range(first, recipe.steps)))
        for step, batch in batches:
            carry, value = update(carry, meshes.place_batch(encode(batch), mesh), step)
            value = float(value)  # waits: simulated devices abort when the host runs ahead
            if not math.isfinite(value):
                raise UserError(
                    f"{label}: the loss is {value} at step {step + 1} of {recipe.steps}; lower learning_rate in the "
                    f"section {label} and start in another --workdir"
                )
            log.add(step + 1, value, carry)
            progress.advance(note=f"loss {value:.5f}")
    return jax.device_get(carry[1] if ema else carry[0])


def sampled_rows(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Row numbers of one step's batch, drawn with replacement; a pure function of (seed, step)."""
    return np.random.default_rng([seed, step]).integers(count, size=batch_size)


class _Log:
    """Checkpoints, the metrics file and stop requests of one training; does nothing for a recipe without a folder."""

    def __init__(self, recipe: Recipe, first: int, opened: ExitStack):
        self._recipe, self._every = recipe, max(1, recipe.steps // 1000)
        if recipe.folder is None:
            return
        recipe.folder.mkdir(parents=True, exist_ok=True)
        runs.truncate_metrics(recipe.folder, first * recipe.batch_size)
        self._metrics = opened.enter_context(runs.MetricsLog(recipe.folder, recipe.folder.name))
        self._requests = opened.enter_context(StopRequests())

    def add(self, steps: int, value: float, carry: Any) -> None:
        """Takes note of a finished step; leaves with what a signal stands for, after saving."""
        recipe, last = self._recipe, steps == self._recipe.steps
        if recipe.folder is None:
            return
        if steps % self._every == 0 or last:
            self._metrics.write(steps * recipe.batch_size, {"loss": value})
        if steps % recipe.save_every == 0 or last or self._requests.stop:
            save_tree({"steps": np.int64(steps), "carry": carry}, recipe.folder / CHECKPOINT)
        if self._requests.stop and not last:
            self._requests.leave()


def save_tree(tree: Any, file: Path) -> None:
    """Every leaf of a dict or dataclass under its path, as `restore_tree` reads it; atomically."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    weights.save_state_dict({_name(path): np.asarray(jax.device_get(leaf)) for path, leaf in leaves}, file)


def restore_tree(file: Path, like: Any) -> Any:
    """The tree that `save_tree` wrote, on the host; raises `UserError` unless shapes and dtypes are those of `like`."""
    state = weights.load_state_dict(file, dtype=None)
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    for path, leaf in paths:
        stored = state.get(_name(path))
        if stored is None or (stored.shape, stored.dtype) != (leaf.shape, leaf.dtype):
            raise UserError(f"{file}: not a checkpoint of this run ({_name(path)} differs); remove it to start over")
    return tree.unflatten(state[_name(path)] for path, _ in paths)


def _name(path: tuple[Any, ...]) -> str:
    """Such as "carry[0]['bias']"."""
    return jax.tree_util.keystr(path[:1], simple=True) + jax.tree_util.keystr(path[1:])
