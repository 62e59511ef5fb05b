"""The sections of pictures: systems side by side, samples over time, walks, nearest pairs."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from d2g_jax.report.charts import MISSING, format_number
from d2g_jax.report.galleries import Gallery, Walk
from d2g_jax.report.inputs import Inputs
from d2g_jax.runtime.errors import UserError

_LARGEST_PLAIN = 96 * 1024  # bytes; a larger image is embedded as WebP, so that a page of SDXL grids stays sendable
_LONGEST_SIDE = 1024
_PIXELATED_IMAGE, _PIXELATED_SHEET = 128, 512  # px; anything narrower is shown enlarged, with its pixels visible
_MOST_STEPS = 40  # sample grids on one slider
_HOW = {
    "prompts": "the same noise; text embeddings on a straight line",
    "noise": "the same prompt; noise on an arc, which keeps its norm",
}
_ORDER = ("Nearest pair", "Second", "Third", "Fourth", "Fifth")


def comparison(inputs: Inputs) -> str:
    """One row per prompt, one column per system, the same noise along a row."""
    shown = inputs.comparison
    if not shown or not shown.prompts or not shown.names:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in shown.names)
    rows = []
    for index, prompt in enumerate(shown.prompts):
        cells = "".join(
            f"<td>{image_tag(images[index], f'{name}: {prompt}', _PIXELATED_IMAGE)}</td>"
            for name, images in zip(shown.names, shown.images, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(prompt)}</th>{cells}</tr>')
    return (
        '<p class="lead">The same prompt and the same noise along each row.</p><div class="card scroll">'
        f'<table class="compare"><thead><tr><th scope="col">Prompt</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def timelines(inputs: Inputs) -> str:
    """The sample grids that training left behind, on a slider for each run."""
    parts = []
    for run, steps in inputs.timelines.items():
        figures = []
        for seen, path in (kept := _spread(steps, _MOST_STEPS)):
            caption = f"after {format_number(seen)} images"
            figures.append(
                f"<figure>{image_tag(path, caption, _PIXELATED_SHEET)}<figcaption>{caption}</figcaption></figure>"
            )
        title = f'<h3 class="name">{escape(run)}</h3>' if run else ""
        name = escape(f"Images seen by {run}" if run else "Images seen")
        last = len(kept) - 1
        slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{name}">'
        parts.append(
            f'<div class="card timeline">{title}<label>{slider}<output></output></label>{"".join(figures)}</div>'
        )
    lead = (
        "The same noise and prompts every time, rows in turns: the teacher above, the one-step student (its average) "
        "below. Drag the slider, or use the arrow keys, to go back in training."
    )
    return f'<p class="lead">{lead}</p><div class="sheets">{"".join(parts)}</div>' if parts else ""


def walks(inputs: Inputs) -> str:
    """From one prompt to another and from one noise to another, a row of pictures for each run."""
    if not inputs.galleries:
        return ""
    parts = []
    for of, title in (("prompts", "Between two prompts"), ("noise", "Between two noises")):
        rows = []
        for run, gallery in inputs.galleries.items():
            for walk in gallery.walks:
                if walk.of == of:
                    rows.append(_walk_row(run, gallery, walk))
        if rows:
            parts.append(
                f'<h3 class="sub">{title} <small>{_HOW[of]}</small></h3><div class="card walks">{"".join(rows)}</div>'
            )
    lead = (
        "Drawn by the one-step student (its average) when the run was done: one network call for each picture, noise "
        "that no training pair has. The ends are ordinary samples; what lies between was never asked for in training."
    )
    return f'<p class="lead">{lead}</p>{"".join(parts)}' if parts else ""


def neighbours(inputs: Inputs) -> str:
    """Pictures of held-out noise beside the training pairs that they are nearest to, of the last run with a gallery."""
    if not inputs.galleries:
        return ""
    run, gallery = list(inputs.galleries.items())[-1]
    if not gallery.queries:
        return ""
    most = max(len(query.neighbours) for query in gallery.queries)
    head = "".join(f'<th scope="col">{name}</th>' for name in _ORDER[:most])
    rows = []
    for query in gallery.queries:
        cells = "".join(
            f"<td>{image_tag(near.image, near.prompt, _PIXELATED_IMAGE)}"
            f"<small><span>{escape(near.prompt)}</span><b>{format_number(near.distance)}</b></small></td>"
            for near in query.neighbours
        )
        own = image_tag(query.image, f"student: {query.prompt}", _PIXELATED_IMAGE)
        rows.append(f'<tr><th scope="row">{escape(query.prompt)}</th><td class="own">{own}</td>{cells}</tr>')
    who = f"{escape(run)}, " if run else ""
    lead = (
        f"Left, the one-step student ({who}after {format_number(gallery.images)} images): captions of training pairs, "
        f"noise that none has. Right, the nearest of {_searched(gallery)} pairs' own pictures, by the root mean square "
        "difference of the latents, which stands below each. For scale: a pair is on average "
        f"{format_number(gallery.between_pairs)} from its nearest other pair. A copy would be nearer."
    )
    return (
        f'<p class="lead">{lead}</p><div class="card scroll"><table class="compare near"><thead><tr>'
        f'<th scope="col">Prompt</th><th scope="col">Student</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def _searched(gallery: Gallery) -> str:
    some = gallery.searched < gallery.pairs
    return f"{gallery.searched:,} of the {gallery.pairs:,}" if some else f"all {gallery.pairs:,}"


def _walk_row(run: str, gallery: Gallery, walk: Walk) -> str:
    count = len(walk.images)
    pictures = "".join(
        f"<li>{image_tag(path, f'{index + 1} of {count}', _PIXELATED_IMAGE)}</li>"
        for index, path in enumerate(walk.images)
    )
    words = " → ".join(f"“{escape(prompt)}”" for prompt in walk.prompts)
    title = f"<b>{escape(run)}</b> " if run else ""
    return f"<figure><figcaption>{title}{words}</figcaption><ol>{pictures}</ol></figure>"


def _spread(items: list, most: int) -> list:
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def image_tag(path: Path | None, alt: str, pixelated: int) -> str:
    """The picture as part of the page, an en dash for None; enlarged with sharp pixels if narrower than `pixelated`."""
    if path is None:
        return f'<span class="absent">{MISSING}</span>'
    try:
        with Image.open(path) as image:
            image.load()
            size, data, kind = image.size, path.read_bytes(), image.format
            if len(data) > _LARGEST_PLAIN or kind != "PNG":
                buffer = io.BytesIO()
                image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
                image.convert("RGB").save(buffer, format="WEBP", quality=90)
                data, kind = buffer.getvalue(), "WEBP"
    # All are Pillow's of a damaged file.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image; draw it again or remove it") from error
    small = ' class="small"' if size[0] < pixelated else ""
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"
    shape = f'width="{size[0]}" height="{size[1]}"'
    return f'<img{small} src="{source}" {shape} alt="{escape(alt)}">'
