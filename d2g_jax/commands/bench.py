"""The flags of `d2g bench NAME`."""

from __future__ import annotations

import argparse
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
    from d2g_jax.bench.measure import format_report, write_report
    from d2g_jax.inputs.places import check_output

    if out:
        check_output(out, "bench.json")
    report = bench()
    print(format_report(report))
    if out:
        write_report(report, out)
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
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are reported")
    parser.add_argument("--cpu-devices", type=int, default=0, help="split the host's CPU into so many devices")
    if name == "train":
        bench, start = _train(parser, rest)
    else:
        of_name = {"sample": _sample, "loss": _loss, "input": _input, "pairs": _pairs}
        bench, start = of_name[name](parser, rest), ConfigDict({"mesh": {}})
    own, _ = parser.parse_known_args(rest)
    if own.cpu_devices:
        start.mesh.cpu_devices = own.cpu_devices
    return bench, start, own.out


def _sample(parser: argparse.ArgumentParser, rest: list[str]) -> Callable[[], dict[str, Any]]:
    parser.add_argument("--model", default="sd15", help="digits, sd15, sdxl, a hub id of a known size, or a folder")
    parser.add_argument("--batches", type=common.numbers, help="images in a call, as 1,8: the default on accelerators")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--parts", default="text,unet,vae,all", help="what is timed")
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise and token ids")
    parser.add_argument("--no-torch", action="store_true", help="leave out diffusers' modules")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; on GPUs the default")
    own = parser.parse_args(rest)

    def bench() -> dict[str, Any]:
        from d2g_jax.bench.sample import SampleRequest, run_sample

        parts, with_torch = tuple(own.parts.split(",")), not own.no_torch
        request = SampleRequest(
            own.model, own.batches, own.dtype, parts, own.repeats, with_torch, own.compile, own.seed
        )
        return run_sample(request)

    return bench


def _train(parser: argparse.ArgumentParser, rest: list[str]) -> tuple[Callable[[], dict[str, Any]], Any]:
    from d2g_jax.config.configuration import read_config

    parser.add_argument(
        "--config", type=common.path, metavar="FILE.py", help="of the run; --config.KEY=VALUE changes it"
    )
    parser.add_argument("--losses", default="mse,e_latent_lpips", help="each with programs of its own")
    parser.add_argument("--batches", type=common.numbers, help="images in a step, as 32,64; default: the config's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--no-torch", action="store_true", help="leave out the PyTorch counterpart")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; on GPUs the default")
    overrides = [flag for flag in rest if flag.startswith("--config.")]
    own = parser.parse_args([flag for flag in rest if flag not in overrides])
    config = read_config(own.config, overrides)

    def bench() -> dict[str, Any]:
        from d2g_jax.bench.train import TrainRequest, run_train

        losses, with_torch = tuple(own.losses.split(",")), not own.no_torch
        request = TrainRequest(config, losses, own.batches, own.repeats, with_torch, own.compile, own.seed)
        return run_train(request)

    return bench, config


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
        from d2g_jax.bench.loss import LossRequest, run_loss
        from d2g_jax.bench.networks import DTYPES

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
    parser.add_argument("--pairs", type=common.path, help="a folder of pairs; default is one of random records")
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
    parser.add_argument(
        "--model",
        help="sd15, sdxl, digits or a hub id of a known size, with random weights; or a folder, with its own; default "
        "is the digits teacher",
    )
    parser.add_argument("--prompt", default="a bold red seven slanted to the right on navy and white stripes")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and noise")
    parser.add_argument("--no-torch", action="store_true", help="leave out diffusers' pipeline")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile of diffusers' UNet; on GPUs the default"
    )
    own = parser.parse_args(rest)

    def bench() -> dict[str, Any]:
        from d2g_jax.bench.pairs import PairsRequest, run_pairs
        from d2g_jax.digits.config import WEIGHTS

        request = PairsRequest(
            model=own.model or str(WEIGHTS / "pipeline"),
            prompt=own.prompt,
            batch=own.batch,
            steps=own.steps,
            guidance_scale=own.guidance,
            dtype=own.dtype,
            repeats=own.repeats,
            torch=not own.no_torch,
            compile=own.compile,
            seed=own.seed,
        )
        return run_pairs(request)

    return bench
