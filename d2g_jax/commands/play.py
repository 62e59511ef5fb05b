"""The flags of `d2g play`, and the job: check, listen, load, compile, serve."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Sequence

from d2g_jax.commands import common
from d2g_jax.inputs.text import as_prompt
from d2g_jax.runtime.errors import UserError


def run(arguments: list[str]) -> int:
    own = read(arguments)
    common.start()
    play(own)
    return 0


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags. Raises `UserError` for bad ones and without the extra, before anything is loaded."""
    parser = common.parser("play")
    common.add_model_flags(parser)
    parser.add_argument("--prompt", action="append", default=[], help="offered on the page; may be given several times")
    page = parser.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    page.add_argument("--port", type=int, default=7860, help="default 7860; 0 for any free one")
    page.add_argument("--max-prompt", type=int, default=1000, help="characters of a prompt; default 1000")
    page.add_argument("--queue", type=int, default=8, help="drawings waiting, of all visitors; default 8")
    teacher = parser.add_argument_group("the teacher beside a student; by default solved as for the student's pairs")
    teacher.add_argument("--teacher", help="pipeline folder or hub id; a workdir knows its own; `none` for none")
    common.add_solution_flags(teacher)
    own = parser.parse_args(arguments)
    for flag, value, least, most in (
        ("port", own.port, 0, 65535),
        ("max-prompt", own.max_prompt, 1, 4000),
        ("queue", own.queue, 1, 1000),
    ):
        if not least <= value <= most:
            raise UserError(f"--{flag}={value}; it must be from {least} to {most}")
    own.prompt = [as_prompt(prompt, "--prompt") for prompt in own.prompt]
    if long := [prompt for prompt in own.prompt if len(prompt) > own.max_prompt]:
        raise UserError(f"--prompt={long[0][:20]}...: longer than --max-prompt={own.max_prompt}")
    from d2g_jax.play import server

    if missing := server.missing():
        raise UserError(f"d2g play needs {' and '.join(missing)}; pip install 'd2g_jax[play]'")
    return own


def play(own: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C, which is how it ends; SIGTERM raises `Terminated`."""
    from d2g_jax.pipeline.words import known_words
    from d2g_jax.play import server
    from d2g_jax.play.opening import Choice, open_studio, own_prompts
    from d2g_jax.runtime.interrupt import terminating

    given = common.given_solution(own)
    size = (own.height, own.width)
    choice = Choice(own.model, common.parts(own), own.teacher, given, size, own.dtype)
    prompts = tuple(own.prompt) or own_prompts(own.model)
    with server.listen(own.host, own.port) as listener, terminating():
        start = time.monotonic()
        studio = open_studio(choice)
        _say(f"loaded {own.model} in {time.monotonic() - start:.1f} s; compiling, once")
        for name, seconds in studio.warm_up().items():
            calls = studio.systems[name].programs.network_calls
            _say(f"{name}: {calls} network call{'' if calls == 1 else 's'} an image, ready after {seconds:.1f} s")
        if not server.is_loopback(listener):
            warnings.warn(f"whoever reaches {server.address(listener)} may draw; nothing asks who it is", stacklevel=2)
        print(server.address(listener), flush=True)
        _say("open this address in a browser; Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):  # not raised where a shell has told us to ignore it
            limits = server.Limits(own.max_prompt, own.queue)
            words = known_words(studio.systems["student"].pipeline.tokenizer)
            server.serve(studio, listener, limits, prompts, words)
        _say("ended")


def _say(line: str) -> None:
    print(f"d2g: {line}", file=sys.stderr, flush=True)
