"""diffusers and transformers safetensors <-> our parameter trees, by rule in both directions.

Attribute names in `d2g_jax.models` are those of the PyTorch state dict, so a leaf's path is its key; only the last part
(`kernel`, `scale`, `embedding` against `weight`) and the order of the axes differ.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  (teaches numpy the bfloat16 that safetensors returns)
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from d2g_jax.inputs.text import check_fetched
from d2g_jax.models.network import Params
from d2g_jax.runtime.atomic import replacing
from d2g_jax.runtime.errors import UserError

STEMS = ("diffusion_pytorch_model", "model")
"""File stems that diffusers and transformers write, looked for in this order."""

VARIANTS = ("", ".fp16", ".bf16")
"""What may stand behind a stem, looked for in this order: the plain file comes first."""

Place = Callable[[tuple[str, ...], np.ndarray], Any]
"""(path of a leaf, float32 array) -> what stands in the tree in its place."""

_TORCH_LEAF = dict.fromkeys(("kernel", "scale", "embedding"), "weight") | {"mean": "running_mean", "var": "running_var"}
_IGNORABLE = ("position_ids", "num_batches_tracked")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(r"^(.*attentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))$")
_LAYER = re.compile(r"^(?:text_model\.)?(encoder\.layers\.\d+)\.")
_FIRST = "text_model.encoder.layers.0.layer_norm1.weight"
_POINTWISE_KEY = re.compile(r"(^|\.)attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def load_state_dict(path: str | Path, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Reads the tensors of a safetensors file, or of the model folder that holds one.

    In a folder the plain file comes first, then the `.fp16.` and the `.bf16.` variant, each maybe in shards with an
    index. Floating-point tensors are cast to `dtype` (None keeps what is stored). Raises `UserError` for a folder
    without safetensors (a pickle is named and refused), a missing shard and a damaged or truncated file.
    """
    path = Path(path)
    state: dict[str, np.ndarray] = {}
    for file in _files(path):
        state.update(_cast(_read(file), dtype))
    return state


def to_params(state: Mapping[str, np.ndarray], abstract: Params, *, source: str | Path) -> Params:
    """PyTorch tensors as a float32 parameter tree with the paths and shapes of `abstract` (`Network.abstract()`).

    Accepts the old names of the VAE's attention (`query`, `key`, `value`, `proj_attn`), its weights as 1x1 convolutions
    and CLIP keys without their `text_model.` prefix; `position_ids` and `num_batches_tracked` are not parameters and
    are left out. Raises `UserError` that names `source` and the key for a missing, extra or wrongly shaped tensor and
    for NaN or infinity.
    """
    stored = {key: Stored(source, key, value.shape, partial(np.asarray, value)) for key, value in state.items()}
    return _tree(_matched(stored, abstract, source), None)


def to_state_dict(params: Params) -> dict[str, np.ndarray]:
    """A parameter tree as PyTorch tensors under PyTorch names, on the host: the exact inverse of `to_params`."""
    return {
        _torch_key(path): np.ascontiguousarray(_torch_axes(np.asarray(jax.device_get(leaf)), path[-1]))
        for path, leaf in flatten_dict(params).items()
    }


def torch_shapes(abstract: Params) -> dict[str, tuple[int, ...]]:
    """PyTorch name -> PyTorch shape of every leaf of a tree (`Network.abstract()`); no array is read."""
    return {_torch_key(path): _torch_shape(leaf.shape, path[-1]) for path, leaf in flatten_dict(abstract).items()}


