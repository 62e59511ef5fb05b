"""One .safetensors file as the teacher of every job, and a student that is a LoRA: pairs, training, export, drawing."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
import saved
import tiny

import d2g_jax
from d2g_jax.__main__ import main
from d2g_jax.models import lora
from d2g_jax.pipeline import lora_files

SETTINGS = {
    "pairs.count": 20, "pairs.records_per_shard": 8, "pairs.steps": 2, "pairs.batch_size": 8,
    "lora.rank": 2, "discriminator.lora_rank": 2, "train.batch_size": 8,
    "train.packed": False, "train.log_every": 8, "train.checkpoint_every": 16, "train.sample_every": 32,
    "adversarial.start_images": 8, "adversarial.warmup_images": 8, "adversarial.r1_interval": 2,
    "optimizer.generator.warmup_images": 16, "optimizer.discriminator.warmup_images": 16,
}  # fmt: skip


def d2g(job: str, *words: str | Path) -> None:
    assert main([job, *map(str, words)]) == 0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """The miniature as one file, by the command."""
    out = tmp_path_factory.mktemp("teacher") / "teacher"
    folder = tiny.make(Path(os.environ["D2G_JAX_TINY"])) / "pipeline"
    d2g("export", f"--model={folder}", "--to=single", f"--out={out}")
    return out / "teacher.safetensors"


@pytest.fixture(scope="module")
def workdir(teacher, tmp_path_factory) -> Path:
    """Pairs of that file and a student of them: G and D by low rank, five steps without a break."""
    folder = tmp_path_factory.mktemp("run")
    d2g("pairs", *flags(teacher), f"--workdir={folder}")
    d2g("train", *flags(teacher), f"--workdir={folder}", "--config.train.images=40")
    return folder


def flags(teacher: Path) -> list[str]:
    settings = {"pipeline": teacher, **SETTINGS}
    return [tiny.CONFIG, *(f"--config.{key}={value}" for key, value in settings.items())]


@pytest.mark.slow
def test_a_resumed_lora_is_the_uninterrupted_one_to_the_bit(teacher, workdir, tmp_path):
    """Parameters, optimisers, averages and counters of G's and D's updates, stopped while the adversary is at work."""
    train = "train", *flags(teacher), f"--workdir={tmp_path}", f"--pairs={workdir / 'pairs' / '1.0.0'}"
    d2g(*train, "--config.train.images=24")
    assert saved.arrays(tmp_path)["['state']['images']"] == 24
    d2g(*train, "--config.train.images=40")
    whole, resumed = saved.arrays(workdir), saved.arrays(tmp_path)
    assert whole.keys() == resumed.keys()
    assert sum("['down']" in path and "['ema']" in path for path in whole) >= 8  # as SETTINGS say, array by array
    for path, value in whole.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)


@pytest.mark.slow
def test_from_file_to_file(teacher, workdir, tmp_path):
    """The student of a file as a file: what the workdir draws, by the command and by the front door."""
    d2g("export", f"--model={workdir}", "--to=single", f"--out={tmp_path / 'student'}")
    file, drawn = tmp_path / "student" / "student.safetensors", {}
    for name, model in (("workdir", workdir), ("file", file)):
        d2g("sample", f"--model={model}", "--prompt=a thin 4", "--images=2", f"--out={tmp_path / name}")
        drawn[name] = np.load(tmp_path / name / "latents.npy")
    np.testing.assert_allclose(drawn["file"], drawn["workdir"], atol=1e-5)
    np.testing.assert_allclose(d2g_jax.load(file).latents("a thin 4", images=2), drawn["workdir"], atol=1e-5)
    # the same student by its LoRA, on the teacher's file
    d2g("export", f"--model={workdir}", "--to=lora", f"--out={tmp_path / 'lora'}")
    worn = d2g_jax.load(teacher, lora=str(tmp_path / "lora")).sampler.pipeline.params["unet"]
    student = d2g_jax.load(file).sampler.pipeline.params["unet"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), worn, student)


def test_the_front_door_takes_a_file_and_loras(teacher, tmp_path):
    """As `d2g sample` does, one after another, and at their scales."""
    plain = d2g_jax.load(teacher)
    shapes, rng = lora.flat(plain.sampler.pipeline.unet.abstract()), np.random.default_rng(0)
    path = lora.target_paths(shapes, ("attention",))[0]
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    updates = []
    for file, form in zip(files, lora_files.FORMS, strict=True):
        inputs, out = shapes[path].shape
        parts = {"down": rng.standard_normal((inputs, 1)), "up": rng.standard_normal((1, out))}
        lora_files.write({"unet": {path: parts}}, file, form, plain.sampler.pipeline)
        updates.append(parts["down"] @ parts["up"])
    worn = [str(files[0]), f"{files[1]}:-0.5"]
    model = d2g_jax.load(teacher, lora=worn)
    kernel = lora.flat(model.sampler.pipeline.params["unet"])[path]
    before = np.asarray(lora.flat(plain.sampler.pipeline.params["unet"])[path])
    np.testing.assert_allclose(kernel, before + updates[0] - 0.5 * updates[1], atol=1e-5)
    command = [f"--model={teacher}", "--prompt=a thin 4", "--steps=2", f"--out={tmp_path / 'out'}"]
    d2g("sample", *command, *(f"--lora={text}" for text in worn))
    latents = np.load(tmp_path / "out" / "latents.npy")
    np.testing.assert_allclose(model.latents("a thin 4", steps=2), latents, atol=1e-5)
    assert np.abs(plain.latents("a thin 4", steps=2) - latents).max() > 1e-3
