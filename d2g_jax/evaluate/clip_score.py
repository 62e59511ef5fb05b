"""The CLIP score: the mean cosine between an image and its prompt (arXiv 2104.08718 without its factor and floor)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from d2g_jax.evaluate.features import best_device
from d2g_jax.results import metric_weights
from d2g_jax.runtime.errors import UserError

PATCHES = {"clip_b32": 32, "clip_g14": 14}
"""Patch size of each model's image tower: a folder under the wrong flag is found out."""


@dataclasses.dataclass(frozen=True)
class ClipScore:
    """A frozen CLIP model.

    Attributes:
      sha256: of its weights.
      cosines: (uint8 images (B, S, S, 3), B texts) -> float64 (B,).
    """

    sha256: str
    cosines: Callable[[np.ndarray, Sequence[str]], np.ndarray]


def load(name: str, folder: Path) -> ClipScore:
    """`clip_b32` or `clip_g14` from a local folder in transformers' layout, with safetensors.

    The image is prepared as the folder's preprocessor_config.json says; the text is cut off after the model's length.
    Raises `UserError` for a folder of another model or without safetensors, and without the extra `eval`.
    """
    _check_folder(name, folder)
    try:
        import torch
        from safetensors import SafetensorError
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise metric_weights.needs_extra("the CLIP score", error) from error
    device = best_device(torch)
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: cannot be read as a CLIP model ({reason}); {metric_weights.WHERE[name]}") from error
    model = model.to(device).eval()
    length = model.config.text_config.max_position_embeddings

    def cosines(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        tokens = tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(device)
        pixels = processor(list(images), return_tensors="pt")["pixel_values"].to(device)
        with torch.inference_mode():
            output = model(input_ids=tokens["input_ids"], attention_mask=None, pixel_values=pixels)
            image, text = output.image_embeds.double(), output.text_embeds.double()
            return torch.nn.functional.cosine_similarity(image, text).cpu().numpy()

    return ClipScore(metric_weights.sha256_of(folder), cosines)


def _check_folder(name: str, folder: Path) -> None:
    flag, file = metric_weights.flag(name), folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["vision_config"].get("patch_size", 32)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{flag}={folder}: no CLIP model in transformers' layout; {metric_weights.WHERE[name]}"
        ) from error
    if found != PATCHES[name]:
        raise UserError(f"{flag}={folder}: patches of {found} pixels, this metric's have {PATCHES[name]}")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{flag}={folder}: holds no safetensors; {metric_weights.WHERE[name]}")
