"""`config.json` of UNets of images: diffusers' `UNet2DModel`, and EDM's SongUNet told in the same keys."""

from __future__ import annotations

import dataclasses
from typing import Any

from d2g_jax.inputs.fields import as_json, read_fields
from d2g_jax.inputs.numbers import LAYERS
from d2g_jax.models.unet_config import counts
from d2g_jax.runtime.errors import UserError

UNET2D, SONG = "UNet2DModel", "SongUNet"
CLASSES = (UNET2D, SONG)
"""What `_class_name` says; the second is ours, and diffusers has no such network."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
}
_IGNORED = ("dropout", "num_train_timesteps")  # nothing is dropped where nothing is trained from nothing
_DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
_MID = ("UNetMidBlock2D", None)
_RESAMPLING = ("conv", "resnet")


@dataclasses.dataclass(frozen=True)
class ImageUNetConfig:
    """Architecture of a UNet of images; names, meanings and defaults are diffusers', but for the last.

    Attributes:
      attention_head_dim: channels of a head, here really; None is one head.
      song: EDM's SongUNet (DDPM++ and NCSN++ of score_sde): every residual divided by sqrt(2), sizes changed by resnets
        that always project, attention in the decoder behind a level's last resnet alone, and the class, a linear layer
        of it, added to the wave of the noise level.
      stem_channels: width behind conv_in and of the noise level's wave; None is that of the first level.
      resample_filter: taps of the low-pass filter of resnets that change the size.
      fourier: frequencies of NCSN++'s noise embedding; None is the usual wave.
      residual_input: NCSN++'s encoder adds the image, convolved and made smaller, at each lower level.
      augment_dim: numbers of EDM's augmentation that the network was trained with, of which it is told nothing here.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (_DOWN[0], _DOWN[1], _DOWN[1], _DOWN[1])
    mid_block_type: str | None = _MID[0]
    up_block_types: tuple[str, ...] = (_UP[1], _UP[1], _UP[1], _UP[0])
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    num_class_embeds: int | None = None
    song: bool = False
    stem_channels: int | None = None
    resample_filter: tuple[int, ...] = (1, 1)
    fourier: tuple[float, ...] | None = None
    residual_input: bool = False
    augment_dim: int | None = None

    def __post_init__(self) -> None:
        if self.stem_channels is None:
            object.__setattr__(self, "stem_channels", (*self.block_out_channels, None)[0])

    # What `unet.py` asks of a config.
    addition_embed_type = time_cond_proj_dim = None

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layers_per_block,) * len(self.block_out_channels)

    @property
    def down_attentions(self) -> tuple[tuple[int, ...], ...]:
        """One for each layer of a level that attends; their number is what matters."""
        return tuple((1,) * self.layers_per_block * (kind == _DOWN[1]) for kind in self.down_block_types)

    @property
    def mid_attentions(self) -> tuple[int, ...]:
        return (1,) if self.add_attention else ()

    @property
    def mid_resnets(self) -> int:
        return 2

    @property
    def up_attentions(self) -> tuple[tuple[int, ...], ...]:
        each = 1 if self.song else self.layers_per_block + 1
        return tuple((1,) * each * (kind == _UP[1]) for kind in self.up_block_types)

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.stem_channels

    @property
    def wave_channels(self) -> int:
        """Numbers that the noise level becomes before its two linear layers."""
        return self.stem_channels if self.fourier is None else 2 * len(self.fourier)

    @property
    def skip_scale(self) -> float:
        """By what a sum with a residual is divided."""
        return 2**0.5 if self.song else 1.0

    @property
    def resamples(self) -> tuple[bool, bool]:
        """Whether resnets make the levels smaller and larger."""
        return (
            self.downsample_type == "resnet" or _DOWN[2] in self.down_block_types,
            self.upsample_type == "resnet" or _UP[2] in self.up_block_types,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any], *, source: str) -> ImageUNetConfig:
        """From a parsed `config.json`; `source` is the file's name for messages.

        Raises `UserError` for a key that is unknown, or not implemented and not neutral, or whose value is malformed.
        """
        values = {**values, "song": values.get("_class_name") == SONG}
        config = cls(**read_fields(cls, values, source, _NEUTRAL, _IGNORED))
        config._check(source)
        return config

    def to_json(self) -> dict[str, Any]:
        """The keys of `config.json`; of a UNet2DModel diffusers builds the same network from them."""
        values = as_json(self)
        if not values.pop("song"):
            values = {key: value for key, value in values.items() if key not in _OURS}
        return {"_class_name": SONG if self.song else UNET2D, **values}

    def _check(self, source: str) -> None:
        """Raises `UserError` for values that fit no network."""

        def need(good: bool, key: str, remedy: str) -> None:
            if not good:
                raise UserError(f"{source}: {key} = {getattr(self, key)!r}; {remedy}")

        widths, levels = self.block_out_channels, len(self.block_out_channels)
        need(bool(widths) and counts(*widths), "block_out_channels", "give positive integers")
        need(self.layers_per_block in LAYERS, "layers_per_block", f"give {LAYERS}")
        for key in ("in_channels", "out_channels", "norm_num_groups", "stem_channels"):
            need(counts(getattr(self, key)), key, "give a positive integer")
        for key in ("num_class_embeds", "augment_dim"):
            need(getattr(self, key) is None or counts(getattr(self, key)), key, "give a positive integer or null")
        for key, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            kinds = getattr(self, key)
            need(len(kinds) == levels and set(kinds) <= set(known), key, f"give {levels} of {', '.join(known)}")
        need(self.mid_block_type in _MID, "mid_block_type", f"only {_MID[0]!r} or null is implemented")
        need(self.downsample_padding in (0, 1), "downsample_padding", "give 0 or 1")
        need(self.resnet_time_scale_shift in ("default", "scale_shift"), "resnet_time_scale_shift", "not implemented")
        for key, blocks, kind in (
            ("downsample_type", "down_block_types", _DOWN),
            ("upsample_type", "up_block_types", _UP),
        ):
            need(getattr(self, key) in _RESAMPLING, key, f"choose one of {', '.join(_RESAMPLING)}")
            resnets = {
                name == kind[2] or (name == kind[1] and getattr(self, key) == "resnet")
                for name in getattr(self, blocks)[: levels - 1]
            }
            need(len(resnets) < 2, blocks, "levels whose sizes change in two ways are not implemented")
        for width in {*widths, self.stem_channels}:
            need(width % self.norm_num_groups == 0, "norm_num_groups", f"must divide {width} channels")
            head = self.attention_head_dim
            need(head is None or (counts(head) and width % head == 0), "attention_head_dim", f"must divide {width}")
        odd = self.add_attention and self.mid_block_type is not None and self.attn_norm_num_groups is None
        need(
            not (odd and self.resnet_time_scale_shift != "default"),
            "attn_norm_num_groups",
            "give norm_num_groups' value",
        )
        need(self.sample_size is not None, "sample_size", "set it to the images' height and width")
        factor, size = 2 ** (levels - 1), self.sample_size
        sides = size if isinstance(size, tuple) else (size, size)
        need(
            counts(*sides) and len(sides) == 2 and all(side % factor == 0 for side in sides),
            "sample_size",
            f"give a multiple of {factor}, which {levels} levels halve {levels - 1} times",
        )


_OURS = ("stem_channels", "resample_filter", "fourier", "residual_input", "augment_dim")
