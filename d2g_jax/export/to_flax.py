"""A folder of Orbax parameters with everything else as the JSON and tokenizer files of a diffusers folder."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from d2g_jax.export import folders
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import EXTRAS, SETTINGS
from d2g_jax.runtime.atomic import write_json
from d2g_jax.sample import exported
from d2g_jax.train.checkpoint import writing

_PARTS = {
    "params": "Orbax StandardCheckpointer tree {network: parameters}; NHWC and HWIO layout, '/' joins the paths",
    "unet": "config.json of the network, as in diffusers; so are those of the other networks",
    "tokenizer": "CLIP tokenizer files; tokenizer_2 is SDXL's second",
    "scheduler": "the teacher's noise schedule, as in diffusers",
    "model_index.json": "pipeline class and classes of the components, as in diffusers",
}


def write(pipeline: Pipeline, timestep: int | None, out: Path, dtype: str) -> None:
    """Writes a student, or with timestep None a teacher. `exported.load_pipeline` reads it."""
    with folders.source_of(pipeline) as source, folders.new_folder(out) as folder:
        names = folders.file_names(source)
        for component in (*pipeline.params, *SETTINGS):
            folders.copy(source, folder, folders.settings_files(names, component))
        if pipeline.classes is not None:  # whose files may lie at the root
            write_json(folder / "unet" / "config.json", pipeline.unet.config.to_json())
            write_json(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler)
        folders.copy(source, folder, folders.license_files(names))
        params = exported.store(pipeline.params, jnp.dtype(dtype))
        with writing(out):
            exported.save_params(folder, params)
        description = exported.describe(pipeline, timestep, "flax", dtype)
        write_json(folder / exported.DESCRIPTION, {**description, "parts": _PARTS}, ensure_ascii=False)
        index = {key: [None, None] if key in EXTRAS else value for key, value in pipeline.index.items()}
        write_json(folder / "model_index.json", index, ensure_ascii=False)
