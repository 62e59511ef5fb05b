"""`d2g bench train`: a whole training iteration by the very programs of `d2g train`, on random data.

Per loss G's step alone and with the adversary, then D's step and R1's, then a loop of `train.programs.iteration`, which
is held against the sum of its programs; and G's step with MSE in PyTorch. Weights are random, no pairs are read.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from d2g_jax.bench import torch_pipeline, torch_train
from d2g_jax.bench.measure import (
    PRODUCT,
    Bar,
    Candidate,
    check_counts,
    does_not_fit,
    make_report,
    peaks,
    product_candidate,
    ratio,
    time_in_turns,
)
from d2g_jax.bench.training import Run, Training, compile_run, state_bytes, with_loss_and_batch
from d2g_jax.inputs.numbers import SEED
from d2g_jax.plan.shapes import run_shapes
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.progress import Progress
from d2g_jax.train.step import Frozen

AGREE = 0.02
"""Largest difference of the two sides' first losses, over theirs, in float32: more is not the same work."""

OF_MSE = 0.87
"""Throughput with E-LatentLPIPS over that with MSE, at least: what remains of it at SD 1.5's size by FLOPs. The first
aim was 0.9 (docs/bench.md)."""

SHARE_OF_PEAK = 0.4
"""Of an iteration on an accelerator, at least."""

SD15_RATE = 27.0
"""Images per second and device of SD 1.5, at least: about what `SHARE_OF_PEAK` means on an H100. The first aim was
30."""

_G_STEPS = ("g_regression", "g_adversarial")

