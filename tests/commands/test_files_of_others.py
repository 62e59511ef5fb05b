"""Single files and LoRAs that cannot be what they are given as: one line, exit code 2, nothing written."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from d2g_jax import pairs
from d2g_jax.__main__ import main
from d2g_jax.config.configuration import read_config
from d2g_jax.export import export_student
from d2g_jax.models import lora
from d2g_jax.pipeline import lora_files, weights
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime import runs
from d2g_jax.sample.sampler import Sampler
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.packed import pack
from d2g_jax.train.state import UPDATES, TrainState

RANK = {"lora.rank": 2, "adversarial.weight": 0.0, "pairs.count": 8, "pairs.records_per_shard": 8, "pairs.steps": 2}
FLAGS = [tiny.CONFIG, *(f"--config.{key}={value}" for key, value in RANK.items()), "--config.pairs.batch_size=8"]


@pytest.fixture(scope="module")
def teacher() -> Pipeline:
    return Pipeline.load(tiny.make(Path(os.environ["D2G_JAX_TINY"])) / "pipeline")


@pytest.fixture(scope="module")
def bad(teacher, tmp_path_factory) -> Path:
    """A folder with a whole single file, NAME.safetensors, and with what is wrong."""
    folder = tmp_path_factory.mktemp("bad")
    export_student(Sampler(teacher, None), "single", folder / "whole")
    whole = folder / "whole" / "whole.safetensors"
    (folder / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (folder / "model.ckpt").write_bytes(b"\x80\x04pickle")
    state = weights.load_state_dict(whole)
    wide = {key: np.repeat(value, 2, 1) if "attn2.to_k" in key else value for key, value in state.items()}
    weights.save_state_dict({k: v for k, v in wide.items() if "diffusion_model" in k}, folder / "sd2_unet.safetensors")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    sd2 = {first: np.zeros((8, 4, 3, 3), np.float16), key: np.zeros((8, 1024), np.float16)}
    for name in ("sd2", "sd2_as_sd1"):
        weights.save_state_dict(sd2, folder / f"{name}.safetensors")
    original = "model:\n  params:\n    unet_config:\n      params:\n        context_dim: 768\n"
    (folder / "sd2_as_sd1.yaml").write_text(original)
    path = lora.target_paths(teacher.unet.abstract(), ("attention",))[0]
    sides = lora.flat(teacher.unet.abstract())[path].shape
    update = {"down": np.ones((sides[0], 1), np.float32), "up": np.ones((1, sides[1]), np.float32)}
    for name, parts in (("style", update), ("wide", {**update, "up": np.ones((1, 2 * sides[1]), np.float32)})):
        lora_files.write({"unet": {path: parts}}, folder / f"{name}.safetensors", "kohya", teacher)
    return folder


def refused(capsys, written: Path, *command: str) -> str:
    """The one line of a command that ends with 2 and writes nothing into `written`, where a lock may lie."""
    files = lambda: {path for path in written.rglob("*") if path.name != ".lock"}  # noqa: E731
    before = files()
    assert main([*map(str, command)]) == 2
    assert files() == before
    error = capsys.readouterr().err
    assert error.startswith("d2g: ")
    assert error.count("\n") == 1
    return error


JOBS = {
    "sample": ("--prompt=a 7", "--out={out}/out"),
    "export": ("--to=diffusers", "--out={out}/out"),
    "play": ("--port=0",),
    "evaluate": ("--protocol=digits", "--samples=2", "--metrics=accuracy", "--out={out}/a.json"),
}
MODEL = "--model={bad}/whole/whole.safetensors"
FILES = (
    ("--model={bad}/cut.safetensors", "cut.safetensors: not a whole safetensors file"),
    ("--model={bad}/model.ckpt", "model.ckpt: a file; pickles are refused because they can run code"),
    ("--model={bad}/sd2.safetensors", "SD 2.x, whose tensors do not tell what it predicts; say prediction="),
    ("--model={bad}/sd2_as_sd1.safetensors", "sd2_as_sd1.yaml: of a UNet for texts of width 768"),
    (f"{MODEL} --unet={{bad}}/sd2_unet.safetensors", "attn2.to_k.weight has shape"),
    (f"{MODEL} --unet={{bad}}/cut.safetensors", "cut.safetensors: not a whole safetensors file"),
    (f"{MODEL} --unet={{bad}}/model.ckpt", "model.ckpt: pickle files are refused"),
    (f"{MODEL} --lora={{bad}}/wide.safetensors", "this model's kernel is (16, 16); give a LoRA of the same base model"),
    (f"{MODEL} --lora={{bad}}/style.safetensors:much", "the scale 'much' is no finite number; give one such as 0.8"),
    (f"{MODEL} --lora={{bad}}/model.ckpt:0.5", "model.ckpt: pickle files are refused"),
)


DRAWN = [(job, *case) for job in JOBS for case in FILES if job != "export" or "--unet" not in case[0]]


@pytest.mark.parametrize(("job", "flags", "message"), DRAWN)
def test_what_draws(job, flags, message, bad, tmp_path, capsys):
    words = [word.format(bad=bad, out=tmp_path) for word in (*flags.split(), *JOBS[job])]
    assert message in refused(capsys, tmp_path, job, *words)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("cut.safetensors", "cut.safetensors: not a whole safetensors file"),
        ("model.ckpt", "model.ckpt: pickle files are refused"),
        ("sd2.safetensors", "or put its .yaml beside it"),
        ("sd2_as_sd1.safetensors", "sd2_as_sd1.yaml: of a UNet for texts of width 768"),
        ("style.safetensors", "a LoRA (lora_unet_"),
    ],
)
@pytest.mark.parametrize("job", ["pairs", "train"])
def test_a_teacher_that_is_none(job, file, message, bad, made, tmp_path, capsys):
    flags = [f"--pairs={made}"] if job == "train" else []
    error = refused(capsys, tmp_path, job, *FLAGS, f"--config.pipeline={bad / file}", f"--workdir={tmp_path}", *flags)
    assert message in error


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Pairs of the miniature."""
    return pairs.make_pairs(read_config(Path(tiny.__file__), FLAGS[1:]), tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def workdir(teacher, tmp_path_factory) -> Path:
    """Of a student that was trained with lora.rank=2: its config, and a checkpoint with updates that are not zero."""
    folder, config = tmp_path_factory.mktemp("run"), read_config(Path(tiny.__file__), FLAGS[1:])
    shapes = lora.abstract(teacher.unet.abstract(), 2, config.lora.targets)
    empty = {field.name: {} for field in dataclasses.fields(TrainState)}
    counts = {"step": np.int32(1), "images": np.int32(8), "left_out": {update: np.int32(0) for update in UPDATES}}
    state = TrainState(**{**empty, **counts, "ema": pack(jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1), shapes))})
    metadata = {"config": runs.to_json(config), "pipeline": config.pipeline, "timestep": 999}
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(meshes.place(state, meshes.make_mesh()), metadata)
    runs.claim(folder, config)
    return folder


def test_a_rank_that_a_config_denies(made, workdir, tmp_path, capsys):
    new = [f"--workdir={tmp_path}", f"--pairs={made}", "--config.adversarial.weight=0.1"]
    for key in ("lora.rank", "discriminator.lora_rank"):
        error = refused(capsys, tmp_path, "train", *FLAGS, *new, f"--config.{key}=99")
        assert "lora.rank=99: " in error
        assert error.endswith("choose a lower rank\n")
    both = ["--config.discriminator.backbone=frozen", "--config.discriminator.lora_rank=2"]
    error = refused(capsys, tmp_path, "train", *FLAGS, *new, *both)
    assert "discriminator.lora_rank=2 updates a backbone that is frozen" in error
    other = [f"--workdir={workdir}", f"--pairs={made}", "--config.lora.rank=3"]
    assert "lora.rank=2 (this one has 3)" in refused(capsys, workdir, "train", *FLAGS, *other)
    out = ["--to=lora", "--rank=3", f"--out={tmp_path / 'out'}"]
    error = refused(capsys, tmp_path, "export", f"--model={workdir}", *out)
    assert "rank=3: this student was trained with lora.rank=2; give at most that, or none" in error
