"""The distillation job, in the order in which things happen.

Read the config, the teacher, the pairs; build networks, losses, optimisers; take up the newest checkpoint or start from
the teacher; then step, log, draw, save until `train.images` images have been seen.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from d2g_jax import mesh as meshes
from d2g_jax import records, runs
from d2g_jax.checkpoint import Checkpoints
from d2g_jax.conditioning import encode_text, from_text_fields
from d2g_jax.diffusion import Schedule
from d2g_jax.errors import UserError
from d2g_jax.grid import grid, save_png
from d2g_jax.interrupt import StopRequests
from d2g_jax.models import discriminator as discriminators
from d2g_jax.models import unet as unets
from d2g_jax.perceptual import LatentLPIPS, regression_loss
from d2g_jax.pipeline import Pipeline, decode
from d2g_jax.progress import Progress
from d2g_jax.report import write_report
from d2g_jax.state import TrainState, create_state, discriminator_optimizer, generator_optimizer
from d2g_jax.step import Distillation, Frozen, condition, d_step, g_step, generate, r1_step

PERCEPTUAL = ("latent_lpips", "e_latent_lpips")
SAMPLES_IN_GRID = 32
_FIELDS = ("id", "input_ids", "latents")
_TOWERS = ("text_encoder", "text_encoder_2")


def train(config: ml_collections.ConfigDict, workdir: Path, pairs_folder: Path) -> None:
    """Trains until `config.train.images`; the same call goes on where an earlier one stopped.

    Args:
      config: see `d2g_jax/digits/config.py` for every field.
      workdir: local; gets `checkpoints/`, `metrics.jsonl`, `samples/`, `report.html`, `config.json`.
      pairs_folder: a finished `pairs/1.0.0`.

    Raises:
      UserError: bad config, pairs that do not fit the teacher, a workdir of another config, a loss that is not finite.
      KeyboardInterrupt, Terminated: SIGINT or SIGTERM came; the step under way has been finished and saved.
    """
    mesh = meshes.make_mesh(config.mesh.data, config.mesh.fsdp)
    source = open_pairs(config, pairs_folder)
    without = _TOWERS if source.manifest.text_shapes else ()
    pipeline = Pipeline.load(config.pipeline, mesh=mesh, without=without)
    check_pairs(pairs_folder, source.manifest, pipeline)
    meshes.check_batch(mesh, config.train.batch_size, config.train.groups)
    d, frozen = build(config, pipeline, source.manifest)
    runs.claim(workdir, config)
    state, frozen = initial_state(config, d, pipeline, mesh), meshes.place(frozen, mesh)
    with Checkpoints(workdir / "checkpoints", config.train.keep_checkpoints) as checkpoints:
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state)
        runs.truncate_metrics(workdir, int(state.images))
        if int(state.images) < config.train.images:
            loop(config, d, frozen, state, source, mesh, checkpoints, workdir, pipeline)
    write_report(workdir, finished=True)


def open_pairs(config: ml_collections.ConfigDict, folder: Path) -> records.PairSource | records.SkippingSource:
    """What training reads of a record; a corrupt one stops it, or is skipped if `train.skip_corrupt` says so."""
    manifest = records.Manifest.read(folder)
    source = records.PairSource(folder, fields=(*_FIELDS, *manifest.text_shapes))
    return records.SkippingSource(source) if config.train.skip_corrupt else source


def check_pairs(folder: Path, manifest: records.Manifest, pipeline: Pipeline) -> None:
    """Raises `UserError` unless these pairs were made by this teacher."""
    height, width, channels = pipeline.latent_shape
    records.check_fits(
        manifest,
        source=folder,
        latent_shape=(channels, height, width),
        token_length=pipeline.token_length,
        scaling_factor=pipeline.scaling_factor,
        scheduler=pipeline.scheduler,
    )


def build(
    config: ml_collections.ConfigDict, pipeline: Pipeline, manifest: records.Manifest
) -> tuple[Distillation, Frozen]:
    """Networks, losses and optimisers by config, and the parameters that are never trained."""
    dtype = jnp.dtype(config.train.dtype)
    unet_config = pipeline.unet.config
    adversary: dict[str, Any] = {"discriminator": None, "discriminator_plain": None, "discriminator_optimizer": None}
    if config.adversarial.weight:
        c = config.discriminator
        d_config = discriminators.DiscriminatorConfig(
            unet=unet_config,
            timestep=c.timestep,
            head_channels=c.head_channels,
            z_conditioning=c.z_conditioning,
            multiscale_inputs=c.multiscale_inputs,
            multiscale_heads=c.multiscale_heads,
        )
        adversary = {
            "discriminator": discriminators.build(d_config, dtype, remat=config.train.remat),
            # R1 is taken in float32 and needs attention that can be differentiated twice.
            "discriminator_plain": discriminators.build(d_config, jnp.float32, "plain", remat=config.train.remat),
            "discriminator_optimizer": discriminator_optimizer(config.optimizer.discriminator, config.train.batch_size),
        }
    metric = LatentLPIPS.load(config.loss.metric) if config.loss.name in PERCEPTUAL else None
    schedule = Schedule.from_config(pipeline.scheduler)
    timestep = manifest.first_timestep if config.generator.timestep is None else config.generator.timestep
    if not 0 <= timestep < schedule.num_train_timesteps:
        raise UserError(f"generator.timestep={timestep}; the schedule has 0 to {schedule.num_train_timesteps - 1}")
    d = Distillation(
        unet=unets.build(unet_config, dtype, remat=config.train.remat),
        encode_text=functools.partial(encode_text, pipeline),
        schedule=schedule,
        timestep=timestep,
        regression=make_regression(config.loss, metric),
        generator_optimizer=generator_optimizer(config.optimizer.generator, config.train.batch_size),
        adversarial_weight=config.adversarial.weight,
        r1_gamma=config.adversarial.r1_gamma,
        r1_interval=config.adversarial.r1_interval,
        mix_and_match=config.adversarial.mix_and_match,
        groups=config.train.groups,
        batch_size=config.train.batch_size,
        ema_half_life_images=config.train.ema_half_life_images,
        seed=config.seed,
        noise_seed=manifest.seed,
        stored_text=functools.partial(from_text_fields, pipeline) if manifest.text_shapes else None,
        **adversary,
    )
    return d, Frozen({} if manifest.text_shapes else pipeline.text_params, metric)


def make_regression(config: ml_collections.ConfigDict, metric: LatentLPIPS | None) -> Any:
    """(metric, key, generated, target) -> (B,), by `config.loss`; `UserError` for an unknown name or preset."""

    def regression(metric: LatentLPIPS | None, key: jax.Array, generated: jax.Array, target: jax.Array) -> jax.Array:
        loss = regression_loss(
            config.name,
            metric,
            config.preset,
            l1_weight=config.l1_weight,
            pseudo_huber_c=config.pseudo_huber_c,
        )
        return loss(key, generated, target)

    regression_loss(config.name, metric, config.preset)  # refuses a wrong name before anything compiles
    return regression


def initial_state(
    config: ml_collections.ConfigDict, d: Distillation, pipeline: Pipeline, mesh: jax.sharding.Mesh
) -> TrainState:
    """Generator and discriminator from the teacher, on the mesh."""
    teacher = pipeline.params["unet"]
    adversary: Any = None
    if d.discriminator is not None:
        key = jax.random.key(config.seed)
        adversary = discriminators.init_from_teacher(d.discriminator, key, teacher)
    state = create_state(teacher, d.generator_optimizer, adversary, d.discriminator_optimizer)
    return meshes.place(state, mesh)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled steps; the state's buffers are donated to the next state. None for a step that this run lacks."""

    g_regression: Any = None
    g_adversarial: Any = None
    d: Any = None
    r1: Any = None


