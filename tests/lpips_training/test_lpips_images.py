"""Labelled images from class folders and TFDS folders, and their crops."""

import hashlib
import importlib.resources
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tfds_folders import example, write_tfds

from d2g_jax.inputs.images import to_floats
from d2g_jax.lpips_training.image_folders import open_images
from d2g_jax.lpips_training.images import Crop, hold_out, random_box
from d2g_jax.runtime.errors import UserError


def test_class_folders_in_order(class_folders):
    (class_folders / "red" / "deeper").mkdir()
    (class_folders / "red" / "8.png").rename(class_folders / "red" / "deeper" / "x.PNG")
    images = open_images(class_folders, "train")
    assert (images.count, images.classes) == (18, ("blue", "red"))
    labels = [images.read(i)[1] for i in range(18)]
    assert labels == [0] * 9 + [1] * 9
    image = np.asarray(images.read(17)[0]).mean((0, 1))
    assert image[0] > image[2]  # red
    assert images.sha256 == open_images(class_folders, "train").sha256


def test_bad_folders(class_folders, tmp_path):
    with pytest.raises(UserError, match="missing: no such folder"):
        open_images(tmp_path / "missing", "train")
    (class_folders / "green").mkdir()
    with pytest.raises(UserError, match="green: holds no PNG or JPEG image"):
        open_images(class_folders, "train")
    only = tmp_path / "only"
    (only / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="only: holds 1 class folders; a classifier needs two"):
        open_images(only, "train")


@pytest.mark.parametrize("content", [b"", b"not an image", "cut"])
def test_unreadable_image_is_named(class_folders, content):
    file = class_folders / "blue" / "0.png"
    file.write_bytes(file.read_bytes()[:-200] if content == "cut" else content)
    with pytest.raises(UserError, match=r"blue/0\.png: not a readable image"):
        open_images(class_folders, "train").read(0)


def test_hold_out_splits_once_and_for_all(class_folders):
    images = open_images(class_folders, "train")
    train, val = hold_out(images, 0.25, seed=3)
    assert (train.count, val.count) == (14, 4)  # round(4.5) is even
    names = [train.name(i) for i in range(14)] + [val.name(i) for i in range(4)]
    assert len(set(names)) == 18
    assert hold_out(images, 0.25, seed=3)[1].sha256 == val.sha256 != hold_out(images, 0.25, seed=4)[1].sha256
    with pytest.raises(UserError, match=r"images\.held_out=0\.0 of 18 images leaves one part empty"):
        hold_out(images, 0.0, seed=3)


def gradient(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def test_plain_crop_is_the_centre():
    pixels = Crop(8, 0, seed=0).plain(gradient(20, 12), "x")
    assert pixels.shape == (8, 8, 3)
    assert pixels[0, 0, :2].tolist() == [6, 2]
    resized = Crop(8, 8, seed=0).plain(gradient(32, 16), "x")  # to 16x8, then the middle 8
    assert resized.shape == (8, 8, 3)
    assert abs(resized[:, :, 0].mean() - 15.5) < 1


def test_random_crops_are_functions_of_seed_row_and_view():
    image, crop = gradient(40, 30), Crop(8, 0, seed=0)
    first = crop.random(image, "x", 3, 1)
    np.testing.assert_array_equal(first, crop.random(image, "x", 3, 1))
    others = [crop.random(image, "x", 4, 1), crop.random(image, "x", 3, 2), Crop(8, 0, 1).random(image, "x", 3, 1)]
    assert all((other != first).any() for other in others)
    mirrored = [
        crop.random(image, "x", row, 1)[0, 0, 0] > crop.random(image, "x", row, 1)[0, 1, 0] for row in range(40)
    ]
    assert 10 < sum(mirrored) < 30
    assert Crop(8, 16, seed=0).random(image, "x", 0, 1).shape == (8, 8, 3)


def test_random_boxes_lie_inside_and_vary_as_torchvision_s():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(rng, 100, 80) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 100
    assert boxes[:, 3].max() <= 80
    share, aspect = width * height / 8000, width / height
    assert 0.06 < share.min() < 0.12
    assert share.max() > 0.9
    assert 0.7 < aspect.min() < 0.8 < 1.25 < aspect.max() < 1.4
    left, top, right, bottom = random_box(rng, 1000, 10)  # no try fits: the centre, as wide as 4/3 of the height
    assert (right - left, bottom - top, (left + right) / 2) == (13, 10, 500)


def test_images_smaller_than_the_crop(class_folders):
    crop, images = Crop(22, 0, seed=0), open_images(class_folders, "train")
    for cut in (lambda image, name: crop.plain(image, name), lambda image, name: crop.random(image, name, 0, 1)):
        with pytest.raises(UserError, match=r"blue/0\.png: 20x24 pixels, smaller than the crop of images\.size=22"):
            cut(images.read(0)[0], images.name(0))
    with pytest.raises(UserError, match=r"images\.resize=16 is less than images\.size=22"):
        Crop(22, 16, seed=0)


def test_pixels_to_floats():
    np.testing.assert_allclose(to_floats(np.array([0, 255, 51], np.uint8)), [-1, 1, -0.6], atol=1e-6)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds_folders_without_tensorflow(tmp_path, file_format):
    pictures = [gradient(10 + i, 12) for i in range(5)]
    folder = write_tfds(tmp_path / "toy", file_format, [example(p, i % 2) for i, p in enumerate(pictures)])
    images = open_images(folder, "train")
    assert (images.count, images.classes) == (5, ("blue", "red"))
    assert images.sha256 == hashlib.sha256(b'["toy", "1.0.0", "train", [2, 3]]').hexdigest()  # or caches would be lost
    for i in (4, 0, 2, 1, 3):
        image, label = images.read(i)
        assert label == i % 2
        np.testing.assert_array_equal(np.asarray(image), np.asarray(pictures[i]))


@pytest.mark.filterwarnings("ignore")  # TFDS' own
@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_what_tfds_itself_writes(tmp_path, file_format, monkeypatch):
    pytest.importorskip("tensorflow")  # for writing
    # TFDS takes the backport for granted and does not depend on it.
    monkeypatch.setitem(sys.modules, "importlib_resources", importlib.resources)
    import tensorflow_datasets as tfds

    pictures = [np.asarray(gradient(10 + i, 12)) for i in range(5)]
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name="toy",
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(names=["b", "a"])}
        ),
        split_datasets={"train": [(i, {"image": image, "label": i % 2}) for i, image in enumerate(pictures)]},
        data_dir=tmp_path,
        file_format=file_format,
    )
    images = open_images(builder.data_path, "train")
    assert (images.count, images.classes) == (5, ("b", "a"))
    seen = {image.width - 10: (np.asarray(image), label) for image, label in map(images.read, range(5))}  # shuffled
    for i, picture in enumerate(pictures):
        assert seen[i][1] == i % 2
        np.testing.assert_array_equal(seen[i][0], picture)


