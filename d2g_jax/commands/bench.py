"""The flags of `d2g bench NAME`."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from d2g_jax.commands import common
from d2g_jax.runtime.errors import UserError

BENCHES = {
    "sample": "one-step sampling at full size with random weights, against diffusers' modules",
    "train": "a whole training iteration by the programs of `d2g train`, on random data; G's step against PyTorch",
    "loss": "regression losses, forward and backward; E-LatentLPIPS against decoding for LPIPS, and PyTorch",
    "input": "reading shuffled batches of pairs, against tf.data through TFDS",
    "pairs": "the teacher's solutions, against diffusers' pipeline with the same weights",
}


def run(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print("usage: d2g bench NAME [--flag=value ...]\n\n" + "\n".join(f"  {k:8}{v}" for k, v in BENCHES.items()))
        raise SystemExit(0)
    bench, start, out = read(arguments)
    common.start(start, cache=False)
    from d2g_jax.bench.measure import format_report
    from d2g_jax.inputs.places import check_output
    from d2g_jax.runtime import atomic

    if out:
        check_output(out, "bench.json")
    report = bench()
    print(format_report(report))
    if out:
        atomic.write_json(out, report)
    return 0


def read(arguments: list[str]) -> tuple[Callable[[], dict[str, Any]], Any, Path | None]:
    """(the bench, a config with what JAX is started with, where the bench's JSON goes).

    No device is used before the bench is called. Raises `UserError` for an unknown name, flag or setting.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name not in BENCHES:
        raise UserError(f"unknown bench {name!r}; known are {', '.join(BENCHES)}")
    # JAX takes three quarters of a GPU at its start; here it shares it with another framework.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser = common.parser(f"bench {name}", BENCHES[name])
    parser.add_argument("--out", type=common.path, metavar="FILE.json", help="also write the report there")
    parser.add_argument("--cpu-devices", type=int, default=0, help="split the host's CPU into so many devices")
    # The other flags are fields of the bench's `Request`, whose defaults are theirs.
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("--repeats", type=int, help="rounds; medians are reported; default 5")
    {"sample": _sample, "train": _train, "loss": _loss, "input": _input, "pairs": _pairs}[name](parser)
    if name == "train":
        own, start = common.parse_with_config(parser, rest, *common.TRAINED)
        own.config = start
    else:
        own, start = parser.parse_args(rest), ConfigDict({"mesh": {}})
    fields = vars(own)
    out, devices = fields.pop("out"), fields.pop("cpu_devices")
    if devices:
        start.mesh.cpu_devices = devices

    def bench() -> dict[str, Any]:
        module = importlib.import_module(f"d2g_jax.bench.{name}")
        return module.run(module.Request(**fields))

    return bench, start, out


def _sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="digits, sd15 (default), sdxl, a hub id of a known size, or a folder")
    parser.add_argument("--batches", type=common.numbers, help="images in a call, as 1,8: the default on accelerators")
    parser.add_argument("--parts", type=_names, help="what is timed; default text,unet,vae,all")
    _add_dtype(parser)
    _add_torch(parser)
    parser.add_argument("--seed", type=int, help="of weights, noise and token ids")


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--losses", type=_names, help="each with programs of its own; default mse and the config's")
    parser.add_argument("--batches", type=common.numbers, help="images in a step, as 32,64; default: the config's")
    _add_torch(parser)
    parser.add_argument("--seed", type=int, help="of weights and data")


def _loss(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, help="pixels of a side, default 512; latents are an eighth")
    parser.add_argument("--batch", type=int, help="default 1")
    both = lambda text: ("float32", "bfloat16") if text == "both" else (text,)  # noqa: E731
    parser.add_argument("--dtype", type=both, dest="dtypes", help="float32, bfloat16 or both (default)")
    parser.add_argument("--preset", help="of the augmentation; default bgo")
    parser.add_argument(
        "--no-decode", action="store_false", dest="decode", help="leave out decode + LPIPS, which takes most memory"
    )
    _add_no_torch(parser)
    parser.add_argument("--seed", type=int, help="of weights, latents and the augmentation")


def _input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=common.path, help="a folder of pairs; default is one of random records")
    parser.add_argument("--shape", help="of random records: digits or sd15 (default)")
    parser.add_argument("--records", type=int, help="of random records; default 4096")
    parser.add_argument("--batch", type=int, help="default 64")


def _pairs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="sd15, sdxl, digits or a hub id of a known size, with random weights; or a folder, with its own; default "
        "is the digits teacher",
    )
    parser.add_argument("--prompt", help="of every image; default is one of the digits teacher's")
    parser.add_argument("--batch", type=int, help="default 64")
    parser.add_argument("--steps", type=int, help="default 50")
    parser.add_argument("--guidance", type=float, dest="guidance_scale", help="default 3")
    _add_dtype(parser)
    _add_torch(parser)
    parser.add_argument("--seed", type=int, help="of random weights and noise")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help="float32 or bfloat16; default: float32 on a CPU, else bfloat16")


def _add_no_torch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-torch", action="store_false", dest="torch", help="leave out the PyTorch counterparts")


def _add_torch(parser: argparse.ArgumentParser) -> None:
    _add_no_torch(parser)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; on GPUs the default")
