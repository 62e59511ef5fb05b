"""The `d2g evaluate` job: draw if need be, survey, measure, and write a result that says how it was measured."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax.evaluate import distances, pairwise, reference
from d2g_jax.evaluate.drawing import Painter
from d2g_jax.evaluate.features import make_extractor
from d2g_jax.evaluate.images import Survey, batches, survey
from d2g_jax.evaluate.opening import Opened, extractor_of, open_all, survey_several, wants_diversity
from d2g_jax.evaluate.plan import Plan, Request, check_counts, make_plan
from d2g_jax.evaluate.protocols import DIGITS, find_protocol
from d2g_jax.evaluate.towers import SPACES, TOWERS
from d2g_jax.inputs.places import check_output
from d2g_jax.results import frechet
from d2g_jax.results.metrics import FRECHET, KERNEL, METRICS, REFERENCE, TEACHER
from d2g_jax.results.results import FORMAT
from d2g_jax.runtime import atomic, runs
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.progress import Progress
from d2g_jax.sample.folder import SAME_DRAWING, read_description

_LIBRARIES = ("clean-fid", "torch", "transformers", "dreamsim", "pillow", "numpy")


def evaluate(request: Request, out: Path) -> dict[str, Any]:
    """Measures and writes `out`, a JSON file; returns what it holds.

    Raises `UserError` in one line for everything that is wrong with the request or with its files: missing weights,
    corrupt or unlike images, too few of them, statistics or images of something else. What can be known of them before
    a model draws is checked before.
    """
    check_output(out, "result.json")
    plan = make_plan(request)
    opened = open_all(plan)
    painter = None if request.model is None else Painter(request.model)
    if painter is not None and plan.prompts is None:
        plan = dataclasses.replace(plan, prompts=painter.classes(plan.protocol.samples))
    found, several, drawing = _images(plan, opened, painter)
    if opened.teacher is not None:
        opened = dataclasses.replace(opened, teacher=opened.teacher.only(set(found.indices)))
    result = {
        "format": FORMAT,
        "system": request.name or (request.model.model if request.model else found.folder.name),
        "protocol": {**dataclasses.asdict(plan.protocol), "sha256": plan.protocol.sha256},
        "samples": len(found),
        "complete": len(found) == plan.protocol.samples,
        "images": {
            "folder": str(found.folder),
            "sha256": found.sha256,
            "size": list(found.size),
            "formats": found.formats,
        },
        "corrupt": found.corrupt,
        "prompts": plan.describe_prompts(),
        "drawing": drawing,
        "metrics": {},
        "weights": {},
        "reference": None,
        "teacher": None,
    }
    _measure_images(plan, opened, found, result)
    _measure_diversity(plan, opened, several, result)
    _measure_fidelity(plan, opened, found, result)
    result["metrics"] = {name: result["metrics"][name] for name in METRICS if name in result["metrics"]}
    result |= {
        "seeds": {"drawing": (drawing or {}).get("seed"), "kid": plan.protocol.kid_seed},
        "versions": _versions(),
        "environment": runs.environment(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    _check_finite(result["metrics"])
    atomic.write_json(out, result, ensure_ascii=False, allow_nan=False)
    return result


def make_reference(
    protocol: str, images: Path, weights: Mapping[str, Path], out: Path, *, max_corrupt: int, batch_size: int
) -> dict[str, Any]:
    """Writes the features of a folder of real images or of TFDS, .npz, of all spaces whose weights are given.

    Returns the description of the protocol's own, or else of the first.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out={out}: reference statistics are a .npz file")
    check_output(out, "reference.npz")
    check_counts(batch_size, max_corrupt)
    found = find_protocol(protocol)
    spaces = [space for space in SPACES if space in weights]
    if "inception" in weights or found.features == DIGITS or not spaces:
        spaces.insert(0, found.features)
    extractors = {space: extractor_of(space, found, weights) for space in spaces}
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; give one of images")
    measure, real = reference.measure_dataset, images
    if not (images / "dataset_info.json").is_file():
        measure, real = reference.measure_reference, survey(images, found, max_corrupt=max_corrupt, mixed=True)
    elif max_corrupt:
        raise UserError(f"--max-corrupt={max_corrupt}: {images} is of TFDS; of files alone some may be left out")
    made = measure(real, found, extractors, batch_size)
    reference.save(out, made, found)
    return made[spaces[0]].describe()


