"""The jobs of the `d2g` command: flags in, one function of a module called. Nothing is imported before it is needed."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from d2g_jax.commands import common as cli
from d2g_jax.runtime.errors import UserError


def _demo(arguments: list[str]) -> int:
    parser = cli.parser("demo")
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--full", action="store_true", help="also pseudo-Huber and LatentLPIPS students")
    own, config = cli.parse_with_config(parser, arguments)
    cli.start(config)
    from d2g_jax.demo.demo import demo

    print(demo(config, own.workdir, full=own.full))
    return 0


def _teacher(arguments: list[str]) -> int:
    parser = cli.parser("teacher")
    parser.add_argument("--workdir", type=Path, required=True)
    own, config = cli.parse_with_config(parser, arguments)
    cli.start(config)
    from d2g_jax.teacher.teacher import make_teacher

    make_teacher(config.teacher, own.workdir)
    print(own.workdir)
    return 0


def _pairs(arguments: list[str]) -> int:
    if arguments[:1] == ["verify"]:
        return _verify(arguments[1:])
    from d2g_jax.runtime.buckets import as_path

    cli.join(arguments)
    parser = cli.parser("pairs")
    parser.add_argument("--workdir", type=as_path, required=True, help="a folder, here or in a bucket (gs://...)")
    parser.add_argument("--dry-run", action="store_true", help="print records, bytes, FLOPs and hours; write nothing")
    own, config = cli.parse_with_config(parser, arguments)
    cli.start(config, same={"job": "pairs", "--workdir": str(own.workdir)})
    if own.dry_run:
        from d2g_jax.pairs.estimate import estimate

        print(estimate(config, own.workdir))
        return 0
    from d2g_jax.pairs import make_pairs

    cli.print_once(make_pairs(config, own.workdir))
    return 0


def _verify(arguments: list[str]) -> int:
    from d2g_jax.runtime.buckets import as_path

    parser = cli.parser("pairs verify", "re-read every record: checksums, ids, shapes, finite values, noise redrawn")
    parser.add_argument("folder", type=as_path)
    parser.add_argument("--repair", action="store_true", help="remove the bad shards, so that `d2g pairs` remakes them")
    parser.add_argument(
        "--resolve", type=int, metavar="K", help="also solve K random records again with the --config that made them"
    )
    parser.add_argument("--resolve-seed", type=int, default=0, metavar="SEED", help="which K records; default 0")
    own, config = cli.parse_with_config(parser, arguments)
    if own.resolve is not None:
        cli.start(config)
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
    cli.join(arguments)
    parser = cli.parser("train")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--pairs", help="folder of pairs, here or in a bucket; default WORKDIR/pairs/1.0.0")
    own, config = cli.parse_with_config(parser, arguments)
    cli.start(config, same={"job": "train", "--workdir": str(own.workdir), "--pairs": str(own.pairs)})
    from d2g_jax.pairs import FOLDER
    from d2g_jax.train import train

    train(config, own.workdir, own.pairs or own.workdir / FOLDER)
    cli.print_once(own.workdir / "report.html")
    return 0


def _report(arguments: list[str]) -> int:
    parser = cli.parser("report")
    parser.add_argument("--workdir", type=Path, required=True)
    own = parser.parse_args(arguments)
    from d2g_jax.report import write_report

    print(write_report(own.workdir))
    return 0


def _sample(arguments: list[str]) -> int:
    parser = cli.parser("sample")
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
    cli.add_solution_flags(teacher)
    own = parser.parse_args(arguments)
    cli.start()
    from d2g_jax.pairs import read_prompts
    from d2g_jax.pipeline.draw import Solution
    from d2g_jax.sample.sampler import Request, sample

    given = cli.given_solution(own)
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
    from d2g_jax.commands import evaluate as command

    job = command.read(arguments, cli.parser)
    # The metrics' networks run in PyTorch, on the same device: jax must not take all of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    cli.start()
    print(job())
    return 0


def _export(arguments: list[str]) -> int:
    parser = cli.parser("export")
    parser.add_argument("--model", required=True, help="training workdir; or a pipeline folder, for a round trip")
    parser.add_argument("--to", choices=["diffusers", "flax", "stablehlo"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder; for stablehlo a new file")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--height", type=int, help="of a StableHLO file's images; default is the model's own")
    parser.add_argument("--width", type=int, help="of a StableHLO file's images; default is the model's own")
    own = parser.parse_args(arguments)
    cli.start()
    from d2g_jax.export import export_student
    from d2g_jax.runtime import mesh
    from d2g_jax.sample.sampler import Sampler

    sampler = Sampler.load(own.model, mesh.make_mesh())
    print(export_student(sampler, own.to, own.out, dtype=own.dtype, size=(own.height, own.width)))
    return 0


def _plan(arguments: list[str]) -> int:
    if arguments[:1] == ["table"]:
        return _plan_table(arguments[1:])
    if arguments[:1] == ["sample"]:
        return _plan_sample(arguments[1:])
    parser = cli.parser("plan")
    _add_plan_flags(parser)
    parser.add_argument("--no-search", action="store_true", help="if it does not fit, do not look for what would")
    own, config = cli.parse_with_config(parser, arguments)
    from d2g_jax.commands import plan as command

    _check_plan_out(own)
    target = command.start(own.topology, own.method)
    _print_plan(own, *command.make_report(config, target, own.method, search=not own.no_search))
    return 0


def _add_plan_flags(parser: cli.Parser) -> None:
    parser.add_argument("--topology", required=True, help="v5e:4x4, v5p:2x2x4, v6e:4x4, gpu:8xH100, cpu:8 ...")
    parser.add_argument(
        "--method",
        choices=["compile", "formula"],
        default="compile",
        help="compile for the target (TPUs need libtpu, GPUs are always planned by formula), or count the trace",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the plan as JSON")


def _check_plan_out(own: argparse.Namespace) -> None:
    """Before an hour's compilation, not after it."""
    from d2g_jax.runtime import atomic

    if own.out:
        atomic.check_output(own.out, "plan.json")


