"""What `d2g evaluate` measures with and compares to, opened and checked before a model draws for hours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from d2g_jax.digits.scenes import REAL
from d2g_jax.evaluate import distances, pairwise, reference, towers
from d2g_jax.evaluate.features import FrozenNetwork, make_extractor
from d2g_jax.evaluate.images import Survey, survey
from d2g_jax.evaluate.plan import Plan
from d2g_jax.evaluate.protocols import Protocol
from d2g_jax.evaluate.reference import Reference
from d2g_jax.results.metrics import FRECHET, KERNEL, METRICS, REFERENCE, TEACHER
from d2g_jax.runtime.errors import UserError

PAIRWISE = ("lpips", "dreamsim")
"""Distances between two images; each may be a metric of diversity and of fidelity."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """What the plan's metrics need; None, or an empty dict, where none of them does.

    Attributes:
      extractors: of features, by the name of their space.
      real: statistics by space, or what is measured when all else is known to be right: a folder, or None, the digits'
        own.
      scores, pairs: by name.
      several: images of `--diversity-images`.
      teacher: images of `--teacher-images`, the first `samples`.
    """

    extractors: dict[str, FrozenNetwork]
    real: dict[str, Reference] | Survey | None
    scores: dict[str, FrozenNetwork]
    pairs: dict[str, FrozenNetwork]
    several: Survey | None
    teacher: Survey | None


def open_all(plan: Plan) -> Opened:
    """Raises `UserError` for weights, statistics and folders that the plan's metrics cannot be measured with."""
    request, protocol = plan.request, plan.protocol
    several = teacher = None
    if request.diversity_images is not None and wants_diversity(plan):
        several = survey_several(plan, request.diversity_images)
    if any(METRICS[name].needs == TEACHER for name in plan.metrics):
        teacher = _survey_teacher(plan, request.teacher_images)
    of_reference, of_teacher = plan.compared(REFERENCE), plan.compared(TEACHER)
    extractors = {
        space: extractor_of(space, protocol, request.weights) for space in dict.fromkeys((*of_reference, *of_teacher))
    }
    real = _open_reference(plan, {space: extractors[space] for space in of_reference})
    for space, extractor in extractors.items():
        width = extractor.run(np.zeros((1, protocol.size, protocol.size, 3), np.uint8)).shape[1]
        if space in of_reference:
            count = REAL if real is None else len(real[space] if isinstance(real, dict) else real)
            _check_counts(plan, of_reference[space], width, count, "of the reference")
        if space in of_teacher:
            _check_counts(plan, of_teacher[space], width, len(teacher), "of the teacher")
    scores = {name: towers.load(name, request.weights[name]) for name in towers.SCORES if plan.wants(name)}
    wanted = [name for name in PAIRWISE if plan.wants(f"{name}_diversity", f"{name}_fidelity")]
    pairs = {name: pairwise.load(name, request.weights[name], protocol.size) for name in wanted}
    return Opened(extractors, real, scores, pairs, several, teacher)


def extractor_of(space: str, protocol: Protocol, weights: Mapping[str, Path]) -> FrozenNetwork:
    """Of the protocol's own space, or of one of `towers.SPACES`. Raises `UserError` as those that make them do."""
    if space == protocol.features:
        return make_extractor(protocol, weights.get("inception"))
    return towers.load(space, weights[space])


def wants_diversity(plan: Plan) -> bool:
    return plan.wants(*(f"{name}_diversity" for name in PAIRWISE))


def survey_several(plan: Plan, folder: Path) -> Survey:
    """Several images of each prompt. Raises `UserError` for another number of them than the protocol's."""
    found, prompts, seeds = survey(folder, plan.protocol), plan.diversity_prompts, plan.protocol.diversity_seeds
    if len(found) != prompts * seeds:
        raise UserError(f"{folder}: {len(found)} images; diversity takes {seeds} of each of {prompts} prompts")
    return found


def _survey_teacher(plan: Plan, folder: Path) -> Survey:
    found = survey(folder, plan.protocol).only(range(plan.samples))
    # Corrupt ones of a folder of images may be left out, and the teacher's then are too: that is for `job` to do.
    if plan.request.model is not None and len(found) < plan.samples:
        raise UserError(f"{folder}: {len(found)} images of the teacher for {plan.samples}; give one for each")
    return found


def _open_reference(plan: Plan, extractors: dict[str, FrozenNetwork]) -> dict[str, Reference] | Survey | None:
    request, protocol = plan.request, plan.protocol
    if request.reference is None or not extractors:
        return None
    if request.reference.is_dir():
        return survey(request.reference, protocol, max_corrupt=request.max_corrupt, mixed=True)
    return {
        space: reference.read_reference(request.reference, protocol, extractor, space)
        for space, extractor in extractors.items()
    }


def _check_counts(plan: Plan, names: list[str], width: int, others: int, whose: str) -> None:
    """Raises `UserError` where the plan's images, or the `others`, are too few for a metric of `width` features."""
    counts = {"of the system": plan.samples, whose: others}
    for name in names:
        metric = METRICS[name]
        if metric.distance == FRECHET:
            for of, count in counts.items():
                if count <= width:
                    title = metric.title.split()[0]
                    raise UserError(
                        f"{title}: {count} images {of} with {width} features; it needs at least {width + 1}"
                    )
        elif metric.distance == KERNEL:
            distances.check_subsets(*counts.values(), plan.kid_subset_size(*counts.values()))
        elif metric.distance in distances.NEIGHBOURLY:
            for count in counts.values():
                distances.check_neighbours(count, plan.neighbours(metric.distance))