def compile_programs(
    config: ml_collections.ConfigDict,
    d: Distillation,
    frozen: Frozen,
    state: TrainState,
    batch: dict[str, jax.Array],
    mesh: jax.sharding.Mesh,
) -> Programs:
    """Compiles all that the rest of the run needs: no pause when the adversary starts, no late surprise.

    A program is traced under Python's lock and compiled without it, so `train.compile_workers` threads share the work.
    """
    a, t, images = config.adversarial, config.train, int(state.images)
    fools_from = a.start_images + a.warmup_images
    adversary, alone = bool(a.weight) and t.images > a.start_images, _without_adversary(state)
    batch_sharding = jax.sharding.NamedSharding(mesh, meshes.BATCH)
    shape = (t.batch_size, *np.asarray(batch["latents"].shape)[[2, 3, 1]])
    generated = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding)
    of = functools.partial(jax.tree.map, lambda x: x.sharding)
    steps = {}
    if not adversary or images < fools_from:
        steps["g_regression"] = (functools.partial(g_step, d, False), (alone, batch), (of(alone), batch_sharding, None))
    if adversary and t.images > fools_from:
        steps["g_adversarial"] = (functools.partial(g_step, d, True), (state, batch), (of(state), batch_sharding, None))
    if adversary:
        steps["d"] = (functools.partial(d_step, d), (state, batch, generated), (of(state), None))
    if adversary and a.r1_gamma:
        steps["r1"] = (functools.partial(r1_step, d), (state, batch), (of(state), None))
    lowered = {
        name: jax.jit(step, donate_argnums=1, out_shardings=out).lower(frozen, *arguments)
        for name, (step, arguments, out) in steps.items()
    }
    with ThreadPoolExecutor(t.compile_workers) as pool:
        return Programs(**dict(zip(lowered, pool.map(lambda x: x.compile(), lowered.values()), strict=True)))


