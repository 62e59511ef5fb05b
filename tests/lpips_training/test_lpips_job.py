"""`train_lpips` from files to a metric folder, stopped and resumed; the shipped config; the digits' metric."""

import itertools
import json
import os
import signal

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.lpips_training import calibrate, classify
from d2g_jax.lpips_training import job as jobs
from d2g_jax.lpips_training.job import train_lpips
from d2g_jax.models import vgg
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.interrupt import Terminated
from d2g_jax.runtime.lock import locked


@pytest.fixture
def config(shipped, pipeline, class_folders, triplet_folder):
    """The shipped config with everything made small."""
    changes = {
        "name": "tiny",
        "pipeline": str(pipeline),
        "trunk": {"widths": (4, 4, 4, 4, 8), "convs": (1, 1, 1, 1, 1)},
        "images": {"train": str(class_folders), "held_out": 0.3, "size": 16, "resize": 16, "views": 2},
        "encoder": {"batch_size": 4},
        "classification": {
            "epochs": 4.0, "batch_size": 6, "learning_rate": 0.02, "pool": 2, "hidden": (8,), "save_every": 3,
            "dtype": "float32",
        },
        "triplets": {"folder": str(triplet_folder), "size": 16},
        "calibration": {"epochs": 2.0, "decay_epochs": 1.0, "batch_size": 4, "save_every": 3},
    }  # fmt: skip
    shipped.update(ConfigDict(changes))
    return shipped


def files(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "metric").iterdir())}


def at_call(number, action, function):
    """`function`, whose call `number` (the first is 1) does `action` before."""
    calls = itertools.count(1)

    def counted(*arguments):
        if next(calls) == number:
            action()
        return function(*arguments)

    return counted


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    raise KeyboardInterrupt


def test_job_makes_a_metric_and_resumes(config, tmp_path, monkeypatch):
    config.images.cache = str(tmp_path / "cache")
    scores = train_lpips(config, tmp_path / "whole")
    assert scores == json.loads((tmp_path / "whole" / "metric" / "scores.json").read_text())
    assert 0 <= scores["accuracy"] <= 1
    assert scores["accuracy_images"] == 5
    for name in ("2afc", "2afc_without_calibration", "2afc_of_judges"):
        assert scores[name].keys() == {"noise", "tint"}
        assert all(0 <= value <= 1 for value in scores[name].values())
    assert scores["2afc_of_judges"] == {"noise": 1.0, "tint": 1.0}
    metric = LatentLPIPS.load(tmp_path / "whole" / "metric")
    assert (metric.space.name, metric.space.scale, metric.space.channels) == ("tiny", 0.5, 4)
    latents = np.random.default_rng(0).normal(size=(2, 2, 8, 8, 4)).astype(np.float32)
    assert (np.asarray(metric.distance(*latents, scaled=True)) > 0).all()
    assert not (tmp_path / "whole" / "classification" / "checkpoint.safetensors").exists()

    # Stopped once in each stage, and in front of the triplets, the same command ends with the same bytes.
    for module, name, call, stop in (
        (classify, "sampled_rows", 4, ask_to_stop),
        (jobs.TripletFolder, "patches", 5, interrupt),
        (calibrate, "sampled_rows", 5, ask_to_stop),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, at_call(call, stop, getattr(module, name)))
            with pytest.raises((Terminated, KeyboardInterrupt)):
                train_lpips(config, tmp_path / "stopped")
    assert train_lpips(config, tmp_path / "stopped") == scores
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    for name in ("metric/scores.json", "classification/accuracy.json"):  # as a copy that was cut short leaves them
        file = tmp_path / "stopped" / name
        file.write_bytes(file.read_bytes()[:9])
        with pytest.raises(UserError, match=rf"{name} cannot be read .*; remove it to"):
            train_lpips(config, tmp_path / "stopped")
        file.unlink()
    with locked(tmp_path / "whole"), pytest.raises(UserError, match=r"whole: in use by process"):
        train_lpips(config, tmp_path / "whole")
    config.classification.epochs = 5.0
    with pytest.raises(UserError, match=r"classification\.epochs=4\.0 \(this one has 5\.0\); choose another --workdir"):
        train_lpips(config, tmp_path / "whole")


