"""The page's web server: Starlette and uvicorn, of the extra `play`; they are imported when the page is served.

    GET  /                    the page, one self-contained file
    POST /draw/student        {"prompt", "seed", "x", "y"} -> {"image", "noise", "ms", "notes"}
    POST /draw/teacher        the same; 404 where there is none

Drawings wait for each other. More than `Limits.queue` at once are refused with 503, bodies above 16 KiB with 413, bad
requests with 400, 404 and 415, and what a broken model draws with 500; each answers {"error": one line}. Only JSON is
taken, which no foreign page may send without asking first, and on a loopback address only requests to it or to a
loopback name, so that no foreign name may stand for this machine (DNS rebinding).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import ipaddress
import json
import socket
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

from d2g_jax.play import pad
from d2g_jax.play.studio import Asked, Studio
from d2g_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_MAX_BODY = 16 * 2**10
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one visitor may ask for: characters of a prompt; drawings that are under way or waiting, of all visitors."""

    prompt: int = 1000
    queue: int = 8


def missing() -> list[str]:
    """What of the extra is not installed."""
    return [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises `UserError` for an address that cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise UserError(f"--host={host}: {error.strerror or error}; give an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(f"--host={host} --port={port}: {error.strerror or error}; give another") from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def address(listener: socket.socket) -> str:
    """What to type into a browser on this machine."""
    return f"http://{_host(listener)}:{listener.getsockname()[1]}"


def hosts(listener: socket.socket) -> tuple[str, ...]:
    """Whom a request may name: on a loopback address that one and the usual names of it, else anybody."""
    return tuple(dict.fromkeys((*_LOOPBACK, _host(listener)))) if is_loopback(listener) else ("*",)


def _host(listener: socket.socket) -> str:
    """The address that is listened on, as it stands in a URL."""
    host = listener.getsockname()[0]
    return f"[{host}]" if ":" in host else host


def serve(
    studio: Studio,
    listener: socket.socket,
    limits: Limits,
    prompts: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
) -> None:
    """Answers until SIGINT or SIGTERM, which it then raises again."""
    import uvicorn

    app = application(studio, limits, prompts, words, hosts=hosts(listener))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", ws="none", proxy_headers=False,
        server_header=False, timeout_graceful_shutdown=5,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])


def application(
    studio: Studio,
    limits: Limits,
    prompts: tuple[str, ...] = (),
    words: tuple[str, ...] = (),
    *,
    hosts: tuple[str, ...] = _LOOPBACK,
) -> Starlette:
    """The routes above; `prompts` are offered as examples, the first one is there from the start.

    `words` complete what is typed.

    Requests to other names than `hosts` are refused; "*" stands for any.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    html, under_way = page(studio, limits, prompts, words), 0

    def refuse(status: int, problem: str) -> Response:
        return JSONResponse({"error": problem}, status)

    async def show(request: Request) -> Response:
        return HTMLResponse(html, headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})

    async def draw(request: Request) -> Response:
        nonlocal under_way  # read and written by the event loop's thread alone
        name = request.path_params["system"]
        if name not in studio.systems:
            return refuse(404, f"there is no {name} here")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return refuse(415, "expected Content-Type: application/json")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MAX_BODY:
                return refuse(413, f"a request has at most {_MAX_BODY} bytes")
        try:
            asked = Asked.read(json.loads(body), limits.prompt)
        except (UserError, ValueError, RecursionError) as error:
            return refuse(400, str(error))
        if under_way >= limits.queue:
            return refuse(503, f"{limits.queue} drawings are waiting; try again")
        under_way += 1
        try:
            drawing = await run_in_threadpool(studio.draw, name, asked)
            return JSONResponse(await run_in_threadpool(drawing.to_json))
        except UserError as error:
            return refuse(500, str(error))
        finally:
            under_way -= 1

    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    routes = [Route("/", show), Route("/draw/{system}", draw, methods=["POST"])]
    return Starlette(routes=routes, middleware=[trusted])


def page(studio: Studio, limits: Limits, prompts: tuple[str, ...] = (), words: tuple[str, ...] = ()) -> str:
    """The page for these systems."""
    student, teacher = studio.systems["student"], studio.systems.get("teacher")
    settings: dict[str, Any] = {
        "size": list(studio.size),
        "prompts": [prompt for prompt in prompts if len(prompt) <= limits.prompt],
        "words": list(words),
        "maxPrompt": limits.prompt,
        "seeds": pad.SEEDS,
        "calls": {name: system.programs.network_calls for name, system in studio.systems.items()},
    }
    height, width = studio.size
    facts = {"images": f"{width} x {height}", "device": _device()}
    template = resources.files("d2g_jax.play").joinpath("page.html").read_text("utf-8")
    return Template(template).substitute(
        title=escape(student.title),
        teacher=escape("No teacher" if teacher is None else teacher.title),
        facts="".join(f"<span>{escape(key)} <b>{escape(value)}</b></span>" for key, value in facts.items()),
        settings=json.dumps(settings).replace("<", "\\u003c"),
    )


def _device() -> str:
    import jax

    return jax.devices()[0].device_kind
