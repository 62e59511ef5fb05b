"""UNets of images against diffusers' UNet2DModel and, by numbers written down, against EDM's own networks."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from d2g_jax.models import denoisers, image_unet
from d2g_jax.models.network import integer_keys
from d2g_jax.runtime.errors import UserError

SOURCE = "unet/config.json"
DOWN, ATTN_DOWN, RESNET_DOWN = "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"
UP, ATTN_UP, RESNET_UP = "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"
DDPM = dict(
    sample_size=8, block_out_channels=(16, 24), layers_per_block=2, norm_num_groups=8, attention_head_dim=None,
    down_block_types=(DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, UP), downsample_padding=0, flip_sin_to_cos=False,
    freq_shift=1, norm_eps=1e-6,
)  # fmt: skip
ADM = dict(
    sample_size=8, block_out_channels=(16, 24, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
    down_block_types=(RESNET_DOWN, ATTN_DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, ATTN_UP, RESNET_UP),
    downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift", num_class_embeds=5,
    attn_norm_num_groups=8,
)  # fmt: skip
BARE = dict(
    sample_size=(8, 16), block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, in_channels=1,
    out_channels=2, down_block_types=(ATTN_DOWN, DOWN), up_block_types=(UP, ATTN_UP), add_attention=False,
    mid_block_scale_factor=math.sqrt(2), num_class_embeds=3,
)  # fmt: skip
DDPM_CIFAR = dict(
    sample_size=32, block_out_channels=(128, 256, 256, 256), down_block_types=(DOWN, ATTN_DOWN, DOWN, DOWN),
    up_block_types=(UP, UP, ATTN_UP, UP), attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False,
    freq_shift=1, norm_eps=1e-6,
)  # fmt: skip
ADM_64 = dict(
    sample_size=64, block_out_channels=(192, 384, 576, 768), layers_per_block=3, attention_head_dim=64,
    down_block_types=(RESNET_DOWN, *(ATTN_DOWN,) * 3), up_block_types=(*(ATTN_UP,) * 3, RESNET_UP),
    downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift", num_class_embeds=1000,
    attn_norm_num_groups=32,
)  # fmt: skip
SONG = dict(
    _class_name="SongUNet", sample_size=32, block_out_channels=(256, 256, 256), stem_channels=128, layers_per_block=4,
    down_block_types=(RESNET_DOWN, ATTN_DOWN, RESNET_DOWN), up_block_types=(RESNET_UP, ATTN_UP, RESNET_UP),
    downsample_type="resnet", upsample_type="resnet", attention_head_dim=None, norm_eps=1e-6, freq_shift=1,
    flip_sin_to_cos=False, augment_dim=9,
)  # fmt: skip
NCSN = dict(SONG, resample_filter=(1, 3, 3, 1), fourier=tuple(float(i) for i in range(128)), residual_input=True)


def built(fields):
    return denoisers.build(denoisers.read_unet_config({"_class_name": "UNet2DModel", **fields}, source=SOURCE))


def oracle(fields):
    from torch_oracle import diffusers, params_of, randomised, torch

    torch.manual_seed(0)
    model = randomised(diffusers.UNet2DModel(**fields))
    network = built(dict(model.config))
    return model, network, params_of(model, network)


def condition(config, labels):
    return None if config.num_class_embeds is None else np.eye(config.num_class_embeds, dtype=np.float32)[labels]


@pytest.mark.parametrize("fields", [DDPM, ADM, BARE], ids=["ddpm", "adm", "bare"])
def test_whole_and_every_block_equal_diffusers(fields):
    from torch_oracle import error, nchw, nhwc, normal, torch

    model, network, params = oracle(fields)
    seen = {}

    def record(name):
        return lambda module, args, kwargs, out: seen.__setitem__(name, ((args, kwargs), out))

    for name, module in model.named_modules():
        if (name.count(".") == 1 and name.split(".")[0] in ("down_blocks", "up_blocks")) or name == "mid_block":
            module.register_forward_hook(record(name), with_kwargs=True)
    size = fields["sample_size"] if isinstance(fields["sample_size"], tuple) else (fields["sample_size"],) * 2
    x, t = normal(1, 2, *size, network.config.in_channels), np.array([3.0, 511.5], np.float32)
    labels = np.array([0, 2])
    with torch.no_grad():
        given = {} if network.config.num_class_embeds is None else {"class_labels": torch.from_numpy(labels)}
        theirs = nhwc(model(nchw(x), torch.from_numpy(t), **given).sample)
    ours = network.apply(params, x, t, condition(network.config, labels))
    assert error(ours, theirs) < 1e-5
    module = nnx.merge(network.graphdef, nnx.State(integer_keys(params)))
    assert len(seen) == 2 * len(fields["block_out_channels"]) + 1
    tensors = lambda value: [nhwc(v) for v in value] if isinstance(value, tuple) else nhwc(value)  # noqa: E731
    for name, ((args, kwargs), out) in seen.items():
        kind, _, index = name.partition(".")
        values = [*args, *kwargs.values()]
        hidden = nhwc(values[0])
        if kind == "mid_block":
            assert error(module.mid_block(hidden, values[1].numpy(), None), tensors(out)) < 1e-5
        elif kind == "down_blocks":
            last, skips = module.down_blocks[int(index)](hidden, values[1].numpy(), None)
            assert error(last, tensors(out[0])) < 1e-5
            assert all(error(a, b) < 1e-5 for a, b in zip(skips, tensors(out[1]), strict=True))
        else:
            block, skips, temb = module.up_blocks[int(index)], tensors(values[1]), values[2].numpy()
            last, _ = block(hidden, skips, temb, None)
            assert error(block.upsample(last, temb, tuple(2 * side for side in last.shape[1:3])), tensors(out)) < 1e-5


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        (DDPM_CIFAR, 35_746_307),
        (ADM_64, 295_899_267),
        (SONG, 55_733_891),
        (dict(SONG, num_class_embeds=10), 55_735_299),
        (NCSN, 56_397_827),
        (dict(NCSN, num_class_embeds=10), 56_400_643),
    ],
)
def test_parameter_counts_are_the_published_ones(fields, count):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(built(fields).shapes)) == count


@pytest.mark.parametrize("fields", [ADM, NCSN], ids=["adm", "ncsn"])
def test_config_comes_back_from_json(fields):
    config = built(fields).config
    again = denoisers.read_unet_config(json.loads(json.dumps(config.to_json())), source=SOURCE)
    assert again == config


def test_a_smaller_and_a_larger_image_equal_the_filter_written_out():
    x = np.random.default_rng(0).normal(size=(1, 6, 8, 2)).astype(np.float32)
    mean = x.reshape(1, 3, 2, 4, 2, 2).mean((2, 4))
    np.testing.assert_allclose(image_unet.resample(x, (1, 1), up=False), mean, atol=1e-6)
    np.testing.assert_allclose(image_unet.resample(x, (1, 1), up=True), x.repeat(2, 1).repeat(2, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 9}, "sample_size = 9; give a multiple of 2"),
        ({"sample_size": None}, "sample_size = None"),
        ({"block_out_channels": []}, "block_out_channels = (); give positive integers"),
        ({"layers_per_block": 10**6}, "layers_per_block = 1000000; give a whole number from 1 to 256"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier' is not implemented"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep' is not implemented"),
        ({"down_block_types": ("SkipDownBlock2D", DOWN)}, "down_block_types = "),
        ({"cross_attention_dim": 8}, "unknown key 'cross_attention_dim'"),
        ({"attention_head_dim": 7}, "attention_head_dim = 7; must divide"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups = None"),
        ({"layers_per_block": "2"}, "layers_per_block = '2'; give int"),
    ],
)
def test_what_fits_no_network_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=f"{SOURCE}: ") as error:
        built({**DDPM, **change})
    assert message in str(error.value)
