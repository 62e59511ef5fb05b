"""`d2g ablate`: what it trains and keeps when it is stopped, extended or misused, and its table."""

import json
import re
import shutil

import pytest
from tiny import CONFIG

from d2g_jax import pairs
from d2g_jax.__main__ import main
from d2g_jax.ablate import job, table
from d2g_jax.ablate.rows import ABLATIONS
from d2g_jax.digits.config import WEIGHTS, get_config

DISCRIMINATOR, LOSSES = map(ABLATIONS.__getitem__, ("discriminator", "losses"))

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
    "--config.train.log_every=8",
    "--config.adversarial.start_images=16",
    "--config.adversarial.warmup_images=8",
    "--config.adversarial.r1_interval=2",
    "--config.optimizer.generator.warmup_images=16",
    "--config.optimizer.discriminator.warmup_images=16",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of pairs, with a manifest and no records: the students here are not really trained."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs.job.load_teacher(get_config()).manifest.write(folder)
    return folder


class Judge:
    """Stands for the digits' judge: the figures say which student it was."""

    floor, protocol = 2.5, {"noise": "held out"}

    def __init__(self, config, workdir, pairs_folder):
        pass

    def score(self, student):
        row, seed = student.parent.name, int(student.name.removeprefix("seed"))
        return {"frechet_to_teacher": len(row) + seed / 2, "accuracy_all": 0.9}


@pytest.fixture
def trained(monkeypatch):
    """What was trained, in order, and what stands for training: its `stop` is Ctrl-C after so many students."""
    made = []

    def train(config, workdir, pairs_folder):
        if len(made) == train.stop:
            raise KeyboardInterrupt
        made.append((config.name, config.seed))
        workdir.mkdir(parents=True)
        speed = 100.0 if config.loss.name == "mse" else 50.0
        lines = [{"images": n, "seconds": n / speed} for n in range(512, config.train.images + 1, 512)]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    train.stop = None
    monkeypatch.setattr(job, "train", train)
    monkeypatch.setattr(job, "StudentJudge", Judge)
    monkeypatch.setattr(job, "_forget_programs", lambda: None)
    return made, train


def ablate(name, workdir, folder, *flags):
    return main(["ablate", name, f"--workdir={workdir}", f"--pairs={folder}", *flags])


def test_a_stopped_ablation_goes_on_with_what_is_missing(trained, folder, tmp_path, capsys):
    made, train = trained
    train.stop = len(LOSSES.rows) + 2
    assert ablate("losses", tmp_path, folder) == 130
    partial = json.loads((tmp_path / "ablation.json").read_text())
    assert partial["complete"] is False
    assert partial["rows"][1]["figures"]["frechet_to_teacher"]["seeds"] == {"0": 12.0, "1": 12.5}
    assert partial["rows"][2]["figures"]["frechet_to_teacher"]["standard_deviation"] is None
    first = (tmp_path / "figures" / "mse-seed0.json").read_bytes()
    train.stop = None
    assert ablate("losses", tmp_path, folder) == 0
    assert made == [(row.name, seed) for seed in (0, 1, 2) for row in LOSSES.rows]
    assert (tmp_path / "figures" / "mse-seed0.json").read_bytes() == first
    result = json.loads((tmp_path / "ablation.json").read_text())
    assert result["complete"] is True
    assert result["seeds"] == [0, 1, 2]
    mse = result["rows"][0]
    assert mse["changes"] == {"loss.name": "mse", "adversarial.weight": 0.0, "loss.l1_weight": 0.0}
    assert mse["figures"]["frechet_to_teacher"] == {
        "mean": 3.5, "standard_deviation": 0.5, "lowest": 3.0, "highest": 4.0, "seeds": {"0": 3.0, "1": 3.5, "2": 4.0},
    }  # fmt: skip
    assert mse["figures"]["images_per_second"]["mean"] == 100.0
    assert result["environments"][0]["jax"]
    out = capsys.readouterr().out
    assert "| MSE | 3.50 ± 0.50 | 0.900 ± 0.000 | 100.0 ± 0.0 | 110.55 | 0.222 | 138.4 |" in out
    assert "| E-LatentLPIPS | 14.50 ± 0.50 | 0.900 ± 0.000 | 50.0 ± 0.0 | 22.95 | 0.299 | – |" in out
    assert "not comparable" in out
    assert "d2g evaluate" not in out


def test_more_seeds_are_added_and_fewer_shown(trained, folder, tmp_path, capsys):
    made, _ = trained
    assert ablate("discriminator", tmp_path, folder, "--seeds=5") == 0
    out = capsys.readouterr().out
    assert "| + diffusion D | 13.50 | 0.900 | 50.0 | 12.04 | 0.300 |" in out
    assert "seed 5 alone, no spread" in out
    assert ablate("discriminator", tmp_path, folder, "--seeds=5,3") == 0
    assert made == [(row.name, seed) for seed in (5, 3) for row in DISCRIMINATOR.rows]
    assert ablate("discriminator", tmp_path, folder, "--seeds=3") == 0
    assert len(made) == 12
    assert json.loads((tmp_path / "ablation.json").read_text())["seeds"] == [3]


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("discriminator", "--config.seed=0", r"job='ablate losses' \(this one has 'ablate discriminator'\)"),
        ("losses", "--config.train.images=8192", r"config\.train\.images=4096 \(this one has 8192\)"),
        ("losses", "--config.evaluation.samples=100", r"config\.evaluation\.samples=1000 \(this one has 100\)"),
    ],
)
def test_a_workdir_of_something_else_is_refused(name, flag, message, trained, folder, tmp_path, capsys):
    made, _ = trained
    assert ablate("losses", tmp_path, folder, "--seeds=0") == 0
    before = (tmp_path / "ablation.json").read_bytes()
    assert ablate(name, tmp_path, folder, "--seeds=0", flag) == 2
    assert re.search(message, capsys.readouterr().err)
    assert (tmp_path / "ablation.json").read_bytes() == before
    assert len(made) == len(LOSSES.rows)


