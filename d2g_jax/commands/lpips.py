"""The flags of `d2g lpips`."""

from __future__ import annotations

import json

from d2g_jax.commands import common
from d2g_jax.runtime.errors import UserError


def run(arguments: list[str]) -> int:
    parser = common.parser("lpips")
    parser.add_argument("--workdir", type=common.path, required=True)
    own, config = common.parse_with_config(parser, arguments)
    if own.config is None:
        raise UserError("--config is missing; give a file such as configs/lpips.py")
    common.start(config)
    from d2g_jax.lpips_training.job import train_lpips

    print(json.dumps(train_lpips(config, own.workdir), indent=2))
    return 0
