"""What the jobs of the `d2g` command have in common: their names, their flags, and how jax is started for them."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from d2g_jax.inputs import places
from d2g_jax.runtime.errors import UserError

JOBS = {
    "demo": "pairs, three students, figures and a report on the embedded digits teacher",
    "teacher": "train the embedded digits teacher from nothing; `teacher convert FILE` reads EDM's networks of images",
    "pairs": "solve the teacher's ODE for every prompt and write TFRecord shards; `pairs verify DIR` checks them",
    "train": "distil the teacher into a one-step generator",
    "sample": "draw images from a pipeline folder or a trained student",
    "evaluate": "FID, KID, CLIP score, diversity, fidelity by a protocol; `evaluate table` lays results side by side",
    "report": "write report.html of a workdir again, as after `d2g evaluate --out=WORKDIR/evaluation/NAME.json`",
    "export": "a student as a diffusers folder, one .safetensors file, a LoRA, a Flax checkpoint or one StableHLO file",
    "plan": "what a config takes on a TPU slice or on GPUs: memory, FLOPs, time, what fits; `plan sample`: one image",
    "metric": "distances between files of latents or images; `metric convert FILE` reads published PyTorch weights",
    "lpips": "train a LatentLPIPS for the latents of any VAE",
    "overfit": "figure 5 of the paper: latents optimised to match targets under one loss after another",
    "ablate": "the paper's tables of losses and of the discriminator, over several seeds: `ablate losses`",
    "play": "a local page: type a prompt, drag the noise, see the one-step image and its milliseconds",
    "bench": "speed and memory side by side, in one run: `bench sample`, `train`, `loss`, `input`, `pairs`",
}

RESUMED = ("demo", "teacher", "pairs", "train", "sample", "evaluate", "lpips", "overfit", "ablate")
"""Jobs that keep what is done."""
CONFIGURED = ("demo", "teacher", "pairs", "train", "plan", "lpips", "overfit", "ablate")
TRAINED = ("mesh", "pairs", "loss", "lora", "generator", "discriminator", "adversarial", "optimizer", "train")
"""Sections of a config that `d2g train` reads."""
_CONFIG_HELP = """
Settings: --config=FILE.py names a file with get_config(); without it the digits configuration is taken.
--config.KEY=VALUE overrides one setting, for example --config.train.images=100000.
"""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see `{self.prog} --help`")


def parser(job: str, text: str | None = None) -> Parser:
    return Parser(
        prog=f"d2g {job}",
        description=text or JOBS[job],
        epilog=_CONFIG_HELP if job in CONFIGURED else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def join(arguments: list[str]) -> None:
    """Joins the other processes of a job that several do together, before anything can fail in one of them alone."""
    if not {"-h", "--help"} & set(arguments):
        from d2g_jax.runtime import distributed

        distributed.join()


def path(text: str) -> Path:
    """`type=` of every flag that is a path on this machine: see `places.local_path`."""
    try:
        return places.local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def place(text: str) -> Any:
    """`type=` of a flag that may also name a folder in a bucket."""
    from d2g_jax.runtime.buckets import as_path

    return as_path(text) if "://" in text else path(text)


def parse_with_config(
    parser: Parser, arguments: list[str], *sections: str, like: str = "digits"
) -> tuple[argparse.Namespace, Any]:
    """A job's own flags and the config that its --config flags name and change.

    Raises `UserError` for a config without one of the `sections` that the job reads; configs/`like`.py has them.
    """
    parser.add_argument("--config", type=path, default=None, metavar="FILE.py")
    own, rest = parser.parse_known_args(arguments)
    overrides = [a for a in rest if a.startswith("--config.")]
    from d2g_jax.config.configuration import read_config

    config = read_config(own.config, overrides)
    if unknown := [a for a in rest if a not in overrides]:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see `{parser.prog} --help`")
    absent = [name for name in sections if name not in config]
    if absent and own.config is None:
        raise UserError(f"--config is missing; give a file such as configs/{like}.py")
    if absent:
        wrong = f"has no section {absent[0]}, which `{parser.prog}` reads"
        raise UserError(f"--config={own.config}: {wrong}; see configs/{like}.py")
    return own, config


def start(config: Any = None, *, cache: bool = True, same: dict[str, Any] | None = None) -> None:
    """Device count, XLA's optimisation level and the compilation cache; before the first use of a device.

    A job without a config takes the devices as they are. `same` is for jobs that several processes do together: what
    must be the same in all of them, beside the config.
    """
    import jax
    from ml_collections import ConfigDict

    from d2g_jax.runtime import mesh
    from d2g_jax.runtime.interrupt import started

    config = ConfigDict({"mesh": {}}) if config is None else config
    if config.mesh.get("cpu_devices"):
        mesh.use_cpu_devices(config.mesh.cpu_devices)
    level = config.get("optimization_level", "UNKNOWN")
    try:
        jax.config.update("jax_optimization_level", level)
    except ValueError as error:
        raise UserError(f"optimization_level={level!r} is unknown; choose one of O0, O1, O2, O3, UNKNOWN") from error
    folder = places.cache_folder()
    jax.config.update("jax_enable_compilation_cache", cache and folder is not None)
    jax.config.update("jax_compilation_cache_dir", folder and str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    started()
    if same is not None:
        from d2g_jax.runtime import distributed
        from d2g_jax.runtime.runs import flatten

        distributed.start({**same, **flatten(config.to_dict())})


def print_once(result: object) -> None:
    """Where a job's result is, from the first of its processes."""
    from d2g_jax.runtime import distributed

    if distributed.process_id() == 0:
        print(result)


