"""Published PyTorch weights of the metrics -> our metric folders, on the machine of whoever has the files.

Nobody's weights are in this package. Files are read as `inputs.torch_files` does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from d2g_jax.inputs.torch_files import StateDict, read_torch
from d2g_jax.losses.lpips import LPIPS, save_lpips
from d2g_jax.losses.perceptual import (
    LATENT_SPACES,
    LatentLPIPS,
    LatentSpace,
    heads_of,
    latent_space,
    metric_tree,
    save_metric,
)
from d2g_jax.models import vgg
from d2g_jax.models.network import Params
from d2g_jax.pipeline.weights import to_params
from d2g_jax.runtime.errors import UserError

_RELEASE = "the file to convert is the release's {space}_latest_vgg16_tuned.pth"
_TORCHVISION = "the file to convert is torchvision's vgg16 (not vgg16_bn)"
_HEADS = "--heads is the lpips package's weights/v0.1/vgg.pth"


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
    config, state = vgg.VGGConfig(in_channels=space.channels), read_torch(source)
    _check_space(state, space, source)
    pairs = ((key, f"lin{key.removeprefix('lins.')}") for key in state if key.startswith("lins."))
    copies = {key: first for key, first in pairs if first in state}  # the release holds every head twice
    once = {key: value for key, value in state.items() if key not in copies}
    tree = _fitted(once, metric_tree(config), source, _RELEASE.format(space=space.name))
    for key, first in copies.items():
        if not np.array_equal(state[key], state[first]):
            raise UserError(f"{source}: tensors {key} and {first} should be copies and differ; fetch the file again")
    params, heads = tree["net"], heads_of(tree)
    LatentLPIPS.from_params(config, params, heads, space, source=str(source))  # refuses bad heads in the source's name
    save_metric(out, config, params, heads, space)


def _convert_pixels(source: Path, heads_file: Path, out: Path) -> None:
    slices, lins = vgg.build(vgg.PIXELS).abstract(), metric_tree(vgg.PIXELS)
    del lins["net"]
    layers = {number: layer for part in slices.values() for number, layer in part.items()}  # slice2.5 is features.5
    kept = {key: value for key, value in read_torch(source).items() if not key.startswith("classifier.")}
    found = _fitted(kept, {"features": layers}, source, _TORCHVISION)["features"]
    params = {name: {number: found[number] for number in part} for name, part in slices.items()}
    heads = heads_of({"net": params, **_fitted(read_torch(heads_file), lins, heads_file, _HEADS)})
    LPIPS.from_params(params, heads, source=str(heads_file))  # refuses bad heads in their file's name
    save_lpips(out, params, heads)


def _check_space(state: StateDict, space: LatentSpace, source: Path) -> None:
    """Raises `UserError` when the first convolution reads another number of channels than the space has."""
    shape = np.shape(state.get("net.slice1.0.weight", ()))
    if len(shape) == 4 and shape[1] != space.channels:
        others = [other.name for other in LATENT_SPACES if other.channels == shape[1]]
        remedy = f"give --space={' or '.join(others)}" if others else "no space that is known here has so many"
        raise UserError(f"{source}: reads latents of {shape[1]} channels; {space.name} has {space.channels}; {remedy}")


def _fitted(state: StateDict, abstract: Params, source: Path, hint: str) -> Params:
    """`to_params`, whose refusals end with `hint`; raises `UserError` for parameters of whole numbers too."""
    for key, value in state.items():
        if value.dtype.kind != "f" and not key.endswith("num_batches_tracked"):
            raise UserError(f"{source}: tensor {key} is {value.dtype}, not floating point; {hint}")
    try:
        return to_params(state, abstract, source=source)
    except UserError as error:
        raise UserError(f"{error}; {hint}") from error
