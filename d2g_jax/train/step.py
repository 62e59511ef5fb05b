"""Pure training steps: (frozen, state, batch) -> (state, metrics). The loop owns every effect.

One iteration is `g_step`, which also returns the latents it generated, then `d_step` on those latents, then every
`r1_interval` iterations `r1_step`. Reusing the generator's latents saves a forward pass of the generator per iteration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2g_jax.diffusion import noise
from d2g_jax.diffusion.schedule import Schedule, add_noise, one_step, shown
from d2g_jax.losses import adversarial
from d2g_jax.models import lora
from d2g_jax.models.discriminator import BACKBONE
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline.conditioning import Conditioning
from d2g_jax.runtime.sharding import shards
from d2g_jax.train import guard
from d2g_jax.train.accumulation import accumulate
from d2g_jax.train.packed import unpack
from d2g_jax.train.state import TrainState, ema_decay, update_ema

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
"""float32 (), or (2,): the sum and the count of a mean over so few samples that only many steps together have one."""
RegressionLoss = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
"""(metric parameters, key, generated (B, h, w, C), target) -> (B,)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """The static half of training: networks, schedule, losses and constants. No arrays but the schedule's.

    Attributes:
      unet: the generator's network.
      encode_text: (text towers' parameters, input_ids (B, T L)) to `Conditioning`.
      discriminator: D's network; None in a regression-only run.
      discriminator_r1: D in float32 and with attention to be differentiated twice, for an exact penalty; or None.
      schedule, timestep: where in the noise schedule the generator's one call happens.
      regression: d(generated, target) per sample.
      adversarial_weight: the paper's lambda_GAN.
      r1_gamma, r1_interval, mix_and_match: the discriminator's regularisers.
      adversarial_loss, penalty, penalty_sigma: of `losses.adversarial`.
      diffuse: D sees latents noised to random levels of the schedule.
      groups: logical groups of the batch (see mesh.py).
      batch_size: images per step, all processes together.
      micro_batch, r1_micro_batch: samples that a device takes at once (see accumulation.py); None for all.
      ema_half_life_images: of the generator's average.
      seed: training seed; noise_seed: the seed that the pairs were made with.
      generator_scale: of low-rank updates of the frozen teacher, which are then what is trained (models/lora.py); None:
        all of the generator is.
      discriminator_scale: the same for D's backbone, which may also be frozen with no update at all.
      skip_nonfinite: how many updates in a row may be left out for not being finite (see guard.py).
      stored_text: a batch to `Conditioning`, where the records hold the text embeddings; then no text tower runs.
    """

    unet: Network
    encode_text: Callable[[dict[str, Params], jax.Array], Conditioning]
    discriminator: Network | None
    discriminator_r1: Network | None
    schedule: Schedule
    timestep: int
    regression: RegressionLoss
    generator_optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation | None
    adversarial_weight: float
    r1_gamma: float
    r1_interval: int
    mix_and_match: float
    groups: int
    batch_size: int
    ema_half_life_images: float
    seed: int
    noise_seed: int
    adversarial_loss: str = "non_saturating"
    penalty: adversarial.Penalty = adversarial.PENALTIES["r1"]
    penalty_sigma: float = 0.0
    diffuse: bool = False
    generator_scale: float | None = None
    discriminator_scale: float | None = None
    skip_nonfinite: int = 0
    micro_batch: int | None = None
    r1_micro_batch: int | None = None
    stored_text: Callable[[Batch], Conditioning] | None = None

    def key(self, purpose: str, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(noise.purpose_key(self.seed, purpose), step)

    def sample_keys(self, purpose: str, step: jax.Array) -> jax.Array:
        """One key for each place in the batch: (B,)."""
        key = self.key(purpose, step)
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(self.batch_size))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Parameters that no optimiser ever sees, passed as arguments so that they are no constants of the program.

    Attributes:
      towers, metric: text towers under their names, the loss's metric.
      teacher: the UNet that low-rank updates are of, kernels in the networks' dtype; empty where all is trained.
    """

    towers: dict[str, Params]
    metric: Any
    teacher: Params = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """What the generator is given, and what it should give.

    Attributes:
      noise, target: float32 (B, h, w, C); the target is the teacher's scaled latent.
      text: what the networks take from the caption.
      input_ids: (B, T L).
    """

    noise: jax.Array
    target: jax.Array
    text: Conditioning
    input_ids: jax.Array


def condition(d: Distillation, frozen: Frozen, batch: Batch) -> Condition:
    """Redraws the records' noise from their ids, encodes their captions, and turns NCHW into NHWC.

    Captions that the records hold encoded are taken as they are.
    """
    drawn = noise.record_noise(d.noise_seed, batch["id"], batch["latents"].shape[1:])  # (B, C, h, w)
    text = d.stored_text(batch) if d.stored_text else d.encode_text(frozen.towers, batch["input_ids"])
    to_nhwc = lambda x: jnp.transpose(x, (0, 2, 3, 1)).astype(jnp.float32)  # noqa: E731
    return Condition(to_nhwc(drawn), to_nhwc(batch["latents"]), jax.lax.stop_gradient(text), batch["input_ids"])


def generator(d: Distillation, frozen: Frozen, trained: Params) -> Params:
    """The generator's parameters, given what of it is trained: all, or low-rank updates of the frozen teacher."""
    trained = unpack(trained)
    return trained if d.generator_scale is None else lora.merge(frozen.teacher, trained, d.generator_scale)


