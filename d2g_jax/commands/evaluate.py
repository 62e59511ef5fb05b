"""The flags of `d2g evaluate`, `d2g evaluate reference` and `d2g evaluate table`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence

from d2g_jax.commands import common
from d2g_jax.evaluate.protocols import PROTOCOLS
from d2g_jax.results import metric_weights
from d2g_jax.runtime.errors import UserError


def run(arguments: list[str]) -> int:
    job = read(arguments)
    # The metrics' networks run in PyTorch, on the same device: jax must not take all of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    common.start()
    print(job())
    return 0


def read(arguments: Sequence[str]) -> Callable[[], str]:
    """The job that the arguments ask for: run, it returns what is to be printed."""
    if arguments[:1] == ["reference"]:
        return _reference(arguments[1:])
    if arguments[:1] == ["table"]:
        return _table(arguments[1:])
    return _evaluate(arguments)


def _evaluate(arguments: Sequence[str]) -> Callable[[], str]:
    text = (
        "measure a model or a folder of images by a protocol; `evaluate reference` makes reference statistics, "
        "`evaluate table RESULT.json ...` lays results side by side"
    )
    parser = common.parser("evaluate", text)
    parser.add_argument(
        "--config", type=common.path, metavar="FILE.py", help="get_config() gives flags; configs/evaluate/"
    )
    parser.add_argument("--protocol", help=", ".join(PROTOCOLS))
    parser.add_argument("--images", type=common.path, help="folder of images, one for each prompt in order")
    parser.add_argument("--prompts", type=common.path, help="one prompt per line; the digits have their own")
    common.add_prompts_column(parser)
    parser.add_argument(
        "--reference", type=common.path, help="file of `d2g evaluate reference`, or a folder of real images"
    )
    parser.add_argument(
        "--diversity-images", type=common.path, help="several images of each prompt; --model draws its own"
    )
    parser.add_argument("--teacher-images", type=common.path, help="the teacher's, of the same prompts and noise")
    parser.add_argument("--metrics", default="", help="names with commas; default is all that the given files allow")
    parser.add_argument("--samples", type=int, help="only the first N; the result then says that it is incomplete")
    parser.add_argument("--name", help="of the system, for tables")
    parser.add_argument("--out", type=common.path, help="result file, JSON")
    _add_images(parser)
    weights = parser.add_argument_group("weights of the metrics; nothing is ever downloaded")
    for name, where in metric_weights.WHERE.items():
        weights.add_argument(metric_weights.flag(name), type=common.path, help=where.replace("%", "%%"))
    model = parser.add_argument_group("a model in place of --images")
    common.add_model_flags(model, required=False)
    model.add_argument("--drawn", type=common.path, help="where its images go and are found again; default OUT-drawn")
    model.add_argument("--seed", type=int, default=0, help="of the noise")
    model.add_argument("--draw-batch", type=int, default=64, help="images per call of the model, all devices together")
    model.add_argument("--tiled", action="store_true", help="decode large images in overlapping tiles")
    common.add_solution_flags(parser.add_argument_group("how a teacher is solved; a student has none of these"))
    own = parser.parse_args(arguments, _of_config(parser, arguments))
    if own.out is None:
        raise UserError("--out is missing; give a result file such as a.json")
    if own.protocol is None:
        raise UserError(f"--protocol is missing; give one of {', '.join(PROTOCOLS)}")
    if (own.model is None) == (own.images is None):
        raise UserError("give either --model=M or --images=FOLDER")
    return lambda: _run(own)


def _of_config(parser: common.Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """The fields of --config as if they were given as flags; None is a flag that is not given.

    Raises `UserError` for a field that is no flag, or whose value the flag would not take.
    """
    first = common.Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=common.path)
    file = first.parse_known_args(arguments)[0].config
    if file is None:
        return argparse.Namespace()
    from d2g_jax.config.configuration import load_config

    known = {action.dest: action for action in parser._actions if action.option_strings}
    flags: list[str] = []
    for name, value in load_config(file).items():
        if name not in known or name in ("config", "help"):
            raise UserError(f"--config={file}: {name} is no flag of `{parser.prog}`")
        (flag,) = known[name].option_strings
        several = isinstance(value, list | tuple)
        if several and not isinstance(known[name].default, list):
            raise UserError(f"--config={file}: {name}={value!r}: give one value, not several")
        if known[name].nargs == 0 and isinstance(value, bool):
            flags += [flag] if value else []
        elif value is not None:
            flags += [f"{flag}={one}" for one in (value if several else [value])]
    try:
        return parser.parse_args(flags)
    except UserError as error:
        raise UserError(f"--config={file}: {error}") from error


def _run(own: argparse.Namespace) -> str:
    from d2g_jax.evaluate.job import evaluate
    from d2g_jax.evaluate.plan import Request
    from d2g_jax.sample.sampler import Parts

    if own.images is not None and (common.given_solution(own) or own.drawn or common.parts(own) != Parts()):
        raise UserError("--images are drawn already; leave out --system, --unet, --drawn and a teacher's flags")
    if own.model is not None and own.diversity_images is not None:
        raise UserError("--model draws its own images for diversity; leave out --diversity-images")
    fields = {field.name: getattr(own, field.name) for field in dataclasses.fields(Request) if hasattr(own, field.name)}
    weights = {name: file for name in metric_weights.WHERE if (file := getattr(own, f"weights_{name}")) is not None}
    fields |= {
        "model": None if own.model is None else common.asked(own, own.draw_batch),
        "drawn": own.drawn or own.out.parent / f"{own.out.stem}-drawn",
        "weights": weights,
        "metrics": tuple(filter(None, own.metrics.split(","))),
        "batch_size": own.batch,
    }
    request = Request(**fields)
    result = evaluate(request, own.out)
    shown = {name: result[name] for name in ("system", "samples", "complete", "metrics")}
    return json.dumps({"out": str(own.out), **shown}, indent=2, ensure_ascii=False)


def _reference(arguments: Sequence[str]) -> Callable[[], str]:
    parser = common.parser(
        "evaluate reference", "features of real images by a protocol, to compare generated ones with"
    )
    parser.add_argument("--protocol", required=True, help=", ".join(PROTOCOLS))
    parser.add_argument(
        "--images",
        type=common.path,
        required=True,
        help="folder of real images of any sizes and formats, or one that TFDS prepared",
    )
    names = ("inception", "dinov2", "clip_l14_336")
    for name in names:
        parser.add_argument(metric_weights.flag(name), type=common.path, dest=name, help=metric_weights.WHERE[name])
    parser.add_argument("--out", type=common.path, required=True, help=".npz file")
    _add_images(parser)
    own = parser.parse_args(arguments)

    def run() -> str:
        from d2g_jax.evaluate.job import make_reference

        options = {"max_corrupt": own.max_corrupt, "batch_size": own.batch}
        weights = {name: file for name in names if (file := getattr(own, name)) is not None}
        made = make_reference(own.protocol, own.images, weights, own.out, **options)
        return json.dumps({"out": str(own.out), **made}, indent=2)

    return run


def _table(arguments: Sequence[str]) -> Callable[[], str]:
    parser = common.parser(
        "evaluate table", "results side by side; what was measured differently never shares a column"
    )
    parser.add_argument("results", type=common.path, nargs="+", metavar="RESULT.json")
    own = parser.parse_args(arguments)

    def run() -> str:
        from d2g_jax.results.results import read_result
        from d2g_jax.results.table import table

        return table([read_result(file) for file in own.results])

    return run


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-corrupt", type=int, default=0, help="unreadable images to leave out; default 0")
    parser.add_argument("--batch", type=int, default=64, help="images per call of the metrics' networks")
