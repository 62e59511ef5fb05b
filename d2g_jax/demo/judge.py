"""Who judges samples of the embedded teacher: an independent network that was trained on real scenes alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import ml_collections
import numpy as np

from d2g_jax.digits import captions, judge, scores
from d2g_jax.digits.judge import FEATURES
from d2g_jax.digits.textures import KINDS
from d2g_jax.models.network import Params
from d2g_jax.runtime.errors import UserError

PROTOCOL = {
    "frechet": "features (64) of the independent judge, 64x64 images as uint8",
    "accuracy": "all parts of the caption by the judge",
}
"""For a result file: what its figures are by."""


def judge_of(config: ml_collections.ConfigDict) -> Params:
    """The one whose weights `config.evaluation` names, for `digits.judge.judge`."""
    return _load(config.evaluation.judge)


@functools.cache
def _load(file: str) -> Params:
    return judge.load_judge(file)


def accuracy(seen: np.ndarray, prompts: Sequence[captions.Prompt]) -> dict[str, float]:
    """Shares of images, by what is seen there, that show what their prompts ask for: by part and under "all"."""
    return scores.prompt_accuracy(seen, np.array([p.scene for p in prompts]))


def check_evaluation(config: ml_collections.ConfigDict) -> None:
    """Raises `UserError`, before anything is made, unless the samples of the section `evaluation` can be judged."""
    judge_of(config)
    grounds, known = config.evaluation.grounds, (*KINDS, captions.PLAIN)
    if not grounds or (unknown := [ground for ground in grounds if ground not in known]):
        given = unknown[0] if grounds else "none"
        raise UserError(f"evaluation.grounds: {given} is no ground; give some of {', '.join(known)}")
    for name, count in (("evaluation.samples", config.evaluation.samples), ("pairs.count", config.pairs.count)):
        if count <= FEATURES:
            raise UserError(f"{name}={count}; a Frechet distance needs more than {FEATURES} images")
