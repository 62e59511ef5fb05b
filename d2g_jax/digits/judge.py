"""The judge of samples: a classifier of everything that captions name. It sees real scenes alone, never the teacher."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from d2g_jax.digits.scenes import PARTS, SIZE
from d2g_jax.inputs.images import to_floats
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline import weights

FEATURES = 64


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Channels of the four convolutions and width of the penultimate layer."""

    channels: tuple[int, ...] = (24, 48, 64, 96)
    features: int = FEATURES


class Judge(nnx.Module):
    """Convolutions of stride 2, a linear layer, and one linear head a part of the caption."""

    def __init__(self, config: JudgeConfig, rngs: nnx.Rngs):
        widths = (3, *config.channels)
        conv = functools.partial(nnx.Conv, kernel_size=(4, 4), strides=2, padding="SAME", rngs=rngs)
        self.convs = nnx.List([conv(a, b) for a, b in itertools.pairwise(widths)])
        side = SIZE // 2 ** len(config.channels)
        self.features = nnx.Linear(side * side * widths[-1], config.features, rngs=rngs)
        self.logits = nnx.Linear(config.features, sum(PARTS.values()), rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Float32 (B, 64, 64, 3) in [-1, 1] -> features (B, 64) after SiLU, and the logits of all parts (B, 31)."""
        x = images
        for conv in self.convs:
            x = nnx.silu(conv(x))  # (B, 32, 32, 24), (B, 16, 16, 48), (B, 8, 8, 64), (B, 4, 4, 96)
        x = nnx.silu(self.features(x.reshape(len(x), -1)))
        return x, self.logits(x)


@functools.cache
def build(config: JudgeConfig = JudgeConfig()) -> Network:
    """The judge as a `Network`: apply(params, images (B, 64, 64, 3)) -> (features, logits)."""
    return Network.build(config, lambda rngs: Judge(config, rngs))


def by_part(logits: np.ndarray) -> dict[str, np.ndarray]:
    """The logits (N, 31) of each part: (N, number of its labels)."""
    ends = np.cumsum(list(PARTS.values()))
    return dict(zip(PARTS, np.split(logits, ends[:-1], axis=-1), strict=True))


def judge(params: Params, images: np.ndarray, batch: int = 250) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 (N, 64) and labels int64 (N, 7), in the order of `PARTS`, of uint8 images (N, 64, 64, 3).

    The last batch is padded, so that one program serves any N from `batch` on; fewer are padded to a power of two.
    """
    features, labels = [], []
    batch = min(batch, 1 << (len(images) - 1).bit_length())
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        filled = np.pad(part, ((0, batch - len(part)), (0, 0), (0, 0), (0, 0)))
        feature, logits = jax.device_get(_forward(params, to_floats(filled)))
        features.append(feature[: len(part)])
        labels.append(np.stack([x.argmax(-1) for x in by_part(logits).values()], axis=1)[: len(part)])
    return np.concatenate(features).astype(np.float64), np.concatenate(labels)


@jax.jit
def _forward(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return build().apply(params, images)


def load_judge(file: str | Path) -> Params:
    """The parameters in a safetensors file, float32."""
    return weights.load_params(file, build().abstract())