def test_on_the_fly_with_samples(config, class_folders, tmp_path, monkeypatch):
    config.images.val = str(class_folders)
    config.classification.epochs = 1.0
    scores = train_lpips(config, tmp_path / "whole")
    assert scores["accuracy_images"] == 18
    with monkeypatch.context() as patch:
        patch.setattr(classify, "sampled_rows", at_call(2, ask_to_stop, classify.sampled_rows))
        with pytest.raises(Terminated):
            train_lpips(config, tmp_path / "stopped")
    assert train_lpips(config, tmp_path / "stopped") == scores
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "classification.learning_rate",
            1e30,
            r"classification: the loss is nan at step \d of 9; lower learning_rate in the section class",
        ),
        ("classification.learning_rate", float("nan"), r"classification\.learning_rate=nan; give a number above 0"),
        ("classification.save_every", 0, r"classification\.save_every=0; give a whole number from 1"),
        ("classification.dropout", 1.0, r"classification\.dropout=1\.0; give a share from 0 to below 1"),
        ("classification.hidden", (0,), r"classification\.hidden=0; give a whole number from 1"),
        ("calibration.decay_epochs", -1.0, r"calibration\.decay_epochs=-1\.0; give a number from 0"),
        ("calibration.batch_size", 5, r"calibration\.batch_size=5 is not a multiple of the 2 devices"),
        ("encoder.dtype", "half", r"encoder\.dtype='half' is unknown; choose one of float32, bfloat16"),
        ("images.posterior", "mode", r"images\.posterior='mode' is unknown; choose one of mean, sample"),
        ("images.size", 18, r"images\.resize=16 is less than images\.size=18"),
        ("triplets.size", 6, r"triplets\.size=6; this VAE and trunk need a multiple of 2 from 8 on"),
        ("trunk.widths", (4, 4), r"config\.trunk: widths, convs and pools must be lists of one length"),
        ("images.train", "", r"images\.train is empty; give a folder of class folders"),
        ("triplets.folder", "nowhere", r"nowhere/train: no such folder"),
        ("calibration.epochs", 0.0, r"calibration\.epochs=0\.0; give a number above 0"),
    ],
)
def test_bad_input_is_one_clear_line(config, tmp_path, key, value, message):
    section, name = key.split(".")
    with config.ignore_type():
        config[section][name] = value
    with pytest.raises(UserError, match=message) as caught:
        train_lpips(config, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_other_classes_in_the_held_out_images(config, class_folders, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("blue", "green"):
        (other / name).symlink_to(class_folders / "blue")
    config.images.val = str(other)
    with pytest.raises(UserError, match="other: its classes are not those of"):
        train_lpips(config, tmp_path / "run")


def test_caches_of_other_classes_without_their_images(config, tmp_path):
    config.images.cache = str(tmp_path / "cache")
    config.classification.epochs = 0.1
    train_lpips(config, tmp_path / "run")
    made_from = tmp_path / "cache" / "val" / "made_from.json"
    made_from.write_text(made_from.read_text().replace('"red"', '"green"'))
    config.images.train = ""
    with pytest.raises(UserError, match="cache: train and val are of other classes"):
        train_lpips(config, tmp_path / "alone")


def test_shipped_config_is_the_published_topology(shipped):
    c = shipped
    assert vgg.VGGConfig.from_json(c.trunk.to_dict(), source="config") == vgg.VGGConfig()
    assert c.is_locked
    head = classify.Head(1000, c.classification.pool, tuple(c.classification.hidden), c.classification.dropout)
    shapes = jax.tree.leaves(classify.abstract(vgg.VGGConfig(), head, (64, 64, 4)))
    statistics = 2 * 4224  # running means and variances are no parameters
    total = sum(int(np.prod(leaf.shape)) for leaf in shapes) - statistics
    assert abs(total / 1e6 - 138.4) < 0.05  # 138.4 M parameters, as measured on the released classifier
