"""The lines and grids of a run in other programs' formats too: TensorBoard's event files, and wandb.

Neither package is imported, nor needed, unless its option is on. Their step is the number of images seen.
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from d2g_jax.runtime import runs
from d2g_jax.runtime.errors import UserError

FOLDER = "tensorboard"
_NEEDS = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_trackers(train: ml_collections.ConfigDict) -> None:
    """Raises `UserError` for an option whose package is not installed: before anything long has begun."""
    for option, package in _NEEDS.items():
        if train.get(option) and importlib.util.find_spec(package) is None:
            raise UserError(
                f"train.{option}={train[option]!r} needs the package {package}, which is not installed; "
                f"pip install 'd2g_jax[{option}]', or leave the option out"
            )


def open_trackers(config: ml_collections.ConfigDict, workdir: Path, images: int) -> list[TensorBoard | Wandb]:
    """Those that `config.train` asks for, to go on after `images` images; none for a config without the options."""
    train, found = config.train, []
    if train.get("tensorboard"):
        found.append(TensorBoard(workdir / FOLDER, config, images))
    if train.get("wandb"):
        found.append(Wandb(workdir, config, images))
    return found


class TensorBoard:
    """Event files; what a killed run wrote past its checkpoint is marked as purged, and TensorBoard hides it."""

    def __init__(self, folder: Path, config: ml_collections.ConfigDict, images: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=images + 1 if images else None)
        if not images:
            self._writer.add_text("config", f"```json\n{config.to_json(indent=2)}\n```", 0)

    def add_line(self, images: int, values: dict[str, float | None]) -> None:
        for name, value in _finite(values).items():
            self._writer.add_scalar(name, value, images)
        self._writer.flush()

    def add_picture(self, images: int, file: Path) -> None:
        with Image.open(file) as image:
            self._writer.add_image("samples", np.asarray(image), images, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of a wandb project; offline, in WORKDIR/wandb, unless the environment's WANDB_MODE says otherwise.

    `wandb sync` sends an offline run. The run's id comes from the workdir and the config: a resumed run goes on in it.
    """

    def __init__(self, workdir: Path, config: ml_collections.ConfigDict, images: int):
        import wandb

        self._image = wandb.Image
        place = zlib.crc32(str(workdir.absolute()).encode())
        self._run: Any = wandb.init(
            project=config.train.wandb,
            name=config.name or None,
            id=f"{runs.config_hash(config)}-{place:08x}",
            resume="allow" if images else None,
            dir=str(workdir),
            config=runs.to_json(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings={"quiet": True, "console": "off"},
        )

    def add_line(self, images: int, values: dict[str, float | None]) -> None:
        self._run.log({"images": images, **_finite(values)}, step=images)

    def add_picture(self, images: int, file: Path) -> None:
        self._run.log({"samples": self._image(str(file))}, step=images)

    def close(self) -> None:
        self._run.finish()


def _finite(values: dict[str, float | None]) -> dict[str, float]:
    """A line's metrics without those that were not finite, which are None."""
    return {name: value for name, value in values.items() if value is not None}
