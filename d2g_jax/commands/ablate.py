"""The flags of `d2g ablate NAME`. Nothing of jax is imported before the job runs."""

from __future__ import annotations

import argparse

from d2g_jax.ablate.rows import ABLATIONS
from d2g_jax.commands import common

SEEDS = 3
"""How many there are without --seeds."""


def run(arguments: list[str]) -> int:
    parser = common.parser("ablate")
    parser.add_argument("name", metavar="NAME", choices=tuple(ABLATIONS), help=" or ".join(ABLATIONS))
    parser.add_argument("--workdir", type=common.path, required=True)
    parser.add_argument(
        "--pairs", type=common.path, help="finished folder of pairs; default WORKDIR/pairs/1.0.0, made first"
    )
    parser.add_argument("--seeds", type=_seeds, help="of training, as 0,1,2; default three from config.seed on")
    own, config = common.parse_with_config(parser, arguments, *common.TRAINED)
    common.start(config)
    from d2g_jax.ablate.job import ablate

    seeds = own.seeds or tuple(range(config.seed, config.seed + SEEDS))
    print(ablate(config, own.workdir, ABLATIONS[own.name], seeds, own.pairs))
    return 0


def _seeds(text: str) -> tuple[int, ...]:
    """Distinct numbers with commas between them."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: give different numbers from 0 to {2**32 - 1}, such as 0,1,2")
    return tuple(map(int, parts))
