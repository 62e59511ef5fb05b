"""diffusers and transformers safetensors <-> our parameter trees, by rule in both directions.

Attribute names in `d2g_jax.models` are those of the PyTorch state dict, so a leaf's path is its key; only the last part
(`kernel`, `scale`, `embedding` against `weight`) and the order of the axes differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (teaches numpy the bfloat16 that safetensors returns)
import numpy as np

from d2g_jax.atomic import replacing
from d2g_jax.errors import UserError
from d2g_jax.models.network import Params

STEMS = ("diffusion_pytorch_model", "model")
"""File stems that diffusers and transformers write, looked for in this order."""

_TORCH_LEAF = dict.fromkeys(("kernel", "scale", "embedding"), "weight") | {"mean": "running_mean", "var": "running_var"}
_IGNORABLE = ("position_ids", "num_batches_tracked")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(r"^(.*attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))$")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def load_state_dict(path: str | Path, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Reads the tensors of a safetensors file, or of the model folder that holds one.

    In a folder the plain file comes first, then the `.fp16.` variant; either may be split into shards with an index.
    Floating-point tensors are cast to `dtype` (None keeps what is stored). Raises `UserError` for a folder without
    safetensors (a pickle is named and refused), a missing shard and a damaged or truncated file.
    """
    path = Path(path)
    state: dict[str, np.ndarray] = {}
    for file in _files(path):
        state.update(_cast(_read(file), dtype))
    return state


def to_params(state: Mapping[str, np.ndarray], abstract: Params, *, source: str | Path) -> Params:
    """PyTorch tensors as a float32 parameter tree with the paths and shapes of `abstract` (`Network.abstract()`).

    Accepts the old names of the VAE's attention (`query`, `key`, `value`, `proj_attn`) and CLIP keys without their
    `text_model.` prefix; `position_ids` and `num_batches_tracked` are not parameters and are left out. Raises
    `UserError` that names `source` and the key for a missing, extra or wrongly shaped tensor and for NaN or infinity.
    """
    expected = {_torch_key(path): (path, leaf) for path, leaf in _leaves(abstract)}
    renamed: dict[str, str] = {}
    for key in state:
        name = _canonical(key, expected)
        if name in expected:
            if name in renamed:
                raise UserError(f"{source}: {key} and {renamed[name]} are the same tensor; keep one of them")
            renamed[name] = key
        elif key.rpartition(".")[2] not in _IGNORABLE:
            raise UserError(f"{source}: unexpected tensor {key}; the network of its config.json has no such parameter")
    params: Params = {}
    for name, (path, leaf) in expected.items():
        if name not in renamed:
            raise UserError(f"{source}: tensor {name} is missing; the network of its config.json needs it")
        _put(params, path, _to_leaf(state[renamed[name]], path, leaf.shape, f"{source}: tensor {renamed[name]}"))
    return params


def to_state_dict(params: Params) -> dict[str, np.ndarray]:
    """A parameter tree as PyTorch tensors under PyTorch names, on the host: the exact inverse of `to_params`."""
    return {
        _torch_key(path): np.ascontiguousarray(_torch_axes(np.asarray(jax.device_get(leaf)), path[-1]))
        for path, leaf in _leaves(params)
    }


def torch_shapes(abstract: Params) -> dict[str, tuple[int, ...]]:
    """PyTorch name -> PyTorch shape of every leaf of a tree (`Network.abstract()`); no array is read."""
    return {_torch_key(path): _torch_shape(leaf.shape, path[-1]) for path, leaf in _leaves(abstract)}


