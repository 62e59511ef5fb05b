"""What the page draws is what `d2g sample` draws; nothing compiles after the start; bad requests are refused."""

import dataclasses
import json
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from d2g_jax import export
from d2g_jax.__main__ import main
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.play.opening import NONE, Choice, open_studio, own_prompts
from d2g_jax.play.studio import Asked, Studio
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError
from d2g_jax.sample.sampler import Sampler

TEACHER = WEIGHTS / "pipeline"
PROMPT = "a bold red seven slanted to the right on navy and white stripes"


@pytest.fixture(scope="module")
def exported_student(tmp_path_factory):
    """The digits teacher with its weights changed a little, exported as a one-step student."""
    sampler = Sampler.load(TEACHER, meshes.make_mesh())
    unet = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.05), sampler.pipeline.params["unet"])
    params = {**sampler.pipeline.params, "unet": unet}
    student = Sampler(dataclasses.replace(sampler.pipeline, params=params), 999)
    return export.export_student(student, "diffusers", tmp_path_factory.mktemp("student") / "out")


@pytest.fixture(scope="module")
def studio(exported_student):
    choice = Choice(str(exported_student), teacher=str(TEACHER), solution={"steps": 4, "guidance_scale": 2.0})
    opened = open_studio(choice)
    seconds = opened.warm_up()
    assert set(seconds) == {"student", "teacher"}
    assert min(seconds.values()) > 0
    return opened


def sampled(model, out, *flags):
    assert (
        main(["sample", f"--model={model}", f"--out={out}", f"--prompt={PROMPT}", "--images=2", "--seed=5", *flags])
        == 0
    )
    images = []
    for i in range(2):
        with Image.open(out / f"{i:05d}.png") as image:
            images.append(np.asarray(image).astype(int))
    return images


def test_the_centre_and_the_edge_are_images_of_sample(studio, exported_student, tmp_path, capsys):
    """To a level: another batch size may sum in another order."""
    systems = {"student": (exported_student, ()), "teacher": (TEACHER, ("--steps=4", "--guidance=2"))}
    for name, (model, flags) in systems.items():
        expected = sampled(model, tmp_path / name, *flags)
        for x, image in enumerate(expected):
            drawn = studio.draw(name, Asked(PROMPT, 5, float(x), 0.0))
            assert np.abs(drawn.image.astype(int) - image).max() <= 1
        assert np.abs(expected[0] - expected[1]).max() > 50
    capsys.readouterr()


def test_times_are_measured_and_text_is_encoded_once(studio):
    first, again = (studio.draw("student", Asked("the digit 4", 1)) for _ in range(2))
    assert min(first.milliseconds.values()) > 0
    assert list(again.milliseconds) == ["text", "unet", "vae"]
    assert again.milliseconds["text"] == 0.0
    np.testing.assert_array_equal(first.image, again.image)
    for i in range(70):  # more than are kept
        studio.draw("student", Asked(f"the digit {i}"))
    assert studio.draw("student", Asked("the digit 4", 1)).milliseconds["text"] > 0
    assert len(studio._texts) <= 64


def test_nothing_compiles_after_the_start(studio, caplog):
    with jax.log_compiles():
        for name in studio.systems:
            studio.draw(name, Asked("another prompt, another noise", 11, 0.3, -0.8))
        assert not [record for record in caplog.records if "Compiling" in record.message]
        jax.jit(lambda x: x * 3.0 + 1.0)(np.ones(5))  # the log does tell
        assert [record for record in caplog.records if "Compiling" in record.message]


