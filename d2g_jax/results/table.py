"""Results side by side: a column holds only numbers that were measured the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2g_jax.results.metrics import DIVERSITY, METRICS, REFERENCE, TEACHER, weights_of

_SHORT = 12  # hexadecimal digits of a hash


def comparable(result: dict[str, Any], metric: str) -> dict[str, Any]:
    """Everything that has to be equal for two numbers of this metric to stand in one column."""
    protocol, needs = result["protocol"], METRICS[metric].needs
    if result["prompts"] is None:  # whose they were is not known: only the very same images had the same ones
        prompts = f"unknown, of images {result['images']['sha256'][:_SHORT]}"
    else:
        prompts = result["prompts"]["sha256"][:_SHORT]
    key = {
        "protocol": f"{protocol['name']} {protocol['sha256'][:_SHORT]}",
        "samples": result["samples"],
        "format": "+".join(sorted(result["images"]["formats"])),
        "prompts": prompts,
    }
    weights = weights_of(metric, protocol["features"])
    if weights is not None:
        key["weights"] = f"{weights} {result['weights'][weights]['sha256'][:_SHORT]}"
    if needs == REFERENCE:
        key["reference"] = result["reference"]["images_sha256"][:_SHORT]
    if needs == TEACHER:
        key["teacher"] = result["teacher"]["sha256"][:_SHORT]
    value = result["metrics"][metric]
    if metric == "kid":
        key["subsets of"] = value["subset_size"]
    if needs == DIVERSITY:
        key["diversity"] = f"{value['prompts']} prompts x {value['seeds']} seeds"
    return key


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one system a row; what was measured differently never shares a column.

    Below it stands, for each column, how it was measured.
    """
    columns: list[tuple[str, dict[str, Any]]] = []
    for metric in METRICS:
        for result in results:
            if metric in result["metrics"] and (metric, comparable(result, metric)) not in columns:
                columns.append((metric, comparable(result, metric)))
    titles = [f"{METRICS[metric].title} ({number})" for number, (metric, _) in enumerate(columns, 1)]
    rows = [["system", "calls", *titles], ["---"] * (len(columns) + 2)]
    for result in results:
        cells = [_cell(result, metric) if _belongs(result, metric, key) else "–" for metric, key in columns]
        calls = (result["drawing"] or {}).get("network_calls", "–")
        rows.append([result["system"] + ("" if result["complete"] else " (incomplete)"), str(calls), *cells])
    notes = [f"({number}) {_words(key)}" for number, (_, key) in enumerate(columns, 1)]
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", *notes])


def _belongs(result: dict[str, Any], metric: str, key: dict[str, Any]) -> bool:
    return metric in result["metrics"] and comparable(result, metric) == key


def _cell(result: dict[str, Any], metric: str) -> str:
    value = result["metrics"][metric]
    if isinstance(value, dict):
        value = value["all"] if metric == "accuracy" else value["mean"]
    return f"{value:.2f}" if metric == "fid" else f"{value:.4f}"


def _words(key: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in key.items())
