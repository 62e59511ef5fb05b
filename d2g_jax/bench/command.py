"""The flags of `d2g bench NAME`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2g_jax.errors import UserError

BENCHES = {
    "loss": "regression losses, forward and backward; E-LatentLPIPS against decoding for LPIPS, and PyTorch",
    "input": "reading shuffled batches of pairs, against tf.data through TFDS",
    "pairs": "the teacher's solutions, against diffusers' pipeline on the same folder",
}

MakeParser = Callable[[str, str], argparse.ArgumentParser]
"""(what stands behind `d2g`, description) -> a parser."""


def usage() -> str:
    """What there is, for `d2g bench --help`."""
    return "usage: d2g bench NAME [--flag=value ...]\n\n" + "\n".join(f"  {k:8}{v}" for k, v in BENCHES.items())


def read(arguments: list[str], make_parser: MakeParser) -> tuple[Callable[[], dict[str, Any]], int, Path | None]:
    """(the bench, how many devices the host's CPU is split into (0: as it is), where its JSON goes).

    Nothing of jax is imported before the bench is called. Raises `UserError` for an unknown name or flag.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name not in BENCHES:
        raise UserError(f"unknown bench {name!r}; known are {', '.join(BENCHES)}")
    parser = make_parser(f"bench {name}", BENCHES[name])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the report there")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are reported")
    parser.add_argument("--cpu-devices", type=int, default=0, help="split the host's CPU into so many devices")
    bench = {"loss": _loss, "input": _input, "pairs": _pairs}[name](parser, rest)
    own, _ = parser.parse_known_args(rest)
    return bench, own.cpu_devices, own.out


def _loss(parser: argparse.ArgumentParser, rest: list[str]) -> Callable[[], dict[str, Any]]:
    parser.add_argument("--size", type=int, default=512, help="pixels of a side; latents are an eighth")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both", help="of the networks")
    parser.add_argument("--preset", default="bgo", help="of the augmentation")
    parser.add_argument("--no-decode", action="store_true", help="leave out decode + LPIPS, which takes most memory")
    parser.add_argument("--seed", type=int, default=0, help="of weights, latents and the augmentation")
    parser.add_argument("--no-torch", action="store_true", help="leave out the PyTorch counterparts")
    own = parser.parse_args(rest)

    def bench() -> dict[str, Any]:
        from d2g_jax.bench.loss import DTYPES, LossRequest, run_loss

        request = LossRequest(
            size=own.size,
            batch=own.batch,
            repeats=own.repeats,
            dtypes=DTYPES if own.dtype == "both" else (own.dtype,),
            preset=own.preset,
            decode=not own.no_decode,
            torch=not own.no_torch,
            seed=own.seed,
        )
        return run_loss(request)

    return bench


def _input(parser: argparse.ArgumentParser, rest: list[str]) -> Callable[[], dict[str, Any]]:
    parser.add_argument("--pairs", type=Path, help="a folder of pairs; default is one of random records")
    parser.add_argument("--shape", default="sd15", help="of random records: digits or sd15")
    parser.add_argument("--records", type=int, default=4096, help="of random records")
    parser.add_argument("--batch", type=int, default=64)
    own = parser.parse_args(rest)

    def bench() -> dict[str, Any]:
        from d2g_jax.bench.input import InputRequest, run_input

        request = InputRequest(own.pairs, own.shape, own.records, own.batch, own.repeats)
        return run_input(request)

    return bench


def _pairs(parser: argparse.ArgumentParser, rest: list[str]) -> Callable[[], dict[str, Any]]:
    parser.add_argument("--model", help="pipeline folder or hub id; default is the digits teacher")
    parser.add_argument("--prompt", default="a bold handwritten seven slanted to the right")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile of diffusers' UNet")
    own = parser.parse_args(rest)

    def bench() -> dict[str, Any]:
        from d2g_jax.bench.pairs import PairsRequest, run_pairs
        from d2g_jax.digits.config import WEIGHTS

        model = own.model or str(WEIGHTS / "pipeline")
        request = PairsRequest(
            model, own.prompt, own.batch, own.steps, own.guidance, own.dtype, own.repeats, own.compile
        )
        return run_pairs(request)

    return bench