def _without_adversary(state: TrainState) -> TrainState:
    """The state of a regression-only run: its program is then the same, and may have been compiled before."""
    return dataclasses.replace(state, discriminator={}, discriminator_optimizer={})


def loop(
    config: ml_collections.ConfigDict,
    d: Distillation,
    frozen: Frozen,
    state: TrainState,
    source: records.PairSource | records.SkippingSource,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    workdir: Path,
    pipeline: Pipeline,
) -> TrainState:
    """Steps until `train.images`, with every effect: metrics, pictures, checkpoints."""
    t, images = config.train, int(state.images)
    painter = Painter(d, frozen, source, mesh, pipeline, workdir)
    metadata = {"name": config.name, "pipeline": str(pipeline.folder.absolute()), "timestep": d.timestep}
    log = runs.MetricsLog(workdir, config.name, images)
    skipped = source.skipped if isinstance(source, records.SkippingSource) else set()
    batches = (meshes.place_batch(batch, mesh) for batch in read_batches(config, source, images))
    batch = next(batches)
    programs = compile_programs(config, d, frozen, state, batch, mesh)
    try:
        with StopRequests() as requests, Progress(f"train {config.name}", t.images, "img", done=images) as progress:
            while images < t.images:
                state, metrics = iteration(config, programs, frozen, state, batch, images)
                images += t.batch_size
                batch = next(batches)
                log.add(images, metrics | ({"corrupt_records": len(skipped)} if skipped else {}))
                if _crosses(images, t.log_every, t) and (problem := log.write()):
                    checkpoints.save(state, {**metadata, "problem": problem})
                    raise UserError(f"{workdir}: {problem}; lower a learning rate, then run with another --workdir")
                if _crosses(images, t.sample_every, t):
                    painter.draw(state.ema, images)
                if _crosses(images, t.checkpoint_every, t) or requests.stop:
                    checkpoints.save(state, metadata)
                progress.advance(t.batch_size)
                if requests.stop and images < t.images:
                    checkpoints.wait()
                    requests.leave()
        if skipped:
            logging.getLogger(__name__).warning(
                "%s: %d corrupt records were skipped; `d2g pairs verify %s --repair` removes their shards",
                source.folder, len(skipped), source.folder,
            )  # fmt: skip
    finally:
        log.close()
    return state