Runs = dict[str, Run]
"""By the name of the loss."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What `d2g bench train` is asked for.

    Attributes:
      config: of a run; its `pipeline` may also be one of `architectures.MODELS`.
      losses: names of `loss.name`; D, R1 and the loop are measured with the last of them. None: mse and the config's.
      batches: images in a step, each measured; None is the config's `train.batch_size`.
      repeats: rounds of turns.
      torch: whether PyTorch's step runs too, where it is installed.
      compile: torch.compile of its UNet; None: on GPUs alone.
      seed: of weights and data.
    """

    config: ml_collections.ConfigDict
    losses: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    repeats: int = 5
    torch: bool = True
    compile: bool | None = None
    seed: int = 0

    def resolved(self) -> Request:
        """The request with the config's batch and this device's default; raises `UserError` that names the flag."""
        check_counts(self, "repeats")
        SEED.check("--seed", self.seed)
        losses = tuple(dict.fromkeys(("mse", self.config.loss.name))) if self.losses is None else self.losses
        if len(set(losses)) < max(1, len(losses)):
            raise UserError(f"--losses={','.join(losses)}: give names of losses, each once")
        batches = self.batches or (self.config.train.batch_size,)
        if min(batches) < 1 or len(set(batches)) < len(batches):
            raise UserError(f"--batches={','.join(map(str, batches))}: give numbers of images, each once")
        compiles = torch_pipeline.compiles(self.compile)
        return dataclasses.replace(self, losses=losses, batches=batches, compile=compiles)

    def settings(self) -> dict[str, Any]:
        """Plain values for the report."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        names = ("groups", "micro_batch", "r1_micro_batch", "remat")
        return {**own, "config": self.config.name, **{name: self.config.train[name] for name in names}}


def run(request: Request) -> dict[str, Any]:
    """Measures and returns the report; `value` of a row is images per second.

    Where state and activations do not fit into memory, the programs are compiled, not run, and the rows say so.

    Raises `UserError` for a bad request or config, and, in float32, for a PyTorch step with another loss than ours.
    """
    request = request.resolved()
    mesh = meshes.make_mesh(request.config.mesh.data, request.config.mesh.fsdp)
    by_batch = _compile_all(request, mesh)
    runs = [run for of_batch in by_batch.values() for run in of_batch.values()]
    held = max(state_bytes(run.shapes) for run in runs) * jax.local_device_count()
    refused = does_not_fit(held + max(run.beside_state for run in runs))
    training = None if refused else Training(runs[-1], request.seed)
    candidates = [product_candidate(request.config.train.dtype)]
    for batch, of_batch in by_batch.items():
        candidates += _candidates(request, batch, of_batch, training, refused)
    rows = time_in_turns(candidates, request.repeats)
    for batch, of_batch in by_batch.items():
        rows += [_iteration(of_batch[loss].config, loss, batch, rows) for loss in request.losses]
    for row in rows[1:]:
        row["value"] = ratio(row.get("images"), row["seconds"])
    _check_losses(request, rows)
    return make_report("train", request.settings(), rows, list(_bars(request, rows)))


def _compile_all(request: Request, mesh: jax.sharding.Mesh) -> dict[int, Runs]:
    """By batch and loss: of all losses G's steps, of the last one also D's.

    Raises `UserError`, before the first compilation, as `d2g plan` does for a config that fits no mesh and a pipeline
    whose shapes are not known.
    """
    asked = list(itertools.product(request.batches, request.losses))
    shapes = [run_shapes(with_loss_and_batch(request.config, loss, batch), mesh) for batch, loss in asked]
    runs: dict[int, Runs] = {batch: {} for batch in request.batches}
    with Progress("compile", len(asked), "runs") as progress:
        for (batch, loss), of_run in progress.over(list(zip(asked, shapes, strict=True))):
            runs[batch][loss] = compile_run(of_run, None if loss == request.losses[-1] else _G_STEPS)
    return runs


def _candidates(
    request: Request, batch: int, runs: Runs, training: Training | None, refused: str | None
) -> Iterator[Candidate]:
    """Every loss' G, PyTorch's behind the one with MSE, D, R1, and the loop."""
    main, dtype = runs[request.losses[-1]], request.config.train.dtype
    data = placed = None
    frozen: dict[str, Frozen] = {}
    if training is not None:
        data = training.data(main)
        placed = meshes.place_whole_batch(data, main.shapes.mesh)
        frozen = {loss: training.frozen(run) for loss, run in runs.items()}

    def candidate(name: str, loss: str, program: str) -> Candidate:
        run, call = runs[loss], None
        if training is not None:
            call = functools.partial(training.step, run, program, frozen[loss], placed)
        return Candidate(name, dtype, call, run.facts[program], refused, lambda m: {"images": batch, **_loss(m)})

    # MSE goes first: PyTorch's step has the weights of before all calls, and the first losses of both are compared.
    steps = [(f"g, {loss} x{batch}", loss, "g_regression") for loss in sorted(runs, key=lambda loss: loss != "mse")]
    steps += [(f"g + adversary, {loss} x{batch}", loss, "g_adversarial") for loss in runs]
    last = request.losses[-1]
    steps += [(f"d x{batch}", last, "d"), (f"r1 x{batch}", last, "r1")]
    for name, loss, program in steps:
        if program not in runs[loss].facts:
            continue
        yield candidate(name, loss, program)
        if request.torch and name == f"g, mse x{batch}":
            yield torch_train.candidate(
                f"{name} (torch)", runs[loss], training, data, refused, compiles=request.compile
            )
    call = None if training is None else functools.partial(training.loop, main, frozen[last], data)
    describe = lambda m: {"images": main.loop_length * batch}  # noqa: E731
    yield Candidate(f"loop of {main.loop_length} x{batch}", dtype, call, not_run=refused, describe=describe)


def _loss(metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Of the first call, for comparison; D's rows have none."""
    return {"loss": float(metrics["loss_regression"])} if "loss_regression" in metrics else {}


