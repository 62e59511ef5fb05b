"""Arrays of other people: .npy files of floats, and every other thing that is given in their place."""

import io

import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.inputs.arrays import check_floats, read_array
from d2g_jax.runtime.errors import UserError


def _npz():
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(3))
    return stream.getvalue()


def _damaged(place, byte):
    """With another byte in its header."""
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    content = bytearray(stream.getvalue())
    content[place : place + 1] = byte
    return bytes(content)


DAMAGED = [_damaged(_damaged(0, b"\x93").index(b"}"), b" "), _damaged(21, b","), _damaged(26, b"B")]


@pytest.mark.parametrize("content", [b"", b"0.1 0.2", _npz(), b"\x93NUMPY\x01\x00", *DAMAGED, None])
def test_what_is_no_npy(content, tmp_path):
    if content is not None:
        (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npy: cannot be read as \.npy .*; give noise") as caught:
        read_array(tmp_path / "a.npy", "noise")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("array", [np.array([None]), np.array(["a"]), np.zeros(3, np.int32), np.zeros(3, bool)])
def test_other_kinds_of_values(array, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=r"a\.npy: .*give noise"):
        check_floats(read_array(tmp_path / "a.npy", "noise"), tmp_path / "a.npy", "noise")


def test_bfloat16_is_read_from_memory_and_refused_from_a_file(tmp_path):
    array = np.asarray(jnp.ones(3, jnp.bfloat16))
    check_floats(array, "latents", "noise")
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match="as numpy stores bfloat16; save it as float32"):
        check_floats(read_array(tmp_path / "a.npy", "noise"), "a.npy", "noise")
