"""The flags of `d2g plan`, `d2g plan sample` and `d2g plan table`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from d2g_jax.commands import common
from d2g_jax.inputs.places import check_output


def run(arguments: list[str]) -> int:
    if arguments[:1] == ["table"]:
        return _table(arguments[1:])
    if arguments[:1] == ["sample"]:
        return _sample(arguments[1:])
    parser = common.parser("plan")
    _add_flags(parser)
    parser.add_argument("--no-search", action="store_true", help="if it does not fit, do not look for what would")
    own, config = common.parse_with_config(parser, arguments, *common.TRAINED)
    from d2g_jax.plan import job

    _check_out(own)
    target = job.start(own.topology, own.method)
    _print(own, *job.make_report(config, target, own.method, search=not own.no_search))
    return 0


def _sample(arguments: list[str]) -> int:
    parser = common.parser("plan sample", "one-step sampling on one device of a topology: memory, FLOPs, least time")
    _add_flags(parser)
    parser.add_argument("--model", default="sd15", help="digits, sd15, sdxl, a hub id of a known size, or a folder")
    parser.add_argument("--batches", type=common.numbers, default=(1, 8), help="images in a call; default 1,8")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    own = parser.parse_args(arguments)
    from d2g_jax.plan import job

    _check_out(own)
    target = job.start(own.topology, own.method)
    _print(own, *job.make_sampling_report(own.model, target, own.dtype, own.batches, own.method))
    return 0


def _table(arguments: list[str]) -> int:
    parser = common.parser("plan table", "plans that --out wrote, as one Markdown table")
    parser.add_argument("files", type=common.path, nargs="+", metavar="FILE.json")
    own = parser.parse_args(arguments)
    from d2g_jax.plan import job

    print(job.table(own.files))
    return 0


def _add_flags(parser: common.Parser) -> None:
    parser.add_argument("--topology", required=True, help="v5e:4x4, v5p:2x2x4, v6e:4x4, gpu:8xH100, cpu:8 ...")
    parser.add_argument(
        "--method",
        choices=["compile", "formula"],
        default="compile",
        help="compile for the target (TPUs need libtpu, GPUs are always planned by formula), or count the trace",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--out", type=common.path, metavar="FILE.json", help="also write the plan as JSON")


def _check_out(own: argparse.Namespace) -> None:
    """Before an hour's compilation, not after it."""
    if own.out:
        check_output(own.out, "plan.json")


def _print(own: argparse.Namespace, text: str, report: dict[str, Any]) -> None:
    from d2g_jax.runtime import atomic

    print(json.dumps(report, indent=1) if own.json else text)
    if own.out:
        atomic.write_json(own.out, report, indent=1)
