"""`d2g bench pairs`: that both sides solve the same, that a side which does not is found out, and what the bar says."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from d2g_jax.__main__ import main
from d2g_jax.bench import networks, pairs, torch_pipeline
from d2g_jax.bench.pairs import Request, run
from d2g_jax.digits.config import WEIGHTS
from d2g_jax.pairs.estimate import unet_flops
from d2g_jax.pipeline.conditioning import tokenize_prompts
from d2g_jax.plan.architectures import MODELS, abstract_pipeline
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError

SMALL = Request(str(WEIGHTS / "pipeline"), batch=4, steps=2, repeats=1)


def test_both_sides_solve_the_same():
    pytest.importorskip("torch")
    report = run(SMALL)
    _, ours, theirs = report["rows"]
    assert ours["value"] == pytest.approx(4 / ours["seconds"])
    assert report["bars"][0]["measured"] == pytest.approx(ours["value"] / theirs["value"])
    assert 0 < ours["share_of_peak"] < 1
    assert theirs["latent_std"] == pytest.approx(ours["latent_std"], rel=1e-3)
    assert report["environment"]["diffusers"]
    assert report["settings"]["dtype"] == "float32"


def test_facts_are_those_of_the_compiled_programs():
    (_, ours) = run(dataclasses.replace(SMALL, torch=False))["rows"]
    network = 4 * 4 * unet_flops(abstract_pipeline(SMALL.model))  # images, calls with both halves
    assert 1 < ours["flops"] / network < 1.3  # towers besides, and the padding of convolutions, which XLA leaves out
    assert ours["peak_bytes"] > ours["temp_bytes"] > 0
    assert ours["compile_seconds"] > 0


def test_a_name_gets_random_weights_on_both_sides(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "pairs.json"
    flags = ["--model=digits", "--batch=2", "--steps=2", "--repeats=1", f"--out={out}"]
    assert main(["bench", "pairs", *flags]) == 0
    report = json.loads(out.read_text())
    _, ours, theirs = report["rows"]
    assert theirs["latent_std"] == pytest.approx(ours["latent_std"], rel=1e-3)
    assert report["settings"]["model"] == "digits"


def test_random_sdxl_has_both_towers_on_both_sides(tiny_sdxl, monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", str(tiny_sdxl))
    _, ours, theirs = run(dataclasses.replace(SMALL, model="tiny", prompt="the cat"))["rows"]
    assert theirs["latent_std"] == pytest.approx(ours["latent_std"], rel=1e-3)


@pytest.mark.parametrize("model", ["sd15", "sdxl", "nota-ai/bk-sdm-tiny"])
def test_full_sizes_have_names_and_tokenizers(model):
    assert networks.known(model)
    pipeline = abstract_pipeline(MODELS.get(model, model))
    ids = tokenize_prompts(pipeline, ["a cat", ""])
    assert ids.shape == (2, pipeline.token_length)
    assert ids[:, 0].tolist() == [49406, 49406]
    assert ids[1, 1] == 49407
    assert ids[0, 1:4].tolist() == [320, 2368, 49407]


def test_the_bar_of_a_gpu_is_against_compiled_diffusers(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    request = dataclasses.replace(SMALL, batch=2).resolved()
    assert (request.dtype, request.compile) == ("bfloat16", True)
    rows = [{}, {"value": 13.0}, {"value": 10.5}]
    (bar,) = pairs.bars(request, rows)
    assert "1.3 times as fast as diffusers with torch.compile(max-autotune)" in bar.claim
    assert bar.met is False
    assert pairs.bars(request, [{}, {"value": 14.0}, {"value": 10.0}])[0].met
    eager = dataclasses.replace(request, compile=False)
    assert pairs.bars(eager, rows)[0].met is None


def test_one_gpu_is_not_compared_with_several(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch_pipeline, "missing", lambda: None)
    assert torch_pipeline.alone_missing(abstract_pipeline(SMALL.model)) == "it runs on one device, ours on several"


def test_teachers_of_images_have_no_counterpart():
    images = abstract_pipeline("google/ddpm-cifar10-32")
    assert torch_pipeline.left_out(images).startswith("left out: ")
    assert torch_pipeline.alone_missing(images).startswith("left out: ")


def test_what_does_not_fit_is_compiled_and_not_run(monkeypatch):
    monkeypatch.setattr(pairs, "does_not_fit", lambda needed: f"needs {needed:.0f}")
    row = run(dataclasses.replace(SMALL, torch=False))["rows"][1]
    assert row["seconds"] is None
    assert row["flops"] > 0
    assert row["not_run"].startswith("needs ")


def test_random_weights_are_stored_as_pairs_stores_them():
    request = Request("digits", batch=2, dtype="bfloat16").resolved()
    pipeline = pairs.load(request, meshes.make_mesh())
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(pipeline.params)} == {"float32"}


def test_other_latents_are_refused():
    a = np.ones((2, 4, 8, 8), np.float32)
    with pytest.raises(UserError, match="different latents"):
        pairs.check_same(a, 1.1 * a)
    with pytest.raises(UserError, match="different latents"):
        pairs.check_same(a * np.nan, a)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"steps": 0}, "--steps"),
        ({"batch": 3}, "--batch"),
        ({"dtype": "f8"}, "--dtype"),
        ({"model": "sd51"}, r"--model=sd51.*sd15"),
    ],
)
def test_bad_requests(change, flag):
    with pytest.raises(UserError, match=flag):
        run(Request(**{"model": "nowhere", **change}))
