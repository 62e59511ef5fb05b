"""Images of other people: what is read as it looks, and what is refused because it would not be."""

import numpy as np
import pytest
from PIL import Image

from d2g_jax.inputs.images import image_files, read_rgb
from d2g_jax.runtime.errors import UserError


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
def test_modes_that_look_the_same_as_rgb(mode, tmp_path):
    file = tmp_path / f"a.{'jpg' if mode == 'CMYK' else 'png'}"
    Image.new(mode, (4, 3)).save(file)
    assert (read_rgb(file, file).mode, read_rgb(file, file).size) == ("RGB", (4, 3))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_images_are_not_turned_as_exif_says(orientation, tmp_path):
    """As clean-fid, torchvision's folders and `PIL.Image.open` leave them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (4, 3)).save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg", "a").size == (4, 3)


def _sixteen_bits(file):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(file)


def _hidden_colours(file):
    Image.new("RGBA", (4, 4), (200, 10, 10, 0)).save(file)


def _grey_with_alpha(file):
    Image.new("LA", (4, 4)).save(file)


def _palette_with_transparency(file):
    Image.new("P", (4, 4)).save(file, transparency=0)


@pytest.mark.parametrize(
    ("write", "mode"),
    [
        (_sixteen_bits, "I;16"),
        (_hidden_colours, "RGBA"),
        (_grey_with_alpha, "LA"),
        (_palette_with_transparency, "P with transparency"),
    ],
)
def test_images_that_a_conversion_would_change(write, mode, tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"a.png: mode {mode}; give 8-bit RGB or grey without transparency"):
        read_rgb(tmp_path / "a.png", tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_damaged_files_are_named(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png: not a readable image") as caught:
        read_rgb(tmp_path / "a.png", tmp_path / "a.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.webp", "b.BMP", "c.tiff"])
def test_images_of_other_formats_are_not_left_out_in_silence(name, tmp_path):
    with pytest.raises(UserError, match=f"{name}: neither PNG nor JPEG; convert it to PNG or take it out"):
        list(image_files([tmp_path / "a.png", tmp_path / name]))
    assert list(image_files([tmp_path / f"._{name}"])) == []


def test_what_a_mac_leaves_beside_images_is_none(tmp_path):
    names = ["a.png", "b.JPG", "c.jpeg", "._a.png", ".DS_Store", "grid.png", "prompts.txt"]
    assert [file.name for file in image_files(tmp_path / name for name in names)] == ["a.png", "b.JPG", "c.jpeg"]
