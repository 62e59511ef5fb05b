"""The names of tensors in the original layout of Stable Diffusion against diffusers' and transformers': one table.

`kinds/original_keys.json` holds modules, diffusers' name -> the original one; what stands behind a module's name is the
same in both. `original_places` applies it to the parameters of a network; reading and writing both take its result.
OpenCLIP keeps the projections of queries, keys and values as one tensor, of which ours are thirds.

The names are facts of CompVis' latent-diffusion, of Stability's generative-models and of OpenCLIP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2g_jax.inputs.text import read_json
from d2g_jax.models.network import Network
from d2g_jax.models.unet_config import UNetConfig
from d2g_jax.models.vae import VaeConfig
from d2g_jax.runtime.errors import UserError

KINDS = Path(__file__).with_name("kinds")
"""What is shipped of the kinds of Stable Diffusion: their configs and keys, and CLIP's merges."""

_TABLES = read_json(KINDS / "original_keys.json", "install the package again")
UNET_PREFIX = _TABLES["prefixes"]["sd1"]["unet"]
_THIRD = re.compile(r"\.self_attn\.([qkv])_proj\.")
_VAE_MATRIX = re.compile(r"\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight$")
"""Matrices of attention that the original keeps as 1x1 convolutions."""


class Place(NamedTuple):
    """Where a parameter lies in the original layout: a key, and of a fused tensor which third of its first axis."""

    key: str
    third: int | None = None


def kind_of(networks: Mapping[str, Network]) -> str:
    """Which of "sd1", "sd2" and "sdxl" a pipeline is like, by its towers: SD 2.x has an exact GELU."""
    if "text_encoder_2" in networks:
        return "sdxl"
    return "sd2" if networks["text_encoder"].config.hidden_act == "gelu" else "sd1"


def prefixes(networks: Mapping[str, Network]) -> dict[str, str]:
    """What stands before the keys of each network of a whole checkpoint."""
    return _TABLES["prefixes"][kind_of(networks)]


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
    if not prefix.endswith(".model."):
        return _TABLES["clip"]
    return _TABLES["open_clip"] | {
        f"text_model.encoder.layers.{layer}.{ours}": f"transformer.resblocks.{layer}.{theirs}"
        for layer in range(config.num_hidden_layers)
        for ours, theirs in _TABLES["open_clip_layer"].items()
    }


def _unet_modules(config: UNetConfig) -> dict[str, str]:
    found, number = dict(_TABLES["unet"]), 1  # of the input block; the first is conv_in
    for level, count in enumerate(config.layers):
        for layer in range(count):
            found[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            found[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for level, count in enumerate(config.layers[::-1]):
        for layer in range(count + 1):
            found[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            found[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        behind = 2 if config.up_block_types[level].startswith("CrossAttn") else 1
        found[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{behind}.conv"
    resnets = [(ours, theirs) for ours, theirs in found.items() if ".resnets." in ours]
    inner = _TABLES["unet_resnet"].items()
    return found | {f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in resnets for a, b in inner}


def _vae_modules(config: VaeConfig) -> dict[str, str]:
    found, levels = dict(_TABLES["vae"]), len(config.block_out_channels)
    for side, name, resampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        found |= {f"{side}.{ours}": f"{side}.{theirs}" for ours, theirs in _TABLES["vae_side"].items()}
        for level in range(levels):
            # the original counts levels from the image, diffusers in the order in which they are run
            theirs = f"{side}.{name}.{level if side == 'encoder' else levels - 1 - level}"
            ours = f"{side}.{name}_blocks.{level}"
            for layer in range(config.layers_per_block + (side == "decoder")):
                found[f"{ours}.resnets.{layer}"] = f"{theirs}.block.{layer}"
                found[f"{ours}.resnets.{layer}.conv_shortcut"] = f"{theirs}.block.{layer}.nin_shortcut"
            found[f"{ours}.{resampler}rs.0.conv"] = f"{theirs}.{resampler}.conv"
    return found
