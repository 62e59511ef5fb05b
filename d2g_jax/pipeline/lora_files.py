"""LoRA files, diffusers' and kohya's (which ComfyUI reads): one table of names, read, written, put on a pipeline.

Of each kernel a file holds A (r, in) or (r, in, kh, kw), B (out, r) or (out, r, 1, 1), and maybe alpha: B A alpha / r
is added to it. What is read stands in our layout with alpha / r in B (models/lora.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2g_jax.inputs import places
from d2g_jax.models import lora
from d2g_jax.pipeline import weights
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import NETWORKS
from d2g_jax.runtime.errors import UserError

FOLDERS_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file in a folder."""

Update = dict[str, dict[str, Any]]
"""{"down", "up"} by the path of a kernel, joined by slashes."""


class Form(NamedTuple):
    """How a format names a tensor: prefix, the module's name in PyTorch, ending. Of several the first is written."""

    prefixes: Mapping[str, tuple[str, ...]]
    separator: str
    down: tuple[str, ...]
    up: tuple[str, ...]
    has_alpha: bool


FORMS = {
    "diffusers": Form(
        {"unet": ("unet.", ""), "text_encoder": ("text_encoder.",), "text_encoder_2": ("text_encoder_2.",)},
        ".",
        (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight"),
        (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight"),
        has_alpha=False,
    ),
    "kohya": Form(
        {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)},
        "_",
        (".lora_down.weight",),
        (".lora_up.weight",),
        has_alpha=True,
    ),
}
_ENDINGS = {
    **{ending: "down" for form in FORMS.values() for ending in form.down},
    **{ending: "up" for form in FORMS.values() for ending in form.up},
    ".alpha": "alpha",
}
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.")
"""diffusers' names of 2023: the ending stands behind the module of an attention's processor."""

# The original layout's names of a UNet's modules, which kohya's files of SDXL have: n is resnets of an upper block.
_ORIGINAL: tuple[tuple[str, Callable[[int, int, int], str]], ...] = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j, n: f"input_blocks.{1 + n * i + j}.0"),
    (r"down_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j, n: f"input_blocks.{1 + n * i + j}.1"),
    (r"down_blocks\.(\d+)\.downsamplers\.(\d+)\.conv", lambda i, j, n: f"input_blocks.{n * (i + 1)}.0.op"),
    (r"(mid_block)\.resnets\.(\d+)", lambda i, j, n: f"middle_block.{2 * j}"),
    (r"(mid_block)\.attentions\.(\d+)", lambda i, j, n: "middle_block.1"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j, n: f"output_blocks.{n * i + j}.0"),
    (r"up_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j, n: f"output_blocks.{n * i + j}.1"),
)
_ORIGINAL_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


@dataclasses.dataclass(frozen=True)
class Worn:
    """A file of `--lora=FILE[:SCALE]` and how much of it is taken."""

    file: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Worn:
        """Raises `UserError` for a file that is not there, a pickle, and a scale that is no number."""
        path, colon, scale = text, "", ""
        if not places.is_there(places.expanded(text)):
            path, colon, scale = text.rpartition(":")
            path = path if colon else text
        file = places.expanded(path)
        file = file / FOLDERS_FILE if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"--lora={text}: {file} is no file; give FILE.safetensors or FILE.safetensors:SCALE")
        try:
            worn = cls(file, float(scale) if colon else 1.0)
        except ValueError as error:
            raise UserError(f"--lora={text}: the scale {scale!r} is no number; give one such as 0.8") from error
        if not math.isfinite(worn.scale):
            raise UserError(f"--lora={text}: the scale {scale} is not finite; give one such as 0.8")
        return worn


def put_on(pipeline: Pipeline, worn: Sequence[Worn], networks: Sequence[str] = NETWORKS) -> Pipeline:
    """The pipeline with the updates of these files in its `networks`, one after another; all are read before the first.

    Raises `UserError` as `read` does.
    """
    params = dict(pipeline.params)
    for one, updates in [(one, read(one.file, pipeline)) for one in worn]:
        for network, update in updates.items():
            if network in networks:
                params[network] = lora.merge(params[network], lora.nested(update), one.scale)
    return dataclasses.replace(pipeline, params=params)


def read(file: Path, pipeline: Pipeline) -> dict[str, Update]:
    """A file's updates by network, float32.

    Raises `UserError` that names the file and the tensor: a damaged file or a pickle, a key that is no kernel's of this
    pipeline, A without B, shapes that are not this pipeline's, NaN or infinity.
    """
    names = {name: place for form in FORMS.values() for name, place in _modules(pipeline, form)}
    shapes = {network: lora.flat(part.abstract()) for network, part in _networks(pipeline).items()}
    metadata = _adapter_metadata(file)
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, value in weights.load_state_dict(file).items():
        name = _PROCESSOR.sub(lambda m: f".to_{m[1]}{'.0' if m[1] == 'out' else ''}.lora.", key)
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        place = names.get(name.removesuffix(ending)) if ending else None
        if place is None:
            raise UserError(
                f"{file}: {key} is unknown; read are LoRAs of this model's kernels under diffusers' or kohya's names "
                "(no LoHa, LoKr, DoRA)"
            )
        if not np.isfinite(value).all():
            raise UserError(f"{file}: tensor {key} holds NaN or infinity; fetch it again")
        found.setdefault(place, {})[_ENDINGS[ending]] = value
    updates: dict[str, Update] = {}
    for (network, path), parts in found.items():
        update = _to_ours(file, f"{network}/{path}", parts, shapes[network][path].shape)
        scale = float(parts["alpha"]) / len(update["up"]) if "alpha" in parts else metadata.get(network, 1.0)
        updates.setdefault(network, {})[path] = {"down": update["down"], "up": update["up"] * np.float32(scale)}
    if not updates:
        raise UserError(f"{file}: holds no tensors; give a LoRA")
    return updates


