"""What `d2g play` opens: a student with its teacher beside it, wherever the two come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from d2g_jax.inputs.text import read_json
from d2g_jax.pairs import read_prompts
from d2g_jax.pairs.job import solution as pairs_solution
from d2g_jax.pipeline import lora_files
from d2g_jax.pipeline.draw import Solution
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.play.studio import Studio, System
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.sampler import Parts, Sampler, latent_shape

NONE = "none"
"""As a teacher: there is to be none."""

OFFERED = 4
"""Prompts of its own that the page opens with, where none is given."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `d2g play` is asked to open.

    Attributes:
      model, parts: whatever `Sampler.load` takes; the teacher wears the same LoRAs.
      teacher: a pipeline folder or hub id; None is the model's own if it names one, `NONE` is none at all.
      solution: settings of `Solution` that differ from those of the student's pairs (else of `Solution()`), by name.
      size: (height, width) in pixels, None for the native side.
      dtype: what the networks compute in and what their kernels are kept in.
    """

    model: str
    parts: Parts = Parts()  # noqa: RUF009 (it is frozen)
    teacher: str | None = None
    solution: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size: tuple[int | None, int | None] = (None, None)
    dtype: str = "float32"


def open_studio(choice: Choice) -> Studio:
    """Loads the model, and its teacher, on the first device. Raises `UserError` as `Sampler.load` does."""
    mesh, dtype = meshes.make_mesh(devices=jax.devices()[:1]), jnp.dtype(choice.dtype)
    sampler = Sampler.load(choice.model, mesh, dtype, choice.parts)
    if sampler.pipeline.classes is not None:
        raise UserError(f"{choice.model}: is told no text; `d2g play` is for models that are, draw with `d2g sample`")
    shape = latent_shape(sampler.pipeline, choice.size)
    factor = sampler.pipeline.vae.config.downscale
    size = (factor * shape[1], factor * shape[2])
    solution = dataclasses.replace(_pairs_solution(Path(choice.model)), **choice.solution)
    teacher = _find_teacher(choice, sampler, mesh)
    if choice.solution and teacher is None and sampler.one_step is not None:
        raise UserError(
            f"{choice.model}: a one-step student without its teacher; leave out --steps, --guidance, --negative, "
            "--solver and --spacing, or give --teacher=FOLDER"
        )
    name = Path(choice.model).resolve().name if Path(choice.model).exists() else choice.model
    if sampler.one_step is None:
        programs, title = sampler.programs(mesh, dataclasses.replace(solution, steps=1), size), f"{name}, 1 step"
    else:
        programs, title = sampler.programs(mesh, None, size), name
    systems = {"student": System(title, sampler.pipeline, programs)}
    if teacher is not None:
        calls = teacher.programs(mesh, solution, size)
        if teacher.pipeline.tokenizer is sampler.pipeline.tokenizer:  # the same text towers and VAE: compiled once
            calls = dataclasses.replace(calls, encode=programs.encode, decode=programs.decode)
        systems["teacher"] = System(f"Teacher, {solution.steps} steps", teacher.pipeline, calls)
    return Studio(systems, shape, mesh)


def _find_teacher(choice: Choice, sampler: Sampler, mesh: jax.sharding.Mesh) -> Sampler | None:
    """The teacher to draw beside `sampler`: the one that was named, that of a workdir or of a LoRA, or itself."""
    dtype, parts = jnp.dtype(choice.dtype), choice.parts.of_teacher()
    if choice.teacher == NONE:
        return None
    if choice.teacher is not None:
        teacher = Sampler.load(choice.teacher, mesh, dtype, Parts(lora=parts.lora))
        if teacher.one_step is not None:
            raise UserError(f"--teacher={choice.teacher}: a one-step student; give the pipeline it was distilled from")
        mine, theirs = sampler.pipeline.latent_shape, teacher.pipeline.latent_shape
        if mine[2] != theirs[2] or sampler.pipeline.vae.config.downscale != teacher.pipeline.vae.config.downscale:
            raise UserError(f"--teacher={choice.teacher}: latents {theirs} (h, w, C), but the student has {mine}")
        return teacher
    if sampler.one_step is None:
        return sampler
    if not Path(choice.model, "checkpoints").is_dir():
        if len(parts.lora) == len(choice.parts.lora):
            return None  # an export knows its teacher's name at most
        without_student = Sampler.load(choice.model, mesh, dtype, parts)
        return without_student if without_student.one_step is None else None
    without = (*sampler.pipeline.towers, "vae")
    own = Pipeline.load(sampler.pipeline.folder, dtype, mesh, dtype, without, **parts.said)
    worn = lora_files.put_on(own, parts.worn(), networks=("unet",))
    params = {**sampler.pipeline.params, "unet": worn.params["unet"]}
    return Sampler(dataclasses.replace(sampler.pipeline, params=params), None)


def own_prompts(model: str) -> tuple[str, ...]:
    """A few prompts that a model is made for: of a workdir's pairs, or of a `prompts.txt` beside a pipeline folder.

    Evenly spread over the file; none where there is no such file, as beside a hub id.
    """
    file = Path(model).absolute().parent / "prompts.txt"
    if Path(model, "checkpoints").is_dir():
        file = Path(_pairs_config(Path(model)).get("prompts") or file)
    if not file.is_file() or file.suffix != ".txt":
        return ()
    lines = read_prompts(file, skip_empty=True).lines
    return tuple(lines[i * len(lines) // OFFERED] for i in range(min(OFFERED, len(lines))))


def _pairs_solution(workdir: Path) -> Solution:
    """How the teacher was solved for a workdir's pairs, by its config.json; the defaults of another folder."""
    config = _pairs_config(workdir)
    try:
        return pairs_solution(ConfigDict(config)) if config else Solution()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{workdir / 'config.json'}: not the config of a training workdir ({error})") from error


def _pairs_config(workdir: Path) -> dict[str, Any]:
    """The section `pairs` of a training workdir's config.json; empty for another folder."""
    file = workdir / "config.json"
    if not (workdir / "checkpoints").is_dir() or not file.is_file():
        return {}
    pairs = read_json(file, "not the config of a training workdir").get("pairs")
    if not isinstance(pairs, dict):
        raise UserError(f"{file}: not the config of a training workdir, it has no section pairs")
    return pairs
