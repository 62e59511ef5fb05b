"""Every block by itself against diffusers' PyTorch classes, and the choices that have no counterpart there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.models import initializers, layers, transformer
from d2g_jax.models.network import Network
from d2g_jax.runtime.errors import UserError

SHAPE = (2, 5, 6, 16)


def ours_and_theirs(make, module, x, *extra, **torch_extra):
    """Output and gradient with respect to x of our block and of the PyTorch module."""
    from torch_oracle import nchw, nhwc, normal, params_of, quick_jit, randomised

    network = Network.build(None, make)
    params = params_of(randomised(module), network)
    x_torch = nchw(x).requires_grad_()
    theirs = module(x_torch, **torch_extra)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    cotangent = normal(9, *nhwc(theirs).shape)
    (theirs * nchw(cotangent)).sum().backward()

    @quick_jit
    def run(params, x):
        output, pull = jax.vjp(lambda x: network.apply(params, x, *extra), x)
        return output, *pull(cotangent)

    return run(params, x), (nhwc(theirs), nhwc(x_torch.grad))


def assert_equal(pair):
    from torch_oracle import error

    (output, gradient), (their_output, their_gradient) = pair
    assert error(output, their_output) < 1e-5
    assert error(gradient, their_gradient) < 1e-4


@pytest.mark.parametrize(
    ("out_channels", "temb", "eps", "scale"),
    [(16, 12, 1e-5, 1.0), (24, None, 1e-6, 2.0)],
    ids=["unet", "vae-widening"],
)
def test_resnet(out_channels, temb, eps, scale):
    pytest.importorskip("torch")
    from diffusers.models.resnet import ResnetBlock2D
    from torch_oracle import normal, torch

    module = ResnetBlock2D(
        in_channels=16, out_channels=out_channels, temb_channels=temb, groups=4, eps=eps, output_scale_factor=scale
    )
    t = None if temb is None else normal(1, 2, temb)

    def make(rngs):
        return layers.ResnetBlock2D(16, out_channels, temb, groups=4, eps=eps, output_scale_factor=scale, rngs=rngs)

    torch_t = None if t is None else torch.from_numpy(t)
    assert_equal(ours_and_theirs(make, module, normal(0, *SHAPE), t, temb=torch_t))


@pytest.mark.parametrize("linear", [False, True], ids=["conv-projection", "linear-projection"])
def test_transformer(linear):
    pytest.importorskip("torch")
    from diffusers import Transformer2DModel
    from torch_oracle import normal, torch

    module = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=1, cross_attention_dim=10,
        norm_num_groups=4, use_linear_projection=linear, upcast_attention=linear,
    )  # fmt: skip
    context = normal(1, 2, 7, 10)

    def make(rngs):
        kw = dict(
            heads=2,
            depth=1,
            context_dim=10,
            groups=4,
            attention="plain",
            upcast=linear,
            remat="none" if linear else "full",
        )
        return transformer.Transformer2DModel(16, use_linear_projection=linear, **kw, rngs=rngs)

    extra = {"encoder_hidden_states": torch.from_numpy(context), "return_dict": False}
    # The entry norm's epsilon shows only where the variance is small
    assert_equal(ours_and_theirs(make, module, 0.01 * normal(0, *SHAPE), context, **extra))


@pytest.mark.parametrize("padding", [1, 0], ids=["unet", "vae"])
def test_downsample(padding):
    pytest.importorskip("torch")
    from diffusers.models.downsampling import Downsample2D
    from torch_oracle import normal

    module = Downsample2D(16, use_conv=True, out_channels=16, padding=padding, name="op")
    ours = 1 if padding else ((0, 1), (0, 1))
    make = lambda rngs: layers.Downsample2D(16, padding=ours, rngs=rngs)  # noqa: E731
    assert_equal(ours_and_theirs(make, module, normal(0, *SHAPE)))


@pytest.mark.parametrize("size", [None, (9, 11)])
def test_upsample(size):
    pytest.importorskip("torch")
    from diffusers.models.upsampling import Upsample2D
    from torch_oracle import normal

    module = Upsample2D(16, use_conv=True, out_channels=16)
    make = lambda rngs: layers.Upsample2D(16, rngs=rngs)  # noqa: E731
    assert_equal(ours_and_theirs(make, module, normal(0, *SHAPE), None, size, output_size=size))


@pytest.mark.parametrize(("flip", "shift", "dim"), [(True, 0, 8), (False, 1, 10), (True, 0, 9)])
def test_sinusoidal_embedding(flip, shift, dim):
    pytest.importorskip("torch")
    from diffusers.models.embeddings import get_timestep_embedding
    from torch_oracle import torch

    steps = np.array([0, 1, 20, 399, 981, 999], np.int32)
    theirs = get_timestep_embedding(torch.from_numpy(steps), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    ours = layers.sinusoidal_embedding(jnp.asarray(steps), dim, flip_sin_to_cos=flip, freq_shift=shift)
    # float32 angles near 1000 carry an error of 6e-5
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    np.testing.assert_allclose(ours[:3], theirs.numpy()[:3], atol=3e-6)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, ((1, 1), (1, 1))), (3, 2, ((0, 1), (0, 1))), (1, 1, ((0, 0), (0, 0)))]
)
def test_both_formulations_of_a_convolution_agree_with_their_second_derivatives(size, stride, padding):
    """R1 differentiates twice: once by the input, then by the kernel."""

    def both(convolve):
        def penalty(kernel, x):
            score = lambda x: jnp.sum(jnp.tanh(convolve(x, kernel, stride, padding)))  # noqa: E731
            return jnp.sum(jax.grad(score)(x) ** 2)

        return jax.jit(lambda kernel, x: (convolve(x, kernel, stride, padding), jax.grad(penalty)(kernel, x)))

    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 4, 3), (size, size, 3, 7)))
    for direct, product in zip(
        both(layers.convolve)(kernel, x), both(layers.convolve_by_matmul)(kernel, x), strict=True
    ):
        np.testing.assert_allclose(product, direct, rtol=1e-4, atol=1e-5 * float(jnp.abs(direct).max()))


def test_matmul_is_chosen_for_small_wide_maps_on_a_cpu():
    on_cpu = jax.default_backend() == "cpu"
    assert layers.prefers_matmul((1, 8, 8, 1280), (3, 3, 1280, 1280)) == on_cpu
    assert not layers.prefers_matmul((1, 64, 64, 1280), (3, 3, 1280, 1280))
    assert not layers.prefers_matmul((1, 8, 8, 64), (3, 3, 64, 64))
    assert layers.prefers_matmul((1, 64, 64, 64), (1, 1, 64, 64))


def test_group_norm_keeps_float32_statistics_in_bfloat16():
    """An offset of 64 and a spread of 1/4: bfloat16 statistics would be off by more than the spread."""
    network = Network.build(None, lambda rngs: layers.GroupNorm(2, 4, dtype=jnp.bfloat16))
    x = (64 + 0.25 * jax.random.normal(jax.random.key(0), (1, 16, 16, 4))).astype(jnp.bfloat16)
    y = network.apply(network.init(jax.random.key(0)), x)
    assert y.dtype == jnp.bfloat16
    groups = np.asarray(y, np.float64).reshape(256, 2, 2)
    np.testing.assert_allclose(groups.mean((0, 2)), 0, atol=5e-3)
    np.testing.assert_allclose(groups.std((0, 2)), 1, atol=1e-2)


def test_norm_groups_must_divide_the_channels():
    with pytest.raises(UserError, match="norm_num_groups 32"):
        Network.build(None, lambda rngs: layers.GroupNorm(32, 48))


def test_initial_weights_are_those_of_torch_and_the_same_under_jit():
    key, shape = jax.random.key(0), (3, 3, 128, 80)  # more than one chunk
    kernel = np.asarray(initializers.torch_uniform(key, shape))
    bound = 1 / np.sqrt(3 * 3 * 128)
    assert 0.999 * bound < kernel.max() <= bound
    assert abs(kernel.std() * np.sqrt(3) / bound - 1) < 0.01
    assert len(np.unique(kernel)) > 0.99 * kernel.size
    np.testing.assert_allclose(jax.jit(lambda key: initializers.torch_uniform(key, shape))(key), kernel, rtol=1e-6)
    draws = np.asarray(initializers.normal(1e-3)(key, (1, 1, 256, 64)))
    assert abs(draws.std() - 1e-3) < 2e-5
    assert np.isfinite(draws).all()