def numbers(text: str) -> tuple[int, ...]:
    """Of "1,8" (1, 8): for a flag that takes several."""
    return tuple(int(number) for number in text.split(","))


def add_model_flags(parser: Any, *, required: bool = True) -> None:
    """Which model, what of it is replaced and how large its images are, to a parser or a group of one."""
    models = "pipeline folder, .safetensors file, hub id, exported student, or training workdir"
    parser.add_argument("--model", required=required, help=models)
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--system", help="one-step generator of another method: instaflow, dmd, sdxl-turbo, lcm, ...")
    parser.add_argument("--unet", type=path, help="safetensors in place of the model's own UNet")
    add_part_flags(parser)
    parser.add_argument("--height", type=int, help="pixels; default is the model's own")
    parser.add_argument("--width", type=int, help="pixels; default is the model's own")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")


def add_part_flags(parser: Any) -> None:
    """What a workdir or a single file does not say itself, and what is put on a model."""
    parser.add_argument("--pipeline", type=path, help="where a workdir's teacher lies, if it was moved")
    parser.add_argument("--prediction", help="of a .safetensors file: epsilon or v_prediction, where it does not say")
    parser.add_argument("--tokenizer", type=path, help="folder in place of CLIP's own, for a .safetensors file")
    worn = "a LoRA in diffusers' or kohya's format, put on the model; may be given several times"
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help=worn)


def parts(own: argparse.Namespace) -> Any:
    """The `Parts` that these flags say."""
    from d2g_jax.sample.sampler import Parts

    fields = (field.name for field in dataclasses.fields(Parts))
    return Parts(**{name: value for name in fields if (value := getattr(own, name, None))})


def asked(own: argparse.Namespace, batch: int) -> Any:
    """The `Asked` that these flags and a teacher's say; `batch` images a call."""
    from d2g_jax.sample.model import Asked

    options = {name: getattr(own, name) for name in ("seed", "height", "width", "tiled")}
    return Asked(own.model, parts(own), own.dtype, {**options, "batch": batch, **given_solution(own)})


def add_prompts_column(parser: Any) -> None:
    """Beside --prompts: which column of a file that has several."""
    parser.add_argument("--prompts-column", default="", help="of a .csv, .json, .jsonl or .parquet file or TFDS folder")


def add_solution_flags(teacher: Any) -> None:
    """How a teacher is solved, to a group of a parser: the fields of `draw.Solution`, none of them given by default."""
    teacher.add_argument("--steps", type=int, help="default 50")
    teacher.add_argument("--guidance", type=float, dest="guidance_scale", help="default 7.5")
    teacher.add_argument("--guidance-rescale", type=float, help="phi of arXiv 2305.08891; default 0")
    teacher.add_argument("--negative", dest="negative_prompt", help="negative prompt")
    teacher.add_argument("--solver", help="ddim (default), euler, dpmpp_2m or heun")
    teacher.add_argument("--spacing", help="leading, trailing or linspace; default is the pipeline's own")


def given_solution(own: argparse.Namespace) -> dict[str, Any]:
    """The fields of `draw.Solution` that were given by flag."""
    from d2g_jax.pipeline.draw import Solution

    given = {field.name: getattr(own, field.name) for field in dataclasses.fields(Solution)}
    return {name: value for name, value in given.items() if value is not None}
