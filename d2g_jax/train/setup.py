"""What a config and a teacher make: the pairs to read, networks, losses, optimisers, and the first state."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from d2g_jax import records
from d2g_jax.config.configuration import compute_dtype
from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.losses import adversarial
from d2g_jax.losses.lpips import LPIPS, DecodedLPIPS
from d2g_jax.losses.perceptual import LatentLPIPS, regression_loss
from d2g_jax.models import denoisers, lora
from d2g_jax.models import discriminator as discriminators
from d2g_jax.models.layers import check_remat
from d2g_jax.models.network import Params
from d2g_jax.pipeline.conditioning import encode_text, from_text_fields
from d2g_jax.pipeline.draw import check_teacher
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import folder_hash
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.processes import first_decides
from d2g_jax.train.packed import pack
from d2g_jax.train.state import TrainState, create_state, discriminator_optimizer, generator_optimizer
from d2g_jax.train.step import Distillation, Frozen

PERCEPTUAL = ("latent_lpips", "e_latent_lpips")
"""Losses that take a `LatentLPIPS`."""
DECODED = ("lpips", "e_lpips")
"""Losses that take a `DecodedLPIPS`."""

Metric = LatentLPIPS | DecodedLPIPS

_FIELDS = ("id", "input_ids", "latents")
TOWERS = ("text_encoder", "text_encoder_2")
_NO_ADVERSARY = dict.fromkeys(("discriminator", "discriminator_r1", "discriminator_optimizer"))


def check_mismatches(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError` where mix-and-match would find no neighbour, and call real triples fake."""
    a, t = config.adversarial, config.train
    if a.weight and a.mix_and_match and t.groups == t.batch_size:
        raise UserError(
            f"train.groups={t.groups} is train.batch_size, and adversarial.mix_and_match needs two samples in each; "
            "lower train.groups or set adversarial.mix_and_match to 0"
        )


def open_pairs(config: ml_collections.ConfigDict, folder: Path) -> records.PairSource | records.SkippingSource:
    """What training reads of a record; a corrupt one stops it, or is skipped if `train.skip_corrupt` says so."""
    manifest = records.Manifest.read(folder)
    source = records.PairSource(folder, fields=(*_FIELDS, *manifest.text_shapes))
    if not config.train.skip_corrupt:
        return source
    return records.SkippingSource(source, records.held_out(len(source), config.train.held_out))


def check_pairs(folder: Path, manifest: records.Manifest, pipeline: Pipeline) -> None:
    """Raises `UserError` unless these pairs were made by this teacher, and it is one."""
    check_teacher(pipeline)
    height, width, channels = pipeline.latent_shape
    # one process: the others wait for the gigabytes that are hashed
    first_decides(
        lambda: records.check_fits(
            manifest,
            source=folder,
            latent_shape=(channels, height, width),
            token_length=pipeline.token_length,
            scaling_factor=pipeline.scaling_factor,
            scheduler=pipeline.scheduler,
            teacher_hash=folder_hash(pipeline.folder),
        )
    )


def build(
    config: ml_collections.ConfigDict,
    pipeline: Pipeline,
    manifest: records.Manifest,
    metric: Metric | None = None,
) -> tuple[Distillation, Frozen]:
    """Networks, losses and optimisers by config, and the parameters that are never trained.

    `metric` None: that of `load_metric`.
    """
    dtype = compute_dtype("train.dtype", config.train.dtype)
    check_remat(config.train.remat)
    unet_config = pipeline.unet.config
    generator_scale, scale = _scales(config)
    schedule = Schedule.from_config(pipeline.scheduler)
    adversary = _NO_ADVERSARY
    if config.adversarial.weight:
        adversary = _adversary(config, unet_config, schedule, dtype, scale)
    if metric is None:
        metric = load_metric(config.loss, pipeline)
    timestep = manifest.first_timestep if config.generator.timestep is None else config.generator.timestep
    for name, t in (("generator", timestep), ("discriminator", config.discriminator.timestep)):
        if not 0 <= t < schedule.num_train_timesteps:
            raise UserError(f"{name}.timestep={t}; the schedule has 0 to {schedule.num_train_timesteps - 1}")
    d = Distillation(
        unet=denoisers.build(unet_config, dtype, remat=config.train.remat),
        encode_text=functools.partial(encode_text, pipeline),
        schedule=schedule,
        timestep=timestep,
        regression=make_regression(config.loss, metric),
        generator_optimizer=generator_optimizer(
            config.optimizer.generator, config.train.batch_size, _regression_images(config)
        ),
        adversarial_weight=config.adversarial.weight,
        r1_gamma=config.adversarial.r1_gamma,
        r1_interval=config.adversarial.r1_interval,
        mix_and_match=config.adversarial.mix_and_match,
        groups=config.train.groups,
        micro_batch=config.train.micro_batch,
        r1_micro_batch=config.train.r1_micro_batch,
        batch_size=config.train.batch_size,
        ema_half_life_images=config.train.ema_half_life_images,
        seed=config.seed,
        noise_seed=manifest.seed,
        generator_scale=generator_scale,
        skip_nonfinite=config.train.skip_nonfinite,
        stored_text=functools.partial(from_text_fields, pipeline) if manifest.text_shapes else None,
        **adversary,
    )
    towers = {} if manifest.text_shapes else pipeline.text_params
    base, whole = {}, d.generator_scale is None
    if not whole or d.discriminator_scale is not None:
        base = _narrowed(pipeline.params["unet"], dtype, own=whole)
    return d, Frozen(towers, metric, base)


