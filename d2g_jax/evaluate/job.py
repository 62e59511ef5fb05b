"""The `d2g evaluate` job: draw if need be, survey, measure, and write a result that says how it was measured."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from d2g_jax import atomic, frechet, runs
from d2g_jax.errors import UserError
from d2g_jax.evaluate import clip_score, distances, metrics, pairwise, reference
from d2g_jax.evaluate.drawing import Model, Painter, prompts_digest, read_description
from d2g_jax.evaluate.features import Extractor, make_extractor
from d2g_jax.evaluate.images import Survey, batches, survey
from d2g_jax.evaluate.metric_weights import MetricWeights
from d2g_jax.evaluate.protocols import DIGITS, DIGITS_PROMPTS_SEED, Protocol, find_protocol
from d2g_jax.evaluate.results import FORMAT
from d2g_jax.pairs.prompts import read_prompts
from d2g_jax.progress import Progress

_LIBRARIES = ("clean-fid", "torch", "transformers", "dreamsim", "pillow", "numpy")


@dataclasses.dataclass(frozen=True)
class Request:
    """What `d2g evaluate` is asked for. Exactly one of `images` and `model` is given.

    Attributes:
      protocol: a name of `protocols.PROTOCOLS`.
      images: a folder of images, one for each prompt in order.
      model: to be drawn with into `drawn` / "images" and `drawn` / "diversity".
      drawn: a folder; what is there already is not drawn again.
      reference: a file of `d2g evaluate reference` or a folder of images.
      prompts: whatever `pairs.prompts.read_prompts` reads without a column; None with the digits: their own.
      weights: of the metrics.
      metrics: names of `metrics.METRICS`; empty for all that the given files allow.
      diversity_images: several images of each prompt, one prompt after another; `model` draws its own.
      teacher_images: the teacher's for the same prompts and noise.
      samples: the first so many, in place of the protocol's number; the result is labelled as incomplete.
      max_corrupt: unreadable images that are left out; the result is labelled too.
      batch_size: images per call of the metrics' networks.
      name: of the system, for tables; None is the model's or the folder's.
    """

    protocol: str
    images: Path | None = None
    model: Model | None = None
    drawn: Path | None = None
    reference: Path | None = None
    prompts: Path | None = None
    weights: MetricWeights = dataclasses.field(default_factory=MetricWeights)
    metrics: tuple[str, ...] = ()
    diversity_images: Path | None = None
    teacher_images: Path | None = None
    samples: int | None = None
    max_corrupt: int = 0
    batch_size: int = 64
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A request made whole: every choice taken before anything long is done."""

    request: Request
    protocol: Protocol
    prompts: tuple[str, ...] | None
    labels: tuple[Any, ...] | None
    samples: int
    metrics: list[str]

    def wants(self, *names: str) -> bool:
        return any(name in self.metrics for name in names)


