"""A run's folder: whose it is, what is kept of its metrics."""

import json

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from d2g_jax import runs
from d2g_jax.errors import UserError


def config(images=10, rate=0.5):
    return ConfigDict({"name": "a", "train": {"images": images}, "optimizer": {"rate": rate, "betas": (0.0, 0.99)}})


def test_a_run_may_be_made_longer_and_nothing_else(tmp_path):
    runs.claim(tmp_path, config())
    runs.claim(tmp_path, config(images=20))
    assert json.loads((tmp_path / "config.json").read_text())["train"]["images"] == 20
    with pytest.raises(UserError, match=r"optimizer\.rate=0\.5, this one has 0\.25"):
        runs.claim(tmp_path, config(rate=0.25))
    more = config()
    more.extra = 1
    with pytest.raises(UserError, match="extra"):
        runs.claim(tmp_path, more)


def test_broken_config_of_a_run_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        runs.claim(tmp_path, config())


def test_metrics_past_the_checkpoint_go(tmp_path):
    rows = [{"images": n, "seconds": n / 10} for n in (8, 16, 24)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"images": 32, "sec')
    runs.truncate_metrics(tmp_path, 16)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(text.splitlines(keepends=True)[:2])


def test_log_keeps_the_clock_running_and_names_what_is_not_finite(tmp_path):
    log = runs.MetricsLog(tmp_path, "a", 0)
    log.add(8, {"loss": jnp.float32(2.0), "rare": jnp.float32(1.0)})
    log.add(16, {"loss": jnp.float32(3.0)})
    assert log.write() is None
    log.close()
    again = runs.MetricsLog(tmp_path, "a", 16)
    again.add(24, {"loss": jnp.float32(jnp.nan)})
    assert again.write() == "loss is not finite after 24 images"
    again.close()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["images"], first["loss"], first["rare"]) == (16, 3.0, 1.0)
    assert second["seconds"] >= first["seconds"]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a writable folder"):
        runs.claim(tmp_path / "file", config())
