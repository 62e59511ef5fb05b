"""What is wrong is told before a model draws for hours, and what is not finite gets no score."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from d2g_jax.__main__ import main
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.digits.scenes import real_scenes
from d2g_jax.evaluate import features, job, pairwise, reference
from d2g_jax.evaluate.protocols import PROTOCOLS
from d2g_jax.pipeline import draw
from d2g_jax.results import metric_weights
from d2g_jax.results.results import read_result
from d2g_jax.runtime.errors import UserError

N = 80
MODEL = ["evaluate", "--protocol=digits", f"--model={WEIGHTS / 'pipeline'}", "--steps=1", "--guidance=1"]
DESCRIPTION = {"seed": 0, "first_noise": 0, "noise": "x", "prompts_sha256": "0" * 64, "size": [32, 32]}


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.fixture
def undrawn(monkeypatch):
    """Fails the test when an image is drawn, of a model or of the digits' own reference."""

    def draw(*_, **__):
        raise AssertionError("drawn before it was refused")

    monkeypatch.setattr("d2g_jax.sample.model.draw", draw)
    monkeypatch.setattr(reference, "digits_reference", draw)


@pytest.fixture(scope="module")
def statistics(real, tmp_path_factory):
    """A file of `d2g evaluate reference`."""
    file = tmp_path_factory.mktemp("statistics") / "real.npz"
    assert main(["evaluate", "reference", "--protocol=digits", f"--images={real}", f"--out={file}"]) == 0
    return file


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=."], "--out=.: is a folder; give a file, result.json"),
        (["--out=LICENSE/a.json"], "LICENSE cannot be written; choose another folder"),
        (["--draw-batch=0"], "--draw-batch=0; give a whole number from 1"),
        (["--draw-batch=-1"], "--draw-batch=-1; give a whole number from 1"),
        (["--max-corrupt=-1"], "--max-corrupt=-1; give a whole number from 0"),
        (["--samples=1", "--metrics=kid"], "KID: subsets of 1; its estimate is of pairs"),
        (["--samples=3", "--metrics=recall"], "3 images have no 3-th neighbour"),
        (["--samples=64", "--metrics=fid"], "FID: 64 images of the system with 64 features; it needs at least 65"),
        (["--height=32", "--metrics=fid"], "draws 32x64 pixels (height x width); the protocol digits resizes nothing"),
        (["--reference=LICENSE", "--metrics=fid"], "cannot be read as reference statistics"),
        (["--reference=tests", "--metrics=fid"], "tests: holds no image"),
        (["--weights-lpips=tests", "--metrics=lpips_diversity"], "tests/config.json"),
        (["--weights-dreamsim=tests", "--metrics=dreamsim_diversity"], "lacks ensemble_lora"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_before_anything_is_drawn(flags, message, tmp_path, capsys):
    command = [*MODEL, f"--samples={N}", f"--out={tmp_path / 'a.json'}", *flags]
    assert message in refused(capsys, *command)
    assert list(tmp_path.rglob("*.png")) == []


@pytest.mark.usefixtures("undrawn")
def test_a_teacher_s_images_are_looked_at_before_anything_is_drawn(real, tiny_lpips, tmp_path, capsys):
    teacher = shutil.copytree(real, tmp_path / "teacher")
    flags = [f"--weights-lpips={tiny_lpips}", "--metrics=lpips_fidelity", f"--teacher-images={teacher}"]
    command = [*MODEL, f"--out={tmp_path / 'a.json'}", *flags]
    assert f"{N} images of the teacher for 81; give one for each" in refused(capsys, *command, "--samples=81")
    (teacher / "drawing.json").write_text(json.dumps(DESCRIPTION | {"seed": 9}))
    assert "the teacher drew with seed=9, not 0" in refused(capsys, *command, f"--samples={N}")


@pytest.mark.usefixtures("undrawn")
def test_folders_of_another_drawing_are_found_before_anything_is_drawn(tiny_lpips, tmp_path, capsys):
    (tmp_path / "a-drawn" / "diversity").mkdir(parents=True)
    (tmp_path / "a-drawn" / "diversity" / "drawing.json").write_text(json.dumps(DESCRIPTION))
    flags = [f"--weights-lpips={tiny_lpips}", "--metrics=lpips_diversity", f"--out={tmp_path / 'a.json'}"]
    assert "diversity/drawing.json: images of another drawing" in refused(capsys, *MODEL, f"--samples={N}", *flags)


def test_several_images_of_too_few_prompts(real, tiny_lpips, tmp_path, capsys):
    flags = [f"--weights-lpips={tiny_lpips}", "--metrics=lpips_diversity", f"--diversity-images={real}"]
    command = ["evaluate", "--protocol=digits", f"--images={real}", f"--samples={N}", f"--out={tmp_path / 'a.json'}"]
    assert f"{N} images; diversity takes 4 of each of {N} prompts" in refused(capsys, *command, *flags)


def test_images_too_small_for_lpips(tiny_lpips):
    with pytest.raises(UserError, match="images of 8 pixels; it needs at least 16"):
        pairwise.load("lpips", tiny_lpips, 8)


def test_a_model_that_draws_nan_gets_no_score(tmp_path, capsys, monkeypatch):
    check = draw.check_finite
    monkeypatch.setattr(draw, "check_finite", lambda latents, *rest: check(latents * np.nan, *rest))
    line = refused(capsys, *MODEL, "--samples=70", "--metrics=fid", f"--out={tmp_path / 'a.json'}")
    assert "pipeline: " in line
    assert "64 of 64 images are not finite" in line
    assert "check its weights" in line
    assert list(tmp_path.rglob("*.png")) == []


@pytest.mark.parametrize("name", ["kid", "accuracy", "clip_b32"])
def test_a_metric_that_is_no_number_is_not_written(name):
    values = {"kid": {"mean": np.nan, "std": 1.0}, "accuracy": {"all": np.inf}, "clip_b32": np.nan}
    with pytest.raises(UserError, match=f"^{name} is (nan|inf); check the images"):
        job._check_finite({"fid": 1.0, name: values[name]})


def test_accuracy_says_whose_it_is(tmp_path):
    command = [*MODEL, "--samples=4", "--draw-batch=4", "--metrics=accuracy", f"--out={tmp_path / 'a.json'}"]
    assert main(command) == 0
    digits = features.make_extractor(PROTOCOLS["digits"], None)
    assert read_result(tmp_path / "a.json")["weights"] == {"digits": {"name": digits.name, "sha256": digits.sha256}}


def test_the_digits_reference_is_measured_in_batches():
    """Two thousand images at once would take a large network's memory."""
    sizes = []

    def extract(images):
        sizes.append(len(images))
        return images.mean((1, 2), dtype=np.float32)

    made = reference.digits_reference(PROTOCOLS["digits"], {"a": features.FrozenNetwork("a", "0", extract)}, 300)["a"]
    assert sizes == [300] * 6 + [200]
    np.testing.assert_array_equal(made.features, extract(real_scenes().images))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--batch=0", "--batch=0; give a whole number from 1"),
        ("--max-corrupt=-1", "--max-corrupt=-1; give a whole number from 0"),
        ("--out=a.npy", "reference statistics are a .npz file"),
        ("--out=LICENSE/a.npz", "LICENSE cannot be written"),
    ],
)
def test_flags_of_reference(flag, message, real, tmp_path, capsys):
    command = ["evaluate", "reference", "--protocol=digits", f"--images={real}", f"--out={tmp_path / 'a.npz'}", flag]
    assert message in refused(capsys, *command)


