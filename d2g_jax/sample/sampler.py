"""Drawing images from a pipeline folder at any number of steps, or from a distilled student in one."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.diffusion import noise
from d2g_jax.diffusion.schedule import Schedule, student_timestep
from d2g_jax.diffusion.systems import OneStep, find_system
from d2g_jax.inputs import numbers, places
from d2g_jax.inputs.arrays import check_floats, read_array
from d2g_jax.models import lora
from d2g_jax.models.network import Params
from d2g_jax.pipeline import lora_files
from d2g_jax.pipeline.draw import Programs, Solution, one_step_programs, teacher_programs
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import folder_hash, resolve
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample import exported
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.packed import pack, unpack

ONE_STEP = "leave out steps, guidance, solver, spacing and negative prompt"
"""What to do with a teacher's options that a one-step generator is given."""

MAX_SIDE = 8192
"""Pixels of an image: a mistyped side must not take the machine's memory."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is said of a model beside its name.

    Attributes:
      revision: of a hub id.
      system: a name of `systems.SYSTEMS`: the model is a one-step generator of another method.
      unet: weights in place of the model's own UNet.
      pipeline: where a workdir's teacher lies now, if it was moved since the training.
      prediction, tokenizer: of a single file, as for `Pipeline.load`.
      lora: LoRA files on top in their order, "FILE" or "FILE:SCALE".
    """

    revision: str | None = None
    system: str | None = None
    unet: str | Path | None = None
    pipeline: str | Path | None = None
    prediction: str | None = None
    tokenizer: str | Path | None = None
    lora: Sequence[str] = ()

    @property
    def said(self) -> dict[str, Any]:
        """Of a single file."""
        return {"prediction": self.prediction, "tokenizer": self.tokenizer}

    def worn(self) -> list[lora_files.Worn]:
        """Raises `UserError` as `Worn.parse` does."""
        return [lora_files.Worn.parse(text) for text in self.lora]

    def of_teacher(self) -> Parts:
        """Without LoRAs that are students of ours: what the teacher wears."""
        styles = (text for text in self.lora if not exported.read_description(lora_files.Worn.parse(text).file))
        return dataclasses.replace(self, lora=tuple(styles))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A pipeline whose `params["unet"]` are to be drawn with, and how they are to be called.

    Attributes:
      pipeline: text towers, UNet, VAE, schedule.
      timestep: of a one-step generator of ours; None for a teacher, which is solved in steps.
      system: how a one-step generator of another method is called; None for ours and for teachers.
      lora: the low-rank updates of its teacher that a student was trained as, times their scale; they are in the
        pipeline's parameters.
      anew: networks whose parameters are not those of the pipeline's folder.
    """

    pipeline: Pipeline
    timestep: int | None
    system: OneStep | None = None
    lora: Params | None = None
    anew: tuple[str, ...] = ("unet",)

    @property
    def one_step(self) -> OneStep | None:
        """How a one-step generator is called; None for a teacher."""
        return self.system if self.timestep is None else OneStep(self.timestep)

    @classmethod
    def load(
        cls,
        model: str | Path,
        mesh: jax.sharding.Mesh,
        dtype: jnp.dtype = jnp.float32,
        parts: Parts = Parts(),
    ) -> Sampler:
        """From a folder in diffusers' layout or a single file (a teacher, or an exported student), a hub id, a workdir.

        Of a workdir the newest average is taken. `dtype`: what the networks compute in and their kernels are kept in.
        A UNet that is a student of `d2g export --only=unet`, and a teacher that wears one of `--to=lora`, is called as
        one.

        Raises `UserError` for a student of ours with a system or a UNet, as `Pipeline.load` does, and for a folder
        that is neither pipeline nor workdir; for LoRAs as `Worn.parse` does, first of all, and `lora_files.read`.
        """
        worn = parts.worn()
        if jnp.dtype(dtype) == jnp.float16 and mesh.devices.flat[0].platform == "cpu":
            raise UserError("dtype=float16: XLA multiplies no float16 matrices on CPUs; give bfloat16 or float32")
        foreign = None if parts.system is None else find_system(parts.system)
        folder = resolve(model, parts.revision)
        if (folder / "checkpoints").is_dir():
            _check_own(model, system=parts.system, unet=parts.unet)
            return cls._from_workdir(folder, mesh, dtype, parts)._wearing(worn)
        if parts.pipeline is not None:
            raise UserError(f"{model}: no training workdir, and only that looks for its teacher; leave out pipeline")
        if folder.is_file() and folder.suffix != ".safetensors":
            raise UserError(f"{model}: a file; {_of_file(folder)}")
        if folder.is_dir() and not (folder / "model_index.json").exists():
            files = sorted(file.name for file in folder.glob("*.safetensors"))
            hint = f"; give {folder / files[0]} for the file in it" if len(files) == 1 else ""
            raise UserError(f"{model}: neither a pipeline folder (model_index.json) nor a workdir (checkpoints/){hint}")
        described = exported.read_description(folder)
        if described.get("format") == "flax":
            _check_own(model, system=parts.system, unet=parts.unet, **parts.said)
            return cls(exported.load_pipeline(folder, dtype, mesh), described["timestep"])._wearing(worn)
        pipeline = Pipeline.load(folder, dtype, mesh, dtype, unet=parts.unet, **parts.said)
        timestep = described["timestep"] if described else student_timestep(pipeline.scheduler)
        if timestep is not None:
            _check_own(model, system=parts.system, unet=parts.unet)
        elif parts.unet is not None and (timestep := _described_timestep(Path(parts.unet), pipeline)) is not None:
            _check_own(parts.unet, system=parts.system)
        return cls(pipeline, timestep, foreign)._wearing(worn)

    @classmethod
    def _from_workdir(cls, workdir: Path, mesh: jax.sharding.Mesh, dtype: jnp.dtype, parts: Parts) -> Sampler:
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            metadata = checkpoints.metadata("pipeline", "timestep")
            settings = metadata.get("config", {}).get("lora", {"rank": 0})
            scale, teacher = lora.scale(settings), _teacher(workdir, metadata, parts.pipeline)
            without = ("unet",) if scale is None else ()  # the teacher's, which the average is an update of
            pipeline = Pipeline.load(teacher, dtype, mesh, dtype, without, **parts.said)
            shapes = pipeline.unet.abstract()
            like = shapes if scale is None else lora.abstract(shapes, settings["rank"], settings["targets"])
            if metadata.get("config", {}).get("train", {}).get("packed"):
                like = jax.eval_shape(pack, like)
            average = meshes.place(unpack(checkpoints.restore_ema(meshes.place(like, mesh))), mesh)
        update = None if scale is None else lora.scaled(average, scale)
        unet = exported.store(average, dtype) if update is None else lora.merge(pipeline.params["unet"], update)
        pipeline = dataclasses.replace(pipeline, params={**pipeline.params, "unet": unet})
        return cls(pipeline, metadata["timestep"], lora=update)

    def _wearing(self, worn: Sequence[lora_files.Worn]) -> Sampler:
        timestep = self.timestep
        for one in worn if timestep is None else ():
            if (theirs := _described_timestep(one.file, self.pipeline)) is not None:
                _check_own(one.file, system=self.system)
                if timestep not in (None, theirs):
                    raise UserError(f"{one.file}: a student of timestep {theirs}, another is of {timestep}; give one")
                timestep = theirs
        pipeline, before = lora_files.put_on(self.pipeline, worn), self.pipeline.params
        anew = tuple(name for name in before if name == "unet" or pipeline.params[name] is not before[name])
        return dataclasses.replace(self, pipeline=pipeline, timestep=timestep, anew=anew)

    def programs(
        self,
        mesh: jax.sharding.Mesh,
        solution: Solution | None = None,
        size: tuple[int, int] | None = None,
        *,
        tiled: bool = False,
    ) -> Programs:
        """The compiled calls; `solution` is a teacher's (None: its defaults), `size` the images' (height, width)."""
        if self.one_step is None:
            solution = solution or Solution.default(self.pipeline)
            return teacher_programs(self.pipeline, mesh, solution, size, tiled=tiled)
        return one_step_programs(self.pipeline, self.pipeline.params["unet"], self.one_step, mesh, size, tiled=tiled)


def _teacher(workdir: Path, metadata: dict[str, Any], moved: str | Path | None) -> Path:
    """The folder of a workdir's teacher. Raises `UserError` where it is gone, or `moved` is another's."""
    if moved is None:
        if not places.is_there(metadata["pipeline"]):
            raise UserError(
                f"{workdir}: its teacher is not in {metadata['pipeline']} any more; say where, pipeline=FOLDER"
            )
        return Path(metadata["pipeline"])
    folder = resolve(moved)
    if metadata.get("teacher_hash", found := folder_hash(folder)) != found:
        raise UserError(f"{folder}: another pipeline than {metadata['pipeline']}, the teacher of {workdir}")
    return folder


def _of_file(file: Path) -> str:
    """What to do with a file where a model's folder is wanted."""
    if zipfile.is_zipfile(file):
        return "an export to StableHLO draws by itself: `python run.py` of docs/export.md"
    if file.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        return "pickles are refused because they can run code; convert it to .safetensors"
    return "give the folder of a pipeline, an export or a workdir"


