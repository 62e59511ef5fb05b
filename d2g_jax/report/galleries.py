"""Pictures that a job chose for its page, as its files in samples/ name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2g_jax.report.files import read_formed

COMPARISON = {"prompts": [str], "columns": [{"name": str, "images": [Path]}]}
"""samples/comparison.json: the same prompts and noise through several systems; a column has an image of each prompt."""


def _kind(of: str) -> str:
    if of not in ("prompts", "noise"):
        raise ValueError(f"a walk of {of!r}")
    return of


_ROW = {"prompt": str, "distance": float}

GALLERY = {
    "images": int,
    "walks": [{"of": _kind, "prompts": [str], "images": [Path]}],
    "nearest": {
        "searched": int,
        "pairs": int,
        "between_pairs": float,
        "rows": [{"prompt": str, "image": Path, "neighbours": [_ROW | {"image": Path}]}],
    },
    "teacher": ({"by": str, "pairs": int, "mean": float, "rows": [_ROW | {"student": Path, "teacher": Path}]},),
}
"""samples/gallery.json, drawn by the student after so many `images`.

walks: pictures on the way between two `prompts` for one noise ("of" prompts), or between two noises for one prompt.
nearest: pictures of held-out noise and their nearest training pairs, nearest first, of the `searched` of all `pairs`;
  `distance` is the root mean square difference of the latents, `between_pairs` that of a pair from its nearest other
  one, on average.
teacher: of `pairs` pairs that were not trained on those farthest apart and nearest, farthest first, by the distance
  that `by` names; missing where all pairs were trained on.
"""


def find_comparison(workdir: Path) -> dict[str, Any] | None:
    """Of the form `COMPARISON`; None where there is none."""
    return read_formed(workdir / "samples" / "comparison.json", COMPARISON, workdir)


def find_galleries(workdir: Path) -> dict[str, dict[str, Any]]:
    """By run, of the form `GALLERY`: of the workdir itself under "", of several runs under their names in students/."""
    folders = {"": workdir} | {folder.name: folder for folder in sorted(workdir.glob("students/*"))}
    found = {name: read_formed(one / "samples" / "gallery.json", GALLERY, one) for name, one in folders.items()}
    return {name: gallery for name, gallery in found.items() if gallery}
