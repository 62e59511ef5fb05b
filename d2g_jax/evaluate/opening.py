"""What `d2g evaluate` measures with and compares to, opened and checked before a model draws for hours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from d2g_jax.digits.scenes import REAL
from d2g_jax.evaluate import clip_score, distances, pairwise, reference
from d2g_jax.evaluate.clip_score import ClipScore
from d2g_jax.evaluate.features import Extractor, make_extractor
from d2g_jax.evaluate.images import Survey, survey
from d2g_jax.evaluate.pairwise import PairDistance
from d2g_jax.evaluate.plan import Plan
from d2g_jax.evaluate.reference import Reference
from d2g_jax.runtime.errors import UserError

PAIRWISE = ("lpips", "dreamsim")
"""Distances between two images; each may be a metric of diversity and of fidelity."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """What the plan's metrics need; None, or an empty dict, where none of them does.

    Attributes:
      extractor: of features.
      real: statistics, or what is measured when all else is known to be right: a folder, or None, the digits' own.
      clips, pairs: by name.
      several: images of `--diversity-images`.
      teacher: images of `--teacher-images`, the first `samples`.
    """

    extractor: Extractor | None
    real: Reference | Survey | None
    clips: dict[str, ClipScore]
    pairs: dict[str, PairDistance]
    several: Survey | None
    teacher: Survey | None


def open_all(plan: Plan) -> Opened:
    """Raises `UserError` for weights, statistics and folders that the plan's metrics cannot be measured with."""
    request, protocol = plan.request, plan.protocol
    several = teacher = None
    if request.diversity_images is not None and wants_diversity(plan):
        several = survey_several(plan, request.diversity_images)
    if plan.wants(*(f"{name}_fidelity" for name in PAIRWISE)):
        teacher = _survey_teacher(plan, request.teacher_images)
    extractor, real = _open_reference(plan)
    if extractor is not None:
        _check_counts(plan, extractor, real)
    clips = {name: clip_score.load(name, request.weights[name]) for name in clip_score.PATCHES if plan.wants(name)}
    wanted = [name for name in PAIRWISE if plan.wants(f"{name}_diversity", f"{name}_fidelity")]
    pairs = {name: pairwise.load(name, request.weights[name], protocol.size) for name in wanted}
    return Opened(extractor, real, clips, pairs, several, teacher)


def wants_diversity(plan: Plan) -> bool:
    return plan.wants(*(f"{name}_diversity" for name in PAIRWISE))


def survey_several(plan: Plan, folder: Path) -> Survey:
    """Several images of each prompt. Raises `UserError` for another number of them than the protocol's."""
    found, prompts, seeds = survey(folder, plan.protocol), plan.diversity_prompts, plan.protocol.diversity_seeds
    if len(found) != prompts * seeds:
        raise UserError(f"{folder}: {len(found)} images; diversity takes {seeds} of each of {prompts} prompts")
    return found


def _survey_teacher(plan: Plan, folder: Path) -> Survey:
    found = survey(folder, plan.protocol).first(plan.samples)
    # Corrupt ones of a folder of images may be left out, and the teacher's then are too: that is for `job` to compare.
    if plan.request.model is not None and len(found) < plan.samples:
        raise UserError(f"{folder}: {len(found)} images of the teacher for {plan.samples}; give one for each")
    return found


def _open_reference(plan: Plan) -> tuple[Extractor | None, Reference | Survey | None]:
    if not plan.wants("fid", "kid", "precision", "recall"):
        return None, None
    request, protocol = plan.request, plan.protocol
    extractor = make_extractor(protocol, request.weights.get("inception"))
    if request.reference is None:
        return extractor, None
    if request.reference.is_dir():
        return extractor, survey(request.reference, protocol, max_corrupt=request.max_corrupt, mixed=True)
    return extractor, reference.read_reference(request.reference, protocol, extractor)


def _check_counts(plan: Plan, extractor: Extractor, real: Reference | Survey | None) -> None:
    """Raises `UserError` where the plan's images, or the reference's, are too few for a metric."""
    counts = {"of the system": plan.samples, "of the reference": REAL if real is None else len(real)}
    if plan.wants("fid"):
        side = plan.protocol.size
        width = extractor.extract(np.zeros((1, side, side, 3), np.uint8)).shape[1]
        for whose, count in counts.items():
            if count <= width:
                raise UserError(f"FID: {count} images {whose} with {width} features; it needs at least {width + 1}")
    if plan.wants("kid"):
        distances.check_subsets(*counts.values(), plan.kid_subset_size(*counts.values()))
    if plan.wants("precision", "recall"):
        for count in counts.values():
            distances.check_neighbours(count, plan.protocol.neighbours)
