"""The names of tensors in the original layout of Stable Diffusion against diffusers' and transformers': one table.

A table holds modules, diffusers' name -> the original one; what stands behind a module's name is the same in both.
`original_places` applies it to the parameters of a network, and both directions, reading and writing, take its result.
OpenCLIP keeps the projections of queries, keys and values as one tensor, of which ours are thirds.

The names are facts of CompVis' latent-diffusion, of Stability's generative-models and of OpenCLIP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from d2g_jax.models.clip import ClipTextConfig
from d2g_jax.models.unet_config import UNetConfig
from d2g_jax.models.vae import VaeConfig
from d2g_jax.runtime.errors import UserError

UNET_PREFIX = "model.diffusion_model."

_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
_VAE_SIDE = {
    "conv_in": "conv_in",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
_CLIP = {"text_model": "text_model", "text_projection": "text_projection"}
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{f"self_attn.{x}_proj.{leaf}": f"attn.in_proj_{leaf}" for x in "qkv" for leaf in ("weight", "bias")},
}
_THIRD = re.compile(r"\.self_attn\.([qkv])_proj\.")
_VAE_MATRIX = re.compile(r"\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight$")
"""Matrices of attention that the original keeps as 1x1 convolutions."""


class Place(NamedTuple):
    """Where a parameter lies in the original layout: a key, and of a fused tensor which third of its first axis."""

    key: str
    third: int | None = None


def prefixes(text_encoder: ClipTextConfig, text_encoder_2: ClipTextConfig | None) -> dict[str, str]:
    """What stands before the keys of each network of a whole checkpoint.

    SD 1.x keeps its tower in transformers' names, SD 2.x in OpenCLIP's: the exact GELU of these tells them apart.
    """
    found = {"unet": UNET_PREFIX, "vae": "first_stage_model."}
    if text_encoder_2 is not None:
        towers = {
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        }
    elif text_encoder.hidden_act == "gelu":
        towers = {"text_encoder": "cond_stage_model.model."}
    else:
        towers = {"text_encoder": "cond_stage_model.transformer."}
    return found | towers


def original_places(config: Any, keys: Iterable[str], prefix: str) -> dict[str, Place]:
    """diffusers' key -> its place, of every parameter of a network.

    Args:
      config: the network's; it says which kind it is and how its blocks are numbered.
      keys: of its parameters (`weights.torch_shapes`).
      prefix: of `prefixes`, or "" for a network that stands alone.

    Raises:
      UserError: for a parameter that the original layout has no name for.
    """
    modules = _modules(config, prefix)
    places = {}
    for key in keys:
        parts = key.split(".")
        heads = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        head = next((head for head in heads if head in modules), None)
        if head is None:
            raise UserError(f"{key}: the original layout has no name for it; take a folder in diffusers' layout")
        third = _THIRD.search(key) if "attn.in_proj" in modules[head] else None
        places[key] = Place(prefix + modules[head] + key[len(head) :], third and "qkv".index(third[1]))
    return places


def to_original(state: Mapping[str, np.ndarray], places: Mapping[str, Place]) -> dict[str, np.ndarray]:
    """Tensors under diffusers' names (`weights.to_state_dict`) as those of the original layout."""
    thirds: dict[str, list[np.ndarray]] = {}
    for key in sorted(places, key=lambda key: (places[key].key, places[key].third or 0)):
        thirds.setdefault(places[key].key, []).append(_outwards(places[key].key, state[key]))
    return {key: np.concatenate(parts) if len(parts) > 1 else parts[0] for key, parts in thirds.items()}


def is_transposed(key: str) -> bool:
    """Whether the original holds this matrix the other way round: OpenCLIP's projection is no linear layer."""
    return key.endswith(".text_projection")


def _outwards(key: str, tensor: np.ndarray) -> np.ndarray:
    if is_transposed(key):
        return np.ascontiguousarray(tensor.T)
    return tensor.reshape(*tensor.shape, 1, 1) if _VAE_MATRIX.search(key) else tensor


def _modules(config: Any, prefix: str) -> dict[str, str]:
    """Module names of one network, diffusers' -> original."""
    if isinstance(config, UNetConfig):
        return _unet_modules(config)
    if isinstance(config, VaeConfig):
        return _vae_modules(config)
    return _open_clip_modules(config) if prefix.endswith(".model.") else _CLIP


def _below(ours: str, theirs: str, table: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{key}": f"{theirs}.{value}" for key, value in table.items()}


def _unet_modules(config: UNetConfig) -> dict[str, str]:
    found = dict(_UNET)
    for number in (0, 1):
        found |= _below(f"mid_block.resnets.{number}", f"middle_block.{2 * number}", _UNET_RESNET)
    number = 1  # of the input block; the first is conv_in
    for level, count in enumerate(config.layers):
        for layer in range(count):
            found |= _below(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0", _UNET_RESNET)
            found[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for level, count in enumerate(config.layers[::-1]):
        for layer in range(count + 1):
            found |= _below(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{number}.0", _UNET_RESNET)
            found[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        behind = 2 if config.up_block_types[level].startswith("CrossAttn") else 1
        found[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{behind}.conv"
    return found


def _vae_modules(config: VaeConfig) -> dict[str, str]:
    found, levels = dict(_VAE), len(config.block_out_channels)
    for side, name, resampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        found |= _below(side, side, _VAE_SIDE)
        for level in range(levels):
            # the original counts levels from the image, diffusers in the order in which they are run
            theirs = f"{side}.{name}.{level if side == 'encoder' else levels - 1 - level}"
            ours = f"{side}.{name}_blocks.{level}"
            for layer in range(config.layers_per_block + (side == "decoder")):
                found[f"{ours}.resnets.{layer}"] = f"{theirs}.block.{layer}"
                found[f"{ours}.resnets.{layer}.conv_shortcut"] = f"{theirs}.block.{layer}.nin_shortcut"
            found[f"{ours}.{resampler}rs.0.conv"] = f"{theirs}.{resampler}.conv"
    return found


def _open_clip_modules(config: ClipTextConfig) -> dict[str, str]:
    found = dict(_OPEN_CLIP)
    for layer in range(config.num_hidden_layers):
        found |= _below(f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}", _OPEN_CLIP_LAYER)
    return found
