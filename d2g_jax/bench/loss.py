"""`d2g bench loss`: what a regression loss costs, forward and backward to the generated latent.

In one run and in turns: MSE, E-LatentLPIPS's augmentation, LatentLPIPS (its network alone), E-LatentLPIPS (both), and
what it replaces, decoding both latents for pixel LPIPS; and LatentLPIPS's network in PyTorch where that is installed.
All networks have random weights, which take as long as trained ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.bench import torch_metric
from d2g_jax.bench.measure import (
    Bar,
    Candidate,
    check_counts,
    compile_candidate,
    flops,
    make_report,
    product_candidate,
    ratio,
    time_in_turns,
)
from d2g_jax.bench.networks import DTYPES, random_params
from d2g_jax.inputs.numbers import SEED
from d2g_jax.losses import augment, lpips, perceptual
from d2g_jax.models import vae, vgg
from d2g_jax.models.network import Params
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.progress import Progress


@dataclasses.dataclass(frozen=True)
class Networks:
    """What is measured: LatentLPIPS's trunk and its latent space, LPIPS's trunk, and the decoder before it."""

    space: perceptual.LatentSpace
    latent: vgg.VGGConfig
    pixels: vgg.VGGConfig
    autoencoder: vae.VaeConfig


SD15 = Networks(
    perceptual.latent_space("sd15"),
    vgg.VGGConfig(),
    vgg.PIXELS,
    vae.VaeConfig(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    ),
)
"""Full size."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What `d2g bench loss` is asked for.

    Attributes:
      size: height and width of the images in pixels; latents are an eighth.
      batch: latents in a call.
      repeats: rounds of turns.
      dtypes: of the networks, any of `DTYPES`. MSE and augmentation are float32 always.
      preset: of the augmentation.
      decode: whether decoding with LPIPS is measured too; it needs many times the memory.
      torch: whether the PyTorch counterparts run where they are installed.
      seed: of weights, latents and the augmentation's draw.
    """

    size: int = 512
    batch: int = 1
    repeats: int = 5
    dtypes: tuple[str, ...] = DTYPES
    preset: str = "bgo"
    decode: bool = True
    torch: bool = True
    seed: int = 0

    def check(self, networks: Networks) -> None:
        """Raises `UserError` that names the flag."""
        step = networks.autoencoder.downscale
        smallest = max(step * 2 ** sum(networks.latent.pools), 2 ** sum(networks.pixels.pools))
        if self.size < smallest or self.size % step:
            raise UserError(f"--size={self.size}: give pixels, a multiple of {step} and {smallest} at least")
        check_counts(self, "batch", "repeats")
        SEED.check("--seed", self.seed)
        if not self.dtypes or not set(self.dtypes) <= set(DTYPES):
            raise UserError(f"--dtype={','.join(self.dtypes)}: give {', '.join(DTYPES)} or both")
        augment.check_preset(self.preset)


@dataclasses.dataclass(frozen=True, eq=False)
class _Inputs:
    """Arguments of the programs; passed to them, so that none is a constant."""

    generated: jax.Array
    target: jax.Array
    key: jax.Array
    trunk: Params
    heads: list[np.ndarray]


def run(request: Request, networks: Networks = SD15) -> dict[str, Any]:
    """Measures and returns the report, a dict for JSON: `measure.format_report` prints it.

    Rows as of `measure.time_in_turns`, with `value`, the loss itself. Raises `UserError` for a bad request.
    """
    request.check(networks)
    inputs = _inputs(request, networks)
    metrics = {dtype: _latent_metric(networks, inputs, dtype) for dtype in request.dtypes}
    backward = _backward_by_half(metrics[request.dtypes[0]], inputs)
    programs = [*_in_latents(request, metrics), *(_decoded(request, networks) if request.decode else ())]
    candidates = [product_candidate(dtype) for dtype in request.dtypes]
    with Progress("compile", len(programs), "programs") as progress:
        candidates += [_compiled(*program, inputs) for program in progress.over(programs)]
    if request.torch:
        latents = (np.asarray(inputs.generated), np.asarray(inputs.target))
        candidates += torch_metric.candidates(
            networks.latent, inputs.trunk, inputs.heads, networks.space, latents, request.dtypes
        )
    rows = time_in_turns(candidates, request.repeats)
    return make_report("loss", dataclasses.asdict(request), rows, _bars(rows, request.dtypes, backward))


def _random_heads(config: vgg.VGGConfig, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.float32(0.1) * rng.random(width, np.float32) for width in config.widths]


def _inputs(request: Request, networks: Networks) -> _Inputs:
    """Scaled latents of unit deviation with correlation 0.8: a student on its way."""
    rng = np.random.default_rng(request.seed)
    side = request.size // networks.autoencoder.downscale
    target, other = rng.standard_normal((2, request.batch, side, side, networks.space.channels), np.float32)
    trunk = random_params(vgg.build_training(networks.latent).abstract(), request.seed + 1)
    heads = _random_heads(networks.latent, request.seed)
    generated = jnp.asarray(0.8 * target + np.float32(0.6) * other)
    return _Inputs(generated, jnp.asarray(target), jax.random.key(request.seed), trunk, heads)


def _latent_metric(networks: Networks, inputs: _Inputs, dtype: str) -> perceptual.LatentLPIPS:
    return perceptual.LatentLPIPS.from_params(
        networks.latent, inputs.trunk, inputs.heads, networks.space, jnp.dtype(dtype)
    )


Loss = Callable[..., jax.Array]
"""(generated, target, key, metric) -> a scalar."""

Program = tuple[str, str, Loss, Any]
"""Name and dtype of a row, and its loss with its metric."""


def _mse(generated: jax.Array, target: jax.Array, key: jax.Array, metric: Any) -> jax.Array:
    return perceptual.mse(generated, target).mean()


def _augmentation(preset: str) -> Loss:
    """Both latents through one draw. The product with the target's, held constant, has a gradient like any loss's."""

    def loss(generated: jax.Array, target: jax.Array, key: jax.Array, metric: Any) -> jax.Array:
        transform = augment.draw(key, preset, generated.shape[0])
        other = augment.apply(transform, jax.lax.stop_gradient(target), stream=1)
        return (augment.apply(transform, generated) * other).mean()

    return loss


def _latent_lpips(generated: jax.Array, target: jax.Array, key: jax.Array, metric: Any) -> jax.Array:
    return metric.distance(generated, target, scaled=True).mean()


def _e_latent_lpips(preset: str) -> Loss:
    def loss(generated: jax.Array, target: jax.Array, key: jax.Array, metric: Any) -> jax.Array:
        return perceptual.e_latent_lpips(metric, key, generated, target, preset, scaled=True).mean()

    return loss


def _backward_by_half(metric: perceptual.LatentLPIPS, inputs: _Inputs) -> float:
    """FLOPs of the backward pass by those of one forward half: about 1 where the target has no backward pass, else 2.

    A gradient by the input alone costs a convolution what its forward pass does.
    """
    arguments = (inputs.generated, inputs.target, inputs.key, metric)
    forward = flops(jax.jit(_latent_lpips).trace(*arguments))
    both = flops(jax.jit(jax.value_and_grad(_latent_lpips)).trace(*arguments))
    return 2 * (both - forward) / forward


def _compiled(name: str, dtype: str, loss: Loss, metric: Any, inputs: _Inputs) -> Candidate:
    arguments = (inputs.generated, inputs.target, inputs.key, metric)
    value = lambda result: {"value": float(result[0])}  # noqa: E731
    return compile_candidate(name, dtype, jax.value_and_grad(loss), *arguments, describe=value)


def _in_latents(request: Request, metrics: dict[str, perceptual.LatentLPIPS]) -> Iterator[Program]:
    yield "mse", "float32", _mse, None
    yield "augmentation", "float32", _augmentation(request.preset), None
    for dtype, metric in metrics.items():
        yield "latent_lpips", dtype, _latent_lpips, metric
        yield "e_latent_lpips", dtype, _e_latent_lpips(request.preset), metric


def _decoded(request: Request, networks: Networks) -> Iterator[Program]:
    """Decoding and pixel LPIPS, of random weights."""
    trunk = random_params(vgg.build(networks.pixels).abstract(), request.seed + 2)
    autoencoder = random_params(vae.build(networks.autoencoder).abstract(), request.seed + 3)
    autoencoder = jax.tree.map(jnp.asarray, autoencoder)
    heads = _random_heads(networks.pixels, request.seed)
    for dtype in request.dtypes:
        metric = lpips.LPIPS.from_params(trunk, heads, networks.pixels, jnp.dtype(dtype))
        network = vae.build(networks.autoencoder, jnp.dtype(dtype))
        yield "decode + lpips", dtype, _lpips, lpips.DecodedLPIPS(metric, autoencoder, network)


def _lpips(generated: jax.Array, target: jax.Array, key: jax.Array, metric: lpips.DecodedLPIPS) -> jax.Array:
    return metric.distance(generated, target).mean()


def _bars(rows: list[dict[str, Any]], dtypes: tuple[str, ...], backward: float) -> list[Bar]:
    """The claims that this bench is there to check, each for every dtype that was measured."""
    by_name = {(row["name"], row["dtype"]): row for row in rows}

    def quotient(key: str, above: str, below: str, dtype: str) -> float | None:
        return ratio(by_name.get((above, dtype), {}).get(key), by_name.get((below, dtype), {}).get(key))

    bars = []
    for dtype in dtypes:
        faster = quotient("seconds", "decode + lpips", "e_latent_lpips", dtype)
        smaller = quotient("temp_bytes", "decode + lpips", "e_latent_lpips", dtype)
        part = ratio(by_name["augmentation", "float32"]["seconds"], by_name["e_latent_lpips", dtype]["seconds"])
        bars.append(Bar.at_least(f"{dtype}: decode + lpips takes at least 9.7 times e_latent_lpips", faster, 9.7))
        bars.append(Bar.at_least(f"{dtype}: and at least 20 times its temporary memory", smaller, 20))
        bars.append(Bar.at_most(f"{dtype}: augmentation takes at most 0.3 of e_latent_lpips", part, 0.3))
        for other in ("torch", torch_metric.OFFICIAL):
            name = f"latent_lpips ({other})"
            if (name, dtype) in by_name:
                slower = quotient("seconds", "latent_lpips", name, dtype)
                bars.append(Bar.at_most(f"{dtype}: latent_lpips takes at most 1 of {other}'s time", slower, 1.0))
    bars.append(Bar.at_most("the backward pass has at most 1.1 of the FLOPs of one half's forward", backward, 1.1))
    if set(dtypes) == set(DTYPES):
        full, half = (by_name["e_latent_lpips", dtype].get("value") for dtype in DTYPES)
        change = None if (part := ratio(half, full)) is None else abs(part - 1)
        bars.append(Bar.at_most("e_latent_lpips in bfloat16 is within 0.01 of its float32 value", change, 0.01))
    return bars