def evaluate(request: Request, out: Path) -> dict[str, Any]:
    """Measures and writes `out`, a JSON file; returns what it holds.

    Raises `UserError` in one line for everything that is wrong with the request or with its files: missing weights,
    corrupt or unlike images, too few of them, statistics or images of something else.
    """
    plan = _plan(request)
    folder, diversity_folder, drawing = _folders(plan)
    found = _survey(plan, folder)
    result = {
        "format": FORMAT,
        "system": request.name or (request.model.model if request.model else folder.name),
        "protocol": {**dataclasses.asdict(plan.protocol), "sha256": plan.protocol.sha256},
        "samples": len(found),
        "complete": len(found) == plan.protocol.samples,
        "images": {"folder": str(folder), "sha256": found.sha256, "size": list(found.size), "formats": found.formats},
        "corrupt": found.corrupt,
        "prompts": _describe_prompts(plan),
        "drawing": drawing,
        "metrics": {},
        "weights": {},
        "reference": None,
        "teacher": None,
    }
    _measure_images(plan, found, result)
    _measure_diversity(plan, diversity_folder, result)
    _measure_fidelity(plan, found, result)
    result["metrics"] = {name: result["metrics"][name] for name in metrics.METRICS if name in result["metrics"]}
    result |= {
        "seeds": {"drawing": (drawing or {}).get("seed"), "kid": plan.protocol.kid_seed},
        "versions": _versions(),
        "environment": runs.environment(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    atomic.write_text(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def make_reference(
    protocol: str, images: Path, inception: Path | None, out: Path, *, max_corrupt: int, batch_size: int
) -> dict[str, Any]:
    """Writes the reference statistics of a folder of real images, .npz; returns their description."""
    if out.suffix != ".npz":
        raise UserError(f"--out={out}: reference statistics are a .npz file")
    found = find_protocol(protocol)
    extractor = make_extractor(found, inception)
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; give one of images")
    made = reference.open_reference(images, found, extractor, max_corrupt=max_corrupt, batch=batch_size)
    made.save(out)
    return made.describe()


def _plan(request: Request) -> _Plan:
    protocol = find_protocol(request.protocol)
    samples = protocol.samples if request.samples is None else request.samples
    if not 1 <= samples <= protocol.samples:
        raise UserError(f"--samples={samples}: {protocol.name} has 1 to {protocol.samples}")
    if request.batch_size < 1 or request.max_corrupt < 0:
        raise UserError(f"--batch={request.batch_size} --max-corrupt={request.max_corrupt}: give 1 or more, 0 or more")
    _check_paths(request)
    digits = protocol.features == DIGITS
    prompts, labels = _prompts(request, protocol, samples)
    if request.model is not None and prompts is None:
        raise UserError("--model needs --prompts=FILE, what is to be drawn")
    have = {
        metrics.REFERENCE: digits or request.reference is not None,
        metrics.PROMPTS: prompts is not None,
        metrics.LABELS: labels is not None,
        metrics.DIVERSITY: request.diversity_images is not None or request.model is not None,
        metrics.TEACHER: request.teacher_images is not None,
    }
    chosen = metrics.choose(request.metrics, have.__getitem__, request.weights, own_features=digits)
    return _Plan(request, protocol, prompts, labels, samples, chosen)


def _check_paths(request: Request) -> None:
    """Raises `UserError` for a file or folder that is not there: before images are drawn for hours."""
    given = [request.images, request.reference, request.diversity_images, request.teacher_images]
    for path in (*given, *dataclasses.astuple(request.weights)):
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such file or folder")


def _prompts(
    request: Request, protocol: Protocol, samples: int
) -> tuple[tuple[str, ...] | None, tuple[Any, ...] | None]:
    """The prompts, and of the digits' own the labels too. Raises `UserError` for a list of another length."""
    if request.prompts is not None:
        lines = read_prompts(request.prompts).lines
        if len(lines) < samples or (request.samples is None and len(lines) > samples):
            raise UserError(
                f"{request.prompts}: {len(lines)} prompts; {protocol.name} takes {protocol.samples}; give its list, or "
                f"--samples=N for the first N and a result that says so"
            )
        return lines[:samples], None
    if protocol.features != DIGITS:
        return None, None
    from d2g_jax.digits.captions import evaluation_prompts

    own = evaluation_prompts(protocol.samples, DIGITS_PROMPTS_SEED)[:samples]
    lines = tuple(prompt.prompt for prompt in own)
    if request.images is not None:
        drawing = read_description(request.images)
        if drawing is None or drawing["prompts_sha256"] != prompts_digest(lines):
            return None, None  # nothing says that these images were drawn of the protocol's prompts
    return lines, tuple(own)


def _folders(plan: _Plan) -> tuple[Path, Path | None, dict[str, Any] | None]:
    """(images, several images of each prompt or None, how they were drawn or None); draws what is not there."""
    request = plan.request
    if request.model is None:
        drawing = read_description(request.images)
        if drawing and plan.prompts and drawing["prompts_sha256"] != prompts_digest(plan.prompts):
            raise UserError(f"{request.images}: drawn of other prompts than these; give the list they were drawn of")
        return request.images, request.diversity_images, drawing
    painter, images, diversity = Painter(request.model), request.drawn / "images", request.drawn / "diversity"
    painter.paint(plan.prompts, images)
    if plan.wants("lpips_diversity", "dreamsim_diversity"):
        several = [p for p in _diversity_prompts(plan) for _ in range(plan.protocol.diversity_seeds)]
        painter.paint(several, diversity, first_noise=plan.protocol.samples)
    return images, diversity, read_description(images)


def _diversity_prompts(plan: _Plan) -> tuple[str, ...]:
    return plan.prompts[: plan.protocol.diversity_prompts]


def _survey(plan: _Plan, folder: Path) -> Survey:
    found = survey(folder, plan.protocol, max_corrupt=plan.request.max_corrupt)
    total, asked = len(found) + len(found.corrupt), plan.request.samples
    if total < plan.samples or (asked is None and total > plan.samples):
        raise UserError(
            f"{folder}: {total} images; {plan.protocol.name} takes {plan.protocol.samples}; draw as many, or give "
            f"--samples=N for the first N and a result that says so"
        )
    return found.first(plan.samples)


def _describe_prompts(plan: _Plan) -> dict[str, Any] | None:
    if plan.prompts is None:
        return None
    source = (
        str(plan.request.prompts) if plan.request.prompts else f"captions of the digits, seed {DIGITS_PROMPTS_SEED}"
    )
    return {"source": source, "sha256": prompts_digest(plan.prompts), "count": len(plan.prompts)}


def _measure_images(plan: _Plan, found: Survey, result: dict[str, Any]) -> None:
    """What one pass over the images gives: features and what is made of them, CLIP scores, accuracy."""
    request, protocol = plan.request, plan.protocol
    extractor, real = _reference(plan)
    clips = {
        name: clip_score.load(name, getattr(request.weights, name)) for name in clip_score.PATCHES if plan.wants(name)
    }
    accurate = plan.wants("accuracy")
    features, cosines, kept = [], {name: [] for name in clips}, []
    if extractor is None and not clips and not accurate:
        return
    with Progress("measure", len(found), "image") as progress:
        for indices, images in batches(found, protocol, request.batch_size):
            if extractor is not None:
                features.append(extractor.extract(images))
            texts = [protocol.clip_prefix + plan.prompts[i] for i in indices] if clips else []
            for name, clip in clips.items():
                cosines[name].append(clip.cosines(images, texts))
            if accurate:
                kept.append(images)
            progress.advance(len(images))
    if extractor is not None:
        result["reference"] = real.describe()
        result["weights"][protocol.features] = {"name": extractor.name, "sha256": extractor.sha256}
        result["metrics"] |= _of_features(plan, np.concatenate(features), real.features)
    for name, clip in clips.items():
        result["weights"][name] = {"name": name, "sha256": clip.sha256}
        result["metrics"][name] = float(np.concatenate(cosines[name]).mean())
    if accurate:
        result["metrics"]["accuracy"] = _accuracy([plan.labels[i] for i in found.indices], np.concatenate(kept))


def _reference(plan: _Plan) -> tuple[Extractor | None, reference.Reference | None]:
    if not plan.wants("fid", "kid", "precision", "recall"):
        return None, None
    request, protocol = plan.request, plan.protocol
    extractor = make_extractor(protocol, request.weights.inception)
    if request.reference is None:
        return extractor, reference.digits_reference(protocol, extractor)
    options = {"max_corrupt": request.max_corrupt, "batch": request.batch_size}
    return extractor, reference.open_reference(request.reference, protocol, extractor, **options)


def _of_features(plan: _Plan, drawn: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    protocol, values = plan.protocol, {}
    if plan.wants("fid"):
        fitted = frechet.fit(drawn, source="FID of the images"), frechet.fit(real, source="FID of the reference")
        values["fid"] = frechet.gaussian_distance(*fitted)
    if plan.wants("kid"):
        size = protocol.kid_subset_size
        if plan.request.samples is not None or len(drawn) < plan.samples:  # labelled as incomplete
            size = min(size, len(drawn), len(real))
        options = {"subsets": protocol.kid_subsets, "size": size, "seed": protocol.kid_seed}
        mean, deviation = distances.kernel_distance(drawn, real, **options)
        values["kid"] = {"mean": mean, "std": deviation, "subset_size": size}
    if plan.wants("precision", "recall"):
        both = distances.precision_recall(drawn, real, protocol.neighbours)
        values |= {name: v for name, v in zip(("precision", "recall"), both, strict=True) if plan.wants(name)}
    return values


def _accuracy(labels: list[Any], images: np.ndarray) -> dict[str, float]:
    from d2g_jax.digits import classifier, scores

    asked = [np.array([getattr(label, name) for label in labels]) for name in ("digit", "weight", "slant")]
    return scores.prompt_accuracy(images, *asked, classifier.load_classifier())


def _measure_diversity(plan: _Plan, folder: Path | None, result: dict[str, Any]) -> None:
    protocol = plan.protocol
    for name in ("lpips", "dreamsim"):
        if not plan.wants(f"{name}_diversity"):
            continue
        found, seeds = survey(folder, protocol), protocol.diversity_seeds
        prompts = min(protocol.diversity_prompts, plan.samples)
        if len(found) != prompts * seeds:
            raise UserError(f"{folder}: {len(found)} images; diversity takes {seeds} of each of {prompts} prompts")
        metric = pairwise.load(name, getattr(plan.request.weights, name))
        with Progress(f"{name} diversity", prompts, "prompt") as progress:
            values = [pairwise.mean_pairwise(metric, x) for _, x in progress.over(batches(found, protocol, seeds))]
        result["weights"][name] = {"name": name, "sha256": metric.sha256}
        result["metrics"][f"{name}_diversity"] = {"mean": float(np.mean(values)), "prompts": prompts, "seeds": seeds}


def _measure_fidelity(plan: _Plan, found: Survey, result: dict[str, Any]) -> None:
    if not plan.wants("lpips_fidelity", "dreamsim_fidelity"):
        return
    protocol, folder = plan.protocol, plan.request.teacher_images
    teacher = survey(folder, protocol).first(plan.samples)
    if teacher.indices != found.indices:
        raise UserError(f"{folder}: {len(teacher)} images of the teacher for {len(found)}; give one for each")
    drawing = read_description(folder)
    _check_same_noise(folder, drawing, result["drawing"])
    result["teacher"] = {"folder": str(folder), "sha256": teacher.sha256, "drawing": drawing}
    for name in ("lpips", "dreamsim"):
        if not plan.wants(f"{name}_fidelity"):
            continue
        metric, values = pairwise.load(name, getattr(plan.request.weights, name)), []
        both = zip(*(batches(x, protocol, plan.request.batch_size) for x in (found, teacher)), strict=True)
        with Progress(f"{name} to teacher", len(found), "image") as progress:
            for (_, ours), (_, theirs) in both:
                values.append(metric.distances(ours, theirs))
                progress.advance(len(ours))
        result["weights"][name] = {"name": name, "sha256": metric.sha256}
        result["metrics"][f"{name}_fidelity"] = float(np.concatenate(values).mean())


def _check_same_noise(folder: Path, teacher: dict[str, Any] | None, student: dict[str, Any] | None) -> None:
    """Raises `UserError` for a teacher that drew other prompts or noise; warns where nothing says what it drew."""
    if teacher is None or student is None:
        warnings.warn(f"{folder}: nothing says that both were drawn of the same noise and prompts", stacklevel=2)
        return
    for key in ("seed", "first_noise", "noise", "prompts_sha256", "size"):
        if teacher[key] != student[key]:
            raise UserError(
                f"{folder}: the teacher drew with {key}={teacher[key]!r}, not {student[key]!r}; draw it again"
            )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
