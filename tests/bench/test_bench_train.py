"""`d2g bench train`: that it times the programs of `d2g train`, and that PyTorch's step begins with our loss."""

import dataclasses
import importlib.util
import types

import numpy as np
import pytest
from tiny import get_config

from d2g_jax.bench import train, training
from d2g_jax.bench.train import Request, run
from d2g_jax.runtime.errors import UserError

TORCH = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "transformers"))


def small_config():
    """That of test_jobs.py: the programs are its own."""
    c = get_config()
    with c.unlocked():
        c.train.update({"images": 48, "batch_size": 8})
        c.adversarial.update({"start_images": 16, "warmup_images": 8, "r1_interval": 2})
        c.optimizer.generator.warmup_images = c.optimizer.discriminator.warmup_images = 16
    return c


def regression_only():
    c = small_config()
    with c.unlocked():
        c.adversarial.weight = 0.0
    return c


def by_name(report):
    return {row["name"]: row for row in report["rows"]}


@pytest.fixture(scope="module")
def whole():
    return run(Request(small_config(), ("e_latent_lpips",), repeats=1))


@pytest.mark.slow
def test_an_iteration_is_the_sum_of_its_programs(whole):
    rows = by_name(whole)
    g, d, r1 = (rows[name] for name in ("g + adversary, e_latent_lpips x8", "d x8", "r1 x8"))
    row = rows["iteration, e_latent_lpips x8"]
    assert row["seconds"] == pytest.approx(g["seconds"] + d["seconds"] + r1["seconds"] / 2)
    assert row["flops"] == pytest.approx(g["flops"] + d["flops"] + r1["flops"] / 2)
    assert row["value"] == pytest.approx(8 / row["seconds"])
    assert 0 < row["share_of_peak"] < 1
    assert g["flops"] > rows["g, e_latent_lpips x8"]["flops"]


@pytest.mark.slow
def test_the_loop_is_held_against_its_programs(whole):
    rows = by_name(whole)
    loop = rows["loop of 2 x8"]
    assert loop["images"] == 16
    (bar,) = (bar for bar in whole["bars"] if "loop" in bar["claim"])
    assert bar["measured"] == pytest.approx(loop["seconds"] / 2 / rows["iteration, e_latent_lpips x8"]["seconds"])


@pytest.mark.slow
def test_every_step_trained(whole):
    rows = by_name(whole)
    assert np.isfinite([rows["g, e_latent_lpips x8"]["loss"], rows["g + adversary, e_latent_lpips x8"]["loss"]]).all()
    assert not any(row["not_run"] for row in whole["rows"])
    assert whole["settings"]["config"] == "digits"


@pytest.mark.slow
def test_pytorch_begins_with_our_loss():
    rows = by_name(run(Request(regression_only(), ("mse",), repeats=1)))
    assert not {"d x8", "r1 x8"} & set(rows)
    assert rows["iteration, mse x8"]["seconds"] == rows["g, mse x8"]["seconds"]
    theirs = rows["g, mse x8 (torch)"]
    if TORCH:
        assert theirs["loss"] == pytest.approx(rows["g, mse x8"]["loss"], rel=1e-4)
        assert theirs["value"] > 0
    else:
        assert "not installed" in theirs["not_run"]


def test_another_loss_is_refused():
    rows = [{"name": "g, mse x8", "loss": 1.0}, {"name": "g, mse x8 (torch)", "loss": 1.1}]
    request = Request(regression_only(), ("mse",)).resolved()
    with pytest.raises(UserError, match=r"first losses are 1 and 1\.1"):
        train._check_losses(request, rows)
    train._check_losses(request, [rows[0], {**rows[1], "loss": 1.001}])


def test_the_loss_that_pytorch_has_is_called_first():
    request = Request(regression_only(), ("e_latent_lpips", "mse"), torch=False).resolved()
    run = types.SimpleNamespace(facts={"g_regression": None}, loop_length=8)
    names = [one.name for one in train._candidates(request, 8, dict.fromkeys(request.losses, run), None, "refused")]
    assert names == ["g, mse x8", "g, e_latent_lpips x8", "loop of 8 x8"]


def test_an_iterations_share_is_of_the_products_best_call():
    facts = {"compile_seconds": 1.0, "temp_bytes": 0, "peak_bytes": 0}
    product = {"name": train.PRODUCT, "dtype": "float32", "flops": 100.0, "seconds": 4.0, "best_seconds": 2.0, **facts}
    g = {"name": "g, mse x8", "dtype": "float32", "flops": 50.0, "seconds": 2.0, "best_seconds": 1.0, **facts}
    assert train._iteration(regression_only(), "mse", 8, [product, g])["share_of_peak"] == pytest.approx(0.5)


def test_bars_are_the_corrected_ones(monkeypatch):
    monkeypatch.setattr(train.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(train.jax, "device_count", lambda: 1)
    config = small_config()
    with config.unlocked():
        config.name = "sd15"
    request = Request(config, torch=False).resolved()
    row = lambda loss, seconds: {  # noqa: E731
        "name": f"iteration, {loss} x8", "seconds": seconds, "value": 8 / seconds, "share_of_peak": 0.41
    }  # fmt: skip
    bars = {bar.claim: bar for bar in train._bars(request, [row("mse", 0.25), row("e_latent_lpips", 0.284)])}
    assert bars["iteration with e_latent_lpips has at least 0.87 of mse's throughput"].met
    assert bars["an iteration runs at 0.4 of the measured peak at least"].met
    assert bars["at least 27 images per second and device"].measured == pytest.approx(8 / 0.284)
    assert bars["at least 27 images per second and device"].met


@pytest.mark.slow
def test_what_does_not_fit_is_compiled_and_not_run(monkeypatch):
    monkeypatch.setattr(train, "does_not_fit", lambda needed: f"needs {needed:.0f}")
    monkeypatch.setattr(train, "Training", lambda *_: pytest.fail("no state is to be made"))
    rows = by_name(run(Request(regression_only(), ("mse",), repeats=1, torch=False)))
    row = rows["g, mse x8"]
    assert float(row["not_run"].removeprefix("needs ")) > row["temp_bytes"] > 0
    assert row["flops"] > 0
    assert row["seconds"] is rows["iteration, mse x8"]["seconds"] is None


def test_pipelines_by_their_short_names():
    c = small_config()
    with c.unlocked():
        c.pipeline = "sdxl"
    changed = training.with_loss_and_batch(c, "mse", 16)
    assert changed.pipeline == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (changed.loss.name, changed.train.batch_size) == ("mse", 16)
    assert c.pipeline == "sdxl"


@pytest.mark.parametrize(("loss", "losses"), [("e_lpips", ("mse", "e_lpips")), ("mse", ("mse",))])
def test_the_config_s_own_loss_is_measured(loss, losses):
    config = small_config()
    with config.unlocked():
        config.loss.name = loss
    assert Request(config).resolved().losses == losses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 0}, "--repeats=0"),
        ({"losses": ("mse", "mse")}, "--losses=mse,mse"),
        ({"losses": ("mse", "ms")}, "ms"),
        ({"batches": (8, 8)}, "--batches=8,8"),
        ({"batches": (8, 3)}, "train.batch_size=3"),
    ],
)
def test_bad_requests(change, message, monkeypatch):
    monkeypatch.setattr(train, "compile_run", lambda *_: pytest.fail("compiled before all is checked"))
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(Request(small_config()), **change))
