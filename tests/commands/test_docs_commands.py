"""Every command of the pages for users can be given: its flags exist, its settings exist and take such values."""

import re
import shlex
from pathlib import Path

import pytest

from d2g_jax.__main__ import JOBS, main
from d2g_jax.config.configuration import read_config
from d2g_jax.play import server

PAGES = ("docs/export.md", "docs/hardware.md", "docs/lora.md", "docs/play.md")
LAUNCHERS = r"(?:sbatch \S+ launch/slurm\.sh|launch/tpu_pod\.sh run)"


def commands():
    """(page, words behind `d2g`) of every line that starts one, continued lines joined."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", Path(page).read_text())
        for line in re.findall(rf"^ *(?:d2g|{LAUNCHERS}) (.+)$", text, re.MULTILINE):
            found.append((page, tuple(shlex.split(line, comments=True))))
    return found


def test_there_are_commands_of_every_kind():
    jobs = {words[0] for _, words in commands()}
    assert {"metric", "pairs", "train", "plan", "sample", "play", "export", "evaluate", "ablate"} <= jobs <= set(JOBS)


def name(value):
    """Of a command among the tests."""
    return " ".join(value)[:60] if isinstance(value, tuple) else None


@pytest.mark.parametrize(("page", "words"), commands(), ids=name)
def test_command(page, words, capsys, monkeypatch):
    monkeypatch.setattr(server, "missing", lambda: [])
    job = list(words[:2] if words[:2] == ("metric", "convert") else words[:1])
    with pytest.raises(SystemExit):
        main([*job, "--help"])
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    settings = [word for word in words if word.startswith("--config.")]
    flags = {word.partition("=")[0] for word in words if word.startswith("--") and word not in settings}
    assert flags <= known
    files = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    if files or settings:
        assert "--config" in known
        read_config(Path(files[0] if files else "configs/digits.py"), settings)  # the digits, where no file is given
