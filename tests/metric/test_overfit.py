"""Figure 5 as a job: what it optimises, that it repeats and resumes, what it writes, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import get_config

from d2g_jax.digits import scenes
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.digits.config import get_config as digits_config
from d2g_jax.inputs.images import to_floats
from d2g_jax.metric import overfit as job
from d2g_jax.runtime import runs
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.lock import locked
from d2g_jax.sample import sampler as sample


def config(made=get_config, **settings):
    c = made()
    with c.unlocked():
        c.overfit.update({"targets": 2, "steps": 4, "every": 2, **settings})
    return c


def figures(workdir):
    """result.json without what a clock or a machine says."""
    result = json.loads((workdir / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in ("seconds", "environment")}


@pytest.fixture(scope="module")
def scene():
    return job.set_up(config())[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, printed) of a short run of all losses."""
    workdir = tmp_path_factory.mktemp("overfit")
    return workdir, job.overfit(config(), workdir)


def test_squared_error_finds_the_target(tmp_path):
    settings = {"losses": ("mse",), "steps": 300, "every": 100, "learning_rate": 0.1}
    job.overfit(config(digits_config, **settings), tmp_path)
    measured = figures(tmp_path)
    last, references = measured["systems"][job.TITLES["mse"]], measured["pixel_lpips_of"]
    assert last["latent_mse"] < 1e-4
    assert last["pixel_lpips"] < 0.01 * references["start"]
    assert last["latent_lpips"] < 1e-3
    assert references["autoencoder"] < 0.5 * references["another_target"] < references["start"]


@pytest.mark.parametrize("name", job.TITLES)
def test_gradients_reach_the_latents_alone(scene, name):
    latents, key = job.start(0, scene.target.shape), jax.random.key(0)

    def total(latents, scene):
        return job.loss_of(name, "bgo")(scene, key, latents).sum()

    moved, (target, images) = jax.jit(
        lambda latents, scene: (
            jax.grad(total)(latents, scene),
            jax.grad(lambda pair: total(latents, dataclasses.replace(scene, target=pair[0], images=pair[1])))(
                (scene.target, scene.images)
            ),
        )
    )(latents, scene)
    assert (jnp.abs(moved).max((1, 2, 3)) > 0).all()
    assert jnp.abs(target).max() == 0
    assert jnp.abs(images).max() == 0


@pytest.mark.slow
def test_losses_vanish_at_the_target(scene):
    for name in job.TITLES:
        values = job.loss_of(name, "bgo")(scene, jax.random.key(0), scene.target)
        np.testing.assert_array_less(values, 1e-6)


def test_augmentation_is_fresh_at_every_step_and_only_in_the_ensemble(scene):
    latents = job.start(0, scene.target.shape)
    keys = [jax.random.key(i) for i in range(2)]
    plain, ensembled = (
        [job.loss_of(name, "bgo")(scene, key, latents) for key in keys] for name in ("latent_lpips", "e_latent_lpips")
    )
    np.testing.assert_array_equal(*plain)
    assert (ensembled[0] != ensembled[1]).all()


def test_it_starts_from_the_noise_of_sample(scene):
    count, height, width, channels = scene.target.shape
    expected = sample.draw_noise(3, count, (channels, height, width))
    np.testing.assert_array_equal(np.moveaxis(job.start(3, scene.target.shape), -1, 1), expected)


@pytest.mark.slow
def test_same_seed_same_figures(finished, tmp_path):
    job.overfit(config(), tmp_path / "again")
    assert figures(tmp_path / "again") == figures(finished[0])
    job.overfit(config(seed=1), tmp_path / "other")
    ours, theirs = (figures(workdir)["systems"] for workdir in (finished[0], tmp_path / "other"))
    assert all(ours[name]["latent_mse"] != theirs[name]["latent_mse"] for name in ours)


def test_stopped_run_goes_on_to_the_same_figures(finished, tmp_path, monkeypatch):
    save, calls = job.save_tree, []

    def save_and_die(fit, file):
        save(fit, file)
        calls.append(fit.steps)
        if len(calls) == 3:  # in the middle of the second loss
            raise KeyboardInterrupt

    monkeypatch.setattr(job, "save_tree", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        job.overfit(config(), tmp_path)
    assert not (tmp_path / "result.json").exists()
    job.overfit(config(), tmp_path)
    assert calls == [2, 4, 2, 4, 2, 4, 2, 4]
    assert figures(tmp_path) == figures(finished[0])
    assert (tmp_path / "overfit.png").read_bytes() == (finished[0] / "overfit.png").read_bytes()


@pytest.mark.slow
def test_figures_do_not_depend_on_the_interval_or_on_the_other_targets(finished, tmp_path):
    job.overfit(config(every=4), tmp_path / "interval")
    job.overfit(config(targets=1), tmp_path / "alone")
    interval, alone, ours = (figures(workdir)["each_image"] for workdir in (*sorted_pair(tmp_path), finished[0]))
    for name, measured in ours.items():
        for key, values in measured.items():
            np.testing.assert_allclose(interval[name][key], values, rtol=1e-4, err_msg=f"{name} {key}")
            np.testing.assert_allclose(alone[name][key], values[:1], rtol=1e-3, err_msg=f"{name} {key}")


def sorted_pair(folder):
    return folder / "interval", folder / "alone"


def test_what_is_written(finished):
    workdir, printed = finished
    measured = figures(workdir)
    assert list(measured["systems"]) == list(job.TITLES.values())
    for name, values in measured["each_image"].items():
        for key in job.MEASURES:
            mean = measured["systems"][job.TITLES[name]][key]
            assert mean == pytest.approx(np.mean(values[key]), rel=1e-5)
            assert f"{mean:.4f}" in printed
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["run"], row["step"], row["images"]) for row in rows] == [
        (title, step, 2 * step) for title in job.TITLES.values() for step in (0, 2, 4)
    ]
    assert len({row["pixel_lpips"] for row in rows if row["step"] == 0}) == 1  # the same noise for all
    assert all(("loss" in row) == (row["step"] > 0) for row in rows)
    with Image.open(workdir / "overfit.png") as image:
        assert image.size == (2 * (64 + 2) + 2, 5 * (64 + 2) + 2)
    page = (workdir / "report.html").read_text()
    assert all(title in page for title in job.TITLES.values())
    assert "http://" not in page
    assert 'src="samples' not in page


