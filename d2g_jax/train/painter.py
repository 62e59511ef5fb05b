"""Pictures of a run: sample grids as it goes, and whatever else the averaged student is to draw in its one step."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from d2g_jax import records
from d2g_jax.losses.lpips import DecodedLPIPS
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.pipeline.draw import padded
from d2g_jax.pipeline.folder import Pipeline, decode
from d2g_jax.results.unexplained import unexplained
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.grid import grid, save_png
from d2g_jax.runtime.processes import is_first
from d2g_jax.train.step import Distillation, Frozen, condition, generate

SAMPLES_IN_GRID = 32
COLUMNS = 8
Record = dict[str, np.ndarray]


class Mix(NamedTuple):
    """What each picture is drawn of: a place between two records of the batch, for noise and text apart.

    Attributes:
      left, right: int32 (B,), places in the batch.
      noise, text: float32 (B,), 0 at `left`, 1 at `right`.
    """

    left: np.ndarray
    right: np.ndarray
    noise: np.ndarray
    text: np.ndarray

    @classmethod
    def none(cls, count: int) -> Mix:
        """Every record for itself."""
        places = np.arange(count, dtype=np.int32)
        return cls(places, places, np.zeros(count, np.float32), np.zeros(count, np.float32))


class Pictures(NamedTuple):
    """float32 latents (N, C, h, w) of the student; uint8 images (N, H, W, 3) of it and of the records' own latents."""

    latents: np.ndarray
    student: np.ndarray
    teacher: np.ndarray


def slerp(a: jax.Array, b: jax.Array, share: jax.Array) -> jax.Array:
    """Spherical interpolation of noise (B, ...) by `share` (B,): at 0 exactly `a`, at 1 exactly `b`.

    A straight line between two Gaussian samples passes through noise that is too weak, 0.7 of its norm in the middle;
    the arc keeps the norm (Shoemake 1985). Where a and b point the same way it is the line.
    """
    axes = tuple(range(1, a.ndim))
    share = share.reshape(-1, *[1] * len(axes))
    norms = jnp.sqrt(jnp.sum(a * a, axes, keepdims=True) * jnp.sum(b * b, axes, keepdims=True))
    cosine = jnp.clip(jnp.sum(a * b, axes, keepdims=True) / norms, -1.0, 1.0)
    angle = jnp.arccos(cosine)
    straight = angle < 1e-3
    sine = jnp.where(straight, 1.0, jnp.sin(angle))
    arc = jnp.sin((1 - share) * angle) / sine * a + jnp.sin(share * angle) / sine * b
    between = jnp.where(straight, lerp(a, b, share.reshape(-1)), arc)
    return jnp.where(share <= 0, a, jnp.where(share >= 1, b, between))


def lerp(a: jax.Array, b: jax.Array, share: jax.Array) -> jax.Array:
    """Linear interpolation of (B, ...) by `share` (B,): at 0 exactly `a`, at 1 exactly `b`."""
    share = share.reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype)
    return jnp.where(share <= 0, a, jnp.where(share >= 1, b, (1 - share) * a + share * b))


