"""The `d2g` command: one subcommand per job, nothing else.

Exit codes: 0 done, 2 bad input (one line on stderr), 75 another process of the job died, 130 interrupted, 141 nobody
reads its output any more, 143 terminated. The jobs of `RESUMED` go on where they stopped when the same command is given
again.
"""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2g_jax.commands.common import JOBS, RESUMED
from d2g_jax.inputs.text import check_whole
from d2g_jax.runtime.errors import UserError, of_the_machine
from d2g_jax.runtime.interrupt import Terminated, ended, interrupt_again, leave, starting
from d2g_jax.runtime.version import __version__

_library_format, _library_unraisable = warnings.formatwarning, sys.unraisablehook
_HERE = str(Path(__file__).parent)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = _format_warning
    for library in ("absl", "asyncio"):  # through which Orbax speaks: what fails there is raised, and said once
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is none
            stream.reconfigure(errors="replace")  # of a terminal that is not UTF-8
    try:
        with starting():
            code = _finish(_run(arguments))
            sys.stdout.flush()
            return code
    except UserError as error:
        return _finish(2, str(error))
    except (KeyboardInterrupt, Terminated) as stop:
        code, how = (143, "terminated") if isinstance(stop, Terminated) else (130, "interrupted")
        _finish(code, f"{how}; {_what_is_kept(arguments)}")
        if argv is None:
            leave(code)
        return code
    except BrokenPipeError:  # `| head` has seen enough
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes once more
        return _finish(141)
    except Exception as error:
        if message := of_the_machine(error):
            return _finish(2, message)
        if distributed := _joined():
            distributed.crash()
        raise
    finally:
        if argv is None:
            ended()


def _what_is_kept(arguments: Sequence[str]) -> str:
    """What the same command would do after a job was stopped."""
    goes_on = arguments[0] in RESUMED and arguments[1:2] not in (["verify"], ["reference"], ["table"])
    return "the same command goes on from here" if goes_on else "nothing was kept, the same command begins anew"


def _joined() -> Any:
    """`runtime.distributed`, where a job has imported it; else this process has joined no others, and needs no jax."""
    return sys.modules.get("d2g_jax.runtime.distributed")


def _finish(code: int, message: str = "") -> int:
    """Says how it ended, once for all processes of a job."""
    if distributed := _joined():
        return distributed.finish(code, message)
    if message:
        print(f"d2g: {message}", file=sys.stderr)
    return code


def _format_warning(message: Warning | str, category: type[Warning], file: str, *place: Any) -> str:
    """Ours in one line without the place in the source; those of libraries advise programmers, who give `python -W`."""
    ours = file.startswith(_HERE)
    if not ours or category is not UserWarning:
        return _library_format(message, category, file, *place) if ours or sys.warnoptions else ""
    # Which process, where there are several: it may be about that one's share of the data.
    distributed = _joined()
    process = distributed.process_id() if distributed else 0
    return f"d2g: {f'process {process}: ' if process else ''}warning: {message}\n"


def _unraisable(raised: Any) -> None:
    """Not what TensorStore says of each array of a checkpoint that could not be written: that is said once, by us.

    A Ctrl-C that struck where Python lets nothing out, as in what jax does while garbage is collected, comes again.
    """
    if raised.exc_type is KeyboardInterrupt:
        interrupt_again()
    elif str(raised.exc_value) != "Event loop is closed":
        _library_unraisable(raised)


def _run(arguments: list[str]) -> int:
    usage = "usage: d2g JOB [--flag=value ...]\n\n" + "\n".join(f"  {job:9}{text}" for job, text in JOBS.items())
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(f"{usage}\n\n`d2g JOB --help` lists the flags of a job; `d2g --version` says which d2g_jax this is.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"d2g_jax {__version__}")
        return 0
    for argument in arguments:
        check_whole(argument, f"argument {argument.partition('=')[0]!a}")
    job, rest = arguments[0], arguments[1:]
    if job not in JOBS:
        nearest = difflib.get_close_matches(job, JOBS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(JOBS)}"
        raise UserError(f"unknown job {job!r}; {hint}")
    return importlib.import_module(f"d2g_jax.commands.{job}").run(rest)


if __name__ == "__main__":
    sys.exit(main())
