"""Protocols as data: everything that decides a number and is not a file. Two protocols never share a column."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from d2g_jax.runtime.errors import UserError

INCEPTION, INSIDE, DIGITS = "inception", "inception-inside", "digits"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How images are prepared, how many there are, and what the metrics' own constants are.

    Attributes:
      name: as in --protocol.
      samples: images that a number needs.
      size: pixels along a side of what every metric sees.
      resize: PIL's filter to that size, after a centre crop to the short side; None takes only images of that size.
      features: whose features FID, KID, precision and recall are taken in: "inception" (clean-fid's: bicubic to 299 in
        float, then Inception-v3 of 2015-12-05), "inception-inside" (the same file, which enlarges by itself, as in
        EDM's fid.py) or "digits" (the independent judge of the demo).
      clip_prefix: what stands before each prompt for the CLIP score.
      kid_subsets, kid_subset_size, kid_seed: of KID's subsets, drawn by numpy's frozen RandomState.
      neighbours: k of precision and recall.
      diversity_prompts, diversity_seeds: the first prompts of the list, and images of each.
    """

    name: str
    samples: int
    size: int
    resize: str | None = "lanczos"
    features: str = INCEPTION
    clip_prefix: str = "A photo depicts "
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    kid_seed: int = 0
    neighbours: int = 3
    diversity_prompts: int = 500
    diversity_seeds: int = 4

    @property
    def sha256(self) -> str:
        """Of all fields: protocols of one name from different versions of this file are told apart."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # GigaGAN's (github.com/mingukkang/GigaGAN, evaluation/): 30,000 captions of val2014, reference all its images
        Protocol("coco2014-30k", samples=30_000, size=256),
        # The paper says no more than "5k": one caption of each image of val2017, prepared as above
        Protocol("coco2017-5k", samples=5_000, size=256),
        # DMD's and EDM's: a class after another, reference the 50,000 training images, FID alone
        Protocol("cifar10-50k", samples=50_000, size=32, resize=None, features=INSIDE, clip_prefix=""),
        # The embedded teacher's: captions drawn with DIGITS_PROMPTS_SEED, reference 2,000 real scenes
        Protocol("digits", 2_000, 64, resize=None, features=DIGITS, clip_prefix="", diversity_prompts=100),
    )
}

DIGITS_PROMPTS_SEED = 1
"""As the demo's; but the demo draws fewer, and of another number the prompts are others."""


def find_protocol(name: str) -> Protocol:
    """Raises `UserError` for an unknown name."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol={name}: unknown; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
