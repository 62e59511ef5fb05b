"""Where `d2g sample` writes: over nothing of others, batch by batch, and on from where it was stopped."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file, save_file

from d2g_jax.__main__ import main
from d2g_jax.pairs import read_prompts
from d2g_jax.sample import job
from d2g_jax.sample.model import Model


@pytest.fixture(scope="module")
def model():
    return tiny.make(Path(os.environ["D2G_JAX_TINY"])) / "pipeline"


def sample(model, out, *flags):
    return main(["sample", f"--model={model}", f"--out={out}", "--steps=1", "--batch=2", *flags])


def refused(capsys, *command):
    capsys.readouterr()
    assert main(list(command)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if re.match("d2g: (?!warning)", line)]
    assert len(lines) == 1
    return lines[0]


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_the_prompts_that_are_written_are_read_again(model, tmp_path):
    prompts = ["--prompt=bold\n7", "--prompt=a\r\nred 3", "--prompt=thin\u20284"]
    assert sample(model, tmp_path / "out", *prompts) == 0
    assert read_prompts(tmp_path / "out" / "prompts.txt").lines == ("bold 7", "a red 3", "thin\u20284")
    assert sample(model, tmp_path / "again", f"--prompts={tmp_path / 'out' / 'prompts.txt'}") == 0
    np.testing.assert_array_equal(*(np.load(tmp_path / name / "latents.npy") for name in ("out", "again")))


def test_the_tree_that_geneval_s_evaluator_reads(model, tmp_path, capsys):
    """A folder of digits for each prompt, with its metadata.jsonl and samples/ of digits.png."""
    listed = tmp_path / "evaluation_metadata.jsonl"
    lines = ['{"tag": "two_object", "include": [{"class": "bench"}], "prompt": "bold 7"}', '{"prompt": "a red 3"}']
    listed.write_text("\n".join(lines) + "\n")
    flags = [f"--prompts={listed}", "--images=3"]
    assert sample(model, tmp_path / "tree", *flags, "--layout=geneval") == 0
    assert sample(model, tmp_path / "flat", *flags, "--prompts-column=prompt") == 0
    for i, line in enumerate(lines):
        folder = tmp_path / "tree" / f"{i:05d}"
        assert (folder / "metadata.jsonl").read_text() == f"{line}\n"
        found = files(folder / "samples")
        assert list(found) == ["00000.png", "00001.png", "00002.png"]
        flat = files(tmp_path / "flat")
        assert list(found.values()) == [flat[f"{3 * i + k:05d}.png"] for k in range(3)]
    assert (tmp_path / "tree" / "grid.png").read_bytes() == (tmp_path / "flat" / "grid.png").read_bytes()
    lines[1] = '{"tag": "colors", "prompt": "a red 3"}'
    listed.write_text("\r\n".join(lines))
    (tmp_path / "tree" / "00001" / "samples" / "00002.png").unlink()  # stopped there
    assert sample(model, tmp_path / "tree", *flags, "--layout=geneval") == 0
    assert (tmp_path / "tree" / "00001" / "metadata.jsonl").read_text() == f"{lines[1]}\n"
    assert list(files(tmp_path / "tree" / "00001" / "samples").values()) == list(flat.values())[3:6]
    for wrong in (["--prompt=a"], [f"--prompts={tmp_path / 'flat' / 'prompts.txt'}"]):
        line = refused(capsys, "sample", f"--model={model}", "--layout=geneval", f"--out={tmp_path / 'x'}", *wrong)
        assert "--layout=geneval: give --prompts=evaluation_metadata.jsonl" in line
    line = refused(
        capsys,
        "sample",
        f"--model={model}",
        "--steps=1",
        *flags,
        f"--out={tmp_path / 'tree'}",
        "--prompts-column=prompt",
    )
    assert "layout='geneval', not None" in line


def test_nothing_of_others_is_written_over(model, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "prompts.txt").write_text("a red 7\n")
    command = ("sample", f"--model={model}", "--steps=1")
    line = refused(capsys, *command, f"--prompts={mine / 'prompts.txt'}", f"--out={mine}")
    assert line == f"d2g: {mine}: holds other files; give a new place or empty it"
    assert files(mine) == {"prompts.txt": b"a red 7\n"}
    (tmp_path / "file").write_text("")
    assert "file cannot be written" in refused(capsys, *command, "--prompt=a", f"--out={tmp_path / 'file' / 'out'}")


@pytest.mark.parametrize("other", ["--images=2", "--seed=1", "--prompt=b"])
def test_a_folder_holds_one_drawing(model, other, tmp_path, capsys):
    out = tmp_path / "out"
    assert sample(model, out, "--prompt=a", "--images=3") == 0
    before = files(out)
    command = ("sample", f"--model={model}", f"--out={out}", "--steps=1", "--batch=2", "--prompt=a", "--images=3")
    assert "drawing.json: images of another drawing, " in refused(capsys, *command, other)
    assert files(out) == before
    assert main(list(command)) == 0
    assert files(out) == before


def test_a_stopped_drawing_goes_on(model, tmp_path, monkeypatch):
    flags = ("--prompt=a", "--prompt=b 3", "--images=3")
    assert sample(model, tmp_path / "whole", *flags) == 0
    run, calls = Model.run, []

    def stop(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:  # two batches, then Ctrl-C
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    monkeypatch.setattr(job, "QUICK", 0.0)
    monkeypatch.setattr(Model, "run", stop)
    assert sample(model, tmp_path / "out", *flags) == 130
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4
    calls.append(1)
    assert sample(model, tmp_path / "out", *flags) == 0
    assert len(calls) == 5  # one batch
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("quick", [0.0, 1e9])
def test_a_quick_first_batch_is_drawn_again_for_its_times(model, tmp_path, monkeypatch, capsys, quick):
    run, takes = Model.run, iter([(5.0, 3.0), (0.0, 1.0), (0.0, 2.0)])

    def timed(self, *arguments, seconds, **options):
        compiling, unet = next(takes)
        for stage, spent in {"text": 0.25, "unet": unet, "vae": 0.5, "compile": compiling}.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
        return run(self, *arguments, **options)

    monkeypatch.setattr(job, "QUICK", quick)
    monkeypatch.setattr(Model, "run", timed)
    assert sample(model, tmp_path, "--prompt=a", "--images=4") == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    del seconds["load"]
    if quick:  # the first two calls are of the first batch
        assert seconds == {"compile": 8.75, "text": 0.5, "unet": 3.0, "vae": 1.0}
    else:
        assert seconds == {"compile": 5.0, "text": 0.5, "unet": 4.0, "vae": 1.0}


def test_an_array_that_was_lost_is_made_again_whole(model, tmp_path, monkeypatch):
    """Also where that is stopped: rows that are not there are not taken for drawn because images are."""
    flags, out = ("--prompt=a", "--images=6"), tmp_path / "out"
    assert sample(model, out, *flags) == 0
    before, run, calls = files(out), Model.run, []
    (out / "noise.npy").unlink()

    def stop(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:  # one batch, then Ctrl-C
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    monkeypatch.setattr(job, "QUICK", 0.0)
    monkeypatch.setattr(Model, "run", stop)
    assert sample(model, out, *flags) == 130
    assert sample(model, out, *flags) == 0
    assert len(calls) == 4  # two batches
    assert files(out) == before


def test_a_drawing_that_is_there_needs_no_more_room(model, tmp_path, monkeypatch, capsys):
    command = ("sample", f"--model={model}", "--steps=1", "--prompt=a", f"--out={tmp_path / 'out'}")
    assert main(list(command)) == 0
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert main(list(command)) == 0
    (tmp_path / "out" / "noise.npy").unlink()
    assert "noise and latents of 1 images take 0.0 MB" in refused(capsys, *command)


def test_the_grid_shows_the_first(model, tmp_path, monkeypatch):
    monkeypatch.setattr("d2g_jax.sample.job.IN_GRID", 4)
    assert sample(model, tmp_path / "out", "--prompt=a", "--images=5") == 0
    with Image.open(tmp_path / "out" / "grid.png") as image:
        assert image.width < 3 * 64
    assert np.load(tmp_path / "out" / "noise.npy").shape == (5, 4, 16, 16)


@pytest.mark.parametrize("images", [1_000_000_000, 2_000_000_000])
def test_more_images_than_a_disk_holds_are_refused_at_once(images, model, tmp_path, capsys):
    line = refused(capsys, "sample", f"--model={model}", "--prompt=a", f"--images={images}", f"--out={tmp_path / 'o'}")
    assert f"noise and latents of {images} images take " in line
    assert not (tmp_path / "o").exists()


def test_long_prompts_are_counted_once_for_all_batches(model, tmp_path):
    long = [f"--prompt={word} {'red ' * 40}" for word in ("a", "b", "c")]
    with pytest.warns(UserWarning, match="longer than") as told:
        assert sample(model, tmp_path / "out", *long, "--prompt=a", "--images=2") == 0  # 8 images in batches of 2
    assert [str(one.message)[:14] for one in told] == ["3 of 4 prompts"]


@pytest.fixture(scope="module")
def overflowing(model, tmp_path_factory):
    """Finite latents and finite weights, and a decoder whose images are not finite."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("overflowing") / "pipeline")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: value.astype(np.float32) for name, value in load_file(file).items()}
    weights["decoder.conv_out.weight"] = np.full_like(weights["decoder.conv_out.weight"], 3e38)
    save_file(weights, file, {"format": "pt"})
    return folder


