"""Published PyTorch weights of the metrics -> our metric folders, on the machine of whoever has the files.

Nobody's weights are in this package. Files are read as `inputs.torch_files` does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from d2g_jax.inputs.torch_files import StateDict, read_torch
from d2g_jax.losses.lpips import LPIPS, save_lpips
from d2g_jax.losses.perceptual import LATENT_SPACES, LatentLPIPS, LatentSpace, latent_space, save_metric
from d2g_jax.models import vgg
from d2g_jax.pipeline.weights import to_params, torch_shapes
from d2g_jax.runtime.errors import UserError

_RELEASE = "the file to convert is the release's {space}_latest_vgg16_tuned.pth"
_TORCHVISION = "the file to convert is torchvision's vgg16 (not vgg16_bn)"
_HEADS = "--heads is the lpips package's weights/v0.1/vgg.pth"
_SLICES = range(len(vgg.PIXELS.widths))


def convert(source: Path, out: Path, space: str | None = None, heads: Path | None = None) -> Path:
    """Writes the metric folder `out` from a PyTorch file and returns `out`.

    With `space`, a latent space's name: `source` is the release's `{space}_latest_vgg16_tuned.pth`, and
    `LatentLPIPS.load` reads the folder. With `heads`, a file: `source` is torchvision's vgg16 state dict, whose
    classifier is left out, `heads` the lpips package's heads for it, and `LPIPS.load` reads the folder.

    Raises:
      UserError: one line, for both or neither of `space` and `heads`, an unknown space, an `out` that holds a metric,
        PyTorch not installed, a file that is missing, damaged or holds more than tensors, tensors that are missing,
        extra, wrongly shaped or not finite, another space's channels, and negative heads. `out` is touched only after
        all of these, and is a metric only when its last file, config.json, is there.
    """
    source, out = Path(source), Path(out)
    if (space is None) == (heads is None):
        raise UserError(
            f"{source}: give either --space=NAME ({', '.join(s.name for s in LATENT_SPACES)}; a released LatentLPIPS) "
            "or --heads=FILE (torchvision's vgg16 and the lpips package's heads)"
        )
    if (out / "config.json").exists():
        raise UserError(f"{out}: holds a metric already; give --out a new folder")
    if space is not None:
        _convert_latent(source, out, latent_space(space))
    else:
        _convert_pixels(source, Path(heads), out)
    return out


def _convert_latent(source: Path, out: Path, space: LatentSpace) -> None:
    config = vgg.VGGConfig(in_channels=space.channels)
    state, hint = read_torch(source), _RELEASE.format(space=space.name)
    trunk = {f"net.{key}": shape for key, shape in torch_shapes(vgg.build_training(config).abstract()).items()}
    _check_space(state, space, source)
    twins = {f"lins.{i}.model.1.weight": _head(i) for i in _SLICES}
    means = (key for key in trunk if key.endswith("running_mean"))
    counters = {key.replace("running_mean", "num_batches_tracked") for key in means}
    _check_layout(state, trunk | _head_shapes(config), {*twins, *counters}, source, hint)
    for twin, key in twins.items():
        if twin in state and not np.array_equal(state[twin], state[key]):
            raise UserError(f"{source}: tensors {twin} and {key} should be copies and differ; fetch the file again")
    net = {key.removeprefix("net."): state[key] for key in trunk}
    params, heads = to_params(net, vgg.build_training(config).abstract(), source=source), _heads(state)
    LatentLPIPS.from_params(config, params, heads, space, source=str(source))  # refuses bad heads in the source's name
    save_metric(out, config, params, heads, space)


def _convert_pixels(source: Path, heads_file: Path, out: Path) -> None:
    network = vgg.build(vgg.PIXELS)
    shapes = torch_shapes(network.abstract())
    names = {key: f"features.{key.partition('.')[2]}" for key in shapes}  # slice2.5.weight -> features.5.weight
    state, lins = read_torch(source), read_torch(heads_file)
    classifier = {key for key in state if key.startswith("classifier.")}
    _check_layout(state, {names[key]: shape for key, shape in shapes.items()}, classifier, source, _TORCHVISION)
    _check_layout(lins, _head_shapes(vgg.PIXELS), (), heads_file, _HEADS)
    params = to_params({key: state[name] for key, name in names.items()}, network.abstract(), source=source)
    LPIPS.from_params(params, _heads(lins), source=str(heads_file))  # refuses bad heads in their file's name
    save_lpips(out, params, _heads(lins))


def _head(index: int) -> str:
    return f"lin{index}.model.1.weight"


def _head_shapes(config: vgg.VGGConfig) -> dict[str, tuple[int, ...]]:
    return {_head(i): (1, width, 1, 1) for i, width in enumerate(config.widths)}


def _heads(state: StateDict) -> list[np.ndarray]:
    return [state[_head(i)].reshape(-1) for i in _SLICES]


def _check_space(state: StateDict, space: LatentSpace, source: Path) -> None:
    """Raises `UserError` when the first convolution reads another number of channels than the space has."""
    shape = np.shape(state.get("net.slice1.0.weight", ()))
    if len(shape) == 4 and shape[1] != space.channels:
        others = [other.name for other in LATENT_SPACES if other.channels == shape[1]]
        remedy = f"give --space={' or '.join(others)}" if others else "no space that is known here has so many"
        raise UserError(f"{source}: reads latents of {shape[1]} channels; {space.name} has {space.channels}; {remedy}")


def _check_layout(
    state: StateDict, shapes: Mapping[str, tuple[int, ...]], ignored: Collection[str], source: Path, hint: str
) -> None:
    """Raises `UserError` unless the tensors are those of `shapes`, in floating point, and at most `ignored` besides."""
    missing = [key for key in shapes if key not in state]
    extra = [key for key in state if key not in shapes and key not in ignored]
    for keys, what in ((missing, "is missing"), (extra, "is unexpected")):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise UserError(f"{source}: tensor {keys[0]} {what}{more}; {hint}")
    for key, shape in shapes.items():
        if state[key].shape != shape or state[key].dtype.kind != "f":
            found = f"{state[key].dtype} {state[key].shape}"
            raise UserError(f"{source}: tensor {key} is {found}, not floating point {shape}; {hint}")
