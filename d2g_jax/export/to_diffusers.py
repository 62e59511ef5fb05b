"""A folder that diffusers' unmodified pipeline classes load, and whose one DDIM step is our one-step generator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.diffusion.schedule import STUDENT, Schedule
from d2g_jax.export import folders
from d2g_jax.models.network import Params
from d2g_jax.pipeline import weights
from d2g_jax.pipeline.folder import Pipeline, save_pipeline
from d2g_jax.pipeline.hub import EXTRAS, NETWORKS
from d2g_jax.runtime.atomic import write_json, write_text
from d2g_jax.sample import exported

_BETA_DEFAULTS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
"""diffusers' own, written out because they are part of the model."""


def write(pipeline: Pipeline, timestep: int | None, out: Path, dtype: str, anew: Sequence[str] = ("unet",)) -> None:
    """Writes a student, or with timestep None a teacher as it is. Only networks in `anew` and the scheduler are new."""
    with folders.source_of(pipeline) as source, folders.new_folder(out) as folder:
        names, scheduler = folders.file_names(source), pipeline.scheduler
        folders.copy(source, folder, folders.license_files(names))
        if timestep is not None:
            scheduler = one_step_scheduler(scheduler, timestep)
            description = exported.describe(pipeline, timestep, "diffusers", dtype)
            write_json(folder / exported.DESCRIPTION, description, ensure_ascii=False)
        if pipeline.classes is not None:  # a teacher of images: its UNet and its scheduler are all there is
            configs = {"unet": pipeline.unet.config, "scheduler": scheduler}
            return save_pipeline(folder, configs, pipeline.params, {}, np.dtype(dtype))
        index, left_out = _index(pipeline.index, names)
        for component in [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]:
            if component in NETWORKS:
                _write_network(pipeline, component, source, folder, names, dtype, component in anew)
            elif component != "scheduler" or timestep is None:
                folders.copy(source, folder, folders.component_files(names, component))
        if timestep is not None:
            index["scheduler"] = ["diffusers", "DDIMScheduler"]
            write_json(folder / "scheduler" / "scheduler_config.json", scheduler, ensure_ascii=False)
            card = model_card(description, index["_class_name"], out.name, left_out)
            write_text(folder / "README.md", card)
        write_json(folder / "model_index.json", index, ensure_ascii=False)


def one_step_scheduler(config: Mapping[str, Any], timestep: int) -> dict[str, Any]:
    """The `scheduler_config.json` whose only step starts at `timestep` and ends at x_0: exactly `diffusion.one_step`.

    With trailing spacing and one step DDIM starts at the last timestep, so the schedule is cut off behind `timestep`;
    with set_alpha_to_one it lands on alpha_bar = 1, where what is left is its estimate of x_0.
    """
    schedule = Schedule.from_config(config)
    if schedule.karras is not None:  # whose last place is sigma_max, where diffusers' only step starts too
        return {**config, STUDENT: timestep}
    if timestep == schedule.num_train_timesteps - 1:
        kept = ("trained_betas", "rescale_betas_zero_snr")
        betas = {**_BETA_DEFAULTS, **{key: config[key] for key in (*_BETA_DEFAULTS, *kept) if key in config}}
    else:
        betas = {"trained_betas": _first_betas(schedule, timestep + 1)}
    return {
        "_class_name": "DDIMScheduler",
        STUDENT: timestep,
        "num_train_timesteps": timestep + 1,
        **betas,
        "prediction_type": schedule.prediction_type,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # other values make StableDiffusionPipeline warn; trailing does not read it
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
    }


def _first_betas(schedule: Schedule, count: int) -> list[float]:
    """Betas whose cumulative product is the schedule's, any rescaling included; float32 in the fewest digits."""
    alphas_cumprod = schedule.alphas_cumprod[:count].astype(np.float64)
    betas = 1.0 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    return [float(str(beta)) for beta in betas.astype(np.float32)]


def _index(index: Mapping[str, Any], names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`model_index.json` of what is carried over, and the extras that are not: missing, or there as pickles only."""
    named = [name for name in EXTRAS if isinstance(index.get(name), list) and index[name][0] is not None]
    carried = [name for name in named if folders.component_files(names, name) and not folders.is_pickled(names, name)]
    left_out = [name for name in named if name not in carried]
    kept = {**index, **{name: [None, None] for name in left_out}}
    if "safety_checker" in left_out and "requires_safety_checker" in kept:
        kept["requires_safety_checker"] = False
    return kept, left_out


def _write_network(
    pipeline: Pipeline, name: str, source: Path, folder: Path, names: list[str], dtype: str, anew: bool
) -> None:
    files, settings = folders.component_files(names, name), folders.settings_files(names, name)
    if not anew and files != settings:
        folders.copy(source, folder, files)
        return
    folders.copy(source, folder, settings)
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    params: Params = pipeline.params[name]
    # what came from a Flax folder has no safetensors to copy, and keeps what it is stored in
    kept = np.dtype(dtype) if name == "unet" or pipeline.folder.is_file() else None
    weights.save_state_dict(weights.to_state_dict(params), folder / name / f"{stem}.safetensors", kept)


def model_card(description: Mapping[str, Any], class_name: str, name: str, left_out: list[str]) -> str:
    """README.md of a student: how to call it and where it comes from."""
    lost = f"\nNot carried over from the teacher's folder: {', '.join(left_out)}.\n" if left_out else ""
    fields = {"class_name": class_name, "name": name, "quoted": json.dumps(name), "lost": lost}
    return folders.filled_in("card_diffusers.md", description, fields)
