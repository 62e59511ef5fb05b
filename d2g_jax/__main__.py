"""The `d2g` command: one subcommand per job, nothing else.

Exit codes: 0 done, 2 bad input (one line on stderr), 75 another process of the job died, 130 interrupted, 143
terminated. Every job goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2g_jax.errors import UserError
from d2g_jax.interrupt import Terminated

_library_format = warnings.formatwarning

JOBS = {
    "demo": "pairs, three students, figures and a report on the embedded digits teacher",
    "teacher": "train the embedded digits teacher, its metric and its classifier from nothing",
    "pairs": "solve the teacher's ODE for every prompt and write TFRecord shards; `pairs verify DIR` checks them",
    "train": "distil the teacher into a one-step generator",
    "sample": "draw images from a pipeline folder or a trained student",
    "evaluate": "FID, KID, CLIP score, diversity, fidelity by a protocol; `evaluate table` lays results side by side",
    "export": "a trained student as a diffusers folder, a Flax checkpoint or one StableHLO file",
    "plan": "what a config takes on a TPU slice or on GPUs, compiled ahead of time: memory, FLOPs, time, what fits",
    "metric": "distances between files of latents or images; `metric convert FILE` reads published PyTorch weights",
    "lpips": "train a LatentLPIPS for the latents of any VAE",
    "overfit": "figure 5 of the paper: latents optimised to match targets under one loss after another",
    "bench": "speed and memory side by side, in one run: `bench sample`, `train`, `loss`, `input`, `pairs`",
}

_CONFIGURED = ("demo", "teacher", "pairs", "train", "plan", "lpips", "overfit")
_CONFIG_HELP = """
Settings: --config=FILE.py names a file with get_config(); without it the digits configuration is taken.
--config.KEY=VALUE overrides one setting, for example --config.train.images=100000.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = _format_warning
    try:
        return _finish(_run(arguments))
    except UserError as error:
        return _finish(2, str(error))
    except KeyboardInterrupt:
        return _finish(130, "interrupted; the same command goes on from here")
    except Terminated:
        return _finish(143, "terminated; the same command goes on from here")
    except Exception:
        if "d2g_jax.distributed" in sys.modules:
            from d2g_jax import distributed

            distributed.crash()
        raise


def _finish(code: int, message: str = "") -> int:
    """Says how it ended, once for all processes of a job."""
    if "d2g_jax.distributed" in sys.modules:  # else this process has joined no others, and need not import jax
        from d2g_jax import distributed

        return distributed.finish(code, message)
    if message:
        print(f"d2g: {message}", file=sys.stderr)
    return code


def _print_once(result: object) -> None:
    """Where a job's result is, from the first of its processes."""
    from d2g_jax import distributed

    if distributed.process_id() == 0:
        print(result)


def _format_warning(message: Warning | str, category: type[Warning], *place: Any) -> str:
    """Ours in one line without the place in the source; those of libraries as ever."""
    if category is not UserWarning:
        return _library_format(message, category, *place)
    # Which process, where there are several: it may be about that one's share of the data.
    process = sys.modules["d2g_jax.distributed"].process_id() if "d2g_jax.distributed" in sys.modules else 0
    return f"d2g: {f'process {process}: ' if process else ''}warning: {message}\n"


def _run(arguments: list[str]) -> int:
    usage = "usage: d2g JOB [--flag=value ...]\n\n" + "\n".join(f"  {job:9}{text}" for job, text in JOBS.items())
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(f"{usage}\n\n`d2g JOB --help` lists the flags of a job.")
        return 0 if arguments else 2
    job, rest = arguments[0], arguments[1:]
    if job not in JOBS:
        raise UserError(f"unknown job {job!r}; known are {', '.join(JOBS)}")
    if job == "pairs" and rest[:1] == ["verify"]:
        return _verify(rest[1:])
    if job == "metric" and rest[:1] == ["convert"]:
        return _convert(rest[1:])
    return {
        "demo": _demo,
        "teacher": _teacher,
        "pairs": _pairs,
        "train": _train,
        "sample": _sample,
        "evaluate": _evaluate,
        "export": _export,
        "plan": _plan,
        "metric": _metric,
        "lpips": _lpips,
        "overfit": _overfit,
        "bench": _bench,
    }[job](rest)


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser(job: str, text: str | None = None) -> _Parser:
    return _Parser(
        prog=f"d2g {job}",
        description=text or JOBS[job],
        epilog=_CONFIG_HELP if job in _CONFIGURED else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _parse_with_config(parser: _Parser, arguments: list[str]) -> tuple[argparse.Namespace, Any]:
    """A job's own flags and the config that its --config flags name and change."""
    parser.add_argument("--config", type=Path, metavar="FILE.py")
    own, rest = parser.parse_known_args(arguments)
    overrides = [a for a in rest if a.startswith("--config.")]
    from d2g_jax.configuration import read_config

    config = read_config(own.config, overrides)
    if unknown := [a for a in rest if a not in overrides]:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}; see `{parser.prog} --help`")
    return own, config


