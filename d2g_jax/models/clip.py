"""CLIP text towers by config: ViT-L of SD 1.x, OpenCLIP H of SD 2.x, OpenCLIP bigG of SDXL.

The network is that of transformers' `CLIPTextModel` and `CLIPTextModelWithProjection` (Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", 2021): pre-norm transformer with a causal mask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from d2g_jax.inputs.fields import check_kinds, check_sizes
from d2g_jax.models.layers import LayerNorm, Linear
from d2g_jax.models.network import Network
from d2g_jax.runtime.errors import UserError

_ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class ClipOutput(NamedTuple):
    """What a text tower gives.

    Attributes:
      last_hidden_state: (B, L, D) after the final layer norm; the conditioning of SD 1.x and 2.x.
      penultimate_hidden_state: (B, L, D) before the last layer, not normalised; the conditioning of SDXL.
      pooled: (B, D) the last hidden state at the end-of-text token.
      text_embeds: (B, P) `pooled` projected, or None for a tower without projection.
    """

    last_hidden_state: jax.Array
    penultimate_hidden_state: jax.Array
    pooled: jax.Array
    text_embeds: jax.Array | None


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """transformers' `CLIPTextConfig`; `architecture` is the class that the weights were saved from."""

    architecture: str = "CLIPTextModel"
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 1

    @property
    def with_projection(self) -> bool:
        return self.architecture == "CLIPTextModelWithProjection"

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, source: str) -> ClipTextConfig:
        """From a `config.json`; raises `UserError` that names `source` and the key for what is not implemented."""
        architecture = (config.get("architectures") or ["CLIPTextModel"])[0]
        if architecture not in _ARCHITECTURES:
            raise UserError(f"{source}: architecture {architecture} is unknown; expected one of {_ARCHITECTURES}")
        names = {field.name for field in dataclasses.fields(cls)} - {"architecture"}
        known = {name: config[name] for name in names if name in config}
        check_kinds(cls, known, source)
        check_sizes({name: value for name, value in known.items() if not name.endswith("_token_id")}, source)
        result = cls(architecture=architecture, **known)
        if result.hidden_act not in _ACTIVATIONS:
            raise UserError(f"{source}: hidden_act {result.hidden_act} is unknown; expected {tuple(_ACTIVATIONS)}")
        if result.hidden_size % result.num_attention_heads:
            raise UserError(
                f"{source}: hidden_size {result.hidden_size} is not a multiple of "
                f"num_attention_heads {result.num_attention_heads}"
            )
        if config.get("use_attention_mask"):
            raise UserError(f"{source}: use_attention_mask is not implemented; the towers of SD do not use it")
        return result

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that transformers loads."""
        fields = dataclasses.asdict(self)
        return {"architectures": [fields.pop("architecture")], "model_type": "clip_text_model", **fields}


class ClipAttention(nnx.Module):
    """Multi-head self-attention under a causal mask; logits and softmax in float32."""

    def __init__(self, config: ClipTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.out_proj = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # noqa: E731  (B, L, heads, D / heads)
        out = jax.nn.dot_product_attention(
            split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x)), is_causal=True
        )
        return self.out_proj(out.reshape(x.shape))


class ClipMlp(nnx.Module):
    """Two linear layers around the config's activation."""

    def __init__(self, config: ClipTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


class ClipLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: ClipTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        norm = lambda: LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)  # noqa: E731
        self.layer_norm1 = norm()
        self.self_attn = ClipAttention(config, dtype, rngs=rngs)
        self.layer_norm2 = norm()
        self.mlp = ClipMlp(config, dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nnx.Module):
    """Token plus learnt position embeddings, and the standard deviation that OpenAI's CLIP starts them with."""

    def __init__(self, config: ClipTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        embed = lambda n: nnx.Embed(  # noqa: E731
            n, config.hidden_size, dtype=dtype, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.token_embedding = embed(config.vocab_size)
        self.position_embedding = embed(config.max_position_embeddings)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[1]))


class ClipEncoder(nnx.Module):
    """The stack of layers; also returns the input of the last one."""

    def __init__(self, config: ClipTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.layers = nnx.List([ClipLayer(config, dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        before_last = x
        for layer in self.layers:
            before_last, x = x, layer(x)
        return x, before_last


class ClipTextTransformer(nnx.Module):
    """The tower below the projection; its name in the state dict is `text_model`."""

    def __init__(self, config: ClipTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.embeddings = ClipEmbeddings(config, dtype, rngs=rngs)
        self.encoder = ClipEncoder(config, dtype, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)

    def __call__(self, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        last, penultimate = self.encoder(self.embeddings(input_ids))
        return self.final_layer_norm(last), penultimate


class ClipText(nnx.Module):
    """`CLIPTextModel` or, by config, `CLIPTextModelWithProjection`."""

    def __init__(self, config: ClipTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.eos_token_id = config.eos_token_id
        self.text_model = ClipTextTransformer(config, dtype, rngs=rngs)
        self.with_projection = config.with_projection
        if config.with_projection:
            self.text_projection = Linear(
                config.hidden_size, config.projection_dim, use_bias=False, dtype=dtype, rngs=rngs
            )

    def __call__(self, input_ids: jax.Array) -> ClipOutput:
        """input_ids: int32 (B, L), L at most `max_position_embeddings`."""
        last, penultimate = self.text_model(input_ids)  # (B, L, D)
        # configs written before transformers 4.31 say 2, which no prompt contains: there the end of the text is the
        # largest id of the vocabulary
        score = input_ids if self.eos_token_id == 2 else input_ids == self.eos_token_id
        end = jnp.argmax(score, axis=-1)  # the first maximum: padding may repeat the end token
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]  # (B, D)
        text_embeds = self.text_projection(pooled) if self.with_projection else None
        return ClipOutput(last, penultimate, pooled, text_embeds)


@functools.cache
def build(config: ClipTextConfig, dtype: jnp.dtype = jnp.float32) -> Network:
    """The text tower as a `Network`; `apply(params, input_ids (B, L) int32) -> ClipOutput` in `dtype`."""
    return Network.build(config, lambda rngs: ClipText(config, dtype, rngs=rngs))