def _described_timestep(file: Path, pipeline: Pipeline) -> int | None:
    """That of a student's UNet or LoRA by itself; None for the UNet of a teacher, and for other LoRAs.

    Raises `UserError` where it predicts another thing than the pipeline's own does, or does not say what.
    """
    described = exported.read_description(file) if file.suffix == ".safetensors" and file.is_file() else {}
    theirs = Schedule.from_config(pipeline.scheduler).prediction_type
    if described and "prediction_type" not in described:
        raise UserError(f"{file}: prediction_type is missing in its header; export the student again")
    if described and (mine := described["prediction_type"]) != theirs:
        raise UserError(f"{file}: predicts {mine}, and {pipeline.folder} {theirs}; give the teacher's kind of model")
    return described.get("timestep")


def _check_own(model: str | Path, **given: Any) -> None:
    for flag, value in given.items():
        if value is not None:
            raise UserError(f"{model}: a student of d2g_jax, which says itself how it is called; leave out {flag}")


def latent_shape(pipeline: Pipeline, size: tuple[int | None, int | None] = (None, None)) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images of `size` (height, width) in pixels; None is the native side.

    Raises `UserError` for a side that is no multiple of the VAE's factor, or above `MAX_SIDE`.
    """
    *native, channels = pipeline.latent_shape
    factor, sides = pipeline.vae.config.downscale, []
    for name, pixels, latent in zip(("height", "width"), size, native, strict=True):
        good = pixels is None or (isinstance(pixels, Integral) and pixels in range(factor, MAX_SIDE + 1, factor))
        if not good:
            raise UserError(
                f"{name}={pixels!r}: give a multiple of {factor}, the VAE's factor, from {factor} to {MAX_SIDE}"
            )
        sides.append(latent if pixels is None else pixels // factor)
    return channels, *sides


def draw_noise(seed: int, count: int, shape: tuple[int, int, int], first: int = 0) -> np.ndarray:
    """float32 noise (count, C, h, w) of images `first` to first + count - 1 under `seed`, the same on every backend.

    Raises `UserError` for a seed that is none of the 32 bits that noise is drawn by.
    """
    numbers.SEED.check("seed", seed)
    rows = 1 << (count - 1).bit_length()  # of few sizes, so that another count compiles nothing
    records = jnp.arange(first, first + rows, dtype=jnp.uint32)
    return np.asarray(_record_noise(np.uint32(seed), records, shape))[:count]


_record_noise = jax.jit(noise.record_noise, static_argnums=2)  # piece by piece its programs take a second to load


def noise_of(
    pipeline: Pipeline,
    count: int,
    size: tuple[int | None, int | None] = (None, None),
    seed: int = 0,
    latents: np.ndarray | str | Path | None = None,
    part: range | None = None,
    first_noise: int = 0,
) -> np.ndarray:
    """float32 noise (count, C, h, w): `draw_noise` of images of `size`, or `latents` where they are given.

    `part`: of only these of the images. `first_noise`: the record whose noise image 0 has under `seed`.

    `latents` is an array or the path of a .npy file, as one would give diffusers in `latents=`; its shape says height
    and width where `size` does not. Raises `UserError` for a file that cannot be read, another shape and values that
    are not finite.
    """
    part = range(count) if part is None else part
    channels, *sides = latent_shape(pipeline, size)
    if latents is None:
        return draw_noise(seed, len(part), (channels, *sides), first_noise + part.start)
    name, form = "latents", "standard normal noise as float32 (N, C, h, w)"
    if isinstance(latents, str | Path):
        name, latents = latents, read_array(places.expanded(latents), form)
    try:
        latents = np.asarray(latents)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{name}: no array ({error}); give {form}") from error
    check_floats(latents, name, form)
    asked = tuple("any" if given is None else side for given, side in zip(size, sides, strict=True))
    wanted, shape = (count, channels, *asked), np.shape(latents)
    if len(shape) != 4 or any(side not in ("any", found) for side, found in zip(wanted, shape, strict=True)):
        text = ", ".join(map(str, wanted))
        raise UserError(f"{name}: shape {shape}; this model and {count} prompts need ({text})")
    factor = pipeline.vae.config.downscale
    latent_shape(pipeline, (shape[2] * factor, shape[3] * factor))  # refuses what is too large
    latents = latents[part.start : part.stop].astype(np.float32)
    if not np.isfinite(latents).all():
        raise UserError(f"{name}: holds values that are not finite; give standard normal noise")
    return latents
