"""The training steps on a tiny digits-shaped problem: gradients, frozen parts, the same numbers on any mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LEAST_UNET as UNET

from d2g_jax.diffusion import noise
from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.digits.config import optimizer
from d2g_jax.losses import adversarial
from d2g_jax.losses.perceptual import mse
from d2g_jax.models import clip, denoisers, discriminator
from d2g_jax.pipeline.conditioning import Conditioning
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime import sharding
from d2g_jax.teacher.teacher import SCHEDULER
from d2g_jax.train import guard
from d2g_jax.train.packed import pack, unpack
from d2g_jax.train.state import create_state, discriminator_optimizer, ema_decay, generator_optimizer
from d2g_jax.train.step import Distillation, Frozen, condition, d_step, draw_level, g_step, generate, judge, r1_step

BATCH, GROUPS = 20, 10
TEXT = clip.ClipTextConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=4,
    bos_token_id=14,
    eos_token_id=15,
)


@functools.cache
def problem(size=BATCH, groups=GROUPS, packed=True):
    """(static half, frozen parameters, first state, batch of `size`), all on the host's default device."""
    d_config = discriminator.DiscriminatorConfig(UNET, head_channels=8)
    rates = optimizer()
    rates.generator.warmup_images = rates.discriminator.warmup_images = 0
    tower = clip.build(TEXT)
    d = Distillation(
        unet=denoisers.build(UNET),
        encode_text=lambda towers, ids: Conditioning(tower.apply(towers["text_encoder"], ids).last_hidden_state, None),
        discriminator=discriminator.build(d_config),
        discriminator_r1=discriminator.build(d_config, attention="twice"),
        schedule=Schedule.from_config(SCHEDULER),
        timestep=999,
        regression=lambda metric, key, a, b: mse(a, b),
        generator_optimizer=generator_optimizer(rates.generator, size),
        discriminator_optimizer=discriminator_optimizer(rates.discriminator, size),
        adversarial_weight=0.1,
        r1_gamma=100.0,  # large enough to be seen to work within a few steps
        r1_interval=16,
        mix_and_match=0.25,
        groups=groups,
        batch_size=size,
        ema_half_life_images=100.0,
        seed=0,
        noise_seed=5,
    )
    key = jax.random.key(0)
    teacher = d.unet.init(key)
    frozen = Frozen({"text_encoder": tower.init(jax.random.fold_in(key, 1))}, None)
    adversary = discriminator.init_from_teacher(d.discriminator, jax.random.fold_in(key, 2), teacher)
    # The zero-initialised layers would hide whether noise and resized latents reach the logits.
    adversary = jax.tree.map(
        lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), adversary
    )
    if packed:
        teacher, adversary = pack(teacher), pack(adversary)
    state = create_state(teacher, d.generator_optimizer, adversary, d.discriminator_optimizer)
    rng = np.random.default_rng(0)
    batch = {
        "id": np.arange(size, dtype=np.uint32),
        "input_ids": rng.integers(0, 14, (size, 4)).astype(np.int32),
        "latents": rng.standard_normal((size, 4, 4, 4)).astype(np.float16),
    }
    return d, frozen, state, batch


VARIANTS = {
    "paper": {},
    "today": {
        "adversarial_loss": "relativistic",
        "penalty": adversarial.PENALTIES["approximate_r1_r2"],
        "penalty_sigma": 0.05,
        "r1_gamma": 2.0,
        "diffuse": True,
    },
    "hinge": {"adversarial_loss": "hinge", "penalty": adversarial.PENALTIES["r1_r2"], "diffuse": True},
}


@functools.cache
def programs(variant="paper"):
    """The three steps, compiled once for all tests: compilation is what these tests spend their time on."""
    d = dataclasses.replace(problem()[0], **VARIANTS[variant])
    return (
        jax.jit(functools.partial(g_step, d, True)),
        jax.jit(functools.partial(d_step, d)),
        jax.jit(functools.partial(r1_step, d)),
    )


