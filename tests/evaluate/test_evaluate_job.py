"""`d2g evaluate` from the command line: a digits model, folders of images, tables, and everything that can be wrong."""

import copy
import dataclasses
import json
import shutil
import sys
import types

import numpy as np
import pytest
import tiny_images
from PIL import Image
from tfds_folders import example, write_tfds
from tiny import get_config

from d2g_jax.__main__ import main
from d2g_jax.digits import judge, scenes
from d2g_jax.digits.config import JUDGE
from d2g_jax.evaluate import pairwise
from d2g_jax.evaluate.images import survey
from d2g_jax.evaluate.protocols import PROTOCOLS
from d2g_jax.results import frechet
from d2g_jax.results.results import read_result
from d2g_jax.results.table import comparable, table
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.folder import prompts_digest

N = 80
OF_FEATURES = {"fid", "kid", "precision", "recall", "density", "coverage"}
DIGITS = ["evaluate", "--protocol=digits", f"--samples={N}"]
pytestmark = pytest.mark.usefixtures("few_real_scenes")


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


@pytest.fixture(scope="module")
def teacher():
    """Flags: a tiny teacher in one step."""
    return [f"--model={get_config().pipeline}", "--steps=1", "--guidance=1"]


@pytest.fixture(scope="module")
def drawn(teacher, tiny_lpips, tmp_path_factory):
    """A result of the tiny teacher, and its images."""
    folder = tmp_path_factory.mktemp("evaluate")
    flags = [*teacher, f"--weights-lpips={tiny_lpips}", "--seed=3"]
    run(*DIGITS, *flags, "--draw-batch=40", f"--out={folder / 'result.json'}", "--name=one step")
    return folder


def test_a_model_is_drawn_and_its_result_says_how_it_was_measured(drawn):
    result = read_result(drawn / "result.json")
    assert set(result["metrics"]) == {*OF_FEATURES, "accuracy", "lpips_diversity"}
    assert (result["samples"], result["complete"], result["system"]) == (N, False, "one step")
    assert result["protocol"]["sha256"] == PROTOCOLS["digits"].sha256
    assert (result["images"]["formats"], result["images"]["size"]) == ({"PNG": N}, [64, 64])
    assert result["seeds"] == {"drawing": 3, "kid": 0}
    assert result["drawing"]["solution"]["steps"] == result["drawing"]["network_calls"] == 1
    assert result["metrics"]["kid"]["subset_size"] == N
    assert result["prompts"]["count"] == N
    for digest in (
        result["prompts"]["sha256"], result["reference"]["images_sha256"], result["weights"]["digits"]["sha256"],
        result["weights"]["lpips"]["sha256"], result["images"]["sha256"], result["drawing"]["unet_sha256"],
    ):  # fmt: skip
        assert len(digest) == 64
    assert {"d2g_jax", "jax"} <= set(result["environment"])
    assert {"pillow", "numpy", "python"} <= set(result["versions"])


def test_its_frechet_distance_is_the_demo_s(drawn):
    """As `demo.evaluation.score` takes it."""
    folder = drawn / "result-drawn" / "images"
    from d2g_jax.evaluate.images import batches

    images = np.concatenate([x for _, x in batches(survey(folder, PROTOCOLS["digits"]), PROTOCOLS["digits"], 32)])
    params = judge.load_judge(JUDGE)
    reference = judge.judge(params, scenes.real_scenes().images)[0]
    expected = frechet.frechet_distance(judge.judge(params, images)[0], reference)
    assert read_result(drawn / "result.json")["metrics"]["fid"] == pytest.approx(expected, rel=1e-4)


