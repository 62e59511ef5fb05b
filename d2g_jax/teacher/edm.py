"""EDM's networks under the names that the same parts have here: NVIDIA's, as tensors by name, and OpenAI's in Flax.

Only names and layouts differ. NVIDIA's SongUNet and DhariwalUNet put what changes the size in front of a level, here it
stands behind the level before; their query, key and value are interleaved, channel by channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from d2g_jax.inputs.torch_files import StateDict
from d2g_jax.models.image_unet_config import ImageUNetConfig
from d2g_jax.runtime.errors import UserError

_ENCODER = re.compile(r"enc\.(\d+)x\1_(conv|down|aux_residual|block(\d+))\.")
_DECODER = re.compile(r"dec\.(\d+)x\1_(in0|in1|up|aux_norm|aux_conv|block(\d+))\.")
_RESNET = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
_TOP = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "map_augment": "augment_embedding",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}
_DOWN = ("ResnetDownsampleBlock2D", "AttnDownBlock2D")
_UP = ("ResnetUpsampleBlock2D", "AttnUpBlock2D")


def from_nvidia(state: StateDict, source: object) -> tuple[ImageUNetConfig, StateDict]:
    """The config of a state dict of EDMPrecond, or of the network in it, and its tensors under our names.

    Raises `UserError` for what is none of DDPM++, NCSN++ and ADM.
    """
    state = {key.removeprefix("model."): value for key, value in state.items()}
    sides = sorted({int(key[1]) for name in state if (key := _ENCODER.match(name))}, reverse=True)
    song = f"dec.{sides[0]}x{sides[0]}_aux_norm.weight" in state if sides else False
    if not sides or not (song or "out_norm.weight" in state) or "map_layer0.weight" not in state:
        raise UserError(f"{source}: no network of EDM; give a state dict of its SongUNet or DhariwalUNet")
    config = _config(state, sides, song)
    made: StateDict = {}
    for name, value in state.items():
        if name.endswith(("resample_filter", "map_noise.freqs")):
            continue
        head, _, leaf = name.rpartition(".")
        if head == "map_label":
            made |= _label(config, leaf, value)
        elif head in _TOP:
            if head != "map_augment" or song:
                made[f"{_TOP[head]}.{leaf}"] = value
        else:
            made |= _of_block(config, sides, name, value, source)
    return config, made


def _config(state: StateDict, sides: list[int], song: bool) -> ImageUNetConfig:
    def blocks(side: int) -> int:
        return sum(f"enc.{side}x{side}_block{i}.norm0.weight" in state for i in range(100))

    top = f"{sides[0]}x{sides[0]}"
    attends = [f"enc.{side}x{side}_block0.qkv.weight" in state for side in sides]
    last = [f"enc.{side}x{side}_block{blocks(side) - 1}.conv1.weight" for side in sides]
    label, filters = state.get("map_label.weight"), [v for k, v in state.items() if k.endswith("resample_filter")]
    marginal = filters[0].reshape(filters[0].shape[-2:]).sum(0) if filters else np.ones(2)
    ours: dict[str, Any] = {}
    if song:
        ours = {
            "stem_channels": state[f"enc.{top}_conv.weight"].shape[0],
            "resample_filter": tuple(round(float(tap)) for tap in marginal / marginal[0]),
            "residual_input": any("aux_residual" in name for name in state),
        }
        if (frequencies := state.get("map_noise.freqs")) is not None:
            ours["fourier"] = tuple(float(value) for value in frequencies)
        if (augment := state.get("map_augment.weight")) is not None:
            ours["augment_dim"] = augment.shape[1]
    return ImageUNetConfig(
        sample_size=sides[0],
        in_channels=state[f"enc.{top}_conv.weight"].shape[1],
        out_channels=state[f"dec.{top}_aux_conv.weight" if song else "out_conv.weight"].shape[0],
        flip_sin_to_cos=not song,
        freq_shift=1 if song else 0,
        down_block_types=tuple(_DOWN[which] for which in attends),
        up_block_types=tuple(_UP[which] for which in attends[::-1]),
        block_out_channels=tuple(state[name].shape[0] for name in last),
        layers_per_block=blocks(sides[0]),
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=None if song else 64,
        attn_norm_num_groups=None if song else 32,
        norm_eps=1e-6 if song else 1e-5,
        resnet_time_scale_shift="default" if song else "scale_shift",
        num_class_embeds=None if label is None else label.shape[1],
        song=song,
        **ours,
    )


def _label(config: ImageUNetConfig, leaf: str, value: np.ndarray) -> StateDict:
    """The class's layer; SongUNet multiplies what goes into it by the root of how many there are."""
    if leaf == "bias":
        return {"class_embedding.bias": value}
    return {"class_embedding.weight": value * np.float32(value.shape[1] ** 0.5) if config.song else value.T}