class Painter:
    """Draws in one step, always through the same two programs; all processes draw, the first one writes.

    Attributes:
      count: pictures of one grid and of one call, at most `SAMPLES_IN_GRID`.
      distance_name: of what `distances` measures: the run's own metric.
    """

    def __init__(
        self,
        d: Distillation,
        frozen: Frozen,
        source: records.PairSource | records.SkippingSource,
        mesh: jax.sharding.Mesh,
        pipeline: Pipeline,
        workdir: Path,
    ):
        self.count = min(SAMPLES_IN_GRID, len(source))
        self.count -= self.count % COLUMNS if self.count > COLUMNS else 0  # a grid without holes
        self._padded = -(-self.count // meshes.batch_shards(mesh)) * meshes.batch_shards(mesh)
        self._mesh, self._workdir = mesh, workdir
        self._first = [source[i] for i in range(self.count)]
        self._frozen, self._vae = frozen, {"vae": pipeline.params["vae"]}

        # Every process gets all of them: one could not fetch those on the others' devices.
        everywhere = functools.partial(jax.jit, out_shardings=jax.sharding.NamedSharding(mesh, P()))

        @everywhere
        def latents(params: Any, frozen: Frozen, batch: dict[str, jax.Array], mix: Mix) -> jax.Array:
            c = condition(d, frozen, batch)
            noise = slerp(c.noise[mix.left], c.noise[mix.right], mix.noise)
            text = jax.tree.map(lambda x: lerp(x[mix.left], x[mix.right], mix.text), c.text)
            with meshes.traced_for(mesh):
                return jnp.transpose(generate(d, frozen, params, noise, text), (0, 3, 1, 2))

        self._latents = latents
        self.distance_name, distance = _distance(frozen.metric)
        # one after another: VGG's maps of all would not fit
        self._distances = everywhere(lambda metric, *both: jax.lax.map(lambda pair: distance(metric, *pair), both))
        self._decode = everywhere(lambda vae, x: decode(pipeline, vae, jnp.transpose(x, (0, 2, 3, 1))))

    def latents(self, params: Any, batch: Sequence[Record], mix: Mix) -> np.ndarray:
        """What `params` draw for a mix of at most `count` records, one for each entry of `mix`, as many at most.

        A record is one of the pairs' (its id decides the noise). Returns float32 scaled latents (N, C, h, w).
        """
        places = {name: np.stack([record[name] for record in batch]) for name in batch[0]}
        places["id"] = places["id"].astype(np.uint32)
        placed, placed_mix = self._placed((places, mix))
        return jax.device_get(self._latents(params, self._frozen, placed, placed_mix))[: len(mix.left)]

    def decoded(self, latents: np.ndarray) -> np.ndarray:
        """uint8 images (N, H, W, 3) of at most `count` latents (N, C, h, w)."""
        decoded = jax.device_get(self._decode(self._vae, self._placed(latents.astype(np.float32))))
        if not decoded.finite[: len(latents)].all():  # a picture is no reason to end a run
            warnings.warn(
                "the VAE makes images that are not finite of some latents; they are black or white", stacklevel=2
            )
        return decoded.images[: len(latents)]

    def pictures(self, params: Any, batch: Sequence[Record], mix: Mix) -> Pictures:
        """As `latents`, with the images of them and, in the records' own order, of the records' latents."""
        drawn = self.latents(params, batch, mix)
        return Pictures(drawn, self.decoded(drawn), self.decoded(np.stack([record["latents"] for record in batch])))

    def distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Of latents (N, C, h, w), each `a` from its `b`: float64 (N,), by the run's metric without augmentation."""
        found = []
        for first in range(0, len(a), self.count):
            parts = [np.moveaxis(x[first : first + self.count], 1, -1).astype(np.float32) for x in (a, b)]
            measured = jax.device_get(self._distances(self._frozen.metric, *self._placed(parts)))
            found.append(measured[: len(parts[0])])
        return np.concatenate(found).astype(np.float64)

    def unexplained(self, params: Any, batch: Sequence[Record]) -> float:
        """R of `params` on records that training does not see: see `results.unexplained`."""
        parts = [batch[i : i + self.count] for i in range(0, len(batch), self.count)]
        drawn = np.concatenate([self.latents(params, part, Mix.none(len(part))) for part in parts])
        return unexplained(drawn, np.stack([record["latents"] for record in batch]))

    def draw(self, params: Any, images: int) -> Path:
        """Writes samples/images_XXXXXXXX.png, named by images seen: the same conditions again and again, teacher above,
        student below, for the same noise and prompt."""
        drawn = self.pictures(params, self._first, Mix.none(self.count))
        file = self._workdir / "samples" / f"images_{images:08d}.png"
        if is_first():
            rows = range(0, self.count, COLUMNS)
            parts = [images[i : i + COLUMNS] for i in rows for images in (drawn.teacher, drawn.student)]
            save_png(file, grid(np.concatenate(parts), COLUMNS))
        return file

    def _placed(self, tree: Any) -> Any:
        """Host arrays, each filled up to one number of rows, over the mesh."""
        return meshes.place_whole_batch(jax.tree.map(lambda x: padded(x, self._padded), tree), self._mesh)


def _distance(metric: LatentLPIPS | DecodedLPIPS | None) -> tuple[str, Callable[..., jax.Array]]:
    """The name of a run's metric, and (metric, a (h, w, C), b) -> its distance; a regression's is that of latents."""
    if metric is None:
        return "root mean square of the latents", lambda metric, a, b: jnp.sqrt(jnp.mean((a - b) ** 2))
    scaled = {"scaled": True} if isinstance(metric, LatentLPIPS) else {}
    name = "LatentLPIPS" if scaled else "LPIPS"
    return name, lambda metric, a, b: metric.distance(a[None], b[None], **scaled)[0]