def test_bad_tfds_folders(tmp_path):
    folder = write_tfds(tmp_path / "toy", "tfrecord", [example(gradient(9, 9), i) for i in (0, 1, 0, 1, 7)])
    images = open_images(folder, "train")
    with pytest.raises(UserError, match=r"record 4: label 7 is none of the 2 classes"):
        images.read(4)
    with pytest.raises(UserError, match=r"toy: has no split 'validation', only train"):
        open_images(folder, "validation")
    shard = folder / "toy-train.tfrecord-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"00001-of-00002: corrupt at record 0"):
        open_images(folder, "train").read(2)
    shard.unlink()
    with pytest.raises(UserError, match=r"00001-of-00002: shard is missing"):
        open_images(folder, "train")


def test_bad_metadata_of_tfds_folders(tmp_path):
    folder = write_tfds(tmp_path / "toy", "tfrecord", [example(gradient(9, 9), i % 2) for i in range(5)])
    info = json.loads((folder / "dataset_info.json").read_text())
    (split,) = info["splits"]
    damaged = "toy: not a folder that TFDS prepared .*; prepare the dataset again"
    for change, message in (
        ({"splits": [{"name": "train"}]}, "split 'train' is empty"),
        ({"fileFormat": "riegeli"}, "file format 'riegeli' is not read"),
        ({"splits": [{**split, "filepathTemplate": "{SHARD_X_OF_Y}"}]}, "toy/00000-of-00002: shard is missing"),
        ({"name": ""}, damaged),
        ({"splits": [{**split, "name": ""}]}, damaged),
        ({"splits": [{**split, "shardLengths": ["x"]}]}, damaged),
        ({"splits": 3}, damaged),
    ):
        (folder / "dataset_info.json").write_text(json.dumps({**info, **change}))
        with pytest.raises(UserError, match=message) as caught:
            open_images(folder, "train")
        assert "\n" not in str(caught.value)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    features = json.loads((folder / "features.json").read_text())
    (folder / "label.labels.txt").write_text("blue\n")
    with pytest.raises(UserError, match=r"features\.json: label has 1 classes; a classifier needs two or more"):
        open_images(folder, "train")
    del features["featuresDict"]["features"]["label"]
    (folder / "features.json").write_text(json.dumps(features))
    with pytest.raises(UserError, match=r"features\.json: needs the features image .* has image"):
        open_images(folder, "train")
    (folder / "features.json").write_text("{")
    with pytest.raises(UserError, match=damaged):
        open_images(folder, "train")


def test_the_job_imports_neither_torch_nor_tensorflow():
    program = (
        "import sys, d2g_jax.lpips_training.job, d2g_jax.lpips_training.tfds_images\n"
        "import array_record.python.array_record_data_source\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'tensorflow')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