def save_state_dict(
    state: Mapping[str, np.ndarray], file: str | Path, dtype: Any = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one safetensors file, atomically; floating-point tensors are cast to `dtype` (None keeps theirs).

    `metadata` goes into its header. Raises `UserError` when a finite value overflows in `dtype` or the file cannot be
    written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    file = Path(file)
    # safetensors writes memory as it lies; `np.ascontiguousarray` alone would give a scalar an axis.
    tensors = {key: np.ascontiguousarray(x).reshape(x.shape) for key, x in _cast(state, dtype).items()}
    if dtype is not None:
        for key, value in tensors.items():
            if not _finite(value) and _finite(state[key]):
                raise UserError(f"{file}: tensor {key} overflows in {np.dtype(dtype).name}; write float32 instead")
    try:
        with replacing(file) as temporary:
            # transformers refuses files that do not name the framework they were written for
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # safetensors wraps what the system says, a full disk among others
        raise UserError(f"cannot write {file}: {error}; give a writable place with room") from error


def load_params(
    folder: str | Path,
    abstract: Params,
    place: Place | None = None,
    arrange: Callable[[Any], Mapping[str, Stored]] | None = None,
) -> Params:
    """The weights of one model folder, or file, as a tree with the paths and shapes of `abstract`, leaf by leaf.

    `place(path, leaf)` gets every leaf as soon as it is float32 in our layout, and its result stands in the tree; None
    keeps the arrays. Files are read lazily: with a `place` that moves leaves to devices the host holds about one leaf.
    `arrange` is for files of another layout than diffusers': what they hold by key -> the same by PyTorch's names.

    Raises `UserError` as `load_state_dict` and `to_params` do; what the headers tell (missing, extra or wrongly shaped
    tensors, damaged files) before the first tensor is read, NaN or infinity at its tensor.
    """
    with ExitStack() as opened:
        stored: dict[str, Stored] = {}
        for file in _files(Path(folder)):
            stored |= _headers(file, opened.enter_context(_open(file)))
        return _tree(_matched(stored if arrange is None else arrange(stored), abstract, folder), place)


def read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shape of each tensor by its key, and text by name, of one safetensors file, without its tensors.

    Raises `UserError` for a pickle and for a damaged or truncated file.
    """
    (file,) = _files(file)
    with _open(file) as handle:
        return {key: found.shape for key, found in _headers(file, handle).items()}, handle.metadata() or {}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix in _PICKLES:
            raise UserError(f"{path}: pickle files are refused because they can run code; convert it to safetensors")
        return _shards(path) if path.suffix == ".json" else [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such model file or folder")
    for variant in VARIANTS:
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


@contextmanager
def _reading(file: str | Path) -> Iterator[None]:
    """Says of a failure to read `file` what to do about it."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        remedy = "fetch it again, or save it again with safetensors where other programs read it"
        raise UserError(f"{file}: not a whole safetensors file ({error}); {remedy}") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped: its header is checked here, its tensors are read one by one."""
    from safetensors import safe_open

    with _reading(file):
        with file.open("rb") as stream:
            check_fetched(file, stream.read(64))
        handle = safe_open(file, framework="numpy")
    with handle:
        yield handle


class Stored(NamedTuple):
    """A tensor that can be read: where it lies, its shape there, and how."""

    source: str | Path
    key: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def _headers(file: Path, handle: Any) -> dict[str, Stored]:
    """What an open file holds, by key."""
    stored = {}
    for key in handle.keys():  # noqa: SIM118  (not a dict)
        header = handle.get_slice(key)
        if header.get_dtype() not in _DTYPES:
            raise UserError(f"{file}: tensor {key} is stored as {header.get_dtype()}; export it as float16 or float32")
        stored[key] = Stored(file, key, tuple(header.get_shape()), partial(handle.get_tensor, key))
    return stored


def _read(file: Path) -> dict[str, np.ndarray]:
    with _open(file) as handle, _reading(file):
        return {key: tensor.read() for key, tensor in _headers(file, handle).items()}


def _is_float(array: np.ndarray) -> bool:
    return bool(jax.numpy.issubdtype(array.dtype, np.floating))


def _finite(array: np.ndarray) -> bool:
    return not _is_float(array) or bool(np.isfinite(array).all())


def _cast(state: Mapping[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    if dtype is None:
        return dict(state)
    with np.errstate(over="ignore"):  # the caller looks for infinities and names the tensor
        return {key: value.astype(dtype, copy=False) if _is_float(value) else value for key, value in state.items()}


def _torch_key(path: tuple[str, ...]) -> str:
    return ".".join((*path[:-1], _TORCH_LEAF.get(path[-1], path[-1])))


def _matched(
    stored: Mapping[str, Stored], abstract: Params, source: str | Path
) -> list[tuple[tuple[str, ...], int, Stored]]:
    """(path, number of axes, stored tensor) of every leaf; `UserError` for a missing, extra or wrongly shaped one."""
    expected = {_torch_key(path): (path, leaf) for path, leaf in flatten_dict(abstract).items()}
    renamed: dict[str, str] = {}
    surplus: list[str] = []
    for key, tensor in stored.items():
        name = _canonical(key, expected)
        if name in expected:
            if name in renamed:
                raise UserError(f"{source}: {key} and {renamed[name]} are the same tensor; keep one of them")
            renamed[name] = key
        elif layer := _surplus_layer(name, expected):
            surplus.append(layer)
        elif key.rpartition(".")[2] not in _IGNORABLE:
            raise UserError(
                f"{tensor.source}: unexpected tensor {key}; the network of its config.json has no such parameter"
            )
    if surplus:
        layers = ", ".join(dict.fromkeys(surplus))
        warnings.warn(f"{source}: {layers} left unread: config.json has fewer num_hidden_layers", stacklevel=2)
    matched = []
    for name, (path, leaf) in expected.items():
        if name not in renamed:
            raise UserError(f"{source}: tensor {name} is missing; the network of its config.json needs it")
        tensor, shape = stored[renamed[name]], _torch_shape(leaf.shape, path[-1])
        pointwise = _POINTWISE_KEY.search(name) is not None and tensor.shape == (*shape, 1, 1)
        if tensor.shape != shape and not pointwise:
            where = f"{tensor.source}: tensor {tensor.key}"
            raise UserError(f"{where} has shape {tensor.shape}, the network of its config.json needs {shape}")
        matched.append((path, len(leaf.shape), tensor))
    return matched


def _canonical(key: str, expected: Mapping[str, Any]) -> str:
    """Today's name of a stored tensor, given the names that the network expects."""
    if key in expected:
        return key
    if f"text_model.{key}" in expected:
        return f"text_model.{key}"
    if old := _OLD_ATTENTION_KEY.match(key):
        return old[1] + _OLD_ATTENTION[old[2]] + old[3]
    return key


def _surplus_layer(name: str, expected: Mapping[str, Any]) -> str:
    """The layer of a text tower that a tensor belongs to, behind the last that its config has; "" for any other.

    Fewer num_hidden_layers than there are layers is how diffusers' maintainers skip the last of CLIP.
    """
    layer = _LAYER.match(name)
    if not layer or _FIRST not in expected or f"text_model.{layer[1]}.layer_norm1.weight" in expected:
        return ""
    return layer[1]


def _torch_axes(array: np.ndarray, leaf_name: str) -> np.ndarray:
    if leaf_name == "kernel" and array.ndim == 4:
        return array.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    if leaf_name == "kernel" and array.ndim == 2:
        return array.T  # (in, out) -> (out, in)
    return array


def _torch_shape(shape: tuple[int, ...], leaf_name: str) -> tuple[int, ...]:
    return _torch_axes(np.broadcast_to(np.float32(0), shape), leaf_name).shape


def _tree(matched: list[tuple[tuple[str, ...], int, Stored]], place: Place | None) -> Params:
    """Reads, converts and places one tensor after the other, and keeps no reference to what is done."""
    params = {}
    for path, ndim, tensor in matched:
        leaf = _to_leaf(tensor, path, ndim)
        params[path] = leaf if place is None else place(path, leaf)
        del leaf  # or it would live on while the next one is read
    return unflatten_dict(params)


def _to_leaf(tensor: Stored, path: tuple[str, ...], ndim: int) -> np.ndarray:
    """A stored tensor as a contiguous float32 leaf of `ndim` axes; `UserError` for NaN and infinity."""
    with _reading(tensor.source):
        array = tensor.read()
    if path[-1] == "kernel" and ndim == 4:
        array = array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
    elif path[-1] == "kernel" and ndim == 2:
        array = array.reshape(array.shape[:2]).T  # (out, in) or (out, in, 1, 1) -> (in, out)
    with np.errstate(over="ignore"):  # float64 that overflows is the infinity that is looked for below
        leaf = np.ascontiguousarray(array, dtype=np.float32)
    if not _finite(leaf):
        raise UserError(
            f"{tensor.source}: tensor {tensor.key} holds NaN or infinity; fetch or export the weights again"
        )
    return leaf
