"""What `samples/gallery.json` of a run says: walks and nearest pairs, drawn when the run was done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2g_jax.report.files import inside, read_object
from d2g_jax.runtime.errors import UserError


@dataclass(frozen=True)
class Walk:
    """Pictures on the way between two `prompts` for one noise, or between two noises for one prompt."""

    of: str  # prompts or noise
    prompts: list[str]
    images: list[Path | None]


@dataclass(frozen=True)
class Neighbour:
    """A training pair. `distance`: root mean square difference of its latent from the picture's."""

    id: int
    prompt: str
    distance: float
    image: Path | None


@dataclass(frozen=True)
class Query:
    """A picture of held-out noise and its nearest training pairs, nearest first."""

    prompt: str
    image: Path | None
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class Beside:
    """A student's picture and its teacher's, of one noise and prompt that were not trained on."""

    prompt: str
    distance: float
    student: Path | None
    teacher: Path | None


@dataclass(frozen=True)
class Extremes:
    """Of `pairs` such pairs, the farthest apart and the nearest, farthest first; `by` names the distance."""

    by: str
    pairs: int
    mean: float
    rows: list[Beside]


@dataclass(frozen=True)
class Gallery:
    """Drawn by the student after `images` images; `searched` of `pairs` pairs were compared.

    `between_pairs`: how far a pair's latent is from its nearest other pair's, on average. `teacher`: None where all
    pairs were trained on.
    """

    images: int
    walks: list[Walk]
    queries: list[Query]
    searched: int
    pairs: int
    between_pairs: float
    teacher: Extremes | None = None


def find_galleries(workdir: Path) -> dict[str, Gallery]:
    """By run: of the workdir itself under "", of a job's several runs under their names in students/."""
    files = {"": workdir / "samples" / "gallery.json"}
    files |= {file.parts[-3]: file for file in sorted(workdir.glob("students/*/samples/gallery.json"))}
    found = {name: _read_gallery(file) for name, file in files.items()}
    return {name: gallery for name, gallery in found.items() if gallery}


def _read_gallery(file: Path) -> Gallery | None:
    data, folder = read_object(file), file.parent.parent
    if data is None:
        return None
    try:
        nearest = data["nearest"]
        return Gallery(
            images=int(data["images"]),
            walks=[_walk(folder, **walk) for walk in data["walks"]],
            queries=[_query(folder, **row) for row in nearest["rows"]],
            searched=int(nearest["searched"]),
            pairs=int(nearest["pairs"]),
            between_pairs=float(nearest["between_pairs"]),
            teacher=_extremes(folder, **found) if (found := data.get("teacher")) else None,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: not a gallery ({type(error).__name__}: {error}); remove it") from error


def _walk(folder: Path, of: str, prompts: list[str], images: list[str]) -> Walk:
    if of not in ("prompts", "noise") or len(prompts) != (2 if of == "prompts" else 1):
        raise ValueError(f"a walk of {of!r} with {len(prompts)} prompts")
    return Walk(of, [str(prompt) for prompt in prompts], [inside(folder, path) for path in images])


def _extremes(folder: Path, by: str, pairs: int, mean: float, rows: list[dict[str, Any]]) -> Extremes:
    found = [
        Beside(
            str(one["prompt"]), float(one["distance"]), *(inside(folder, one[side]) for side in ("student", "teacher"))
        )
        for one in rows
    ]
    return Extremes(str(by), int(pairs), float(mean), found)


def _query(folder: Path, prompt: str, image: str, neighbours: list[dict[str, Any]]) -> Query:
    found = [
        Neighbour(int(one["id"]), str(one["prompt"]), float(one["distance"]), inside(folder, one["image"]))
        for one in neighbours
    ]
    return Query(str(prompt), inside(folder, image), found)