def _images(plan: Plan, opened: Opened, painter: Painter | None) -> tuple[Survey, Survey | None, dict[str, Any] | None]:
    """(images, several of each prompt or None, how they were drawn or None); the painter draws what is not there."""
    if painter is not None:
        return _draw_images(plan, opened, painter)
    folder = plan.request.images
    drawing = read_description(folder)
    if drawing and plan.prompts and not plan.drawn_of(drawing["prompts_sha256"]):
        raise UserError(f"{folder}: drawn of other prompts than these; give the list they were drawn of")
    found = _survey(plan, folder)
    _check_teacher(plan, opened, found.indices, drawing)
    return found, opened.several, drawing


def _draw_images(plan: Plan, opened: Opened, painter: Painter) -> tuple[Survey, Survey | None, dict[str, Any]]:
    """As `_images`, of a model. Nothing is drawn before both folders are known to be this drawing's."""
    request, protocol = plan.request, plan.protocol
    images, diversity = request.drawn / "images", request.drawn / "diversity"
    size = painter.description["size"]
    if protocol.resize is None and size != [protocol.size, protocol.size]:
        drawn = "x".join(map(str, size))
        raise UserError(
            f"{request.model.model}: draws {drawn} pixels (height x width); the protocol {protocol.name} resizes "
            f"nothing and takes {protocol.size}x{protocol.size}"
        )
    every, several = plan.prompts[: plan.samples], []
    if wants_diversity(plan):
        several = [prompt for prompt in every[: plan.diversity_prompts] for _ in range(protocol.diversity_seeds)]
    drawing = painter.claim(every, images)
    _check_teacher(plan, opened, tuple(range(plan.samples)), drawing)
    if several:
        painter.claim(several, diversity, first_noise=protocol.samples)
    painter.paint(every, images)
    if several:
        painter.paint(several, diversity, first_noise=protocol.samples)
    return _survey(plan, images), survey_several(plan, diversity) if several else None, drawing


def _survey(plan: Plan, folder: Path) -> Survey:
    found = survey(folder, plan.protocol, max_corrupt=plan.request.max_corrupt)
    total, asked = len(found) + len(found.corrupt), plan.request.samples
    if total < plan.samples or (asked is None and total > plan.samples):
        if asked is not None:
            raise UserError(f"--samples={asked} of the {total} images in {folder}; give at most as many")
        raise UserError(
            f"{folder}: {total} images; {plan.protocol.name} takes {plan.protocol.samples}; draw as many, or give "
            f"--samples=N for the first N and a result that says so"
        )
    first = found.only(range(plan.samples))
    if not len(first):
        raise UserError(f"{folder}: of the first {plan.samples} images none can be read; make them again")
    return first


def _measure_images(plan: Plan, opened: Opened, found: Survey, result: dict[str, Any]) -> None:
    """What one pass over the images gives: features and what is made of them, scores, accuracy."""
    request, protocol, extractors, scores = plan.request, plan.protocol, opened.extractors, opened.scores
    accurate = plan.wants("accuracy")
    features, values, kept = {space: [] for space in extractors}, {name: [] for name in scores}, []
    if not extractors and not scores and not accurate:
        return
    with Progress("measure", len(found), "image") as progress:
        for indices, images in batches(found, protocol, request.batch_size):
            for space, extractor in extractors.items():
                features[space].append(extractor.run(images))
            for name, score in scores.items():
                prefix = protocol.clip_prefix if TOWERS[name].prefixed else ""
                texts = [prefix + plan.prompts[i] for i in indices] if plan.prompts else []
                values[name].append(score.run(images, texts))
            if accurate:
                kept.append(images)
            progress.advance(len(images))
    for space, extractor in extractors.items():
        result["weights"][space] = extractor.describe()
    for needs, others in ((REFERENCE, opened.real), (TEACHER, opened.teacher)):
        names = plan.compared(needs)
        own = {space: extractors[space] for space in names}
        if isinstance(others, Survey):
            others = reference.measure_reference(others, protocol, own, request.batch_size)
        elif own and others is None:
            others = reference.digits_reference(protocol, own, request.batch_size)
        for space in own:
            if needs == REFERENCE and result["reference"] is None:  # all spaces' are of the same images
                result["reference"] = others[space].describe()
            drawn = np.concatenate(features[space])
            result["metrics"] |= _distances(plan, names[space], drawn, others[space].features)
    for name, score in scores.items():
        result["weights"][name] = score.describe()
        result["metrics"][name] = float(np.concatenate(values[name]).mean())
    if accurate:
        judge = make_extractor(protocol, None)  # the same network as for the digits' features
        result["weights"][protocol.features] = judge.describe()
        result["metrics"]["accuracy"] = _accuracy([plan.labels[i] for i in found.indices], np.concatenate(kept))


