"""The table of docs/when.md on the terminal, and its picture: `python docs/when/draw.py runs/when [docs/when.svg]`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev

WIDTH, HEIGHT, LEFT, BOTTOM = 760, 460, 70, 50
LOW, HIGH = 0.25, 4.0
"""Of the ratio's axis, which is logarithmic."""


def settings(root: Path) -> list[dict]:
    """Of every finished setting: name, floor, and by seed R of MSE and both distances; by R."""
    found = []
    for file in sorted(root.glob("*/ablation.json")):
        result = json.loads(file.read_text())
        mse, perceptual = (row["figures"] for row in result["rows"])
        far = [list(figures["frechet_to_teacher"]["seeds"].values()) for figures in (mse, perceptual)]
        ratios = [theirs / ours for ours, theirs in zip(*far, strict=True)]
        r = list(mse["unexplained"]["seeds"].values())
        found.append({"name": file.parent.name, "floor": result["floor"], "r": r, "far": far, "ratios": ratios})
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
    y = lambda ratio: 20 + (HEIGHT - BOTTOM - 20) * math.log(HIGH / ratio) / math.log(HIGH / LOW)  # noqa: E731
    text = '<text x="{:.0f}" y="{:.0f}" text-anchor="{}" fill="#333">{}</text>'.format
    line = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}"/>'.format
    parts = []
    for ratio in (0.25, 0.5, 1, 2, 4):
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
        parts += [text(x(at) + 8, y(mean(ratios)) - 6, "start", one["name"])]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
    style = 'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
    return head + style + "".join(parts) + "</svg>\n"


if __name__ == "__main__":
    finished = settings(Path(sys.argv[1]))
    print(table(finished))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(picture(finished))
