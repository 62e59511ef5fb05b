"""The flags of `d2g teacher` and `d2g teacher convert`."""

from __future__ import annotations

from d2g_jax.commands import common


def run(arguments: list[str]) -> int:
    if arguments[:1] == ["convert"]:
        return _convert(arguments[1:])
    parser = common.parser("teacher")
    parser.add_argument("--workdir", type=common.path, required=True)
    own, config = common.parse_with_config(parser, arguments, "mesh", "teacher")
    common.start(config)
    from d2g_jax.teacher.teacher import make_teacher

    make_teacher(config.teacher, own.workdir)
    print(own.workdir)
    return 0


def _convert(arguments: list[str]) -> int:
    parser = common.parser("teacher convert", "an EDM network (.pt of tensors, or OpenAI's Flax msgpack) -> a teacher")
    parser.add_argument("file", type=common.path, help="a plain state dict, or edm_cifar10_ema")
    parser.add_argument("--out", type=common.path, required=True, help="a new folder")
    own = parser.parse_args(arguments)
    from d2g_jax.runtime.interrupt import started
    from d2g_jax.teacher.convert import convert

    started()
    print(convert(own.file, own.out))
    return 0
