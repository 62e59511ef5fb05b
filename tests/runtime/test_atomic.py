"""A file is there whole or not at all."""

import stat

import numpy as np
import pytest

from d2g_jax.runtime import atomic
from d2g_jax.runtime.errors import UserError


def test_a_body_that_raises_leaves_the_old_file_and_nothing_beside(tmp_path):
    atomic.write_text(tmp_path / "a", "old")

    def interrupted():
        with atomic.replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_mode_is_that_of_open_whoever_wrote_the_file(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic.replacing(tmp_path / "private") as temporary:
        temporary.write_text("")
        temporary.chmod(0o600)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "private")}
    assert len(modes) == 1


def test_array_round_trip_makes_folders(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    atomic.write_array(tmp_path / "new" / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "a.npy"), array)


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a: cannot be written .*; free space or choose a writable folder"):
        atomic.write_text(tmp_path / "file" / "a", "")