def discriminator(d: Distillation, frozen: Frozen, trained: Params) -> Params:
    """The same for the discriminator, whose new layers are always trained."""
    trained = unpack(trained)
    if d.discriminator_scale is None:
        return trained
    backbone = {name: frozen.teacher[name] for name in d.discriminator.shapes[BACKBONE]}
    return lora.merge({BACKBONE: backbone}, trained, d.discriminator_scale)


def generate(d: Distillation, frozen: Frozen, trained: Params, noise: jax.Array, text: Conditioning) -> jax.Array:
    """The student: one network call; float32 scaled latents (B, h, w, C). `trained`: see `generator`."""
    params = generator(d, frozen, trained)

    def denoise(latents: jax.Array, t: jax.Array) -> jax.Array:
        return d.unet.apply(params, latents, jnp.broadcast_to(t, latents.shape[:1]), *text)

    return one_step(denoise, d.schedule, d.timestep, noise)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Level:
    """Where D looks at latents from: at that level of noise, for a real and a fake latent the same.

    Attributes:
      timesteps: int32 (B,).
      noise: float32 (B, h, w, C), another than the record's, which D may be given.
    """

    timesteps: jax.Array
    noise: jax.Array


def draw_level(d: Distillation, purpose: str, step: jax.Array, like: jax.Array) -> Level | None:
    """Of latents (B, h, w, C) drawn uniformly from the schedule; None where D sees them clean."""
    if not d.diffuse:
        return None
    time_key, noise_key = jax.random.split(d.key(purpose, step))
    timesteps = jax.random.randint(time_key, like.shape[:1], 0, d.schedule.num_train_timesteps)
    return Level(timesteps, jax.random.normal(noise_key, like.shape))


def judge(
    d: Distillation,
    network: Network,
    params: Params,
    latents: jax.Array,
    c: tuple[jax.Array, Conditioning, Level | None],
) -> list[jax.Array]:
    """D's logit maps of latents (B, h, w, C), given noise, text and level of each."""
    drawn, text, level = c
    if level is None:
        return network.apply(params, latents, drawn, *text)
    keep = jnp.asarray(d.schedule.alphas_cumprod)[level.timesteps][:, None, None, None]
    noised = add_noise(latents, level.noise, keep)
    seen = shown(d.schedule.prediction_type, noised, jnp.sqrt(keep), jnp.sqrt(1.0 - keep))
    return network.apply(params, seen, drawn, *text, timesteps=d.schedule.told(level.timesteps))


