"""`d2g sample`: images of prompts as files, and the seconds they took."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

from d2g_jax.pipeline.draw import Solution
from d2g_jax.runtime import atomic
from d2g_jax.runtime.grid import grid, save_png
from d2g_jax.sample.model import load


@dataclasses.dataclass(frozen=True)
class Request:
    """What `d2g sample` is asked for.

    Attributes:
      prompts: one or more; images_per_prompt of each.
      solution: a teacher's; a one-step student has none.
      size: (height, width) in pixels, None for the native side.
      seed: of the noise; `latents`, a .npy file, takes its place.
      batch_size: images per call, rounded up to the devices.
      dtype: what the networks compute in and what their kernels are kept in.
      tiled: decode large images in overlapping tiles, for devices that cannot hold one image's activations.
      system: of `systems.SYSTEMS`, for a one-step generator of another method.
      unet: weights in place of the folder's own UNet.
    """

    prompts: tuple[str, ...]
    images_per_prompt: int = 1
    solution: Solution | None = None
    size: tuple[int | None, int | None] = (None, None)
    seed: int = 0
    latents: Path | None = None
    batch_size: int = 64
    dtype: str = "float32"
    tiled: bool = False
    system: str | None = None
    unet: Path | None = None


def sample(model: str | Path, request: Request, out: Path, revision: str | None = None) -> dict[str, float]:
    """Draws and writes 00000.png ..., grid.png, noise.npy, latents.npy and prompts.txt into `out`.

    Returns seconds: "load", "compile" (the first batch, which is drawn again), and "text", "unet" and "vae" apart.

    Raises `UserError` for bad requests, and for latents that are not finite; then nothing is written.
    """
    start = time.monotonic()
    loaded = load(model, revision=revision, system=request.system, unet=request.unet, dtype=request.dtype)
    drawing = loaded.prepare(
        request.prompts,
        request.seed,
        request.latents,
        request.images_per_prompt,
        request.size,
        request.batch_size,
        request.tiled,
        request.solution,
    )
    prepared = time.monotonic()
    loaded.run(drawing.first())
    compiled, seconds = time.monotonic(), {}
    drawn = loaded.run(drawing, seconds=seconds)
    for i, image in enumerate(drawn.images):
        save_png(out / f"{i:05d}.png", image)
    save_png(out / "grid.png", grid(drawn.images, math.ceil(math.sqrt(len(drawn.images)))))
    atomic.write_array(out / "noise.npy", drawing.noise)
    atomic.write_array(out / "latents.npy", drawn.latents)
    atomic.write_text(out / "prompts.txt", "\n".join(drawing.prompts) + "\n")
    return {"load": prepared - start, "compile": compiled - prepared, **seconds}
