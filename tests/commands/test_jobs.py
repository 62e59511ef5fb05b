"""The jobs one after another on the embedded teacher, small: pairs, training, resuming, drawing."""

import copy
import itertools
import json
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import saved
from PIL import Image
from tiny import get_config

from d2g_jax import pairs, records
from d2g_jax.__main__ import main
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.runtime import runs
from d2g_jax.runtime.errors import UserError
from d2g_jax.train import loop, train
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.programs import Programs


def small_config():
    c = get_config()
    with c.unlocked():
        c.pairs.update({"count": 20, "records_per_shard": 8, "steps": 3, "batch_size": 8})
        c.train.update({"images": 48, "batch_size": 8, "log_every": 8, "sample_every": 24, "checkpoint_every": 24})
        c.adversarial.update({"start_images": 16, "warmup_images": 8, "r1_interval": 2})
        c.optimizer.generator.warmup_images = c.optimizer.discriminator.warmup_images = 16
    return c


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, pairs folder)"""
    workdir = tmp_path_factory.mktemp("pairs")
    return small_config(), pairs.make_pairs(small_config(), workdir)


EFFECTS = (
    "images", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "keep_best", "skip_corrupt",
    "tensorboard", "wandb",
)  # fmt: skip
"""Fields of `train` that its programs do not depend on; `images` decides which are compiled."""


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """A config's programs are traced and compiled by its first whole run in this file; what is tested is the runs."""
    compile_programs, known = loop.compile_programs, {}

    def remembered(config, d, frozen, state, batch, mesh):
        settings = json.loads(config.to_json_best_effort())
        settings["train"] = {name: value for name, value in settings["train"].items() if name not in EFFECTS}
        key = json.dumps(settings)
        if key not in known:
            programs = compile_programs(config, d, frozen, state, batch, mesh)
            if config.adversarial.weight and None in vars(programs).values():  # a shorter run, or one that was resumed
                return programs
            # Every reading of the metric is a new type of tree to a compiled program: the first is passed again.
            known[key] = Programs(**{name: _with_first(frozen, step) for name, step in vars(programs).items()})
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_programs", remembered)
        yield


def _with_first(frozen, program):
    def call(_, *arguments):
        return program(frozen, *arguments)

    call.memory_analysis = program and program.memory_analysis
    return program and call


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_pairs_hold_what_the_manifest_says(made):
    _, folder = made
    source = records.PairSource(folder)
    assert len(source) == 20
    assert source.manifest.first_timestep == 999
    assert source[11]["prompt"] == (WEIGHTS / "prompts.txt").read_text().splitlines()[11]
    assert records.verify(folder) == []


def test_a_missing_shard_is_made_again_to_the_byte(made, tmp_path):
    config, folder = made
    copied = tmp_path / pairs.FOLDER
    shutil.copytree(folder, copied)
    for file in copied.glob("*00001-of-00003*"):
        file.unlink()
    assert records.missing_shards(copied, records.Manifest.read(copied)) == [1]
    pairs.make_pairs(config, tmp_path)
    assert files(copied) == files(folder)