def test_damaged_statistics(statistics, tmp_path):
    """Whatever byte is wrong, and wherever the file ends: one line, or a file that still reads."""
    protocol, content = PROTOCOLS["digits"], statistics.read_bytes()
    extractor, damaged = features.make_extractor(protocol, None), tmp_path / "real.npz"
    ends = [content[:length] for length in (0, 1, 100, len(content) // 2, len(content) - 1)]
    middle = len(content) // 2
    places = [*range(140), *range(middle, middle + 20), *range(len(content) - 900, len(content))]
    flipped = [content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :] for i in places]
    refusals = []
    for bad in ends + flipped:
        damaged.write_bytes(bad)
        try:
            reference.read_reference(damaged, protocol, extractor, "digits")
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > len(ends) + len(flipped) / 2
    assert all(line.startswith(str(damaged)) and "\n" not in line for line in refusals)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros(64, np.float32)}, r"features are float32 of shape \(64,\), not floats \(N, D\)"),
        ({"features": np.zeros((5, 64), np.int32)}, "features are int32"),
        ({"features": np.full((5, 64), np.nan, np.float32)}, "features hold NaN or infinity"),
        ({"weights_sha256": 3}, "weights_sha256 is 3, not a str"),
        ({"formats": []}, r"formats is \[\], not a dict"),
    ],
)
def test_statistics_of_another_shape(change, message, statistics, tmp_path):
    protocol = PROTOCOLS["digits"]
    extractor = features.make_extractor(protocol, None)
    good = reference.read_reference(statistics, protocol, extractor, "digits")
    reference.save(tmp_path / "a.npz", {"digits": dataclasses.replace(good, **change)}, protocol)
    with pytest.raises(UserError, match=rf"a\.npz: cannot be read as reference statistics \({message}"):
        reference.read_reference(tmp_path / "a.npz", protocol, extractor, "digits")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", ": expected a JSON object, not a list"),
        ('{"a": 1}', ": seed is missing"),
        ("{", " cannot be read"),
        ("[" * 100_000, " cannot be read"),
    ],
)
def test_a_damaged_description_of_a_drawing(content, message, real, tmp_path, capsys):
    folder = shutil.copytree(real, tmp_path / "images")
    (folder / "drawing.json").write_text(content)
    command = ["evaluate", "--protocol=digits", f"--images={folder}", f"--samples={N}", "--metrics=fid"]
    assert f"drawing.json{message}" in refused(capsys, *command, f"--out={tmp_path / 'a.json'}")


def test_the_hash_of_a_folder_is_of_its_settings_too(tmp_path):
    for name in ("model.safetensors", "preprocessor_config.json", "merges.txt"):
        (tmp_path / name).write_text("one")
    before = metric_weights.sha256_of(tmp_path)
    (tmp_path / "README.md").write_text("says nothing")
    assert metric_weights.sha256_of(tmp_path) == before
    for name in ("preprocessor_config.json", "merges.txt"):
        (tmp_path / name).write_text("two")
        assert metric_weights.sha256_of(tmp_path) != before
        (tmp_path / name).write_text("one")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        metric_weights.sha256_of(tmp_path)
