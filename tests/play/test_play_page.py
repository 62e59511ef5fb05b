"""`d2g play` as a command, as a server, and in a real browser."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import chromium
import numpy as np
import pytest

from d2g_jax.__main__ import main
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.play import server
from d2g_jax.play.studio import Asked, Drawing, Studio, System
from d2g_jax.runtime.errors import UserError

TEACHER = WEIGHTS / "pipeline"
FLAGS = ("--steps=10", "--guidance=2", "--prompt=the digit 3, bold strokes", "--prompt=the digit 4")

needs_extra = pytest.mark.skipif(server.missing() != [], reason="needs the extra play: starlette and uvicorn")
needs_browser = pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium")


def one_line(capsys, *arguments):
    assert main(["play", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("d2g: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("flag", ["--port=70000", "--queue=0", "--max-prompt=0", "--max-prompt=5000"])
def test_flags_out_of_range(flag, capsys):
    assert flag in one_line(capsys, "--model=nowhere", flag)


def test_an_example_longer_than_prompts_may_be(capsys):
    assert "--max-prompt=5" in one_line(capsys, "--model=nowhere", "--max-prompt=5", "--prompt=a long one")


def test_without_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(server, "missing", lambda: ["uvicorn"])
    assert "pip install 'd2g_jax[play]'" in one_line(capsys, "--model=nowhere")


@needs_extra
def test_a_port_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port}" in one_line(capsys, f"--model={TEACHER}", f"--port={port}")


@needs_extra
def test_no_such_host_and_no_such_model(capsys, tmp_path):
    assert "--host=192.0.2.1" in one_line(capsys, f"--model={TEACHER}", "--host=192.0.2.1", "--port=0")
    assert "nowhere" in one_line(capsys, f"--model={tmp_path}/nowhere", "--port=0")


class Still(Studio):
    """A studio without networks, whose drawings wait until they are let go."""

    def __init__(self):
        self.go, self.asked = threading.Event(), []
        calls = type("Programs", (), {"network_calls": 1})
        self.systems = {"student": System("<b>still</b>", None, calls)}
        self.shape, self.size = (4, 2, 2), (16, 16)

    def draw(self, name, asked):
        self.asked.append(asked)
        assert self.go.wait(chromium.PATIENCE)
        if asked.prompt == "broken":
            raise UserError("still: drew values that are not finite")
        return Drawing(np.zeros((16, 16, 3), np.uint8), np.zeros((4, 2, 2), np.float32), {"text": 0.0, "unet": 1.5})


@pytest.fixture
def served(request):
    """(address, studio) of a server in a thread, on the address of the test's parameter."""
    import uvicorn

    studio, listener = Still(), server.listen(getattr(request, "param", "127.0.0.1"), 0)
    limits, hosts = server.Limits(prompt=20, queue=2), server.hosts(listener)
    app = server.application(studio, limits, ("</script><b>",), hosts=hosts)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield server.address(listener), studio
    studio.go.set()
    running.should_exit = True
    thread.join(chromium.PATIENCE)
    listener.close()


