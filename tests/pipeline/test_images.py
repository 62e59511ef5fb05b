"""Teachers of images: loaded, drawn like diffusers, told classes or nothing, distilled by the same jobs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_images

from d2g_jax import __main__ as cli
from d2g_jax import load, records
from d2g_jax.diffusion.schedule import student_timestep
from d2g_jax.export import export_student
from d2g_jax.models import discriminator
from d2g_jax.pipeline.conditioning import encode_text, tokenize_prompts
from d2g_jax.pipeline.draw import Solution
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_images.make(tmp_path_factory.mktemp("images") / "teacher")


@pytest.mark.parametrize("at_root", [False, True])
def test_a_solution_equals_diffusers_ddim(tmp_path, at_root):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    folder = tiny_images.make(tmp_path / "teacher", tiny_images.NOTHING)
    pipe = diffusers.DDIMPipeline.from_pretrained(folder)
    if at_root:
        for file in (*folder.glob("unet/*"), *folder.glob("scheduler/*")):
            shutil.move(file, folder / file.name)
        for name in ("unet", "scheduler"):
            (folder / name).rmdir()
    model = load(folder)
    noise = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    ours = model.draw(["", ""], latents=noise, steps=4, guidance_scale=1.0)
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(4)
    x = torch.from_numpy(noise)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t).sample, t, x, eta=0.0).prev_sample
    np.testing.assert_allclose(ours.latents, x.numpy(), atol=2e-4)
    assert ours.images.shape == (2, 8, 8, 3)
    for form in ("diffusers", "flax"):
        export_student(model.sampler, form, tmp_path / form)
        again = load(tmp_path / form).latents(["", ""], latents=noise, steps=4, guidance_scale=1.0)
        np.testing.assert_allclose(again, ours.latents, atol=1e-6)


def test_classes_and_no_classes_are_told_as_they_are(teacher, tmp_path):
    pipeline = Pipeline.load(teacher)
    ids = tokenize_prompts(pipeline, ["2", " 0 "])
    np.testing.assert_array_equal(encode_text(pipeline, {}, jnp.asarray(ids))[0], [[0, 0, 1], [1, 0, 0]])
    for wrong in ("3", "-1", "a cat", "", "1.0", "1" * 5000):
        with pytest.raises(UserError, match="is told a class, a number from 0 to 2, no text"):
            tokenize_prompts(pipeline, [wrong])
    nothing = Pipeline.load(tiny_images.make(tmp_path / "nothing", tiny_images.NOTHING))
    assert encode_text(nothing, {}, jnp.asarray(tokenize_prompts(nothing, ["", ""]))) == (None, None)
    with pytest.raises(UserError, match="is told nothing; give empty prompts"):
        tokenize_prompts(nothing, ["1"])
    with pytest.raises(UserError, match="has no empty prompt to be guided from; give 1"):
        load(teacher)(["1"], steps=2, guidance_scale=3.0)
    call = {"seed": 1, "steps": 2, "guidance_scale": 1.0}
    (whole,), (tiled,) = (load(teacher)(["1"], tiled=tiled, **call) for tiled in (False, True))
    assert whole.tobytes() == tiled.tobytes()  # one tile: there is nothing to decode
    song = load(tiny_images.make(tmp_path / "song", tiny_images.SONG, tiny_images.EDM))
    assert Solution.default(song.sampler.pipeline).network_calls == 35
    with pytest.raises(UserError, match="has EDM's levels; take solver=heun, euler or dpmpp_2m"):
        song(["1"], steps=4, guidance_scale=1.0)


@pytest.mark.parametrize("kind", ["CLASSES", "NOTHING", "SONG"])
def test_the_discriminator_starts_from_any_teacher(tmp_path, kind):
    import jax

    scheduler = tiny_images.EDM if kind == "SONG" else tiny_images.DDIM
    pipeline = Pipeline.load(tiny_images.make(tmp_path / "teacher", getattr(tiny_images, kind), scheduler))
    config = discriminator.DiscriminatorConfig(pipeline.unet.config, head_channels=4)
    network = discriminator.build(config)
    params = discriminator.init_from_teacher(network, jax.random.key(0), pipeline.params["unet"])
    x = np.ones((2, 8, 8, 3), np.float32)
    label = None if kind == "NOTHING" else np.eye(3, dtype=np.float32)[[0, 2]]
    maps = network.apply(params, x, x, label)
    assert [m.shape for m in maps] == [(2, 4, 4)] * 3 + [(2, 8, 8)] * 3


@pytest.mark.parametrize("kind", [pytest.param("CLASSES", marks=pytest.mark.slow), "SONG"])
def test_pairs_training_drawing_and_export(tmp_path, monkeypatch, kind):
    scheduler = tiny_images.EDM if kind == "SONG" else tiny_images.DDIM
    teacher = tiny_images.make(tmp_path / "teacher", getattr(tiny_images, kind), scheduler)
    monkeypatch.setenv("D2G_JAX_TINY_IMAGES", str(teacher))
    work = tmp_path / "work"
    pairs = ["--config.pairs.count=96", "--config.pairs.records_per_shard=48", "--config.pairs.batch_size=48"]
    pairs += ["--config.pairs.solver=heun"] if kind == "SONG" else []
    assert cli.main(["pairs", tiny_images.CONFIG, f"--workdir={work}", *pairs]) == 0
    source = records.PairSource(work / "pairs" / "1.0.0", fields=("prompt", "latents", "input_ids"))
    assert [str(source[i]["prompt"]) for i in range(4)] == ["0", "1", "2", "0"]  # each class in turn
    assert source[0]["latents"].dtype == np.float32
    lengths = ["train.images=128", "train.batch_size=32", "train.held_out=8", "train.log_every=32"]
    lengths += ["train.sample_every=128", "train.checkpoint_every=128"]
    adversary = ["adversarial.start_images=32", "adversarial.warmup_images=32", "adversarial.r1_interval=2"]
    adversary = ["adversarial.weight=0.0"] if kind == "SONG" else adversary
    flags = [f"--config.{setting}" for setting in (*lengths, *adversary)]
    assert cli.main(["train", tiny_images.CONFIG, f"--workdir={work}", *pairs, *flags]) == 0
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss_regression"]) for line in lines)
    assert any("loss_r1" in line for line in lines) == (kind == "CLASSES")
    student = load(work)
    noise = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    drawn = student.draw(["0", "2"], latents=noise)
    assert drawn.images.shape == (2, 8, 8, 3)
    for form in ("diffusers", "flax"):
        out = tmp_path / form
        assert cli.main(["export", f"--model={work}", f"--to={form}", f"--out={out}"]) == 0
        np.testing.assert_allclose(load(out).draw(["0", "2"], latents=noise).latents, drawn.latents, atol=1e-5)
    config = json.loads((tmp_path / "diffusers" / "scheduler" / "scheduler_config.json").read_text())
    assert student_timestep(config) == (999 if kind == "SONG" else 666)
    with pytest.raises(UserError, match="of images"):
        export_student(student.sampler, "single", tmp_path / "single")
    if kind == "CLASSES":
        pytest.importorskip("diffusers")
        pytest.importorskip("torch")
        x = tiny_images.one_step_by_diffusers(tmp_path / "diffusers", noise, [0, 2])
        np.testing.assert_allclose(x, drawn.latents, atol=1e-4 * np.abs(x).max())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [("a cat\n", "is told a class, a number from 0 to 2, no text"), ("0\n7\n", "prompt '7'")],
)
def test_prompts_that_are_no_classes_are_refused(teacher, tmp_path, monkeypatch, capsys, prompts, message):
    monkeypatch.setenv("D2G_JAX_TINY_IMAGES", str(teacher))
    (tmp_path / "prompts.txt").write_text(prompts)
    flags = [f"--workdir={tmp_path}", f"--config.pairs.prompts={tmp_path / 'prompts.txt'}"]
    assert cli.main(["pairs", tiny_images.CONFIG, *flags]) == 2
    assert message in capsys.readouterr().err


def test_classes_for_a_teacher_of_text_are_refused(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("0\n1\n")
    flags = [f"--workdir={tmp_path}", f"--config.pairs.prompts={tmp_path / 'prompts.txt'}"]
    assert cli.main(["pairs", tiny.CONFIG, *flags]) == 2
    assert "is told text; give captions" in capsys.readouterr().err


def test_folders_that_do_not_fit_are_refused(teacher, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "sample_size": 9}))
    with pytest.raises(UserError, match=r"sample_size = 9; give a multiple of 2"):
        Pipeline.load(folder)
    file.write_text(json.dumps({"_class_name": "UNet2DConditionModel", "sample_size": 8}))
    with pytest.raises(UserError, match="its network is none of a DDIMPipeline"):
        Pipeline.load(folder)


def test_levels_of_edm_are_refused_where_latents_are_solved(tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny.make(Path(os.environ["D2G_JAX_TINY"])) / "pipeline", folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(tiny_images.EDM))
    with pytest.raises(UserError, match=r"scheduler_config.json: EDMEulerScheduler is no schedule of betas"):
        Pipeline.load(folder)
