"""Folders of images as a protocol sees them: what is prepared how, and what is refused."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from d2g_jax.evaluate import job
from d2g_jax.evaluate.images import batches, prepare, survey
from d2g_jax.evaluate.protocols import PROTOCOLS, find_protocol
from d2g_jax.runtime.errors import UserError

COCO = dataclasses.replace(PROTOCOLS["coco2014-30k"], size=16)


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(folder, names, size=(20, 24), mode="RGB"):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(noise(i, *size)).convert(mode).save(folder / name)
    return folder


@pytest.mark.parametrize("size", [(20, 27), (31, 20), (24, 24)])
def test_the_short_side_is_cropped_from_the_centre_and_resized_by_lanczos(size):
    image = noise(0, *size)
    side = min(size)
    # torchvision.transforms.functional.center_crop
    top, left = (round((length - side) / 2.0) for length in size)
    square = image[top : top + side, left : left + side]
    expected = np.asarray(Image.fromarray(square).resize((16, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(prepare(Image.fromarray(image), COCO), expected)


def test_images_come_in_natural_order_and_the_contact_sheet_is_none(tmp_path):
    names = ["10.png", "2.png", "1.png", "grid.png"]
    save(tmp_path, names)
    (tmp_path / "drawing.json").write_text("{}")
    found = survey(tmp_path, COCO)
    assert found.names == ("1.png", "2.png", "10.png")
    assert (found.formats, found.size, len(found.digests)) == ({"PNG": 3}, (24, 20), 3)
    (first, images), (second, rest) = batches(found, COCO, 2)
    assert (first, second, images.shape, rest.shape) == ([0, 1], [2], (2, 16, 16, 3), (1, 16, 16, 3))
    np.testing.assert_array_equal(images[0], prepare(Image.open(tmp_path / "1.png"), COCO))


def test_the_digest_is_of_contents_and_order(tmp_path):
    one, same = save(tmp_path / "one", ["a.png", "b.png"]), save(tmp_path / "same", ["x.png", "y.png"])
    other = save(tmp_path / "other", ["b.png", "a.png"])
    digests = [survey(folder, COCO).sha256 for folder in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_corrupt_files_are_named_counted_and_refused_above_the_threshold(tmp_path):
    save(tmp_path, [f"{i}.png" for i in range(5)])
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3.png").write_text("no image")
    with pytest.raises(UserError, match=r"2 of 5 images cannot be read: 1.png, 3.png.*--max-corrupt=2"):
        survey(tmp_path, COCO, max_corrupt=1)
    found = survey(tmp_path, COCO, max_corrupt=2)
    assert set(found.corrupt) == {"1.png", "3.png"}
    assert found.indices == (0, 2, 4)  # the others keep their prompts
    assert found.only(range(3)).names == ("0.png", "2.png")
    (tmp_path / "0.png").write_text("")
    with pytest.raises(UserError, match=r"3 of 5"):
        survey(tmp_path, COCO, max_corrupt=2)


def test_mixed_sizes(tmp_path):
    save(tmp_path, [f"{i}.png" for i in range(5)])
    save(tmp_path, ["7.png"], (10, 10))
    with pytest.raises(UserError, match=r"2 sizes: 24x20, but 7.png 10x10"):
        survey(tmp_path, COCO)
    assert survey(tmp_path, COCO, mixed=True).size is None


def test_mixed_modes_and_formats(tmp_path):
    save(tmp_path, ["0.png", "1.png"])
    save(tmp_path, ["2.png"], mode="L")
    with pytest.raises(UserError, match=r"2 modes: RGB, but 2.png L"):
        survey(tmp_path, COCO)
    (tmp_path / "2.png").unlink()
    save(tmp_path, ["3.jpg"])
    with pytest.raises(UserError, match=r"2 formats: PNG, but 3.jpg JPEG"):
        survey(tmp_path, COCO)
    assert survey(tmp_path, COCO, mixed=True).formats == {"PNG": 2, "JPEG": 1}


def test_transparency_is_refused_also_among_photographs(tmp_path):
    save(tmp_path, ["0.png"], mode="RGBA")
    with pytest.raises(UserError, match=r"0.png: mode RGBA"):
        survey(tmp_path, COCO, mixed=True)


def test_a_protocol_that_resizes_nothing_takes_one_size(tmp_path):
    save(tmp_path, ["0.png"], (24, 32))
    with pytest.raises(UserError, match=r"32x24 pixels; the protocol digits resizes nothing and takes 64x64"):
        survey(tmp_path, PROTOCOLS["digits"])


def test_no_folder_no_images(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        survey(tmp_path / "nowhere", COCO)
    with pytest.raises(UserError, match="holds no image"):
        survey(tmp_path, COCO)
    (tmp_path / "0.png").write_text("")
    with pytest.raises(UserError, match="none of 1 images"):
        survey(tmp_path, COCO, max_corrupt=1)


def test_protocols_are_told_apart_by_every_field():
    assert len({p.sha256 for p in PROTOCOLS.values()}) == len(PROTOCOLS)
    one = PROTOCOLS["coco2017-5k"]
    assert dataclasses.replace(one, neighbours=5).sha256 != one.sha256
    with pytest.raises(UserError, match="coco2014-30k, coco2017-5k, cifar10-50k, digits"):
        find_protocol("coco")


@pytest.mark.parametrize("name", ["._1.png", "._grid.png", ".hidden.jpg"])
def test_what_a_mac_lays_beside_images_is_not_corrupt(name, tmp_path):
    save(tmp_path, ["1.png", "2.png"])
    (tmp_path / name).write_bytes(b"\0\5\x16\7 Mac OS X")
    assert survey(tmp_path, COCO).names == ("1.png", "2.png")


def test_when_none_of_the_first_can_be_read_nothing_is_measured(tmp_path):
    save(tmp_path, ["2.png", "3.png"])
    (tmp_path / "1.png").write_bytes(b"")
    request = SimpleNamespace(max_corrupt=1, samples=1)
    plan = SimpleNamespace(protocol=COCO, request=request, samples=1)
    with pytest.raises(UserError, match="of the first 1 images none can be read"):
        job._survey(plan, tmp_path)