def g_step(
    d: Distillation, with_adversary: bool, frozen: Frozen, state: TrainState, batch: Batch
) -> tuple[TrainState, jax.Array, Metrics]:
    """One update of the generator.

    The gradient of each loss is taken at the generator's output and pulled back once, so that their norms there, the
    quantity by which lambda_GAN is tuned, cost nothing.

    Returns:
      The new state, the generated latents (B, h, w, C) without gradient, and metrics.
    """
    c, keys = condition(d, frozen, batch), d.sample_keys("augmentation", state.step)

    level = draw_level(d, "generator's level", state.step, c.target) if with_adversary else None

    def gradient_of(c: Condition, keys: jax.Array, level: Level | None) -> tuple[Params, dict[str, jax.Array]]:
        generated, pull_back = jax.vjp(lambda params: generate(d, frozen, params, c.noise, c.text), state.generator)

        def regress(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            losses = d.regression(frozen.metric, keys, x, c.target)
            return jnp.sum(losses) / d.batch_size, losses

        def convince(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            params, given = discriminator(d, frozen, state.discriminator), (c.noise, c.text, level)
            paired = d.adversarial_loss == "relativistic"
            real = judge(d, d.discriminator, params, c.target, given) if paired else None
            losses = adversarial.generator_loss(d.adversarial_loss, judge(d, d.discriminator, params, x, given), real)
            return jnp.sum(losses) / d.batch_size, losses

        output_gradient, losses = jax.grad(regress, has_aux=True)(generated)
        values = {"generated": generated, "regression": losses, "regression_gradient": output_gradient}
        if with_adversary:
            fooling_gradient, losses = jax.grad(convince, has_aux=True)(generated)
            values |= {"adversarial": losses, "adversarial_gradient": fooling_gradient}
            output_gradient = output_gradient + d.adversarial_weight * fooling_gradient
        return pull_back(output_gradient)[0], values

    gradient, values = accumulate(gradient_of, state.generator, d.batch_size, d.micro_batch, c, keys, level)
    generated = values["generated"]
    metrics = {
        "loss_regression": jnp.mean(values["regression"]),
        "gradient_regression": optax.tree.norm(values["regression_gradient"]),
        "latent_mse": jnp.mean(jnp.square(generated - c.target)),
        "latent_mean": jnp.mean(generated),
        "latent_std": jnp.std(generated),
        "target_mean": jnp.mean(c.target),
        "target_std": jnp.std(c.target),
        "gradient_generator": optax.tree.norm(gradient),
    }
    if with_adversary:
        metrics["loss_adversarial"] = jnp.mean(values["adversarial"])
        metrics["gradient_adversarial"] = d.adversarial_weight * optax.tree.norm(values["adversarial_gradient"])
    updates, optimizer_state = d.generator_optimizer.update(gradient, state.generator_optimizer, state.generator)
    params = optax.apply_updates(state.generator, updates)
    images = state.images + d.batch_size
    decay = ema_decay(images, d.batch_size, d.ema_half_life_images)
    after = dataclasses.replace(
        state,
        step=state.step + 1,
        images=images,
        generator=params,
        ema=update_ema(state.ema, params, decay),
        generator_optimizer=optimizer_state,
    )
    state, metrics = guard.commit("generator", d.skip_nonfinite, state, after, metrics)
    return state, jax.lax.stop_gradient(generated), metrics


def _update_discriminator(
    d: Distillation, update: str, state: TrainState, gradient: Params, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    updates, optimizer_state = d.discriminator_optimizer.update(
        gradient, state.discriminator_optimizer, state.discriminator
    )
    params = optax.apply_updates(state.discriminator, updates)
    after = dataclasses.replace(state, discriminator=params, discriminator_optimizer=optimizer_state)
    return guard.commit(update, d.skip_nonfinite, state, after, metrics)


def d_step(
    d: Distillation, frozen: Frozen, state: TrainState, batch: Batch, generated: jax.Array
) -> tuple[TrainState, Metrics]:
    """One update of the discriminator on the teacher's latents against `generated` and mismatched triples.

    Real and fake halves go through the network in one call. `logit_gap_X` is the logit of a real triple minus that of
    the same triple with X swapped: what the mismatched part of the fake half tells for nothing.
    """
    c = condition(d, frozen, batch)
    fake, fake_noise, fake_text, swapped = adversarial.mix_and_match(
        d.key("mix and match", state.step), d.mix_and_match, d.groups, generated, c.target, c.noise, c.text,
        c.input_ids, z_conditioning=d.discriminator.config.z_conditioning,
    )  # fmt: skip

    level = draw_level(d, "discriminator's level", state.step, c.target)
    rows = [(c.target, (c.noise, c.text, level)), (fake, (fake_noise, fake_text, level))]
    differences = bool(d.r1_gamma) and not d.penalty.exact
    if differences:
        moved = rows if d.penalty.fake else rows[:1]
        shift = d.penalty_sigma * jax.random.normal(d.key("penalty", state.step), (len(moved), *c.target.shape))
        rows += [(latents + by, given) for (latents, given), by in zip(moved, shift, strict=True)]

    def gradient_of(*rows: Any) -> tuple[Params, dict[str, jax.Array]]:
        latents, given = jax.tree.map(_interleave, *rows)

        def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            maps = judge(d, d.discriminator, discriminator(d, frozen, params), latents, given)
            real, fake, *moved = zip(*(_separate(m, len(rows)) for m in maps), strict=True)
            losses = adversarial.discriminator_loss(d.adversarial_loss, real, fake)
            values = {"loss": losses, "real": adversarial.realness(real), "fake": adversarial.realness(fake)}
            if moved:
                pairs = zip((real, fake), moved, strict=False)
                values["penalty"] = sum(adversarial.slopes(near, far, d.penalty_sigma) for near, far in pairs)
                losses = losses + 0.5 * d.r1_gamma * values["penalty"]
            return jnp.sum(losses) / d.batch_size, values

        return jax.grad(loss, has_aux=True)(state.discriminator)

    gradient, values = accumulate(gradient_of, state.discriminator, d.batch_size, d.micro_batch, *rows)
    real, fake = values["real"], values["fake"]
    wins = [real > fake] if d.adversarial_loss == "relativistic" else [real > 0.0, fake < 0.0]
    metrics = {
        "loss_discriminator": jnp.mean(values["loss"]),
        "logit_real": jnp.mean(real),
        "logit_fake": jnp.mean(fake),
        "discriminator_wins": jnp.mean(jnp.stack(wins)),
        "gradient_discriminator": optax.tree.norm(gradient),
    }
    if differences:
        metrics["loss_r1"] = 0.5 * d.r1_gamma * jnp.mean(values["penalty"])
    if d.mix_and_match:
        gap = real - fake
        metrics |= {
            f"logit_gap_{name}": jnp.stack([jnp.sum(jnp.where(which, gap, 0.0)), jnp.sum(which)])
            for name, which in swapped.items()
        }
    return _update_discriminator(d, "discriminator", state, gradient, metrics)


def _interleave(*rows: jax.Array) -> jax.Array:
    """k times (B, ...) to (k B, ...), device by device: a plain concatenation would move samples between them."""
    split = [x.reshape(shards(), -1, *x.shape[1:]) for x in rows]
    return jnp.concatenate(split, axis=1).reshape(-1, *rows[0].shape[1:])


def _separate(x: jax.Array, count: int) -> list[jax.Array]:
    """The inverse of `_interleave`."""
    parts = jnp.split(x.reshape(shards(), -1, *x.shape[1:]), count, axis=1)
    return [part.reshape(-1, *x.shape[1:]) for part in parts]


def r1_step(d: Distillation, frozen: Frozen, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """The lazy exact penalty: gamma / 2 times it, times the interval, on one real sample of each group.

    With `penalty.fake` on what G draws there too.
    """
    one = {name: adversarial.first_of_each_group(value, d.groups) for name, value in batch.items()}
    c = condition(d, frozen, one)

    level = draw_level(d, "penalty's level", state.step, c.target)

    def gradient_of(c: Condition, level: Level | None) -> tuple[Params, jax.Array]:
        def realness_of(params: Params, x: jax.Array) -> jax.Array:
            params, given = discriminator(d, frozen, params), (c.noise, c.text, level)
            return adversarial.realness(judge(d, d.discriminator_r1, params, x, given))

        at = [c.target, generate(d, frozen, state.generator, c.noise, c.text)] if d.penalty.fake else [c.target]
        weight = 0.5 * d.r1_gamma * d.r1_interval / d.groups
        found = [adversarial.r1(realness_of, state.discriminator, x, weight) for x in at]
        return jax.tree.map(lambda *x: sum(x), *found)

    gradient, penalties = accumulate(gradient_of, state.discriminator, d.groups, d.r1_micro_batch, c, level)
    metrics = {"loss_r1": 0.5 * d.r1_gamma * jnp.mean(penalties), "gradient_r1": optax.tree.norm(gradient)}
    return _update_discriminator(d, "r1", state, gradient, metrics)
