"""The flags of `d2g lpips`."""

from __future__ import annotations

import json

from d2g_jax.commands import common


def run(arguments: list[str]) -> int:
    parser = common.parser("lpips")
    parser.add_argument("--workdir", type=common.path, required=True)
    sections = ("mesh", "trunk", "images", "encoder", "classification", "triplets", "calibration")
    own, config = common.parse_with_config(parser, arguments, *sections, like="lpips")
    common.start(config)
    from d2g_jax.lpips_training.job import train_lpips

    print(json.dumps(train_lpips(config, own.workdir), indent=2))
    return 0
