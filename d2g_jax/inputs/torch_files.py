"""PyTorch's files of tensors, read with `weights_only=True`: the one place of the runtime that needs PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.runtime.errors import UserError

StateDict = dict[str, np.ndarray]


def read_torch(file: Path) -> StateDict:
    """The tensors of a `.pth` file, floating point as float32.

    Raises `UserError` when PyTorch is not installed and for a file that is not a plain state dict.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{file}: reading it needs PyTorch; pip install 'd2g_jax[eval]'") from error
    try:
        stream = Path(file).open("rb")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    with stream:
        try:
            loaded = torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged or hostile pickle raises is anybody's guess
            raise UserError(
                f"{file}: refused, it is damaged or holds Python objects beside tensors, which could run code; "
                "fetch it again from its author"
            ) from error
    if isinstance(loaded, Mapping) and "state_dict" in loaded:
        raise UserError(f"{file}: a training checkpoint, not a plain state dict; convert the file of weights alone")
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"{file}: holds a {type(loaded).__name__}, not a state dict of tensors")
    return {_name(file, key): _tensor(file, key, value) for key, value in loaded.items()}


def _name(file: Path, key: Any) -> str:
    if not isinstance(key, str):
        raise UserError(f"{file}: key {key!r} is no tensor's name; the file is not a state dict")
    return key


def _tensor(file: Path, key: str, value: Any) -> np.ndarray:
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        raise UserError(f"{file}: {key} is not a plain tensor; the file is not a state dict")
    value = value.detach()
    return (value.float() if value.is_floating_point() else value).numpy()
