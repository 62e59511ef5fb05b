"""The flags of `d2g overfit`."""

from __future__ import annotations

from d2g_jax.commands import common


def run(arguments: list[str]) -> int:
    parser = common.parser("overfit")
    parser.add_argument("--workdir", type=common.path, required=True)
    own, config = common.parse_with_config(parser, arguments, "mesh", "overfit")
    common.start(config)
    from d2g_jax.metric.overfit import overfit

    print(overfit(config, own.workdir))
    return 0