def _start(config: Any, *, cache: bool = True, same: dict[str, Any] | None = None) -> None:
    """Device count, XLA's optimisation level and the compilation cache; before the first use of a device.

    `same` is for jobs that several processes do together: what must be the same in all of them, beside the config.
    """
    import jax

    from d2g_jax import mesh

    if config.mesh.get("cpu_devices"):
        mesh.use_cpu_devices(config.mesh.cpu_devices)
    level = config.get("optimization_level", "UNKNOWN")
    try:
        jax.config.update("jax_optimization_level", level)
    except ValueError as error:
        raise UserError(f"optimization_level={level!r} is unknown; choose one of O0, O1, O2, O3, UNKNOWN") from error
    jax.config.update("jax_enable_compilation_cache", cache)
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "d2g_jax"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if same is not None:
        from d2g_jax import distributed
        from d2g_jax.runs import flatten

        distributed.start({**same, **flatten(config.to_dict())})


def _demo(arguments: list[str]) -> int:
    parser = _parser("demo")
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--full", action="store_true", help="also pseudo-Huber and LatentLPIPS students")
    own, config = _parse_with_config(parser, arguments)
    _start(config)
    from d2g_jax.digits.demo import demo

    print(demo(config, own.workdir, full=own.full))
    return 0


def _teacher(arguments: list[str]) -> int:
    parser = _parser("teacher")
    parser.add_argument("--workdir", type=Path, required=True)
    own, config = _parse_with_config(parser, arguments)
    _start(config)
    from d2g_jax.digits.teacher import make_teacher

    make_teacher(config.teacher, own.workdir)
    print(own.workdir)
    return 0


def _pairs(arguments: list[str]) -> int:
    from d2g_jax.buckets import as_path

    parser = _parser("pairs")
    parser.add_argument("--workdir", type=as_path, required=True, help="a folder, here or in a bucket (gs://...)")
    parser.add_argument("--dry-run", action="store_true", help="print records, bytes, FLOPs and hours; write nothing")
    own, config = _parse_with_config(parser, arguments)
    _start(config, same={"job": "pairs", "--workdir": str(own.workdir)})
    if own.dry_run:
        from d2g_jax.pairs.estimate import estimate

        print(estimate(config, own.workdir))
        return 0
    from d2g_jax.pairs import make_pairs

    _print_once(make_pairs(config, own.workdir))
    return 0


def _verify(arguments: list[str]) -> int:
    from d2g_jax.buckets import as_path

    parser = _parser("pairs verify", "re-read every record: checksums, ids, shapes, finite values, noise redrawn")
    parser.add_argument("folder", type=as_path)
    parser.add_argument("--repair", action="store_true", help="remove the bad shards, so that `d2g pairs` remakes them")
    parser.add_argument(
        "--resolve", type=int, metavar="K", help="also solve K random records again with the --config that made them"
    )
    parser.add_argument("--resolve-seed", type=int, default=0, metavar="SEED", help="which K records; default 0")
    own, config = _parse_with_config(parser, arguments)
    if own.resolve is not None:
        _start(config)
    from d2g_jax import records

    problems = records.verify(own.folder)
    if own.resolve is not None and not problems:
        from d2g_jax.pairs.resolve import resolve

        problems = resolve(config, own.folder, own.resolve, own.resolve_seed)
    for problem in problems:
        print(problem)
    if problems and own.repair:
        for file in records.repair(own.folder, problems):
            print(f"removed {file}")
        return 0
    if problems:
        raise UserError(f"{own.folder}: {len(problems)} problems; --repair removes the bad shards")
    print(f"{own.folder}: {len(records.PairSource(own.folder))} records, all good")
    return 0


