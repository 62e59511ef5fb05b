"""`d2g bench loss` with tiny networks: what it runs, that its counterparts agree, and what it claims."""

import dataclasses
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2g_jax.bench import loss, measure, torch_metric
from d2g_jax.losses import perceptual
from d2g_jax.models import vae, vgg
from d2g_jax.runtime.errors import UserError

TINY = loss.Networks(
    perceptual.latent_space("sd15"),
    vgg.VGGConfig(widths=(4, 6, 6, 8, 8), convs=(1, 1, 1, 1, 1)),
    vgg.VGGConfig(3, (4, 6, 6, 8, 8), (1, 1, 1, 1, 1), vgg.PIXELS.pools, batch_norm=False, tap="pre_pool"),
    vae.VaeConfig(block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False),
)
"""Its decoder keeps the size: latents are as large as images."""


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_TURN_CALLS", 1)
        return loss.run(loss.Request(size=16, batch=2, repeats=1), TINY)


def by_name(report):
    return {(row["name"], row["dtype"]): row for row in report["rows"]}


def test_everything_is_measured_in_both_dtypes(report):
    rows = by_name(report)
    names = (measure.PRODUCT, "latent_lpips", "e_latent_lpips", "decode + lpips")
    expected = [(name, dtype) for name in names for dtype in loss.DTYPES]
    for key in [*expected, ("mse", "float32"), ("augmentation", "float32")]:
        assert rows[key]["seconds"] > 0
        assert rows[key]["compile_seconds"] > 0
        assert rows[key]["temp_bytes"] >= 0
        assert rows[key]["flops"] > 0 or key[0] in ("mse", "augmentation")  # which may have no product
        assert rows[key]["not_run"] is None
        assert len(rows[key]["all_seconds"]) == 1
    assert report["settings"]["preset"] == "bgo"
    assert measure.format_report(report).startswith("bench loss: size=16, batch=2")


def test_values_are_those_of_the_losses(report):
    request, rows = loss.Request(size=16, batch=2), by_name(report)
    inputs = loss._inputs(request, TINY)
    np.testing.assert_allclose(
        rows["mse", "float32"]["value"], np.square(inputs.generated - inputs.target).mean(), rtol=1e-5
    )
    metric = loss._latent_metric(TINY, inputs, "float32")
    expected = jax.jit(lambda a, b, m: m.distance(a, b, scaled=True).mean())(inputs.generated, inputs.target, metric)
    np.testing.assert_allclose(rows["latent_lpips", "float32"]["value"], expected, rtol=1e-5)
    for name in ("latent_lpips", "e_latent_lpips", "decode + lpips"):
        np.testing.assert_allclose(rows[name, "bfloat16"]["value"], rows[name, "float32"]["value"], rtol=0.02)


def test_torch_counterpart_gives_our_value(report):
    pytest.importorskip("torch")
    rows = by_name(report)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.02)):
        row = rows["latent_lpips (torch)", dtype]
        assert row["seconds"] > 0
        np.testing.assert_allclose(row["value"], rows["latent_lpips", dtype]["value"], rtol=tolerance)
    assert report["environment"]["torch"]


def test_torch_counterpart_gives_our_gradient():
    pytest.importorskip("torch")
    inputs = loss._inputs(loss.Request(size=16, batch=2), TINY)
    metric = loss._latent_metric(TINY, inputs, "float32")
    ours = jax.jit(jax.grad(loss._latent_lpips))(inputs.generated, inputs.target, inputs.key, metric)
    latents = (np.asarray(inputs.generated), np.asarray(inputs.target))
    theirs, *_ = torch_metric.candidates(TINY.latent, inputs.trunk, inputs.heads, TINY.space, latents, ["float32"])
    gradient = theirs.call()[1].numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, ours, rtol=0, atol=1e-4 * float(jnp.abs(ours).max()))