def _of_block(config: ImageUNetConfig, sides: list[int], name: str, value: np.ndarray, source: object) -> StateDict:
    """A tensor of the encoder or decoder."""
    bottom = len(sides) - 1
    if found := _ENCODER.match(name):
        level, part, index = sides.index(int(found[1])), found[2], found[3]
        if part == "conv":
            return {f"conv_in.{name[found.end() :]}": value}
        if part == "aux_residual":
            return {f"input_convs.{level - 1}.{name[found.end() :]}": value}
        place = f"down_blocks.{level}.resnets.{index}" if index else f"down_blocks.{level - 1}.downsamplers.0"
        attention = f"down_blocks.{level}.attentions.{index}"
    elif found := _DECODER.match(name):
        level, part, index = sides.index(int(found[1])), found[2], found[3]
        if part.startswith("aux"):
            return {f"conv_{'norm_out' if part == 'aux_norm' else 'out'}.{name[found.end() :]}": value}
        up = bottom - level
        place = f"up_blocks.{up}.resnets.{index}" if index else f"up_blocks.{up - 1}.upsamplers.0"
        attention = f"up_blocks.{up}.attentions.{0 if config.song else index}"
        if part in ("in0", "in1"):
            place, attention = f"mid_block.resnets.{part[2]}", "mid_block.attentions.0"
    else:
        raise UserError(f"{source}: unexpected tensor {name}; give a state dict of EDM's SongUNet or DhariwalUNet")
    module, _, leaf = name[found.end() :].rpartition(".")
    if module in _RESNET:
        return {f"{place}.{_RESNET[module]}.{leaf}": value}
    if module == "norm2":
        return {f"{attention}.group_norm.{leaf}": value}
    value = value.reshape(value.shape[:2]) if leaf == "weight" else value  # of a 1x1 convolution
    if module == "proj":
        return {f"{attention}.to_out.0.{leaf}": value}
    if module != "qkv":
        raise UserError(f"{source}: unexpected tensor {name}; give a state dict of EDM's SongUNet or DhariwalUNet")
    channels = value.shape[0] // 3
    heads = channels // (config.attention_head_dim or channels)
    parts = value.reshape(heads, channels // heads, 3, *value.shape[1:])
    return {
        f"{attention}.to_{letter}.{leaf}": parts[:, :, i].reshape(channels, *value.shape[1:])
        for i, letter in enumerate("qkv")
    }


def from_openai(tree: Mapping[str, Any], source: object) -> tuple[ImageUNetConfig, StateDict]:
    """The same of the Flax parameters of consistency_models_cifar10's NCSN++, its average where a state has one.

    Raises `UserError` for a tree without such a network.
    """
    found = sorted(_networks(tree), key=lambda pair: "params_ema" not in pair[0])
    if not found:
        raise UserError(f"{source}: holds no NCSN++ of consistency_models_cifar10; give its edm_cifar10_ema")
    params = found[0][1]
    frequencies = np.asarray(params["GaussianFourierProjection_0"]["W"], np.float32)
    levels = 1 + sum(name.startswith("Downsample_") for name in params)
    resnets = sum(name.startswith("ResnetBlockBigGANpp_") for name in params)
    layers = (resnets - 2 - 2 * (levels - 1) - levels) // (2 * levels)
    attentions = sum(name.startswith("AttnBlockpp_") for name in params) - 1
    order = _Order(params)
    made = {**order.dense(0, "time_embedding.linear_1"), **order.dense(1, "time_embedding.linear_2")}
    made |= order.conv(params["Conv_0"], "conv_in")
    # One level attends: with L layers it has L attentions in the encoder and one in the decoder, the second of them.
    if attentions != layers + 1:
        raise UserError(f"{source}: attention at one level is read, and this NCSN++ has {attentions} blocks of it")
    widths = []
    for level in range(levels):
        for i in range(layers):
            made |= order.resnet(f"down_blocks.{level}.resnets.{i}")
            if level == 1:
                made |= order.attention(f"down_blocks.{level}.attentions.{i}")
        widths.append(made[f"down_blocks.{level}.resnets.{layers - 1}.conv2.weight"].shape[0])
        if level < levels - 1:
            made |= order.resnet(f"down_blocks.{level}.downsamplers.0")
            down = params[f"Downsample_{level}"]["Conv2d_0"]
            made |= order.conv({"kernel": down["weight"], "bias": down["bias"]}, f"input_convs.{level}")
    made |= order.resnet("mid_block.resnets.0") | order.attention("mid_block.attentions.0")
    made |= order.resnet("mid_block.resnets.1")
    for index in range(levels):
        for i in range(layers + 1):
            made |= order.resnet(f"up_blocks.{index}.resnets.{i}")
        if levels - 1 - index == 1:
            made |= order.attention(f"up_blocks.{index}.attentions.0")
        if index < levels - 1:
            made |= order.resnet(f"up_blocks.{index}.upsamplers.0")
    made |= order.norm(params["GroupNorm_0"], "conv_norm_out") | order.conv(params["Conv_1"], "conv_out")
    config = ImageUNetConfig(
        sample_size=32,
        in_channels=made["conv_in.weight"].shape[1],
        out_channels=made["conv_out.weight"].shape[0],
        down_block_types=tuple(_DOWN[level == 1] for level in range(levels)),
        up_block_types=tuple(_UP[level == 1] for level in range(levels))[::-1],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=None,
        norm_eps=1e-6,
        song=True,
        stem_channels=made["conv_in.weight"].shape[0],
        resample_filter=(1, 3, 3, 1),
        fourier=tuple(float(value) for value in frequencies),
        residual_input=True,
    )
    return config, made


def _networks(tree: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every NCSN++ in a tree, with its path."""
    if isinstance(tree, Mapping):
        if "GaussianFourierProjection_0" in tree:
            yield path, tree
        for name, part in tree.items():
            yield from _networks(part, f"{path}/{name}")


class _Order:
    """Flax numbers modules of a kind in the order of their calls; this hands them out in that order."""

    def __init__(self, params: Mapping[str, Any]):
        self.params, self.resnets, self.attentions = params, 0, 0

    def conv(self, module: Mapping[str, Any], place: str) -> StateDict:
        kernel = np.asarray(module["kernel"], np.float32).transpose(3, 2, 0, 1)
        return {f"{place}.weight": kernel, f"{place}.bias": np.asarray(module["bias"], np.float32)}

    def norm(self, module: Mapping[str, Any], place: str) -> StateDict:
        return {f"{place}.weight": np.asarray(module["scale"]), f"{place}.bias": np.asarray(module["bias"])}

    def dense(self, index: int, place: str) -> StateDict:
        return self._linear(self.params[f"Dense_{index}"], "kernel", "bias", place)

    def resnet(self, place: str) -> StateDict:
        module = self.params[f"ResnetBlockBigGANpp_{self.resnets}"]
        self.resnets += 1
        made = self._linear(module["Dense_0"], "kernel", "bias", f"{place}.time_emb_proj")
        for i in (0, 1):
            made |= self.norm(module[f"GroupNorm_{i}"], f"{place}.norm{i + 1}")
            made |= self.conv(module[f"Conv_{i}"], f"{place}.conv{i + 1}")
        return made | (self.conv(module["Conv_2"], f"{place}.conv_shortcut") if "Conv_2" in module else {})

    def attention(self, place: str) -> StateDict:
        module = self.params[f"AttnBlockpp_{self.attentions}"]
        self.attentions += 1
        made = self.norm(module["GroupNorm_0"], f"{place}.group_norm")
        for i, part in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
            made |= self._linear(module[f"NIN_{i}"], "W", "b", f"{place}.{part}")
        return made

    def _linear(self, module: Mapping[str, Any], kernel: str, bias: str, place: str) -> StateDict:
        weight = np.asarray(module[kernel], np.float32).T
        return {f"{place}.weight": weight, f"{place}.bias": np.asarray(module[bias], np.float32)}
