"""The configs of `configs/`: what they say of themselves holds, and the jobs' own checks pass on them."""

from pathlib import Path

import pytest

from d2g_jax.__main__ import main
from d2g_jax.config.configuration import read_config
from d2g_jax.config.ranges import RANGES, range_of
from d2g_jax.runtime import mesh
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.runs import flatten

FOLDER = Path(__file__).parents[2] / "configs"
TEACHERS = ("sd15", "sd15_24gb", "sd21", "sdxl")


@pytest.mark.parametrize("name", TEACHERS)
def test_the_configs_of_stable_diffusion(name):
    """Every field of the digits but its own sections, nothing left empty that a job needs, flags apply."""
    config, digits = read_config(FOLDER / f"{name}.py"), read_config(FOLDER / "digits.py")
    fields = {key for key in flatten(digits.to_dict()) if not key.startswith(("teacher.", "evaluation."))}
    assert set(flatten(config.to_dict())) == fields
    assert config.name == name
    assert all((config.pipeline, config.pairs.prompts, config.loss.metric, config.overfit.metric))
    t, a = config.train, config.adversarial
    assert t.batch_size % t.groups == 0
    assert t.groups % config.mesh.fsdp == 0
    for images in (t.images, t.checkpoint_every, a.start_images, a.warmup_images):
        assert images % t.batch_size == 0
    assert a.start_images + a.warmup_images < t.images
    assert config.pairs.batch_size % config.mesh.fsdp == 0
    assert read_config(FOLDER / f"{name}.py", ["--config.mesh.cpu_devices=4"]).mesh.cpu_devices == 4


@pytest.mark.parametrize("name", ["cifar10_edm", "cifar10_ddpm"])
def test_the_configs_of_cifar10(name):
    config = read_config(FOLDER / f"{name}.py")
    t, a = config.train, config.adversarial
    assert config.name == name
    assert t.images == 392 * 300_000
    assert all(count % t.batch_size == 0 for count in (t.images, t.log_every, t.checkpoint_every))
    assert not a.weight or a.start_images % t.batch_size == 0
    assert t.batch_size % t.groups == 0
    assert all(t.groups % devices == 0 for devices in (1, 2, 4, 7, 8))
    assert config.loss.size == 224
    assert config.pairs.guidance_scale == 1.0


def test_a_single_device_is_told_the_remedy():
    config = read_config(FOLDER / "sd15.py")
    with pytest.raises(UserError, match=r"mesh\.fsdp=8 does not divide the 2 devices"):
        mesh.make_mesh(config.mesh.data, config.mesh.fsdp)


@pytest.mark.parametrize("name", [None, "sd15", "sdxl", "cifar10_edm", "lpips"])
def test_every_number_has_a_range_and_is_in_it(name):
    settings = flatten(read_config(name and FOLDER / f"{name}.py").to_dict())
    for key, value in settings.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert value in range_of(key), key


def test_every_range_is_of_a_setting():
    files = (None, FOLDER / "sd15.py", FOLDER / "lpips.py")
    known = [f".{key}" for file in files for key in flatten(read_config(file).to_dict())]
    assert not [ending for ending in RANGES if not any(key.endswith(f".{ending}") for key in known)]


@pytest.mark.parametrize(
    "flag",
    [
        "train.keep_checkpoints=0",
        "train.log_every=-1",
        "train.batch_size=1e3",
        "pairs.count=1e20",
        "pairs.count=100000000000000000000",
        "pairs.seed=18446744073709551615",
        "seed=18446744073709551615",
        "adversarial.weight=nan",
        "adversarial.r1_gamma=inf",
        "loss.l1_weight=-0.5",
        "optimizer.generator.learning_rate=-1.0",
        "optimizer.discriminator.new_learning_rate=nan",
        "train.ema_half_life_images=0.0",
        "adversarial.mix_and_match=1.5",
    ],
)
def test_numbers_out_of_range_are_refused_at_once(flag, tmp_path, capsys):
    assert main(["train", f"--workdir={tmp_path / 'run'}", f"--config.{flag}"]) == 2
    error = capsys.readouterr().err
    assert error == f"d2g: {flag}; give {range_of(flag.split('=')[0])}\n"
    assert not (tmp_path / "run").exists()


def test_numbers_in_a_tuple_have_the_range_too(capsys):
    assert main(["plan", "--topology=gpu:8xH100", "--config.optimizer.generator.betas=(0.0, 2.0)"]) == 2
    assert capsys.readouterr().err == "d2g: optimizer.generator.betas=2.0; give a number from 0 to 1\n"


def test_a_home_behind_an_equals_sign_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    flags = ["--config.pipeline=~/sd", "--config.pairs.prompts=~/a.txt", "--config.pairs.negative_prompt=~ wavy"]
    config = read_config(None, flags)
    assert (config.pipeline, config.pairs.prompts) == ("/somewhere/sd", "/somewhere/a.txt")
    assert config.pairs.negative_prompt == "~ wavy"


def test_records_kept_out_may_be_none_but_not_fewer(tmp_path, capsys):
    assert main(["train", f"--workdir={tmp_path / 'run'}", "--config.train.held_out=-1"]) == 2
    assert capsys.readouterr().err == "d2g: train.held_out=-1; give a whole number from 0 to 2147483647\n"


def test_a_plan_looks_at_its_file_first(tmp_path, capsys):
    assert main(["plan", "--topology=gpu:8xH100", f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"d2g: --out={tmp_path}: is a folder; ")


def test_a_plan_refuses_them_too(capsys):
    assert main(["plan", "--topology=gpu:8xH100", "--config.adversarial.r1_interval=0"]) == 2
    assert capsys.readouterr().err == "d2g: adversarial.r1_interval=0; give a whole number from 1 to 2147483647\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return (\n", r", line 2: SyntaxError: '\(' was never closed"),
        ("\nimport no_such_module\n", ", line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config():\n    a = {}\n    return a['x\\ny']\n", ", line 3: KeyError: 'x"),
        ("def get_config(name):\n    return name\n", ": TypeError: get_config"),
        ("def get_config():\n    return {}\n", ": get_config.. returns a dict, not a ConfigDict"),
        ("get_config = 3\n", ": TypeError: 'int' object is not callable"),
        ("a = 3\n", r": has no get_config\(\)"),
        ("\0", ".*Error: source code"),
    ],
)
def test_an_error_in_a_config_file_is_one_line_that_names_it(text, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=f"--config={file}{message}") as caught:
        read_config(file)
    assert "\n" not in str(caught.value)