def _train(arguments: list[str]) -> int:
    parser = _parser("train")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--pairs", help="folder of pairs, here or in a bucket; default WORKDIR/pairs/1.0.0")
    own, config = _parse_with_config(parser, arguments)
    _start(config, same={"job": "train", "--workdir": str(own.workdir), "--pairs": str(own.pairs)})
    from d2g_jax.pairs import FOLDER
    from d2g_jax.train import train

    train(config, own.workdir, own.pairs or own.workdir / FOLDER)
    _print_once(own.workdir / "report.html")
    return 0


def _sample(arguments: list[str]) -> int:
    parser = _parser("sample")
    parser.add_argument("--model", required=True, help="pipeline folder, hub id, exported student, or training workdir")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--system", help="one-step generator of another method: instaflow, dmd, sdxl-turbo, lcm, ...")
    parser.add_argument("--unet", type=Path, help="safetensors in place of the model's own UNet")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt per line")
    parser.add_argument("--images", type=int, default=1, help="images per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latents", type=Path, help="float32 noise (N, C, h, w), .npy, in place of --seed")
    parser.add_argument("--height", type=int, help="pixels; default is the model's own")
    parser.add_argument("--width", type=int, help="pixels; default is the model's own")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--tiled", action="store_true", help="decode large images in overlapping tiles")
    parser.add_argument("--batch", type=int, default=64, help="images per call, all devices together")
    parser.add_argument("--out", type=Path, required=True)
    teacher = parser.add_argument_group("for a teacher; a one-step student has none of these")
    teacher.add_argument("--steps", type=int, help="default 50")
    teacher.add_argument("--guidance", type=float, dest="guidance_scale", help="default 7.5")
    teacher.add_argument("--guidance-rescale", type=float, help="phi of arXiv 2305.08891; default 0")
    teacher.add_argument("--negative", dest="negative_prompt", help="negative prompt")
    teacher.add_argument("--solver", help="ddim (default), euler, dpmpp_2m or heun")
    teacher.add_argument("--spacing", help="leading, trailing or linspace; default is the pipeline's own")
    own = parser.parse_args(arguments)
    from ml_collections import ConfigDict

    _start(ConfigDict({"mesh": {}}))
    from d2g_jax.draw import Solution
    from d2g_jax.pairs import read_prompts
    from d2g_jax.sample import Request, sample

    given = {field.name: getattr(own, field.name) for field in dataclasses.fields(Solution)}
    given = {name: value for name, value in given.items() if value is not None}
    request = Request(
        prompts=(*own.prompt, *(read_prompts(own.prompts).lines if own.prompts else ())),
        images_per_prompt=own.images,
        solution=Solution(**given) if given else None,
        size=(own.height, own.width),
        seed=own.seed,
        latents=own.latents,
        batch_size=own.batch,
        dtype=own.dtype,
        tiled=own.tiled,
        system=own.system,
        unet=own.unet,
    )
    seconds = sample(own.model, request, own.out, own.revision)
    print(json.dumps({"out": str(own.out), "seconds": {name: round(value, 3) for name, value in seconds.items()}}))
    return 0


def _evaluate(arguments: list[str]) -> int:
    from d2g_jax.evaluate import command

    job = command.read(arguments, _parser)
    # The metrics' networks run in PyTorch, on the same device: jax must not take all of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from ml_collections import ConfigDict

    _start(ConfigDict({"mesh": {}}))
    print(job())
    return 0


