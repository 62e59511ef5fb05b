"""Claims: one owner at a time, renewed while it lives, taken over when it does not."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from d2g_jax import records
from d2g_jax.diffusion import noise
from d2g_jax.pairs.claims import Claim, Claims
from d2g_jax.records.files import write_json
from d2g_jax.runtime.errors import UserError

MANIFEST = records.Manifest(
    teacher="none", teacher_hash="", solver="ddim", num_inference_steps=1, guidance_scale=1.0,
    prediction_type="epsilon", first_timestep=0, scheduler={}, noise_implementation=noise.IMPLEMENTATION, seed=0,
    scaling_factor=1.0, latent_shape=(1, 2, 2), token_length=1, latent_dtype="float16", store_noise=False,
    text_shapes={}, num_prompts=1, num_distinct_prompts=1, num_records=8, num_shards=4, config_hash="",
)  # fmt: skip


def claims(folder, lease=60.0):
    return Claims(folder, MANIFEST, lease)


def of(folder, shard):
    return json.loads((folder / "claims" / f"{shard:05d}.json").read_text())


def write(folder, shard, **changes):
    mine = Claim("another", "elsewhere", 1, time.time())
    write_json(folder / "claims" / f"{shard:05d}.json", dataclasses.replace(mine, **changes))


def test_a_shard_has_one_owner(tmp_path):
    with claims(tmp_path) as first, claims(tmp_path) as second:
        taken = first.take(range(4))
        assert [next(taken), next(taken)] == [0, 1]
        assert list(second.take(range(4))) == [2, 3]
        assert list(taken) == []
        assert of(tmp_path, 1)["worker"] == first.worker != second.worker
        first.release(1)
        assert list(second.take([0, 1])) == [1]
    assert not list((tmp_path / "claims").iterdir())


def test_without_a_lease_there_are_no_claims(tmp_path):
    with claims(tmp_path, 0) as one, claims(tmp_path, 0) as other:
        assert list(one.take(range(4))) == list(other.take(range(4))) == [0, 1, 2, 3]
    assert not (tmp_path / "claims").exists()
    with pytest.raises(UserError, match=r"pairs\.lease_seconds=-1"):
        claims(tmp_path, -1)


def test_a_renewed_claim_is_kept_and_a_dead_one_taken_over(tmp_path):
    write(tmp_path, 3)
    with claims(tmp_path, 0.4) as living, claims(tmp_path, 0.4) as other:
        assert list(living.take([0])) == [0]
        time.sleep(1.0)
        assert list(other.take([0, 3])) == [3]
        assert of(tmp_path, 3)["worker"] == other.worker


def test_a_process_that_is_gone_from_this_machine_loses_its_claim_at_once(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = os.uname().nodename
    write(tmp_path, 0, host=host, pid=gone.pid)
    write(tmp_path, 1, host=host, pid=os.getpid())
    write(tmp_path, 2, pid=gone.pid)
    with claims(tmp_path) as mine:
        assert list(mine.take(range(3))) == [0]


@pytest.mark.parametrize("content", ["", '{"worker": "a', "[]"])
def test_half_a_claim_counts_until_it_is_old(tmp_path, content):
    file = tmp_path / "claims" / "00000.json"
    file.parent.mkdir()
    file.write_text(content)
    with claims(tmp_path) as mine:
        assert list(mine.take([0])) == []
        os.utime(file, (0, 0))
        assert list(mine.take([0])) == [0]


def test_another_owners_claim_is_not_given_back(tmp_path):
    with claims(tmp_path) as mine:
        assert list(mine.take([0])) == [0]
        write(tmp_path, 0)
        mine.release(0)
        assert of(tmp_path, 0)["worker"] == "another"
        mine.clear()
    assert not (tmp_path / "claims").exists()


def test_order_of_trying(tmp_path):
    with claims(tmp_path, 0) as static:
        assert static.order([1, 2, 3, 5], 0, 1) == [1, 2, 3, 5]
        parts = [static.order(range(8), index, 3) for index in range(3)]
        assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]]
    with claims(tmp_path) as mine:
        assert mine.order(range(8), 1, 3) == [1, 4, 7, 0, 2, 3, 5, 6]
        alone = mine.order(list(range(8)), 0, 1)
        assert sorted(alone) == list(range(8))
        assert alone == [(alone[0] + i) % 8 for i in range(8)]
        assert mine.order([], 0, 1) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "claims").write_text("a file where the folder should be")
    with claims(tmp_path) as mine, pytest.raises(UserError, match=r"claims.*cannot be written"):
        list(mine.take([0]))
