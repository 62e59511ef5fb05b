"""`d2g metric`: distances between files, what it says of them, and what it refuses; the examples of docs/metric.md."""

import json
import re
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from d2g_jax.digits.config import WEIGHTS
from d2g_jax.losses import perceptual
from d2g_jax.losses.lpips import LPIPS, save_lpips
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.metric import measure as job
from d2g_jax.metric.measure import measure
from d2g_jax.models import vae, vgg
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.grid import save_png

DIGITS = WEIGHTS / "metric"
DOCS = Path(__file__).parents[2] / "docs" / "metric.md"


def random_tree(abstract, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.uniform(-0.2, 0.5, leaf.shape).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def pixel_metric(tmp_path_factory):
    """The folder of an LPIPS of one convolution a slice."""
    folder = tmp_path_factory.mktemp("lpips")
    config = vgg.VGGConfig(3, (4, 4, 4, 4, 4), (1, 1, 1, 1, 1), vgg.PIXELS.pools, batch_norm=False, tap="pre_pool")
    save_lpips(folder, random_tree(vgg.build(config).abstract()), [np.ones(4, np.float32)] * 5, config)
    return folder


@pytest.fixture(scope="module")
def sd15_metric(tmp_path_factory):
    """The folder of a tiny LatentLPIPS in the space of SD 1.5."""
    folder = tmp_path_factory.mktemp("sd15")
    config = vgg.VGGConfig(4, (4, 4), (1, 1), (False, True))
    params = jax.tree.map(np.abs, random_tree(vgg.build_training(config).abstract()))
    perceptual.save_metric(folder, config, params, [np.ones(4, np.float32)] * 2, perceptual.latent_space("sd15"))
    return folder


@pytest.fixture
def latents(tmp_path):
    """Two .npy files (3, 4, 8, 8), and their arrays."""
    rng = np.random.default_rng(1)
    arrays = rng.normal(size=(2, 3, 4, 8, 8)).astype(np.float32)
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for file, array in zip(files, arrays, strict=True):
        np.save(file, array)
    return files, [jnp.asarray(array.transpose(0, 2, 3, 1)) for array in arrays]


def picture(file, size=(16, 16), seed=0, mode="RGB"):
    """A random image of (height, width), written; its pixels as LPIPS sees them."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).convert(mode)
    file.parent.mkdir(exist_ok=True)
    image.save(file)
    return jnp.asarray(np.asarray(Image.open(file).convert("RGB"), np.float32) / 127.5 - 1)[None]


def refused(*arguments, **keywords):
    with pytest.raises(UserError) as error:
        measure(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_latents_without_augmentation(latents):
    files, arrays = latents
    result = measure(DIGITS, *files)
    metric = LatentLPIPS.load(DIGITS)
    expected = jax.jit(lambda a, b: metric.distance(a, b, scaled=True))(*arrays)
    np.testing.assert_allclose(result["distances"], expected, rtol=1e-5)
    assert result["mean"] == pytest.approx(np.mean(result["distances"]))
    told = {key: result[key] for key in ("metric", "space", "names", "draws", "preset", "seed", "scaled", "weights")}
    assert told == {
        "metric": "latent_lpips", "space": "digits", "names": None, "draws": 0, "preset": None, "seed": None,
        "scaled": True, "weights": str(DIGITS),
    }  # fmt: skip
    assert re.fullmatch("[0-9a-f]{64}", result["weights_sha256"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    same = measure(DIGITS, files[0], files[0])
    assert same["distances"] == [0, 0, 0]


def test_draws(latents, monkeypatch):
    """The mean of K draws; the same seed the same values, whatever is measured beside a sample; another seed others."""
    files, arrays = latents
    first = measure(DIGITS, *files, draws=2, seed=5, preset="co")
    assert (first["metric"], first["preset"], first["draws"], first["seed"]) == ("e_latent_lpips", "co", 2, 5)
    assert measure(DIGITS, *files, draws=2, seed=5, preset="co") == first
    assert measure(DIGITS, *files, draws=2, seed=6, preset="co")["mean"] != first["mean"]
    metric, key = LatentLPIPS.load(DIGITS), jax.random.key(5)
    run = jax.jit(lambda a, b: perceptual.expected_distance(metric, key, a, b, "co", draws=2, scaled=True))
    np.testing.assert_allclose(first["distances"], run(*arrays), rtol=1e-5)
    monkeypatch.setattr(job, "_BATCH", 2)  # the third sample in a call of its own
    np.testing.assert_allclose(
        measure(DIGITS, *files, draws=2, seed=5, preset="co")["distances"], first["distances"], rtol=1e-5
    )


def test_many_draws_show_how_far_they_are(latents, monkeypatch, capsys):
    monkeypatch.setattr("d2g_jax.runtime.progress.SECONDS_BETWEEN_LINES", 0)
    measure(DIGITS, *latents[0], draws=3)
    shown = [line.split(", ")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == [f"distances: {done}/9 draw" for done in (0, 3, 6, 9)]


def test_raw_latents(sd15_metric, latents, tmp_path):
    files, _ = latents
    raw = [tmp_path / "raw_a.npy", tmp_path / "raw_b.npy"]
    for file, scaled in zip(raw, files, strict=True):
        np.save(file, np.load(scaled).astype(np.float64) / 0.18215)
    result = measure(sd15_metric, *raw, scaled=False)
    assert (result["space"], result["scaled"]) == ("sd15", False)
    np.testing.assert_allclose(result["distances"], measure(sd15_metric, *files)["distances"], rtol=1e-4)
    with pytest.warns(UserWarning, match=r"raw_.\.npy: standard deviation 5.* looks raw, but was given as scaled"):
        measure(sd15_metric, *raw)


def test_two_images(pixel_metric, tmp_path):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg", seed=1)
    result = measure(pixel_metric, tmp_path / "a.png", tmp_path / "b.jpg")
    metric = LPIPS.load(pixel_metric)
    np.testing.assert_allclose(result["distances"], jax.jit(metric.distance)(a, b), rtol=1e-5)
    told = [result[key] for key in ("metric", "space", "names", "draws", "scaled")]
    assert told == ["lpips", "pixels", ["a.png"], 0, None]
    grey = picture(tmp_path / "grey.png", seed=2, mode="L")
    result = measure(pixel_metric, tmp_path / "grey.png", tmp_path / "grey.png")
    assert result["distances"] == [0]
    assert grey.shape == (1, 16, 16, 3)


def test_folders_of_images(pixel_metric, tmp_path):
    """By name and in order; images of several sizes; the contact sheets of `d2g sample` left out."""
    a, b = tmp_path / "a", tmp_path / "b"
    sizes = {"0.png": (16, 16), "1.png": (16, 16), "2.png": (16, 20), "3.PNG": (16, 16)}
    pairs = [
        (picture(a / name, size, seed=i), picture(b / name, size, seed=9 + i))
        for i, (name, size) in enumerate(sizes.items())
    ]
    picture(a / "grid.png", (40, 40))
    (b / "latents.npy").write_bytes(b"")
    result = measure(pixel_metric, a, b)
    assert result["names"] == list(sizes)
    distance = jax.jit(LPIPS.load(pixel_metric).distance)
    np.testing.assert_allclose(result["distances"], [distance(*pair)[0] for pair in pairs], rtol=1e-5)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 16, 8, 8), np.float32), "shape (3, 16, 8, 8); space digits is floating point (N, 4, h, w)"),
        (np.zeros((3, 8, 8, 4), np.float32), "move its last axis to the second place"),
        (np.zeros((4, 8, 8), np.float32), "shape (4, 8, 8)"),
        (np.zeros((0, 4, 8, 8), np.float32), "shape (0, 4, 8, 8)"),
        (np.zeros((3, 4, 8, 3), np.float32), "at least 4x4"),
        (np.zeros((3, 4, 8, 8), np.int32), "holds int32"),
        (np.full((3, 4, 8, 8), np.nan, np.float32), "holds NaN"),
        (np.full((3, 4, 8, 8), 3e380), "holds NaN or infinity"),
        (np.array([None]), "cannot be read as .npy"),
    ],
)
def test_wrong_latents(latents, tmp_path, array, words):
    (a, _), _ = latents
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, array, allow_pickle=True)
    message = refused(DIGITS, a, wrong)
    assert words in message
    assert message.startswith(str(wrong))


def test_wrong_latent_files(latents, tmp_path):
    (a, b), _ = latents
    for content in (b"", b"no array", b.read_bytes()[:-8]):
        (tmp_path / "damaged.npy").write_bytes(content)
        assert "damaged.npy: cannot be read as .npy" in refused(DIGITS, a, tmp_path / "damaged.npy")
    np.save(b, np.zeros((2, 4, 8, 8), np.float32))
    assert "has shape (3, 4, 8, 8) and" in refused(DIGITS, a, b)
    np.save(a, np.full((2, 4, 8, 8), 3e38, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of a standard deviation that overflows
        assert "too large for float32" in refused(DIGITS, a, b)


def test_wrong_images(pixel_metric, tmp_path):
    a = tmp_path / "a.png"
    picture(a)
    picture(tmp_path / "wide.png", (16, 24))
    wide = refused(pixel_metric, a, tmp_path / "wide.png")
    assert f"{a} is 16x16 and {tmp_path / 'wide.png'} is 24x16 pixels; give images of one size" in wide
    picture(tmp_path / "small.png", (8, 16))
    assert "small.png is 16x8 pixels; this metric needs at least 16x16" in refused(
        pixel_metric, tmp_path / "small.png", tmp_path / "small.png"
    )
    (tmp_path / "text.png").write_text("no image")
    assert "text.png: not a readable image" in refused(pixel_metric, a, tmp_path / "text.png")
    (tmp_path / "half.png").write_bytes(a.read_bytes()[:400])
    assert "half.png: not a readable image" in refused(pixel_metric, a, tmp_path / "half.png")
    picture(tmp_path / "alpha.png", mode="RGBA")
    assert "alpha.png: mode RGBA" in refused(pixel_metric, a, tmp_path / "alpha.png")


def test_unlike_folders(pixel_metric, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for name in ("0.png", "1.png", "2.png"):
        picture(a / name)
    b.mkdir()
    assert f"{b}: holds no image" in refused(pixel_metric, a, b)
    picture(b / "0.png")
    assert f"{b}: lacks 1.png (and 1 more)" in refused(pixel_metric, a, b)
    assert f"{b}: lacks 1.png (and 1 more)" in refused(pixel_metric, b, a)
    assert f"{a} is a folder and {b / '0.png'} is an image; give two of a kind" in refused(pixel_metric, a, b / "0.png")


def test_files_of_the_wrong_kind(pixel_metric, latents, tmp_path):
    (a, b), _ = latents
    image = tmp_path / "a.png"
    save_png(image, np.zeros((16, 16, 3), np.uint8))
    assert "give two of a kind" in refused(DIGITS, a, image)
    assert f"{image}: not latents, which {DIGITS} measures" in refused(DIGITS, image, image)
    assert f"{a}: latents, but {pixel_metric} measures images" in refused(pixel_metric, a, b)
    assert "draws=2: only latents are augmented" in refused(pixel_metric, image, image, draws=2)
    assert "scaled=False, raw latents: " in refused(pixel_metric, image, image, scaled=False)
    assert "nowhere.npy: no such file or folder" in refused(DIGITS, a, tmp_path / "nowhere.npy")
    (tmp_path / "a.txt").write_text("")
    assert "a.txt: neither latents (.npy) nor an image" in refused(DIGITS, a, tmp_path / "a.txt")


def test_wrong_requests_and_metrics(latents, tmp_path):
    files, _ = latents
    assert "draws=-1" in refused(DIGITS, *files, draws=-1)
    assert "seed=-1" in refused(DIGITS, *files, seed=-1)
    assert "preset 'gb' is unknown" in refused(DIGITS, *files, preset="gb")
    assert "nowhere: no metric folder" in refused(tmp_path / "nowhere", *files)
    assert "config.json is missing; a metric folder holds one" in refused(tmp_path, *files)
    for text, words in (("{", "cannot be read"), ("[]", "expected a JSON object"), ("{}", "latent_space")):
        (tmp_path / "config.json").write_text(text)
        assert words in refused(tmp_path, *files)


def example(number, **names):
    """Runs a Python block of docs/metric.md among `names`."""
    block = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[number]
    exec(compile(block, f"{DOCS}, block {number}", "exec"), names)
    return names


def test_the_training_example(monkeypatch, tmp_path, latents):
    """The documented lines, as they stand, give a gradient that makes the loss smaller."""
    (tmp_path / "metric-sd15").symlink_to(DIGITS)
    monkeypatch.chdir(tmp_path)
    model = types.SimpleNamespace(apply=lambda params, noise: noise * params["scale"])
    names = example(0, model=model)
    _, (noise, target) = latents
    step = jax.jit(jax.value_and_grad(names["loss_fn"]))
    params, key = {"scale": jnp.ones(4)}, jax.random.key(0)
    loss, gradient = step(params, names["metric"], noise, target, key)
    assert np.abs(gradient["scale"]).max() > 0
    after, _ = step({"scale": params["scale"] - 0.1 * gradient["scale"]}, names["metric"], noise, target, key)
    assert 0 < after < loss


def test_the_decoded_example(monkeypatch, tmp_path, pixel_metric, latents):
    (tmp_path / "lpips").symlink_to(pixel_metric)
    monkeypatch.chdir(tmp_path)
    config = vae.VaeConfig(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), norm_num_groups=2,
    )  # fmt: skip
    network = vae.build(config)
    pipeline = types.SimpleNamespace(vae=network, params={"vae": network.init(jax.random.key(0))})
    _, (a, b) = latents
    distance = jax.jit(lambda a, b: example(1, pipeline=pipeline, a=a, b=b)["distance"])(a, b)
    assert distance.shape == (3,)
    assert (distance > 0).all()
