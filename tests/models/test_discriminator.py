"""The discriminator: what it sees at the start and after, what it returns, and its second derivatives."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.losses import adversarial
from d2g_jax.models import attention, denoisers, discriminator
from d2g_jax.models.discriminator import DiscriminatorConfig
from d2g_jax.models.unet_config import UNetConfig
from d2g_jax.plan.architectures import MODELS, abstract_pipeline
from d2g_jax.runtime.errors import UserError

UNET = UNetConfig(
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=6, attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
CONFIG = DiscriminatorConfig(UNET, head_channels=12)
# One transformer is enough for a second derivative, and each takes seconds to compile
ONE_TRANSFORMER = dataclasses.replace(UNET, mid_block_type=None, up_block_types=("UpBlock2D",) * 2)


def quick_jit(function):
    """`jax.jit` for programs that run a few times: half the compile time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def network():
    return discriminator.build(CONFIG, attention="plain")


@pytest.fixture(scope="module")
def teacher():
    return denoisers.build(UNET).init(jax.random.key(0))


@pytest.fixture(scope="module")
def params(network, teacher):
    return discriminator.init_from_teacher(network, jax.random.key(1), teacher)


@pytest.fixture(scope="module")
def forward(network):
    return quick_jit(network.apply)


def batch():
    """latents and noise (2, 5, 6, 4) and text states (2, 3, 6)."""
    shapes = ((2, 5, 6, 4), (2, 5, 6, 4), (2, 3, 6))
    return [jax.random.normal(jax.random.key(10 + i), shape) for i, shape in enumerate(shapes)]


def opened(params):
    """The zero convolutions moved away from zero."""
    rng = np.random.default_rng(5)
    noisy = lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
    return {
        name: jax.tree.map(noisy, tree) if name in ("noise_in", "latent_in") else tree for name, tree in params.items()
    }


def change(a, b):
    """The largest difference between two lists of maps."""
    return max(float(jnp.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def test_maps_come_in_threes_from_low_to_high_resolution(network, params, forward):
    maps = forward(params, *batch())
    assert [m.shape for m in maps] == [(2, 3, 3)] * 3 + [(2, 5, 6)] * 3
    assert {m.dtype for m in maps} == {jnp.dtype(jnp.float32)}
    assert max(float(jnp.abs(m).max()) for m in maps) < 0.1  # logits start near zero
    sizes = [params["heads"][str(i)]["norm"]["scale"].size for i in range(6)]
    assert sizes == [8, 24, 16, 8, 16, 8]  # skip, hidden and skip, output: of the last resnet of each level


def test_at_first_text_counts_and_noise_does_not(params, forward):
    latents, noise, text = batch()
    maps = forward(params, latents, noise, text)
    assert change(maps, forward(params, latents, noise[::-1], text)) == 0
    assert change(maps, forward(params, latents, noise, text[::-1])) > 0
    assert change(maps, forward(params, latents[::-1], noise, text)) > 0
    open_noise = {**params, "noise_in": opened(params)["noise_in"]}
    assert change(forward(open_noise, latents, noise, text), forward(open_noise, latents, noise[::-1], text)) > 1e-7
    # Resized latents: only what they add can differ from the closed network
    open_latents = {**params, "latent_in": opened(params)["latent_in"]}
    assert change(maps, forward(open_latents, latents, noise, text)) > 1e-7


@pytest.mark.slow
def test_zero_convolutions_learn(network, params):
    """Their own gradient is not zero at the start, so one step opens them."""

    @quick_jit
    def gradient(params, latents, noise, text):
        return jax.grad(lambda p: sum(jnp.sum(m) for m in network.apply(p, latents, noise, text)))(params)

    gradients = gradient(params, *batch())
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert jnp.abs(leaf).max() > 0 or "bias" in jax.tree_util.keystr(path), f"{path} is a dead parameter"


def test_backbone_is_the_teacher_without_its_output_layers(network, params, teacher):
    assert jax.tree.structure(params) == jax.tree.structure(network.abstract())
    assert set(teacher) - set(params["unet"]) == {"conv_norm_out", "conv_out"}
    kept = {name: teacher[name] for name in params["unet"]}
    jax.tree.map(np.testing.assert_array_equal, params["unet"], kept)
    assert set(params) == {"unet", "noise_in", "latent_in", "heads"}
    assert not any(leaf.any() for leaf in jax.tree.leaves((params["noise_in"], params["latent_in"])))


def test_a_foreign_teacher_is_refused(network, teacher):
    with pytest.raises(UserError, match="do not fit"):
        discriminator.init_from_teacher(network, jax.random.key(1), {**teacher, "mid_block": {}})


@pytest.mark.parametrize("many_keys", [attention.MANY_KEYS, 8])
def test_r1_has_the_gradient_of_finite_differences(many_keys, monkeypatch):
    """Where all attention is plain, and where the image's is in blocks."""
    monkeypatch.setattr(attention, "MANY_KEYS", many_keys)
    monkeypatch.setattr(attention, "_BLOCK_BYTES", 2**10)
    latents, noise, text = batch()
    network = discriminator.build(DiscriminatorConfig(ONE_TRANSFORMER, head_channels=8), attention="twice")
    params = opened(network.init(jax.random.key(3)))
    # Logits start at 1e-3: scale them up, or rounding hides the differences
    params["heads"] = {i: {**head, "conv_out": {"kernel": 300 * head["conv_out"]["kernel"],
                                                "bias": head["conv_out"]["bias"]}}
                       for i, head in params["heads"].items()}  # fmt: skip
    rng = np.random.default_rng(7)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)

    @quick_jit
    def along(step, params, direction, latents, noise, text):
        """R1 at params + step * direction, and its derivative along the direction."""
        realness = lambda params, x: adversarial.realness(network.apply(params, x, noise, text))  # noqa: E731
        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        gradient, (value,) = adversarial.r1(realness, moved, latents, 1.0)
        return value, sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))

    step = 2e-4
    (value, slope), (above, _), (below, _) = (
        along(s, params, direction, latents[:1], noise[:1], text[:1]) for s in (0.0, step, -step)
    )
    assert jnp.isfinite(value)
    assert value > 0
    np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=2e-2)


