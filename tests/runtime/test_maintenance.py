"""Notices of the metadata server, from a server of our own."""

import http.server
import threading
import time
from typing import ClassVar

import pytest

from d2g_jax.runtime import interrupt, maintenance


class Server(http.server.BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, str]]

    def do_GET(self):
        assert self.headers["Metadata-Flavor"] == "Google"
        answer = self.answers[self.path.removeprefix("/computeMetadata/v1/instance/")]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def answers(monkeypatch):
    """What the server says, which a test may change."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv(maintenance.HOST_VARIABLE, f"127.0.0.1:{server.server_port}")
        monkeypatch.setattr(Server, "answers", {"maintenance-event": "NONE", "preempted": "FALSE"}, raising=False)
        yield Server.answers
        server.shutdown()
        thread.join()


def wait_for(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("key", "value"), [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")]
)
def test_a_notice_stops_the_run_like_sigterm(answers, capsys, key, value):
    with interrupt.StopRequests() as requests, maintenance.maintenance_notices(requests.terminate, every=0.01):
        time.sleep(0.1)
        assert not requests.stop
        answers[key] = value
        wait_for(lambda: requests.stop)
        with pytest.raises(interrupt.Terminated):
            requests.leave()
    assert capsys.readouterr().err == f"d2g: saving after this step ({key} {value})\n"


@pytest.mark.parametrize("there", [True, False])
def test_a_server_that_fails_is_told_once(there, answers, caplog, monkeypatch):
    if there:
        monkeypatch.setattr(Server, "do_GET", lambda self: self.wfile.write(b"no HTTP\r\n\r\n"))
    else:
        monkeypatch.setenv(maintenance.HOST_VARIABLE, "127.0.0.1:1")
    told = []
    with maintenance.maintenance_notices(told.append, every=0.01):
        wait_for(lambda: caplog.records)
        time.sleep(0.1)
    assert [record.message.split(":")[0] for record in caplog.records] == ["no maintenance notices"]
    assert told == []


def test_elsewhere_nobody_is_asked(monkeypatch):
    monkeypatch.delenv(maintenance.HOST_VARIABLE, raising=False)
    before = threading.active_count()
    with maintenance.maintenance_notices(lambda text: None):
        assert threading.active_count() == before