def _distances(plan: Plan, names: list[str], drawn: np.ndarray, others: np.ndarray) -> dict[str, Any]:
    """The values of metrics that compare features (N, D) with (M, D)."""
    of = {name: METRICS[name].distance for name in names}
    ks = {name: plan.neighbours(kind) for name, kind in of.items() if kind in distances.NEIGHBOURLY}
    around = distances.neighbourly(drawn, others, sorted(set(ks.values()))) if ks else {}
    return {name: around[ks[name]][of[name]] if name in ks else _distance(plan, name, drawn, others) for name in names}


def _distance(plan: Plan, name: str, drawn: np.ndarray, others: np.ndarray) -> Any:
    protocol, metric = plan.protocol, METRICS[name]
    if metric.distance == FRECHET:
        whose = "the teacher" if metric.needs == TEACHER else "the reference"
        fitted = frechet.fit(drawn, source=f"{name} of the images"), frechet.fit(others, source=f"{name} of {whose}")
        return frechet.gaussian_distance(*fitted)
    if metric.distance == KERNEL:
        size = plan.kid_subset_size(len(drawn), len(others))
        options = {"subsets": protocol.kid_subsets, "size": size, "seed": protocol.kid_seed}
        mean, deviation = distances.kernel_distance(drawn, others, **options)
        return {"mean": mean, "std": deviation, "subset_size": size}
    return distances.clip_mmd(drawn, others)


def _accuracy(labels: list[Any], images: np.ndarray) -> dict[str, float]:
    from d2g_jax.digits import judge, scores
    from d2g_jax.digits.config import JUDGE

    found = judge.judge(judge.load_judge(JUDGE), images)[1]
    return scores.prompt_accuracy(found, np.array([label.scene for label in labels]))


def _measure_diversity(plan: Plan, opened: Opened, several: Survey | None, result: dict[str, Any]) -> None:
    protocol, prompts = plan.protocol, plan.diversity_prompts
    for name, metric in opened.pairs.items():
        if not plan.wants(f"{name}_diversity"):
            continue
        seeds = protocol.diversity_seeds
        with Progress(f"{name} diversity", prompts, "prompt") as progress:
            values = [pairwise.mean_pairwise(metric, x) for _, x in progress.over(batches(several, protocol, seeds))]
        result["weights"][name] = metric.describe()
        result["metrics"][f"{name}_diversity"] = {"mean": float(np.mean(values)), "prompts": prompts, "seeds": seeds}


def _measure_fidelity(plan: Plan, opened: Opened, found: Survey, result: dict[str, Any]) -> None:
    protocol, teacher = plan.protocol, opened.teacher
    if teacher is None:
        return
    drawing = read_description(teacher.folder)
    result["teacher"] = {"folder": str(teacher.folder), "sha256": teacher.sha256, "drawing": drawing}
    for name, metric in opened.pairs.items():
        if not plan.wants(f"{name}_fidelity"):
            continue
        values = []
        both = zip(*(batches(x, protocol, plan.request.batch_size) for x in (found, teacher)), strict=True)
        with Progress(f"{name} to teacher", len(found), "image") as progress:
            for (_, ours), (_, theirs) in both:
                values.append(metric.run(ours, theirs))
                progress.advance(len(ours))
        result["weights"][name] = metric.describe()
        result["metrics"][f"{name}_fidelity"] = float(np.concatenate(values).mean())


def _check_teacher(plan: Plan, opened: Opened, indices: tuple[int, ...], student: dict[str, Any] | None) -> None:
    """Raises `UserError` for a teacher that drew other images, prompts or noise; warns where nothing says what it drew.

    `indices`: of the images that it is compared with, among all. `student`: how those were drawn.
    """
    if opened.teacher is None:
        return
    folder = opened.teacher.folder
    if opened.teacher.only(set(indices)).indices != indices:
        raise UserError(f"{folder}: {len(opened.teacher)} images of the teacher for {len(indices)}; give one for each")
    teacher = read_description(folder)
    if teacher is None or student is None:
        warnings.warn(f"{folder}: nothing says that both were drawn of the same noise and prompts", stacklevel=2)
        return
    for key in SAME_DRAWING:
        same = teacher[key] == student[key] or (key == "prompts_sha256" and plan.drawn_of(teacher[key]))
        if not same:
            raise UserError(
                f"{folder}: the teacher drew with {key}={teacher[key]!r}, not {student[key]!r}; draw it again"
            )


def _check_finite(values: dict[str, Any]) -> None:
    """Raises `UserError` that names a metric that is no number: none of them is written then."""
    for name, value in values.items():
        for part in value.values() if isinstance(value, dict) else (value,):
            if not math.isfinite(part):
                raise UserError(f"{name} is {part}; check the images and the metric's weights, or leave it out")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
