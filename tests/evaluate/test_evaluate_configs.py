"""Every system of the paper's tables has a configuration that is a command as it stands."""

import re
import shlex
from pathlib import Path

import pytest

from d2g_jax.commands import evaluate as command
from d2g_jax.diffusion.systems import SYSTEMS
from d2g_jax.evaluate.protocols import PROTOCOLS
from d2g_jax.pipeline.draw import Solution
from d2g_jax.runtime.errors import UserError

CONFIGS = sorted(Path("configs/evaluate").glob("*.py"))


VARIABLE = re.compile(r'^ *(\w+)="?([^"\n]*)"?$', re.MULTILINE)


def commands(file):
    """The `d2g evaluate` lines of a configuration's docstring, each as a list of arguments."""
    text = file.read_text().split('"""')[1].replace("\\\n", " ")
    shell = dict(VARIABLE.findall(Path("docs/evaluate.md").read_text())) | dict(VARIABLE.findall(text))
    for line in re.findall(r"^ *d2g evaluate (.*)$", text, re.MULTILINE):
        for name, value in shell.items():
            line = line.replace(f"${name}", value)
        yield shlex.split(line)


def parsed(monkeypatch, arguments):
    seen = []
    monkeypatch.setattr(command, "_run", seen.append)
    command.read(arguments)()
    return seen[0]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_commands_of_a_configuration(file, monkeypatch):
    found = list(commands(file))
    assert found
    for arguments in found:
        assert not any("$" in argument for argument in arguments)
        own = parsed(monkeypatch, arguments)
        assert own.config == file
        assert own.protocol in PROTOCOLS
        assert own.system is None or own.system in SYSTEMS
        assert (own.model is None) != (own.images is None)
        one_step = own.system is not None or own.steps is None
        assert one_step or Solution(own.steps, own.guidance_scale, solver=own.solver).network_calls == 100
        assert own.unet is None or isinstance(own.unet, Path)


def test_every_system_of_the_tables_has_one(monkeypatch):
    own = [parsed(monkeypatch, arguments) for file in CONFIGS for arguments in commands(file)]
    assert {o.system for o in own} == {None, *SYSTEMS}
    names = {o.name for o in own if o.protocol == "coco2014-30k"}
    table = ["GigaGAN", "StyleGAN-T", "InstaFlow-0.9B", "UFOGen", "MD-UFOGen", "DMD", "DALL-E 2", "Imagen"]
    assert names >= {*table, "PixArt-α", "Diffusion2GAN, SD 1.5", "Stable Diffusion 1.5, 50 steps"}
    names = {o.name for o in own if o.protocol == "coco2017-5k"}
    assert names >= {"SDXL-Turbo", "SDXL-Lightning", "SDXL-Diffusion2GAN", "SDXL-Base-1.0, 50 steps"}


def test_flags_override_and_unknown_fields_are_refused(monkeypatch, tmp_path):
    arguments = ["--config=configs/evaluate/instaflow.py", "--out=a.json", "--name=mine", "--dtype=float32"]
    own = parsed(monkeypatch, arguments)
    assert (own.name, own.dtype, own.system) == ("mine", "float32", "instaflow")
    file = tmp_path / "c.py"
    file.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'stepps': 3})\n")
    with pytest.raises(UserError, match="stepps is no flag"):
        command.read([f"--config={file}", "--out=a.json"])
    with pytest.raises(UserError, match="--protocol is missing"):
        command.read(["--images=x", "--out=a.json"])


def write_config(folder, **fields):
    lines = "".join(f"    c.{name} = {value!r}\n" for name, value in fields.items())
    head = "from ml_collections import ConfigDict\ndef get_config():\n    c = ConfigDict()\n"
    file = folder / "c.py"
    file.write_text(f"{head}{lines}    return c\n")
    return file


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("samples", "abc", "argument --samples: invalid int value: 'abc'"),
        ("samples", 80.0, "argument --samples: invalid int value: '80.0'"),
        ("samples", True, "argument --samples: invalid int value: 'True'"),
        ("batch", 16.0, "argument --batch: invalid int value: '16.0'"),
        ("guidance_scale", "high", "argument --guidance: invalid float value: 'high'"),
        ("metrics", ("fid",), "metrics=('fid',): give one value, not several"),
        ("protocol", ["digits"], "protocol=['digits']: give one value, not several"),
        ("images", "", "argument --images: an empty path"),
        ("dtype", "float8", "argument --dtype: invalid choice: 'float8'"),
        ("dtype", ["float32"], "dtype=['float32']: give one value, not several"),
        ("tiled", 1, "argument --tiled: ignored explicit argument '1'"),
        ("tiled", "yes", "argument --tiled: ignored explicit argument 'yes'"),
    ],
)
def test_fields_of_another_type_are_refused(name, value, expected, tmp_path):
    file = write_config(tmp_path, **{name: value})
    with pytest.raises(UserError) as refused:
        command.read([f"--config={file}", "--protocol=digits", "--images=x", "--out=a.json"])
    assert str(refused.value).startswith(f"--config={file}: {expected}")
    assert "\n" not in str(refused.value)


def test_an_empty_config_is_one_line():
    with pytest.raises(UserError, match=r"^argument --config: an empty path"):
        command.read(["--config=", "--protocol=digits", "--out=a.json"])


def test_a_result_goes_somewhere():
    with pytest.raises(UserError, match=r"^--out is missing"):
        command.read(["--protocol=digits", "--images=x"])


def test_fields_of_the_flags_types_are_taken(monkeypatch, tmp_path):
    fields = {"protocol": "digits", "samples": 80, "guidance_scale": 2, "tiled": True, "model": "m", "unet": None}
    own = parsed(monkeypatch, [f"--config={write_config(tmp_path, **fields, prompts='a.txt')}", "--out=a.json"])
    assert {name: getattr(own, name) for name in fields} == fields
    assert own.prompts == Path("a.txt")
    file = write_config(tmp_path, lora=("a.safetensors",), model="m", protocol="digits")
    own = parsed(monkeypatch, [f"--config={file}", "--lora=b.safetensors:0.5", "--out=a.json"])
    assert own.lora == ["a.safetensors", "b.safetensors:0.5"]