def test_a_drawing_is_gone_on_with_and_never_mixed(drawn, teacher, tmp_path, capsys):
    work = shutil.copytree(drawn, tmp_path / "work")
    images = work / "result-drawn" / "images"
    before = {file.name: file.read_bytes() for file in images.glob("*.png")}
    (images / "00050.png").unlink()
    flags = [*teacher, "--draw-batch=40", "--metrics=fid"]
    run(*DIGITS, *flags, "--seed=3", f"--out={work / 'result.json'}")
    assert {file.name: file.read_bytes() for file in images.glob("*.png")} == before
    result = read_result(work / "result.json")["metrics"]
    assert result == {"fid": read_result(drawn / "result.json")["metrics"]["fid"]}
    line = refused(capsys, *DIGITS, *flags, "--seed=4", f"--out={work / 'result.json'}")
    assert "seed=3, not 4" in line


def test_images_are_those_of_d2g_sample(drawn, teacher, tmp_path):
    prompts = tmp_path / "prompts.txt"
    from d2g_jax.digits.captions import evaluation_prompts

    prompts.write_text("".join(f"{p.prompt}\n" for p in evaluation_prompts(2000, 1)[:40]))
    run("sample", *teacher, f"--out={tmp_path / 'out'}", f"--prompts={prompts}", "--seed=3", "--batch=40")
    for i in (0, 17, 39):
        name = f"{i:05d}.png"
        assert (tmp_path / "out" / name).read_bytes() == (drawn / "result-drawn" / "images" / name).read_bytes()
    flags = [f"--images={tmp_path / 'out'}", "--samples=40", f"--out={tmp_path / 'a.json'}"]
    run("evaluate", "--protocol=digits", *flags, "--metrics=kid,accuracy")
    assert "KID" in table([read_result(tmp_path / "a.json")])  # though `d2g sample` does not count its network's calls


def test_the_first_images_of_a_longer_drawing(drawn, tiny_lpips, tmp_path):
    """Of the digits' own prompts or of a file's, and of the teacher's images for all of them."""
    images = drawn / "result-drawn" / "images"
    from d2g_jax.digits.captions import evaluation_prompts

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{p.prompt}\n" for p in evaluation_prompts(2000, 1)[:100]))
    out = f"--out={tmp_path / 'a.json'}"
    few = ["evaluate", "--protocol=digits", "--samples=20", f"--images={images}", out]
    run(*few, "--metrics=accuracy")
    run(*few, f"--prompts={prompts}", "--metrics=kid")
    described = read_result(tmp_path / "a.json")["prompts"]
    assert described["count"] == 20
    assert described["sha256"] == prompts_digest(p.prompt for p in evaluation_prompts(2000, 1)[:20])
    first = tmp_path / "first"
    first.mkdir()
    for i in range(20):
        shutil.copy(images / f"{i:05d}.png", first)
    drawing = json.loads((images / "drawing.json").read_text())
    (first / "drawing.json").write_text(json.dumps({**drawing, "prompts_sha256": described["sha256"]}))
    fidelity = [f"--teacher-images={images}", f"--weights-lpips={tiny_lpips}", "--metrics=lpips_fidelity"]
    run("evaluate", "--protocol=digits", "--samples=20", f"--images={first}", *fidelity, out)
    assert read_result(tmp_path / "a.json")["metrics"]["lpips_fidelity"] == 0.0


def test_models_of_classes_share_a_column(tiny_lpips, tmp_path, capsys):
    """Their prompts are the classes in turn: the same for all of them."""
    config = dataclasses.replace(tiny_images.CLASSES, sample_size=32)
    results = []
    for name in ("a", "b"):
        model = tiny_images.make(tmp_path / name, config)
        flags = [f"--model={model}", f"--steps={len(results) + 1}", "--guidance=1", "--samples=2"]
        metric = [f"--weights-lpips={tiny_lpips}", "--metrics=lpips_diversity"]
        out = tmp_path / f"{name}.json"
        run("evaluate", "--protocol=cifar10-50k", *flags, *metric, f"--out={out}")
        results.append(read_result(out))
    assert results[0]["prompts"]["source"] == "the model's classes in turn"
    assert comparable(results[0], "lpips_diversity") == comparable(results[1], "lpips_diversity")
    line = refused(
        capsys, "evaluate", "--protocol=cifar10-50k", *flags, *metric, "--tiled", f"--out={tmp_path / 'b.json'}"
    )
    assert "images of another drawing, tiled=None, not True" in line


