"""What a run draws once, at its end: walks, its images' nearest training pairs, the best and worst beside the teacher.

All noise here is held out: that of pairs that were not trained on, and of record ids behind the last pair's.
`samples/gallery.json` says what each file shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

from d2g_jax import records
from d2g_jax.runtime import atomic
from d2g_jax.runtime.grid import save_png
from d2g_jax.runtime.processes import is_first
from d2g_jax.train.painter import Mix, Painter, Pictures, Record

STEPS = 8  # pictures of a walk, its ends included
QUERIES = 8  # images whose nearest pairs are looked for
NEIGHBOURS = 3
EXTREMES = 4  # pairs of student and teacher that are farthest apart, and as many that are nearest
SEARCHED = 4096  # pairs that are looked at, evenly spread: 134 MB of latents to read for Stable Diffusion 1.5
_CHUNK, _READERS = 256, 16
SAMPLES, FILE = "samples", "gallery.json"


class Nearest(NamedTuple):
    """The nearest of a bank for each query, nearest first: ids (N, K) and root mean square differences (N, K)."""

    ids: np.ndarray
    distances: np.ndarray


def make_gallery(
    painter: Painter,
    params: Any,
    source: records.PairSource | records.SkippingSource,
    workdir: Path,
    images: int,
    kept: Sequence[int] = (),
) -> Path | None:
    """Draws with `params`, the student after `images` images, and writes samples/gallery.json and what it names.

    `kept` are the ids of pairs that were not trained on; none is looked for among them. All processes draw, the first
    one writes. Returns None where there are too few pairs for a walk.
    """
    if len(source) < 2:
        return None
    own = _with_prompts(source)
    start, end = distant_prompts([str(own[i]["prompt"]) for i in range(min(painter.count, len(own)))])
    ends = [held_out(own, start, 0), held_out(own, end, 0), held_out(own, start, 1)]
    queries = [held_out(own, i, i) for i in range(min(QUERIES, len(own)))]
    wanted = [*_walk(0, 1, "text"), *_walk(0, 2, "noise"), *_alone(len(ends), queries)]
    drawn = _draw(painter, params, [*ends, *queries], wanted)
    trained = records.Rest(own, kept)
    found, between_pairs = nearest(drawn.latents[2 * STEPS :], trained)
    neighbours = [own[int(i)] for i in found.ids.ravel()]
    pairs = _draw(painter, params, neighbours, _alone(0, neighbours)).teacher
    beside = _beside_teacher(painter, params, [own[i] for i in kept], workdir) if len(kept) else None
    if not is_first():
        return None
    files = {
        "walk_prompts": _save(workdir, "walk_prompts", drawn.student[:STEPS]),
        "walk_noise": _save(workdir, "walk_noise", drawn.student[STEPS : 2 * STEPS]),
        "held_out": _save(workdir, "held_out", drawn.student[2 * STEPS :]),
        "nearest": _save(workdir, "nearest", pairs),
    }
    prompts = [str(record["prompt"]) for record in ends]
    said = {
        "images": images,
        "walks": [
            {"of": "prompts", "prompts": prompts[:2], "images": files["walk_prompts"]},
            {"of": "noise", "prompts": prompts[:1], "images": files["walk_noise"]},
        ],
        "nearest": {
            "searched": min(SEARCHED, len(trained)),
            "pairs": len(trained),
            "between_pairs": round(between_pairs, 4),
            "rows": _rows(queries, neighbours, found, files),
        },
        "teacher": beside,
    }
    atomic.write_json(workdir / SAMPLES / FILE, said, indent=1, ensure_ascii=False)
    return workdir / SAMPLES / FILE


def _beside_teacher(painter: Painter, params: Any, pairs: Sequence[Record], workdir: Path) -> dict[str, Any] | None:
    """The student's and the teacher's pictures of the pairs that are farthest apart, and of those that are nearest.

    None in all processes but the first.
    """
    drawn = _draw(painter, params, pairs, _alone(0, pairs))
    distances = painter.distances(drawn.latents, np.stack([one["latents"] for one in pairs]))
    order = np.argsort(-distances, kind="stable")
    shown = [*order[:EXTREMES], *order[max(len(order) - EXTREMES, EXTREMES) :]]
    if not is_first():
        return None
    files = {side: _save(workdir, f"beside_{side}", getattr(drawn, side)[shown]) for side in ("student", "teacher")}
    rows = zip(shown, files["student"], files["teacher"], strict=True)
    return {
        "by": painter.distance_name,
        "pairs": len(pairs),
        "mean": round(float(distances.mean()), 4),
        "rows": [
            {"prompt": str(pairs[i]["prompt"]), "distance": round(float(distances[i]), 4), "student": a, "teacher": b}
            for i, a, b in rows
        ],
    }


def is_drawn(workdir: Path, source: records.PairSource | records.SkippingSource, images: int) -> bool:
    """Whether the gallery of a student after `images` images is there, as far as the pairs allow one."""
    if len(source) < 2:
        return True
    try:
        return json.loads((workdir / SAMPLES / FILE).read_text(encoding="utf-8"))["images"] >= images
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not there, or not ours: it is drawn again


def held_out(source: Sequence[Record], caption: int, noise: int) -> Record:
    """Record `caption`, but with the `noise`th noise that no pair has: noise is drawn by record id."""
    return {**source[caption], "id": np.int64(len(source) + noise)}


def distant_prompts(prompts: Sequence[str]) -> tuple[int, int]:
    """The first prompt and the one that shares the fewest words with it, the earliest of several."""
    words = [set(prompt.lower().replace(",", " ").split()) for prompt in prompts]
    share = [len(words[0] & other) / max(len(words[0] | other), 1) for other in words]
    return 0, min(range(len(prompts)), key=lambda i: (i == 0, share[i]))


def nearest(queries: np.ndarray, source: Sequence[Record]) -> tuple[Nearest, float]:
    """The nearest pairs to latents (N, C, h, w), and how far a teacher's own solution is from its nearest other pair.

    The second, a mean over a few pairs, is the scale of such distances; all is found in one pass over the pairs.
    """
    some = [source[i] for i in _spread(len(source), QUERIES)]
    own = np.stack([np.asarray(one["latents"], np.float32) for one in some])
    skip = [-1] * len(queries) + [int(one["id"]) for one in some]
    found = search(np.concatenate([queries, own]), source, NEIGHBOURS, skip=skip)
    scale = float(found.distances[len(queries) :, 0].mean())
    return Nearest(*(part[: len(queries)] for part in found)), scale


def search(queries: np.ndarray, source: Sequence[Record], count: int, skip: Sequence[int] = ()) -> Nearest:
    """The `count` nearest of `SEARCHED` pairs, evenly spread, by root mean square difference of latents (N, C, h, w).

    `skip`: for each query a pair that it must not find, as itself; empty for none.
    """
    flat = queries.reshape(len(queries), -1).astype(np.float64)
    parts = [(ids, cdist(flat, bank.reshape(len(bank), -1)) / np.sqrt(flat.shape[1])) for ids, bank in _bank(source)]
    ids, distances = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    if len(skip):
        distances[ids[None] == np.asarray(skip)[:, None]] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return Nearest(ids[order], np.take_along_axis(distances, order, 1))


def _spread(total: int, count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, total - 1, min(count, total))})


def _bank(source: Sequence[Record]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, float32 latents (M, C, h, w)) of the pairs that are searched, in chunks."""
    ids = _spread(len(source), SEARCHED)
    with ThreadPoolExecutor(_READERS) as readers:  # a bucket answers many at once, each late
        for start in range(0, len(ids), _CHUNK):
            part = list(readers.map(source.__getitem__, ids[start : start + _CHUNK]))
            latents = np.stack([one["latents"] for one in part])
            yield np.array([int(one["id"]) for one in part]), latents.astype(np.float32)


