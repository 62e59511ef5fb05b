"""Lines of progress where there is no terminal."""

import pytest

from d2g_jax.runtime import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds; the test moves them."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    with progress.Progress("train", 6, "img", done=2) as shown:
        for _ in range(4):
            clock[0] += 8.0
            shown.advance(1, note="loss 1")
    assert capsys.readouterr().err.splitlines() == [
        "train: 4/6 img, 0.1 img/s, 16 s left, loss 1",
        "train: 6/6 img, 0.1 img/s, 0 s left, loss 1",
    ]


def test_the_rate_is_that_between_the_first_batch_and_the_last(clock, capsys):
    with progress.Progress("pairs", 12, "img", beginning="compiling") as shown:
        for seconds in (100.0, 16.0, 16.0):
            clock[0] += seconds
            shown.advance(4)
        clock[0] += 50.0  # pictures, a checkpoint
    assert capsys.readouterr().err.splitlines() == [
        "pairs: 0/12 img, compiling",
        "pairs: 4/12 img",
        "pairs: 8/12 img, 0.2 img/s, 16 s left",
        "pairs: 12/12 img, 0.2 img/s, 0 s left",
    ]


def test_a_job_that_fails_or_is_divided(clock, capsys):
    with pytest.raises(ValueError, match="broken"), progress.Progress("pairs", 3, "shards") as shown:
        raise ValueError("broken")
    assert capsys.readouterr().err == ""
    with progress.Progress("pairs", 3, "shards") as shown:
        shown.leave_out(2)
        shown.say("taken by another")
        clock[0] += 20.0
        shown.advance()
    assert capsys.readouterr().err.splitlines() == ["taken by another", "pairs: 1/1 shards, 0.1 shards/s, 0 s left"]


def test_what_an_earlier_run_did_is_no_part_of_the_rate(clock, capsys):
    with progress.Progress("draw", 16, "image", beginning="compiling") as shown:
        shown.advance(4, made=False)
        for seconds in (100.0, 16.0, 16.0):
            clock[0] += seconds
            shown.advance(4)
    with progress.Progress("draw", 4, "image", beginning="compiling") as shown:
        shown.advance(4, made=False)
    assert capsys.readouterr().err.splitlines() == [
        "draw: 0/16 image, compiling",
        "draw: 8/16 image",
        "draw: 12/16 image, 0.2 image/s, 16 s left",
        "draw: 16/16 image, 0.2 image/s, 0 s left",
        "draw: 0/4 image, compiling",
        "draw: 4/4 image",
    ]


def test_a_single_batch_that_compiles_first_has_no_rate(clock, capsys):
    for beginning in ("compiling", ""):
        with progress.Progress("draw", 4, "image", beginning=beginning) as shown:
            clock[0] += 16.0
            shown.advance(4)
    assert capsys.readouterr().err.splitlines() == [
        "draw: 0/4 image, compiling",
        "draw: 4/4 image",
        "draw: 4/4 image, 0.2 image/s, 0 s left",
    ]


def test_a_bar_does_not_count_compilation(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress("pairs", 12, "img", beginning="compiling") as shown:
        for seconds in (36_618.0, 16.0, 16.0):
            clock[0] += seconds
            shown.advance(4)
            shown._bar.refresh()
    bars = capsys.readouterr().err.split("\r")
    assert any("0/12 img" in bar and "compiling" in bar for bar in bars)
    assert all("left" not in bar and "compiling" not in bar for bar in bars if " 4/12 img" in bar)
    assert "0.2 img/s, 16 s left]" in next(bar for bar in bars if " 8/12 img" in bar)
