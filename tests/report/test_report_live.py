"""A page that is kept fresh while its job runs: what status.json says, how often, and how it ends."""

import json
import os

import pytest

from d2g_jax.report import LivePage, finish, live, write_report
from d2g_jax.report.status import Status, peak_memory, read_status, write_status
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.interrupt import Terminated


def page_of(folder):
    return (folder / "report.html").read_text()


def test_a_running_job_says_stage_share_and_memory(tmp_path):
    with LivePage(tmp_path, 320, "images") as page:
        page.update("training", 80)
        status = read_status(tmp_path)
        assert (status.state, status.stage, status.done, status.total, status.share) == (
            "running",
            "training",
            80,
            320,
            0.25,
        )
        assert 0.01 < status.memory["host"] < 500
        text = page_of(tmp_path)
        assert 'class="state running">running, 25%<' in text
        assert "Training · 80 of 320 images" in text
        assert "Memory" in text
    path = finish(tmp_path, 320, "images")
    assert path == tmp_path / "report.html"
    assert 'class="state finished">finished<' in path.read_text()
    assert "refresh" not in path.read_text().split("<body")[0]


def test_writing_takes_a_fiftieth_of_the_time_at_most(tmp_path, monkeypatch):
    now, written = [100.0], []

    def write(workdir):
        now[0] += 2.0  # a slow disk
        written.append(now[0])

    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(live, "write_report", write)
    with LivePage(tmp_path, 1000, "images") as page:
        for images in range(300):
            page.update("training", images)
            now[0] += 1.0
        assert written == [102.0, 204.0, 306.0]
        page.update("drawing", 300, at_once=True)
        assert len(written) == 4


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(UserError("the update of step 3: loss is not\nfinite"), "the update of step 3: loss is not finite"),
     (KeyboardInterrupt(), "interrupted"),
     (Terminated(), "terminated by SIGTERM or the cloud"),
     (ValueError("shape\n(3,)"), "ValueError: shape (3,)")],
)  # fmt: skip
def test_a_job_that_stops_says_why(tmp_path, failure, reason):
    def job():
        with LivePage(tmp_path, 320, "images") as page:
            page.update("training", 64)
            raise failure

    with pytest.raises(type(failure)):
        job()
    assert (read_status(tmp_path).state, read_status(tmp_path).stage) == ("stopped", reason)
    assert f"Stopped after 64 of 320 images: {reason}." in page_of(tmp_path)
    assert 'class="state stopped"' in page_of(tmp_path)


def test_a_page_that_cannot_be_written_stops_nothing_and_is_told_once(tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    with LivePage(tmp_path, 320, "images") as page:
        for images in (8, 16):
            page.update("training", images, at_once=True)
    said = capsys.readouterr().err
    assert said.count("the run goes on without its page") == 1
    assert "report.html" in said
    with pytest.raises(UserError):
        finish(tmp_path, 320, "images")


def test_no_error_of_the_page_ends_a_job_but_a_signal_does(tmp_path, capsys, monkeypatch):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "a.json").write_text('{"format": 1, "protocol": "x", "metrics": {"kid": 3}}')
    with LivePage(tmp_path, 320, "images") as page:
        page.update("training", 8, at_once=True)
    assert "a.json: system is missing; evaluate again; the run goes on" in capsys.readouterr().err

    def fail(workdir):
        raise failure

    monkeypatch.setattr(live, "write_report", fail)
    failure = OverflowError("int too large")
    with LivePage(tmp_path, 320, "images") as page:
        for images in (8, 16):
            page.update("training", images, at_once=True)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "OverflowError: int too large; the run goes on without its page" in said
    failure = Terminated()
    with pytest.raises(Terminated):
        LivePage(tmp_path, 320, "images").update("training", 8, at_once=True)


def test_a_finished_job_given_again_keeps_its_status(tmp_path):
    write_status(tmp_path, Status("finished", "", 320, 320))
    data = json.loads((tmp_path / "status.json").read_text())
    data["memory"] = {"host": 77.0}
    (tmp_path / "status.json").write_text(json.dumps(data))
    finish(tmp_path, 320, "images")
    assert read_status(tmp_path).memory == {"host": 77.0}
    assert "77 GiB" in page_of(tmp_path)
    finish(tmp_path, 640, "images")  # went on
    assert read_status(tmp_path).memory["host"] < 77.0


@pytest.mark.parametrize(
    "change", [{"state": "asleep"}, {"done": -1}, {"written": "yesterday"}, {"memory": {"host": -1}}, {"who": 1}]
)
def test_a_wrong_status_is_refused_in_one_line(tmp_path, change):
    write_status(tmp_path, Status("running", "training", 1, 2))
    data = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(UserError, match=r"status\.json: not a status") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_memory_is_that_of_this_process():
    block = os.urandom(64 << 20)
    assert peak_memory()["host"] >= 64 / 1024
    del block
