"""Whole pipelines with random weights at the published sizes: no download, and speed needs no trained ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.models import clip
from d2g_jax.models.network import Params
from d2g_jax.pipeline.folder import Pipeline, placer
from d2g_jax.plan.architectures import IMAGES, KNOWN, MODELS, abstract_pipeline, computing_in

DTYPES = ("float32", "bfloat16")

Place = Callable[[tuple[str, ...], np.ndarray], Any]
"""(path, float32 leaf) -> what stands in its place."""


def default_dtype() -> str:
    """What one computes in on this device: float32 on a CPU, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def random_pipeline(model: str, dtype: str, storage: str, seed: int, mesh: jax.sharding.Mesh) -> Pipeline:
    """A pipeline of `MODELS`, of another hub id whose shapes are known, or of a folder; all its weights are random.

    Args:
      model: see above.
      dtype: what the networks compute in.
      storage: dtype of kernels and embeddings; norms and biases are float32.
      seed: of the weights.
      mesh: where each leaf goes as soon as it is drawn.

    Raises `UserError` for a model that is none of these.
    """
    pipeline = computing_in(abstract_pipeline(MODELS.get(model, model)), jnp.dtype(dtype))
    place = placer(mesh, jnp.dtype(storage))
    params = {name: random_params(shapes, seed + i, place) for i, (name, shapes) in enumerate(pipeline.params.items())}
    return dataclasses.replace(pipeline, params=params)


def known(model: str) -> bool:
    """Whether a model is one of `MODELS` or, where no folder has its name, another whose shapes are known."""
    return model in MODELS or ((model in KNOWN or model in IMAGES) and not Path(model).exists())


def _end_of_text(config: clip.ClipTextConfig) -> int:
    """transformers takes 2 for "the largest"."""
    return config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id


def random_params(shapes: Params, seed: int, place: Place = lambda path, leaf: leaf) -> Params:
    """float32 parameters for a tree of shapes, drawn by numpy: at full size one second in place of one minute.

    Weights keep the variance of what passes through ReLUs; norms and biases are near where training starts. `place`
    gets every leaf as soon as it is drawn, and its result stands in the tree.
    """
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Any:
        normal, names = rng.standard_normal(shape.shape, np.float32), tuple(part.key for part in path)
        if names[-1] == "kernel":
            return place(names, normal * np.float32(np.sqrt(2 / np.prod(shape.shape[:-1]))))
        centre = 1 if names[-1] in ("scale", "var") else 0
        return place(names, centre + np.float32(0.1) * (np.abs(normal) if names[-1] == "var" else normal))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def random_input_ids(pipeline: Pipeline, batch: int, seed: int) -> np.ndarray:
    """int32 (batch, `pipeline.token_length`): words at random with the end last, as of a long prompt; or classes."""
    rng, ids = np.random.default_rng(seed), []
    if pipeline.classes is not None:
        return rng.integers(0, max(pipeline.classes, 1), (batch, 1)).astype(np.int32)
    for tokenizer, tower in zip(pipeline.tokenizers, pipeline.towers.values(), strict=True):
        config, length = tower.config, tokenizer.model_max_length
        end = _end_of_text(config)
        words = rng.integers(3, min(end, config.vocab_size - 2), (batch, length))
        words[:, -1] = end
        ids.append(words)
    return np.concatenate(ids, axis=1).astype(np.int32)
