"""One safetensors file in the original layout, as ComfyUI and others take it, in the place of a pipeline folder.

What such a file lacks, configs and tokenizers, is shipped for the four kinds that are read; a file written by
`d2g export --to=single` has it in its header. Either is laid out as a folder for as long as a pipeline is read.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.diffusion.schedule import PREDICTION_TYPES
from d2g_jax.inputs import text
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline import original_keys, weights
from d2g_jax.pipeline.original_keys import KINDS, UNET_PREFIX, original_places
from d2g_jax.pipeline.tokenizers import json_bytes, tokenizer_files
from d2g_jax.runtime.atomic import write_bytes
from d2g_jax.runtime.errors import UserError

HEADER = "d2g_jax"
"""Of the header's texts the one that holds what `d2g export` says of a file, as JSON."""

_SETTINGS = ("model_index", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
"""What `kinds/` and our own headers hold of every pipeline."""

# What a file is that is not read, by a key of it that no other has.
_FOREIGN = (
    (r"(^|\.)joint_blocks\.", "Stable Diffusion 3"),
    (r"(^|\.)double_blocks\.", "FLUX"),
    (r"^conditioner\.embedders\.0\.model\.", "the refiner of SDXL"),
    (r"^(embedder\.model\.|noise_augmentor\.)", "Stable unCLIP"),
    (r"(^lora_|\.lora_(A|B|up|down)\b)", "a LoRA"),
)
_CHANNELS = {5: "a depth model", 7: "an upscaler", 8: "InstructPix2Pix", 9: "an inpainting model"}
"""What else a UNet with so many input channels takes than latents."""

# What trainers leave beside the networks: moving averages, the schedule, its buffers; and of text towers the parts
# that drawing does without, OpenCLIP's last layer in SD 2.x among them.
_LEFT_OVER = re.compile(
    r"model_ema\..*|global_step|epoch|pytorch-lightning_version|betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_.*"
    r"|posterior_.*|lvlb_weights|logvar|scale_factor|denoiser\.sigmas|first_stage_model\.loss\..*|v_pred|ztsnr"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(model\.|transformer\.)?(logit_scale|attn_mask|text_projection.*)"
    r"|.*\.position_ids|cond_stage_model\.model\.transformer\.resblocks\.23\..*"
)
_WIDTH = re.compile(r"input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight$")
_KINDS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""By the width of the text that the UNet attends to."""

Read = Callable[[weights.Place | None], Params]
"""Reads a network's weights, once it is known where each leaf goes."""


@contextmanager
def settings_folder(model: Path, prediction: str | None) -> Iterator[Path]:
    """The folder with a model's configs and tokenizers: of a folder itself, of a single file one for a while.

    `prediction`: of `PREDICTION_TYPES`; None is what the .yaml beside the file says, or the file, or its kind.
    Raises `UserError` for a file that is none of the four kinds, and says what it is.
    """
    if model.is_dir():
        yield model
        return
    with as_folder(_settings(model, prediction)) as folder:
        yield folder


@contextmanager
def as_folder(settings: Mapping[str, Any]) -> Iterator[Path]:
    """Settings as in `kinds/`, laid out as diffusers does in a temporary folder."""
    names = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    with tempfile.TemporaryDirectory() as folder:
        for name, values in settings.items():
            if name.startswith("tokenizer"):
                files = {f"{name}/{file}": content for file, content in tokenizer_files(**values).items()}
            else:
                files = {names.get(name, f"{name}/config.json"): json_bytes(values)}
            for file, content in files.items():
                write_bytes(Path(folder, file), content)
        yield Path(folder)


def readers(file: Path, networks: Mapping[str, Network]) -> dict[str, Read]:
    """How each network's weights are read. Raises `UserError` for tensors that are missing or belong to none."""
    shapes, prefixes, places = weights.read_header(file)[0], original_keys.prefixes(networks), {}
    for name, network in networks.items():
        places[name] = original_places(network.config, weights.torch_shapes(network.abstract()), prefixes[name])
        if not any(key.startswith(prefixes[name]) for key in shapes):
            raise UserError(
                f"{file}: holds no {name} ({prefixes[name]}*); give a whole checkpoint, and this file as unet "
                "if a UNet is what it holds"
            )
    _check(file, shapes, [place for of_one in places.values() for place in of_one.values()], shapes)
    return {name: functools.partial(_read, file, network, places[name]) for name, network in networks.items()}


def unet_reader(file: Path, network: Network) -> Read | None:
    """How a UNet is read of a file in the original layout, with or without its prefix; None for another layout.

    Raises `UserError` for keys of the UNet that are missing or unknown. What else a whole checkpoint holds is not read.
    """
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    shapes, _ = weights.read_header(file)
    prefix = UNET_PREFIX if any(key.startswith(UNET_PREFIX) for key in shapes) else ""
    if f"{prefix}input_blocks.0.0.weight" not in shapes:
        return None
    places = original_places(network.config, weights.torch_shapes(network.abstract()), prefix)
    _check(file, shapes, places.values(), [key for key in shapes if key.startswith(prefix)])
    return functools.partial(_read, file, network, places)


def described(file: Path) -> dict[str, Any]:
    """What `d2g export` wrote into a file's header; {} for a file of others. Raises `UserError` for a damaged one."""
    _, metadata = weights.read_header(file)
    try:
        value = json.loads(metadata.get(HEADER, "{}"))
        if not set(_SETTINGS) <= set(value.get("settings", _SETTINGS)):
            raise ValueError("not whole")
        return value
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: its header's {HEADER} is damaged ({error}); export the student again") from error


def kind_settings(kind: str) -> dict[str, Any]:
    """What is shipped of "sd1", "sd2", "sd2_v" or "sdxl": configs by component; a kind may say how it differs."""
    settings = text.read_json(KINDS / f"{kind}.json", "install the package again")
    if "of" not in settings:
        return settings
    return {name: values | settings.get(name, {}) for name, values in kind_settings(settings["of"]).items()}


def _settings(file: Path, asked: str | None) -> dict[str, Any]:
    """What `kinds/` holds of a kind, of this file."""
    if not (own := described(file)):
        return _kind(file, weights.read_header(file)[0], asked)
    if "settings" not in own:
        raise UserError(f"{file}: a UNet alone; give it as unet, beside a model that has the other parts")
    if asked is not None:
        raise UserError(f"{file}: its header says what it predicts; leave out prediction")
    return own["settings"]


def _kind(file: Path, shapes: Mapping[str, tuple[int, ...]], asked: str | None) -> dict[str, Any]:
    """The settings of a file of others, by its keys and shapes."""
    for pattern, name in _FOREIGN:
        if found := next((key for key in shapes if re.search(pattern, key)), None):
            raise UserError(f"{file}: {name} ({found}), which is not read; give SD 1.x, 2.x or SDXL base")
    prefix = UNET_PREFIX if any(key.startswith(UNET_PREFIX) for key in shapes) else ""
    first = shapes.get(f"{prefix}input_blocks.0.0.weight")
    if first is None:
        raise UserError(
            f"{file}: no checkpoint of Stable Diffusion in the original layout ({UNET_PREFIX}*); a UNet in diffusers' "
            "layout goes to unet, beside a model"
        )
    if first[1] != 4:
        what = _CHANNELS.get(first[1], "a model")
        raise UserError(f"{file}: {what} of {first[1]} input channels, which is not read; give a text-to-image model")
    width = next((shape[1] for key, shape in shapes.items() if _WIDTH.search(key)), None)
    if width not in _KINDS:
        raise UserError(f"{file}: a UNet for texts of width {width}, not of SD 1.x (768), 2.x (1024) or SDXL (2048)")
    kind = _KINDS[width]
    prediction = _prediction(file, width, shapes, asked)
    settings = kind_settings("sd2_v" if (kind, prediction) == ("sd2", "v_prediction") else kind)
    zero_snr = {"rescale_betas_zero_snr": True} if "ztsnr" in shapes else {}
    return {**settings, "scheduler": {**settings["scheduler"], "prediction_type": prediction, **zero_snr}}


def _prediction(file: Path, width: int, shapes: Mapping[str, tuple[int, ...]], asked: str | None) -> str:
    """What the UNet predicts: shapes do not tell."""
    if asked is not None and asked not in PREDICTION_TYPES:
        raise UserError(f"prediction={asked!r}; choose one of {', '.join(PREDICTION_TYPES)}")
    marked = "v_prediction" if "v_pred" in shapes else None
    found = asked or _yaml_prediction(file.with_suffix(".yaml"), width) or marked
    if found is None and _KINDS[width] == "sd2":
        raise UserError(
            f"{file}: SD 2.x, whose tensors do not tell what it predicts; say prediction=v_prediction (2.0, 2.1 at 768 "
            "pixels) or prediction=epsilon (base, 512), or put its .yaml beside it"
        )
    return found or "epsilon"


def _yaml_prediction(file: Path, width: int) -> str | None:
    """What an original config says of the prediction; None where there is none. `UserError` for another kind's."""
    if not file.is_file():
        return None
    import yaml

    try:
        params = yaml.safe_load(text.read_text(file, "remove it"))["model"]["params"]
        network = params.get("unet_config", params.get("network_config", {})).get("params", {})
        if (theirs := network.get("context_dim", width)) != width:
            raise UserError(f"{file}: of a UNet for texts of width {theirs}, the file's is for {width}; remove it")
        scaling = params.get("denoiser_config", {}).get("params", {}).get("scaling_config", {}).get("target", "")
        named = params.get("parameterization", "v" if scaling.endswith(".VScaling") else "eps")
        return {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[named]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file}: no config of the original Stable Diffusion ({reason}); correct or remove it"
        ) from error


