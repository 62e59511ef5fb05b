"""The command of docs/healthy.md that draws a run's curves: it runs, and what it writes is a picture with the bands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from d2g_jax.report import health

SVG = "{http://www.w3.org/2000/svg}"
ROOT = Path(__file__).resolve().parents[2]


def script():
    text = (ROOT / "docs" / "healthy.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^python - runs/digits healthy\.svg <<'END'\n(.+?)^END$", text, re.DOTALL | re.MULTILINE)
    return found


def test_the_curves_of_a_run_become_a_picture(tmp_path):
    lines = [
        {"images": 128 * i, "step": i, "loss_adversarial": 0.1, "loss_regression": 1 / i}
        | {band.metric: max(band.low, 0.0) + 0.01 * i for band in health.BANDS}
        for i in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out = tmp_path / "healthy.svg"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-", tmp_path, out], input=script(), text=True, check=True, env=environment)
    picture = ElementTree.parse(out).getroot()
    titles = [text.text for text in picture.findall(f"{SVG}text")]
    assert titles == [*(band.metric for band in health.BANDS), "loss_adversarial", "loss_regression"]
    charts = picture.findall(f"{SVG}svg")
    assert len(charts) == len(titles)
    assert all(chart.findall(f".//{SVG}polyline") for chart in charts)
    assert sum(len(chart.findall(f"{SVG}rect")) for chart in charts) == len(health.BANDS)
