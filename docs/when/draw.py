"""The table of docs/when.md on the terminal, and its picture: `python docs/when/draw.py runs/when [docs/when.svg]`."""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from statistics import mean, stdev

WIDTH, HEIGHT, LEFT, BOTTOM = 760, 460, 70, 50


def settings(root: Path) -> list[dict]:
    """Of every setting with students of both losses: name, floor, by seed R of MSE and both distances; by R.

    Of an `ablation.json` of all losses the two are taken; one that has not come to both says so and is left out.
    """
    found = []
    for file in sorted(root.glob("*/ablation.json")):
        result = json.loads(file.read_text())
        figures = {row["name"]: row["figures"] for row in result["rows"]}
        both = [figures[name]["frechet_to_teacher"]["seeds"] for name in ("mse", "e_latent_lpips") if name in figures]
        if len(both) < 2 or not (seeds := both[0].keys() & both[1].keys()):
            print(f"{file}: not both losses yet", file=sys.stderr)
            continue
        far = [[one[seed] for seed in sorted(seeds)] for one in both]
        ratios = [theirs / ours for ours, theirs in zip(*far, strict=True)]
        r = [figures["mse"]["unexplained"]["seeds"][seed] for seed in sorted(seeds)]
        found.append({"name": file.parent.name, "floor": result["floor"], "r": r, "far": far, "ratios": ratios})
    if not found:
        sys.exit(f"{root}: holds no finished setting; make.sh beside this file makes them")
    return sorted(found, key=lambda one: mean(one["r"]))


def spread(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def table(found: list[dict]) -> str:
    lines = ["| setting | R of MSE | MSE | E-LatentLPIPS | ratio | floor |", "| --- | --- | --- | --- | --- | --- |"]
    for one in found:
        far = " | ".join(spread(values, 0) for values in one["far"])
        lines.append(
            f"| {one['name']} | {spread(one['r'], 3)} | {far} | {spread(one['ratios'], 2)} | {one['floor']:.1f} |"
        )
    return "\n".join(lines)


def picture(found: list[dict]) -> str:
    """SVG: a point for each setting, bars from the lowest to the highest seed."""
    right = max(0.1 * math.ceil(10 * max(max(one["r"]) for one in found)), 0.5)
    x = lambda r: LEFT + (WIDTH - LEFT - 20) * r / right  # noqa: E731
    logs = [math.log2(ratio) for one in found for ratio in one["ratios"]]
    low, high = min(-2, math.floor(min(logs))), max(1, math.ceil(max(logs)))  # powers of two
    y = lambda ratio: 20 + (HEIGHT - BOTTOM - 20) * (high - math.log2(ratio)) / (high - low)  # noqa: E731
    text = '<text x="{:.0f}" y="{:.0f}" text-anchor="{}" fill="#333">{}</text>'.format
    line = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}"/>'.format
    parts = []
    for ratio in (2.0**power for power in range(low, high + 1)):
        parts += [line(LEFT, y(ratio), WIDTH - 20, y(ratio), "#333" if ratio == 1 else "#ddd")]
        parts += [text(LEFT - 8, y(ratio) + 4, "end", f"{ratio:g}")]
    for tenth in range(round(10 * right) + 1):
        parts += [text(x(tenth / 10), HEIGHT - BOTTOM + 20, "middle", f"{tenth / 10:g}")]
    parts += [text(x(right / 2), HEIGHT - 8, "middle", "R: what squared error leaves unexplained")]
    parts += [text(LEFT, 14, "start", "distance of E-LatentLPIPS over that of squared error (below 1 it pays)")]
    for one in found:
        at, r, ratios = mean(one["r"]), one["r"], one["ratios"]
        parts += [line(x(at), y(min(ratios)), x(at), y(max(ratios)), "#c33")]
        parts += [line(x(min(r)), y(mean(ratios)), x(max(r)), y(mean(ratios)), "#c33")]
        parts += [f'<circle cx="{x(at):.1f}" cy="{y(mean(ratios)):.1f}" r="4" fill="#c33"/>']
        side, anchor = (8, "start") if x(at) < 0.75 * WIDTH else (-8, "end")
        parts += [text(x(at) + side, y(mean(ratios)) - 6, anchor, escape(one["name"]))]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
    style = 'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    return head + style + "".join(parts) + "</svg>\n"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    finished = settings(Path(sys.argv[1]))
    print(table(finished))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(picture(finished))