def test_diversity_is_the_mean_over_pairs_of_one_prompt(drawn, tiny_lpips):
    from d2g_jax.evaluate.images import batches

    metric, protocol = pairwise.load("lpips", tiny_lpips, 64), PROTOCOLS["digits"]
    found = survey(drawn / "result-drawn" / "diversity", protocol)
    assert len(found) == N * 4
    values = []
    for _, x in batches(found, protocol, 4):
        pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
        values.append(np.mean([metric.run(x[[i]], x[[j]])[0] for i, j in pairs]))
        if len(values) == 5:
            break
    some = [pairwise.mean_pairwise(metric, x) for _, x in batches(found, protocol, 4)][:5]
    np.testing.assert_allclose(some, values, rtol=1e-5)
    assert min(values) > 0


def test_a_folder_of_photographs_as_reference_and_fidelity_to_the_teacher(drawn, real, tiny_lpips, tmp_path):
    images = drawn / "result-drawn" / "images"
    run("evaluate", "reference", "--protocol=digits", f"--images={real}", f"--out={tmp_path / 'real.npz'}")
    flags = [f"--weights-lpips={tiny_lpips}", f"--teacher-images={images}"]
    run(*DIGITS, f"--images={images}", *flags, f"--reference={real}", f"--out={tmp_path / 'a.json'}")
    run(*DIGITS, f"--images={images}", *flags, f"--reference={tmp_path / 'real.npz'}", f"--out={tmp_path / 'b.json'}")
    a, b = read_result(tmp_path / "a.json"), read_result(tmp_path / "b.json")
    assert a["metrics"] == b["metrics"]
    assert a["metrics"]["lpips_fidelity"] == 0.0  # to itself
    to_itself = {name: a["metrics"][f"{name}_teacher"] for name in ("fid", "kid", "precision", "recall")}
    assert to_itself["fid"] < 1e-3
    assert to_itself["kid"]["mean"] <= 0.0  # unbiased: an image is not compared with itself on its own side
    assert (to_itself["precision"], to_itself["recall"]) == (1.0, 1.0)
    assert comparable(a, "kid_teacher")["teacher"] == a["teacher"]["sha256"][:12]
    assert "accuracy" in a["metrics"]  # drawing.json says that these are the protocol's prompts
    assert comparable(a, "fid") == comparable(b, "fid") != comparable(read_result(drawn / "result.json"), "fid")
    with pytest.warns(UserWarning, match="nothing says"):
        run(*DIGITS, f"--images={real}", *flags, "--metrics=lpips_fidelity", f"--out={tmp_path / 'c.json'}")
    assert read_result(tmp_path / "c.json")["metrics"]["lpips_fidelity"] > 0.0


def test_a_folder_that_tfds_prepared_as_reference(real, tmp_path, capsys):
    """Its features are those of the same images in files."""
    pictures = [Image.open(real / f"{i:05d}.png") for i in range(N)]
    folder = write_tfds(tmp_path / "toy", "tfrecord", [example(one, 0) for one in pictures], (30, N - 30))
    command = ["evaluate", "reference", "--protocol=digits"]
    run(*command, f"--images={folder}", f"--out={tmp_path / 'tfds.npz'}")
    run(*command, f"--images={real}", f"--out={tmp_path / 'files.npz'}")
    found, expected = (np.load(tmp_path / f"{name}.npz")["features"] for name in ("tfds", "files"))
    np.testing.assert_array_equal(found, expected)
    small = write_tfds(tmp_path / "small", "tfrecord", [example(one.resize((32, 32)), 0) for one in pictures[:5]])
    line = refused(capsys, *command, f"--images={small}", f"--out={tmp_path / 'a.npz'}")
    assert "split train, record 0: 32x32 pixels; digits takes 64 and resizes nothing" in line
    line = refused(capsys, *command, f"--images={folder}", "--max-corrupt=1", f"--out={tmp_path / 'a.npz'}")
    assert "--max-corrupt=1: " in line