def _print_plan(own: argparse.Namespace, text: str, report: dict[str, Any]) -> None:
    from d2g_jax.commands import plan as command

    print(json.dumps(report, indent=1) if own.json else text)
    if own.out:
        command.write_report(report, own.out)


def _plan_sample(arguments: list[str]) -> int:
    parser = cli.parser("plan sample", "one-step sampling on one device of a topology: memory, FLOPs, least time")
    _add_plan_flags(parser)
    parser.add_argument("--model", default="sd15", help="digits, sd15, sdxl, a hub id of a known size, or a folder")
    parser.add_argument("--batches", type=cli.numbers, default=(1, 8), help="images in a call; default 1,8")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    own = parser.parse_args(arguments)
    from d2g_jax.commands import plan as command

    _check_plan_out(own)
    target = command.start(own.topology, own.method)
    _print_plan(own, *command.make_sampling_report(own.model, target, own.dtype, own.batches, own.method))
    return 0


def _plan_table(arguments: list[str]) -> int:
    parser = cli.parser("plan table", "plans that --out wrote, as one Markdown table")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    own = parser.parse_args(arguments)
    from d2g_jax.commands import plan as command

    print(command.table(own.files))
    return 0


def _metric(arguments: list[str]) -> int:
    if arguments[:1] == ["convert"]:
        return _convert(arguments[1:])
    parser = cli.parser("metric")
    parser.add_argument("--weights", type=Path, required=True, help="metric folder, latent or pixel")
    parser.add_argument("--a", type=Path, required=True, help="latents (N, C, h, w) as .npy; or an image or a folder")
    parser.add_argument("--b", type=Path, required=True, help="the same form as --a")
    parser.add_argument("--draws", type=int, default=0, help="augmentations averaged; 0 (default) for none")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentations")
    parser.add_argument("--preset", default="bgo", help="of the augmentations: b, g, c, o, co, bg, bgc, bgo, bgco")
    parser.add_argument("--raw", action="store_true", help="the latents have not been through the VAE's scaling")
    own = parser.parse_args(arguments)
    cli.start()
    from d2g_jax.metric.measure import measure

    measured = measure(own.weights, own.a, own.b, draws=own.draws, seed=own.seed, preset=own.preset, scaled=not own.raw)
    print(json.dumps(measured, indent=2))
    return 0


def _convert(arguments: list[str]) -> int:
    parser = cli.parser("metric convert", "published PyTorch weights of a metric -> a metric folder; needs PyTorch")
    parser.add_argument("file", type=Path, help="SPACE_latest_vgg16_tuned.pth, or torchvision's vgg16")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--space", help="of a LatentLPIPS: sd15, sd21, sdxl, sd3 or flux")
    parser.add_argument("--heads", type=Path, help="of pixel LPIPS: the lpips package's weights/v0.1/vgg.pth")
    own = parser.parse_args(arguments)
    from d2g_jax.metric.convert import convert

    print(convert(own.file, own.out, own.space, own.heads))
    return 0


def _lpips(arguments: list[str]) -> int:
    parser = cli.parser("lpips")
    parser.add_argument("--workdir", type=Path, required=True)
    own, config = cli.parse_with_config(parser, arguments)
    if own.config is None:
        raise UserError("--config is missing; give a file such as configs/lpips.py")
    cli.start(config)
    from d2g_jax.lpips_training.job import train_lpips

    print(json.dumps(train_lpips(config, own.workdir), indent=2))
    return 0


def _overfit(arguments: list[str]) -> int:
    parser = cli.parser("overfit")
    parser.add_argument("--workdir", type=Path, required=True)
    own, config = cli.parse_with_config(parser, arguments)
    cli.start(config)
    from d2g_jax.metric.overfit import overfit

    print(overfit(config, own.workdir))
    return 0


def _ablate(arguments: list[str]) -> int:
    from d2g_jax.commands import ablate as command

    parser = cli.parser("ablate")
    command.add_flags(parser)
    own, config = cli.parse_with_config(parser, arguments)
    cli.start(config)
    print(command.run(own, config))
    return 0


def _play(arguments: list[str]) -> int:
    from d2g_jax.commands import play as command

    own = command.read(arguments, cli.parser)
    cli.start()
    command.play(own)
    return 0


def _bench(arguments: list[str]) -> int:
    from d2g_jax.commands import bench as command

    if arguments[:1] in (["-h"], ["--help"]):
        print(command.usage())
        raise SystemExit(0)
    bench, start, out = command.read(arguments, cli.parser)
    cli.start(start, cache=False)
    from d2g_jax.bench.measure import format_report, write_report
    from d2g_jax.runtime.atomic import check_output

    if out:
        check_output(out, "bench.json")
    report = bench()
    print(format_report(report))
    if out:
        write_report(report, out)
    return 0


RUN = {
    "demo": _demo,
    "teacher": _teacher,
    "pairs": _pairs,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
    "plan": _plan,
    "metric": _metric,
    "lpips": _lpips,
    "overfit": _overfit,
    "ablate": _ablate,
    "play": _play,
    "bench": _bench,
}
"""The functions of `cli.JOBS`: arguments to an exit code."""
