"""AutoencoderKL against diffusers' PyTorch class."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.models import vae
from d2g_jax.pipeline import weights
from d2g_jax.runtime.errors import UserError

SOURCE = "vae/config.json"
TINY = dict(
    block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4, sample_size=16, latent_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
)  # fmt: skip
FULL = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def nhwc(tensor) -> np.ndarray:
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def tiny(**fields):
    """A random PyTorch autoencoder and our network with its parameters."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**TINY | fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: at their initial 0 and 1 they would hide errors
            parameter.add_(0.1 * torch.randn_like(parameter))
    network = vae.build(vae.VaeConfig.from_json(dict(model.config), source=SOURCE))
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    return model, network, weights.to_params(state, network.abstract(), source=SOURCE)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 6, 8, 3)).astype(np.float32)
    return images, rng.normal(size=(2, 3, 4, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "fields", [{}, dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)]
)
def test_both_ways_equal_diffusers(fields):
    torch = pytest.importorskip("torch")
    model, network, params = tiny(**fields)
    images, latents = inputs()
    mean, logvar = jax.jit(lambda p, x: network.apply(p, x, method="encode"))(params, images)
    decoded = jax.jit(lambda p, z: network.apply(p, z, method="decode"))(params, latents)
    with torch.no_grad():
        posterior = model.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
        theirs = model.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample
    assert decoded.shape == (2, 6, 8, 3)
    assert relative(mean, nhwc(posterior.mean)) <= 1e-5
    assert relative(logvar, nhwc(posterior.logvar)) <= 1e-5
    assert relative(decoded, nhwc(theirs)) <= 1e-5


def test_tiled_decode_equals_diffusers():
    """Tiles of 8 x 8 latents, 6 apart; the last of a row is 2 wide."""
    torch = pytest.importorskip("torch")
    model, network, params = tiny()
    latents = np.random.default_rng(0).normal(size=(2, 7, 14, 3)).astype(np.float32)
    decode = jax.jit(lambda z: network.apply(params, z, method="decode"))
    tiled = vae.decode_tiled(network.config, decode, latents)
    model.enable_tiling()
    with torch.no_grad():
        theirs = model.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample
    assert (tiled.dtype, tiled.shape) == (np.float32, (2, 14, 28, 3))
    assert relative(tiled, nhwc(theirs)) <= 1e-5


