"""`d2g teacher` from nothing, every stage too short to be any good: the files, and going on where it stopped."""

import pytest

from d2g_jax.__main__ import main
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.pipeline.folder import Pipeline

SHORT = [
    "--config.teacher.autoencoder.steps=3",
    "--config.teacher.denoiser.steps=3",
    "--config.teacher.denoiser.caption_variants=1",
    "--config.teacher.metric.trunk.steps=3",
    "--config.teacher.metric.trunk.rounds=1",
    "--config.teacher.metric.heads.steps=3",
    "--config.teacher.metric.heads.triplets=100",
]


@pytest.mark.slow
def test_every_file_of_the_package_data_is_made_and_kept(tmp_path):
    """Three minutes: the classifier is trained whole."""
    command = ["teacher", f"--workdir={tmp_path}", *SHORT]
    assert main(command) == 0
    pipeline, shipped = Pipeline.load(tmp_path / "pipeline"), Pipeline.load(WEIGHTS / "pipeline")
    assert pipeline.unet.config == shipped.unet.config
    assert pipeline.latent_shape == shipped.latent_shape
    LatentLPIPS.load(tmp_path / "metric")
    shipped_prompts = (WEIGHTS / "prompts.txt").read_text()
    assert (tmp_path / "prompts.txt").read_text() == shipped_prompts
    ours = {file.relative_to(WEIGHTS) for file in WEIGHTS.rglob("*") if file.is_file()}
    assert all((tmp_path / name).is_file() for name in ours), ours
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == before
