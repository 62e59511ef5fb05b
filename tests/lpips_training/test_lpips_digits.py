"""`train_lpips` on real images and a trained VAE: scikit-learn's digits as files, stopped and resumed."""

import os
import signal

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from d2g_jax.digits import data, distortions
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.lpips_training import calibrate, classify
from d2g_jax.lpips_training.job import train_lpips
from d2g_jax.runtime.interrupt import Terminated
from d2g_jax.teacher.metric import TRUNK


def save(image, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round((image + 1) * 127.5).astype(np.uint8)).save(file)


def write_class_folders(digits, folder):
    for i, (image, label) in enumerate(zip(digits.images, digits.labels, strict=True)):
        save(image, folder / f"digit{label}" / f"{i:04d}.png")


def write_triplets(triplets, folder):
    """One kind of the data set's `train` or `val`."""
    (folder / "judge").mkdir(parents=True)
    for i, (reference, left, right, judgement) in enumerate(zip(*triplets, strict=True)):
        for side, image in (("ref", reference), ("p0", left), ("p1", right)):
            save(image, folder / side / f"{i:06d}.png")
        np.save(folder / "judge" / f"{i:06d}.npy", np.array([judgement], np.float32))


@pytest.fixture
def config(shipped, tmp_path):
    """Ten classes of 1,437 + 360 images, 800 + 400 triplets, a narrow trunk, and a shorter recipe."""
    train, test = data.load()
    for part, digits, seed, count in (("train", train, 0, 800), ("val", test, 1, 400)):
        write_class_folders(digits, tmp_path / "images" / part)
        write_triplets(distortions.triplets(digits.images, seed, count), tmp_path / "2afc" / part / "distortions")
    changes = {
        "name": "digits",
        "pipeline": str(WEIGHTS / "pipeline"),
        "trunk": {"widths": TRUNK.widths},
        "images": {
            "train": str(tmp_path / "images" / "train"),
            "val": str(tmp_path / "images" / "val"),
            "cache": str(tmp_path / "cache"),
            "views": 1,  # of a 32-pixel image without resizing there is one crop, and a digit is no mirror image
            "size": data.SIZE,
            "resize": 0,
        },
        "classification": {
            "epochs": 6.0, "decay_epochs": 4.0, "batch_size": 64, "learning_rate": 0.02, "pool": 0, "hidden": (),
            "dtype": "float32", "save_every": 50,
        },
        "triplets": {"folder": str(tmp_path / "2afc"), "size": data.SIZE},
        "calibration": {"epochs": 20.0, "decay_epochs": 20.0, "learning_rate": 2e-3, "save_every": 50},
    }  # fmt: skip
    shipped.update(ConfigDict(changes))
    return shipped


def stop_at(step, original):
    """`sampled_rows` that asks the job to stop when it is called for `step`."""

    def sampled_rows(count, batch_size, seed, at):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(count, batch_size, seed, at)

    return sampled_rows


@pytest.mark.slow
def test_digits_from_files_stopped_and_resumed(config, tmp_path, monkeypatch):
    scores = train_lpips(config, tmp_path / "whole")
    assert scores["accuracy"] > 0.8
    assert scores["accuracy_images"] == 360
    before, after, bound = (
        scores[key]["distortions"] for key in ("2afc_without_calibration", "2afc", "2afc_of_judges")
    )
    assert 0.7 < before < after < bound
    for module, step in ((classify, 70), (calibrate, 90)):  # between two checkpoints
        with monkeypatch.context() as patch:
            patch.setattr(module, "sampled_rows", stop_at(step, module.sampled_rows))
            with pytest.raises(Terminated):
                train_lpips(config, tmp_path / "stopped")
    assert train_lpips(config, tmp_path / "stopped") == scores
    for name in ("metric/metric.safetensors", "classification/classifier.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
