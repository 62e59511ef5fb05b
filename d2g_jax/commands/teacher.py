"""The flags of `d2g teacher`."""

from __future__ import annotations

from d2g_jax.commands import common


def run(arguments: list[str]) -> int:
    parser = common.parser("teacher")
    parser.add_argument("--workdir", type=common.path, required=True)
    own, config = common.parse_with_config(parser, arguments)
    common.require_section(config, "teacher")
    common.start(config)
    from d2g_jax.teacher.teacher import make_teacher

    make_teacher(config.teacher, own.workdir)
    print(own.workdir)
    return 0
