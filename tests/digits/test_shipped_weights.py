"""What ships with the world: a judge that is right, and a metric that prefers a sharp texture to a flat patch."""

import jax
import numpy as np
import pytest

from d2g_jax.digits import scenes
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.digits.judge import judge, load_judge
from d2g_jax.inputs.images import to_floats
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.hub import NETWORKS
from d2g_jax.teacher.judge import accuracy
from d2g_jax.teacher.metric import prefers_sharp_textures


@pytest.fixture(scope="module")
def encode():
    """Images in [-1, 1] to scaled latents: the posterior's mean."""
    pipeline = Pipeline.load(WEIGHTS / "pipeline", without=[name for name in NETWORKS if name != "vae"])
    means = jax.jit(lambda images: pipeline.vae.apply(pipeline.params["vae"], images, method="encode")[0])
    return lambda images: pipeline.scaling_factor * np.asarray(means(images))


def test_the_judge_is_right_about_digits_that_it_has_never_seen():
    found = accuracy(load_judge(WEIGHTS / "judge.safetensors"), scenes.render(400, 7, test=True))
    assert min(found[name] for name in ("ink", "texture", "dark", "light")) > 0.99
    assert found["digit"] > 0.95
    assert min(found["weight"], found["slant"]) > 0.88


def test_an_image_is_judged_alike_alone_and_among_many():
    """Few images are padded less than many."""
    params, images = load_judge(WEIGHTS / "judge.safetensors"), scenes.render(300, 7, test=True).images
    features, labels = judge(params, images)
    for one in (slice(0, 1), slice(0, 3), slice(249, 260)):
        found = judge(params, images[one])
        np.testing.assert_allclose(found[0], features[one], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found[1], labels[one])


def test_the_metric_prefers_a_sharp_texture_of_another_phase_to_a_flat_patch_of_the_right_mean(encode):
    assert prefers_sharp_textures(LatentLPIPS.load(WEIGHTS / "metric"), encode, 60, 11) > 0.95


def test_the_autoencoder_returns_what_it_was_given(encode):
    images = to_floats(scenes.render(32, 9, test=True).images)
    pipeline = Pipeline.load(WEIGHTS / "pipeline", without=[name for name in NETWORKS if name != "vae"])
    latents = encode(images) / pipeline.scaling_factor
    again = pipeline.vae.apply(pipeline.params["vae"], latents, method="decode")
    assert np.mean(np.square(np.asarray(again) - images)) < 0.02  # 23 dB; edges take most of it
    assert np.std(latents * pipeline.scaling_factor) == pytest.approx(1, abs=0.05)


def test_everything_fits_in_twelve_megabytes():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 12e6
