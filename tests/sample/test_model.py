"""The front door: `d2g_jax.load` and what it returns."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import d2g_jax
from d2g_jax.__main__ import main
from d2g_jax.export import export_student
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.sampler import Sampler, draw_noise

PROMPTS = ["the cat", "the dog"]


@pytest.fixture(scope="module")
def teacher(tiny_sd):
    return d2g_jax.load(tiny_sd)


@pytest.fixture(scope="module")
def student(tiny_sd, tmp_path_factory):
    """An export of a student: the teacher's own weights, called once at timestep 399."""
    folder = tmp_path_factory.mktemp("export") / "student"
    export_student(Sampler(Pipeline.load(tiny_sd), 399), "flax", folder)
    return d2g_jax.load(folder)


def test_importing_the_package_imports_next_to_nothing():
    script = (
        "import sys; import d2g_jax; print(d2g_jax.__version__);"
        "assert set(d2g_jax.__all__) <= set(dir(d2g_jax));"
        "assert not {'jax', 'numpy', 'transformers', 'flax', 'absl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == d2g_jax.__version__
    with pytest.raises(AttributeError, match="no attribute 'sample_from'"):
        d2g_jax.sample_from  # noqa: B018


def test_a_teacher_draws_what_d2g_sample_draws(teacher, tiny_sd, tmp_path):
    options = {"steps": 3, "guidance_scale": 4.0, "solver": "euler", "spacing": "trailing", "seed": 5}
    flags = ["--steps=3", "--guidance=4", "--solver=euler", "--spacing=trailing", "--seed=5"]
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    assert main(["sample", f"--model={tiny_sd}", *prompts, *flags, f"--out={tmp_path}"]) == 0
    latents = teacher.latents(PROMPTS, **options)
    np.testing.assert_allclose(latents, np.load(tmp_path / "latents.npy"), atol=1e-5)
    images = teacher(PROMPTS, **options)
    assert [(image.mode, image.size) for image in images] == [("RGB", (32, 32))] * 2
    # The noise of that run, at another size than the model's own, says the size.
    tall = np.concatenate([np.load(tmp_path / "noise.npy")] * 2, axis=2)
    np.save(tmp_path / "tall.npy", tall)
    out = tmp_path / "tall"
    flags = ["--steps=1", f"--latents={tmp_path / 'tall.npy'}", f"--out={out}"]
    assert main(["sample", f"--model={tiny_sd}", *prompts, *flags]) == 0
    assert np.load(out / "latents.npy").shape == (2, 4, 16, 8)
    np.testing.assert_allclose(teacher.latents(PROMPTS, steps=1, latents=tall), np.load(out / "latents.npy"), atol=1e-5)


def test_a_student_compiles_once_for_calls_alike(student):
    assert student("the cat", seed=1)[0].size == (32, 32)
    one = jax.block_until_ready(student.latents(["the cat"] * 4, seed=1))
    (programs,) = student._programs.values()
    compiled = programs.solve.func._cache_size()
    fewer = student.latents(["the cat"] * 3, seed=1)
    assert programs.solve.func._cache_size() == compiled
    np.testing.assert_allclose(fewer, one[:3], atol=1e-5)
    several = student.latents("the cat", images=2, seed=1)
    np.testing.assert_allclose(several, one[:2], atol=1e-5)


def test_on_one_device_as_on_a_mesh(student, tiny_sd):
    alone = d2g_jax.load(student.sampler.pipeline.folder, mesh=meshes.make_mesh(devices=jax.devices()[:1]))
    assert len(student.mesh.devices.flat) == 2
    np.testing.assert_allclose(alone.latents(PROMPTS), student.latents(PROMPTS), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4}, "one-step student; leave out"),
        ({"height": 33}, "height=33"),
        ({"images": 0}, "images=0"),
        ({"latents": np.zeros((2, 3, 8, 8))}, r"latents: shape \(2, 3, 8, 8\); this model and 2 prompts need \(2, 4"),
        ({"latents": np.zeros((2, 4, 8, 8)), "height": 64}, r"need \(2, 4, 16, any\)"),
        ({"latents": np.full((2, 4, 8, 8), np.nan)}, "latents: holds values that are not finite"),
        ({"latents": "no-such.npy"}, "no-such.npy: cannot be read"),
        ({"latents": np.zeros((2, 4, 8, 8), complex)}, "latents: holds complex128"),
        ({"latents": np.zeros((2, 4, 8, 8), "M8[s]")}, "latents: holds datetime64"),
        ({"latents": [[1.0], [1.0, 2.0]]}, "latents: no array"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"height": 32.0}, "height=32.0: give a multiple"),
        ({"batch": 1.5}, "batch=1.5"),
    ],
)
def test_bad_options_are_one_line(student, options, message):
    with pytest.raises(UserError, match=message) as refused:
        student(PROMPTS, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": "7"}, "guidance_scale='7'"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale=nan; give a number from 0 to 1"),
        ({"guidance_rescale": -1.0}, "guidance_rescale=-1.0"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"steps": 0}, "steps=0"),
        ({"negative_prompt": None}, "negative_prompt=None"),
        ({"negative_prompt": "a \ud83d"}, "negative_prompt holds half a character"),
        ({"solver": "ddpm"}, "ddpm"),
    ],
)
def test_bad_solutions_are_one_line(teacher, options, message):
    with pytest.raises(UserError, match=message):
        teacher(PROMPTS, **options)


def test_options_and_prompts_that_do_not_exist(student):
    for option in ("guidance", "num_inference_steps", "decode", "part"):
        with pytest.raises(TypeError, match=option):
            student(PROMPTS, **{option: 3.0})
    with pytest.raises(UserError, match="no prompts"):
        student([])
    with pytest.raises(UserError, match="prompt 1 holds int, no text"):
        student([1])


def test_bad_models_are_one_line(tiny_sd):
    for model, options, message in (
        (None, {}, "model None"),
        ("", {}, "an empty path as a model"),
        (tiny_sd, {"dtype": "float99"}, "dtype='float99'; choose one of"),
        (tiny_sd, {"dtype": "float16"}, "dtype=float16"),
        (tiny_sd / "model_index.json", {}, "model_index.json: a file; give the folder"),
    ):
        with pytest.raises(UserError, match=message):
            d2g_jax.load(model, **options)


def test_never_more_rows_than_the_batch_that_is_asked_for(tiny_sd):
    fresh = d2g_jax.load(tiny_sd)
    ask = lambda count, batch: fresh.prepare(["the cat"] * count, batch=batch, steps=1)  # noqa: E731
    first = ask(8, 8)
    assert ask(7, 8).batch_size == 8  # rounded up to the devices; nothing has been drawn yet
    assert ask(5, 8).batch_size == 6
    fresh.run(first, decode=False)
    assert ask(5, 8).batch_size == 8
    assert ask(8, 4).batch_size == 4
    assert ask(2, 8).batch_size == 2  # the other would be four times as much


def test_given_noise_takes_the_seeds_place(student):
    noise = draw_noise(3, 2, (4, 8, 8))
    np.testing.assert_array_equal(student.latents(PROMPTS, latents=noise), student.latents(PROMPTS, seed=3))