def _iteration(config: ml_collections.ConfigDict, loss: str, batch: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row for G, D and R1 in their shares, from the others' medians."""
    by_name = {row["name"]: row for row in rows}
    a = config.adversarial
    shares = {f"g + adversary, {loss} x{batch}": 1.0, f"d x{batch}": 1.0, f"r1 x{batch}": 1.0 / max(a.r1_interval, 1)}
    parts = [(share, by_name[name]) for name, share in shares.items() if name in by_name]
    if f"g + adversary, {loss} x{batch}" not in by_name:
        parts = [(1.0, by_name[f"g, {loss} x{batch}"])]

    def total(key: str) -> float | None:
        values = [row[key] for _, row in parts]
        return None if None in values else sum(share * value for (share, _), value in zip(parts, values, strict=True))

    seconds, flops = total("seconds"), total("flops")
    peak = peaks(rows).get(config.train.dtype)
    return {
        **dict.fromkeys(by_name[PRODUCT]),
        "name": f"iteration, {loss} x{batch}",
        "dtype": config.train.dtype,
        "seconds": seconds,
        "best_seconds": total("best_seconds"),
        "all_seconds": [],
        "compile_seconds": sum(row["compile_seconds"] for _, row in parts),
        "temp_bytes": max(row["temp_bytes"] for _, row in parts),
        "peak_bytes": max(row["peak_bytes"] for _, row in parts),
        "flops": flops,
        "share_of_peak": ratio(ratio(flops, seconds), peak),
        "images": batch,
    }


def _check_losses(request: Request, rows: list[dict[str, Any]]) -> None:
    """In float32 the two sides' first steps, from the same weights, must have the same loss."""
    by_name, batch = {row["name"]: row for row in rows}, request.batches[0]
    ours, theirs = (by_name.get(f"g, mse x{batch}{side}", {}).get("loss") for side in ("", " (torch)"))
    if request.config.train.dtype != "float32" or ours is None or theirs is None:
        return
    if not abs(ours - theirs) <= AGREE * abs(theirs):
        raise UserError(f"the two sides' first losses are {ours:.6g} and {theirs:.6g}: nothing to compare")


def _bars(request: Request, rows: list[dict[str, Any]]) -> Iterator[Bar]:
    by_name = {row["name"]: row for row in rows}
    first, last, main = min(request.batches), max(request.batches), request.losses[-1]
    accelerator = jax.default_backend() != "cpu"

    def value(name: str, key: str = "seconds") -> float | None:
        return by_name.get(name, {}).get(key)

    if {"mse", "e_latent_lpips"} <= set(request.losses):
        for step in ("g", "iteration"):
            part = ratio(value(f"{step}, mse x{last}"), value(f"{step}, e_latent_lpips x{last}"))
            yield Bar.at_least(f"{step} with e_latent_lpips has at least {OF_MSE} of mse's throughput", part, OF_MSE)
    if request.torch and f"g, mse x{first} (torch)" in by_name:
        faster = ratio(value(f"g, mse x{first} (torch)"), value(f"g, mse x{first}"))
        yield Bar.at_least("g with mse is at least as fast as PyTorch's", faster, 1.0)
    for batch in request.batches:
        for name, row in by_name.items():
            if name.startswith("loop of ") and name.endswith(f" x{batch}"):
                alone = ratio(row["seconds"], row["images"] / batch) if row["seconds"] else None
                longer = ratio(alone, value(f"iteration, {main} x{batch}"))
                yield Bar.at_most(f"x{batch}: the loop takes at most 1.02 of its programs' time", longer, 1.02)
    if accelerator:
        share = value(f"iteration, {main} x{last}", "share_of_peak")
        claim = f"an iteration runs at {SHARE_OF_PEAK} of the measured peak at least"
        yield Bar.at_least(claim, share, SHARE_OF_PEAK)
        if request.config.name == "sd15":
            rate = ratio(value(f"iteration, {main} x{last}", "value"), jax.device_count())
            yield Bar.at_least(f"at least {SD15_RATE:g} images per second and device", rate, SD15_RATE)
    if last > first:
        growth = ratio(
            ratio(value(f"iteration, {main} x{last}"), last), ratio(value(f"iteration, {main} x{first}"), first)
        )
        yield Bar.at_most(f"an image of {last} takes at most 1.05 times as long as of {first}", growth, 1.05)
