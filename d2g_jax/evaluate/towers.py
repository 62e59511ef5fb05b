"""Networks of transformers from local folders, in PyTorch: scores of images and their prompts, features of images.

The CLIP score is the mean cosine between an image and its prompt (arXiv 2104.08718 without its factor and floor).
PickScore (arXiv 2305.01569) and HPSv2 (arXiv 2306.09341) are the same of a CLIP ViT-H/14 that was trained on people's
choices. LAION's aesthetic score is a head of linear layers on CLIP ViT-L/14's image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2g_jax.evaluate.features import FrozenNetwork, best_device
from d2g_jax.inputs.torch_files import read_torch
from d2g_jax.results import metric_weights
from d2g_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tower:
    """What a folder must be, since one under the wrong flag would give a number too; and what is made of its cosine.

    Attributes:
      patch, layers: of the image tower.
      side: pixels that it takes; None where no other model differs in it alone.
      factor: of the cosine of image and text; None: the exponential of the model's own scale.
      prefixed: whether the protocol's prefix stands before a prompt.
    """

    patch: int
    layers: int
    side: int | None = None
    factor: float | None = 1.0
    prefixed: bool = False


TOWERS = {
    "clip_b32": Tower(32, 12, prefixed=True),
    "clip_g14": Tower(14, 40, prefixed=True),
    "pickscore": Tower(14, 32, factor=None),
    "hpsv2": Tower(14, 32, factor=100.0),  # published tables give hundreds
    "aesthetic": Tower(14, 24, 224),
    "clip_l14_336": Tower(14, 24, 336),
    "dinov2": Tower(14, 24),
}
AESTHETIC = "aesthetic"
SCORES = ("clip_b32", "clip_g14", "pickscore", "hpsv2", AESTHETIC)
SPACES = ("dinov2", "clip_l14_336")
"""Those whose features two sets of images are compared in."""

_IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
_BLANK = np.zeros((1, 64, 64, 3), np.uint8)


def load(name: str, folder: Path) -> FrozenNetwork:
    """One of `TOWERS` from a local folder in transformers' layout; a pytorch_model.bin is read as plain tensors.

    For a score the image is prepared as the folder's preprocessor_config.json says, and the text is cut off after the
    model's length; for features it is resized by PIL's bicubic, as dgm-eval and clip-mmd do.

    Raises `UserError` for a folder of another model or a damaged one, and without the extra `eval`.
    """
    _check_folder(name, folder)
    with _told(name, folder):
        if name in SPACES:
            made = _space(name, folder)
        else:
            made = _aesthetic(folder) if name == AESTHETIC else _similarity(name, folder)
        if not np.isfinite(made.run(_BLANK) if name in SPACES else made.run(_BLANK, [""])).all():
            raise ValueError("it gives NaN or infinity for a black image")
    return made


def _similarity(name: str, folder: Path) -> FrozenNetwork:
    model, processor, tokenizer = _opened(folder, "CLIPModel", "CLIPImageProcessorPil", "CLIPTokenizer")
    import torch

    length, tokens = model.config.text_config.max_position_embeddings, model.config.text_config.vocab_size
    if len(tokenizer) < tokens:  # one without files is made, and empty
        raise ValueError(f"its tokenizer knows {len(tokenizer)} tokens of {tokens}")
    factor = float(model.logit_scale.detach().exp()) if TOWERS[name].factor is None else TOWERS[name].factor

    def values(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        tokens = tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(model.device)
        pixels = processor(list(images), return_tensors="pt")["pixel_values"].to(model.device)
        with torch.inference_mode():
            output = model(input_ids=tokens["input_ids"], attention_mask=None, pixel_values=pixels)
            image, text = output.image_embeds.double(), output.text_embeds.double()
            return factor * torch.nn.functional.cosine_similarity(image, text).cpu().numpy()

    return FrozenNetwork(name, metric_weights.sha256_of(folder), values)


def _space(name: str, folder: Path) -> FrozenNetwork:
    """DINOv2's features are the last layer's class token behind its norm, CLIP's the projected image at unit length."""
    if name == "dinov2":
        (model,) = _opened(folder, "Dinov2Model")
        _resample_positions(model.embeddings, 224 // model.config.patch_size)
        return _extractor(name, folder, model, 224, _IMAGENET, lambda output: output.pooler_output)
    model, processor = _opened(folder, "CLIPVisionModelWithProjection", "CLIPImageProcessorPil")
    scale, side = np.array([processor.image_mean, processor.image_std]), model.config.image_size
    return _extractor(name, folder, model, side, scale, lambda output: _unit(output.image_embeds))


def _resample_positions(embeddings: Any, side: int) -> None:
    """Makes a DINOv2's grid of positions `side` wide as its authors' code does, which dgm-eval runs.

    That steps by n / (side + 0.1) of n positions; transformers, left to itself, by n / side.
    """
    import torch

    table = embeddings.position_embeddings.detach()  # (1, 1 + n n, D), the class token's first
    n = math.isqrt(table.shape[1])
    grid = table[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    table = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    embeddings.position_embeddings = torch.nn.Parameter(table)


def _extractor(
    name: str,
    folder: Path,
    model: Any,
    side: int,
    scale: np.ndarray,
    features: Callable[[Any], Any],
) -> FrozenNetwork:
    import torch
    import transformers

    mean, deviation = scale

    def extract(images: np.ndarray) -> np.ndarray:
        sized = [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in images]
        pixels = ((np.stack(sized) / 255 - mean) / deviation).astype(np.float32)
        with torch.inference_mode():
            return features(model(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(model.device))).cpu().numpy()

    return FrozenNetwork(f"transformers {transformers.__version__}, {name}", metric_weights.sha256_of(folder), extract)


def _aesthetic(folder: Path) -> FrozenNetwork:
    """A head `.pth` of linear layers `layers.N` without anything between them, beside CLIP's folder of ViT-L/14."""
    heads = sorted(folder.glob("*.pth"))
    if len(heads) != 1:
        given = f"{metric_weights.flag(AESTHETIC)}={folder}"
        raise UserError(f"{given}: {len(heads)} files .pth, not one head; {metric_weights.WHERE[AESTHETIC]}")
    state = read_torch(heads[0])
    model, processor = _opened(folder, "CLIPVisionModelWithProjection", "CLIPImageProcessorPil")
    width = model.config.projection_dim

    def head(x: np.ndarray) -> np.ndarray:
        for i in sorted({int(key.split(".")[1]) for key in state}):
            x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
        return x.reshape(len(x))

    try:
        head(np.zeros((2, width)))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{heads[0]}: no head of linear layers from {width} numbers to 1 ({error})") from error
    import torch

    def values(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        pixels = processor(list(images), return_tensors="pt")["pixel_values"].to(model.device)
        with torch.inference_mode():
            return head(_unit(model(pixel_values=pixels).image_embeds).double().cpu().numpy())

    return FrozenNetwork(AESTHETIC, metric_weights.sha256_of(folder), values)


def _unit(x: Any) -> Any:
    return x / x.norm(dim=-1, keepdim=True)


@contextlib.contextmanager
def _told(name: str, folder: Path) -> Iterator[None]:
    """Raises `UserError` for whatever stops a folder's model from being read and from measuring."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise metric_weights.needs_extra(name, error) from error
    except Exception as error:  # what damaged weights, tokenizers and settings raise is anybody's guess
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder}: cannot be read as {name} ({reason}); {metric_weights.WHERE[name]}") from error


def _opened(folder: Path, *classes: str) -> list[Any]:
    """Objects of transformers' classes from a folder; models on the device, float32, with all of their weights."""
    import torch
    import transformers

    made = []
    transformers.logging.set_verbosity_error()  # it lists, for one, the weights of a text tower that is not asked for
    for kind in classes:
        read = functools.partial(getattr(transformers, kind).from_pretrained, folder, local_files_only=True)
        if "Model" not in kind:
            made.append(read())
            continue
        model, found = read(dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
        drawn = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}  # at random, by transformers
        if drawn:
            raise ValueError(f"its weights have no fitting {min(drawn)}")
        made.append(model.to(best_device(torch)).eval())
    return made


def _check_folder(name: str, folder: Path) -> None:
    given, tower, file = f"{metric_weights.flag(name)}={folder}", TOWERS[name], folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        vision = config if name == "dinov2" else config["vision_config"]
        patch, layers = vision.get("patch_size", 32), vision.get("num_hidden_layers", 12)
        side = vision.get("image_size", 224)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{given}: no such model in transformers' layout; {metric_weights.WHERE[name]}") from error
    for what, found, wanted in (
        ("type", config.get("model_type"), "dinov2" if name == "dinov2" else "clip"),
        ("patch", patch, tower.patch),
        ("layers", layers, tower.layers),
        ("side", side, tower.side),
    ):
        if wanted is not None and found != wanted:
            raise UserError(f"{given}: another model, {what} {found}, not {wanted}; {metric_weights.WHERE[name]}")
