"""The page: which sections a run has, in which order, and the one file that they end in.

What a section says is found in the modules beside this one; how it looks stands in sections.html and page.html.
"""

from __future__ import annotations

from pathlib import Path

import jinja2

from d2g_jax.report import curves, measured, overview, pictures
from d2g_jax.report.alarms import alarms
from d2g_jax.report.charts import format_number
from d2g_jax.report.inputs import Inputs, read_inputs
from d2g_jax.report.status import FINISHED, RUNNING, Status
from d2g_jax.report.values import label
from d2g_jax.runtime.atomic import write_bytes
from d2g_jax.runtime.errors import UserError

_REFRESH = 30  # seconds after which an open page of a running job loads itself again
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("d2g_jax", "report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"number": format_number, "label": label}
_TEMPLATES.globals["embedded"] = pictures.embedded


def write_report(workdir: Path) -> Path:
    """Write `report.html` from what the workdir holds, and return its path.

    workdir: a folder with any of the files that `inputs.read_inputs` reads. What is absent leaves its section out. The
    page is one file: it loads nothing.
    Raises UserError when the folder is missing, has none of these, holds a broken one, or cannot be written.
    """
    workdir = Path(workdir)
    path = workdir / "report.html"
    try:
        inputs = read_inputs(workdir)
        # Jobs without status.json write lines while they run and a result at their end; evaluations alone never run.
        at_work = bool(inputs.metrics.runs) and inputs.result is None
        now = inputs.status or Status(RUNNING if at_work else FINISHED)
        # JSON can say half a character, which UTF-8 cannot: a question mark stands for it.
        write_bytes(path, _page(inputs, now).encode("utf-8", errors="replace"))
    except OSError as error:
        problem = f"{path}: cannot be made ({error.strerror or error})"
        raise UserError(f"{problem}; make the workdir's files readable and the folder writable") from error
    except (OverflowError, RecursionError) as error:
        problem = f"{path}: cannot be made, a file there has a number too large or is nested too deep ({error})"
        raise UserError(f"{problem}; correct or remove that file") from error
    return path


def _page(inputs: Inputs, now: Status) -> str:
    made = [
        ("samples", "Side by side", pictures.comparison(inputs)),
        ("measured", "Measured", measured.measured(inputs)),
        ("evaluated", "Evaluated", measured.evaluated(inputs)),
        ("alarms", "Alarms", alarms(inputs)),
        ("curves", "Curves", curves.curves(inputs)),
        ("time", "Samples over time", pictures.timelines(inputs)),
        ("walks", "Latent walks", inputs.galleries),
        ("beside", "Best and worst beside the teacher", pictures.beside(inputs)),
        ("nearest", "Nearest training pairs", pictures.neighbours(inputs)),
        ("speed", "Speed and memory", curves.speed(inputs)),
        ("settings", "Settings", overview.settings(inputs)),
    ]
    return _TEMPLATES.get_template("page.html").render(
        title=inputs.workdir.resolve().name,
        refresh=_REFRESH if now.state == RUNNING else 0,
        patience=overview.patience(inputs),
        now=now,
        state=overview.state(inputs, now),
        progress=overview.progress(now),
        written=overview.written(now),
        environment=overview.environment(inputs),
        tiles=overview.tiles(inputs),
        present=[section for section in made if section[2]],
        notes=_notes(inputs),
    )


def _notes(inputs: Inputs) -> list[str]:
    metrics = inputs.metrics
    notes = []
    if metrics.broken:
        lines = "line is" if metrics.broken == 1 else "lines are"
        tail = "; the last line is one of them, as a killed run leaves it" if metrics.broken_tail else ""
        notes.append(f"metrics.jsonl: {metrics.broken} {lines} not whole and left out{tail}.")
    if metrics.replaced:
        lines = "line was" if metrics.replaced == 1 else "lines were"
        count = format_number(metrics.replaced)
        notes.append(f"metrics.jsonl: {count} {lines} written again after a resume; the later is shown.")
    return [*notes, "This page is one file: it loads nothing and sends nothing."]