def ask(address, body, system="student", **headers):
    """(status, JSON) of a request as the page sends them."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(f"{address}/draw/{system}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=chromium.PATIENCE) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


GOOD = {"prompt": "the digit 3", "seed": 1, "x": 0.5, "y": -0.5}


@needs_extra
@pytest.mark.parametrize(
    ("status", "body", "options"),
    [
        (400, {**GOOD, "prompt": "a" * 21}, {}),
        (400, {**GOOD, "height": 4096}, {}),
        (400, b"{", {}),
        (400, b"[" * 10000, {}),
        (400, b"\xff", {}),
        (413, b"x" * 20000, {}),
        (404, GOOD, {"system": "teacher"}),
        (415, GOOD, {"Content-Type": "text/plain"}),
        (400, GOOD, {"Host": "evil.example"}),
    ],
)
def test_refused(served, status, body, options):
    address, studio = served
    studio.go.set()
    answered, error = ask(address, body, **options)
    assert answered == status
    assert "Host" in options or set(error) == {"error"}
    assert studio.asked == []
    assert ask(address, GOOD)[0] == 200


@needs_extra
@pytest.mark.parametrize("served", ["127.0.0.1", "127.0.0.2"], indirect=True)
def test_the_address_that_is_printed_answers(served):
    address, studio = served
    studio.go.set()
    assert ask(address, GOOD)[0] == 200
    assert ask(address, GOOD, Host="localhost")[0] == 200
    assert ask(address, GOOD, Host="127.0.0.3")[0] == 400


@needs_extra
def test_a_drawing_that_is_not_finite_is_an_answer(served):
    address, studio = served
    studio.go.set()
    assert ask(address, {**GOOD, "prompt": "broken"}) == (500, {"error": "still: drew values that are not finite"})
    assert ask(address, GOOD)[0] == 200


@needs_extra
def test_more_drawings_than_may_wait(served):
    address, studio = served
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(address, GOOD)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(studio.asked) < 2:
        threading.Event().wait(0.01)
    status, error = ask(address, GOOD)
    assert (status, error["error"]) == (503, "2 drawings are waiting; try again")
    studio.go.set()
    for thread in threads:
        thread.join(chromium.PATIENCE)
    assert answers == [200, 200]
    assert ask(address, GOOD)[0] == 200
    assert studio.asked[0] == Asked("the digit 3", 1, 0.5, -0.5)


@needs_extra
def test_names_and_prompts_stay_text_and_nothing_is_loaded(served):
    with urllib.request.urlopen(served[0], timeout=chromium.PATIENCE) as response:
        html = response.read().decode()
    assert "&lt;b&gt;still" in html
    assert html.count("</script>") == 2
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", html)
    assert "default-src 'none'; connect-src 'self'" in html


@needs_extra
def test_addresses():
    with server.listen("localhost", 0) as listener:
        assert server.is_loopback(listener)
    with server.listen("127.0.0.2", 0) as listener:
        assert server.is_loopback(listener)
        assert server.hosts(listener) == ("localhost", "127.0.0.1", "[::1]", "127.0.0.2")
    with server.listen("0.0.0.0", 0) as listener:
        assert server.hosts(listener) == ("*",)
        assert not server.is_loopback(listener)
        assert re.fullmatch(r"http://0\.0\.0\.0:\d+", server.address(listener))


@pytest.fixture
def command():
    """(process, address) of `d2g play` on the digits teacher, ended by Ctrl-C."""
    started = [sys.executable, "-m", "d2g_jax", "play", f"--model={TEACHER}", "--port=0", *FLAGS]
    process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), process.communicate(timeout=chromium.PATIENCE)
    yield process, address
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=chromium.PATIENCE)
    assert process.returncode == 0, said
    assert "student: 2 network calls an image, ready after" in said
    assert "teacher: 20 network calls an image, ready after" in said
    assert said.rstrip().endswith("d2g: ended")


SHOWN = "document.querySelector('#student img').src"
BOX = "(box => [box.left, box.top, box.width])(document.getElementById('pad').getBoundingClientRect())"


def times(browser, system):
    """Milliseconds by stage, as the page shows them."""
    figures = f"[...document.querySelectorAll('#{system} .figure')].map((f) => [f.dataset.stage, Number(f.dataset.ms)])"
    return dict(browser.run(figures))


def after(browser, before):
    """The image that follows `before`, when everything asked for has come."""
    browser.until(f"{SHOWN} != {json.dumps(before)} && !drawing && drawn == wanted")
    return browser.run(SHOWN)


@needs_extra
@needs_browser
def test_in_a_browser(command, tmp_path):
    """Types, drags, uses the keys, asks for the teacher, at two widths; no request leaves for anywhere else."""
    _, address = command
    with chromium.Chromium(tmp_path) as browser:
        browser.open(address)
        browser.until("document.querySelector('#student img')?.naturalWidth == 64")
        assert browser.run("document.getElementById('prompt').value") == "the digit 3, bold strokes"
        first = browser.run(SHOWN)

        browser.run("document.getElementById('prompt').focus(), document.getElementById('prompt').select()")
        browser.type("a thin handwritten zero")
        typed = after(browser, first)
        student = times(browser, "student")
        assert set(student) == {"text", "unet", "vae", "all"}
        assert min(student.values()) > 0
        assert browser.run("document.querySelector('#student .all.figure').textContent").endswith(" ms")

        left, top, side = browser.run(BOX)
        place = lambda x, y: (left + (x + 1) / 2 * side, top + (y + 1) / 2 * side)  # noqa: E731
        browser.mouse("mousePressed", *place(0, 0))
        for i in range(1, 11):
            browser.mouse("mouseMoved", *place(0.06 * i, -0.04 * i))
        browser.mouse("mouseReleased", *place(0.6, -0.4), buttons=0)
        dragged = after(browser, typed)
        browser.mouse("mouseMoved", *place(-0.9, -0.9), buttons=0)  # let go of: nothing follows
        assert browser.run("[state.x.toFixed(1), state.y.toFixed(1)]") == ["0.6", "-0.4"]
        assert browser.run("Math.round(parseFloat(document.getElementById('marker').style.left))") in (79, 80, 81)
        assert browser.run("document.querySelector('#student [data-stage=text]').textContent") == "cached"
        browser.run("document.getElementById('prompt').focus(), document.getElementById('prompt').select()")
        browser.type("a thin handwritten zer")
        assert browser.run("[...document.querySelectorAll('#words button')].map((b) => b.textContent)") == ["zero"]
        browser.press("Tab", "\t")
        assert browser.run("document.getElementById('prompt').value") == "a thin handwritten zero "
        assert "slanted" in browser.run("document.getElementById('words').textContent")
        browser.run("document.getElementById('pad').focus()")
        assert browser.run("document.getElementById('words').hidden")
        browser.press("Home")
        assert after(browser, dragged) == typed

        browser.run("document.getElementById('prompt').focus()")
        browser.press("Enter", "\r")
        browser.until("document.querySelector('#teacher img').naturalWidth == 64 && !teacherBusy")
        assert browser.run("document.querySelector('#teacher img').src") != typed
        assert times(browser, "teacher")["unet"] > 0
        assert browser.run("document.querySelector('#teacher .veil').hidden")
        browser.run("document.getElementById('fresh').click()")
        fresh = after(browser, typed)
        assert "earlier" in browser.run("document.querySelector('#teacher .veil').textContent")
        assert not browser.run("document.querySelector('#teacher .veil').hidden")

        browser.until("location.hash.includes('seed=' + state.seed)")
        there = browser.run("location.href")
        browser.open("about:blank")
        browser.open(there)  # the address keeps prompt, seed and place
        browser.until("document.querySelector('#student img')?.naturalWidth == 64")
        assert browser.run(SHOWN) == fresh

        for width in (390, 1280):
            browser.resize(width, 844, phone=width == 390)
            assert browser.run("document.documentElement.scrollWidth") <= width
        asked_for = browser.requests()
        assert f"{address}/draw/teacher" in asked_for
        assert [url for url in asked_for if not url.startswith((address, "about:"))] == []
        assert [event for event in browser.events if event.get("method") == "Runtime.exceptionThrown"] == []