@functools.cache
def without_adversary():
    """G's step by its regression alone, compiled once likewise."""
    return jax.jit(functools.partial(g_step, problem()[0], False))


def moved(before, after):
    return max(
        float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_condition_redraws_the_noise_of_the_records():
    d, frozen, _, batch = problem()
    c = condition(d, frozen, batch)
    expected = noise.record_noise(5, batch["id"], (4, 4, 4)).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(c.noise, expected)
    np.testing.assert_array_equal(c.target, batch["latents"].astype(np.float32).transpose(0, 2, 3, 1))


def test_g_step_follows_the_gradient_of_the_whole_loss():
    """The output-gradient construction equals plain differentiation of the summed loss."""
    d, frozen, state, batch = problem()

    def loss(params):
        c = condition(d, frozen, batch)
        x = generate(d, frozen, params, c.noise, c.text)
        fooling = adversarial.generator_loss(
            "non_saturating", d.discriminator.apply(unpack(state.discriminator), x, c.noise, *c.text), None
        ).mean()
        return mse(x, c.target).mean() + d.adversarial_weight * fooling

    expected = jax.jit(jax.grad(loss))(unpack(state.generator))
    norm = np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(expected)))
    new, generated, metrics = programs()[0](frozen, state, batch)
    assert float(metrics["gradient_generator"]) == pytest.approx(norm, rel=1e-4)
    assert generated.shape == (BATCH, 4, 4, 4)
    assert int(new.images) == BATCH
    assert int(new.step) == 1
    assert moved(state.generator, new.generator) > 0
    assert moved(state.discriminator, new.discriminator) == 0


def test_regression_alone_falls():
    _, frozen, state, batch = problem()
    losses = []
    for _ in range(60):
        state, _, metrics = without_adversary()(frozen, state, batch)
        losses.append(float(metrics["loss_regression"]))
    assert losses[-1] < 0.7 * losses[0]
    assert "loss_adversarial" not in metrics


def test_a_packed_network_is_updated_as_its_arrays_one_by_one_are():
    """And its average; D's, with its two rates, is compared by `test_two_devices_give_the_numbers_of_one`."""
    d, frozen, state, batch = problem(packed=False)
    _, _, as_vectors, _ = problem()
    assert len(jax.tree.leaves(as_vectors.generator)) == len(state.generator) < len(jax.tree.leaves(state.generator))
    after, generated, metrics = jax.jit(functools.partial(g_step, d, False))(frozen, state, batch)
    packed, also, same = without_adversary()(frozen, as_vectors, batch)
    np.testing.assert_allclose(generated, also, rtol=1e-5, atol=1e-6)
    assert float(same["gradient_generator"]) == pytest.approx(float(metrics["gradient_generator"]), rel=1e-5)
    for name in ("generator", "ema"):
        found, expected = unpack(getattr(packed, name)), getattr(after, name)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert moved(found, expected) < 1e-6 < moved(state.generator, expected)


def test_d_learns_to_tell_and_leaves_g_alone():
    _, frozen, state, batch = problem()
    _, generated, _ = programs()[0](frozen, state, batch)
    step = programs()[1]
    before, losses = state, []
    for _ in range(30):
        state, metrics = step(frozen, state, batch, generated)
        losses.append(float(metrics["loss_discriminator"]))
    assert losses[-1] < losses[0]
    assert moved(before.generator, state.generator) == 0
    assert moved(before.discriminator, state.discriminator) > 0


def test_r1_is_finite_positive_and_shrinks_the_penalty():
    _, frozen, state, batch = problem()
    step, values = programs()[2], []
    for _ in range(20):
        state, metrics = step(frozen, state, batch)
        values.append(float(metrics["loss_r1"]))
    assert all(np.isfinite(values))
    assert 0 < values[-1] < values[0]


