"""The rows of the paper's two ablations, and of one of ours, as plain changes of a config, with what was published."""

from __future__ import annotations

import dataclasses
from typing import Any

Changes = tuple[tuple[str, Any], ...]
"""Settings of a config by their dotted keys, and the values that they get."""


@dataclasses.dataclass(frozen=True)
class Published:
    """What the paper's table says of a row, of another model and data set; None where that is not known."""

    fid: float | None = None
    clip: float | None = None
    images_per_second: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One student of an ablation.

    Attributes:
      name: of its folder.
      title: in the table.
      changes: of the config.
    """

    name: str
    title: str
    changes: Changes
    published: Published


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One table.

    Attributes:
      name: as in `d2g ablate NAME`.
      title: over the rows' titles.
      rows: in the paper's order.
      switches: settings that rows turn off, with the value for off; a config that has one off already would make two
        rows the same run.
      published: where the published numbers come from.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    switches: Changes
    published: str


_REGRESSION_ONLY: Changes = (("adversarial.weight", 0.0),)
_NO_L1: Changes = (("loss.l1_weight", 0.0),)  # it stands beside perceptual losses alone


def _loss(name: str, title: str, published: Published, changes: Changes = ()) -> Row:
    return Row(name, title, (("loss.name", name), *_REGRESSION_ONLY, *changes), published)


LOSSES = Ablation(
    name="losses",
    title="loss",
    rows=(
        _loss("mse", "MSE", Published(110.55, 0.222, 138.4), _NO_L1),
        _loss("pseudo_huber", "pseudo-Huber", Published(87.60, 0.230), _NO_L1),
        _loss("lpips", "LPIPS (pixels)", Published(25.94, 0.288, 40.0)),
        _loss("latent_lpips", "LatentLPIPS", Published(67.17, 0.244)),
        _loss("e_latent_lpips", "E-LatentLPIPS", Published(22.95, 0.299)),
    ),
    switches=(),
    published="SD 1.5 with guidance 3, regression alone, 20,000 iterations of 256, COCO; img/s on the authors' GPUs",
)

PERCEPTUAL = Ablation(
    name="perceptual",
    title="loss",
    rows=(LOSSES.rows[0], LOSSES.rows[-1]),
    switches=(),
    published=LOSSES.published,
)
"""The two rows whose ratio is drawn in docs/when.md."""

_NO_Z: Changes = (("discriminator.z_conditioning", False),)
_NO_R1: Changes = (("adversarial.r1_gamma", 0.0),)
_NO_SCALES: Changes = (("discriminator.multiscale_inputs", False), ("discriminator.multiscale_heads", False))
_NO_MISMATCH: Changes = (("adversarial.mix_and_match", 0.0),)

# The chain is cumulative: each row takes one thing less away than the row before, and the last is the config itself.
DISCRIMINATOR = Ablation(
    name="discriminator",
    title="discriminator",
    rows=(
        Row(
            "regression",
            "regression only",
            _REGRESSION_ONLY + _NO_Z + _NO_R1 + _NO_SCALES + _NO_MISMATCH,
            Published(14.72, 0.292),
        ),
        Row("diffusion_d", "+ diffusion D", _NO_Z + _NO_R1 + _NO_SCALES + _NO_MISMATCH, Published(12.04, 0.300)),
        Row("z_conditioning", "+ z conditioning", _NO_R1 + _NO_SCALES + _NO_MISMATCH, Published(11.97, 0.302)),
        Row("r1", "+ single-sample R1", _NO_SCALES + _NO_MISMATCH, Published(10.60, 0.303)),
        Row("multi_scale", "+ multi-scale", _NO_MISMATCH, Published(9.58, 0.308)),
        Row("mix_and_match", "+ mix-and-match", (), Published(9.45, 0.310)),
    ),
    switches=_REGRESSION_ONLY + _NO_Z + _NO_R1 + _NO_SCALES + _NO_MISMATCH,
    published="SD 1.5 with guidance 3, E-LatentLPIPS, COCO 2014 (30k); longer training than in the paper's loss table",
)


def _low_rank(name: str, title: str, rank: int, d_rank: int = 0, backbone: str = "trained") -> Row:
    changes = (("lora.rank", rank), ("discriminator.lora_rank", d_rank), ("discriminator.backbone", backbone))
    return Row(name, title, changes, Published())


LORA = Ablation(
    name="lora",
    title="what is trained",
    rows=(
        _low_rank("whole", "all of G and D", 0),
        *(_low_rank(f"rank_{rank}", f"G by rank {rank}, all of D", rank) for rank in (8, 16, 32)),
        _low_rank("frozen_d", "all of G, D's heads alone", 0, backbone="frozen"),
        _low_rank("both_16", "G and D by rank 16", 16, 16),
        _low_rank("rank_16_frozen_d", "G by rank 16, D's heads alone", 16, backbone="frozen"),
    ),
    switches=(),
    published="none of these rows is the paper's",
)
"""What training less costs: docs/lora.md."""

ABLATIONS = {ablation.name: ablation for ablation in (LOSSES, PERCEPTUAL, DISCRIMINATOR, LORA)}
