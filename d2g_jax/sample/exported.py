"""What `d2g export` leaves in a folder for us to read again: its description, and Flax parameters.

Apart from `d2g_jax.export`, which writes these folders, because `d2g_jax.sample.sampler` reads them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.inputs.text import read_json
from d2g_jax.models.network import Params
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import NETWORKS
from d2g_jax.pipeline.single_file import described
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.version import __version__

DESCRIPTION = "d2g.json"
"""The description's file name."""

PARAMS = "params"
"""The Orbax tree's folder."""

FORMATS = ("diffusers", "single", "flax", "lora", "stablehlo")
VERSION = 1
"""Of the description: raised when a reader of the old one would go wrong."""

_HUB_CACHE = re.compile(r"/models--(.+?)--(.+?)/snapshots/")


def describe(pipeline: Pipeline, timestep: int | None, form: str, dtype: str) -> dict[str, Any]:
    """What every export says of itself: the content of `DESCRIPTION` before what is particular to `form`."""
    return {
        "format": form,
        "version": VERSION,
        "timestep": timestep,
        "teacher": teacher_name(pipeline.folder),
        "prediction_type": Schedule.from_config(pipeline.scheduler).prediction_type,
        "scaling_factor": pipeline.scaling_factor,
        "latent_shape": dict(zip(("height", "width", "channels"), pipeline.latent_shape, strict=True)),
        "dtype": dtype,
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "d2g_jax": __version__},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def teacher_name(folder: Path) -> str:
    """The hub id of a folder in the hub's cache, else the folder's name: no path of this machine gets into an export.

    Of an export it is the teacher that its description names.
    """
    known = read_description(folder).get("teacher")
    cached = _HUB_CACHE.search(f"{folder.absolute().as_posix()}/")
    return known or ("/".join(cached.groups()) if cached else folder.absolute().name.removesuffix(".safetensors"))


def read_description(folder: Path) -> dict[str, Any]:
    """The description of an exported folder, or single file; empty where there is none, as of a teacher.

    Raises `UserError` for one that is damaged, of a later version or of a format that is no folder.
    """
    file = folder if folder.is_file() else folder / DESCRIPTION
    if not file.is_file():
        return {}
    value = described(folder) if folder.is_file() else read_json(file, "export the student again")
    if not value and folder.is_file():
        return {}
    timestep = value.get("timestep")
    if "timestep" not in value or not (timestep is None or (type(timestep) is int and timestep >= 0)):
        raise UserError(f"{file}: timestep must be a number from 0 or null, not {timestep!r}; export the student again")
    if value.get("version", VERSION) != VERSION:
        raise UserError(f"{file}: version {value['version']!r} is not {VERSION}; take the d2g_jax that wrote it")
    if value.get("format", "diffusers") not in FORMATS[:-1]:
        raise UserError(f"{file}: format {value['format']!r} is unknown; expected {', '.join(FORMATS[:-1])}")
    return value


def stored_shapes(shapes: Params, dtype: Any) -> Params:
    """What `store` makes of a tree, of its shapes alone."""
    return jax.eval_shape(lambda params: _narrow(params, dtype), shapes)


def _narrow(params: Params, dtype: Any) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.astype(dtype) if _is_wide(path) else leaf, params)


def store(params: Params, dtype: Any) -> Params:
    """Kernels and embeddings in `dtype`, the rest float32, as `Pipeline.load` keeps them.

    Raises `UserError` when a value overflows in `dtype`.
    """

    @jax.jit  # one program: cast leaf by leaf, every shape would be compiled by itself
    def cast(params: Params) -> tuple[Params, Params]:
        narrow = _narrow(params, dtype)
        return narrow, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), narrow)

    if all(leaf.dtype == dtype for path, leaf in jax.tree_util.tree_leaves_with_path(params) if _is_wide(path)):
        return params
    narrow, finite = cast(params)
    for path, whole in jax.tree_util.tree_leaves_with_path(jax.device_get(finite)):
        if not whole:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"{name} overflows in {jnp.dtype(dtype).name}; take the dtype bfloat16 or float32")
    return narrow


def save_params(folder: Path, params: Mapping[str, Params]) -> None:
    """Writes parameter trees as one Orbax checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / PARAMS).absolute(), dict(params))


def load_pipeline(folder: Path, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None) -> Pipeline:
    """A Flax folder as a `Pipeline`, every leaf read straight into its shards.

    Args:
      folder: written by `d2g export --to=flax`.
      dtype: what the networks compute in and what their kernels and embeddings are kept in.
      mesh: where each leaf goes, by the rules of `mesh.leaf_spec`; None is the default device.

    Raises:
      UserError: one line that names the file, for whatever is missing or of another network.
    """
    if read_description(folder).get("format") != "flax":
        raise UserError(f"{folder / DESCRIPTION}: format is not flax; give a folder of `d2g export --to=flax`")
    pipeline = Pipeline.load(folder, dtype, mesh, without=NETWORKS)
    shapes = stored_shapes({name: network.abstract() for name, network in pipeline.networks.items()}, dtype)
    mesh = meshes.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    return replace(pipeline, params=_restore(folder / PARAMS, meshes.place(shapes, mesh)))


def _restore(folder: Path, like: dict[str, Params]) -> dict[str, Params]:
    if not folder.is_dir():
        raise UserError(f"{folder}: folder is missing; export the student again")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute(), like)
    except (ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: not the parameters of the networks beside it: {reason}") from error


def _is_wide(path: tuple[Any, ...]) -> bool:
    return path[-1].key in ("kernel", "embedding")