@pytest.mark.parametrize("size", [(19, 11), (18, 12), (8, 13), (13, 7), (8, 8), (1, 30)])
@pytest.mark.parametrize("tile", [8, 12, 4])
def test_tiling_equals_diffusers(size, tile):
    """The same torch decoder below both: sides that divide, that do not, and that fit into one tile."""
    torch = pytest.importorskip("torch")
    model, network, _ = tiny(mid_block_add_attention=False)
    config = dataclasses.replace(network.config, sample_size=2 * tile)
    latents = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)

    def decode(latents: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return nhwc(model.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample)

    ours, whole = vae.decode_tiled(config, decode, latents), decode(latents)
    model.enable_tiling()
    model.tile_latent_min_size, model.tile_sample_min_size = tile, 2 * tile
    assert relative(ours, decode(latents)) <= 1e-6
    assert (relative(ours, whole) > 1e-3) == (max(size) > tile)  # or tiling could not be seen


def test_tiles_are_laid_without_gaps():
    """With a decoder that sees one pixel only, tiles and blending change nothing, whatever their size."""
    latents = np.random.default_rng(0).normal(size=(1, 23, 17, 3)).astype(np.float32)
    enlarge = lambda z: np.repeat(np.repeat(z, 2, axis=1), 2, axis=2)  # noqa: E731
    for tile in (8, 7, 5, 6, 23, 2):
        config = vae.VaeConfig(block_out_channels=(32, 32), sample_size=2 * tile)
        tiled = vae.decode_tiled(config, enlarge, latents)
        np.testing.assert_allclose(tiled, enlarge(latents), rtol=1e-6, atol=1e-6)


def test_what_fits_one_tile_is_decoded_whole():
    config = vae.VaeConfig(block_out_channels=(32, 32), sample_size=16)
    shapes = []

    def decode(latents):
        shapes.append(latents.shape)
        return jnp.asarray(latents, jnp.bfloat16)

    latents = np.ones((2, 8, 5, 3), np.float32)
    whole = vae.decode_tiled(config, decode, latents)
    assert (shapes, whole.dtype) == ([(2, 8, 5, 3)], np.float32)
    vae.decode_tiled(config, lambda z: decode(z).repeat(2, 1).repeat(2, 2), np.ones((1, 9, 8, 3), np.float32))
    assert shapes[1:] == [(1, 8, 8, 3), (1, 8, 2, 3), (1, 3, 8, 3), (1, 3, 2, 3)]


@pytest.mark.parametrize("size", [1, 2])
def test_bad_tile_is_one_line(size):
    config = vae.VaeConfig(block_out_channels=(32, 32), sample_size=size)
    with pytest.raises(UserError, match=f"sample_size={size} of the VAE: its tiles are too small; draw without tiles"):
        vae.decode_tiled(config, lambda z: z, np.ones((1, 9, 9, 3), np.float32))


def test_gradients_equal_torch():
    torch = pytest.importorskip("torch")
    model, network, params = tiny()
    images, latents = inputs()

    def loss(params):
        mean, logvar = network.apply(params, images, method="encode")
        return (
            jnp.sum(mean**2) + jnp.sum(jnp.sin(logvar)) + jnp.sum(network.apply(params, latents, method="decode") ** 2)
        )

    ours = weights.to_state_dict(jax.jit(jax.grad(loss))(params))
    posterior = model.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
    decoded = model.decode(torch.tensor(latents.transpose(0, 3, 1, 2))).sample
    ((posterior.mean**2).sum() + posterior.logvar.sin().sum() + (decoded**2).sum()).backward()
    theirs = {key: value.grad.numpy() for key, value in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    whole = max(np.abs(value).max() for value in theirs.values())
    for key, value in theirs.items():
        # adding the same number to all keys changes no softmax: the gradient of that bias is rounding error only
        scale = whole if key.endswith("to_k.bias") else np.abs(value).max()
        assert np.abs(ours[key] - value).max() <= 1e-4 * scale, key


def test_full_size_names_and_shapes():
    """SD 1.x, SD 2.x and SDXL share this network: 83,653,863 parameters."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**FULL)
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    ours = weights.torch_shapes(vae.build(vae.VaeConfig(**FULL)).abstract())
    assert ours == theirs
    assert sum(int(np.prod(shape)) for shape in ours.values()) == 83_653_863


def test_scaling_is_invertible():
    config = vae.VaeConfig(scaling_factor=0.13025, shift_factor=0.25)
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    scaled = vae.scale_latents(config, latents)
    np.testing.assert_allclose(scaled, (latents - 0.25) * 0.13025, rtol=1e-6)
    np.testing.assert_allclose(vae.unscale_latents(config, scaled), latents, rtol=1e-5, atol=1e-6)


def test_config_round_trip():
    config = vae.VaeConfig(**FULL, shift_factor=0.5, force_upcast=False)
    assert vae.VaeConfig.from_json(config.to_json(), source=SOURCE) == config
    assert config.downscale == 8


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"latents_mean": [0.1]}, "latents_mean"),
        ({"surprise": 1}, "surprise"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types"),
        ({"block_out_channels": [50]}, "norm_num_groups 32"),
    ],
)
def test_bad_config_is_one_line(values, word):
    with pytest.raises(UserError) as error:
        vae.VaeConfig.from_json(values, source=SOURCE)
    assert word in str(error.value)
    assert str(error.value).startswith(SOURCE)
    assert "\n" not in str(error.value)