def test_threads_get_their_own_images(studio):
    asked = [Asked(f"the digit {i % 10}", i, 0.1, 0.2) for i in range(12)]
    alone = [studio.draw("student", one).image for one in asked]
    together: dict[int, np.ndarray] = {}
    draw = lambda i: together.update({i: studio.draw("student", asked[i]).image})  # noqa: E731
    threads = [threading.Thread(target=draw, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, image in enumerate(alone):
        np.testing.assert_array_equal(together[i], image)


def test_a_long_prompt_is_cut_off_with_a_note(studio):
    (note,) = studio.draw("student", Asked("bold " * 50)).notes
    assert "cut off" in note
    assert studio.draw("student", Asked("the digit 1")).notes == ()


def test_what_goes_to_the_page(studio):
    answer = json.loads(json.dumps(studio.draw("student", Asked("")).to_json()))
    assert set(answer) == {"image", "noise", "ms", "notes"}
    assert answer["image"].startswith("data:image/png;base64,")
    assert answer["noise"] != answer["image"]


GOOD = {"prompt": "a", "seed": 0, "x": 0, "y": 0.5}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": "a" * 11}, "at most 10"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"x": 1.01}, "x:"),
        ({"y": float("nan")}, "y:"),
        ({"y": "0"}, "y:"),
        ({"width": 4096}, "expected an object"),
    ],
)
def test_bad_requests(change, named):
    assert Asked.read(GOOD, 10) == Asked("a", 0, 0.0, 0.5)
    with pytest.raises(UserError, match=named):
        Asked.read({**GOOD, **change}, 10)
    with pytest.raises(UserError, match="expected an object"):
        Asked.read([GOOD], 10)


def test_a_drawing_that_is_not_finite_is_refused(studio):
    system = studio.systems["student"]
    broken = dataclasses.replace(system.programs, solve=lambda noise, text: system.programs.solve(noise, text) * np.nan)
    systems = {"student": dataclasses.replace(system, programs=broken)}
    with pytest.raises(UserError, match="1 of 1 images are not finite, the first for 'the digit 5'; check its weights"):
        Studio(systems, studio.shape, studio._mesh).draw("student", Asked("the digit 5", 7))


def test_who_is_beside_whom(exported_student):
    """A teacher is drawn in one step beside itself; an export has no teacher of its own, nor a teacher's settings."""
    alone = open_studio(Choice(str(TEACHER)))
    assert [system.programs.network_calls for system in alone.systems.values()] == [2, 100]
    assert alone.systems["student"].programs.encode is alone.systems["teacher"].programs.encode
    assert set(open_studio(Choice(str(TEACHER), teacher=NONE)).systems) == {"student"}
    assert set(open_studio(Choice(str(exported_student))).systems) == {"student"}
    with pytest.raises(UserError, match="--teacher=FOLDER"):
        open_studio(Choice(str(exported_student), solution={"steps": 4}))
    with pytest.raises(UserError, match="one-step student"):
        open_studio(Choice(str(exported_student), teacher=str(exported_student)))


def test_images_of_another_size():
    studio = open_studio(Choice(str(TEACHER), teacher=NONE, size=(40, 64)))
    assert studio.draw("student", Asked("the digit 2")).image.shape == (40, 64, 3)
    with pytest.raises(UserError, match="height=33"):
        open_studio(Choice(str(TEACHER), size=(33, None)))


def test_prompts_of_ones_own(exported_student):
    lines = (WEIGHTS / "prompts.txt").read_text().splitlines()
    offered = own_prompts(str(TEACHER))
    assert len(offered) == 4
    assert offered[0] == lines[0]
    assert set(offered) <= set(lines)
    assert own_prompts("owner/name") == own_prompts(str(exported_student)) == ()


def test_prompts_of_a_workdirs_pairs(tmp_path):
    workdir, prompts = tmp_path / "run", tmp_path / "mine.txt"
    (workdir / "checkpoints").mkdir(parents=True)
    prompts.write_text("\n".join(f"prompt {i}\n" for i in range(12)))
    (workdir / "config.json").write_text(json.dumps({"pairs": {"prompts": str(prompts)}}))
    assert own_prompts(str(workdir)) == ("prompt 0", "prompt 3", "prompt 6", "prompt 9")
    (workdir / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not the config of a training workdir"):
        own_prompts(str(workdir))
