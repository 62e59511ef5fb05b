"""`d2g bench input`: that both sides read whole batches of the same folder, and what is said of them."""

import json

import pytest

from d2g_jax import records
from d2g_jax.__main__ import main
from d2g_jax.bench.input import Request, make_folder, run
from d2g_jax.runtime.errors import UserError

SMALL = Request(shape="digits", records=68, batch=8, repeats=2)


def test_the_random_folder_is_one_of_pairs(tmp_path):
    source = records.PairSource(make_folder(tmp_path, SMALL))
    assert len(source) == 68
    assert source[5]["latents"].shape == (4, 16, 16)


def test_both_sides_are_measured():
    pytest.importorskip("tensorflow")
    report = run(SMALL)
    ours, theirs = report["rows"]
    assert ours["value"] == pytest.approx(64 / ours["seconds"])
    assert report["bars"][0]["measured"] == pytest.approx(ours["value"] / theirs["value"])
    assert report["bars"][1]["measured"] == pytest.approx(ours["value"] / 190)


def test_bad_requests(tmp_path, capsys):
    for change, message in (
        ({"shape": "sdxl"}, "--shape=sdxl"),
        ({"repeats": 0}, "--repeats=0"),
        ({"records": 5, "batch": 8}, "--batch=8"),
    ):
        with pytest.raises(UserError, match=message):
            run(Request(**change))
    assert main(["bench", "input", f"--pairs={tmp_path}"]) == 2
    assert "not a folder of pairs" in capsys.readouterr().err


def test_the_report_is_written(tmp_path):
    pytest.importorskip("tensorflow")
    out = tmp_path / "input.json"
    command = ["bench", "input", "--shape=digits", "--records=32", "--batch=8", "--repeats=1"]
    assert main([*command, f"--out={out}"]) == 0
    assert json.loads(out.read_text())["bench"] == "input"