def test_users_images_are_cropped_to_the_model_s_size(tmp_path):
    picture = np.zeros((40, 64, 3), np.uint8)
    picture[:, 12:52] = 255  # of the middle 40 columns every one is white
    for name in ("b.png", "a.jpg"):
        Image.fromarray(picture).save(tmp_path / name, quality=95)
    (tmp_path / "notes.txt").write_text("")
    names, images = job.read_targets(config(images=str(tmp_path)).overfit, 32)
    assert names == ["a.jpg", "b.png"]
    assert images.shape == (2, 32, 32, 3)
    np.testing.assert_allclose(images[:, :, 2:-2], 1, atol=0.05)  # resizing mixes in what is beside the edge
    names, images = job.read_targets(config(images=str(tmp_path / "b.png")).overfit, 16)
    assert names == ["b.png"]
    assert images.shape == (1, 16, 16, 3)


def test_a_vae_may_give_height_and_width(tmp_path):
    settings = config(digits_config, targets=1)
    shutil.copytree(Path(settings.pipeline) / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": [scenes.SIZE, scenes.SIZE]}))
    settings.pipeline = str(tmp_path)
    assert job.set_up(settings)[2].shape == (1, scenes.SIZE, scenes.SIZE, 3)


def test_targets_are_the_first_of_the_test_set():
    names, images = job.read_targets(config(targets=3).overfit, scenes.SIZE)
    shown = scenes.render(3, 0, test=True)
    np.testing.assert_array_equal(images, to_floats(shown.images))
    assert all(str(row[0]) in name for name, row in zip(names, shown.labels, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": ("mse", "l7")}, "overfit.losses: 'l7' is unknown"),
        ({"losses": ()}, "overfit.losses"),
        ({"losses": ("mse", "mse")}, "each once"),
        ({"preset": "bgx"}, "preset 'bgx' is unknown"),
        ({"steps": 5}, "overfit.steps=5 is not a multiple of overfit.every=2"),
        ({"targets": 0}, "overfit.targets=0"),
        ({"learning_rate": 0.0}, "overfit.learning_rate=0.0"),
        ({"seed": -1}, "overfit.seed=-1"),
        ({"images": "nowhere.png"}, "overfit.images=nowhere.png: no image"),
        ({"metric": str(WEIGHTS / "lpips")}, "latent_space"),
        ({"lpips": str(WEIGHTS / "metric")}, "not the config of a pixel metric"),
    ],
)
def test_bad_settings_end_with_one_line(tmp_path, settings, message):
    with pytest.raises(UserError) as caught:
        job.overfit(config(**settings), tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # nothing is claimed for what cannot run


def test_other_workdirs_and_broken_states_are_refused(tmp_path):
    runs.claim(tmp_path / "demo", get_config())
    with pytest.raises(UserError, match="choose another --workdir"):
        job.overfit(config(), tmp_path / "demo")
    job.overfit(config(losses=("mse",)), tmp_path / "run")
    with pytest.raises(UserError, match=r"overfit\.seed"):
        job.overfit(config(losses=("mse",), seed=1), tmp_path / "run")
    state = tmp_path / "run" / "fits" / "mse.safetensors"
    state.write_bytes((WEIGHTS / "metric" / "metric.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"mse\.safetensors: not a checkpoint of this run \(steps differs\); remove it"):
        job.overfit(config(losses=("mse",)), tmp_path / "run")


def test_a_workdir_is_bound_to_its_pictures_and_says_how_many_there_were(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        Image.fromarray(np.full((64, 64, 3), 99 * i, np.uint8)).save(pictures / f"{i}.png")
    settings = config(losses=("mse",), steps=2, targets=8, images=str(pictures))
    job.overfit(settings, tmp_path / "run")
    assert figures(tmp_path / "run")["protocol"]["targets"] == 2
    Image.fromarray(np.full((64, 64, 3), 50, np.uint8)).save(pictures / "1.png")
    with pytest.raises(UserError, match=r"holds a run with targets_sha256=.*; choose another --workdir"):
        job.overfit(settings, tmp_path / "run")


def test_a_workdir_in_use_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="in use by process"):
        job.overfit(config(losses=("mse",)), tmp_path)


@pytest.mark.parametrize("bias", [np.nan, np.inf, -np.inf])
def test_a_vae_whose_images_are_not_finite_is_named(bias, tmp_path, monkeypatch):
    """Its pictures would be black or white."""
    decode = job.Scene.decode
    monkeypatch.setattr(job.Scene, "decode", lambda scene, latents: decode(scene, latents) + bias)
    with pytest.raises(UserError, match=r"pipeline/vae: makes images of its latents that are not finite; check its"):
        job.overfit(config(losses=("mse",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(UserError, match=r"mse is not finite after 2 steps; lower overfit\.learning_rate"):
        job.overfit(config(losses=("mse",), learning_rate=1e30), tmp_path)
