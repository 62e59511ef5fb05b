"""The flags of `d2g demo`."""

from __future__ import annotations

from pathlib import Path

from d2g_jax.commands import common


def run(arguments: list[str]) -> int:
    parser = common.parser("demo")
    parser.add_argument("--workdir", type=common.path, default=Path("runs/demo"))
    parser.add_argument("--full", action="store_true", help="also pseudo-Huber and LatentLPIPS students")
    own, config = common.parse_with_config(parser, arguments, *common.TRAINED, "evaluation")
    common.start(config)
    from d2g_jax.demo.demo import demo

    print(demo(config, own.workdir, full=own.full))
    return 0