def test_pairs_of_another_config_are_left_alone(made, tmp_path):
    config, folder = made
    shutil.copytree(folder, tmp_path / pairs.FOLDER)
    other = copy.deepcopy(config)
    other.pairs.guidance_scale = 5.0
    with pytest.raises(UserError, match="guidance_scale"):
        pairs.make_pairs(other, tmp_path)
    assert files(tmp_path / pairs.FOLDER) == files(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1001}, "steps=1001"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"count": 0}, "count"),
        ({"batch_size": 7}, "batch_size"),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt"),
    ],
)
def test_bad_pair_settings(change, message, tmp_path):
    config = small_config()
    config.pairs.update(change)
    with pytest.raises(UserError, match=message):
        pairs.make_pairs(config, tmp_path)
    assert not list(tmp_path.rglob("*tfrecord*"))


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no prompts"), (b"one\n\ntwo\n", "line 2"), (b"\xff\n", "UTF-8")]
)
def test_bad_prompt_files(content, message, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        pairs.read_prompts(file)


def test_the_teacher_in_diffusers_draws_the_same_digits(tmp_path):
    """Unmodified `StableDiffusionPipeline` on the shipped folder, 20 guided steps, within one level of 255."""
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    prompts = ["a bold red seven on navy and white stripes", "thin green digit 3 upright, dots in sky and brown", "0"]
    out = tmp_path / "ours"
    code = main(
        ["sample", f"--model={WEIGHTS / 'pipeline'}", "--steps=20", "--guidance=3", "--seed=4", f"--out={out}"]
        + [f"--prompt={p}" for p in prompts]
    )
    assert code == 0
    oracle = StableDiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", dtype=torch.float32)
    oracle.set_progress_bar_config(disable=True)
    drawn = oracle(
        prompts,
        num_inference_steps=20,
        guidance_scale=3.0,
        latents=torch.from_numpy(np.load(out / "noise.npy")),
        output_type="np",
    ).images
    theirs = np.round(drawn * 255).astype(int)
    ours = np.stack([pixels(out / f"{i:05d}.png") for i in range(3)]).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert ours.std() > 40  # there is something in the pictures
    # The saved noise draws the same again.
    again = tmp_path / "again"
    assert (
        main(
            ["sample", f"--model={WEIGHTS / 'pipeline'}", "--steps=20", "--guidance=3", f"--out={again}"]
            + [f"--latents={out / 'noise.npy'}"]
            + [f"--prompt={p}" for p in prompts]
        )
        == 0
    )
    np.testing.assert_array_equal(np.load(again / "latents.npy"), np.load(out / "latents.npy"))


def metrics_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """(workdir of an uninterrupted full run, its config, the pairs folder)"""
    config, folder = made
    workdir = tmp_path_factory.mktemp("trained")
    train(config, workdir, folder)
    return workdir, config, folder


def test_training_passes_through_its_phases(trained):
    workdir, _, _ = trained
    rows = metrics_of(workdir)
    assert [row["images"] for row in rows] == [8, 16, 24, 32, 40, 48]
    assert ["loss_discriminator" in row for row in rows] == [False, False, True, True, True, True]
    assert ["loss_adversarial" in row for row in rows] == [False, False, False, True, True, True]
    assert all(np.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    page, status = (workdir / "report.html").read_text(), json.loads((workdir / "status.json").read_text())
    assert 'class="state finished"' in page
    assert [(status[key]) for key in ("state", "done", "total", "unit")] == ["finished", 48, 48, "images"]
    assert 0.1 < status["memory"]["host"] < 100
    assert [p.name for p in sorted((workdir / "samples").glob("images_*.png"))] == [
        "images_00000024.png",
        "images_00000048.png",
    ]


def test_a_run_that_was_killed_at_its_last_pictures_draws_them(trained, tmp_path):
    workdir, config, folder = trained
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    (again / "samples" / "gallery.json").unlink()
    train(config, again, folder)
    assert files(again / "samples" / "walk_noise") == files(workdir / "samples" / "walk_noise")
    assert (again / "samples" / "gallery.json").read_text() == (workdir / "samples" / "gallery.json").read_text()


def test_a_run_ends_with_walks_and_nearest_pairs(trained):
    workdir, _, _ = trained
    data = json.loads((workdir / "samples" / "gallery.json").read_text())
    prompts, noise = ([pixels(workdir / file) for file in walk["images"]] for walk in data["walks"])
    rows = data["nearest"]["rows"]
    # All three begin with the first caption and the first held-out noise, and the walks lead elsewhere.
    for other in (noise[0], pixels(workdir / rows[0]["image"])):
        np.testing.assert_array_equal(prompts[0], other)
    for walk in (prompts, noise):
        steps = [np.abs(a.astype(int) - b).mean() for a, b in itertools.pairwise(walk)]
        assert np.abs(walk[-1].astype(int) - walk[0]).mean() > max(steps) > 0  # and do not jump there
    assert (data["images"], data["nearest"]["pairs"], len(rows)) == (48, 18, 8)
    for row in rows:
        distances = [near["distance"] for near in row["neighbours"]]
        assert 0 < distances[0] <= distances[1] <= distances[2]
    beside = data["teacher"]
    assert (beside["by"], beside["pairs"]) == ("LatentLPIPS", 2)
    assert beside["rows"][0]["distance"] >= beside["rows"][-1]["distance"] > 0
    page = (workdir / "report.html").read_text()
    assert '<section id="walks">' in page
    assert '<section id="beside">' in page
    assert '<section id="nearest">' in page


@pytest.mark.slow
def test_resumed_equals_uninterrupted_to_the_bit(trained, tmp_path):
    """Stopped after a checkpoint with metrics written past it, as a kill leaves them; same parameters, same metrics."""
    workdir, config, folder = trained
    shorter = copy.deepcopy(config)
    shorter.train.images = 24
    train(shorter, tmp_path, folder)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"run": "digits", "images": 32, "seconds": 1.0, "loss_regression": 99.0}\n{"run": "dig')
    train(config, tmp_path, folder)
    assert_same_run(workdir, tmp_path)


# Trains as the test says, and is killed when the step that ends at a certain image is done. Nothing runs after SIGKILL.
KILLED = """
import os, pickle, signal, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 2)
from d2g_jax.train import journal, loop, train
class Killed(journal.Journal):
    def add(self, images, metrics):
        super().add(images, metrics)
        if images == int(sys.argv[4]):
            self._checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
loop.Journal = Killed
train(pickle.load(open(sys.argv[1], "rb")), Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "kept", "killed"), [(6, 3, 5), (40, 20, 37)])
def test_killed_equals_uninterrupted_to_the_bit(steps, kept, killed, trained, tmp_path):
    """`kill -9` in the middle of a line's steps, then the same command: parameters, optimisers, EMA, data, metrics."""
    _, config, folder = trained
    config = copy.deepcopy(config)
    config.train.log_every = 16  # so that a checkpoint after an odd number of steps falls between two lines
    config.train.update(images=8 * steps, checkpoint_every=8 * kept)
    train(config, tmp_path / "whole", folder)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    command = [sys.executable, "-c", KILLED, tmp_path / "config.pickle", tmp_path / "killed", folder, str(8 * killed)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row["images"] for row in metrics_of(tmp_path / "killed")] == list(range(16, 8 * killed, 16))
    with Checkpoints(tmp_path / "killed" / "checkpoints") as checkpoints:
        assert checkpoints.all() == [8 * kept]
        metadata = checkpoints.metadata()
    found = (metadata["images"], metadata["step"], metadata["config_hash"])
    assert found == (8 * kept, kept, runs.config_hash(config))
    assert [images for images, _ in metadata["since_last_line"]] == ([8 * kept] if kept % 2 else [])
    train(config, tmp_path / "killed", folder)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def assert_same_run(workdir, tmp_path):
    whole, resumed = saved.arrays(workdir), saved.arrays(tmp_path)
    assert whole.keys() == resumed.keys()
    assert sum(value.size for value in whole.values()) > 400_000
    for path, value in whole.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)
    assert metrics_of(tmp_path) == metrics_of(workdir)


def test_corrupt_records_stop_training_or_are_skipped_and_counted(trained, tmp_path, caplog):
    _, config, folder = trained
    copied = tmp_path / pairs.FOLDER
    shutil.copytree(folder, copied)
    file, offset = copied / records.shard_name(1, 3), records.PairSource(copied).offset(9)
    data = bytearray(file.read_bytes())
    data[offset + 60] ^= 1
    file.write_bytes(data)
    config = copy.deepcopy(config)
    config.train.images = 16
    with pytest.raises(UserError, match=f"{file.name}: corrupt record at byte {offset} .*--repair"):
        train(config, tmp_path / "stops", copied)
    config.train.skip_corrupt = True
    train(config, tmp_path / "skips", copied)
    assert [row["corrupt_records"] for row in metrics_of(tmp_path / "skips")] == [1, 1]
    assert "1 corrupt records were skipped" in caplog.text


def test_student_draws_in_one_step(trained, tmp_path, capsys):
    workdir, _, _ = trained
    command = ["sample", f"--model={workdir}", "--prompt=a thin 4", "--images=3", f"--out={tmp_path}"]
    assert main(command) == 0
    assert set(json.loads(capsys.readouterr().out)["seconds"]) == {"load", "compile", "text", "unet", "vae"}
    assert pixels(tmp_path / "00002.png").shape == (64, 64, 3)
    assert main([*command, "--steps=4"]) == 2
    assert "one-step student" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("adversary", [False, True])
def test_every_job_on_sdxl(adversary, tiny_sdxl, tmp_path):
    """Two text towers, pooled text and image sizes, from prompts to a drawn image: pairs, G, D, R1, sampling."""
    config = small_config()
    with config.unlocked():
        config.pipeline, config.loss.name = str(tiny_sdxl), "mse"
        config.pairs.update({"prompts": str(tmp_path / "prompts.txt"), "count": 8, "steps": 2, "solver": "euler"})
        config.train.update({"images": 16, "sample_every": 16, "checkpoint_every": 16})
        config.adversarial.update({"start_images": 0, "warmup_images": 0, "r1_interval": 1})
        if not adversary:
            config.adversarial.weight = 0.0
        config.discriminator.head_channels = 8
    (tmp_path / "prompts.txt").write_text("the cat\nthe dog\n")
    folder = pairs.make_pairs(config, tmp_path)
    source = records.PairSource(folder)
    assert source.manifest.solver == "euler"
    assert source[0]["input_ids"].shape == (32,)  # both tokenizers'
    train(config, tmp_path, folder)
    rows = metrics_of(tmp_path)
    adversarial = {"loss_adversarial", "loss_discriminator", "loss_r1"}
    assert rows[-1].keys() & adversarial == (adversarial if adversary else set())
    assert np.isfinite(rows[-1]["loss_regression"])
    out = tmp_path / "drawn"
    command = ["sample", f"--model={tmp_path}", "--prompt=the cat", "--height=64", f"--out={out}", "--dtype=bfloat16"]
    assert main(command) == 0
    assert pixels(out / "00000.png").shape == (64, 32, 3)
    assert np.load(out / "latents.npy").shape == (1, 4, 16, 8)
    assert main([*command, "--width=61"]) == 2


def test_a_workdir_of_another_config_is_refused(trained):
    workdir, config, folder = trained
    other = copy.deepcopy(config)
    other.adversarial.weight = 0.5
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"adversarial\.weight=0\.1.*0\.5"):
        train(other, workdir, folder)
    assert (workdir / "config.json").read_bytes() == before


