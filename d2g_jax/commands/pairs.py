"""The flags of `d2g pairs` and `d2g pairs verify`."""

from __future__ import annotations

from d2g_jax.commands import common
from d2g_jax.inputs.numbers import SEED
from d2g_jax.runtime.errors import UserError


def run(arguments: list[str]) -> int:
    if arguments[:1] == ["verify"]:
        return _verify(arguments[1:])
    common.join(arguments)
    parser = common.parser("pairs")
    parser.add_argument("--workdir", type=common.place, required=True, help="a folder, here or in a bucket (gs://...)")
    parser.add_argument("--dry-run", action="store_true", help="print records, bytes, FLOPs and hours; write nothing")
    own, config = common.parse_with_config(parser, arguments, "mesh", "pairs")
    common.start(config, same={"job": "pairs", "--workdir": str(own.workdir)})
    if own.dry_run:
        from d2g_jax.pairs.estimate import estimate

        print(estimate(config, own.workdir))
        return 0
    from d2g_jax.pairs import make_pairs

    common.print_once(make_pairs(config, own.workdir))
    return 0


def _verify(arguments: list[str]) -> int:
    parser = common.parser("pairs verify", "re-read every record: checksums, ids, shapes, finite values, noise redrawn")
    parser.add_argument("folder", type=common.place)
    parser.add_argument(
        "--repair", action="store_true", help="remove bad shards, which `d2g pairs` remakes, and bad indexes"
    )
    parser.add_argument(
        "--resolve", type=int, metavar="K", help="also solve K random records again with the --config that made them"
    )
    parser.add_argument("--resolve-seed", type=int, default=0, metavar="SEED", help="which K records; default 0")
    own, config = common.parse_with_config(parser, arguments, "mesh", "pairs")
    SEED.check("--resolve-seed", own.resolve_seed)
    if own.resolve is not None:
        common.start(config)
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
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{own.folder}: {count}; --repair removes what is bad")
    total = len(records.PairSource(own.folder))
    again = "" if own.resolve is None else f", {min(own.resolve, total)} solved again"
    print(f"{own.folder}: {total} records, all good{again}")
    return 0
