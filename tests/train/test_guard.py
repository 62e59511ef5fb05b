"""Updates that are not finite: not applied, counted, named; the state before one is what is left."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.runtime import mesh as meshes
from d2g_jax.train import guard
from d2g_jax.train.state import UPDATES, TrainState


def state(value, step=3, left_out=0):
    return TrainState(
        step=jnp.int32(step),
        images=jnp.int32(8 * step),
        generator={"w": jnp.full(2, value)},
        ema={"w": jnp.full(2, value)},
        generator_optimizer=jnp.full(2, value),
        discriminator={},
        discriminator_optimizer={},
        left_out={update: jnp.int32(left_out) for update in UPDATES},
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def commit(update, allowed, before, after, metrics):
    return guard.commit(update, allowed, before, after, metrics)


def run(allowed, losses):
    """The states and outcomes of one generator update after another, each by its loss."""
    now, outcomes = state(0.0, step=0), []
    for number, loss in enumerate(losses, start=1):
        after = state(float(number), step=int(now.step) + 1)
        now, metrics = commit("generator", allowed, now, after, {"loss": jnp.float32(loss)})
        outcomes.append(int(metrics[guard.OUTCOME]))
    return now, outcomes


def test_finite_updates_are_applied():
    now, outcomes = run(0, [1.0, 2.0])
    assert outcomes == [guard.APPLIED] * 2
    assert (int(now.step), int(now.images), float(now.ema["w"][0])) == (2, 16, 2.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_state_stands_still_from_the_first_bad_update_on(bad):
    now, outcomes = run(0, [1.0, bad, 1.0, 1.0])
    assert outcomes == [guard.APPLIED, guard.STOPPED, guard.STANDS_STILL, guard.STANDS_STILL]
    for leaf in (now.generator["w"], now.ema["w"], now.generator_optimizer):
        np.testing.assert_array_equal(leaf, [1.0, 1.0])  # that of the update before
    assert (int(now.step), int(now.images)) == (1, 8)


def test_a_bad_update_that_may_be_left_out_still_takes_its_data():
    now, outcomes = run(1, [1.0, np.nan, 3.0, np.nan, 5.0])
    assert outcomes == [guard.APPLIED, guard.LEFT_OUT] * 2 + [guard.APPLIED]
    assert (int(now.step), float(now.generator["w"][0])) == (5, 5.0)
    now, outcomes = run(1, [1.0, np.nan, np.nan, 4.0])
    assert outcomes == [guard.APPLIED, guard.LEFT_OUT, guard.STOPPED, guard.STANDS_STILL]
    assert (int(now.step), float(now.generator["w"][0])) == (2, 1.0)


def test_one_kind_of_update_stops_all():
    stopped, _ = run(0, [np.nan])
    after = state(9.0)
    now, metrics = commit("discriminator", 0, stopped, after, {"loss": jnp.float32(1.0)})
    assert int(metrics[guard.OUTCOME]) == guard.STANDS_STILL
    assert float(now.generator["w"][0]) == 0.0
    again, metrics = commit("discriminator", 0, guard.released(stopped), after, {"loss": jnp.float32(1.0)})
    assert int(metrics[guard.OUTCOME]) == guard.APPLIED
    assert float(again.generator["w"][0]) == 9.0


def test_released_stays_where_it_was():
    mesh = meshes.make_mesh()
    placed = meshes.place(state(0.0, left_out=2), mesh)
    released = guard.released(placed)
    assert released.left_out.keys() == placed.left_out.keys()
    for name, count in released.left_out.items():
        assert int(count) == 0
        assert count.sharding == placed.left_out[name].sharding


def test_bad_updates_are_named_and_nothing_after_the_stop_is():
    good = {"loss": 1.0, guard.OUTCOME: 0.0}
    nan = float("nan")
    steps = [
        (8, {"generator": good, "discriminator": {**good, "loss": nan, guard.OUTCOME: 1.0}}),
        (16, {"generator": good, "discriminator": good}),
        (24, {"generator": {"fine": 2.0, "gradient": np.inf, "loss": nan, guard.OUTCOME: 2.0},
              "discriminator": {"loss": nan, guard.OUTCOME: 3.0}}),
        (32, {"generator": {"loss": nan, guard.OUTCOME: 3.0}}),
    ]  # fmt: skip
    # What comes from devices has its names sorted: the discriminator that stood still before the generator that did it.
    fetched = jax.device_get(steps)
    assert list(fetched[2][1]) == ["discriminator", "generator"]
    for told in (steps, json.loads(json.dumps(steps)), fetched):
        first, last = guard.bad_updates(told)
        assert first == guard.BadUpdate("discriminator", 8, ("loss",), stops=False)
        assert last == guard.BadUpdate("generator", 24, ("gradient", "loss"), stops=True)
    assert first.describe(8) == "the discriminator's update of step 1 (images 0 to 8): loss is not finite"
    assert last.describe(8) == "the generator's update of step 3 (images 16 to 24): gradient, loss are not finite"


def test_a_state_that_stands_still_for_no_reason_is_never_silent():
    with pytest.raises(RuntimeError, match="stood still at 8 images"):
        guard.bad_updates([(8, {"generator": {"loss": 1.0, guard.OUTCOME: 3.0}})])
