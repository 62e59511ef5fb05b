"""Lines, alarms and checkpoints of a run whose steps are made up: what is written, said, and taken up again."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.train import guard
from d2g_jax.train.checkpoint import Checkpoints
from d2g_jax.train.journal import Journal, NotFinite
from d2g_jax.train.state import UPDATES, TrainState


def config(**train):
    return ConfigDict({"name": "a", "train": {"batch_size": 8, "keep_best": "", "skip_nonfinite": 0, **train}})


def state(images):
    value = {"w": jnp.full(3, float(images))}
    left_out = {update: jnp.int32(0) for update in UPDATES}
    made = TrainState(jnp.int32(images // 8), jnp.int32(images), value, value, value, {}, {}, left_out)
    return meshes.place(made, meshes.make_mesh())


def metrics(loss, outcome=guard.APPLIED, share=0.1):
    """Of a step with a D whose R1 takes `share`, as the devices hold them."""
    g = {"loss_regression": loss, guard.OUTCOME: outcome}
    d = {"loss_discriminator": 1.0 - share, "logit_gap_text": [1.0, 2.0], guard.OUTCOME: guard.APPLIED}
    r1 = {"loss_r1": share, guard.OUTCOME: guard.APPLIED}
    as_arrays = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    return {"generator": jax.tree.map(as_arrays, g), "discriminator": {k: as_arrays(v) for k, v in d.items()},
            "r1": jax.tree.map(as_arrays, r1)}  # fmt: skip


@contextlib.contextmanager
def opened(workdir, settings):
    """(journal, checkpoints, what was said)"""
    said = []
    with (
        Checkpoints(workdir / "checkpoints", keep=2, keep_best=settings.train.keep_best) as checkpoints,
        Journal(settings, workdir, checkpoints, {"name": "a"}, said.append) as journal,
    ):
        yield journal, checkpoints, said


def lines(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_line_is_of_the_steps_since_the_last_across_a_resume(tmp_path):
    def steps(journal, first, last):
        for images in range(first, last + 1, 8):
            journal.add(images, metrics(loss=1.0 / images))
            if images % 32 == 0:
                journal.write_line(images, state(images), {"corrupt_records": 1})

    with opened(tmp_path / "whole", config()) as (journal, _, _):
        steps(journal, 8, 64)
    with opened(tmp_path / "parts", config()) as (journal, _, _):
        steps(journal, 8, 40)
        journal.save(state(40))
        steps(journal, 48, 48)  # lost
    with opened(tmp_path / "parts", config()) as (journal, checkpoints, _):
        assert checkpoints.latest() == 40
        steps(journal, 48, 64)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    first, second = lines(tmp_path / "whole")
    assert (first["images"], first["corrupt_records"], first["alarms"], first["left_out"]) == (32, 1, [], [])
    assert first["loss_regression"] == pytest.approx(np.mean([1 / n for n in (8, 16, 24, 32)]))
    assert second["logit_gap_text"] == pytest.approx(0.5)
    assert second["r1_share"] == pytest.approx(0.1)
    assert guard.OUTCOME not in second


def test_the_first_bad_update_stops_with_the_state_before_it(tmp_path):
    with opened(tmp_path, config()) as (journal, checkpoints, _):
        journal.add(8, metrics(1.0))
        journal.add(16, metrics(np.nan, guard.STOPPED))
        journal.add(24, metrics(1.0, guard.STANDS_STILL))
        problem = r"the generator's update of step 2 \(images 8 to 16\): loss_regression is not finite"
        with pytest.raises(NotFinite, match=problem + r".*checkpoint 8\..*skip_nonfinite=1"):
            journal.write_line(24, state(8), {})
        assert checkpoints.all() == [8]
        assert [images for images, _ in checkpoints.metadata()["since_last_line"]] == [8]
    (line,) = lines(tmp_path)
    assert (line["images"], line["loss_regression"], line["alarms"]) == (16, 1.0, [])
    assert line["problem"].startswith("the generator's update of step 2")


def test_a_save_stops_as_a_line_does(tmp_path):
    with opened(tmp_path, config()) as (journal, checkpoints, _):
        journal.add(8, metrics(np.inf, guard.STOPPED))
        with pytest.raises(NotFinite, match="checkpoint 0"):
            journal.save(state(0))
        assert checkpoints.all() == [0]


def test_what_was_left_out_is_said_once_and_survives_a_resume(tmp_path):
    text = "the generator's update of step 2 (images 8 to 16): loss_regression is not finite"
    with opened(tmp_path, config(skip_nonfinite=1)) as (journal, _, said):
        journal.add(8, metrics(3.0))
        journal.add(16, metrics(np.nan, guard.LEFT_OUT))
        journal.save(state(16))
        assert said == [f"d2g: left out {text}"]
    with opened(tmp_path, config(skip_nonfinite=1)) as (journal, _, said):
        journal.add(24, metrics(1.0))
        journal.write_line(24, state(24), {})
        assert said == []
    (line,) = lines(tmp_path)
    assert (line["left_out"], line["loss_regression"]) == ([text], 2.0)


def test_alarms_are_said_when_they_begin_and_end(tmp_path):
    heard = []
    for shares in ((0.1, 0.9), (0.9, 0.9, 0.1)):  # a run, and its continuation
        with opened(tmp_path, config()) as (journal, _, said):
            for share in shares:
                images = 8 * (len(lines(tmp_path)) + 1)
                journal.add(images, metrics(1.0, share=share))
                journal.write_line(images, state(images), {})
            heard.append(list(said))
    assert heard[0] == []
    begins, ends = heard[1]
    assert begins.startswith("d2g: alarm after 24 images: r1_share high (0.9): R1 outweighs")
    assert ends == "d2g: alarm over after 40 images: r1_share high"
    assert [line["alarms"] for line in lines(tmp_path)] == [[], [], ["r1_share high"], ["r1_share high"], []]


def test_the_best_checkpoint_is_that_of_the_lowest_line(tmp_path):
    with opened(tmp_path, config(keep_best="loss_regression")) as (journal, checkpoints, _):
        for images, loss in ((8, 1.0), (16, 3.0), (24, 2.0), (32, 4.0)):
            journal.add(images, metrics(loss))
            journal.write_line(images, state(images), {})
            journal.save(state(images))
        checkpoints.wait()
        assert checkpoints.all() == [8, 24, 32]
    with opened(tmp_path / "wrong", config(keep_best="loss")) as (journal, _, _):
        journal.add(8, metrics(1.0))
        with pytest.raises(UserError, match=r"train\.keep_best='loss' .* loss_regression"):
            journal.write_line(8, state(8), {})