def _export(arguments: list[str]) -> int:
    parser = _parser("export")
    parser.add_argument("--model", required=True, help="training workdir; or a pipeline folder, for a round trip")
    parser.add_argument("--to", choices=["diffusers", "flax", "stablehlo"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder; for stablehlo a new file")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--height", type=int, help="of a StableHLO file's images; default is the model's own")
    parser.add_argument("--width", type=int, help="of a StableHLO file's images; default is the model's own")
    own = parser.parse_args(arguments)
    from ml_collections import ConfigDict

    _start(ConfigDict({"mesh": {}}))
    from d2g_jax import mesh
    from d2g_jax.export import export_student
    from d2g_jax.sample import Sampler

    sampler = Sampler.load(own.model, mesh.make_mesh())
    print(export_student(sampler, own.to, own.out, dtype=own.dtype, size=(own.height, own.width)))
    return 0


def _plan(arguments: list[str]) -> int:
    if arguments[:1] == ["table"]:
        return _plan_table(arguments[1:])
    parser = _parser("plan")
    parser.add_argument("--topology", required=True, help="v5e:4x4, v5p:2x2x4, v6e:4x4, gpu:8xH100, cpu:8 ...")
    parser.add_argument(
        "--method",
        choices=["compile", "formula"],
        default="compile",
        help="compile for the target (TPUs need libtpu, GPUs are always planned by formula), or count the trace",
    )
    parser.add_argument("--no-search", action="store_true", help="if it does not fit, do not look for what would")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the plan as JSON")
    own, config = _parse_with_config(parser, arguments)
    from d2g_jax.plan import command

    target = command.start(own.topology, own.method)
    text, report = command.make_report(config, target, own.method, search=not own.no_search)
    print(json.dumps(report, indent=1) if own.json else text)
    if own.out:
        command.write_report(report, own.out)
    return 0


def _plan_table(arguments: list[str]) -> int:
    parser = _parser("plan table", "plans that --out wrote, as one Markdown table")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    own = parser.parse_args(arguments)
    from d2g_jax.plan import command

    print(command.table(own.files))
    return 0


def _metric(arguments: list[str]) -> int:
    parser = _parser("metric")
    parser.add_argument("--weights", type=Path, required=True, help="metric folder, latent or pixel")
    parser.add_argument("--a", type=Path, required=True, help="latents (N, C, h, w) as .npy; or an image or a folder")
    parser.add_argument("--b", type=Path, required=True, help="the same form as --a")
    parser.add_argument("--draws", type=int, default=0, help="augmentations averaged; 0 (default) for none")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentations")
    parser.add_argument("--preset", default="bgo", help="of the augmentations: b, g, c, o, co, bg, bgc, bgo, bgco")
    parser.add_argument("--raw", action="store_true", help="the latents have not been through the VAE's scaling")
    own = parser.parse_args(arguments)
    from ml_collections import ConfigDict

    _start(ConfigDict({"mesh": {}}))
    from d2g_jax.measure import measure

    measured = measure(own.weights, own.a, own.b, draws=own.draws, seed=own.seed, preset=own.preset, scaled=not own.raw)
    print(json.dumps(measured, indent=2))
    return 0


def _convert(arguments: list[str]) -> int:
    parser = _parser("metric convert", "published PyTorch weights of a metric -> a metric folder; needs PyTorch")
    parser.add_argument("file", type=Path, help="SPACE_latest_vgg16_tuned.pth, or torchvision's vgg16")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--space", help="of a LatentLPIPS: sd15, sd21, sdxl, sd3 or flux")
    parser.add_argument("--heads", type=Path, help="of pixel LPIPS: the lpips package's weights/v0.1/vgg.pth")
    own = parser.parse_args(arguments)
    from d2g_jax.convert import convert

    print(convert(own.file, own.out, own.space, own.heads))
    return 0


def _lpips(arguments: list[str]) -> int:
    parser = _parser("lpips")
    parser.add_argument("--workdir", type=Path, required=True)
    own, config = _parse_with_config(parser, arguments)
    if own.config is None:
        raise UserError("--config is missing; give a file such as configs/lpips.py")
    _start(config)
    from d2g_jax.lpips_training.job import train_lpips

    print(json.dumps(train_lpips(config, own.workdir), indent=2))
    return 0


def _overfit(arguments: list[str]) -> int:
    parser = _parser("overfit")
    parser.add_argument("--workdir", type=Path, required=True)
    own, config = _parse_with_config(parser, arguments)
    _start(config)
    from d2g_jax.overfit import overfit

    print(overfit(config, own.workdir))
    return 0


def _bench(arguments: list[str]) -> int:
    from d2g_jax.bench import command

    if arguments[:1] in (["-h"], ["--help"]):
        print(command.usage())
        raise SystemExit(0)
    bench, start, out = command.read(arguments, _parser)
    _start(start, cache=False)
    from d2g_jax.bench.measure import check_output, format_report, write_report

    if out:
        check_output(out)
    report = bench()
    print(format_report(report))
    if out:
        write_report(report, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
