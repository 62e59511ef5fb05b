"""Stage one: a VGG with batch norm learns to classify latents. Its trunk becomes the metric's."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2g_jax.lpips_training.fit import Batch, Recipe, fit, sampled_rows
from d2g_jax.models import vgg
from d2g_jax.models.network import Params
from d2g_jax.runtime import mesh as meshes

STATISTICS_BATCHES = 64
"""Batches that the final statistics of the batch norms are averaged over."""


@dataclasses.dataclass(frozen=True)
class Head:
    """The classifier behind the last tap. torchvision's VGG has pool 7, hidden (4096, 4096) and dropout 0.5.

    Attributes:
      classes: number of logits.
      pool: height and width after average pooling as PyTorch's `AdaptiveAvgPool2d`; None leaves the tap as it is.
      hidden: widths of the layers between, each followed by ReLU and dropout.
      dropout: share of activations that training drops.
      parts: of labels (B, P) that name several things at once, the classes of each, which add up to `classes`. A label
        below 0 says nothing.
    """

    classes: int
    pool: int | None = None
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    parts: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class LabelledLatents:
    """Scaled latents with class labels, by row.

    Attributes:
      count: rows.
      classes: labels are 0 to classes - 1.
      shape: (h, w, C) of a latent.
      read: (rows (B,), step) -> what the host has of these rows; a pure function that no device has a part in. Where
        images are encoded on the fly, the step decides about their crops.
      encode: what `read` gave -> {"latents": float32 (B, h, w, C), "labels": int (B,) or (B, P)}.
    """

    count: int
    classes: int
    shape: tuple[int, int, int]
    read: Callable[[np.ndarray, int], Batch]
    encode: Callable[[Batch], Batch] = lambda batch: batch

    def batch(self, rows: np.ndarray, step: int) -> Batch:
        """The latents and labels of rows (B,)."""
        return self.encode(self.read(rows, step))

    @classmethod
    def from_arrays(cls, latents: np.ndarray, labels: np.ndarray, classes: int) -> LabelledLatents:
        """Of arrays at hand: float32 (N, h, w, C), and (N,) or (N, P)."""
        take = lambda rows, step: {"latents": latents[rows], "labels": labels[rows]}  # noqa: E731
        return cls(len(labels), classes, latents.shape[1:], take)


def train_classifier(
    recipe: Recipe,
    config: vgg.VGGConfig,
    head: Head,
    data: LabelledLatents,
    *,
    label: str,
    dtype: jnp.dtype = jnp.float32,
) -> Params:
    """Cross-entropy on batches drawn with replacement; gives the parameters that `abstract` describes.

    The batch norms' statistics are not a running average of changing weights: they are measured on the final ones,
    over `STATISTICS_BATCHES` batches. `dtype` is the trunk's compute dtype.
    """
    network = vgg.build_training(config, dtype)
    key = jax.random.key(recipe.seed)
    trunk, statistics = vgg.split_statistics(network.init(key))
    start = {"trunk": trunk, "head": _init_head(head, _features(config, head, data.shape), key)}

    def loss(params: Params, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        tree = vgg.merge_statistics(params["trunk"], statistics)
        taps, _ = network.apply(tree, batch["latents"], method="train_features")
        logits = _logits(head, params["head"], taps[-1], key)
        return cross_entropy(logits, batch["labels"], head.parts)

    def rows_at(step: int) -> np.ndarray:
        return sampled_rows(data.count, recipe.batch_size, recipe.seed, step)

    @jax.jit
    def measure(params: Params, latents: jax.Array) -> Params:
        tree = vgg.merge_statistics(params, statistics)
        return network.apply(tree, latents, method="train_features")[1]

    params = fit(loss, start, lambda step: data.read(rows_at(step), step), recipe, label=label, encode=data.encode)
    steps = range(STATISTICS_BATCHES)
    measured = [measure(params["trunk"], data.batch(rows_at(step), step)["latents"]) for step in steps]
    final = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *jax.device_get(measured))
    return {"features": vgg.merge_statistics(params["trunk"], final), "classifier": params["head"]}


def cross_entropy(logits: jax.Array, labels: jax.Array, parts: tuple[int, ...] = ()) -> jax.Array:
    """Of logits (B, C) for labels (B,), a mean. With `parts` labels are (B, P): means over what is labelled, summed."""
    if not parts:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    split = jnp.split(logits, np.cumsum(parts)[:-1], axis=-1)
    known = labels >= 0
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(one, jnp.maximum(labels[:, i], 0)) * known[:, i]
        for i, one in enumerate(split)
    ]
    return sum(loss.sum() / jnp.maximum(known[:, i].sum(), 1) for i, loss in enumerate(losses))


def accuracy(params: Params, config: vgg.VGGConfig, head: Head, data: LabelledLatents, batch_size: int) -> float:
    """Top-1 of every row of `data`, in batches of `batch_size` (a multiple of the devices)."""
    network, mesh = vgg.build_training(config), meshes.make_mesh()
    placed = meshes.place(params, mesh)

    @jax.jit
    def predict(params: Params, latents: jax.Array) -> jax.Array:
        taps = network.apply(params["features"], latents)
        return _logits(head, params["classifier"], taps[-1], None).argmax(-1)

    right = 0
    for rows in batches(data.count, batch_size):
        batch = data.batch(rows, 0)
        predicted = jax.device_get(predict(placed, meshes.place_batch({"x": batch["latents"]}, mesh)["x"]))
        kept = len(np.unique(rows))  # the last batch repeats its last row
        right += int((predicted == batch["labels"])[:kept].sum())
    return right / data.count


def batches(count: int, batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers 0 to count - 1 in order; the last batch is filled up with the last row, so one program serves all."""
    for first in range(0, count, batch_size):
        yield np.minimum(np.arange(first, first + batch_size), count - 1)


