"""The UNet against diffusers' PyTorch class: small ones in numbers, full-size ones in names and shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.models import denoisers
from d2g_jax.models.unet_config import UNetConfig
from d2g_jax.pipeline import weights
from d2g_jax.runtime.errors import UserError

SOURCE = "unet/config.json"
BFLOAT16_BOUND = 0.05  # max |a - b| / max |b| of a whole small UNet; measured below
CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"
SD1 = dict(
    block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=12,
    down_block_types=(CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP), attention_head_dim=2,
)  # fmt: skip
SD2 = dict(
    block_out_channels=(20, 28), layers_per_block=1, norm_num_groups=4, cross_attention_dim=10,
    down_block_types=(CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP), attention_head_dim=(2, 4),
    use_linear_projection=True, upcast_attention=True, in_channels=5, out_channels=3,
)  # fmt: skip
SDXL = dict(
    block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=12,
    down_block_types=(DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, UP), attention_head_dim=(2, 4),
    transformer_layers_per_block=(1, 2), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 + 6 * 4,
)  # fmt: skip
PRUNED = dict(
    block_out_channels=(16, 16, 24), layers_per_block=(2, 1, 1), norm_num_groups=8, cross_attention_dim=12,
    down_block_types=(CROSS_DOWN, DOWN, DOWN), up_block_types=(UP, UP, CROSS_UP), mid_block_type=None,
    attention_head_dim=2,
)  # fmt: skip
# Segmind's SSD-1B and Vega, in small: depths of their own for each transformer, and a middle without attention.
VEGA = dict(
    block_out_channels=(16, 16, 24), layers_per_block=2, norm_num_groups=8, cross_attention_dim=12,
    down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP, UP),
    mid_block_type="UNetMidBlock2D", attention_head_dim=2, use_linear_projection=True,
    transformer_layers_per_block=[1, [1, 2], [2, 1]], reverse_transformer_layers_per_block=[[2, 1, 1], [1, 2, 1], 1],
)  # fmt: skip
ZERO = dict(
    block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=12,
    down_block_types=(DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, UP), attention_head_dim=2,
    transformer_layers_per_block=(0, 2),
)  # fmt: skip
FULL_SD15 = dict(cross_attention_dim=768)
FULL_SD21 = dict(
    cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True, upcast_attention=True
)
FULL_SDXL = dict(
    block_out_channels=(320, 640, 1280), down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
    up_block_types=(CROSS_UP, CROSS_UP, UP), attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048, use_linear_projection=True, sample_size=128,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
BK_SDM_TINY = dict(
    cross_attention_dim=768, block_out_channels=(320, 640, 1280), layers_per_block=1, mid_block_type=None,
    down_block_types=(CROSS_DOWN,) * 3, up_block_types=(CROSS_UP,) * 3,
)  # fmt: skip


def oracle(fields):
    """A random PyTorch UNet, our network, and its parameters in our layout."""
    from torch_oracle import diffusers, params_of, randomised, torch

    torch.manual_seed(0)
    model = randomised(diffusers.UNet2DConditionModel(**fields))
    network = denoisers.build(UNetConfig.from_json(dict(model.config), source=SOURCE))
    return model, network, params_of(model, network)


def batch(config: UNetConfig, height: int, width: int):
    """Random latents, timesteps, text states and SDXL's conditions."""
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(2, height, width, config.in_channels)).astype(np.float32)
    text = rng.normal(size=(2, 5, config.cross_attention_dim)).astype(np.float32)
    added = None
    if config.addition_embed_type:
        added = {"text_embeds": rng.normal(size=(2, 6)), "time_ids": rng.integers(0, 1024, (2, 6))}
        added = {key: value.astype(np.float32) for key, value in added.items()}
    return latents, np.array([999, 3], np.int32), text, added


