"""Shards on disk, the encoder, and labelled latents made with both."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from d2g_jax.lpips_training import cache
from d2g_jax.lpips_training.encoder import Encoder, sha256_of
from d2g_jax.lpips_training.image_folders import open_images
from d2g_jax.lpips_training.images import Crop
from d2g_jax.lpips_training.latents import cached, on_the_fly
from d2g_jax.models import vae
from d2g_jax.runtime.errors import UserError

RECORD = np.dtype([("x", "<f4", (2,)), ("label", "<i4")])


def records(rows):
    made = np.empty(len(rows), RECORD)
    made["x"], made["label"] = np.asarray(rows)[:, None] * [1, 10], rows
    return made


def build(folder, make=records, **made_from):
    return cache.build(folder, {"seed": 0, **made_from}, 7, 3, make, label="records")


def test_shards_are_one_array(tmp_path):
    shards = build(tmp_path)
    assert len(shards) == 7
    rows = np.array([6, 0, 3, 3, 5])
    np.testing.assert_array_equal(shards.take(rows), records(rows))
    np.testing.assert_array_equal(cache.open_shards(tmp_path).take(np.arange(7)), records(range(7)))


def test_a_stopped_build_makes_what_is_missing(tmp_path):
    made = []

    def stops(rows):
        made.append(rows.start)
        if len(made) == 2:
            raise KeyboardInterrupt
        return records(rows)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, stops)
    with pytest.raises(UserError, match=r"records-00001-of-00003\.npy: cannot be read"):
        cache.open_shards(tmp_path)
    shards = build(tmp_path, stops)
    assert made == [0, 3, 3, 6]
    np.testing.assert_array_equal(shards.take(np.arange(7)), records(range(7)))
    build(tmp_path, stops)
    assert len(made) == 4  # nothing left to make


def test_what_something_else_made_is_refused(tmp_path):
    build(tmp_path, shape=(8, 8))
    build(tmp_path, shape=(8, 8))
    with pytest.raises(UserError, match=r"made_from\.json: made with shape=\[8, 8\], this run has \(4, 4\)"):
        build(tmp_path, shape=(4, 4))
    (tmp_path / cache.MADE_FROM).write_text("{")
    with pytest.raises(UserError, match=r"made_from\.json cannot be read"):
        build(tmp_path)


@pytest.fixture(scope="module")
def encoder(pipeline):
    return Encoder.load(pipeline, 4, np.float32, seed=0)


def test_encoder_gives_scaled_latents(encoder, vae_params):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    network = vae.build(encoder.config)
    mean, logvar = jax.jit(lambda x: network.apply(vae_params, x, method="encode"))(pixels / np.float32(127.5) - 1)
    means, ids = encoder.encode(pixels, "mean", np.arange(6)), np.array([5, 4, 3, 2, 1, 0])
    np.testing.assert_allclose(means, mean * 0.5, atol=1e-5)
    assert means.shape[1:] == encoder.latent_shape(16) == (8, 8, 4)
    samples = encoder.encode(pixels, "sample", ids)
    noise = (samples - means) / (0.5 * np.exp(0.5 * np.asarray(logvar)))
    assert 0.9 < noise.std() < 1.1
    # by the image's id, whatever its batch
    np.testing.assert_allclose(encoder.encode(pixels[3:4], "sample", ids[3:4]), samples[3:4], atol=1e-6)


def test_latents_that_are_not_finite_name_the_vae(encoder, class_folders, tmp_path):
    images, crop = open_images(class_folders, "train"), Crop(16, 16, seed=0)
    for value, message in (
        (np.nan, "pipeline.*vae: its latents hold NaN or infinity"),
        (1e5, "reach 1e\\+05, too much"),
    ):
        broken = dataclasses.replace(encoder, program=lambda x, ids, sample, v=value: np.full((len(x), 8, 8, 4), v))
        with pytest.raises(UserError, match=message):
            cached(tmp_path / "cache", images, broken, crop, "mean", views=1, label="encode")
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_the_hash_is_of_what_encodes(encoder, vae_params):
    halves = {name: vae_params[name] for name in ("encoder", "quant_conv")}
    assert encoder.sha256 == sha256_of(halves)
    changed = jax.tree.map(lambda x: x, halves)
    changed["quant_conv"] = {**changed["quant_conv"], "bias": changed["quant_conv"]["bias"] + 1e-3}
    assert sha256_of(changed) != encoder.sha256


def test_cache_and_on_the_fly_agree(encoder, class_folders, tmp_path):
    images, crop = open_images(class_folders, "train"), Crop(16, 16, seed=0)
    kept = cached(tmp_path / "cache", images, encoder, crop, "mean", views=2, label="encode")
    fly = on_the_fly(images, encoder, crop, "mean", augment=False)
    random = on_the_fly(images, encoder, crop, "mean", augment=True)
    assert (kept.count, kept.classes, kept.shape) == (36, 2, (8, 8, 4))
    rows = np.array([17, 0, 9, 4])
    plain, other, expected = kept.batch(2 * rows, 0), kept.batch(2 * rows + 1, 0), fly.batch(rows, 5)
    np.testing.assert_array_equal(plain["labels"], [1, 0, 1, 0])
    np.testing.assert_array_equal(expected["labels"], plain["labels"])
    np.testing.assert_allclose(plain["latents"], expected["latents"], atol=2e-3)  # float16
    np.testing.assert_allclose(other["latents"], random.batch(rows, 0)["latents"], atol=2e-3)  # both are view 1
    assert np.abs(plain["latents"] - other["latents"]).max() > 0.01
    assert np.abs(random.batch(rows, 0)["latents"] - random.batch(rows, 1)["latents"]).max() > 0.01


def test_a_cache_serves_without_its_images_and_refuses_another_vae(encoder, class_folders, tmp_path):
    images, crop, folder = open_images(class_folders, "train"), Crop(16, 16, seed=0), tmp_path / "cache"
    kept = cached(folder, images, encoder, crop, "sample", views=1, label="encode")
    alone = cached(folder, None, encoder, crop, "sample", views=1, label="encode")
    assert (alone.count, alone.classes) == (18, 2)
    np.testing.assert_array_equal(alone.batch(np.arange(18), 0)["latents"], kept.batch(np.arange(18), 1)["latents"])
    other = dataclasses.replace(encoder, sha256="0" * 64)
    for source in (images, None):
        with pytest.raises(UserError, match=r"made_from\.json: made with vae_sha256='.*', this run has '000"):
            cached(folder, source, other, crop, "sample", views=1, label="encode")
    with pytest.raises(UserError, match="made with size=16, this run has 20"):
        cached(folder, None, encoder, Crop(20, 0, 0), "sample", views=1, label="encode")
    (class_folders / "red" / "0.png").unlink()
    with pytest.raises(UserError, match="made with images_sha256"):
        cached(folder, open_images(class_folders, "train"), encoder, crop, "sample", views=1, label="encode")
    with pytest.raises(UserError, match=r"nothing/made_from\.json is missing"):
        cached(tmp_path / "nothing", None, encoder, crop, "sample", views=1, label="encode")


def test_a_pipeline_without_a_vae(tmp_path):
    with pytest.raises(UserError, match=r"vae/config\.json is missing"):
        Encoder.load(tmp_path, 4, np.float32, seed=0)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"latent_channels": 4}))
    with pytest.raises(UserError, match="holds no weights"):
        Encoder.load(tmp_path, 4, np.float32, seed=0)
