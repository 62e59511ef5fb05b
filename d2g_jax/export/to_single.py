"""One safetensors file in the original layout, and beside it how ComfyUI draws with it.

What reading it again takes, configs and the timestep, stands in the file's header.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.export import comfyui, folders
from d2g_jax.pipeline import weights
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.original_keys import original_places, prefixes, to_original
from d2g_jax.pipeline.single_file import HEADER
from d2g_jax.runtime.atomic import write_json, write_text
from d2g_jax.sample import exported


def write(pipeline: Pipeline, timestep: int | None, out: Path, dtype: str, *, whole: bool) -> None:
    """Writes the folder `out` with NAME.safetensors, and of a student NAME.workflow.json and a model card.

    With timestep None it is a teacher; `whole` False is the UNet alone. All of it is in `dtype`.
    """
    description = exported.describe(pipeline, timestep, "single", dtype)
    if whole:
        description["settings"] = folders.settings(pipeline)
    state = original_state(pipeline, ("unet",) if not whole else tuple(pipeline.params))
    file = f"{out.name}.safetensors"
    with folders.source_of(pipeline) as source, folders.new_folder(out) as folder:
        folders.copy(source, folder, folders.license_files(folders.file_names(source)))
        weights.save_state_dict(state, folder / file, np.dtype(dtype), {HEADER: json.dumps(description)})
        if timestep is not None:
            drawn = comfyui.workflow(pipeline, timestep, file, whole=whole)
            if drawn is not None:
                write_json(folder / f"{out.name}.workflow.json", drawn, ensure_ascii=False)
            write_text(folder / "README.md", model_card(description, out.name, whole=whole))


def original_state(pipeline: Pipeline, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The tensors of some of a pipeline's networks under their original names."""
    before, state = prefixes(pipeline.networks), {}
    for name in names:
        tensors = weights.to_state_dict(pipeline.params[name])
        state |= to_original(tensors, original_places(pipeline.networks[name].config, tensors, before[name]))
    return state


def model_card(description: Mapping[str, Any], name: str, *, whole: bool) -> str:
    """README.md of a student: where it goes, how it is drawn with and where it comes from."""
    part, place = ("The whole model", "checkpoints") if whole else ("The UNet alone", "diffusion_models")
    file = shlex.quote(f"{name}.safetensors")
    call = f"--model={file}" if whole else f"--model=TEACHER --unet={file}"
    fields = {"name": name, "part": part, "place": place, "call": call}
    return folders.filled_in("card_single.md", description, fields)
