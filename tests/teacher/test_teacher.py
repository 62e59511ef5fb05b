"""`d2g teacher` from nothing, every stage too short to be any good; and its pieces."""

import jax
import numpy as np
import optax
import pytest

from d2g_jax.__main__ import main
from d2g_jax.digits import config, distortions
from d2g_jax.digits.judge import load_judge
from d2g_jax.digits.scenes import UNCLEAR
from d2g_jax.digits.scores import prompt_accuracy, sharp_energy
from d2g_jax.digits.tokenizer import MODEL_MAX_LENGTH
from d2g_jax.losses.lpips import LPIPS
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.lpips_training.classify import cross_entropy
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.teacher.fit import long_recipe

SHORT = [
    "--config.teacher.scenes.count=300",
    "--config.teacher.scenes.plain=100",
    "--config.teacher.autoencoder.steps=3",
    "--config.teacher.text_tower.steps=3",
    "--config.teacher.denoiser.steps=3",
    "--config.teacher.denoiser.caption_variants=1",
    "--config.teacher.judge.steps=3",
    "--config.teacher.metric.trunk.steps=3",
    "--config.teacher.pixel_metric.trunk.steps=2",
    "--config.teacher.pixel_metric.heads.steps=3",
    "--config.teacher.pixel_metric.heads.triplets=1000",
    "--config.teacher.metric.heads.steps=3",
    "--config.teacher.metric.heads.triplets=1000",
]


@pytest.mark.slow
def test_every_file_is_made_and_kept(tmp_path):
    command = ["teacher", f"--workdir={tmp_path}", *SHORT]
    assert main(command) == 0
    pipeline, shipped = Pipeline.load(tmp_path / "pipeline"), Pipeline.load(config.WEIGHTS / "pipeline")
    assert pipeline.unet.config == shipped.unet.config
    assert pipeline.latent_shape == shipped.latent_shape == (16, 16, 4)
    assert pipeline.token_length == MODEL_MAX_LENGTH
    LatentLPIPS.load(tmp_path / "metric")
    LPIPS.load(tmp_path / "lpips")
    load_judge(tmp_path / "judge.safetensors")
    assert (tmp_path / "prompts.txt").read_text() == (config.WEIGHTS / "prompts.txt").read_text()
    ours = {file.relative_to(config.WEIGHTS) for file in config.WEIGHTS.rglob("*") if file.is_file()}
    assert all((tmp_path / name).is_file() for name in ours), ours
    (tmp_path / "pipeline" / "model_index.json").unlink()  # as if it had been stopped before the last file
    weights = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "training").glob("*/checkpoint.safetensors")}
    assert {file.parent.name for file in before} == {
        "autoencoder",
        "text_tower",
        "denoiser",
        "metric",
        "lpips",
        "judge",
    }
    assert main(command) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert {file: file.read_bytes() for file in weights} == weights


def test_a_longer_training_begins_as_a_shorter_one(tmp_path):
    """The rate is the same until the last fifth, which ends at zero."""
    rates = {}
    for steps in (1000, 2000):
        c = config.teacher().denoiser
        c.steps, c.weight_decay = steps, 0.0
        optimizer, params = long_recipe(c, tmp_path).optimizer, {"x": np.zeros(3, np.float32)}
        state, gradient = optimizer.init(params), {"x": np.full(3, 0.5, np.float32)}
        update = jax.jit(optimizer.update)
        sizes = []
        for _ in range(steps):
            change, state = update(gradient, state, params)
            sizes.append(float(optax.tree.norm(change)))
        rates[steps] = np.array(sizes)
    np.testing.assert_allclose(rates[1000][:800], rates[2000][:800], rtol=1e-4)
    assert rates[1000][-1] < 0.02 * rates[1000][700]


def test_cross_entropy_of_parts_is_that_of_each_alone_and_passes_over_what_is_unclear():
    logits = jax.random.normal(jax.random.key(0), (4, 5))
    labels = np.array([[0, 2], [1, -1], [-1, 0], [1, 1]])
    first = optax.softmax_cross_entropy_with_integer_labels(logits[[0, 1, 3], :2], labels[[0, 1, 3], 0]).mean()
    second = optax.softmax_cross_entropy_with_integer_labels(logits[[0, 2, 3], 2:], labels[[0, 2, 3], 1]).mean()
    np.testing.assert_allclose(cross_entropy(logits, labels, (2, 3)), first + second, rtol=1e-6)
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels[:, 0] * 0).mean()
    np.testing.assert_allclose(cross_entropy(logits, labels[:, 0] * 0), plain)


def test_triplets_of_the_world():
    made = distortions.triplets(60, 0, test=True)
    assert made.reference.shape == made.left.shape == made.right.shape == (60, 64, 64, 3)
    assert np.abs(made.reference).max() <= 1
    again = distortions.triplets(5, 0, test=True)
    np.testing.assert_array_equal(again.left, made.left[:5])
    texture = np.isclose(np.abs(made.judgement - 0.5), 0.45, atol=1e-6)
    assert 3 <= texture.sum() <= 25
    certain = np.isin(made.judgement, (0, 1))
    assert 12 <= certain.sum() <= 40


@pytest.mark.parametrize("kind", range(len(distortions.KINDS)), ids=[f.__name__ for f, _ in distortions.KINDS])
def test_strength_zero_is_nothing_and_more_is_further(kind):
    (image,) = distortions._scene(np.random.default_rng(3), False)
    distances = []
    for strength in (0.0, 0.3, 1.0):
        changed = [distortions.distort(image, kind, strength, np.random.default_rng(i)) for i in range(6)]
        distances.append(np.sqrt(np.mean([np.square(one - image).mean() for one in changed])))
    assert distances[0] < 1e-9
    assert 0.005 < distances[1] < distances[2]


def test_a_texture_question_is_between_sharp_and_gone():
    for seed in range(6):
        reference, left, right, judgement = distortions.texture_question(np.random.default_rng(seed), test=True)
        sharp, gone = (right, left) if judgement > 0.5 else (left, right)
        energy = [
            sharp_energy(np.round(255 * np.clip(x, 0, 1)).astype(np.uint8)[None]) for x in (reference, sharp, gone)
        ]
        assert energy[1] > 0.7 * energy[0]
        assert energy[2] < 0.3 * energy[0]
        assert np.square(sharp - reference).mean() > np.square(gone - reference).mean()  # squared error chooses wrongly


def test_sharpness_and_accuracy():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    assert sharp_energy(np.full((2, 64, 64, 3), 99, np.uint8)) == pytest.approx(0, abs=1e-9)
    # White noise has equal energy everywhere: the share of frequencies above half of Nyquist is 1 - pi / 16.
    share = sharp_energy(noise) / np.var(noise / 255)
    assert share == pytest.approx(1 - np.pi / 16, abs=0.02)
    asked = np.array([[1, 0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0]])
    found = asked.copy()
    found[1, 4] = 3
    accuracy = prompt_accuracy(found, asked)
    assert (accuracy["digit"], accuracy["texture"], accuracy["all"]) == (1.0, 0.5, 0.5)
    asked[1, 4] = UNCLEAR
    assert prompt_accuracy(found, asked)["all"] == 1.0
