"""LoRA files, diffusers' and kohya's (which ComfyUI reads): one table of names, read, written, put on a pipeline.

Of each kernel a file holds A (r, in) or (r, in, kh, kw), B (out, r) or (out, r, 1, 1), and maybe alpha: B A alpha / r
is added to it. What is read stands in our layout with alpha / r in B (models/lora.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.inputs import places
from d2g_jax.inputs.text import read_json
from d2g_jax.models import lora
from d2g_jax.pipeline import weights
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import NETWORKS
from d2g_jax.pipeline.original_keys import KINDS, original_places
from d2g_jax.runtime.errors import UserError

FOLDERS_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file in a folder."""

Update = dict[str, dict[str, Any]]
"""{"down", "up"} by the path of a kernel, joined by slashes."""

FORMS = read_json(KINDS / "lora_names.json", "install the package again")
"""How a format names a tensor: before and behind the module's name in PyTorch. Of several the first is written."""

_ENDINGS = {ending: part for form in FORMS.values() for part in ("down", "up", "alpha") for ending in form[part]}
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.")
"""diffusers' names of 2023: the ending stands behind the module of an attention's processor."""


@dataclasses.dataclass(frozen=True)
class Worn:
    """A file of `--lora=FILE[:SCALE]` and how much of it is taken."""

    file: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Worn:
        """Raises `UserError` for a file that is not there, a pickle, and a scale that is no number."""
        path, scale = text, "1"
        if not places.is_there(places.expanded(text)) and ":" in text:
            path, _, scale = text.rpartition(":")
        file = places.expanded(path)
        file = file / FOLDERS_FILE if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"--lora={text}: {file} is no file; give FILE.safetensors or FILE.safetensors:SCALE")
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"--lora={text}: the scale {scale!r} is no finite number; give one such as 0.8")
        return cls(file, number)


def put_on(pipeline: Pipeline, worn: Sequence[Worn], networks: Sequence[str] = NETWORKS) -> Pipeline:
    """The pipeline with the updates of these files in its `networks`, one after another; all are read before the first.

    Raises `UserError` as `read` does.
    """
    params = dict(pipeline.params)
    for one, updates in [(one, read(one.file, pipeline)) for one in worn]:
        for network in updates.keys() & set(networks):
            params[network] = lora.merge(params[network], lora.nested(updates[network]), one.scale)
    return dataclasses.replace(pipeline, params=params)


def read(file: Path, pipeline: Pipeline) -> dict[str, Update]:
    """A file's updates by network, float32.

    Raises `UserError` that names the file and the tensor: a damaged file or a pickle, a key that is no kernel's of this
    pipeline, A without B, shapes that are not this pipeline's, NaN or infinity.
    """
    names = {name: place for form in FORMS.values() for name, place in _modules(pipeline, form)}
    shapes = {network: lora.flat(part.abstract()) for network, part in pipeline.networks.items()}
    said = _adapter_metadata(file)
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
        if not value.size or not np.isfinite(value).all():
            raise UserError(f"{file}: tensor {key} is empty or holds NaN or infinity; fetch it again")
        found.setdefault(place, {})[_ENDINGS[ending]] = value
    updates: dict[str, Update] = {}
    for (network, path), parts in found.items():
        update = _to_ours(file, f"{network}/{path}", parts, shapes[network][path].shape)
        scale = parts["alpha"].flat[0] / len(update["up"]) if "alpha" in parts else said.get(network, 1.0)
        updates.setdefault(network, {})[path] = update | {"up": update["up"] * np.float32(scale)}
    if not updates:
        raise UserError(f"{file}: holds no tensors; give a LoRA")
    return updates


def write(
    updates: Mapping[str, Update],
    file: Path,
    form: str,
    pipeline: Pipeline,
    dtype: Any = np.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes updates by network under the names of a format of `FORMS`; alpha, where it has one, is the rank.

    Raises `UserError` as `weights.save_state_dict` does.
    """
    names: dict[tuple[str, str], str] = {}
    for name, place in _modules(pipeline, FORMS[form]):
        names.setdefault(place, name)
    state = {}
    for place, parts in (
        (names[network, path], parts) for network in updates for path, parts in updates[network].items()
    ):
        down, up = (np.asarray(parts[name], np.float32) for name in ("down", "up"))
        down, up = (down.transpose(3, 2, 0, 1), up.T[..., None, None]) if down.ndim == 4 else (down.T, up.T)
        values = {"down": np.ascontiguousarray(down), "up": np.ascontiguousarray(up), "alpha": np.float32(len(down))}
        state |= {place + FORMS[form][part][0]: np.asarray(values[part]) for part in values if FORMS[form][part]}
    weights.save_state_dict(state, file, dtype, metadata)


def _modules(pipeline: Pipeline, form: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """(a name of a module in a format, (network, path of its kernel)); those that are written come first.

    kohya's files of SDXL name the blocks of a UNet as the original layout does.
    """
    for network, part in pipeline.networks.items():
        modules = [path.removesuffix("/kernel") for path in lora.flat(part.abstract()) if path.endswith("/kernel")]
        names = [(module.replace("/", "."), module) for module in modules]
        if network == "unet" and form["separator"] == "_":
            blocks = {f"{name}.weight": module for name, module in names if "_block" in name}
            places = original_places(part.config, blocks, "")
            names += [(place.key.removesuffix(".weight"), blocks[key]) for key, place in places.items()]
        for prefix in form.get(network, ()):
            for name, module in names:
                yield prefix + name.replace(".", form["separator"]), (network, f"{module}/kernel")


def _adapter_metadata(file: Path) -> dict[str, float]:
    """alpha / r by network, where diffusers wrote it. Raises `UserError` for what is no plain LoRA."""
    try:
        fields = json.loads(weights.read_header(file)[1].get("lora_adapter_metadata", "{}"))
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
    down, up = parts["down"], parts["up"]
    up = up[..., 0, 0] if up.shape[2:] == (1, 1) else up
    if len(shape) == 4:
        down, wanted = down[..., None, None] if down.ndim == 2 else down, (shape[2], *shape[:2])
    else:
        down, wanted = down[..., 0, 0] if down.shape[2:] == (1, 1) else down, shape[:1]
    if down.shape[1:] != wanted or up.shape != (shape[-1], *down.shape[:1]):
        raise UserError(
            f"{file}: {name} has {parts['down'].shape} and {parts['up'].shape}, this model's kernel is {shape}; give a "
            "LoRA of the same base model"
        )
    down = down.T if down.ndim == 2 else down.transpose(2, 3, 1, 0)
    return {"down": np.ascontiguousarray(down), "up": np.ascontiguousarray(up.T)}