def abstract(config: vgg.VGGConfig, head: Head, shape: tuple[int, int, int]) -> Params:
    """Shapes of a trained classifier: `vgg.build_training`'s whole tree as "features", the head as "classifier"."""
    layers = jax.eval_shape(lambda: _init_head(head, _features(config, head, shape), jax.random.key(0)))
    return {"features": vgg.build_training(config).abstract(), "classifier": layers}


def _features(config: vgg.VGGConfig, head: Head, shape: tuple[int, int, int]) -> int:
    """How many numbers the head sees of one latent of `shape`."""
    factor = 2 ** sum(config.pools)
    sides = (head.pool,) * 2 if head.pool else (shape[0] // factor, shape[1] // factor)
    return math.prod(sides) * config.widths[-1]


def _init_head(head: Head, features: int, key: jax.Array) -> Params:
    """Weights N(0, 0.01), biases 0: torchvision's for VGG."""
    sizes = (features, *head.hidden, head.classes)
    return {
        f"{i}": {
            "kernel": 0.01 * jax.random.normal(jax.random.fold_in(key, i + 1), (inputs, outputs)),
            "bias": jnp.zeros(outputs),
        }
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes))
    }


def _logits(head: Head, layers: Params, tap: jax.Array, key: jax.Array | None) -> jax.Array:
    """The last tap (B, h, w, C) to logits (B, classes), float32; `key` draws the dropout, None is evaluation."""
    x = tap.astype(jnp.float32)
    if head.pool:
        rows, columns = (pooling_matrix(side, head.pool) for side in x.shape[1:3])
        x = jnp.einsum("oh,bhwc,pw->bopc", rows, x, columns)
    x = x.reshape(len(x), -1)
    for i in range(len(head.hidden) + 1):
        x = x @ layers[f"{i}"]["kernel"] + layers[f"{i}"]["bias"]
        if i < len(head.hidden):
            x = jax.nn.relu(x)
            if key is not None and head.dropout:
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - head.dropout, x.shape)
                x = jnp.where(kept, x / (1 - head.dropout), 0.0)
    return x


def pooling_matrix(inputs: int, outputs: int) -> np.ndarray:
    """PyTorch's adaptive average pooling along one axis as float32 (outputs, inputs): windows may overlap."""
    matrix = np.zeros((outputs, inputs), np.float32)
    for i in range(outputs):
        first, last = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[i, first:last] = 1 / (last - first)
    return matrix