def test_images_that_overflow_are_not_written(overflowing, tmp_path, capsys):
    line = refused(capsys, "sample", f"--model={overflowing}", "--steps=1", "--prompt=a", f"--out={tmp_path / 'out'}")
    assert "1 of 1 images are not finite, the first for 'a'" in line
    assert not (tmp_path / "out").exists()
    tiled = ("--tiled", f"--out={tmp_path / 'tiled'}")
    assert "not finite" in refused(capsys, "sample", f"--model={overflowing}", "--steps=1", "--prompt=a", *tiled)


def test_images_that_overflow_get_no_score(overflowing, tmp_path, capsys):
    command = ["evaluate", "--protocol=digits", f"--model={overflowing}", "--steps=1", "--samples=2"]
    line = refused(capsys, *command, "--metrics=accuracy", f"--out={tmp_path / 'a.json'}")
    assert "2 of 2 images are not finite" in line
    assert not (tmp_path / "a.json").exists()
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("seed", [18446744073709551615, 2**32, -1])
def test_seeds_of_others_are_refused_with_the_range(seed, model, tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    line = refused(capsys, "sample", f"--model={model}", "--prompt=a", "--steps=1", f"--seed={seed}", out)
    assert f"seed={seed}; give a whole number from 0 to 4294967295" in line
    flags = (f"--model={model}", "--samples=2", "--metrics=accuracy", f"--seed={seed}", out)
    assert "seed=" in refused(capsys, "evaluate", "--protocol=digits", *flags)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model=", "an empty path as a model"),
        ("--model=" + "a long prompt " * 40, "no such folder"),
        ("--model=v1-5.safetensors", "v1-5.safetensors: not a whole safetensors file"),
        ("--model=v1-5.ckpt", "pickles are refused because they can run code"),
        ("--model=student.zip", "an export to StableHLO draws by itself"),
        ("--model=gs://bucket/sd", "no such folder or file; pass a local folder"),
        ("--prompts=" + "a long prompt " * 40, "File name too long; .* a prompt itself goes to --prompt"),
        ("--prompts=https://host/a.txt", "an address"),
        ("--guidance=nan", "guidance_scale=nan; give a number from -100 to 100"),
        ("--latents=a.npz", "cannot be read as .npy"),
        ("--latents=a.npy", "cannot be read as .npy"),
    ],
)
def test_habits_of_strangers(flag, message, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v1-5.safetensors").write_bytes(b"x")
    (tmp_path / "v1-5.ckpt").write_bytes(b"x")
    (tmp_path / "student.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    np.savez(tmp_path / "a.npz", np.zeros(3))
    (tmp_path / "a.npy").write_bytes(b"")
    line = refused(capsys, "sample", f"--model={model}", "--prompt=a", "--steps=1", f"--out={tmp_path / 'out'}", flag)
    assert re.search(message, line)
    assert len(line) < 500
    assert not (tmp_path / "out").exists()
