"""The noise is a function of (seed, record id) alone, and normal."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.diffusion import noise


def test_table_is_normal_and_symmetric():
    table = noise.quantiles()
    assert table.shape == (65536,)
    assert table.dtype == np.float16
    np.testing.assert_array_equal(table, -table[::-1])
    assert np.all(np.diff(table.astype(np.float64)) >= 0)
    assert table.astype(np.float64).var() == pytest.approx(1.0, abs=1e-4)
    assert (table.astype(np.float64) ** 4).mean() == pytest.approx(3.0, abs=5e-3)


def test_bits_are_pinned():
    """Stored pairs depend on these very bits: a change here orphans every data set."""
    bits = np.asarray(noise.record_bits(7, jnp.arange(3, dtype=jnp.uint32), (4, 2, 2)))
    assert bits.dtype == np.uint16
    assert hashlib.sha256(bits.astype("<u2").tobytes()).hexdigest()[:16] == "5547a576936f7ef4"
    assert noise.bits_hash(bits[1]) == 7783244563952285246


def test_a_record_does_not_depend_on_its_batch():
    together = noise.record_noise(3, jnp.arange(5, dtype=jnp.uint32), (4, 8, 8))
    alone = noise.record_noise(3, jnp.array([2], jnp.uint32), (4, 8, 8))
    np.testing.assert_array_equal(together[2], alone[0])
    assert not np.array_equal(together[1], together[2])


def test_seeds_and_purposes_differ():
    ids = jnp.arange(2, dtype=jnp.uint32)
    assert not np.array_equal(noise.record_bits(0, ids, (8,)), noise.record_bits(1, ids, (8,)))
    assert noise.purpose_key(0, "a") != noise.purpose_key(0, "b")


def test_noise_is_standard_normal():
    drawn = np.asarray(noise.record_noise(0, jnp.arange(64, dtype=jnp.uint32), (4, 16, 16)), np.float64)
    assert drawn.mean() == pytest.approx(0, abs=4 / np.sqrt(drawn.size))
    assert drawn.var() == pytest.approx(1, abs=4 * np.sqrt(2 / drawn.size))
    assert np.array_equal(drawn, drawn.astype(np.float16))
