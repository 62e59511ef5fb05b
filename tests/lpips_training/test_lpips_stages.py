"""Classification, calibration, the 2AFC score, and triplets as the LPIPS data set lays them out."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from d2g_jax.lpips_training import calibrate, classify
from d2g_jax.lpips_training.fit import Recipe
from d2g_jax.lpips_training.job import classification_optimizer
from d2g_jax.lpips_training.triplets import open_triplets
from d2g_jax.models import vgg
from d2g_jax.runtime.errors import UserError

NARROW = vgg.VGGConfig(widths=(8, 8, 8, 8, 8), convs=(1, 1, 1, 1, 1))


def labelled(count, seed):
    """Latents whose class is the channel with the largest mean."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    latents = rng.normal(size=(count, 8, 8, 4)) + 2 * np.eye(4)[labels][:, None, None]
    return classify.LabelledLatents.from_arrays(latents.astype(np.float32), labels, 3)


@pytest.mark.parametrize("head", [classify.Head(3), classify.Head(3, pool=3, hidden=(16,), dropout=0.5)])
def test_classifier_learns_and_its_statistics_are_the_data_s(head):
    recipe = Recipe(optax.adam(1e-2), 60, 16, seed=0)
    trained = classify.train_classifier(recipe, NARROW, head, labelled(256, 0), label="classification")
    assert classify.accuracy(trained, NARROW, head, labelled(83, 1), 16) > 0.9
    # The first convolution sees the data itself, so the mean of its output is known.
    first, statistics = trained["features"]["slice1"]["0"], trained["features"]["slice1"]["1"]
    padded = np.pad(labelled(256, 0).batch(np.arange(256), 0)["latents"], ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [[padded[:, y : y + 8, x : x + 8].mean((0, 1, 2)) for x in range(3)] for y in range(3)]
    expected = np.einsum("yxi,yxio->o", windows, first["kernel"]) + first["bias"]
    np.testing.assert_allclose(statistics["mean"], expected, atol=0.1)
    assert (statistics["var"] > 0).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 7), (4, 7), (7, 7), (6, 3)])
def test_pooling_is_torch_s(inputs, outputs):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, inputs)).astype(np.float32)
    expected = torch.nn.AdaptiveAvgPool1d(outputs)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(x @ classify.pooling_matrix(inputs, outputs).T, expected, atol=1e-6)


def test_sgd_recipe_is_torch_s():
    torch = pytest.importorskip("torch")
    config = ConfigDict(
        {
            "batch_size": 10,
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.01,
            "decay_epochs": 1.0,
            "decay": 0.1,
        }
    )
    optimizer, target = classification_optimizer(config, 25), np.array([1.0, -2.0], np.float32)  # three steps an epoch
    params = jnp.array([3.0, 0.5])
    state = optimizer.init(params)
    theirs = torch.nn.Parameter(torch.tensor([3.0, 0.5]))
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, step_size=3, gamma=0.1)
    for _ in range(8):
        updates, state = optimizer.update(params - target, state, params)
        params = optax.apply_updates(params, updates)
        theirs.grad = (theirs - torch.from_numpy(target)).detach()
        sgd.step()
        schedule.step()
        np.testing.assert_allclose(params, theirs.detach().numpy(), rtol=1e-5)


def forced_choices(count, seed):
    """Judges go by tap 0, channel 1; everything else is noise."""
    rng = np.random.default_rng(seed)
    taps = [[rng.uniform(size=(count, width)).astype(np.float32) for width in (3, 2)] for _ in range(2)]
    judgement = (taps[1][0][:, 1] < taps[0][0][:, 1]).astype(np.float32)  # 1: right is closer
    return calibrate.Differences(*taps, judgement)


def test_calibration_finds_what_the_judges_look_at():
    held_out = forced_choices(400, 1)
    uniform = [np.ones(3, np.float32), np.ones(2, np.float32)]
    heads = calibrate.calibrate(Recipe(optax.adam(1e-2), 300, 50, 0), forced_choices(400, 0), label="calibration")
    assert [head.shape for head in heads] == [(3,), (2,)]
    assert min(head.min() for head in heads) >= 0
    assert heads[0][1] == max(head.max() for head in heads)
    assert calibrate.two_afc(heads, held_out) > 0.95 > 0.85 > calibrate.two_afc(uniform, held_out)


def test_two_afc_by_hand():
    left = [np.array([[1.0], [3.0], [2.0], [1.0]], np.float32)]
    right = [np.array([[2.0], [1.0], [2.0], [5.0]], np.float32)]
    data = calibrate.Differences(left, right, np.array([0.25, 0.8, 0.9, 1.0], np.float32))
    # left closer: 0.75 agree; right closer: 0.8; tie: half; left closer: nobody agrees
    assert calibrate.two_afc([np.ones(1)], data) == pytest.approx((0.75 + 0.8 + 0.5 + 0.0) / 4)
    assert calibrate.scores([np.ones(1)], data)["2afc_of_judges"] == pytest.approx((0.75 + 0.8 + 0.9 + 1.0) / 4)


def test_triplets_by_kind(triplet_folder):
    noise, tint = open_triplets(triplet_folder, "train")
    assert (noise.name, len(noise), tint.name, len(tint)) == ("noise", 6, "tint", 6)
    assert [noise.judgement(i) for i in range(6)] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    patches = noise.patches(0, 16).astype(float)
    assert patches.shape == (3, 16, 16, 3)
    assert np.abs(patches[2] - patches[0]).mean() < np.abs(patches[1] - patches[0]).mean()  # p1 is the closer


def test_bad_triplets(triplet_folder):
    kind = triplet_folder / "train" / "noise"
    np.save(kind / "judge" / "000002.npy", np.array([1.5]))
    with pytest.raises(UserError, match=r"judge/000002\.npy: a judgement is one number from 0 to 1, this holds \[1\.5"):
        open_triplets(triplet_folder, "train")[0].judgement(2)
    np.save(kind / "judge" / "000002.npy", np.array("left"))
    with pytest.raises(UserError, match="one number from 0 to 1, this holds left"):
        open_triplets(triplet_folder, "train")[0].judgement(2)
    (kind / "judge" / "000002.npy").write_bytes(b"x")
    with pytest.raises(UserError, match=r"000002\.npy: cannot be read as \.npy"):
        open_triplets(triplet_folder, "train")[0].judgement(2)
    (kind / "p1" / "000003.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"p1/000003\.png: not a readable image"):
        open_triplets(triplet_folder, "train")[0].patches(3, 16)
    (kind / "p1" / "000003.png").rename(kind / "p1" / "000009.png")
    with pytest.raises(UserError, match="noise: 000003 is not in both p1 and judge"):
        open_triplets(triplet_folder, "train")
    (kind / "p1" / "000009.png").unlink()
    with pytest.raises(UserError, match="noise: 5 images in p1 but 6 judgements"):
        open_triplets(triplet_folder, "train")
    for file in (kind / "judge").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="judge: holds no judgements; calibration needs one for each triplet"):
        open_triplets(triplet_folder, "train")
    with pytest.raises(UserError, match="test: no such folder"):
        open_triplets(triplet_folder, "test")
    (triplet_folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no kinds"):
        open_triplets(triplet_folder, "empty")
