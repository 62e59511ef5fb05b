"""A run's folder: whose it is, what is kept of its metrics."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from d2g_jax.runtime import runs
from d2g_jax.runtime.errors import UserError


def config(images=10, rate=0.5):
    return ConfigDict({"name": "a", "train": {"images": images}, "optimizer": {"rate": rate, "betas": (0.0, 0.99)}})


def test_a_run_may_be_made_longer_and_nothing_else(tmp_path):
    runs.claim(tmp_path, config())
    runs.claim(tmp_path, config(images=20))
    assert json.loads((tmp_path / "config.json").read_text())["train"]["images"] == 20
    with pytest.raises(
        UserError, match=r"config\.json: holds a run with optimizer\.rate=0\.5 \(this one has 0\.25\); "
    ):
        runs.claim(tmp_path, config(rate=0.25))
    more = config()
    more.extra = 1
    with pytest.raises(UserError, match="extra"):
        runs.claim(tmp_path, more)


def test_every_difference_counts_and_three_are_named(tmp_path):
    theirs = runs.to_json(config())
    mine = {"name": "b", "seed": 1, "train": {"images": 3}, "optimizer": {"rate": 0.5}, "mesh": {"fsdp": 2}}
    with pytest.raises(UserError) as refused:
        runs.check_same(mine, theirs, tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}: holds a run with name='a' (this one has 'b'), seed=None (this one has 1), optimizer.betas="
        "[0.0, 0.99] (this one has None); choose another --workdir"
    )
    with pytest.raises(UserError, match="and 1 other differences"):
        runs.check_same({**mine, "more": 0}, theirs, tmp_path)


def test_runs_from_before_networks_could_be_packed_go_on_as_they_are(tmp_path):
    before, now = {"train": {"rate": 0.5}}, lambda packed: {"train": {"rate": 0.5, "packed": packed}}
    runs.check_same(now(packed=False), before, tmp_path)
    with pytest.raises(UserError, match=r"train\.packed=None \(this one has True\)"):
        runs.check_same(now(packed=True), before, tmp_path)


def test_the_hash_is_that_of_what_a_run_is_bound_to():
    assert runs.config_hash(config()) == runs.config_hash(config(images=20))
    assert runs.config_hash(config()) != runs.config_hash(config(rate=0.25))


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("[]", "holds a list, not a config")])
def test_broken_config_of_a_run_is_named(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        runs.claim(tmp_path, config())


def test_metrics_past_the_checkpoint_go(tmp_path):
    rows = [{"images": n, "seconds": n / 10} for n in (8, 16, 24)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"images": 32, "sec')
    runs.truncate_metrics(tmp_path, 16)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(text.splitlines(keepends=True)[:2])


def test_log_keeps_the_clock_running_and_knows_the_lines_before(tmp_path):
    with runs.MetricsLog(tmp_path, "a") as log:
        assert (log.before, log.last) == ([], {})
        log.write(16, {"loss": 3.0, "rare": None})
        assert log.last["loss"] == 3.0
    with runs.MetricsLog(tmp_path, "a") as again:
        assert again.before == [again.last]
        again.write(24, {"loss": 2.0})
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["run"], first["images"], first["loss"], first["rare"]) == ("a", 16, 3.0, None)
    assert second["seconds"] >= first["seconds"]


def test_a_full_disk_is_one_line(tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    with runs.MetricsLog(tmp_path, "a") as log:
        log._stream.close()
        log._stream = full.open("a")
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
            log.write(16, {"loss": 3.0})


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a writable folder"):
        runs.claim(tmp_path / "file", config())


@pytest.mark.parametrize("change", [{"pipeline": "/moved/sd/"}, {"pairs.batch_size": 8}, {"pairs.lease_seconds": 1.0}])
def test_what_cannot_change_a_result_may_change(change, tmp_path):
    before = ConfigDict({"pipeline": "sd", "pairs": {"batch_size": 4, "lease_seconds": 0.0, "count": 8}})
    runs.claim(tmp_path, before)
    after = ConfigDict(before.to_dict())
    after.update_from_flattened_dict(change)
    runs.claim(tmp_path, after)
    after.pairs.count = 9
    with pytest.raises(UserError, match=r"pairs\.count=8 \(this one has 9\)"):
        runs.claim(tmp_path, after)
