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
