"""The UNet's `config.json`: diffusers' keys, with everything that we do not implement refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from d2g_jax.inputs.fields import as_json, read_fields
from d2g_jax.inputs.numbers import COUNT, LAYERS, Range
from d2g_jax.runtime.errors import UserError

PerLevel = int | tuple[int, ...]
PerLayer = int | tuple[int | tuple[int, ...], ...]
"""One number, one a level, or for a level one for each of its layers."""

# Keys of diffusers' UNet2DConditionModel that change the network in ways we do not implement, and the values at which
# they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"), "attention_type": ("default",), "center_input_sample": (False,),
    "class_embed_type": (None,), "class_embeddings_concat": (False,), "conv_in_kernel": (3,),
    "conv_out_kernel": (3,), "cross_attention_norm": (None,), "dropout": (0,), "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,), "mid_block_only_cross_attention": (None, False),
    "num_attention_heads": (None,), "num_class_embeds": (None,), "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,), "resnet_skip_time_act": (False,), "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,), "time_embedding_dim": (None,), "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}  # fmt: skip
# Keys that say nothing once the keys above are neutral; and those of diffusers' moving average, as its trainers leave
# them in unet_ema/config.json.
_IGNORED = {
    "addition_embed_type_num_heads", "decay", "min_decay", "inv_gamma", "power", "optimization_step",
    "update_after_step", "use_ema_warmup",
}  # fmt: skip

_DOWN, _UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
_MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of a UNet2DConditionModel; names, meanings and defaults are diffusers'.

    `attention_head_dim` is the number of heads (one, or one per level): diffusers' name for it is historical. The
    defaults are those that diffusers takes for a key that a file leaves out.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (_DOWN[0], _DOWN[0], _DOWN[0], _DOWN[1])
    mid_block_type: str | None = _MID[0]
    up_block_types: tuple[str, ...] = (_UP[1], _UP[0], _UP[0], _UP[0])
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: PerLevel = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: PerLayer = 1
    reverse_transformer_layers_per_block: PerLayer | None = None
    attention_head_dim: PerLevel = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Resnets per encoder level."""
        return self._per_level(self.layers_per_block)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads per level."""
        return self._per_level(self.attention_head_dim)

    @property
    def down_depths(self) -> tuple[tuple[int, ...], ...]:
        """Transformer blocks of each transformer of each encoder level."""
        return self._per_layer(self._per_level(self.transformer_layers_per_block), self.layers)

    @property
    def up_depths(self) -> tuple[tuple[int, ...], ...]:
        """The same of the decoder's levels, the lowest resolution first."""
        given = self.reverse_transformer_layers_per_block
        depths = self._per_level(self.transformer_layers_per_block)[::-1] if given is None else self._per_level(given)
        return self._per_layer(depths, tuple(count + 1 for count in self.layers[::-1]))

    @property
    def has_mid_attention(self) -> bool:
        return self.mid_block_type == _MID[0]

    @property
    def down_attentions(self) -> tuple[tuple[int, ...], ...]:
        """Depths of the transformers behind an encoder level's last resnets; empty for a level without."""
        pairs = zip(self.down_block_types, self.down_depths, strict=True)
        return tuple(depths if kind == _DOWN[0] else () for kind, depths in pairs)

    @property
    def mid_attentions(self) -> tuple[int, ...]:
        return self.down_depths[-1][:1] if self.has_mid_attention else ()

    @property
    def mid_resnets(self) -> int:
        return 1 + len(self.mid_attentions)

    @property
    def up_attentions(self) -> tuple[tuple[int, ...], ...]:
        """The same of the decoder's levels, the lowest resolution first."""
        pairs = zip(self.up_block_types, self.up_depths, strict=True)
        return tuple(depths if kind == _UP[0] else () for kind, depths in pairs)

    @property
    def stem_channels(self) -> int:
        """Width behind conv_in."""
        return self.block_out_channels[0]

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    def _per_level(self, value: PerLevel) -> tuple[int, ...]:
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value

    @staticmethod
    def _per_layer(depths: tuple[Any, ...], layers: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return tuple((d,) * n if isinstance(d, int) else d for d, n in zip(depths, layers, strict=True))

    @classmethod
    def from_json(cls, values: dict[str, Any], *, source: str) -> UNetConfig:
        """From a parsed `config.json`; `source` is the file's name for messages.

        Raises `UserError` for a key that is unknown, or not implemented and not neutral, or whose value is malformed.
        """
        values = {**values, "upcast_attention": bool(values.get("upcast_attention"))}  # older files say null
        config = cls(**read_fields(cls, values, source, _NEUTRAL, _IGNORED))
        config._check(source)
        return config

    def to_json(self) -> dict[str, Any]:
        """The keys of `config.json` that diffusers needs to build the same network."""
        return {"_class_name": "UNet2DConditionModel", **as_json(self)}

    def _check(self, source: str) -> None:
        """Raises `UserError` for values that fit no network."""

        def need(good: bool, key: str, remedy: str) -> None:
            if not good:
                raise UserError(f"{source}: {key} = {getattr(self, key)!r}; {remedy}")

        widths = self.block_out_channels
        need(bool(widths) and counts(*widths), "block_out_channels", "give positive integers")
        for key in ("in_channels", "out_channels", "norm_num_groups", "cross_attention_dim"):
            need(counts(getattr(self, key)), key, "give one positive integer")
        size = self.sample_size
        sides = size if isinstance(size, tuple) else (size,)
        need(size is None or counts(*sides), "sample_size", "give a positive integer, or two")
        need(all(width % self.norm_num_groups == 0 for width in widths), "norm_num_groups", f"must divide {widths}")
        for key, among in (("layers_per_block", LAYERS), ("attention_head_dim", COUNT)):
            value = getattr(self, key)
            each = value if isinstance(value, tuple) and len(value) == len(widths) else (value,)
            need(counts(*each, among=among), key, f"give {among}, or one for each of the {len(widths)} levels")
        down, up = self.transformer_layers_per_block, self.reverse_transformer_layers_per_block
        remedy = f"give an integer from 0 to 256, or one for each of the {len(widths)} levels, or of a level's layers"
        need(_are_depths(down, self.layers), "transformer_layers_per_block", remedy)
        decoder = tuple(count + 1 for count in self.layers[::-1])
        need(up is None or _are_depths(up, decoder), "reverse_transformer_layers_per_block", remedy)
        nested = isinstance(down, tuple) and any(isinstance(depth, tuple) for depth in down)
        need(up is not None or not nested, "reverse_transformer_layers_per_block", "lists of lists need the decoder's")
        for key, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            kinds = getattr(self, key)
            good = len(kinds) == len(widths) and set(kinds) <= set(known)
            need(good, key, f"give {len(widths)} of {', '.join(known)}")
        attends = [
            _DOWN[0] in pair or _UP[0] in pair
            for pair in zip(self.down_block_types, self.up_block_types[::-1], strict=True)
        ]
        attends[-1] |= self.has_mid_attention
        for width, heads, used in zip(widths, self.heads, attends, strict=True):
            need(not used or width % heads == 0, "attention_head_dim", f"that many heads must divide {width} channels")
        need(self.mid_block_type in _MID, "mid_block_type", f"only {_MID[0]!r}, {_MID[1]!r} or null is implemented")
        need(self.downsample_padding == 1, "downsample_padding", "only 1 is implemented")
        dim = self.time_cond_proj_dim
        need(dim is None or counts(dim), "time_cond_proj_dim", "give a positive integer or null")
        need(self.addition_embed_type in (None, "text_time"), "addition_embed_type", "only 'text_time' is implemented")
        if self.addition_embed_type is not None:
            for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                need(counts(getattr(self, key)), key, "text_time needs a positive integer")


def _are_depths(value: Any, layers: tuple[int, ...]) -> bool:
    """Whether `value` is a depth, none or some, of the transformer behind each of the `layers` of each level."""
    levels = value if isinstance(value, tuple) else (value,) * len(layers)
    several = [
        level if isinstance(level, tuple) else (level,) * count for level, count in zip(levels, layers, strict=False)
    ]
    good = all(depth == 0 or counts(depth, among=LAYERS) for level in several for depth in level)
    return good and len(levels) == len(layers) and [len(level) for level in several] == list(layers)


def counts(*values: Any, among: Range = COUNT) -> bool:
    """Whether all are positive integers, up to the most that there may be."""
    return all(value in among for value in values)
