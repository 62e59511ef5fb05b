"""Contact sheets: where each image stands, and files that are whole or absent."""

import numpy as np
import pytest
from PIL import Image

from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.grid import grid, save_png


def test_images_stand_row_by_row_on_white():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    sheet = grid(images, columns=2, padding=1)
    assert sheet.shape == (3 * 5 + 1, 2 * 7 + 1, 3)
    assert sheet.dtype == np.uint8
    for index in range(5):
        top, left = 1 + 5 * (index // 2), 1 + 7 * (index % 2)
        np.testing.assert_array_equal(sheet[top : top + 4, left : left + 6], images[index])
    assert (sheet[11:, 8:] == 255).all()  # the sixth place is empty
    assert (sheet[0] == 255).all()
    assert (sheet[:, -1] == 255).all()
    assert (sheet[5] == 255).all()


def test_no_padding_is_a_plain_mosaic():
    images = np.random.default_rng(0).integers(0, 255, (4, 2, 2, 3), np.uint8)
    np.testing.assert_array_equal(grid(images, 4, padding=0), np.concatenate(list(images), axis=1))


@pytest.mark.parametrize("images", [np.zeros((1, 2, 2, 3), np.float32), np.zeros((0, 2, 2, 3), np.uint8)])
def test_what_is_no_batch_of_images_is_refused(images):
    with pytest.raises(ValueError, match="must be"):
        grid(images, 1)


def test_a_png_is_written_whole_and_leaves_nothing_beside(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    save_png(tmp_path / "new" / "a.png", image)
    save_png(tmp_path / "new" / "a.png", image[::-1])  # writing again replaces
    with Image.open(tmp_path / "new" / "a.png") as read:
        np.testing.assert_array_equal(np.asarray(read), image[::-1])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a\.png: cannot be written"):
        save_png(tmp_path / "file" / "a.png", np.zeros((2, 2, 3), np.uint8))
