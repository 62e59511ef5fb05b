"""A small folder of pairs: 23 records in 3 shards, latents of 2x4x3, noise drawn as the pair job draws it."""

import functools

import numpy as np
import pytest

from d2g_jax import records
from d2g_jax.diffusion import noise

SHAPE = (2, 4, 3)  # (C, h, w): three different numbers, so that no transposition goes unseen
SEED = 7

jitted_bits = functools.cache(lambda count: np.asarray(noise.record_bits(SEED, np.arange(count), SHAPE)))


def manifest_with(**changes) -> records.Manifest:
    fields = {
        "teacher": "tiny",
        "teacher_hash": "ab" * 32,
        "solver": "ddim",
        "num_inference_steps": 50,
        "guidance_scale": 3.0,
        "prediction_type": "epsilon",
        "first_timestep": 981,
        "scheduler": {"num_train_timesteps": 1000, "beta_start": 0.00085, "prediction_type": "epsilon"},
        "noise_implementation": noise.IMPLEMENTATION,
        "seed": SEED,
        "scaling_factor": 0.18215,
        "latent_shape": SHAPE,
        "token_length": 5,
        "latent_dtype": "float16",
        "store_noise": False,
        "text_shapes": {},
        "num_prompts": 23,
        "num_distinct_prompts": 23,
        "num_records": 23,
        "num_shards": 3,
    }
    fields |= changes
    return records.Manifest(**fields, config_hash=records.config_hash(fields))


def make_record(manifest: records.Manifest, record_id: int) -> dict:
    bits = jitted_bits(manifest.num_records)[record_id]
    latents = np.random.default_rng(record_id).normal(size=SHAPE).astype(np.float32)
    schema = manifest.schema()
    record = {
        "id": record_id,
        "prompt": f"a “digit” {record_id}",
        "input_ids": np.arange(record_id, record_id + 5, dtype=np.int32),
        "noise_seed": SEED,
        "noise_hash": noise.bits_hash(bits),
        "latents": latents.astype(schema.tensors()["latents"][1]),
    }
    for name, (shape, dtype) in schema.tensors().items():
        if name in manifest.text_shapes:
            record[name] = np.random.default_rng([record_id, len(name)]).normal(size=shape).astype(dtype)
    return record | ({"noise": noise.quantiles()[bits]} if manifest.store_noise else {})


def write_folder(folder, manifest: records.Manifest):
    manifest.write(folder)
    for shard in records.missing_shards(folder, manifest):
        ids = records.shard_range(shard, manifest.num_shards, manifest.num_records)
        records.write_shard(folder, manifest, shard, (make_record(manifest, i) for i in ids))
    records.write_metadata(folder, manifest)
    return folder


@pytest.fixture
def manifest():
    return manifest_with()


@pytest.fixture
def folder(tmp_path, manifest):
    return write_folder(tmp_path / "pairs" / "1.0.0", manifest)


@pytest.fixture
def pairs():
    """The helpers above, for tests that need another folder than `folder`."""

    class Helpers:
        manifest_with = staticmethod(manifest_with)
        make_record = staticmethod(make_record)
        write_folder = staticmethod(write_folder)

    return Helpers