def _check(file: Path, shapes: Mapping[str, Any], places: Iterable[original_keys.Place], own: Iterable[str]) -> None:
    """Raises `UserError` for a place with no tensor, and for a tensor of `own` that has none."""
    needed = dict.fromkeys(place.key for place in places)
    if missing := next((key for key in needed if key not in shapes), None):
        raise UserError(f"{file}: tensor {missing} is missing; a pruned or another model, give a whole one")
    if keys := [key for key in own if key not in needed and not _LEFT_OVER.fullmatch(key)]:
        listed = ", ".join(keys[:3]) + (" ..." if keys[3:] else "")
        raise UserError(
            f"{file}: {len(keys)} unknown tensors, {listed}; give a model with the parts of SD 1.x, 2.x or SDXL"
        )


def _read(
    file: Path, network: Network, places: Mapping[str, original_keys.Place], place: weights.Place | None
) -> Params:
    def arrange(stored: Mapping[str, weights.Stored]) -> dict[str, weights.Stored]:
        return {key: _inwards(stored[found.key], found) for key, found in places.items()}

    return weights.load_params(file, network.abstract(), place, arrange)


def _inwards(stored: weights.Stored, place: original_keys.Place) -> weights.Stored:
    """A tensor of the original layout, or its third, as diffusers has it."""
    if original_keys.is_transposed(place.key):
        return stored._replace(shape=stored.shape[::-1], read=lambda: stored.read().T)
    if place.third is None:
        return stored
    size = -(-stored.shape[0] // 3)  # no whole third has a shape that nothing fits
    part = slice(place.third * size, (place.third + 1) * size)
    return stored._replace(shape=(size, *stored.shape[1:]), read=lambda: np.asarray(stored.read()[part]))