@pytest.mark.slow
def test_r1_of_stable_diffusion_takes_little_memory():
    """SD 1.5's discriminator, one sample, compiled for this host, against backwards over backwards: five minutes."""
    config = DiscriminatorConfig(abstract_pipeline(MODELS["sd15"]).unet.config)
    latents = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 77, config.unet.cross_attention_dim), jnp.float32)

    def kept(attention, r1):
        network = discriminator.build(config, jnp.float32, attention, remat="full")

        def gradient(params, latents, noise, text):
            return r1(lambda params, x: adversarial.realness(network.apply(params, x, noise, text)), params, latents)

        compiled = jax.jit(gradient).lower(network.abstract(), latents, latents, text).compile()
        gib = compiled.memory_analysis().temp_size_in_bytes / 2**30
        print(f"{attention}, {r1.__name__}: {gib:.1f} GiB")
        return gib

    def along_slope(realness, params, x):
        return adversarial.r1(realness, params, x, 1.0)[0]

    def backwards_twice(realness, params, x):
        return jax.grad(lambda params: jnp.sum(jax.grad(lambda x: realness(params, x).sum())(x) ** 2))(params)

    assert kept("twice", along_slope) < kept("plain", backwards_twice) / 4


def test_ablations_leave_out_their_layers():
    bare = DiscriminatorConfig(UNET, 0, 8, z_conditioning=False, multiscale_inputs=False, multiscale_heads=False)
    network = discriminator.build(bare)
    shapes = network.abstract()
    assert set(shapes) == {"unet", "heads"}
    assert set(shapes["heads"]) == {"0"}
    maps = jax.eval_shape(network.apply, shapes, *batch())
    assert [m.shape for m in maps] == [(2, 5, 6)]


def test_sd15_has_twelve_heads_and_sdxl_nine():
    sd15 = discriminator.build(DiscriminatorConfig(UNetConfig(cross_attention_dim=768)), jnp.bfloat16, remat="full")
    text = jax.ShapeDtypeStruct((1, 77, 768), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    maps = jax.eval_shape(sd15.apply, sd15.abstract(), latents, latents, text)
    assert [m.shape[1] for m in maps] == [8] * 3 + [16] * 3 + [32] * 3 + [64] * 3
    assert {m.dtype for m in maps} == {jnp.dtype(jnp.float32)}
    widths = [sd15.abstract()["heads"][str(i)]["norm"]["scale"].shape[0] for i in range(12)]
    assert widths == [1280, 2560, 1280, 640, 1920, 1280, 320, 960, 640, 320, 640, 320]


def test_resize_is_the_mean_of_smooth_images():
    x = jnp.ones((1, 8, 6, 2)) * jnp.array([2.0, -1.0])
    np.testing.assert_allclose(
        discriminator.resize(x, (4, 3)), jnp.ones((1, 4, 3, 2)) * jnp.array([2.0, -1.0]), rtol=1e-6
    )
    checkerboard = ((jnp.arange(8)[:, None] + jnp.arange(8)) % 2).astype(jnp.float32)[None, ..., None]
    inner = discriminator.resize(checkerboard, (4, 4))[0, 1:-1, 1:-1]
    np.testing.assert_allclose(inner, 0.5, atol=1e-6)  # antialiased: a point sampler would give 0 or 1