def save_state_dict(state: Mapping[str, np.ndarray], file: str | Path, dtype: Any = None) -> None:
    """Writes one safetensors file, atomically; floating-point tensors are cast to `dtype` (None keeps theirs).

    Raises `UserError` when a finite value overflows in `dtype` or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    file = Path(file)
    tensors = _cast(state, dtype)
    if dtype is not None:
        for key, value in tensors.items():
            if not _finite(value) and _finite(state[key]):
                raise UserError(f"{file}: tensor {key} overflows in {np.dtype(dtype).name}; write float32 instead")
    try:
        with replacing(file) as temporary:
            # transformers refuses files that do not name the framework they were written for
            save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors wraps what the system says, a full disk among others
        raise UserError(f"cannot write {file}: {error}; give a writable place with room") from error


def load_params(folder: str | Path, abstract: Params) -> Params:
    """`to_params(load_state_dict(folder), abstract)`: one model folder of a pipeline as a float32 tree."""
    return to_params(load_state_dict(folder), abstract, source=folder)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix in _PICKLES:
            raise UserError(f"{path}: pickle files are refused because they can run code; convert it to safetensors")
        return _shards(path) if path.suffix == ".json" else [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such model file or folder")
    for variant in ("", ".fp16"):
        for stem in STEMS:
            if (single := path / f"{stem}{variant}.safetensors").is_file():
                return [single]
            if (index := path / f"{stem}.safetensors.index{variant}.json").is_file():
                return _shards(index)
    for file in sorted(path.iterdir()):
        if file.suffix in _PICKLES:
            raise UserError(f"{file}: pickle files are refused because they can run code; convert it to safetensors")
    raise UserError(f"{path}: holds no weights; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a safetensors index with a weight_map; fetch the folder again") from error
    files = [index.parent / str(name) for name in names]
    for file in files:
        if file.parent.resolve() != index.parent.resolve():
            raise UserError(f"{index}: shard {file.name} lies outside the folder; fetch the folder again")
        if not file.is_file():
            raise UserError(f"{file}: shard named by {index.name} is missing; fetch the folder again")
    return files


def _read(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _is_float(array: np.ndarray) -> bool:
    return bool(jax.numpy.issubdtype(array.dtype, np.floating))


def _finite(array: np.ndarray) -> bool:
    return not _is_float(array) or bool(np.isfinite(array).all())


def _cast(state: Mapping[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    if dtype is None:
        return dict(state)
    with np.errstate(over="ignore"):  # the caller looks for infinities and names the tensor
        return {key: value.astype(dtype, copy=False) if _is_float(value) else value for key, value in state.items()}


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, leaf) in the tree's own order; unlike jax.tree this keeps string keys such as "10" where they stand."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, tree


def _put(tree: Params, path: tuple[str, ...], leaf: np.ndarray) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = leaf


def _torch_key(path: tuple[str, ...]) -> str:
    return ".".join((*path[:-1], _TORCH_LEAF.get(path[-1], path[-1])))


def _canonical(key: str, expected: Mapping[str, Any]) -> str:
    """Today's name of a stored tensor, given the names that the network expects."""
    if key in expected:
        return key
    if f"text_model.{key}" in expected:
        return f"text_model.{key}"
    if old := _OLD_ATTENTION_KEY.match(key):
        return old[1] + _OLD_ATTENTION[old[2]] + old[3]
    return key


def _torch_axes(array: np.ndarray, leaf_name: str) -> np.ndarray:
    if leaf_name == "kernel" and array.ndim == 4:
        return array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    if leaf_name == "kernel" and array.ndim == 2:
        return array.T  # (in, out) -> (out, in)
    return array


def _torch_shape(shape: tuple[int, ...], leaf_name: str) -> tuple[int, ...]:
    return _torch_axes(np.broadcast_to(np.float32(0), shape), leaf_name).shape


def _to_leaf(array: np.ndarray, path: tuple[str, ...], shape: tuple[int, ...], where: str) -> np.ndarray:
    if path[-1] == "kernel" and array.ndim == 4:
        value = array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    elif path[-1] == "kernel" and array.ndim == 2:
        value = array.T  # (out, in) -> (in, out)
    else:
        value = array
    if value.shape != tuple(shape):
        expected = _torch_shape(shape, path[-1])
        raise UserError(f"{where} has shape {array.shape}, the network of its config.json needs {expected}")
    if not _finite(array):
        raise UserError(f"{where} holds NaN or infinity; fetch or export the weights again")
    return np.ascontiguousarray(value, dtype=np.float32)
