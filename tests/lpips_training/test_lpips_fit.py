"""The training loop: resumed equals unbroken, and what it refuses."""

import json
import os
import signal
import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from d2g_jax.lpips_training.fit import CHECKPOINT, Recipe, fit, sampled_rows
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.interrupt import Terminated

DATA = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


def recipe(folder=None, save_every=2, optimizer=None):
    return Recipe(optimizer or optax.adam(0.1), 7, 4, 0, folder, save_every)


def train(recipe, batch_at=lambda step: {"x": DATA[sampled_rows(40, 4, 0, step)]}, scale=1.0, **arguments):
    start = {"10": jnp.ones(3), "2": {"bias": jnp.zeros(())}}

    def loss(params, batch, key):
        return scale * jnp.square(batch["x"] @ params["10"] + params["2"]["bias"]).mean()

    return fit(loss, start, batch_at, recipe, label="part", **arguments)


def assert_same(a, b):
    np.testing.assert_array_equal(a["10"], b["10"])
    np.testing.assert_array_equal(a["2"]["bias"], b["2"]["bias"])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_training_that_broke_gives_the_unbroken_result(tmp_path, ema):
    def breaks(step):
        if step == 5:
            raise OSError("the disk went away")
        return {"x": DATA[sampled_rows(40, 4, 0, step)]}

    whole = train(recipe(), ema=ema)
    with pytest.raises(OSError, match="went away"):
        train(recipe(tmp_path), breaks, ema=ema)
    seen = []
    again = train(
        recipe(tmp_path), lambda step: seen.append(step) or {"x": DATA[sampled_rows(40, 4, 0, step)]}, ema=ema
    )
    assert seen == [4, 5, 6]  # from the checkpoint of step 4
    assert_same(whole, again)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [4, 8, 12, 16, 20, 24, 28]  # each step once


def test_sigterm_saves_the_step_under_way(tmp_path):
    def stopped(step):
        if step == 3:  # read while step 2 is computed
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": DATA[sampled_rows(40, 4, 0, step)]}

    with pytest.raises(Terminated):
        train(recipe(tmp_path, save_every=100), stopped)
    seen = []
    again = train(recipe(tmp_path), lambda step: seen.append(step) or {"x": DATA[sampled_rows(40, 4, 0, step)]})
    assert seen[0] in (3, 4)  # the thread may come late with its signal, when step 3 has begun
    assert_same(train(recipe()), again)


def test_batches_are_read_one_step_ahead_and_encoded_here():
    read, order = set(), []

    def batch_at(step):
        read.add(threading.current_thread())
        order.append(("read", step))
        return {"x": 2 * DATA[sampled_rows(40, 4, 0, step)], "step": np.array(step)}

    def encode(batch):
        assert threading.current_thread() is threading.main_thread()
        order.append(("encode", int(batch.pop("step"))))
        return {"x": batch["x"] / 2}

    assert_same(train(recipe()), train(recipe(), batch_at, encode=encode))
    assert [step for what, step in order if what == "read"] == list(range(7))  # and none behind the last
    assert [step for what, step in order if what == "encode"] == list(range(7))
    assert len(read) == 1
    assert threading.main_thread() not in read


def test_a_batch_that_cannot_be_read_ends_the_training_with_its_own_error():
    def batch_at(step):
        if step == 3:
            raise UserError("image.png: not a readable image")
        return {"x": DATA[sampled_rows(40, 4, 0, step)]}

    with pytest.raises(UserError, match=r"^image\.png"):
        train(recipe(), batch_at)


def test_a_loss_that_is_not_finite_names_step_and_setting():
    with pytest.raises(
        UserError, match=r"part: the loss is nan at step 1 of 7; lower learning_rate in the section part and"
    ):
        train(recipe(), scale=np.nan)


def test_another_training_s_checkpoint_is_refused(tmp_path):
    train(recipe(tmp_path))
    names = set(load_file(tmp_path / CHECKPOINT))
    assert {"steps", "carry[0]['10']", "carry[0]['2']['bias']"} < names  # or trainings under way would be lost
    with pytest.raises(UserError, match=rf"{CHECKPOINT}: not a checkpoint of this run .*remove it"):
        train(recipe(tmp_path, optimizer=optax.sgd(0.1, 0.9)))


def test_projection_follows_each_update():
    params = train(recipe(), project=lambda params: {**params, "10": jnp.maximum(params["10"], 0.99)})
    assert params["10"].min() == np.float32(0.99)
