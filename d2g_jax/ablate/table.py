"""The figures of an ablation over its seeds: as plain values, and as Markdown beside the paper's."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from d2g_jax.ablate.rows import Ablation
from d2g_jax.results.table import markdown

MEASURED = {
    "frechet_to_teacher": ("Frechet distance to teacher", ".2f"),
    "unexplained": ("R", ".3f"),
    "sharpness": ("sharpness", ".2f"),
    "accuracy_all": ("all as asked", ".3f"),
    "images_per_second": ("img/s", ".1f"),
    "step_gib": ("GiB", ".2f"),
}
"""The figures that the table shows, where a student has them: heading and format."""

PUBLISHED = {
    "fid": ("published: FID", ".2f"),
    "clip": ("published: CLIP", ".3f"),
    "images_per_second": ("published: img/s", ".1f"),
}
"""The columns of `rows.Published`."""


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """Of one figure by seed: mean, sample standard deviation (None for one seed), lowest, highest, and all of them."""
    found = list(values.values())
    return {
        "mean": statistics.fmean(found),
        "standard_deviation": statistics.stdev(found) if len(found) > 1 else None,
        "lowest": min(found),
        "highest": max(found),
        "seeds": {str(seed): value for seed, value in values.items()},
    }


def summarize(ablation: Ablation, figures: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """`figures` by row and seed as one entry for each row of the ablation; rows without any are left out."""
    entries = []
    for row in ablation.rows:
        by_seed = figures.get(row.name, {})
        if by_seed:
            first, *others = by_seed.values()
            names = [name for name in first if all(name in other for other in others)]
            entries.append(
                {
                    "name": row.name,
                    "title": row.title,
                    "changes": dict(row.changes),
                    "figures": {name: spread({seed: by_seed[seed][name] for seed in by_seed}) for name in names},
                    "published": dataclasses.asdict(row.published),
                }
            )
    return entries


def table(result: Mapping[str, Any]) -> str:
    """The rows of ablation.json as Markdown, and lines that say what the numbers are."""
    rows = result["rows"]
    measured = [name for name in MEASURED if all(name in row["figures"] for row in rows)]
    published = [name for name in PUBLISHED if any(row["published"][name] is not None for row in rows)]
    headings = [result["title"], *(MEASURED[name][0] for name in measured), *(PUBLISHED[name][0] for name in published)]
    lines = [headings]
    for row in rows:
        cells = [_with_spread(row["figures"][name], MEASURED[name][1]) for name in measured]
        values = [(row["published"][name], PUBLISHED[name][1]) for name in published]
        lines.append([row["title"], *cells, *("–" if value is None else format(value, form) for value, form in values)])
    return "\n".join([markdown(lines), "", *_notes(result)])


def _with_spread(figure: Mapping[str, Any], form: str) -> str:
    deviation = figure["standard_deviation"]
    mean = format(figure["mean"], form)
    return mean if deviation is None else f"{mean} ± {format(deviation, form)}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    seeds, protocol = result["seeds"], result["protocol"]
    several = f"mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}"
    spread_over = several if len(seeds) > 1 else f"seed {seeds[0]} alone, no spread"
    places = "; ".join(_place(one) for one in result["environments"])
    notes = [f"Measured: {spread_over}; {protocol['images']} images of {protocol['pairs']} pairs; {places}."]
    if "floor" in result:
        notes.append(
            f"The teacher's own samples on other noise and prompts are {result['floor']:.2f} from its samples."
        )
    notes.append(f"Published, of another model and data set, not comparable in size: {result['published']}.")
    return notes


def _place(environment: Mapping[str, Any]) -> str:
    return (
        f"{environment['device']}, {environment['cores']} cores, Python {environment['python']}, "
        f"jax {environment['jax']}, {environment['date']}"
    )


def progress_line(figures: Mapping[str, float]) -> str:
    """What is said of a student when it is done."""
    return ", ".join(
        f"{MEASURED[name][0]} {format(figures[name], MEASURED[name][1])}" for name in MEASURED if name in figures
    )