def test_figures_of_another_student_are_refused(trained, folder, tmp_path, capsys):
    assert ablate("losses", tmp_path, folder, "--seeds=0") == 0
    file = tmp_path / "figures" / "lpips-seed0.json"
    file.write_text((tmp_path / "figures" / "mse-seed0.json").read_text())
    assert ablate("losses", tmp_path, folder, "--seeds=0") == 2
    assert f"{file}: of a student with another config" in capsys.readouterr().err
    file.write_text("{")
    assert ablate("losses", tmp_path, folder, "--seeds=0") == 2
    assert f"{file}: not the figures of a student" in capsys.readouterr().err


def test_another_teacher_is_timed_and_its_judging_left_to_evaluate(trained, folder, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from d2g_jax.digits.config import get_config as digits\n"
        "def get_config():\n"
        "    c = digits().unlock()\n"
        "    del c.evaluation\n"
        "    return c\n"
    )
    workdir = tmp_path / "run"
    assert ablate("losses", workdir, folder, "--seeds=0", f"--config={config}") == 0
    out = capsys.readouterr().out
    assert "| loss | img/s | published: FID | published: CLIP | published: img/s |" in out
    commands = [line for line in out.splitlines() if line.startswith("d2g evaluate ")]
    students = [line.split("--model=")[1].split()[0] for line in commands]
    assert students == [f"{workdir}/students/{row.name}/seed0" for row in LOSSES.rows]
    assert "floor" not in json.loads((workdir / "ablation.json").read_text())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["losses", "--seeds=1,1"], "'1,1': give different numbers"),
        (["losses", "--seeds=0,x"], "such as 0,1,2"),
        (["augmentations"], "invalid choice: 'augmentations'"),
        ([], "NAME"),
        (["losses", "--pairs=nowhere"], "nowhere"),
        (["losses", "--config.pairs.guidance_scale=4.0"], "guidance_scale=3.0; give --config.pairs.guidance_scale=3.0"),
        (["discriminator", "--config.adversarial.r1_gamma=0.0"], "adversarial.r1_gamma is 0.0"),
        (["losses", "--config.loss.lpips=nowhere"], "nowhere"),
    ],
)
def test_bad_flags_end_with_one_line(flags, message, trained, folder, tmp_path, capsys):
    given = [] if any(flag.startswith("--pairs") for flag in flags) else [f"--pairs={folder}"]
    assert main(["ablate", *flags, f"--workdir={tmp_path}", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert trained[0] == []


def test_images_that_are_no_digits_are_refused_before_any_work(tmp_path, capsys):
    shutil.copytree(WEIGHTS / "pipeline", tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": 4}))
    command = ["ablate", "losses", f"--workdir={tmp_path / 'run'}", f"--config.pipeline={tmp_path / 'pipeline'}"]
    assert main(command) == 2
    assert "draws 16x16 pixels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_spread_of_known_numbers():
    assert table.spread({0: 1.0, 4: 4.0}) == {
        "mean": 2.5, "standard_deviation": pytest.approx(4.5**0.5), "lowest": 1.0, "highest": 4.0,
        "seeds": {"0": 1.0, "4": 4.0},
    }  # fmt: skip
    assert table.spread({0: 1.0})["standard_deviation"] is None


@pytest.mark.slow
@pytest.mark.parametrize("ablation", [LOSSES, DISCRIMINATOR], ids=lambda a: a.name)
def test_every_student_is_trained_and_judged(ablation, tmp_path, capsys):
    command = ["ablate", ablation.name, f"--workdir={tmp_path}", "--seeds=0", *SMALL]
    assert main(command) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "ablation.json").read_text())
    assert result["complete"] is True
    assert [row["name"] for row in result["rows"]] == [row.name for row in ablation.rows]
    distances = [row["figures"]["frechet_to_teacher"]["mean"] for row in result["rows"]]
    assert len(set(distances)) == len(distances)
    assert all(row["figures"]["images_per_second"]["mean"] > 0 for row in result["rows"])
    for row in ablation.rows:
        lines = (tmp_path / "students" / row.name / "seed0" / "metrics.jsonl").read_text().splitlines()
        names, off = {name for line in lines for name in json.loads(line)}, dict(row.changes)
        assert ("loss_adversarial" in names) == ("adversarial.weight" not in off)
        assert ("loss_r1" in names) == ("adversarial.weight" not in off and "adversarial.r1_gamma" not in off)
        assert any(name.startswith("logit_gap") for name in names) == (row.name == "mix_and_match")
    assert main(command) == 0
    assert capsys.readouterr().out == printed