def test_a_checkpoint_of_another_config_is_refused(trained, tmp_path):
    """A folder of checkpoints under another workdir, where no config.json tells."""
    workdir, config, folder = trained
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    other = copy.deepcopy(config)
    other.optimizer.generator.learning_rate = 1.0
    with pytest.raises(UserError, match=r"checkpoints: holds a run with optimizer\.generator\.learning_rate=0\.001 "):
        train(other, tmp_path, folder)


def poisoned_at(*numbers):
    """In place of `loop.read_batches`: the batches of these numbers have NaN for latents."""
    read = loop.read_batches

    def poisoned(config, source, mesh, images):
        for number, batch in enumerate(read(config, source, mesh, images), start=images // 8):
            yield {**batch, "latents": np.full_like(batch["latents"], np.nan)} if number in numbers else batch

    return poisoned


def test_a_nan_stops_training_with_the_state_before_it(trained, tmp_path, monkeypatch, capsys):
    """The step and its terms are named in the message, the metrics and the report; the checkpoint is that of before."""
    _, config, folder = trained
    config = copy.deepcopy(config)
    config.train.log_every = config.train.checkpoint_every = 48
    monkeypatch.setattr(loop, "read_batches", poisoned_at(3))
    problem = r"the generator's update of step 4 \(images 24 to 32\): .*loss_regression.* not finite"
    with pytest.raises(UserError, match=problem + ".*checkpoint 24.*--config.train.skip_nonfinite=1"):
        train(config, tmp_path, folder)
    (row,) = metrics_of(tmp_path)
    assert row["images"] == 32
    assert "loss_discriminator" not in row["problem"]
    assert "stopped: the generator&#39;s update of step 4" in (tmp_path / "report.html").read_text()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.all() == [24]


@pytest.mark.slow
def test_after_a_nan_good_data_lead_where_an_undisturbed_run_ends(trained, tmp_path, monkeypatch):
    """The same command; nothing of the bad step is in the checkpoint."""
    workdir, config, folder = trained
    with monkeypatch.context() as patch:
        patch.setattr(loop, "read_batches", poisoned_at(3))
        with pytest.raises(UserError, match="not finite"):
            train(config, tmp_path, folder)
    train(config, tmp_path, folder)
    whole, resumed = saved.arrays(workdir), saved.arrays(tmp_path)
    for path, value in whole.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)