def write(updates: Mapping[str, Update], file: Path, form: str, pipeline: Pipeline, dtype: Any = np.float32) -> None:
    """Writes updates by network under the names of a format of `FORMS`; alpha, where it has one, is the rank.

    Raises `UserError` as `weights.save_state_dict` does.
    """
    names: dict[tuple[str, str], str] = {}
    for name, place in _modules(pipeline, FORMS[form]):
        names.setdefault(place, name)
    state = {}
    for network, update in updates.items():
        for path, parts in update.items():
            down, up = (np.asarray(parts[name], np.float32) for name in ("down", "up"))
            name, convolves = names[network, path], down.ndim == 4
            down, up = (down.transpose(3, 2, 0, 1), up.T[..., None, None]) if convolves else (down.T, up.T)
            state[name + FORMS[form].down[0]], state[name + FORMS[form].up[0]] = map(np.ascontiguousarray, (down, up))
            if FORMS[form].has_alpha:
                state[f"{name}.alpha"] = np.asarray(len(down), np.float32)
    weights.save_state_dict(state, file, dtype)


def _networks(pipeline: Pipeline) -> dict[str, Any]:
    return {**pipeline.towers, "unet": pipeline.unet}


def _modules(pipeline: Pipeline, form: Form) -> Iterator[tuple[str, tuple[str, str]]]:
    """(a name of a module in a format, (network, path of its kernel)); those that are written come first."""
    for network, part in _networks(pipeline).items():
        paths = [path for path in lora.flat(part.abstract()) if path.endswith("/kernel")]
        modules = [(path.removesuffix("/kernel").replace("/", "."), path) for path in paths]
        original = []
        if network == "unet" and form.separator == "_" and isinstance(part.config.layers_per_block, int):
            attentive = {module.partition(".attentions.")[0] for module, _ in modules if ".attentions." in module}
            layers = part.config.layers_per_block + 1
            original = [(_original(module, layers, attentive), path) for module, path in modules]
        for prefix in form.prefixes[network]:
            for module, path in (*modules, *original):
                yield prefix + module.replace(".", form.separator), (network, path)


def _original(module: str, layers: int, attentive: set[str]) -> str:
    """The original layout's name of a UNet's module; outside of blocks the same."""
    if upsampler := re.fullmatch(r"(up_blocks\.(\d+))\.upsamplers\.0\.conv", module):
        return f"output_blocks.{layers * (int(upsampler[2]) + 1) - 1}.{2 if upsampler[1] in attentive else 1}.conv"
    for pattern, name in _ORIGINAL:
        if found := re.match(pattern, module):
            block = int(found[1]) if found[1].isdigit() else 0
            rest = module[found.end() :].removeprefix(".")
            return ".".join(filter(None, (name(block, int(found[2]), layers), _ORIGINAL_RESNET.get(rest, rest))))
    return module


def _adapter_metadata(file: Path) -> dict[str, float]:
    """alpha / r by network, where diffusers wrote it. Raises `UserError` for what is no plain LoRA."""
    text = weights.read_metadata(file).get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        fields = json.loads(text)
        for key, value in fields.items():
            if key.rpartition(".")[2] in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") and value:
                raise UserError(f"{file}: its metadata has {key}, which is not read; merge it with diffusers first")
        networks = [key.removesuffix(".lora_alpha") for key in fields if key.endswith(".lora_alpha")]
        return {network: fields[f"{network}.lora_alpha"] / fields[f"{network}.r"] for network in networks}
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: its lora_adapter_metadata cannot be read ({error}); write the LoRA again") from error


def _to_ours(file: Path, name: str, parts: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A and B of a kernel of `shape` in our layout; `UserError` unless they are there and fit."""
    for part in ("down", "up"):
        if part not in parts:
            raise UserError(f"{file}: {name} has no {part} tensor; fetch the file again")
    down, up = parts["down"], parts["up"].reshape(parts["up"].shape[:2])
    if len(shape) == 4:
        down = (down[..., None, None] if down.ndim == 2 else down).transpose(2, 3, 1, 0)
    else:
        down = (down[..., 0, 0] if down.shape[2:] == (1, 1) else down).T
    up = up.T
    if (*down.shape[:-1], up.shape[-1]) != shape or down.shape[-1] != len(up):
        raise UserError(
            f"{file}: {name} has {parts['down'].shape} and {parts['up'].shape}, this model's kernel is {shape}; give a "
            "LoRA of the same base model"
        )
    return {"down": np.ascontiguousarray(down), "up": np.ascontiguousarray(up)}
