"""The metrics by name: what each needs, and which of them a request can have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from d2g_jax.results import metric_weights
from d2g_jax.runtime.errors import UserError

REFERENCE, PROMPTS, IMAGES, LABELS, DIVERSITY, TEACHER = (
    "reference",
    "prompts",
    "images",
    "labels",
    "diversity",
    "teacher",
)
FRECHET, KERNEL = "Fréchet distance", "kernel distance"


@dataclasses.dataclass(frozen=True)
class Metric:
    """One column of a table.

    Attributes:
      title: with an arrow to where better is.
      needs: one of the inputs above.
      weights: a name of `metric_weights.WHERE`; None where the protocol brings them.
      distance: of two sets of features, of the images and of the reference or the teacher; None for what is no such.
    """

    title: str
    needs: str
    weights: str | None = None
    distance: str | None = None


METRICS: dict[str, Metric] = {
    "fid": Metric("FID ↓", REFERENCE, distance=FRECHET),
    "kid": Metric("KID ↓", REFERENCE, distance=KERNEL),
    "precision": Metric("precision ↑", REFERENCE, distance="precision"),
    "recall": Metric("recall ↑", REFERENCE, distance="recall"),
    "density": Metric("density ↑", REFERENCE, distance="density"),
    "coverage": Metric("coverage ↑", REFERENCE, distance="coverage"),
    "fd_dinov2": Metric("FD-DINOv2 ↓", REFERENCE, "dinov2", FRECHET),
    "cmmd": Metric("CMMD ↓", REFERENCE, "clip_l14_336", "CMMD"),
    "clip_b32": Metric("CLIP ViT-B/32 ↑", PROMPTS, "clip_b32"),
    "clip_g14": Metric("CLIP ViT-g/14 ↑", PROMPTS, "clip_g14"),
    "pickscore": Metric("PickScore ↑", PROMPTS, "pickscore"),
    "hpsv2": Metric("HPSv2 ↑", PROMPTS, "hpsv2"),
    "aesthetic": Metric("aesthetic ↑", IMAGES, "aesthetic"),
    "accuracy": Metric("accuracy ↑", LABELS),
    "lpips_diversity": Metric("LPIPS diversity ↑", DIVERSITY, "lpips"),
    "dreamsim_diversity": Metric("DreamSim diversity ↑", DIVERSITY, "dreamsim"),
    "fid_teacher": Metric("FID to teacher ↓", TEACHER, distance=FRECHET),
    "kid_teacher": Metric("KID to teacher ↓", TEACHER, distance=KERNEL),
    "precision_teacher": Metric("precision to teacher ↑", TEACHER, distance="precision"),
    "recall_teacher": Metric("recall to teacher ↑", TEACHER, distance="recall"),
    "lpips_fidelity": Metric("LPIPS to teacher ↓", TEACHER, "lpips"),
    "dreamsim_fidelity": Metric("DreamSim to teacher ↓", TEACHER, "dreamsim"),
}


def weights_of(metric: str, features: str) -> str | None:
    """What of a result's `weights` decides a metric: its own, or those of the protocol's features; None for neither."""
    own = METRICS[metric]
    return own.weights or (features if own.distance or own.needs == LABELS else None)


_REMEDIES = {
    REFERENCE: "--reference=FILE_OR_FOLDER (see `d2g evaluate reference --help`)",
    PROMPTS: "--prompts=FILE",
    LABELS: "the digits protocol with --model, or with images that `d2g sample` drew of its own prompts",
    DIVERSITY: "--diversity-images=FOLDER, or --model",
    TEACHER: "--teacher-images=FOLDER",
}


def choose(
    asked: Sequence[str], have: Callable[[str], bool], weights: Mapping[str, Path], *, own_features: bool
) -> list[str]:
    """The metrics to measure, in the order of `METRICS`.

    Args:
      asked: names; empty for all that the given files allow.
      have: whether an input (`REFERENCE`, ...) is there.
      weights: what was given, by its name in `metric_weights.WHERE`.
      own_features: whether the protocol's features need no weights.

    Raises:
      UserError: an unknown name, a metric that was asked for without what it needs, and nothing to measure.
    """
    for name in asked:
        if name not in METRICS:
            raise UserError(f"--metrics: {name!r} is unknown; known are {', '.join(METRICS)}")
    chosen = []
    for name, metric in METRICS.items():
        of_protocol = metric.distance is not None and metric.weights is None and not own_features
        needed = "inception" if of_protocol else metric.weights
        lacking = needed is not None and needed not in weights
        if name in asked and lacking:
            raise metric_weights.missing(name, needed)
        if name in asked and not have(metric.needs):
            raise UserError(f"{name} needs {_REMEDIES[metric.needs]}")
        if (name in asked or not asked) and not lacking and have(metric.needs):
            chosen.append(name)
    if not chosen:
        raise UserError("nothing to measure; give weights (--weights-inception=FILE, ...) and what they are used with")
    return chosen