@pytest.mark.parametrize(
    ("fields", "size"),
    [(SDXL, (6, 4)), (PRUNED, (7, 9)), (VEGA, (4, 8)), (ZERO, (4, 4))],
    ids=["sdxl", "pruned-and-odd-at-two-levels", "lists-of-lists-and-a-plain-middle", "depth-0-without-attention"],
)
def test_output_equals_diffusers(fields, size):
    from torch_oracle import error, nchw, nhwc, quick_jit, torch

    model, network, params = oracle(fields)
    latents, timesteps, text, added = batch(network.config, *size)
    output = quick_jit(network.apply)(params, latents, timesteps, text, added)
    conditions = added and {key: torch.from_numpy(value) for key, value in added.items()}
    with torch.no_grad():
        steps, states = torch.from_numpy(timesteps), torch.from_numpy(text)
        theirs = model(nchw(latents), steps, states, added_cond_kwargs=conditions).sample
    assert error(output, nhwc(theirs)) < 1e-5


@pytest.mark.parametrize(("fields", "size"), [(SD1, (5, 6)), (SD2, (4, 7))], ids=["sd1", "sd2"])
def test_output_and_gradients_equal_diffusers(fields, size):
    from torch_oracle import error, nchw, nhwc, normal, quick_jit, torch

    model, network, params = oracle(fields)
    latents, timesteps, text, _ = batch(network.config, *size)
    cotangent = normal(2, *latents.shape[:3], network.config.out_channels)

    @quick_jit
    def run(params, latents, text):
        output, pull = jax.vjp(lambda p, x, c: network.apply(p, x, timesteps, c), params, latents, text)
        return output, *pull(cotangent)

    output, of_params, of_latents, of_text = run(params, latents, text)
    x, c = nchw(latents).requires_grad_(), torch.from_numpy(text).requires_grad_()
    theirs = model(x, torch.from_numpy(timesteps), c).sample
    (theirs * nchw(cotangent)).sum().backward()
    assert error(output, nhwc(theirs)) < 1e-5
    assert error(of_latents, nhwc(x.grad)) < 1e-4
    assert error(of_text, c.grad.numpy()) < 1e-4
    gradients = {key: value.grad.numpy() for key, value in model.named_parameters()}
    # A bias before a norm has almost no gradient, and rounding is most of it: measure that against the others
    floor = 1e-3 * max(np.abs(value).max() for value in gradients.values())
    ours = weights.to_state_dict(of_params)
    worst = max((error(ours[key], value, floor), key) for key, value in gradients.items())
    assert worst[0] < 1e-4, worst


