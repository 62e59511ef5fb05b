"""The metrics' own weights: local files named by flag, where to get them, and what they hash to."""

from __future__ import annotations

import hashlib
from pathlib import Path

from d2g_jax.runtime.errors import UserError

WHERE = {
    "inception": "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "clip_b32": "hf download openai/clip-vit-base-patch32 --local-dir FOLDER",
    "clip_g14": "hf download laion/CLIP-ViT-g-14-laion2B-s12B-b42K --local-dir FOLDER",
    "pickscore": "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include '*.json' merges.txt --local-dir FOLDER "
    "&& hf download yuvalkirstain/PickScore_v1 --local-dir FOLDER",
    "hpsv2": "hf download adams-story/HPSv2-hf --local-dir FOLDER",
    "aesthetic": "hf download openai/clip-vit-large-patch14 --local-dir FOLDER, and into it "
    "sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor",
    "clip_l14_336": "hf download openai/clip-vit-large-patch14-336 --local-dir FOLDER",
    "dinov2": "hf download facebook/dinov2-large --local-dir FOLDER",
    "lpips": "d2g metric convert VGG16.pth --heads=HEADS.pth --out=FOLDER (docs/metric.md)",
    "dreamsim": "python -c \"from dreamsim import dreamsim; dreamsim(device='cpu', cache_dir='FOLDER')\"",
}
"""Where each comes from, for messages and for --help: clean-fid's TorchScript file, CLIP models in transformers'
layout, a metric folder of `d2g metric convert`, and the dreamsim package's filled cache_dir."""

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
_SETTINGS = (".json", ".txt")  # tokenizer, preprocessor and sizes: they decide a number as the weights do


def flag(name: str) -> str:
    return f"--weights-{name.replace('_', '-')}"


def missing(metric: str, name: str) -> UserError:
    """The error of a metric whose weights were not given."""
    return UserError(f"{metric} needs {flag(name)}=PATH; get it once with a network: {WHERE[name]}")


def needs_extra(what: str, error: ImportError) -> UserError:
    """The error of a metric whose library is not installed."""
    return UserError(f"{what} needs {error.name or error}: pip install 'd2g_jax[eval]'")


def sha256_of(path: Path) -> str:
    """Of a file's bytes; of a folder the names and bytes of all its weights and settings (.safetensors, .json, ...).

    Raises `UserError` for a path that does not exist and for a folder without weights.
    """
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder of weights")
    files = [file for file in sorted(path.rglob("*")) if file.suffix in _SUFFIXES + _SETTINGS and file.is_file()]
    if not any(file.suffix in _SUFFIXES for file in files):
        raise UserError(f"{path}: holds no weights ({', '.join(_SUFFIXES)})")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
