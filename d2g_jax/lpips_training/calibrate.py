"""Stage two: the heads of a metric, calibrated on two-alternative forced choices (2AFC); and the 2AFC score.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924), its "lin"
variant: the trunk stands still, so everything but the heads is computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2g_jax.losses.lpips import LPIPS
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.lpips_training.fit import Recipe, fit, sampled_rows
from d2g_jax.models import vgg
from d2g_jax.models.network import Params

JUDGE_WIDTH = 32
"""Of the small network that turns two distances into a verdict; LPIPS' own."""


@dataclasses.dataclass(frozen=True)
class Differences:
    """Of N triplets `channel_differences` of each side to the reference, (N, C_k) per tap, and judgements (N,)."""

    left: list[np.ndarray]
    right: list[np.ndarray]
    judgement: np.ndarray

    @classmethod
    def together(cls, parts: Iterable[Differences]) -> Differences:
        """Those of several sets of triplets as one."""
        sides = zip(*((part.left, part.right, [part.judgement]) for part in parts), strict=True)
        left, right, (judgement,) = ([np.concatenate(tap) for tap in zip(*side, strict=True)] for side in sides)
        return cls(left, right, judgement)


def uniform_heads(config: vgg.VGGConfig) -> list[np.ndarray]:
    """Heads before calibration: every channel counts 1."""
    return [np.ones(width, np.float32) for width in config.widths]


@jax.jit
def _channel_differences(metric: LatentLPIPS | LPIPS, a: jax.Array, b: jax.Array) -> list[jax.Array]:
    scaled = {"scaled": True} if isinstance(metric, LatentLPIPS) else {}
    return metric.channel_differences(a, b, **scaled)


def differences(
    metric: LatentLPIPS | LPIPS,
    reference: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    judgement: np.ndarray,
    batch_size: int = 250,
) -> Differences:
    """What calibration and scoring see of triplets; the heads of `metric` play no part.

    Args:
      reference, left, right: scaled latents (N, h, w, C), or images of a pixel metric.
      judgement: (N,), the share that prefers `right`.
    """
    slices, sides = [slice(i, i + batch_size) for i in range(0, len(reference), batch_size)], []
    for side in (left, right):
        parts = [jax.device_get(_channel_differences(metric, side[part], reference[part])) for part in slices]
        sides.append([np.concatenate(tap) for tap in zip(*parts, strict=True)])
    return Differences(*sides, judgement)


def calibrate(recipe: Recipe, data: Differences, *, label: str) -> list[np.ndarray]:
    """Non-negative heads (C_k,) by LPIPS' ranking loss: a small network judges the two distances.

    (d0, d1, d0 - d1, d0 / (d1 + 0.1), d1 / (d0 + 0.1)) -> 32 -> 32 -> 1 with LeakyReLU 0.2, cross-entropy with the
    judgement. Heads are clamped at zero after each update. LPIPS' dropout inside the heads is left out.
    """
    widths = [tap.shape[1] for tap in data.left]
    keys = jax.random.split(jax.random.key(recipe.seed), 3)
    sizes = ((5, JUDGE_WIDTH), (JUDGE_WIDTH, JUDGE_WIDTH), (JUDGE_WIDTH, 1))
    judge = [
        {"kernel": jax.random.normal(key, size) * np.sqrt(2 / size[0]), "bias": jnp.zeros(size[1])}
        for key, size in zip(keys, sizes, strict=True)
    ]

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        heads = [params["heads"][f"{i}"] for i in range(len(widths))]
        d0 = sum(batch[f"left{i}"] @ head for i, head in enumerate(heads))
        d1 = sum(batch[f"right{i}"] @ head for i, head in enumerate(heads))
        x = jnp.stack([d0, d1, d0 - d1, d0 / (d1 + 0.1), d1 / (d0 + 0.1)], axis=-1)
        for i, layer in enumerate(params["judge"]):
            x = x @ layer["kernel"] + layer["bias"]
            x = jax.nn.leaky_relu(x, 0.2) if i < 2 else x
        return optax.sigmoid_binary_cross_entropy(x[:, 0], batch["judgement"]).mean()

    def batch_at(step: int) -> dict[str, np.ndarray]:
        rows = sampled_rows(len(data.judgement), recipe.batch_size, recipe.seed, step)
        sides = {
            f"{name}{i}": tap[rows]
            for name, taps in (("left", data.left), ("right", data.right))
            for i, tap in enumerate(taps)
        }
        return {**sides, "judgement": data.judgement[rows]}

    def project(params: Params) -> Params:
        return {**params, "heads": jax.tree.map(lambda head: jnp.maximum(head, 0.0), params["heads"])}

    start = {"heads": {f"{i}": jnp.full(width, 0.1) for i, width in enumerate(widths)}, "judge": judge}
    params = fit(loss, start, batch_at, recipe, label=label, project=project)
    return [params["heads"][f"{i}"] for i in range(len(widths))]


def two_afc(heads: Sequence[np.ndarray], data: Differences) -> float:
    """Expected agreement with the judges, as LPIPS scores it: the share of judges on its side, half at a tie."""
    left, right = (
        sum(tap @ np.asarray(head) for tap, head in zip(taps, heads, strict=True)) for taps in (data.left, data.right)
    )
    votes = np.where(right < left, data.judgement, 1 - data.judgement)
    return float(np.mean(np.where(right == left, 0.5, votes)))


def scores(heads: Sequence[np.ndarray], data: Differences) -> dict[str, float]:
    """The 2AFC score of heads, that of uniform ones, and that of the judges' majority, which no metric passes."""
    return {
        "2afc": two_afc(heads, data),
        "2afc_without_calibration": two_afc([np.ones(tap.shape[1], np.float32) for tap in data.left], data),
        "2afc_of_judges": float(np.mean(np.maximum(data.judgement, 1 - data.judgement))),
    }
