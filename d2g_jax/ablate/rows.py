"""The rows of the paper's two ablations, and of one of ours, as plain changes of a config, with what was published."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from d2g_jax.inputs.text import read_json

Changes = tuple[tuple[str, Any], ...]
"""Settings of a config by their dotted keys, and the values that they get."""


@dataclasses.dataclass(frozen=True)
class Published:
    """What the paper's table says of a row, of another model and data set; None where that is not known."""

    fid: float | None = None
    clip: float | None = None
    images_per_second: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One student of an ablation.

    Attributes:
      name: of its folder.
      title: in the table.
      changes: of the config.
    """

    name: str
    title: str
    changes: Changes
    published: Published


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One table.

    Attributes:
      name: as in `d2g ablate NAME`.
      title: over the rows' titles.
      rows: in the paper's order.
      switches: settings that rows turn off, with the value for off; a config that has one off already would make two
        rows the same run.
      published: where the published numbers come from.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    switches: Changes
    published: str


def _changes(settings: dict[str, Any]) -> Changes:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in settings.items())


def _ablation(name: str, table: dict[str, Any]) -> Ablation:
    rows = tuple(
        Row(row["name"], row["title"], _changes(row["changes"]), Published(**row.get("published", {})))
        for row in table["rows"]
    )
    return Ablation(name, table["title"], rows, tuple(table["switches"].items()), table["published"])


_TABLES = read_json(Path(__file__).with_name("rows.json"), "install the package again")
ABLATIONS = {name: _ablation(name, table) for name, table in _TABLES.items()}
"""All of `rows.json`. L1 stands beside perceptual losses alone. The discriminator's chain is cumulative: each row takes
one thing less away than the row before, and the last is the config itself. "lora", of training less, and
"adversary" are ours."""

_LOSSES = ABLATIONS["losses"]
_PAIR = tuple(row for row in _LOSSES.rows if row.name in ("mse", "e_latent_lpips"))
ABLATIONS["perceptual"] = dataclasses.replace(_LOSSES, name="perceptual", rows=_PAIR)
"""The two rows whose ratio is drawn in docs/when.md."""
