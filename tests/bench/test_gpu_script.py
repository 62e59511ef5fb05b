"""docs/bench/gpu.py, on the day there is a GPU: parts in turn, limits kept, a result after each; rehearsed on a CPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from d2g_jax.commands import bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "docs" / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module
    spec.loader.exec_module(module)
    return module


def test_the_flags_of_every_part_are_those_of_a_bench(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    for part in script.PARTS:
        for flags in (part.flags, part.tiny):
            bench.read(list(flags))  # refuses an unknown flag or setting
    assert sum(part.limit for part in script.PARTS[:2]) <= script.SECONDS  # the most important are always reached


def test_what_is_cut_short_leaves_what_was_done(script, tmp_path, monkeypatch):
    report = {"bars": [{"claim": "fast", "measured": 2.0, "met": True}], "rows": []}
    fake = tmp_path / "d2g_jax" / "__main__.py"
    fake.parent.mkdir()
    (fake.parent / "__init__.py").write_text("")
    fake.write_text(
        "import sys, time\n"
        "out = sys.argv[-1].removeprefix('--out=')\n"
        "if 'slow' in sys.argv: time.sleep(60)\n"
        "if 'bad' in sys.argv: raise SystemExit(2)\n"
        f"open(out, 'w').write({json.dumps(report)!r})\n"
    )
    parts = tuple(script.Part(name, (name,), (name,), 2.0) for name in ("good", "slow", "bad"))
    late = script.Part("late", ("late",), ("late",), 0.5)
    monkeypatch.setattr(script, "PARTS", (*parts, late))
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "LEAST", 1.0)
    monkeypatch.setattr(script, "REHEARSAL", 1)
    monkeypatch.setattr(script, "_device", lambda: "NVIDIA nothing")
    assert script.main([f"--out={tmp_path / 'out'}"]) == 2  # a device without a plan
    assert script.main([f"--out={tmp_path / 'out'}", "--rehearse"]) == 0
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    outcomes = {name: part["outcome"] for name, part in result["parts"].items()}
    assert outcomes == {
        "good": "done", "slow": "cut short", "bad": "failed with exit code 2", "late": "not reached",
    }  # fmt: skip
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "| good | done |" in text
    assert "| fast | 2 | met |" in text
    assert text.count("not reached") == 4  # the bars of the other three, and the last one's end


def test_the_plan_stands_beside_what_was_measured(script):
    rows = [
        {"name": "d x16", "value": 9.0, "peak_bytes": 3 * 2**30},
        {"name": "iteration, e_latent_lpips x16", "value": 25.0, "peak_bytes": 2**30},
    ]
    part = {"outcome": "done", "seconds": 1.0, "report": {"bars": [], "rows": rows}}
    plan = {"images_per_second": 38.3, "bytes": 34 * 2**30}
    result = {"device": "H100", "date": "2026-11-29", "rehearsal": False, "plan": plan, "parts": {"train": part}}
    text = script.table(result)
    assert "| images/s | 38.3 | 25.0 |" in text
    assert "| GiB of the largest step | 34.0 | 3.0 |" in text


@pytest.mark.slow
def test_rehearsed(script, tmp_path):
    """The very benches, with tiny networks."""
    assert script.main([f"--out={tmp_path}", "--rehearse", "--seconds=3000"]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {part["outcome"] for part in result["parts"].values()} == {"done"}
    assert result["rehearsal"]
