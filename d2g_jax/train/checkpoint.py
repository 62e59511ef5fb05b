"""Checkpoints of a run, through Orbax. (Exported parameters, in exported.py, are the only other use of it.)

A checkpoint's number is the count of images seen. It holds the whole `TrainState` and a small JSON of metadata. Saves
are asynchronous and every process writes its own shards. Orbax writes into a temporary folder and renames it, so a
half-written checkpoint is never seen as one; the next run removes what is left of it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from d2g_jax.models.network import Params
from d2g_jax.runtime.errors import UserError
from d2g_jax.train.state import TrainState

# Orbax lets every replica write its part of an array: of small arrays a program to cut each of them, for nothing.
_LARGE = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
_HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, _LARGE), (np.ndarray, ocp.type_handlers.NumpyHandler())
)

_KINDS = {"pipeline": str, "timestep": int, "config": dict}  # of what a run's metadata hold
_NAMED = 3  # differing leaves in a message
_LONGEST = 160  # characters of what a library says


class Checkpoints:
    """The checkpoints of one run, newest last; a context manager that waits for saves under way."""

    def __init__(self, folder: str | Path, keep: int | None = None, keep_best: str = ""):
        """For a run of its own: keeps the newest `keep`, and the one of the lowest metric `keep_best` if that is named.

        Checkpoints that were saved with another metric are not compared. Without `keep` nothing is ever written, not
        even where another process is writing: for readers.
        """
        self.folder = Path(folder).absolute()
        self._best = keep_best
        policies = [LatestN(keep)]
        lowest = lambda metrics: -metrics.get(keep_best, math.inf)  # noqa: E731
        if keep_best:
            policies.append(BestN(get_metric_fn=lowest, n=1, keep_checkpoints_without_metrics=False))
        writing = {
            "preservation_policy": AnyPreservationPolicy(policies),
            "best_fn": lowest if keep_best else None,  # the policy decides; without this, metrics would not be written
            "enable_async_checkpointing": True,
            "cleanup_tmp_directories": True,
        }
        reading = {"create": False, "save_root_metadata": False}
        options = ocp.CheckpointManagerOptions(**(reading if keep is None else writing))
        handlers = {item: ocp.PyTreeCheckpointHandler(type_handler_registry=_HANDLERS) for item in ("state", "ema")}
        handlers["metadata"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    def latest(self) -> int | None:
        """Images seen at the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def all(self) -> list[int]:
        """Images seen at every whole checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, metadata: dict[str, Any], metric: float | None = None) -> None:
        """Starts an asynchronous save of `state` under its image count; a count already saved is left alone.

        Args:
          state: on the devices; it is copied before this returns, so its buffers may then be donated.
          metadata: plain JSON values.
          metric: the value of `keep_best`, the smaller the better. None for unknown.

        Raises `UserError` when this one, or the one before it, cannot be written.
        """
        images = int(state.images)
        if images == self.latest():
            return
        rest, ema = _split(state)
        items = {"state": ocp.args.PyTreeSave(rest), "ema": ocp.args.PyTreeSave(ema)}
        with self._writing():
            self._manager.save(
                images,
                args=ocp.args.Composite(**items, metadata=ocp.args.JsonSave(metadata)),
                metrics=None if metric is None else {self._best: metric},
            )

    def wait(self) -> None:
        """Returns when the saves under way are whole; raises `UserError` when one could not be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.folder, lambda: f"; whole ones: {', '.join(map(str, self.all())) or 'none'}")

    @contextmanager
    def _reading(self, images: int) -> Iterator[None]:
        """Says which checkpoint is damaged, as by half a copy, and which one is beside it."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            older = [other for other in self.all() if other < images]
            remedy = f"remove that folder to go on from {older[-1]}" if older else "no other is beside it"
            reason = _first_line(error)
            raise UserError(f"{self.folder / str(images)}: a damaged checkpoint ({reason}); {remedy}") from error

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, placed like `like` (arrays or `ShapeDtypeStruct`s with shardings), on any mesh.

        Raises `UserError` when there is none or when its tree is not that of `like`.
        """
        rest, ema = _split(like)
        return TrainState(**self._restore("state", rest), ema=self._restore("ema", ema))

    def restore_ema(self, like: Params) -> Params:
        """The averaged generator of the newest checkpoint alone, placed like `like`."""
        return self._restore("ema", like)

    def _restore(self, item: str, like: Any) -> Any:
        images = self._require()
        with self._reading(images):
            self._check_tree(images, item, like)
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
            places = ocp.checkpoint_utils.construct_restore_args(target)
            arguments = ocp.args.Composite(**{item: ocp.args.PyTreeRestore(target, restore_args=places)})
            return self._manager.restore(images, args=arguments)[item]

    def _check_tree(self, images: int, item: str, like: Any) -> None:
        """Raises `UserError` that names the leaves in which the saved item and `like` differ."""
        metadata = self._manager.item_metadata(images).get(item)
        if metadata is None:
            raise FileNotFoundError(f"{item}/_METADATA is missing")
        saved = _leaves(metadata.tree)
        mine = _leaves(like)
        differences = [
            f"{name} has {_describe(saved.get(name))}, not {_describe(mine.get(name))}"
            for name in [*mine, *(name for name in saved if name not in mine)]
            if saved.get(name) != mine.get(name)
        ]
        if differences:
            more = f" and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
            raise UserError(
                f"{self.folder / str(images)}: not a checkpoint of this config's networks: "
                f"{item}: {'; '.join(differences[:_NAMED])}{more}"
            )

    def metadata(self, *needed: str) -> dict[str, Any]:
        """The JSON saved beside the newest checkpoint; `needed` are in it. What a run saves is of its kind."""
        images = self._require()
        with self._reading(images):
            items = self._manager.restore(images, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))
            found = {**items["metadata"]}
            for name, kind in _KINDS.items():
                if (name in needed or name in found) and type(found.get(name)) is not kind:
                    raise ValueError(f"its metadata have {name} = {found.get(name)!r}")
            return found

    def _require(self) -> int:
        images = self.latest()
        if images is None:
            raise UserError(f"{self.folder}: no checkpoint here; run `d2g train` with this --workdir first")
        return images


@contextmanager
def writing(place: Path, whole: Callable[[], str] = str) -> Iterator[None]:
    """A full disk or a bucket that refuses is the user's to mend; what Orbax makes of it has many types."""
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore's are ValueErrors; JAX's own say that a process is lost
        remedy = f"{whole()}; make room, then give the same command again"
        code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's own text is a page about one array
        reason = os.strerror(int(code[1])) if code else _first_line(error)
        raise UserError(f"{place}: a checkpoint cannot be written ({reason}){remedy}") from error


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def _split(state: TrainState) -> tuple[dict[str, Any], Params]:
    """The average apart from the rest: sampling and export read nothing else."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return rest, rest.pop("ema")


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype by path; a tuple, named tuple or dataclass and what Orbax makes of it have the same paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"