def today():
    """(static half, frozen parameters, state, batch, condition, D's maps by parameters, latents and level)."""
    d, frozen, state, batch = problem()
    d = dataclasses.replace(d, **VARIANTS["today"], mix_and_match=0.0)
    c = condition(d, frozen, batch)
    maps = jax.jit(lambda params, x, level: judge(d, d.discriminator, unpack(params), x, (c.noise, c.text, level)))
    return d, frozen, state, batch, c, maps


def mean_softplus(maps, signs):
    """Over the heads, of logits put together by their signs."""
    gaps = [sum(sign * one for sign, one in zip(signs, head, strict=True)) for head in zip(*maps, strict=True)]
    return np.mean([float(jax.nn.softplus(gap).mean()) for gap in gaps])


@pytest.mark.slow
def test_what_a_relativistic_generator_minimises():
    d, frozen, state, batch, c, maps = today()
    level = draw_level(d, "generator's level", state.step, c.target)
    _, generated, metrics = programs("today")[0](frozen, state, batch)
    seen = [maps(state.discriminator, x, level) for x in (c.target, generated)]
    assert float(metrics["loss_adversarial"]) == pytest.approx(mean_softplus(seen, (1, -1)), rel=1e-5)


def test_relativistic_d_on_noised_latents_with_differences():
    """What D minimises, put together by hand from its maps of every part; and it learns by it."""
    d, frozen, state, batch, c, maps = today()
    generated = jnp.roll(c.target, 1, axis=0)
    step = jax.jit(functools.partial(d_step, d))
    level = draw_level(d, "discriminator's level", state.step, c.target)
    shift = 0.05 * jax.random.normal(d.key("penalty", state.step), (2, *c.target.shape))
    parts = (c.target, generated, c.target + shift[0], generated + shift[1])
    seen = [maps(state.discriminator, x, level) for x in parts]
    real, fake, *moved = (adversarial.realness(one) for one in seen)
    slopes = ((moved[0] - real) ** 2 + (moved[1] - fake) ** 2) / 0.05**2
    after, metrics = step(frozen, state, batch, generated)
    assert float(metrics["loss_discriminator"]) == pytest.approx(mean_softplus(seen[:2], (-1, 1)), rel=1e-5)
    assert float(metrics["loss_r1"]) == pytest.approx(float(slopes.mean()), rel=1e-3)
    assert float(metrics["discriminator_wins"]) == pytest.approx(float((real > fake).mean()))
    losses = [float(metrics["loss_discriminator"])]
    for _ in range(30):
        after, metrics = step(frozen, after, batch, generated)
        losses.append(float(metrics["loss_discriminator"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@functools.cache
def one_device(variant):
    """(state, metrics, what the generator drew) after one update of each kind by the programs of one device."""
    _, frozen, state, batch = problem()
    g, d, r1 = programs(variant)
    after_g, generated, g_metrics = g(frozen, state, batch)
    after_d, d_metrics = d(frozen, state, batch, generated)
    after_r1, r1_metrics = r1(frozen, state, batch)
    return generated, {"g": (after_g, g_metrics), "d": (after_d, d_metrics), "r1": (after_r1, r1_metrics)}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [2, 1])
@pytest.mark.parametrize("name", ["g", "d", "r1"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_devices_give_the_numbers_of_one(variant, name, fsdp, monkeypatch):
    """An update of G, D or R1 on a mesh of two, in parts, against one device at once: every metric, 2e-5.

    The two gather kernels and reduce gradients, but send each other no activation.
    """
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    monkeypatch.setattr(sharding, "_MIN_SHARDED_SIZE", 64)  # the kernels here are small
    static, frozen, state, batch = problem(packed=False)
    static = dataclasses.replace(static, **VARIANTS[variant], micro_batch=5, r1_micro_batch=1)
    mesh = meshes.make_mesh(fsdp=fsdp)
    generated, expected = one_device(variant)
    placed = [meshes.place(frozen, mesh), meshes.place(state, mesh), meshes.place_batch(batch, mesh)]
    if name == "d":
        placed.append(jax.device_put(generated, placed[2]["id"].sharding))
    steps = {"g": functools.partial(g_step, static, True), "d": functools.partial(d_step, static)}
    step = steps.get(name) or functools.partial(r1_step, static)
    with meshes.traced_for(mesh):
        program = jax.jit(step).lower(*placed).compile()
    # Simulated devices abort when the host runs ahead of them.
    state, *_, metrics = jax.block_until_ready(program(*placed))
    one, one_metrics = expected[name]
    assert metrics.keys() == one_metrics.keys()
    for metric, value in one_metrics.items():
        assert np.asarray(metrics[metric]) == pytest.approx(np.asarray(value), rel=2e-5, abs=1e-6), metric
    assert int(state.images) == int(one.images)
    moved = collectives(program.as_text())
    assert fsdp == 1 or "all-gather" in {operation for operation, _ in moved}
    # Every activation has the factor 5 of the batch, no kernel has.
    assert [(operation, size) for operation, size in moved if size % 5 == 0] == []


COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def collectives(text):
    """(operation, elements) of every result of every collective of a compiled program."""
    return [
        (name, int(np.prod([int(side) for side in shape.split(",") if side], dtype=int)))
        for types, name in COLLECTIVE.findall(text)
        for shape in SHAPE.findall(types)
    ]


def test_a_bad_batch_changes_nothing_but_what_is_known_of_it():
    """With none to be left out, the first NaN stops G, D and R1: good batches later find the state before it."""
    _, frozen, state, batch = problem()
    g, d, r1 = programs()
    bad = {**batch, "latents": np.full_like(batch["latents"], np.nan)}
    now, generated, metrics = g(frozen, state, bad)
    assert (int(metrics["outcome"]), float(metrics["loss_regression"])) == (
        guard.STOPPED,
        pytest.approx(np.nan, nan_ok=True),
    )
    now, generated, metrics = g(frozen, now, batch)
    assert int(metrics["outcome"]) == guard.STANDS_STILL
    now, metrics = d(frozen, now, batch, generated)
    assert int(metrics["outcome"]) == guard.STANDS_STILL
    now, metrics = r1(frozen, now, batch)
    assert int(metrics["outcome"]) == guard.STANDS_STILL
    assert {name: int(count) for name, count in now.left_out.items()} == {"generator": 1, "discriminator": 0, "r1": 0}
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(now, left_out=state.left_out), state)


def test_d_alone_can_be_bad_and_leaves_g_as_it_is():
    _, frozen, state, batch = problem()
    g, d, _ = programs()
    now, generated, _ = g(frozen, state, batch)
    after, metrics = d(frozen, now, batch, jnp.full_like(generated, jnp.inf))
    assert int(metrics["outcome"]) == guard.STOPPED
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(after, left_out=now.left_out), now)


def test_logit_gaps_open_as_d_learns():
    """Paper.md, section 9: after D has trained on a tiny set it tells all three swaps from the real triple."""
    _, frozen, state, batch = problem()
    _, generated, _ = programs()[0](frozen, state, batch)
    gaps = {}
    for step in range(80):
        state, metrics = programs()[1](frozen, dataclasses.replace(state, step=jnp.int32(step)), batch, generated)
        for name, value in metrics.items():
            if name.startswith("logit_gap_") and step >= 40:
                gaps[name] = gaps.get(name, 0.0) + np.asarray(value)
    assert gaps.keys() == {"logit_gap_latents", "logit_gap_noise", "logit_gap_text"}
    for name, (total, count) in gaps.items():
        assert count > 0, name
        assert total / count > 0, name


def test_ema_decay_has_its_half_life():
    assert float(ema_decay(jnp.int32(10**6), 64, 2000.0)) ** (2000 / 64) == pytest.approx(0.5, rel=1e-4)
    assert float(ema_decay(jnp.int32(64), 64, 2000.0)) < 1e-5  # the ramp: after one step the start is forgotten
