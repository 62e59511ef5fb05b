"""The demo end to end at a size that proves its plumbing, and its arithmetic at known values."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import CONFIG, get_config

from d2g_jax.__main__ import main
from d2g_jax.demo import demo, evaluation
from d2g_jax.digits import scenes
from d2g_jax.report.status import read_status
from d2g_jax.runtime import runs
from d2g_jax.train import job

SMALL = (
    CONFIG,
    "--config.pairs.count=72",
    "--config.pairs.records_per_shard=36",
    "--config.pairs.steps=2",
    "--config.pairs.batch_size=36",
    "--config.evaluation.samples=72",
    "--config.evaluation.batch_size=36",
    # What decides about the compiled programs is as in test_jobs.py, so that they come from the cache.
    "--config.train.images=48",
    "--config.train.batch_size=8",
    "--config.train.log_every=16",
    "--config.adversarial.start_images=16",
    "--config.adversarial.warmup_images=8",
    "--config.adversarial.r1_interval=2",
    "--config.optimizer.generator.warmup_images=16",
    "--config.optimizer.discriminator.warmup_images=16",
)
TEACHER = "teacher, 2 steps"
pytestmark = pytest.mark.usefixtures("few_real_scenes")


def figures(workdir):
    """Everything of result.json but times."""
    result = json.loads((workdir / "result.json").read_text())
    return {name: result[name] for name in ("protocol", "systems", "floors", "checks")}


def stand_still(config, d, frozen, state, source, mesh, checkpoints, workdir, pipeline, page):
    """Stands for the training loop, which takes minutes to compile: the student is what the teacher was, saved."""
    images = config.train.images
    state = dataclasses.replace(state, images=state.images + images)
    metadata = {"name": config.name, "pipeline": config.pipeline, "timestep": d.timestep}
    checkpoints.save(state, {**metadata, "config": runs.to_json(config)})
    checkpoints.wait()
    line = {"run": config.name, "images": images, "seconds": 1.0, "loss_regression": 0.5}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a demo whose students learn nothing."""
    workdir = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "loop", stand_still)
        assert main(["demo", f"--workdir={workdir}", *SMALL]) == 0
    return workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a demo as it is."""
    workdir = tmp_path_factory.mktemp("trained")
    assert main(["demo", f"--workdir={workdir}", *SMALL]) == 0
    return workdir


def check_result(workdir):
    result = json.loads((workdir / "result.json").read_text())
    names = [evaluation.REAL, TEACHER, demo.ONE_STEP]
    names += [demo.STUDENTS[name] for name in ("mse", "e_latent_lpips", "full")]
    assert list(result["systems"]) == names
    for name, values in result["systems"].items():
        assert 0 <= values["accuracy"]["all"] <= values["accuracy"]["digit"] <= 1, name
        assert (values.get("unexplained") or 0) > 0 or name in (evaluation.REAL, TEACHER)
    assert result["systems"][TEACHER]["network_calls"] == 4
    assert result["systems"][demo.STUDENTS["full"]]["network_calls"] == 1
    assert set(result["seconds"]) >= {"pairs", "train mse", "train e_latent_lpips", "train full", "evaluate"}
    page = (workdir / "report.html").read_text()
    assert all(name in page for name in names)
    status = json.loads((workdir / "status.json").read_text())
    assert [status[key] for key in ("state", "done", "total", "unit")] == ["finished", 6, 6, "stages"]
    return result, page


def test_demo_writes_figures_of_every_system(finished):
    result, _ = check_result(finished)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == ["mse", "e_latent_lpips", "full"]
    # Each student was read from its own workdir, and all are the same teacher, asked for one step without guidance.
    mse, perceptual, full = (result["systems"][demo.STUDENTS[name]] for name in ("mse", "e_latent_lpips", "full"))
    assert mse == perceptual == full
    assert 1 < mse["frechet_to_teacher"] != result["systems"][demo.ONE_STEP]["frechet_to_teacher"]


@pytest.mark.slow
def test_a_demo_with_trained_students(trained):
    _, page = check_result(trained)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows] == ["mse"] * 3 + ["e_latent_lpips"] * 3 + ["full"] * 3
    assert page.count('<ol>\n<li><img class="small"') == 2 * 3  # walks of each student
    assert 'class="card timeline"><h3 class="name">full</h3>' in page
    assert "the one-step student (full, after 48 images)" in page


def test_the_same_command_again_changes_nothing(finished, capsys):
    before, seconds = figures(finished), (finished / "seconds.json").read_bytes()
    assert main(["demo", f"--workdir={finished}", *SMALL]) == 0
    assert figures(finished) == before
    assert (finished / "seconds.json").read_bytes() == seconds  # of the run that did the work
    assert "report.html" in capsys.readouterr().out


def test_another_config_is_refused(finished, capsys):
    before = (finished / "result.json").read_bytes()
    assert main(["demo", f"--workdir={finished}", *SMALL, "--config.pairs.guidance_scale=4.0"]) == 2
    assert "pairs.guidance_scale=3.0 (this one has 4.0)" in capsys.readouterr().err
    assert (finished / "result.json").read_bytes() == before


def test_what_only_the_last_student_s_training_refuses_is_refused_first(tmp_path, capsys):
    assert main(["demo", *SMALL, "--config.train.groups=8", f"--workdir={tmp_path / 'new'}"]) == 2
    assert "train.groups=8 is train.batch_size" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_page_follows_the_stages(tmp_path, monkeypatch):
    """With stages that do nothing but look at the status."""
    seen = []

    def look(*_):
        seen.append(read_status(tmp_path))

    def train(config, workdir, _):
        look()
        workdir.mkdir(parents=True)
        (workdir / "metrics.jsonl").write_text(json.dumps({"run": config.name, "images": 8, "loss": 1.0}) + "\n")

    def measure(config, workdir, pairs_folder, clock, *, full):
        for name in ("teacher samples", "evaluate"):
            with clock.stage(name):
                look()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.pairs, "make_pairs", look)
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        demo.demo(get_config(), tmp_path)
    stages = [f"train {name}, see students/{name}/report.html" for name in ("mse", "e_latent_lpips", "full")]
    assert [status.stage for status in seen] == ["pairs", *stages, "teacher samples", "evaluate"]
    assert [(status.state, status.done, status.total) for status in seen] == [("running", k, 6) for k in range(6)]
    page = (tmp_path / "report.html").read_text()
    assert "Stopped after 5 of 6 stages: interrupted." in page
    assert "e_latent_lpips" in page


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(trained, tmp_path):
    assert main(["demo", f"--workdir={tmp_path}", *SMALL]) == 0
    assert figures(tmp_path) == figures(trained)


def test_students_differ_in_their_loss_alone():
    configs = demo.student_configs(get_config(), full=True)
    assert list(configs) == list(demo.STUDENTS)
    assert {c.train.images for c in configs.values()} == {get_config().train.images}
    assert {c.seed for c in configs.values()} == {0}
    assert [c.loss.name for c in configs.values()] == ["mse", "pseudo_huber", "latent_lpips"] + ["e_latent_lpips"] * 2
    assert [bool(c.adversarial.weight) for c in configs.values()] == [False] * 4 + [True]


KINDS = {"teacher": "T", "mse": "M", "e_latent_lpips": "E", "full": "F"}


def system(distance, everything, parts, **figures):
    accuracy = {**dict.fromkeys(parts, 0.96), "all": everything}
    return {"frechet_to_teacher": distance, "frechet_to_real": 20.0, "accuracy": accuracy, **figures}


def test_checks_hold_values_to_their_bars():
    parts = scenes.PARTS
    systems = {"T": system(None, 0.9, parts), "M": system(12.0, 0.5, parts, unexplained=0.34, sharpness=0.6)}
    systems |= {"E": system(7.0, 0.8, parts), "F": system(4.4, 0.86, parts, sharpness=1.2)}
    systems["T"]["accuracy"]["texture"] = 0.89
    checks = evaluation.checks(evaluation.bars(systems, KINDS))
    missed = [check["name"] for check in checks if not check["met"]]
    assert len(checks) == 14
    assert missed == [
        "teacher: accuracy of texture at least 0.9",
        "E-LatentLPIPS student: Frechet distance over the MSE student's, at most 1/2",
        "full student: sharpness at most 1.15",
    ]


def test_real_against_real_is_near_zero_for_equal_halves():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 400)
    features = rng.standard_normal((4000, 4)) + labels[:, None]
    assert evaluation.real_against_real(features, labels) < 0.05