def test_one_file_of_statistics_for_several_networks(real, make_clip, tiny_dino, tmp_path, capsys):
    """Each by its own weights; of the very images they were taken from, every distance is zero."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        shutil.copy(real / f"{i:05d}.png", images)
    weights = [f"--weights-dinov2={tiny_dino}", f"--weights-clip-l14-336={make_clip(14, 24, 336)}"]
    statistics = ["evaluate", "reference", "--protocol=digits", f"--images={images}"]
    run(*statistics, *weights, f"--out={tmp_path / 'real.npz'}")
    assert {"features", "dinov2_features", "clip_l14_336_features"} < set(np.load(tmp_path / "real.npz"))
    asked = ["evaluate", "--protocol=digits", f"--images={images}", "--metrics=fd_dinov2,cmmd"]
    reference = f"--reference={tmp_path / 'real.npz'}"
    run(*asked, reference, *weights, "--samples=20", f"--out={tmp_path / 'a.json'}")
    result = read_result(tmp_path / "a.json")
    assert list(result["metrics"]) == ["fd_dinov2", "cmmd"]
    assert all(abs(value) < 1e-3 for value in result["metrics"].values())
    assert result["reference"]["extractor"].endswith(", dinov2")  # the first metric's
    assert comparable(result, "cmmd")["weights"].startswith("clip_l14_336 ")
    assert "FD-DINOv2 ↓" in table([result])
    to = f"--out={tmp_path / 'b.json'}"
    line = refused(capsys, *asked, reference, weights[0], "--samples=20", to)
    assert "cmmd needs --weights-clip-l14-336=PATH; get it once with a network: hf download openai/clip" in line
    assert "FD-DINOv2: 10 images of the system with 16" in refused(
        capsys, *asked, reference, *weights, "--samples=10", to
    )
    run(*statistics, f"--out={tmp_path / 'own.npz'}")
    own = f"--reference={tmp_path / 'own.npz'}"
    assert "statistics with no dinov2_features" in refused(capsys, *asked, own, *weights, "--samples=20", to)


def test_clip_score_of_a_folder(real, tiny_clip, tmp_path):
    pytest.importorskip("torch")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\nthe dog\n" * (N // 2))
    flags = [f"--images={real}", f"--prompts={prompts}", f"--weights-clip-b32={tiny_clip}", "--metrics=clip_b32"]
    run(*DIGITS, *flags, f"--out={tmp_path / 'a.json'}")
    result = read_result(tmp_path / "a.json")
    assert list(result["metrics"]) == ["clip_b32"]
    assert -1 < result["metrics"]["clip_b32"] < 1
    from d2g_jax.evaluate import towers
    from d2g_jax.evaluate.images import batches

    clip, values = towers.load("clip_b32", tiny_clip), []
    for indices, images in batches(survey(real, PROTOCOLS["digits"]), PROTOCOLS["digits"], N):
        values.append(clip.run(images, [["the cat", "the dog"][i % 2] for i in indices]))
    assert result["metrics"]["clip_b32"] == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*nothing says:UserWarning")
def test_corrupt_files_are_left_out_by_flag_and_named(real, tiny_lpips, tmp_path, capsys):
    folder = shutil.copytree(real, tmp_path / "images")
    (folder / "00007.png").write_bytes(b"")
    command = [*DIGITS, f"--images={folder}", "--metrics=fid", f"--out={tmp_path / 'a.json'}"]
    assert "1 of 80 images cannot be read: 00007.png" in refused(capsys, *command)
    assert not (tmp_path / "a.json").exists()
    run(*command, "--max-corrupt=1")
    result = read_result(tmp_path / "a.json")
    assert (result["samples"], list(result["corrupt"])) == (N - 1, ["00007.png"])
    command = [*DIGITS, f"--weights-lpips={tiny_lpips}", "--metrics=lpips_fidelity", "--max-corrupt=1"]
    to = f"--out={tmp_path / 'b.json'}"
    run(*command, f"--images={folder}", f"--teacher-images={real}", to)
    assert read_result(tmp_path / "b.json")["metrics"]["lpips_fidelity"] == 0.0  # the others keep their teacher's
    line = refused(capsys, *command, f"--images={real}", f"--teacher-images={folder}", to)
    assert line.endswith("1 of 80 images cannot be read: 00007.png; make them again")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples=2001"], "1 to 2000"),
        ([f"--samples={N + 1}"], "--samples=81 of the 80 images in "),
        (["--metrics=fed"], "'fed' is unknown; known are fid"),
        (["--metrics=lpips_diversity"], "--weights-lpips=PATH; get it once with a network: d2g metric convert"),
        (["--metrics=dreamsim_fidelity"], "--weights-dreamsim=PATH"),
        (["--metrics=clip_g14"], "hf download laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
        (["--metrics=accuracy"], "accuracy needs the digits protocol with --model, or with images that"),
        (["--reference=nowhere.npz"], "nowhere.npz: no such file"),
        (["--steps=4"], "--images are drawn already"),
        (["--model=x"], "either --model=M or --images=FOLDER"),
        (["--batch=0"], "--batch=0"),
        (["--protocol=coco"], "coco2014-30k, coco2017-5k, cifar10-50k, digits"),
        (["--protocol=coco2017-5k"], "nothing to measure"),
        (["--protocol=coco2017-5k", "--metrics=fid"], "fid needs --weights-inception=PATH"),
        (["--prompts=LICENSE"], "line 1 is empty"),
        (["--weights-lpips=nowhere"], "nowhere: no such file or folder"),
        (["--teacher-images=nowhere"], "nowhere: no such file or folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flags(flags, message, real, tmp_path, capsys):
    command = [*DIGITS, f"--images={real}", f"--out={tmp_path / 'a.json'}", *flags]
    assert message in refused(capsys, *command)
    assert not (tmp_path / "a.json").exists()


def test_a_list_of_too_few_prompts(real, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a one\na two\n")
    flags = [f"--images={real}", f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'a.json'}"]
    assert "--samples=80 of the 2 prompts" in refused(capsys, *DIGITS, *flags)


def test_too_few_images_without_the_flag(real, tmp_path, capsys):
    command = ["evaluate", "--protocol=digits", f"--images={real}", "--metrics=fid", f"--out={tmp_path / 'a.json'}"]
    line = refused(capsys, *command)
    assert "80 images; digits takes 2000" in line
    assert "--samples=N" in line


def test_lpips_is_asked_for_without_teacher_images(real, tiny_lpips, tmp_path, capsys):
    flags = [f"--weights-lpips={tiny_lpips}", "--metrics=lpips_fidelity", f"--out={tmp_path / 'a.json'}"]
    assert "--teacher-images=FOLDER" in refused(capsys, *DIGITS, f"--images={real}", *flags)


def test_a_teacher_of_other_noise(drawn, tiny_lpips, tmp_path, capsys):
    images = drawn / "result-drawn" / "images"
    teacher = shutil.copytree(images, tmp_path / "teacher")
    file = teacher / "drawing.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seed": 9}))
    flags = [f"--weights-lpips={tiny_lpips}", "--metrics=lpips_fidelity", f"--out={tmp_path / 'a.json'}"]
    line = refused(capsys, *DIGITS, f"--images={images}", f"--teacher-images={teacher}", *flags)
    assert "seed=9, not 3" in line


def test_images_of_other_prompts(drawn, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a one\n" * N)
    images = drawn / "result-drawn" / "images"
    line = refused(
        capsys, *DIGITS, f"--images={images}", f"--prompts={prompts}", "--metrics=fid", f"--out={tmp_path / 'a.json'}"
    )
    assert "drawn of other prompts" in line


def test_statistics_that_say_nothing_of_themselves(real, tmp_path, capsys):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(64), sigma=np.eye(64))
    (tmp_path / "text.npz").write_text("no statistics")
    for name, message in (
        ("fid.npz", "no features of a known protocol (it holds mu, sigma)"),
        ("text.npz", "cannot be read"),
    ):
        flags = [f"--reference={tmp_path / name}", f"--out={tmp_path / 'a.json'}"]
        assert message in refused(capsys, *DIGITS, f"--images={real}", *flags)


@pytest.mark.filterwarnings("ignore:.*nothing says:UserWarning")
def test_dreamsim_is_its_package_s(real, tmp_path, monkeypatch, capsys):
    """The package cannot be had here: its documented interface, `model(a, b)` of preprocessed batches, in its place."""
    torch = pytest.importorskip("torch")
    folder = tmp_path / "dreamsim"
    flags = [f"--weights-dreamsim={folder}", f"--teacher-images={real}", "--metrics=dreamsim_fidelity"]
    command = [*DIGITS, f"--images={real}", *flags, f"--out={tmp_path / 'a.json'}"]
    folder.mkdir()
    assert "lacks ensemble_lora" in refused(capsys, *command)
    for part in pairwise._DREAMSIM_NEEDS:
        (folder / part).mkdir(parents=True)
    (folder / "ensemble_lora" / "weights.safetensors").write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    assert "pip install dreamsim" in refused(capsys, *command)

    def dreamsim(pretrained, device, cache_dir):
        assert (pretrained, cache_dir) == (True, str(folder))
        preprocess = lambda image: torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255  # noqa: E731
        return (lambda a, b: (a - b).abs().mean((1, 2, 3)) + 0.25), preprocess

    monkeypatch.setitem(sys.modules, "dreamsim", types.SimpleNamespace(dreamsim=dreamsim))
    run(*command)
    assert read_result(tmp_path / "a.json")["metrics"]["dreamsim_fidelity"] == pytest.approx(0.25)


def test_a_table_never_puts_unlike_numbers_into_one_column(drawn, tmp_path, capsys):
    one = read_result(drawn / "result.json")
    like = copy.deepcopy(one) | {"system": "like"}
    like["metrics"]["fid"] = 12.0
    unlike = []
    for change in (
        lambda r: r["protocol"].update(name="coco2017-5k", sha256="1" * 64),
        lambda r: r["reference"].update(images_sha256="2" * 64),
        lambda r: r["weights"]["digits"].update(sha256="3" * 64),
        lambda r: r["images"].update(formats={"JPEG": N}),
        lambda r: r.update(samples=N - 1),
        lambda r: r["prompts"].update(sha256="4" * 64),
    ):
        other = copy.deepcopy(one) | {"system": f"unlike {len(unlike)}"}
        change(other)
        unlike.append(other)
    lines = table([one, like, *unlike]).splitlines()
    assert lines[0].count("FID ↓") == 1 + len(unlike)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: 2 + 2 + len(unlike)]]
    columns = [i for i, title in enumerate(cells[0]) if "FID" in title]
    for column in columns:
        filled = [row[0] for row in cells[2:] if row[column] != "–"]
        assert filled == (["one step (incomplete)", "like (incomplete)"] if column == columns[0] else filled[:1])
    assert cells[3][columns[0]] == "12.00"
    files = []
    for i, result in enumerate((one, unlike[0])):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(result))
    capsys.readouterr()
    run("evaluate", "table", *files)
    out = capsys.readouterr().out
    assert "FID ↓ (1)" in out
    assert "protocol coco2017-5k 111111111111" in out


def test_results_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    assert "no result of `d2g evaluate`" in refused(capsys, "evaluate", "table", tmp_path / "a.json")
    assert "b.json is missing" in refused(capsys, "evaluate", "table", tmp_path / "b.json")
    (tmp_path / "a.json").write_text(json.dumps({"format": 0, "protocol": {}, "metrics": {}}))
    with pytest.raises(UserError, match="format 0"):
        read_result(tmp_path / "a.json")
