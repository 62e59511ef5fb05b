"""The flags of `d2g train`."""

from __future__ import annotations

from d2g_jax.commands import common


def run(arguments: list[str]) -> int:
    common.join(arguments)
    parser = common.parser("train")
    parser.add_argument("--workdir", type=common.path, required=True)
    parser.add_argument(
        "--pairs", type=common.place, help="folder of pairs, here or in a bucket; default WORKDIR/pairs/1.0.0"
    )
    own, config = common.parse_with_config(parser, arguments, *common.TRAINED)
    common.start(config, same={"job": "train", "--workdir": str(own.workdir), "--pairs": str(own.pairs)})
    from d2g_jax.pairs import FOLDER
    from d2g_jax.train import train

    train(config, own.workdir, own.pairs or own.workdir / FOLDER)
    common.print_once(own.workdir / "report.html")
    return 0
