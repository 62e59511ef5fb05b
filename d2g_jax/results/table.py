"""Results side by side: a column holds only numbers that were measured the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from d2g_jax.results.metrics import DIVERSITY, FRECHET, KERNEL, METRICS, REFERENCE, TEACHER, weights_of

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
    if METRICS[metric].distance == KERNEL:
        key["subsets of"] = value["subset_size"]
    if needs == DIVERSITY:
        key["diversity"] = f"{value['prompts']} prompts x {value['seeds']} seeds"
    return key


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric, how its numbers were measured (`comparable`), and of each result its number; None where it has none."""

    metric: str
    how: dict[str, Any]
    values: list[float | None]

    @property
    def title(self) -> str:
        return METRICS[self.metric].title

    def __str__(self) -> str:
        """How it was measured, in words."""
        return ", ".join(f"{name} {value}" for name, value in self.how.items())


def columns(results: Sequence[dict[str, Any]]) -> list[Column]:
    """All numbers of several results: what was measured differently never shares a column."""
    found = []
    for metric in METRICS:
        hows = [comparable(result, metric) if metric in result["metrics"] else None for result in results]
        for how in (how for i, how in enumerate(hows) if how is not None and how not in hows[:i]):
            values = [
                _number(result, metric) if own == how else None for result, own in zip(results, hows, strict=True)
            ]
            found.append(Column(metric, how, values))
    return found


def system(result: dict[str, Any]) -> str:
    """What a table calls it."""
    return result["system"] + ("" if result["complete"] else " (incomplete)")


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of `columns`, one system a row; below it stands, for each column, how it was measured."""
    found = columns(results)
    rows = [["system", "calls", *(f"{column.title} ({number})" for number, column in enumerate(found, 1))]]
    for i, result in enumerate(results):
        calls = (result["drawing"] or {}).get("network_calls", "–")
        rows.append([system(result), str(calls), *(_cell(column, i) for column in found)])
    return "\n".join([markdown(rows), "", *(f"({number}) {column}" for number, column in enumerate(found, 1))])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them headings, as a table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ("---",) * len(rows[0]), *rows[1:]])


def _number(result: dict[str, Any], metric: str) -> float:
    value = result["metrics"][metric]
    return value["all" if metric == "accuracy" else "mean"] if isinstance(value, dict) else value


def _cell(column: Column, row: int) -> str:
    value = column.values[row]
    return "–" if value is None else f"{value:.2f}" if METRICS[column.metric].distance == FRECHET else f"{value:.4f}"
