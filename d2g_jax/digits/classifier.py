"""An independent digit classifier: the judge of samples. Trained on the real images alone, it never sees the teacher.

The shipped weights are rebuilt by `python -m d2g_jax.digits.classifier` (a minute on two cores), which is
`train_classifier(train.images, train.labels, seed=0, steps=2000)` of `data.load()` and `save_classifier`.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from d2g_jax.digits import data
from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline import weights

WEIGHTS_FILE = Path(__file__).parent / "weights" / "classifier.safetensors"
FEATURES = 64
STEPS = 2000
BATCH = 128


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Channels of the three convolutions, width of the penultimate layer, and classes."""

    channels: tuple[int, int, int] = (16, 32, 64)
    features: int = FEATURES
    classes: int = 10


class Classifier(nnx.Module):
    """Three convolutions of stride 2 and two linear layers."""

    def __init__(self, config: ClassifierConfig, rngs: nnx.Rngs):
        first, second, third = config.channels
        conv = functools.partial(nnx.Conv, strides=2, padding="SAME", rngs=rngs)
        self.conv1 = conv(1, first, (5, 5))
        self.conv2 = conv(first, second, (3, 3))
        self.conv3 = conv(second, third, (3, 3))
        self.features = nnx.Linear(third * (data.SIZE // 8) ** 2, config.features, rngs=rngs)
        self.logits = nnx.Linear(config.features, config.classes, rngs=rngs)

    def __call__(self, ink: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ink float32 (B, 32, 32) in [0, 1] -> penultimate features (B, 64) after SiLU, logits (B, 10)."""
        x = ink[..., None]  # (B, 32, 32, 1)
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.silu(conv(x))  # (B, 16, 16, 16), (B, 8, 8, 32), (B, 4, 4, 64)
        x = nnx.silu(self.features(x.reshape(len(x), -1)))  # (B, 64)
        return x, self.logits(x)


@functools.cache
def build(config: ClassifierConfig = ClassifierConfig()) -> Network:
    """The classifier as a `Network`: apply(params, ink (B, 32, 32)) -> (features, logits)."""
    return Network.build(config, lambda rngs: Classifier(config, rngs))


def augment(ink: jax.Array, key: jax.Array) -> jax.Array:
    """Ink (B, H, W) with small random changes: rotation 10 degrees, shear 0.15, scale 8%, shift 2 pixels, contrast 15%.

    Each is uniform between plus and minus its limit.
    """
    batch, height, width = ink.shape
    angle, shear, scale_y, scale_x, shift_y, shift_x, contrast = jax.random.uniform(key, (7, batch), minval=-1.0)
    angle = angle * np.deg2rad(10)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
    outer = lambda a, b: a[:, None, None] * b  # noqa: E731
    x_sheared = x + outer(0.15 * shear, y)
    source_y = outer(1 + 0.08 * scale_y, outer(cos, y) + outer(sin, x_sheared)) + outer(2 * shift_y, 1.0)
    source_x = outer(1 + 0.08 * scale_x, outer(cos, x_sheared) - outer(sin, y)) + outer(2 * shift_x, 1.0)
    coordinates = jnp.stack([source_y + (height - 1) / 2, source_x + (width - 1) / 2], axis=1)  # (B, 2, H, W)
    sample = functools.partial(jax.scipy.ndimage.map_coordinates, order=1, mode="constant")
    moved = jax.vmap(lambda image, at: sample(image, list(at)))(ink, coordinates)
    return jnp.clip(moved * outer(1 + 0.15 * contrast, 1.0), 0, 1)


def train_classifier(images: np.ndarray, labels: np.ndarray, seed: int = 0, steps: int = STEPS) -> Params:
    """Adam with a cosine rate over `steps` batches of 128, each drawn and augmented by `fold_in(seed, step)`.

    Images in any form that `data.to_ink` takes, labels (N,) 0..9.
    """
    network = build()
    key = jax.random.key(seed)
    optimiser = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(100, steps // 2), steps), weight_decay=1e-3
    )
    ink_all, labels_all = jnp.asarray(data.to_ink(images), jnp.float32), jnp.asarray(labels)

    def loss(params: Params, ink: jax.Array, labels: jax.Array) -> jax.Array:
        _, logits = network.apply(params, ink)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Params, moments: optax.OptState, step: jax.Array) -> tuple[Params, optax.OptState]:
        draw_key, augment_key = jax.random.split(jax.random.fold_in(key, step + 1))
        index = jax.random.randint(draw_key, (BATCH,), 0, len(ink_all))
        grads = jax.grad(loss)(params, augment(ink_all[index], augment_key), labels_all[index])
        updates, moments = optimiser.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    params = network.init(jax.random.fold_in(key, 0))
    moments = optimiser.init(params)
    for step in range(steps):
        params, moments = train_step(params, moments, jnp.int32(step))
    return jax.block_until_ready(params)


def features(params: Params, images: np.ndarray, batch: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 (N, 64) and logits float32 (N, 10) of images in any form that `data.to_ink` takes.

    The last batch is padded, so that one program serves any N.
    """
    ink = data.to_ink(images).astype(np.float32)
    padded = np.pad(ink, ((0, -len(ink) % batch), (0, 0), (0, 0)))
    parts = [jax.device_get(_forward(params, padded[start : start + batch])) for start in range(0, len(padded), batch)]
    if not parts:
        return np.zeros((0, FEATURES)), np.zeros((0, 10), np.float32)
    feature, logits = (np.concatenate(part)[: len(ink)] for part in zip(*parts, strict=True))
    return feature.astype(np.float64), logits


def save_classifier(params: Params, file: str | Path = WEIGHTS_FILE) -> None:
    """Writes the parameters as fp16 safetensors."""
    weights.save_state_dict(weights.to_state_dict(params), file, np.float16)


def load_classifier(file: str | Path = WEIGHTS_FILE) -> Params:
    """The shipped classifier's parameters, float32."""
    return weights.load_params(file, build().abstract())


@jax.jit
def _forward(params: Params, ink: jax.Array) -> tuple[jax.Array, jax.Array]:
    return build().apply(params, ink)


def main() -> None:
    """Trains, writes `WEIGHTS_FILE` and prints the accuracy of what was written on the test images."""
    train, test = data.load()
    save_classifier(train_classifier(train.images, train.labels))
    _, logits = features(load_classifier(), test.images)
    print(f"{WEIGHTS_FILE.name}: test accuracy {(logits.argmax(1) == test.labels).mean():.4f}")


if __name__ == "__main__":
    main()