def test_official_package_gives_our_value():
    pytest.importorskip("torch")
    if importlib.util.find_spec("elatentlpips") is None:
        pytest.skip("elatentlpips is not installed, and is no dependency")
    networks = dataclasses.replace(TINY, latent=vgg.VGGConfig())
    inputs = loss._inputs(loss.Request(size=16), networks)
    metric = loss._latent_metric(networks, inputs, "float32")
    latents = (np.asarray(inputs.generated), np.asarray(inputs.target))
    _, theirs = torch_metric.candidates(
        networks.latent, inputs.trunk, inputs.heads, networks.space, latents, ["float32"]
    )
    ours = jax.jit(loss._latent_lpips)(inputs.generated, inputs.target, inputs.key, metric)
    assert theirs.not_run is None
    np.testing.assert_allclose(theirs.describe(theirs.call())["value"], ours, rtol=1e-4)


def test_absent_torch_is_a_line(monkeypatch):
    monkeypatch.setattr(torch_metric.torch_pipeline, "missing", lambda packages: f"{packages[0]} is not installed")
    inputs = loss._inputs(loss.Request(size=16), TINY)
    latents = (np.asarray(inputs.generated), np.asarray(inputs.target))
    rows = torch_metric.candidates(TINY.latent, inputs.trunk, inputs.heads, TINY.space, latents, loss.DTYPES)
    assert [(row.call, row.not_run) for row in rows] == [(None, "torch is not installed")] * 3


def test_target_half_has_no_backward_pass():
    networks = dataclasses.replace(TINY, latent=vgg.VGGConfig())
    inputs = loss._inputs(loss.Request(size=16), networks)
    metric = loss._latent_metric(networks, inputs, "float32")
    assert 0.9 < loss._backward_by_half(metric, inputs) < 1.1
    # The figure tells: by both latents it is twice as large.
    arguments = (inputs.generated, metric)
    total = lambda a, metric: sum(tap.sum() for tap in metric.network.apply(metric.params, a))  # noqa: E731
    both = lambda a, metric: total(a, metric) + total(2 * a, metric)  # noqa: E731
    forward, backward = (measure.flops(jax.jit(f).trace(*arguments)) for f in (both, jax.value_and_grad(both)))
    assert 2 * (backward - forward) / forward > 1.8


def test_bars_of_a_partial_run():
    row = lambda name, **keys: {"name": name, "dtype": "float32", "seconds": None, "temp_bytes": None, **keys}  # noqa: E731
    rows = [
        row("augmentation", seconds=0.5),
        row("latent_lpips", seconds=2.0),
        row("e_latent_lpips", seconds=2.5, temp_bytes=10),
        row("decode + lpips", temp_bytes=250),
        row("latent_lpips (torch)", seconds=1.0),
    ]
    bars = {bar.claim.removeprefix("float32: "): bar for bar in loss._bars(rows, ("float32",), 1.02)}
    assert [bar.met for bar in bars.values()] == [None, True, True, False, True]
    assert [bar.measured for bar in bars.values()] == [None, 25, 0.2, 2, 1.02]
    half = [{**one, "dtype": "bfloat16"} for one in rows]
    assert loss._bars([*rows, *half], loss.DTYPES, 1.02)[-1].measured is None  # compiled, and not run for its memory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 60}, "--size=60: give pixels, a multiple of 8 and 32 at least"),
        ({"size": 24}, "--size=24: give pixels, a multiple of 8 and 32 at least"),
        ({"batch": 0}, "--batch=0: give 1 or more"),
        ({"repeats": 0}, "--repeats=0: give 1 or more"),
        ({"dtypes": ("float16",)}, "--dtype=float16: give float32, bfloat16 or both"),
        ({"dtypes": ()}, "--dtype=: give float32, bfloat16 or both"),
        ({"preset": "x"}, "augmentation preset 'x' is unknown"),
    ],
)
def test_bad_requests(change, message):
    with pytest.raises(UserError, match="^" + message):
        loss.run(loss.Request(**change))


def test_full_size_networks():
    assert loss.SD15.autoencoder.downscale == 8
    decoder = jax.tree.leaves(vae.build(loss.SD15.autoencoder).abstract()["decoder"])
    assert sum(leaf.size for leaf in decoder) == 49_490_179


def test_importing_the_bench_imports_no_torch():
    code = "import sys; from d2g_jax.bench import loss, sample, train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