def iteration(
    config: ml_collections.ConfigDict,
    programs: Programs,
    frozen: Frozen,
    state: TrainState,
    batch: dict[str, jax.Array],
    images: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of G and, once the adversary has started, of D; `images` seen before it decide the phase."""
    a, step = config.adversarial, images // config.train.batch_size
    discriminates = bool(a.weight) and images >= a.start_images
    fools = discriminates and images >= a.start_images + a.warmup_images
    if fools:
        state, generated, metrics = programs.g_adversarial(frozen, state, batch)
    else:
        adversary = {name: getattr(state, name) for name in ("discriminator", "discriminator_optimizer")}
        alone, generated, metrics = programs.g_regression(frozen, _without_adversary(state), batch)
        state = dataclasses.replace(alone, **adversary)
    if discriminates:
        state, d_metrics = programs.d(frozen, state, batch, generated)
        metrics |= d_metrics
        if a.r1_gamma and step % a.r1_interval == 0:
            state, r1_metrics = programs.r1(frozen, state, batch)
            metrics |= r1_metrics
    # Simulated CPU devices abort when the host runs ahead of them; elsewhere the host may run ahead.
    if jax.default_backend() == "cpu":
        jax.block_until_ready(state)
    return state, metrics


def _crosses(images: int, every: int, t: ml_collections.ConfigDict) -> bool:
    """Whether the step that ended at `images` passed a multiple of `every`, or ended the run."""
    return images >= t.images or images // every > (images - t.batch_size) // every


def read_batches(
    config: ml_collections.ConfigDict, source: records.PairSource | records.SkippingSource, images: int
) -> Iterator[dict[str, np.ndarray]]:
    """This process' part of every global batch from image `images` on."""
    stream = records.dataset(
        source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start=images,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for batch in stream:
        # Record ids enter threefry as 32-bit words.
        yield {**batch, "id": batch["id"].astype(np.uint32)}


class Painter:
    """Draws the same conditions again and again: teacher above, student below, for the same noise and prompt."""

    def __init__(
        self,
        d: Distillation,
        frozen: Frozen,
        source: records.PairSource | records.SkippingSource,
        mesh: jax.sharding.Mesh,
        pipeline: Pipeline,
        workdir: Path,
    ):
        count = min(SAMPLES_IN_GRID, len(source)) // meshes.batch_shards(mesh) * meshes.batch_shards(mesh)
        self._workdir, self._count = workdir, count
        if not count:
            return
        first = [source[i] for i in range(count)]
        batch = {name: np.stack([record[name] for record in first]) for name in first[0]}
        self._batch = meshes.place_batch({**batch, "id": batch["id"].astype(np.uint32)}, mesh)
        self._frozen, self._vae = frozen, {"vae": pipeline.params["vae"]}

        @jax.jit
        def images(params: Any, frozen: Frozen, vae: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            c = condition(d, frozen, batch)
            student = generate(d, params, c.noise, c.text)
            return decode(pipeline, vae, c.target), decode(pipeline, vae, student)

        self._images = images

    def draw(self, params: Any, images: int) -> None:
        """Writes samples/images_XXXXXXXX.png, named by images seen."""
        if not self._count:
            return
        teacher, student = jax.device_get(self._images(params, self._frozen, self._vae, self._batch))
        columns = 16
        rows = [part[i : i + columns] for i in range(0, self._count, columns) for part in (teacher, student)]
        save_png(self._workdir / "samples" / f"images_{images:08d}.png", grid(np.concatenate(rows), columns))
