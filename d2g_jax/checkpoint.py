"""Checkpoints of a run, through Orbax. (Exported parameters, in exported.py, are the only other use of it.)

A checkpoint's number is the count of images seen. It holds the whole `TrainState` and a small JSON of metadata. Orbax
writes into a temporary folder and renames it, so a half-written checkpoint is never seen as one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from d2g_jax.errors import UserError
from d2g_jax.models.network import Params
from d2g_jax.state import TrainState


class Checkpoints:
    """The checkpoints of one run, newest last; a context manager that waits for saves under way."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest(self) -> int | None:
        """Images seen at the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any]) -> None:
        """Starts an asynchronous save of `state` under its image count; a count already saved is left alone."""
        images = int(state.images)
        if images == self.latest():
            return
        rest, ema = _split(state)
        items = {"state": ocp.args.StandardSave(rest), "ema": ocp.args.StandardSave(ema)}
        self._manager.save(images, args=ocp.args.Composite(**items, metadata=ocp.args.JsonSave(metadata)))

    def wait(self) -> None:
        """Returns when the saves under way are whole."""
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, placed like `like` (arrays or `ShapeDtypeStruct`s with shardings).

        Raises `UserError` when there is none or when its tree is not that of `like`.
        """
        rest, ema = _split(like)
        return TrainState(**self._restore("state", rest), ema=self._restore("ema", ema))

    def restore_ema(self, like: Params) -> Params:
        """The averaged generator of the newest checkpoint alone, placed like `like`."""
        return self._restore("ema", like)

    def restore_any(self) -> dict[str, Any]:
        """The newest checkpoint's trees as they were saved, as host arrays, whatever networks they belong to."""
        items = self._manager.restore(
            self._require(), args=ocp.args.Composite(state=ocp.args.StandardRestore(), ema=ocp.args.StandardRestore())
        )
        return {"state": items["state"], "ema": items["ema"]}

    def _restore(self, item: str, like: Any) -> Any:
        images = self._require()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            return self._manager.restore(images, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(target)}))[
                item
            ]
        except (ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.folder / str(images)}: not a checkpoint of this config's networks: {reason}"
            ) from error

    def metadata(self) -> dict[str, Any]:
        """The JSON saved beside the newest checkpoint."""
        items = self._manager.restore(self._require(), args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))
        return items["metadata"]

    def _require(self) -> int:
        images = self.latest()
        if images is None:
            raise UserError(f"{self.folder}: no checkpoint here; run `d2g train` with this --workdir first")
        return images


def _split(state: TrainState) -> tuple[dict[str, Any], Params]:
    """The average apart from the rest: sampling and export read nothing else."""
    rest = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return rest, rest.pop("ema")
