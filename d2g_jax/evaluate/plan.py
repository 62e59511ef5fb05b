"""What `d2g evaluate` is asked for, made whole: every choice is taken before any image or network is looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2g_jax.evaluate.protocols import DIGITS, DIGITS_PROMPTS_SEED, INSIDE, Protocol, find_protocol
from d2g_jax.inputs import numbers
from d2g_jax.pairs.prompts import read_prompts
from d2g_jax.results import metrics
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.folder import begins_with, prompts_digest, read_description
from d2g_jax.sample.model import Asked


@dataclasses.dataclass(frozen=True)
class Request:
    """What `d2g evaluate` is asked for. Exactly one of `images` and `model` is given.

    Attributes:
      protocol: a name of `protocols.PROTOCOLS`.
      images: a folder of images, one for each prompt in order.
      model: to be drawn with into `drawn` / "images" and `drawn` / "diversity".
      drawn: a folder; what is there already is not drawn again.
      reference: a file of `d2g evaluate reference` or a folder of images.
      prompts: whatever `pairs.prompts.read_prompts` reads, and its column; None with the digits: their own.
      weights: of the metrics, by their names in `metric_weights.WHERE`.
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
    model: Asked | None = None
    drawn: Path | None = None
    reference: Path | None = None
    prompts: Path | None = None
    prompts_column: str = ""
    weights: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    diversity_images: Path | None = None
    teacher_images: Path | None = None
    samples: int | None = None
    max_corrupt: int = 0
    batch_size: int = 64
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request made whole.

    Attributes:
      prompts, labels: the whole list, of whose first `samples` the images are; None where they are not known, and
        labels of all but the digits' own prompts.
      samples: how many images.
      metrics: names, in the order of `metrics.METRICS`.
    """

    request: Request
    protocol: Protocol
    prompts: tuple[str, ...] | None
    labels: tuple[Any, ...] | None
    samples: int
    metrics: list[str]

    def wants(self, *names: str) -> bool:
        return any(name in self.metrics for name in names)

    def compared(self, needs: str) -> dict[str, list[str]]:
        """By space of features, the metrics that compare those of the images with those of `needs`."""
        spaces: dict[str, list[str]] = {}
        for name in self.metrics:
            if metrics.METRICS[name].distance and metrics.METRICS[name].needs == needs:
                spaces.setdefault(metrics.weights_of(name, self.protocol.features), []).append(name)
        return spaces

    @property
    def diversity_prompts(self) -> int:
        """How many prompts diversity takes several images of."""
        return min(self.protocol.diversity_prompts, self.samples)

    def kid_subset_size(self, drawn: int, real: int) -> int:
        """Of `drawn` images and `real` ones; fewer than the protocol's where the result is labelled as incomplete."""
        size = self.protocol.kid_subset_size
        incomplete = self.request.samples is not None or drawn < self.samples
        return min(size, drawn, real) if incomplete else size

    def neighbours(self, distance: str) -> int:
        """k: the protocol's, or the 5 of the paper on density and coverage (arXiv 2002.09797)."""
        return 5 if distance in ("density", "coverage") else self.protocol.neighbours

    def drawn_of(self, digest: str) -> bool:
        """Whether a drawing with this digest of its prompts has the measured images: it may go on behind them."""
        return self.prompts is not None and begins_with(self.prompts, self.samples, digest)

    def describe_prompts(self) -> dict[str, Any] | None:
        """For the result file."""
        if self.prompts is None:
            return None
        own = (
            "the model's classes in turn"
            if self.labels is None
            else f"captions of the digits, seed {DIGITS_PROMPTS_SEED}"
        )
        source = str(self.request.prompts) if self.request.prompts else own
        return {"source": source, "sha256": prompts_digest(self.prompts[: self.samples]), "count": self.samples}


def make_plan(request: Request) -> Plan:
    """Raises `UserError` for whatever is wrong with the request itself, and for files that are not there."""
    protocol = find_protocol(request.protocol)
    samples = protocol.samples if request.samples is None else request.samples
    if not 1 <= samples <= protocol.samples:
        raise UserError(f"--samples={samples}: {protocol.name} has 1 to {protocol.samples}")
    check_counts(request.batch_size, request.max_corrupt)
    if request.model is not None:
        numbers.COUNT.check("--draw-batch", request.model.options["batch"])
        numbers.SEED.check("--seed", request.model.options["seed"])
    _check_paths(request)
    digits = protocol.features == DIGITS
    prompts, labels = _prompts(request, protocol, samples)
    if request.model is not None and prompts is None and protocol.features != INSIDE:  # a class each, without
        raise UserError("--model needs --prompts=FILE, what is to be drawn")
    have = {
        metrics.REFERENCE: digits or request.reference is not None,
        metrics.PROMPTS: prompts is not None,
        metrics.IMAGES: True,
        metrics.LABELS: labels is not None,
        metrics.DIVERSITY: request.diversity_images is not None or request.model is not None,
        metrics.TEACHER: request.teacher_images is not None,
    }
    chosen = metrics.choose(request.metrics, have.__getitem__, request.weights, own_features=digits)
    return Plan(request, protocol, prompts, labels, samples, chosen)


def check_counts(batch_size: int, max_corrupt: int) -> None:
    """Raises `UserError` for a number of images that cannot be."""
    numbers.COUNT.check("--batch", batch_size)
    numbers.AMOUNT.check("--max-corrupt", max_corrupt)


def _check_paths(request: Request) -> None:
    """Raises `UserError` for a file or folder that is not there."""
    given = [request.images, request.reference, request.diversity_images, request.teacher_images]
    for path in (*given, *request.weights.values()):
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such file or folder")


def _prompts(
    request: Request, protocol: Protocol, samples: int
) -> tuple[tuple[str, ...] | None, tuple[Any, ...] | None]:
    """The prompts, and of the digits' own the labels too. Raises `UserError` for a list of another length."""
    if request.prompts is not None:
        lines = read_prompts(request.prompts, column=request.prompts_column, asked="--prompts-column").lines
        if len(lines) < samples or (request.samples is None and len(lines) > samples):
            if request.samples is not None:
                raise UserError(
                    f"--samples={samples} of the {len(lines)} prompts in {request.prompts}; give at most as many"
                )
            raise UserError(
                f"{request.prompts}: {len(lines)} prompts; {protocol.name} takes {protocol.samples}; give its list, or "
                f"--samples=N for the first N and a result that says so"
            )
        return lines, None
    if protocol.features != DIGITS:
        return None, None
    from d2g_jax.digits.captions import evaluation_prompts

    own = evaluation_prompts(protocol.samples, DIGITS_PROMPTS_SEED)
    lines = tuple(prompt.prompt for prompt in own)
    if request.images is not None:
        drawing = read_description(request.images)
        if drawing is None or not begins_with(lines, samples, drawing["prompts_sha256"]):
            return None, None  # nothing says that these images were drawn of the protocol's prompts
    return lines, tuple(own)
