"""A student as a LoRA: what is written draws elsewhere what the student draws here, and says what it lacks."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from d2g_jax.commands import export as command
from d2g_jax.export import export_student, to_lora
from d2g_jax.models import lora
from d2g_jax.pipeline import lora_files
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.model import Model
from d2g_jax.sample.sampler import Parts, Sampler


def trained(folder, rank=2) -> Sampler:
    """A folder's pipeline with random low-rank updates, as a workdir gives it."""
    pipeline, rng = Pipeline.load(folder), np.random.default_rng(0)
    shapes = lora.abstract(pipeline.unet.abstract(), rank, ("attention",))
    update = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    params = {**pipeline.params, "unet": lora.merge(pipeline.params["unet"], update)}
    return Sampler(dataclasses.replace(pipeline, params=params), 399, lora=update)


@pytest.mark.slow
def test_diffusers_draws_the_students_image(tiny_sd, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    student = trained(tiny_sd)
    export_student(student, "lora", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "lora.json").read_text())
    assert report["ranks"] == [2]
    assert report["relative_error_of_latents"] <= 1e-5
    assert set(report["relative_error_of_kernels"].values()) == {0.0}
    noise = np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)
    ours = Model(student, meshes.make_mesh(), "student").draw(["the cat", "the dog"], latents=noise).images.astype(int)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    theirs.load_lora_weights(tmp_path / "out", weight_name=lora_files.FOLDERS_FILE)
    images = theirs(
        ["the cat", "the dog"], num_inference_steps=1, guidance_scale=0.0, latents=torch.tensor(noise)
    ).images
    assert np.abs(np.stack([np.asarray(image) for image in images]).astype(int) - ours).max() <= 1
    files = lora_files.FOLDERS_FILE, to_lora.KOHYA_FILE
    both = [lora_files.read(tmp_path / "out" / name, student.pipeline)["unet"] for name in files]
    assert both[0].keys() == both[1].keys()
    assert all(np.array_equal(both[0][path][part], both[1][path][part]) for path in both[0] for part in ("down", "up"))


@pytest.mark.slow
def test_a_whole_student_is_truncated_layer_by_layer(tiny_sd, tmp_path):
    """Its kernels are the teacher's and a rank of 2: rank 2 has it, rank 1 says what it lacks."""
    student = dataclasses.replace(trained(tiny_sd), lora=None)
    errors = {}
    for rank in (1, 2):
        export_student(student, "lora", tmp_path / str(rank), rank=rank)
        report = json.loads((tmp_path / str(rank) / "lora.json").read_text())
        kernels = report["relative_error_of_kernels"]
        assert set(kernels) == set(lora.target_paths(student.pipeline.unet.abstract(), ("all",)))
        errors[rank] = max(kernels.values()), report["relative_error_of_latents"]
    assert max(errors[2]) <= 1e-4
    assert 0.05 < errors[1][0] < 1
    assert errors[1][1] > 100 * errors[2][1]


def test_a_teacher_that_wears_a_student_is_the_student(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(to_lora, "_error_of_latents", lambda *_: 0.0)  # which draws
    student, mesh = trained(tiny_sd), meshes.make_mesh()
    export_student(student, "lora", tmp_path / "out")
    export_student(dataclasses.replace(student, timestep=7), "lora", tmp_path / "other")
    expected = lora.flat(student.pipeline.params["unet"])
    for file in (tmp_path / "out", tmp_path / "out" / to_lora.KOHYA_FILE):
        parts = Parts(lora=[str(file)])
        worn = Sampler.load(tiny_sd, mesh, parts=parts)
        assert worn.timestep == 399
        for path, value in lora.flat(worn.pipeline.params["unet"]).items():
            np.testing.assert_allclose(value, expected[path], atol=1e-6)
        assert parts.of_teacher() == Parts()
    folder, other = f"{tmp_path / 'out'}:0.5", str(tmp_path / "other")
    with pytest.raises(UserError, match=r"pytorch_lora_weights.safetensors: a student of d2g_jax.*leave out system$"):
        Sampler.load(tiny_sd, mesh, parts=Parts(lora=[folder], system="lcm"))
    with pytest.raises(UserError, match=r"a student of timestep 7, another is of 399; give one$"):
        Sampler.load(tiny_sd, mesh, parts=Parts(lora=[folder, other]))


@pytest.mark.parametrize(
    ("of", "rank", "message"),
    [
        ("lora", 3, r"^rank=3: this student was trained with lora\.rank=2; give at most that, or none$"),
        ("whole", None, "^to=lora: this student was trained whole; give the rank of its LoRA"),
        ("teacher", 2, "^to=lora exports the difference of a student from its teacher"),
        ("lora", 0, "^rank=0: give 1 or more with to=lora"),
    ],
)
def test_exports_that_are_refused(of, rank, message, tiny_sd, tmp_path):
    student = trained(tiny_sd)
    given = {
        "lora": student,
        "whole": dataclasses.replace(student, lora=None),
        "teacher": dataclasses.replace(student, timestep=None),
    }
    with pytest.raises(UserError, match=message):
        export_student(given[of], "lora", tmp_path / "out", rank=rank)
    assert not list(tmp_path.iterdir())


def test_flags_that_do_not_go_together(tmp_path):
    flags = ["--model=m", f"--out={tmp_path / 'out'}", "--lora=style.safetensors"]
    with pytest.raises(UserError, match="leave out --lora"):
        command.run([*flags, "--to=lora"])


def test_a_worn_text_tower_is_written_too(tiny_sd, tmp_path):
    """An export to diffusers copies the teacher's text tower, unless a LoRA has changed it."""
    pipeline, file = Pipeline.load(tiny_sd), tmp_path / "style.safetensors"
    shapes = lora.flat(pipeline.text_encoder.abstract())
    path = next(path for path in shapes if path.endswith("q_proj/kernel"))
    inputs, out = shapes[path].shape
    parts = {"down": np.ones((inputs, 1), np.float32), "up": np.ones((1, out), np.float32)}
    lora_files.write({"text_encoder": {path: parts}}, file, "kohya", pipeline)
    sampler = Sampler.load(tiny_sd, meshes.make_mesh(), parts=Parts(lora=[f"{file}:0.5"]))
    assert set(sampler.anew) == {"text_encoder", "unet"}
    export_student(dataclasses.replace(sampler, timestep=399), "diffusers", tmp_path / "out")
    written = lora.flat(Pipeline.load(tmp_path / "out").params["text_encoder"])[path]
    plain = np.asarray(lora.flat(pipeline.params["text_encoder"])[path])
    np.testing.assert_allclose(written, plain + 0.5, atol=1e-6)


def test_an_export_has_no_teacher_to_differ_from(tiny_sd, tmp_path):
    with pytest.raises(UserError, match="no difference from the teacher, which an export does not hold"):
        export_student(Sampler(Pipeline.load(tiny_sd), 399), "lora", tmp_path / "out", rank=2)
