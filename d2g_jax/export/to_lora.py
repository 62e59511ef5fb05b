"""A student as a LoRA of its teacher: one file in diffusers' format, one in kohya's, and what the LoRA lacks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from d2g_jax.export import folders
from d2g_jax.export.to_diffusers import one_step_scheduler
from d2g_jax.models import lora
from d2g_jax.models.network import Params
from d2g_jax.pipeline import lora_files
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import NETWORKS
from d2g_jax.pipeline.single_file import HEADER
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.atomic import write_json
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample import exported
from d2g_jax.sample.model import Model
from d2g_jax.sample.sampler import Sampler

DRAWN = 4
"""Noises, with the empty prompt, by whose latents a LoRA is compared with its student."""

KOHYA_FILE = "comfyui.safetensors"
REPORT = "lora.json"


def write(sampler: Sampler, out: Path, dtype: str, rank: int | None) -> None:
    """Writes the folder; both files say in their headers that they are a student and of which timestep.

    A student that was trained as a LoRA is written as it is, or truncated to a lower rank. Of one that was trained
    whole each kernel's difference from the teacher's is truncated; biases and norms are the teacher's then.

    Raises `UserError` for a teacher, a rank above that of the training, and a whole student without a rank.
    """
    if sampler.timestep is None:
        raise UserError("to=lora exports the difference of a student from its teacher, and this is a teacher")
    update, errors = _update(sampler, rank)
    described = exported.describe(sampler.pipeline, sampler.timestep, "lora", dtype)
    ranks = sorted({len(parts["up"]) for parts in update.values()})
    report = {**described, "ranks": ranks, "relative_error_of_latents": _error_of_latents(sampler, update)}
    report |= {"relative_error_of_kernels": {path: float(f"{error:.4g}") for path, error in errors.items()}}
    with folders.new_folder(out) as folder:
        for form, file in (("diffusers", lora_files.FOLDERS_FILE), ("kohya", KOHYA_FILE)):
            said = {HEADER: json.dumps(described)}
            lora_files.write({"unet": update}, folder / file, form, sampler.pipeline, np.dtype(dtype), said)
        scheduler = one_step_scheduler(sampler.pipeline.scheduler, sampler.timestep)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler, ensure_ascii=False)
        write_json(folder / REPORT, report, ensure_ascii=False)


def _update(sampler: Sampler, rank: int | None) -> tuple[lora_files.Update, dict[str, float]]:
    """The student's update by path, and the relative error of each kernel of it."""
    if sampler.lora is None:
        if rank is None:
            raise UserError("to=lora: this student was trained whole; give the rank of its LoRA, such as --rank=64")
        whole = _differences(sampler)
    else:
        trained = lora.flat(jax.device_get(sampler.lora), is_leaf=lambda path, part: "down" in part)
        most = max(len(parts["up"]) for parts in trained.values())
        if rank is not None and rank > most:
            raise UserError(f"rank={rank}: this student was trained with lora.rank={most}; give at most that, or none")
        if rank in (None, most):
            return trained, dict.fromkeys(trained, 0.0)
        whole = {path: np.tensordot(parts["down"], parts["up"], 1) for path, parts in trained.items()}
    truncated = {path: lora.truncate(difference, rank) for path, difference in whole.items()}
    update, errors = ({path: found[i] for path, found in truncated.items()} for i in (0, 1))
    return update, errors


def _differences(sampler: Sampler) -> dict[str, np.ndarray]:
    """Every kernel of a student minus the teacher's, float32, by path."""
    teacher, student = lora.flat(_teacher(sampler)), lora.flat(sampler.pipeline.params["unet"])
    paths = lora.target_paths(teacher, ("all",))
    found = {path: np.asarray(student[path]) - np.asarray(teacher[path]) for path in paths}
    if not any(map(np.any, found.values())):
        raise UserError("to=lora: no difference from the teacher, which an export does not hold; give the workdir")
    return found


def _teacher(sampler: Sampler) -> Params:
    """The UNet of the folder that a student was made from."""
    return Pipeline.load(sampler.pipeline.folder, without=[n for n in NETWORKS if n != "unet"]).params["unet"]


def _error_of_latents(sampler: Sampler, update: lora_files.Update) -> float:
    """Of the latents that teacher and LoRA draw, their distance from the student's over the norm of those."""
    worn = {**sampler.pipeline.params, "unet": lora.merge(_teacher(sampler), lora.nested(update))}
    copy = dataclasses.replace(sampler, pipeline=dataclasses.replace(sampler.pipeline, params=worn))
    mesh = meshes.make_mesh()
    whole, low = (Model(one, mesh, "lora").latents("", images=DRAWN) for one in (sampler, copy))
    return float(f"{np.linalg.norm(low - whole) / np.linalg.norm(whole):.4g}")