def _adversary(
    config: ml_collections.ConfigDict, unet: denoisers.UNetLike, schedule: Schedule, dtype: Any, scale: float | None
) -> dict[str, Any]:
    """What a `Distillation` has of its discriminator; `UserError` for an unknown loss or penalty."""
    c, a, t = config.discriminator, config.adversarial, config.train
    for name, known in (("loss", adversarial.LOSSES), ("penalty", adversarial.PENALTIES)):
        if a[name] not in known:
            raise UserError(f"adversarial.{name}={a[name]!r}; choose one of {', '.join(known)}")
    penalty = adversarial.PENALTIES[a.penalty]
    network = discriminators.DiscriminatorConfig(
        unet=unet,
        timestep=c.timestep if schedule.karras is None else float(schedule.told(jnp.asarray(c.timestep))),
        head_channels=c.head_channels,
        z_conditioning=c.z_conditioning,
        multiscale_inputs=c.multiscale_inputs,
        multiscale_heads=c.multiscale_heads,
    )
    twice = discriminators.build(network, jnp.float32, "twice", remat=t.remat) if a.r1_gamma and penalty.exact else None
    return {
        "discriminator": discriminators.build(network, dtype, remat=t.remat),
        "discriminator_r1": twice,
        "discriminator_scale": scale,
        "discriminator_optimizer": discriminator_optimizer(config.optimizer.discriminator, t.batch_size),
        "adversarial_loss": a.loss,
        "penalty": penalty,
        "penalty_sigma": a.penalty_sigma,
        "diffuse": c.diffuse,
    }


def _regression_images(config: ml_collections.ConfigDict) -> int:
    """How many images the generator sees before it listens to D: all, where there is none."""
    a = config.adversarial
    return a.start_images + a.warmup_images if a.weight else config.train.images


def _scales(config: ml_collections.ConfigDict) -> tuple[float | None, float | None]:
    """Of the generator's and of D's low-rank updates; None for a network that is trained whole.

    Raises `UserError` for an unknown `discriminator.backbone`, and for one that is frozen and updated.
    """
    c = config.discriminator
    if c.backbone not in ("trained", "frozen"):
        raise UserError(f"discriminator.backbone={c.backbone!r}; choose one of trained, frozen")
    if c.backbone == "frozen" and c.lora_rank:
        raise UserError(f"discriminator.lora_rank={c.lora_rank} updates a backbone that is frozen; set one of the two")
    return lora.scale(config.lora), 1.0 if c.lora_rank or c.backbone == "frozen" else None


def _narrowed(params: Params, dtype: Any, *, own: bool) -> Params:
    """Kernels in `dtype`, as the networks take them anyway; of shapes their shapes.

    `own`: no array is one of `params`, which a generator that is trained whole gives away in its first step.
    """

    def narrow(path: Any, x: Any) -> Any:
        wanted = dtype if path[-1].key == "kernel" else x.dtype
        return x.update(dtype=wanted) if isinstance(x, jax.ShapeDtypeStruct) else jnp.astype(x, wanted, copy=own)

    return jax.tree_util.tree_map_with_path(narrow, params)


def load_metric(config: ml_collections.ConfigDict, pipeline: Pipeline) -> Metric | None:
    """The frozen metric that the loss in `config.loss` takes, read from its folder; None for a loss without one.

    Raises `UserError` for a missing or damaged folder, and for another `loss.dtype` than float32 and bfloat16.
    """
    dtype = compute_dtype("loss.dtype", config.dtype)
    if config.name in DECODED:
        if not config.lpips:
            raise UserError("loss.lpips is empty; give a folder of pixel LPIPS, as `d2g metric convert` writes it")
        lpips = LPIPS.load(config.lpips, dtype=dtype)
        return DecodedLPIPS(lpips, pipeline.params["vae"], pipeline.vae, config.get("size", 0))
    return LatentLPIPS.load(config.metric, dtype=dtype) if config.name in PERCEPTUAL else None


def make_regression(config: ml_collections.ConfigDict, metric: Metric | None) -> Any:
    """(metric, key, generated, target) -> (B,), by `config.loss`; `UserError` for an unknown name or preset."""
    options = {"preset": config.preset, "l1_weight": config.l1_weight, "pseudo_huber_c": config.pseudo_huber_c}
    regression_loss(config.name, metric, **options)  # refuses a wrong name before anything compiles
    return lambda metric, key, generated, target: regression_loss(config.name, metric, **options)(
        key, generated, target
    )


def initial_state(
    config: ml_collections.ConfigDict, d: Distillation, pipeline: Pipeline, mesh: jax.sharding.Mesh
) -> TrainState:
    """Generator and discriminator from the teacher, on the mesh."""
    return meshes.place(first_state(config, d, pipeline.params["unet"]), mesh)


def first_state(config: ml_collections.ConfigDict, d: Distillation, teacher: Params) -> TrainState:
    """The state before the first step: of each network all, or its low-rank updates, or what the teacher lacks."""
    key, targets = jax.random.key(config.seed), config.lora.targets
    generator, adversary = teacher, None
    if d.generator_scale is not None:
        generator = lora.init(jax.random.fold_in(key, 1), teacher, config.lora.rank, targets)
    if d.discriminator is not None:
        adversary = discriminators.init_from_teacher(d.discriminator, key, teacher)
        if d.discriminator_scale is not None:
            backbone = adversary.pop(discriminators.BACKBONE)
            if rank := config.discriminator.lora_rank:
                adversary[discriminators.BACKBONE] = lora.init(jax.random.fold_in(key, 2), backbone, rank, targets)
    if config.train.packed:
        generator, adversary = pack(generator), None if adversary is None else pack(adversary)
    return create_state(generator, d.generator_optimizer, adversary, d.discriminator_optimizer)
