"""A one-step student for others to draw with: `d2g export --model=WORKDIR --to=FORM --out=PATH`.

docs/export.md says how each is used.
"""

from __future__ import annotations

from pathlib import Path

from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.export import to_diffusers, to_flax, to_lora, to_single, to_stablehlo
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample import exported
from d2g_jax.sample.sampler import Sampler, latent_shape

DTYPES = ("float32", "float16", "bfloat16")


def export_student(
    sampler: Sampler,
    to: str,
    out: str | Path,
    *,
    dtype: str = "float32",
    size: tuple[int | None, int | None] = (None, None),
    only: str | None = None,
    rank: int | None = None,
) -> Path:
    """Writes `sampler` in another form, whole or not at all, and returns `out`. One process only.

    Args:
      sampler: a one-step student; a teacher (timestep None) goes to diffusers, flax and a single file as it is.
      to: "diffusers": a folder for diffusers' own pipeline classes. "single": a folder of one safetensors file in the
        original layout and a ComfyUI workflow. "lora": a folder with the difference from the teacher in two formats, of
        a workdir's student only. "flax": a folder of Orbax parameters and JSON. "stablehlo": one zip file with a
        program, its weights and a runner.
      out: a folder, or for stablehlo a file, that does not exist or is empty.
      dtype: "float32", "float16" or "bfloat16". diffusers: of the UNet's tensors, the other components stay as they
        are. single: of all tensors. flax: of kernels and embeddings; the rest is float32. stablehlo: the same, and
        what is computed in.
      size: (height, width) in pixels of a stablehlo program's images; None is the native side.
      only: "unet": a single file of the UNet alone; None is the whole model.
      rank: of a LoRA; None is that of a student's training.

    Raises:
      UserError: one line, for an unknown `to` or `dtype`, an `out` that is not empty or cannot be written, a value that
        overflows in `dtype`, and what a form cannot hold.
    """
    out = Path(out).absolute()
    if to not in exported.FORMATS:
        raise UserError(f"to={to} is unknown; choose one of {', '.join(exported.FORMATS)}")
    if rank is not None and (to != "lora" or rank < 1):
        raise UserError(f"rank={rank}: give 1 or more with to=lora, and leave it out elsewhere")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is unknown; choose one of {', '.join(DTYPES)}")
    if only is not None and (to, only) != ("single", "unet"):
        raise UserError(f"only={only} with to={to}: a single file of the UNet alone is to=single with only=unet")
    if sampler.pipeline.classes is not None and to not in ("diffusers", "flax"):
        raise UserError(f"to={to}: a student of images, without text; take diffusers or flax")
    _check_out(out, to)
    _check_timestep(sampler)
    if to == "stablehlo":
        if sampler.timestep is None:
            raise UserError(
                "to=stablehlo exports one-step students only, and this is a teacher; take diffusers, flax or single"
            )
        to_stablehlo.write(sampler.pipeline, sampler.timestep, out, dtype, latent_shape(sampler.pipeline, size))
        return out
    if size != (None, None):
        raise UserError(f"height and width are for to=stablehlo; a {to} folder draws every size, leave them out")
    if to == "single":
        to_single.write(sampler.pipeline, sampler.timestep, out, dtype, whole=only is None)
    elif to == "lora":
        to_lora.write(sampler, out, dtype, rank)
    elif to == "diffusers":
        to_diffusers.write(sampler.pipeline, sampler.timestep, out, dtype, sampler.anew)
    else:
        to_flax.write(sampler.pipeline, sampler.timestep, out, dtype)
    return out


def _check_out(out: Path, to: str) -> None:
    if to == "single" and out.suffix == ".safetensors":
        raise UserError(f"{out}: to=single writes a folder, with a file of its name in it; leave out .safetensors")
    if out.is_dir():
        if to == "stablehlo":
            raise UserError(f"{out}: is a folder, and to=stablehlo writes one file; give a name such as student.zip")
        if any(out.iterdir()):
            raise UserError(f"{out}: is not empty; give a new place or empty it")
    elif out.exists():
        if to != "stablehlo":
            raise UserError(f"{out}: is a file, and to={to} writes a folder; give a new place")
        if out.stat().st_size:
            raise UserError(f"{out}: exists; give a new name or remove it")


def _check_timestep(sampler: Sampler) -> None:
    total = Schedule.from_config(sampler.pipeline.scheduler).num_train_timesteps
    if sampler.timestep is not None and not 0 <= sampler.timestep < total:
        raise UserError(f"timestep {sampler.timestep} is out of range: the teacher's schedule has 0 to {total - 1}")