def test_sdxl_gradients_equal_diffusers():
    """Through two text towers' states, pooled text and the transformer of depth 2."""
    from torch_oracle import error, nchw, nhwc, normal, quick_jit, torch

    model, network, params = oracle(SDXL)
    latents, timesteps, text, added = batch(network.config, 4, 6)
    cotangent = normal(2, *latents.shape)
    pooled, ids = added["text_embeds"], added["time_ids"]

    @quick_jit
    def run(latents, text, pooled):
        def forward(x, c, p):
            return network.apply(params, x, timesteps, c, {"text_embeds": p, "time_ids": ids})

        return jax.vjp(forward, latents, text, pooled)[1](cotangent)

    leaves = [nchw(latents), torch.from_numpy(text), torch.from_numpy(pooled)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    conditions = {"text_embeds": leaves[2], "time_ids": torch.from_numpy(ids)}
    theirs = model(leaves[0], torch.from_numpy(timesteps), leaves[1], added_cond_kwargs=conditions).sample
    (theirs * nchw(cotangent)).sum().backward()
    of_latents, of_text, of_pooled = run(latents, text, pooled)
    assert error(of_latents, nhwc(leaves[0].grad)) < 1e-4
    assert error(of_text, leaves[1].grad.numpy()) < 1e-4
    assert error(of_pooled, leaves[2].grad.numpy()) < 1e-4


@pytest.mark.parametrize("fields", [SD1, SD2, SDXL], ids=["sd1", "sd2", "sdxl"])
def test_bfloat16_is_as_near_to_float32_as_pytorchs(fields):
    """docs/parity.md has both errors; one draw of rounding apart, ours are PyTorch's own."""
    from torch_oracle import error, nchw, nhwc, quick_jit, torch

    model, network, params = oracle(fields)
    latents, timesteps, text, added = batch(network.config, 6, 4)
    half = denoisers.build(network.config, dtype=jnp.bfloat16)
    ours = quick_jit(half.apply)(params, latents, timesteps, text, added)
    assert ours.dtype == jnp.bfloat16

    def run(dtype):
        conditions = added and {key: torch.from_numpy(value).to(dtype) for key, value in added.items()}
        x, c = nchw(latents).to(dtype), torch.from_numpy(text).to(dtype)
        with torch.no_grad():
            return nhwc(model.to(dtype)(x, torch.from_numpy(timesteps), c, added_cond_kwargs=conditions).sample.float())

    exact = run(torch.float32)
    assert error(ours, exact) < BFLOAT16_BOUND
    assert error(ours, exact) < 2 * error(run(torch.bfloat16), exact)


@pytest.mark.slow
def test_full_size_sd15_forward_equals_pytorch():
    """Random weights, 512x512, batch 2 with different timesteps: two minutes and 14 GiB."""
    from torch_oracle import diffusers, error, nchw, nhwc, params_of, torch

    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**FULL_SD15, sample_size=64).eval()
    network = denoisers.build(UNetConfig.from_json(dict(model.config), source=SOURCE))
    assert sum(leaf.size for leaf in jax.tree.leaves(network.abstract())) == 859_520_964
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(2, 64, 64, 4)).astype(np.float32)
    text = rng.normal(size=(2, 77, 768)).astype(np.float32)
    timesteps = np.array([999, 3], np.int32)
    with torch.no_grad():
        theirs = nhwc(model(nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(text)).sample)
    params = params_of(model, network)
    del model
    ours = jax.jit(network.apply)(params, latents, timesteps, text)
    assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("fields", "count"),
    [(FULL_SD15, 859_520_964), (FULL_SD21, 865_910_724), (FULL_SDXL, 2_567_463_684), (BK_SDM_TINY, 323_384_964)],
    ids=["sd15", "sd21", "sdxl", "bk-sdm-tiny"],
)
def test_full_size_names_and_shapes_equal_diffusers(fields, count):
    from torch_oracle import diffusers, torch

    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**fields)
    network = denoisers.build(UNetConfig.from_json(dict(model.config), source=SOURCE))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert weights.torch_shapes(network.abstract()) == theirs
    assert sum(leaf.size for leaf in jax.tree.leaves(network.abstract())) == count


def test_config_survives_json_and_diffusers_takes_it():
    from torch_oracle import diffusers

    config = UNetConfig(**SDXL)
    values = config.to_json()
    assert UNetConfig.from_json(values, source=SOURCE) == config
    theirs = dict(diffusers.UNet2DConditionModel.from_config(values).config)
    assert UNetConfig.from_json(theirs, source=SOURCE) == config


EMA = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 7, "power": 2 / 3}


