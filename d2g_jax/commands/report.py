"""The flags of `d2g report`."""

from __future__ import annotations

from d2g_jax.commands import common


def run(arguments: list[str]) -> int:
    parser = common.parser("report")
    parser.add_argument("--workdir", type=common.path, required=True)
    own = parser.parse_args(arguments)
    from d2g_jax.report import write_report
    from d2g_jax.runtime.interrupt import started

    started()
    print(write_report(own.workdir))
    return 0
