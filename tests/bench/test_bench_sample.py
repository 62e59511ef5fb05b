"""`d2g bench sample`: that both sides draw the same images from the same random weights, and what the rows say."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from d2g_jax.bench import networks, sample
from d2g_jax.bench.sample import PARTS, Request, run
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError

SMALL = Request("digits", batches=(2,), repeats=1)
TORCH = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "transformers"))


@pytest.fixture(scope="module")
def report():
    return run(SMALL)


def test_rows_of_our_side(report):
    product, *rows = report["rows"]
    ours = {row["part"]: row for row in rows[:4]}
    assert tuple(ours) == PARTS
    for row in ours.values():
        assert row["value"] == pytest.approx(2 / row["seconds"])
        assert row["peak_bytes"] > row["temp_bytes"] >= 0
    assert 0 < ours["unet"]["share_of_peak"] < 1
    assert ours["all"]["flops"] == sum(ours[part]["flops"] for part in ("text", "unet", "vae"))
    assert ours["all"]["compile_seconds"] > ours["unet"]["compile_seconds"]
    assert ours["unet"]["latent_std"] > 0
    assert product["value"] is None


def test_the_other_side_draws_the_same_or_says_why_not(report):
    theirs = report["rows"][5:]
    assert [row["part"] for row in theirs] == list(PARTS)
    if not TORCH:
        assert all("not installed" in row["not_run"] for row in theirs)
        assert all(bar["measured"] is None for bar in report["bars"])
        return
    ours = report["rows"][2]
    assert theirs[1]["latent_std"] == pytest.approx(ours["latent_std"], rel=1e-4)
    ratio = theirs[1]["seconds"] / ours["seconds"]
    (bar,) = (bar for bar in report["bars"] if bar["claim"].startswith("unet x2"))
    assert bar["measured"] == pytest.approx(ratio)
    assert bar["met"] == (ratio >= 1)
    assert report["environment"]["diffusers"]


def test_sdxl_has_its_second_tower_and_sizes_on_both_sides(tiny_sdxl):
    parts = ("text", "unet")
    report = run(dataclasses.replace(SMALL, model=str(tiny_sdxl), parts=parts))
    ours, theirs = report["rows"][2], report["rows"][4]
    assert theirs["latent_std"] == pytest.approx(ours["latent_std"], rel=1e-4)


def test_another_sides_weights_are_found_out(tiny_sd, monkeypatch):
    from d2g_jax.bench import torch_pipeline

    other = lambda params: {key: 0 * value for key, value in torch_pipeline_state(params).items()}  # noqa: E731
    torch_pipeline_state = torch_pipeline.to_state_dict
    monkeypatch.setattr(torch_pipeline, "to_state_dict", other)
    with pytest.raises(UserError, match="different latents"):
        run(dataclasses.replace(SMALL, model=str(tiny_sd), parts=("unet",)))


@pytest.mark.parametrize(("compiles", "met"), [(True, True), (False, None)])
def test_a_gpus_bar_is_against_compiled_diffusers_alone(monkeypatch, compiles, met):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    request = dataclasses.replace(SMALL, parts=("all",), compile=compiles)
    rows = [{"name": "all x2", "seconds": 1.0}, {"name": "all x2 (torch)", "seconds": 1.3}]
    (bar,) = sample._bars(request, rows)
    assert bar.claim == "all x2: at least 1.2 times as fast as diffusers with torch.compile(max-autotune)"
    assert bar.met is met


def test_without_torch():
    report = run(dataclasses.replace(SMALL, torch=False, parts=("text",)))
    assert [row["name"] for row in report["rows"]] == ["matrix product", "text x2"]


def test_random_pipelines_are_stored_as_asked():
    pipeline = networks.random_pipeline("digits", "bfloat16", "bfloat16", 0, meshes.make_mesh())
    for tree in pipeline.params.values():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            half = path[-1].key in ("kernel", "embedding")
            assert leaf.dtype == ("bfloat16" if half else "float32")
            assert np.isfinite(np.asarray(leaf, np.float32)).all()
    ids = networks.random_input_ids(pipeline, 3, 0)
    assert ids.shape == (3, pipeline.token_length)
    assert (ids[:, -1] == pipeline.text_encoder.config.eos_token_id).all()
    assert (ids[:, :-1] < pipeline.text_encoder.config.vocab_size - 2).all()


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"batches": (1,)}, "--batches=1"),
        ({"batches": ()}, "--batches"),
        ({"dtype": "f8"}, "--dtype"),
        ({"repeats": 0}, "--repeats"),
        ({"parts": ("vea",)}, "--parts=vea"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_bad_requests(change, flag):
    with pytest.raises(UserError, match=flag):
        run(dataclasses.replace(SMALL, **change))