@pytest.mark.parametrize(
    "ema", [EMA | {"update_after_step": 0, "use_ema_warmup": False}, EMA, {"use_ema_warmup": True}]
)
def test_the_moving_average_of_diffusers_trainers_is_the_same_network(ema):
    own = UNetConfig(**SDXL).to_json()
    assert UNetConfig.from_json({**own, **ema}, source=SOURCE) == UNetConfig.from_json(own, source=SOURCE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"class_embed_type": "timestep"},
        {"time_cond_proj_dim": 0},
        {"only_cross_attention": [True, False]},
        {"act_fn": "gelu"},
        {"num_attention_heads": 8},
        {"num_frames": 16},
        {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"block_out_channels": [16, -32]},
        {"attention_head_dim": [2, 2, 2]},
        {"attention_head_dim": 3},
        {"transformer_layers_per_block": -1},
        {"transformer_layers_per_block": [1, 2, 1]},
        {"transformer_layers_per_block": [[1], [2, 2, 2]], "reverse_transformer_layers_per_block": [1, 1]},
        {"reverse_transformer_layers_per_block": [1, [2, 2]]},
        {"reverse_transformer_layers_per_block": [1]},
        {"norm_num_groups": 7},
        {"addition_embed_type": "text_time"},
        {"cross_attention_dim": [12, 12]},
        {"sample_size": 0},
        {"sample_size": [8, -64]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_not_implemented_is_refused_by_name(wrong):
    values = UNetConfig(
        block_out_channels=(16, 32), norm_num_groups=8, down_block_types=(CROSS_DOWN, DOWN), attention_head_dim=2,
        up_block_types=(UP, CROSS_UP), cross_attention_dim=12,
    ).to_json()  # fmt: skip
    UNetConfig.from_json(values, source=SOURCE)
    with pytest.raises(UserError) as caught:
        UNetConfig.from_json({**values, **wrong}, source=SOURCE)
    message = str(caught.value)
    assert "\n" not in message
    assert SOURCE in message
    assert next(iter(wrong)) in message or "addition_time_embed_dim" in message


def test_guidance_embedding_of_a_latent_consistency_model_equals_diffusers():
    from torch_oracle import error, nchw, nhwc, normal, quick_jit, torch

    model, network, params = oracle(SD1 | {"time_cond_proj_dim": 6})
    latents, timesteps, text, _ = batch(network.config, 4, 4)
    condition = normal(3, 2, 6)
    run = quick_jit(network.apply)
    output = run(params, latents, timesteps, text, None, condition)
    with torch.no_grad():
        arguments = nchw(latents), torch.from_numpy(timesteps), torch.from_numpy(text)
        theirs = nhwc(model(*arguments, timestep_cond=torch.from_numpy(condition)).sample)
        without = nhwc(model(*arguments).sample)
    assert error(output, theirs) < 1e-5
    assert error(run(params, latents, timesteps, text), without) < 1e-5
    assert error(without, theirs) > 1e-3
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    back = weights.to_state_dict(params)
    assert set(back) == set(state)
    np.testing.assert_array_equal(back["time_embedding.cond_proj.weight"], state["time_embedding.cond_proj.weight"])


def test_a_guidance_embedding_without_its_projection_is_refused():
    network = denoisers.build(UNetConfig(**SD1))
    latents, timesteps, text, _ = batch(network.config, 4, 4)
    with pytest.raises(UserError, match="time_cond_proj_dim"):
        jax.eval_shape(network.apply, network.abstract(), latents, timesteps, text, None, np.zeros((2, 6)))


def test_sdxl_without_its_conditions_is_refused():
    network = denoisers.build(UNetConfig(**SDXL))
    latents, timesteps, text, _ = batch(network.config, 4, 4)
    with pytest.raises(UserError, match="time_ids"):
        jax.eval_shape(network.apply, network.abstract(), latents, timesteps, text)


def test_bfloat16_remat_and_int_timesteps_keep_the_interface():
    network = denoisers.build(UNetConfig(**SD1), dtype=jnp.bfloat16, remat="full")
    latents, timesteps, text, _ = batch(network.config, 8, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(network.abstract())} == {jnp.dtype(jnp.float32)}
    jaxpr = jax.make_jaxpr(network.apply)(network.abstract(), latents, timesteps, text)
    assert [value.dtype for value in jaxpr.out_avals] == [jnp.bfloat16]
    # Two resnets and a transformer block in the middle, nine around them
    assert sum(equation.primitive.name in ("remat", "checkpoint", "remat2") for equation in jaxpr.eqns) >= 12