@pytest.mark.slow
def test_bad_updates_may_be_left_out(trained, tmp_path, monkeypatch, capsys):
    _, config, folder = trained
    config = copy.deepcopy(config)
    config.train.skip_nonfinite, config.adversarial.weight, config.train.log_every = 1, 0.0, 24
    monkeypatch.setattr(loop, "read_batches", poisoned_at(1, 4))
    train(config, tmp_path, folder)
    first, second = metrics_of(tmp_path)
    assert [text.split(" (")[0] for text in first["left_out"] + second["left_out"]] == [
        "the generator's update of step 2",
        "the generator's update of step 5",
    ]
    assert np.isfinite(first["loss_regression"])
    assert capsys.readouterr().err.count("d2g: left out the generator's update") == 2
    assert all(np.isfinite(value).all() for value in saved.arrays(tmp_path).values())
    assert "Updates left out" in (tmp_path / "report.html").read_text()


def test_an_unknown_metric_to_keep_the_best_by(trained, tmp_path):
    _, config, folder = trained
    config = copy.deepcopy(config)
    config.train.keep_best = "loss"
    with pytest.raises(UserError, match=r"train\.keep_best='loss' .* loss_regression"):
        train(config, tmp_path, folder)


def test_pairs_that_do_not_fit_the_teacher_are_refused(made, tmp_path):
    config, folder = made
    copied = tmp_path / pairs.FOLDER
    shutil.copytree(folder, copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["scaling_factor"] *= 2
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="scaling_factor"):
        train(config, tmp_path / "run", copied)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.groups", 3, "groups"),
        ("train.batch_size", 9, "batch_size"),
        ("loss.name", "l7", "l7"),
        ("loss.preset", "xyz", "xyz"),
        ("mesh.fsdp", 3, "mesh.fsdp"),
        ("generator.timestep", 1000, "generator.timestep"),
        ("discriminator.timestep", 5000, "discriminator.timestep=5000; the schedule has 0 to 999"),
    ],
)
def test_bad_training_settings(made, tmp_path, key, value, message):
    config, folder = copy.deepcopy(made[0]), made[1]
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        train(config, tmp_path, folder)
    assert not (tmp_path / "checkpoints").exists()


def test_missing_model_and_bad_latents(tmp_path, capsys):
    assert main(["sample", f"--model={tmp_path}", "--prompt=1", f"--out={tmp_path}"]) == 2
    assert "neither a pipeline folder" in capsys.readouterr().err
    np.save(tmp_path / "wrong.npy", np.zeros((1, 3, 8, 8), np.float32))
    command = ["sample", f"--model={WEIGHTS / 'pipeline'}", "--prompt=1", f"--out={tmp_path / 'out'}"]
    assert main([*command, f"--latents={tmp_path / 'wrong.npy'}"]) == 2
    assert "shape (1, 3, 8, 8); this model and 1 prompts need (1, 4, any, any)" in capsys.readouterr().err
    assert main([*command, "--steps=0"]) == 2
    assert main(["sample", f"--model={WEIGHTS / 'pipeline'}", f"--out={tmp_path / 'out'}"]) == 2
    assert not (tmp_path / "out").exists()