def _with_prompts(source: records.PairSource | records.SkippingSource) -> records.PairSource | records.SkippingSource:
    """The same pairs with their prompts, which training has no use for."""
    fields = ("id", "prompt", "input_ids", "latents", *source.manifest.text_shapes)
    own = records.PairSource(source.folder, fields=fields)
    return records.SkippingSource(own, source.held_out) if isinstance(source, records.SkippingSource) else own


def _walk(left: int, right: int, what: str) -> list[dict[str, Any]]:
    return [{"left": left, "right": right, what: step / (STEPS - 1)} for step in range(STEPS)]


def _alone(first: int, of: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"left": first + i, "right": first + i} for i in range(len(of))]


def _draw(painter: Painter, params: Any, batch: Sequence[Record], wanted: Sequence[dict[str, Any]]) -> Pictures:
    """All pictures `wanted`, each a mix of two places in `batch`, in as many calls as the painter's program needs."""
    parts = []
    size = painter.count - 1  # of pictures; a walk's first needs two places, and every other one more at most
    for start in range(0, len(wanted), size):
        part = wanted[start : start + size]
        places = sorted({place[side] for place in part for side in ("left", "right")})
        at = {place: index for index, place in enumerate(places)}
        mix = Mix(
            np.array([at[one["left"]] for one in part], np.int32),
            np.array([at[one["right"]] for one in part], np.int32),
            np.array([one.get("noise", 0.0) for one in part], np.float32),
            np.array([one.get("text", 0.0) for one in part], np.float32),
        )
        without = [{name: value for name, value in batch[place].items() if name != "prompt"} for place in places]
        parts.append(painter.pictures(params, without, mix))
    return Pictures(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _save(workdir: Path, name: str, images: np.ndarray) -> list[str]:
    """Writes samples/NAME/00.png ...; returns the files' names as seen from the workdir."""
    files = [f"{SAMPLES}/{name}/{i:02d}.png" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        save_png(workdir / file, image)
    return files


def _rows(
    queries: Sequence[Record], neighbours: Sequence[Record], found: Nearest, files: dict[str, list[str]]
) -> list[dict[str, Any]]:
    described = [
        {"id": int(record["id"]), "prompt": str(record["prompt"]), "distance": round(float(distance), 4), "image": file}
        for record, distance, file in zip(neighbours, found.distances.ravel(), files["nearest"], strict=True)
    ]
    count = found.ids.shape[1]
    return [
        {"prompt": str(query["prompt"]), "image": file, "neighbours": described[row * count : (row + 1) * count]}
        for row, (query, file) in enumerate(zip(queries, files["held_out"], strict=True))
    ]
