"""`train_lpips` on real images and a trained VAE: scenes as files, in a class for each texture, stopped and resumed."""

import os
import signal

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from d2g_jax.digits import distortions, scenes
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.digits.textures import KINDS
from d2g_jax.lpips_training import calibrate, classify
from d2g_jax.lpips_training.job import train_lpips
from d2g_jax.runtime.interrupt import Terminated
from d2g_jax.teacher.metric import TRUNK


def save(image, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)


def write_class_folders(shown, folder):
    for i, (image, row) in enumerate(zip(shown.images, shown.labels, strict=True)):
        save(image, folder / KINDS[row[scenes.TEXTURE]] / f"{i:04d}.png")


def write_triplets(triplets, folder):
    """One kind of the data set's `train` or `val`."""
    (folder / "judge").mkdir(parents=True)
    for i, (reference, left, right, judgement) in enumerate(zip(*triplets, strict=True)):
        for side, image in (("ref", reference), ("p0", left), ("p1", right)):
            pixels = np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)
            save(pixels, folder / side / f"{i:06d}.png")
        np.save(folder / "judge" / f"{i:06d}.npy", np.array([judgement], np.float32))


@pytest.fixture
def config(shipped, tmp_path):
    """Six classes of 1,400 + 360 images, 800 + 400 triplets, a narrow trunk, and a shorter recipe."""
    for part, test, images, count in (("train", False, 1400, 800), ("val", True, 360, 400)):
        write_class_folders(scenes.render(images, 0, test=test), tmp_path / "images" / part)
        write_triplets(distortions.triplets(count, 1, test=test), tmp_path / "2afc" / part / "distortions")
    changes = {
        "name": "digits",
        "pipeline": str(WEIGHTS / "pipeline"),
        "trunk": {"widths": TRUNK.widths},
        "images": {
            "train": str(tmp_path / "images" / "train"),
            "val": str(tmp_path / "images" / "val"),
            "cache": str(tmp_path / "cache"),
            "views": 1,  # of an image without resizing there is one crop
            "size": scenes.SIZE,
            "resize": 0,
        },
        "classification": {
            "epochs": 6.0, "decay_epochs": 4.0, "batch_size": 64, "learning_rate": 0.02, "pool": 0, "hidden": (),
            "dtype": "float32", "save_every": 50,
        },
        "triplets": {"folder": str(tmp_path / "2afc"), "size": scenes.SIZE},
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
