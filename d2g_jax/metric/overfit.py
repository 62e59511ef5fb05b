"""`d2g overfit`: figure 5 of the paper. A latent that starts as noise is optimised to match a target under one loss.

Nothing but the loss holds it: no network, no prior, no other term. What the loss overlooks stays as it was or drifts
away, and the picture shows it. All losses start from the same noise, go through the same optimiser, and are judged by
one measure that only one of them sees: pixel LPIPS between the decoded latent and the decoded target.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from d2g_jax.config.ranges import check_ranges
from d2g_jax.diffusion import noise
from d2g_jax.inputs.images import SUFFIXES, image_files, read_rgb, to_floats
from d2g_jax.losses import augment
from d2g_jax.losses.lpips import LPIPS
from d2g_jax.losses.perceptual import LatentLPIPS, mse, regression_loss
from d2g_jax.lpips_training.fit import restore_tree, save_tree
from d2g_jax.lpips_training.images import Crop
from d2g_jax.models import vae
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline.folder import load_vae, to_uint8
from d2g_jax.report import write_report
from d2g_jax.runtime import runs
from d2g_jax.runtime.atomic import write_json, write_text
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.grid import grid, save_png
from d2g_jax.runtime.interrupt import StopRequests
from d2g_jax.runtime.lock import locked
from d2g_jax.runtime.progress import Progress

TITLES = {
    "mse": "MSE of latents",
    "lpips": "LPIPS of decoded latents",
    "latent_lpips": "LatentLPIPS",
    "e_latent_lpips": "E-LatentLPIPS",
}
"""The losses by their names in the config."""

MEASURES = ("pixel_lpips", "latent_lpips", "latent_mse", "latent_std")
"""What every fit is judged by, whatever it minimises."""

_SHOWN_SIDE = 96  # pixels: smaller images are enlarged in overfit.png by a whole factor

Loss = Callable[["Scene", jax.Array, jax.Array], jax.Array]
"""(scene, key, latents (N, h, w, C)) -> (N,), of each image by itself."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """The targets, and everything that looks at them; a pytree, so that jitted functions take it as an argument.

    Attributes:
      target: scaled latents (N, h, w, C), float32.
      images: the targets decoded, (N, H, W, 3), not clipped.
      metric, lpips: the two metrics.
      decoder: the VAE's parameters.
      network: the VAE.
    """

    target: jax.Array
    images: jax.Array
    metric: LatentLPIPS
    lpips: LPIPS
    decoder: Params
    network: Network = dataclasses.field(metadata={"static": True})

    def decode(self, latents: jax.Array) -> jax.Array:
        """Scaled latents (N, h, w, C) -> images (N, H, W, 3), about [-1, 1]."""
        unscaled = vae.unscale_latents(self.network.config, latents)
        return self.network.apply(self.decoder, unscaled, method="decode")

    def seen_lpips(self, images: jax.Array, others: jax.Array) -> jax.Array:
        """Pixel LPIPS of two sets of images as files would hold them, clipped to [-1, 1]: (N,)."""
        return self.lpips.distance(jnp.clip(images, -1, 1), jnp.clip(others, -1, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fit:
    """One loss' optimisation, as far as it has come; a pytree, as which it is kept.

    Attributes:
      steps: done, int64.
      seconds: spent on them, compilation included, float64.
      carry: the latents (N, h, w, C) and the optimiser's state.
      curves: by measure, and "loss", float32 (rows, N): a row at the start and one every `overfit.every` steps. The
        loss' row is its mean over the steps since the row before, NaN at the start. Rows to come are NaN.
    """

    steps: np.integer
    seconds: np.floating
    carry: Any
    curves: dict[str, np.ndarray]


def overfit(config: ml_collections.ConfigDict, workdir: Path) -> str:
    """Runs or resumes every loss of `config.overfit` and returns the table of results as text.

    Args:
      config: its `pipeline` (of which only `vae/` is read) and its section `overfit`; see `config/base_config.py`.
      workdir: gets `overfit.png` (a column per target; from the top the targets, then the losses in their order),
        `result.json`, `metrics.jsonl`, `report.html`, `samples/`, and `fits/` with what has been done so far.

    Raises:
      UserError: bad config, folders or images, a workdir of another run, of other images or in use, a loss that is
        not finite.
      KeyboardInterrupt, Terminated: SIGINT or SIGTERM came; what is done has been saved.
    """
    workdir, settings = Path(workdir), config.overfit
    check_config(settings)
    names, scene, originals = set_up(config)
    bound = {"job": "overfit", "pipeline": config.pipeline, "overfit": settings}
    if settings.images:  # other pictures may come to lie there
        bound["targets_sha256"] = hashlib.sha256(originals.tobytes()).hexdigest()
    with locked(workdir):
        runs.claim(workdir, ml_collections.ConfigDict(bound))
        fits = {}
        for name in settings.losses:
            fits[name] = run(name, scene, settings, workdir / "fits" / f"{name}.safetensors")
            _write_curves(workdir, settings, fits)
        images = {"target": scene.images} | {name: jax.jit(Scene.decode)(scene, fits[name].carry[0]) for name in fits}
        _show(workdir, names, {name: np.asarray(to_uint8(decoded)) for name, decoded in images.items()})
        result = _result(scene, originals, settings, fits)
        write_json(workdir / "result.json", result)
        return f"{table(result)}\n\n{write_report(workdir)}"


def check_config(settings: ml_collections.ConfigDict) -> None:
    """Raises `UserError` for values that no later step would name."""
    for name in settings.losses:
        if name not in TITLES:
            raise UserError(f"overfit.losses: {name!r} is unknown; choose of {', '.join(TITLES)}")
    if not settings.losses or len(set(settings.losses)) < len(settings.losses):
        raise UserError(f"overfit.losses={tuple(settings.losses)}; give one or more, each once")
    augment.check_preset(settings.preset)
    check_ranges(ml_collections.ConfigDict({"overfit": settings}))
    if settings.steps % settings.every:
        raise UserError(f"overfit.steps={settings.steps} is not a multiple of overfit.every={settings.every}")


def set_up(config: ml_collections.ConfigDict) -> tuple[list[str], Scene, np.ndarray]:
    """(names of the targets, the scene, the images (N, H, W, 3) that were encoded)."""
    settings, (_, network, loaded) = config.overfit, load_vae(config.pipeline)
    vae_config, params = network.config, jax.tree.map(jnp.asarray, loaded)
    metric, lpips = LatentLPIPS.load(settings.metric), LPIPS.load(settings.lpips)
    if metric.space.channels != vae_config.latent_channels:
        raise UserError(
            f"overfit.metric={settings.metric}: for latents of {metric.space.channels} channels, and the VAE of "
            f"{config.pipeline} has {vae_config.latent_channels}; give the metric of its latent space"
        )
    names, originals = read_targets(settings, vae.native_side(vae_config))
    encode = jax.jit(lambda params, images: network.apply(params, images, method="encode")[0])
    target = vae.scale_latents(vae_config, encode(params, originals))
    scene = Scene(target, target, metric, lpips, params, network)
    images = jax.jit(Scene.decode)(scene, target)
    if not jnp.isfinite(images).all():
        raise UserError(f"{config.pipeline}/vae: makes images of its latents that are not finite; check its weights")
    return names, dataclasses.replace(scene, images=images), originals


def read_targets(settings: ml_collections.ConfigDict, size: int) -> tuple[list[str], np.ndarray]:
    """Names and images float32 (N, size, size, 3) in [-1, 1]: the first scenes of held-out digits, or the user's.

    The user's are an image or a folder's images by name; of each the centre, brought to `size`.
    """
    count = settings.targets
    if not settings.images:
        from d2g_jax.digits import captions, scenes

        if size != scenes.SIZE:
            raise UserError(f"overfit.images is empty, and the digits are no {size}x{size} pixels; give images")
        shown = scenes.render(count, seed=0, test=True)
        names = [captions.caption(scenes.Scene(*map(int, row)), phrasing=0, numeral=True) for row in shown.labels]
        return names, to_floats(shown.images)
    source = Path(settings.images)
    inside = sorted(source.iterdir()) if source.is_dir() else [source] if source.exists() else []
    files = list(image_files(inside))[:count]
    if not files:
        raise UserError(f"overfit.images={source}: no image or folder of images ({', '.join(SUFFIXES)})")
    crop = Crop(size, size, seed=0)
    return [file.name for file in files], np.stack([to_floats(crop.plain(read_rgb(f, f), f)) for f in files])


def loss_of(name: str, preset: str) -> Loss:
    """The loss called `name`, one of `TITLES`; gradients flow to the latents alone."""
    if name == "lpips":  # that of `DecodedLPIPS`, with the target decoded once
        return lambda scene, key, latents: scene.lpips.distance(scene.decode(latents), scene.images)

    def of_latents(scene: Scene, key: jax.Array, latents: jax.Array) -> jax.Array:
        return regression_loss(name, scene.metric, preset)(key, latents, scene.target)

    return of_latents


def run(name: str, scene: Scene, settings: ml_collections.ConfigDict, file: Path) -> Fit:
    """Optimises by one loss; `file` keeps what is done, and the same call goes on from there to the same numbers.

    Raises `UserError` for a loss that is not finite, and a `file` of something else.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps))
    advance, every = _program(loss_of(name, settings.preset), optimizer, settings), settings.every
    latents = start(settings.seed, scene.target.shape)
    blank = np.full((settings.steps // every + 1, len(latents)), np.nan, np.float32)
    curves = dict.fromkeys((*MEASURES, "loss"), blank)
    fit = Fit(np.int64(0), np.float64(0), (latents, optimizer.init(latents)), curves)
    fit = restore_tree(file, fit) if file.exists() else _with_row(fit, scene, jnp.full(len(latents), jnp.nan), 0)
    shown = Progress(TITLES[name], settings.steps, "step", done=int(fit.steps), beginning="compiling")
    with StopRequests() as requests, shown as progress:
        while fit.steps < settings.steps:
            began = time.monotonic()
            carry, values = jax.block_until_ready(advance(scene, fit.carry, fit.steps))
            fit = Fit(fit.steps + every, fit.seconds + time.monotonic() - began, carry, fit.curves)
            fit = _with_row(fit, scene, values, row := fit.steps // every)
            if not np.isfinite(fit.curves["loss"][row]).all():
                raise UserError(
                    f"overfit: {name} is not finite after {fit.steps} steps; lower overfit.learning_rate "
                    "and start in another --workdir"
                )
            save_tree(fit, file)
            progress.advance(every, note=f"pixel LPIPS {fit.curves['pixel_lpips'][row].mean():.4f}")
            if requests.stop and fit.steps < settings.steps:
                requests.leave()
    return fit


def start(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal latents float32 (N, h, w, C): those that `d2g sample` draws for images 0 to N - 1."""
    count, height, width, channels = shape
    drawn = noise.record_noise(seed, jnp.arange(count, dtype=jnp.uint32), (channels, height, width))
    return jnp.moveaxis(drawn, 1, -1)


def _program(
    loss: Loss, optimizer: optax.GradientTransformation, settings: ml_collections.ConfigDict
) -> Callable[[Scene, Any, int], tuple[Any, jax.Array]]:
    """(scene, carry, steps done) -> the carry `settings.every` steps later, and the loss' mean over them (N,)."""
    key = noise.purpose_key(settings.seed, "overfit")

    @jax.jit
    def advance(scene: Scene, carry: Any, done: jax.Array) -> tuple[Any, jax.Array]:
        def total(latents: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = loss(scene, jax.random.fold_in(key, number), latents)
            return values.sum(), values  # of a sum each image has its own gradient, and Adam mixes none

        def step(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
            latents, state = carry
            gradient, values = jax.grad(total, has_aux=True)(latents, number)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(latents, updates), state), values

        carry, values = jax.lax.scan(step, carry, done + jnp.arange(settings.every))
        return carry, values.mean(0)

    return advance


@jax.jit
def measure(scene: Scene, latents: jax.Array) -> dict[str, jax.Array]:
    """`MEASURES` of scaled latents (N, h, w, C): (N,) each. The latent metric is not augmented."""
    return {
        "pixel_lpips": scene.seen_lpips(scene.decode(latents), scene.images),
        "latent_lpips": scene.metric.distance(latents, scene.target, scaled=True),
        "latent_mse": mse(latents, scene.target),
        "latent_std": latents.std((1, 2, 3)),
    }


def _with_row(fit: Fit, scene: Scene, values: jax.Array, row: int) -> Fit:
    """With a row of the curves: what its latents measure, and `values`, the loss (N,)."""
    measured = jax.device_get({**measure(scene, fit.carry[0]), "loss": values})
    curves = {name: rows.copy() for name, rows in fit.curves.items()}
    for name, value in measured.items():
        curves[name][row] = value
    return dataclasses.replace(fit, curves=curves)


def _write_curves(workdir: Path, settings: ml_collections.ConfigDict, fits: Mapping[str, Fit]) -> None:
    """metrics.jsonl: means over the targets. "images" counts a target once for each step."""
    lines = []
    for name, fit in fits.items():
        for i in range(len(fit.curves["loss"])):
            means = {key: float(rows[i].mean()) for key, rows in fit.curves.items()}
            row = {"run": TITLES[name], "step": i * settings.every, **means}
            row["images"] = row["step"] * fit.curves["loss"].shape[1]
            lines.append(json.dumps({key: value for key, value in row.items() if not _is_nan(value)}) + "\n")
    write_text(workdir / "metrics.jsonl", "".join(lines))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _show(workdir: Path, names: list[str], images: Mapping[str, np.ndarray]) -> None:
    """overfit.png, and single images for the report: uint8 (N, H, W, 3) by row."""
    columns = []
    for row, decoded in images.items():
        files = [f"samples/{row}/{i:05d}.png" for i in range(len(names))]
        for file, image in zip(files, decoded, strict=True):
            save_png(workdir / file, image)
        columns.append({"name": TITLES.get(row, row), "images": files})
    write_text(workdir / "samples" / "comparison.json", json.dumps({"prompts": names, "columns": columns}))
    sheet = np.concatenate(list(images.values()))
    factor = max(1, _SHOWN_SIDE // sheet.shape[1])
    save_png(workdir / "overfit.png", grid(sheet.repeat(factor, axis=1).repeat(factor, axis=2), len(names)))


def _result(
    scene: Scene, originals: np.ndarray, settings: ml_collections.ConfigDict, fits: Mapping[str, Fit]
) -> dict[str, Any]:
    """What result.json holds."""
    last = {name: {measure: fit.curves[measure][-1] for measure in MEASURES} for name, fit in fits.items()}
    first = next(iter(fits.values())).curves
    seen = jax.jit(Scene.seen_lpips)
    references = {
        "start": float(first["pixel_lpips"][0].mean()),
        "another_target": float(seen(scene, scene.images, jnp.roll(scene.images, 1, axis=0)).mean()),
        "autoencoder": float(seen(scene, scene.images, originals).mean()),
    }
    return {
        "systems": {
            TITLES[name]: {measure: float(values.mean()) for measure, values in measured.items()}
            for name, measured in last.items()
        },
        "pixel_lpips_of": references,
        "each_image": {
            name: {key: values.tolist() for key, values in measured.items()} for name, measured in last.items()
        },
        "protocol": {
            "pixel_lpips": "between the decoded latents and the decoded targets, clipped to [-1, 1]",
            "latent_lpips": "without augmentation",
            "optimizer": "Adam, betas 0.9 and 0.999, cosine decay to 0",
            **settings.to_dict(),
            "targets": len(originals),  # of fewer images than were asked for, all
        },
        "seconds": {TITLES[name]: round(float(fit.seconds), 1) for name, fit in fits.items()},
        "environment": runs.environment(),
    }


def table(result: Mapping[str, Any]) -> str:
    """The figures of result.json as text."""
    lines = [f"{'':26}{'pixel LPIPS':>12}{'LatentLPIPS':>12}{'latent MSE':>12}{'latent std':>12}{'seconds':>9}"]
    for name, values in result["systems"].items():
        figures = "".join(f"{values[measure]:>12.4f}" for measure in MEASURES)
        lines.append(f"{name:26}{figures}{result['seconds'][name]:>9.1f}")
    references = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result["pixel_lpips_of"].items())
    return "\n".join([*lines, f"For scale, pixel LPIPS of: {references}"])
