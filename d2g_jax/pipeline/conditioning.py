"""Prompts as the UNet takes them: hidden states of the text towers, and for SDXL pooled text and image sizes.

A teacher of images takes the class that its prompt names, or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.models.network import Params
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.images import class_ids
from d2g_jax.pipeline.tokenizers import tokenize, warn_of


class Conditioning(NamedTuple):
    """What the UNet takes from the prompts: hidden states (N, L, D) and, for SDXL only, what is added to its time.

    A class is float32 (N, K), one at its place, instead of the hidden states; None for a network without classes.
    `added` is {"text_embeds": (N, P), "time_ids": (N, 6)}. The tuple is the UNet's last two arguments.
    """

    encoder_hidden_states: jax.Array | None
    added: dict[str, jax.Array] | None


def tokenize_prompts(pipeline: Pipeline, prompts: Sequence[str]) -> np.ndarray:
    """Prompts as int32 (N, `pipeline.token_length`): what `encode_text` takes. Raises as `images.class_ids` does."""
    if pipeline.classes is not None:
        return class_ids(pipeline.classes, prompts, pipeline.folder)
    return np.concatenate([tokenize(tokenizer, prompts) for tokenizer in pipeline.tokenizers], axis=1)


def warn_of_prompts(pipeline: Pipeline, prompts: Sequence[str]) -> None:
    """See `tokenizers.warn_of`; of each text tower."""
    for tokenizer in pipeline.tokenizers:
        warn_of(tokenizer, prompts)


def size_ids(pipeline: Pipeline, size: tuple[int, int] | None = None) -> tuple[int, ...]:
    """SDXL's six numbers: original (height, width), crop (top, left) = 0, target (height, width) of images in pixels.

    `size` None is the native size.
    """
    factor = pipeline.vae.config.downscale
    height, width = size or tuple(factor * side for side in pipeline.latent_shape[:2])
    return height, width, 0, 0, height, width


def encode_text(
    pipeline: Pipeline, params: Mapping[str, Params], input_ids: jax.Array, sizes: Sequence[int] | None = None
) -> Conditioning:
    """Token ids (N, `pipeline.token_length`) as the UNet's conditioning; pure. `sizes`: see `size_ids`."""
    if pipeline.classes is not None:
        return Conditioning(jax.nn.one_hot(input_ids[:, 0], pipeline.classes) if pipeline.classes else None, None)
    if pipeline.text_encoder_2 is None:
        first = pipeline.text_encoder.apply(params["text_encoder"], input_ids)
        return Conditioning(first.last_hidden_state, None)
    split = pipeline.tokenizer.model_max_length
    first = pipeline.text_encoder.apply(params["text_encoder"], input_ids[:, :split])
    second = pipeline.text_encoder_2.apply(params["text_encoder_2"], input_ids[:, split:])
    hidden = jnp.concatenate([first.penultimate_hidden_state, second.penultimate_hidden_state], axis=-1)
    numbers = jnp.asarray(size_ids(pipeline) if sizes is None else sizes, jnp.float32)
    time_ids = jnp.broadcast_to(numbers, (input_ids.shape[0], 6))
    return Conditioning(hidden, {"text_embeds": second.text_embeds, "time_ids": time_ids})


def encode_negative(
    pipeline: Pipeline, params: Mapping[str, Params], prompt: str, sizes: Sequence[int] | None = None
) -> Conditioning:
    """The other half of guidance, one row: an empty prompt is all zeros for SDXL, as in diffusers."""
    warn_of_prompts(pipeline, [prompt])
    encoded = encode_text(pipeline, params, jnp.asarray(tokenize_prompts(pipeline, [prompt])), sizes)
    if prompt or not pipeline.zeros_for_empty_prompt:
        return encoded
    pooled = {**encoded.added, "text_embeds": jnp.zeros_like(encoded.added["text_embeds"])}
    return Conditioning(jnp.zeros_like(encoded.encoder_hidden_states), pooled)


def text_shapes(pipeline: Pipeline) -> dict[str, tuple[int, ...]]:
    """Shapes of one prompt's embeddings, under the names of `text_fields`."""
    ids = jax.ShapeDtypeStruct((1, pipeline.token_length), jnp.int32)
    one = jax.eval_shape(lambda params, ids: encode_text(pipeline, params, ids), pipeline.text_params, ids)
    return {name: value.shape[1:] for name, value in text_fields(one).items()}


def text_fields(text: Conditioning) -> dict[str, jax.Array]:
    """What depends on the prompt alone, as stored with a record: hidden states, and for SDXL the pooled text."""
    pooled = {} if text.added is None else {"text_embeds": text.added["text_embeds"]}
    hidden = text.encoder_hidden_states
    return pooled if hidden is None else {"encoder_hidden_states": hidden, **pooled}


def from_text_fields(pipeline: Pipeline, fields: Mapping[str, jax.Array]) -> Conditioning:
    """The float32 conditioning of native size of a batch of stored `text_fields`, with no text tower run; pure."""
    hidden = fields["encoder_hidden_states"].astype(jnp.float32)
    if pipeline.text_encoder_2 is None:
        return Conditioning(hidden, None)
    time_ids = jnp.broadcast_to(jnp.asarray(size_ids(pipeline), jnp.float32), (hidden.shape[0], 6))
    return Conditioning(hidden, {"text_embeds": fields["text_embeds"].astype(jnp.float32), "time_ids": time_ids})
