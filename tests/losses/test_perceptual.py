"""LatentLPIPS, E-LatentLPIPS and the regression losses: closed forms, invariants, files, errors."""

import json
import warnings
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from d2g_jax.digits.config import get_config
from d2g_jax.losses import perceptual
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.models import vgg
from d2g_jax.runtime.errors import UserError

NARROW = vgg.VGGConfig(widths=(8, 8, 16, 16, 16), convs=(1, 1, 1, 1, 1))
SPACE = perceptual.LatentSpace("digits", 4, 0.5)


def closed_form(key, shape):
    """The weights of the closed-form fixture, in PyTorch's layout."""
    n = int(np.prod(shape))
    w = np.sin(0.7 * np.arange(n) + (zlib.crc32(key.encode()) % 1000) / 100).reshape(shape)
    if key.startswith("lin"):
        return 0.02 + 0.05 * np.abs(w)
    if key.endswith("running_var"):
        return 1 + 0.5 * w**2
    if key.endswith("running_mean"):
        return 0.1 * w
    if w.ndim == 4:
        return np.sqrt(2 / np.prod(shape[1:])) * w
    return 0.1 * w if key.endswith(".bias") else 1 + 0.2 * w


def closed_form_metric(config, dtype):
    """A metric with those weights in `dtype`, not rounded to float32 on the way."""
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var", "bias": "bias"}
    params = {}
    for name, layers in vgg.build_training(config).abstract().items():
        for index, layer in layers.items():
            for leaf, abstract in layer.items():
                shape = tuple(abstract.shape[i] for i in (3, 2, 0, 1)) if leaf == "kernel" else abstract.shape
                value = closed_form(f"net.{name}.{index}.{names[leaf]}", shape)
                value = value.transpose(2, 3, 1, 0) if leaf == "kernel" else value
                params.setdefault(name, {}).setdefault(index, {})[leaf] = value
    widths = enumerate(config.widths)
    heads = [closed_form(f"lin{i}.model.1.weight", (1, width, 1, 1)).reshape(-1) for i, width in widths]
    return LatentLPIPS.from_params(config, params, heads, perceptual.latent_space("sd15"), dtype)


def test_closed_form_fixture():
    with jax.enable_x64(True):
        metric = closed_form_metric(vgg.VGGConfig(), jnp.float64)
        i = np.arange(4 * 32 * 32)
        a = 0.8 * np.sin(0.37 * i + 0.5)
        b = a + 0.25 * np.sin(1.3 * i + 2.0)
        a, b = (jnp.asarray(x.reshape(1, 4, 32, 32).transpose(0, 2, 3, 1)) for x in (a, b))

        def total(b, metric):
            layers = perceptual.weighted(metric.channel_differences(b, a, scaled=True), metric.heads)
            l1 = perceptual.mean_absolute(b, a)
            return (layers.sum(-1) + l1)[0], (layers[0], l1[0])

        (value, (layers, l1)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(b, metric)
        taps = [tap.mean() for tap in jax.jit(metric.network.apply)(metric.params, a)]
    terms = [0.0086181541, 0.0185868026, 0.0352552317, 0.0181903065, 0.0050865013]
    means = [0.12419232, 0.32815899, 3.06187782, 29.71479056, 245.15360020]
    np.testing.assert_allclose(value, 0.2449024259, rtol=1e-6)
    np.testing.assert_allclose(l1, 0.1591654298, rtol=1e-6)
    np.testing.assert_allclose(layers, terms, rtol=1e-6)
    np.testing.assert_allclose(taps, means, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(gradient), 2.6423077709, rtol=1e-6)


@pytest.fixture(scope="module")
def trunk():
    """(trunk with batch norms, heads) of a narrow metric."""
    rng = np.random.default_rng(0)

    def value(leaf):
        if len(leaf.shape) != 4:  # a bias, or a scale, mean or variance of a batch norm
            return rng.random(leaf.shape, np.float32) + np.float32(0.1)
        deviation = np.sqrt(2 / (9 * leaf.shape[2])).astype(np.float32)
        return deviation * rng.standard_normal(leaf.shape, np.float32)

    params = jax.tree.map(value, vgg.build_training(NARROW).abstract())
    return params, [rng.random(width).astype(np.float32) for width in NARROW.widths]


@pytest.fixture(scope="module")
def metric(trunk):
    return LatentLPIPS.from_params(NARROW, *trunk, SPACE)


@pytest.fixture(scope="module")
def ensemble(metric):
    @jax.jit
    def value_and_grad(key, a, b):
        loss = lambda a: perceptual.e_latent_lpips(metric, key, a, b, "bgco", scaled=True)  # noqa: E731
        values, pull = jax.vjp(loss, a)
        return values, pull(jnp.ones_like(values))[0]

    return value_and_grad


@pytest.fixture(scope="module")
def distance(metric):
    return jax.jit(lambda a, b: metric.distance(a, b, scaled=True))


@pytest.fixture(scope="module")
def latents():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=(4, 8, 8, 4)), jnp.float32) for _ in range(2))


def test_equal_inputs_have_distance_zero(distance, ensemble, latents):
    a, _ = latents
    assert (distance(a, a) == 0).all()
    values, gradient = ensemble(jax.random.key(1), a, a)
    assert (values == 0).all()
    assert (gradient == 0).all()


def test_symmetric_and_positive(distance, ensemble, latents):
    a, b = latents
    assert (distance(a, b) > 0).all()
    assert distance(a, b).dtype == jnp.float32
    np.testing.assert_allclose(distance(a, b), distance(b, a), rtol=1e-6)
    assert (ensemble(jax.random.key(1), a, b)[0] > 0).all()


def test_same_key_same_value(ensemble, latents):
    first, again = (ensemble(jax.random.key(2), *latents)[0] for _ in range(2))
    assert (first == again).all()
    assert not np.allclose(first, ensemble(jax.random.key(3), *latents)[0], rtol=1e-3)


def test_batch_mates_do_not_matter(ensemble, latents):
    a, b = latents
    values, gradient = ensemble(jax.random.key(4), a, b)
    other_a = a.at[1:].set(7 * a[1:] + 1)
    values_2, gradient_2 = ensemble(jax.random.key(4), other_a, b)
    np.testing.assert_allclose(values[0], values_2[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[0], gradient_2[0], atol=1e-6 * np.abs(gradient[0]).max())
    assert (values[1:] != values_2[1:]).all()
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(4), i))(jnp.arange(4))
    reversed_values, _ = ensemble(keys[::-1], a[::-1], b[::-1])
    np.testing.assert_allclose(reversed_values[::-1], values, rtol=1e-5)


def test_target_has_no_gradient(metric, latents):
    a, b = latents
    loss = perceptual.regression_loss("e_latent_lpips", metric, "bg", l1_weight=1.0)
    gradient = jax.jit(jax.grad(lambda b: loss(jax.random.key(0), a, b).sum()))(b)
    assert (gradient == 0).all()


def test_no_backward_pass_for_the_target(metric, latents):
    a, b = latents
    loss = lambda a: metric.distance(a, b, scaled=True).sum()  # noqa: E731
    count = lambda f: str(jax.make_jaxpr(f)(a)).count("conv_general_dilated[")  # noqa: E731
    layers = sum(NARROW.convs)
    assert count(loss) == 2 * layers
    assert count(jax.grad(loss)) == 3 * layers


def test_gradient_by_finite_differences(metric):
    with jax.enable_x64(True):
        wide = LatentLPIPS(
            SPACE,
            vgg.build(NARROW, jnp.float64),
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), metric.params),
            metric.heads,
        )
        rng = np.random.default_rng(2)
        a, b, direction = (jnp.asarray(rng.normal(size=(2, 8, 8, 4))) for _ in range(3))
        key = jax.random.key(5)
        loss = jax.jit(lambda a: perceptual.e_latent_lpips(wide, key, a, b, "bgcon", scaled=True, l1_weight=1.0).sum())
        slope = np.vdot(jax.jit(jax.grad(loss))(a), direction)
        numeric = (loss(a + 1e-6 * direction) - loss(a - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(slope, numeric, rtol=1e-5)


def test_constants_give_no_nan(ensemble, latents):
    for value in (0.0, 1.0):
        flat = jnp.full_like(latents[0], value)
        for a, b in ((flat, flat), (flat, latents[1])):
            values, gradient = ensemble(jax.random.key(6), a, b)
            assert jnp.isfinite(values).all()
            assert jnp.isfinite(gradient).all()


def test_bf16_is_within_one_percent(trunk, metric, latents):
    half = LatentLPIPS.from_params(NARROW, *trunk, SPACE, dtype=jnp.bfloat16)
    (values, slope), (exact, exact_slope) = (
        jax.jit(jax.value_and_grad(lambda a, b, m=m: m.distance(a, b, scaled=True).sum()))(*latents)
        for m in (half, metric)
    )
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, exact, rtol=0.01)
    cosine = jnp.vdot(slope, exact_slope) / (jnp.linalg.norm(slope) * jnp.linalg.norm(exact_slope))
    assert cosine > 0.99
    zero = jnp.zeros_like(latents[0], jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda a: half.distance(a, zero, scaled=True).sum()))(zero)
    assert jnp.isfinite(gradient.astype(jnp.float32)).all()


@pytest.mark.slow
def test_bf16_by_distance_with_the_metric_of_the_digits():
    """The table of docs/metric.md: values and gradients in bfloat16 against float32."""
    folder, rng = get_config().loss.metric, np.random.default_rng(0)
    b = jnp.asarray(rng.standard_normal((8, 8, 8, 4)), jnp.float32)

    def of_one(dtype):
        metric = LatentLPIPS.load(folder, dtype=dtype)
        return jax.jit(jax.value_and_grad(lambda a: metric.distance(a, b, scaled=True).sum()))

    half, whole = of_one(jnp.bfloat16), of_one(jnp.float32)
    for s in (1.0, 0.5, 0.2, 0.05, 0.01):
        a = b + s * jnp.asarray(rng.standard_normal(b.shape), jnp.float32)
        (value, slope), (exact, exact_slope) = half(a), whole(a)
        flat = [np.asarray(x, np.float64).reshape(len(b), -1) for x in (slope, exact_slope)]
        cosines = np.sum(flat[0] * flat[1], -1) / np.prod([np.linalg.norm(x, axis=-1) for x in flat], axis=0)
        print(f"| {s} | {exact:.5f} | {value / exact - 1:.5f} | {cosines.mean():.4f}, {cosines.min():.4f} |")
        assert s < 0.2 or (abs(value / exact - 1) < 0.01 and cosines.min() > 0.98)


def test_raw_latents_are_scaled(metric, distance, latents):
    a, b = latents
    raw = jax.jit(lambda a, b: metric.distance(a, b, scaled=False))(a / SPACE.scale, b / SPACE.scale)
    np.testing.assert_allclose(raw, distance(a, b), rtol=1e-5)
    space = perceptual.latent_space("flux")
    assert (space.channels, space.scale, space.shift) == (16, 0.3611, 0.1159)


def test_expected_distance_is_the_mean_over_draws(metric, ensemble, latents):
    key = jax.random.key(7)
    mean = jax.jit(lambda a, b: perceptual.expected_distance(metric, key, a, b, "bgco", draws=3, scaled=True))
    values = np.mean([ensemble(k, *latents)[0] for k in jax.random.split(key, 3)], 0)
    np.testing.assert_allclose(mean(*latents), values, rtol=1e-5)
    assert (mean(*latents) == mean(*latents)).all()


def test_regression_losses(metric, distance, ensemble, latents):
    a, b = latents
    key, difference = jax.random.key(8), np.asarray(a - b, np.float64)
    squares = (difference**2).sum((1, 2, 3))
    np.testing.assert_allclose(perceptual.regression_loss("mse")(key, a, b), squares / 256, rtol=1e-6)
    k = 0.03 * 16
    huber = perceptual.regression_loss("pseudo_huber", pseudo_huber_c=0.03)(key, a, b)
    np.testing.assert_allclose(huber, np.sqrt(squares + k * k) - k, rtol=1e-6)
    assert jnp.isfinite(jax.grad(lambda a: perceptual.pseudo_huber(a, a + 0).sum())(a)).all()

    @jax.jit
    def perceptual_losses(a, b):
        plain = perceptual.regression_loss("latent_lpips", metric, "bgco", l1_weight=2.0)
        return plain(key, a, b), perceptual.regression_loss("e_latent_lpips", metric, "bgco")(key, a, b)

    plain, augmented = perceptual_losses(a, b)
    np.testing.assert_allclose(plain, distance(a, b) + 2 * np.abs(difference).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(augmented, ensemble(key, a, b)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"name": "l7"},
            "'l7' is unknown; choose one of mse, pseudo_huber, lpips, e_lpips, latent_lpips, e_",
        ),
        ({"name": "lpips"}, "needs a metric"),
        ({"name": "e_latent_lpips"}, "needs a metric"),
        ({"name": "e_latent_lpips", "preset": "gb"}, "preset 'gb' is unknown"),
        ({"name": "mse", "l1_weight": -1.0}, "l1_weight is -1.0"),
    ],
)
def test_regression_loss_errors(arguments, words):
    with pytest.raises(UserError, match=words):
        perceptual.regression_loss(**arguments)


def test_wrong_latents(metric):
    x = jnp.zeros((2, 8, 8, 4))
    for a, b, words in (
        (x, x[:1], "one shape"),
        (x[..., :3], x[..., :3], "latent space digits is"),
        (x[:, :2], x[:, :2], "at least 4x4"),
    ):
        with pytest.raises(UserError, match=words):
            metric.distance(a, b, scaled=True)
        with pytest.raises(UserError, match=words):
            perceptual.e_latent_lpips(metric, jax.random.key(0), a, b, scaled=True)


def test_check_latents(trunk):
    metric = LatentLPIPS.from_params(NARROW, *trunk, perceptual.latent_space("sd15"))
    scaled = np.random.default_rng(3).normal(size=(2, 8, 8, 4)).astype(np.float32)
    raw = scaled / metric.space.scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perceptual.check_latents(metric, scaled, scaled=True, source="a.npy")
        perceptual.check_latents(metric, raw, scaled=False, source="a.npy")
    with pytest.warns(UserWarning, match="a.npy: standard deviation 5.* looks raw, but was given as scaled"):
        perceptual.check_latents(metric, raw, scaled=True, source="a.npy")
    with pytest.warns(UserWarning, match="looks scaled, but was given as raw"):
        perceptual.check_latents(metric, scaled, scaled=False, source="a.npy")
    scaled[0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"a\.npy: holds NaN"):
        perceptual.check_latents(metric, scaled, scaled=True, source="a.npy")


def test_no_gradient_reaches_the_metric(metric, latents):
    gradient = jax.jit(jax.grad(lambda m: m.distance(*latents, scaled=True).sum()))(metric)
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) == len(jax.tree.leaves((metric.params, metric.heads)))
    assert all((leaf == 0).all() for leaf in leaves)


@pytest.fixture
def folder(tmp_path, trunk):
    perceptual.save_metric(tmp_path / "metric", NARROW, *trunk, SPACE)
    return tmp_path / "metric"


def test_folder_round_trip(folder, metric):
    loaded = LatentLPIPS.load(folder)
    assert loaded.space == SPACE
    assert loaded.network.config == NARROW
    same = jax.tree.map(lambda a, b: bool((a == b).all()), (loaded.params, loaded.heads), (metric.params, metric.heads))
    assert jax.tree.all(same)
    keys = set(load_file(folder / "metric.safetensors"))
    assert {"net.slice1.0.weight", "net.slice4.13.running_var", "lin4.model.1.weight"} <= keys
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "metric.safetensors"]


def edit(folder, change):
    state = load_file(folder / "metric.safetensors")
    change(state)
    save_file(state, folder / "metric.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("net.slice2.4.bias"), "net.slice2.4.bias is missing"),
        (lambda s: s.update(extra=np.zeros(1, np.float32)), "unexpected tensor extra"),
        (lambda s: s.update({"lins.0.model.1.weight": np.zeros((1, 8, 1, 1), np.float32)}), "unexpected tensor lins.0"),
        (lambda s: s["lin2.model.1.weight"].fill(-0.1), "lin2.model.1.weight has negative weights"),
        (lambda s: s["net.slice5.16.weight"].fill(np.nan), "net.slice5.16.weight holds NaN"),
        (lambda s: s["lin0.model.1.weight"].fill(np.inf), "lin0.model.1.weight holds NaN"),
    ],
)
def test_broken_weights(folder, change, words):
    edit(folder, change)
    with pytest.raises(UserError, match=words) as error:
        LatentLPIPS.load(folder)
    assert "metric.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_folders(folder, trunk, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    space = config["latent_space"]
    for text, words in (
        ("{", "cannot be read"),
        (json.dumps({k: v for k, v in config.items() if k != "latent_space"}), "not a metric's config"),
        (json.dumps({**config, "in_channels": 16}), "slice1.0.weight has shape"),
        (json.dumps({**config, "latent_space": {**space, "scale": 0}}), "latent_space: scale=0; give a number above 0"),
        (json.dumps({**config, "latent_space": {**space, "scale": -1.0}}), "latent_space: scale=-1.0; give a number"),
        (json.dumps({**config, "latent_space": {**space, "scale": "0.18"}}), "latent_space: scale = '0.18'; give fl"),
        (json.dumps({**config, "latent_space": {**space, "sigma": 1}}), "latent_space: unknown key 'sigma'"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            LatentLPIPS.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        LatentLPIPS.load(folder)
    params, heads = trunk
    with pytest.raises(UserError, match="has 7 weights"):
        perceptual.save_metric(tmp_path / "other", NARROW, params, [heads[0][:7], *heads[1:]], SPACE)
    assert not (tmp_path / "other").exists()


def test_the_readmes_three_lines(monkeypatch):
    """As printed there, in a step under jit that differentiates by the generated latents."""
    monkeypatch.chdir(Path(__file__).parents[2])
    text = Path("README.md").read_text()
    section = text[text.index("## The loss in your own training") :]
    code = compile(section[section.index("```python\n") + 10 : section.index("```\n\nWeights")], "README.md", "exec")
    target = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))

    def value(generated, target, key):  # arguments all: of constants XLA would work out a part, and round otherwise
        names = {"key": key, "generated": generated, "target": target}
        exec(code, names)
        return names["loss"]

    step = jax.jit(jax.value_and_grad(value))
    loss, gradient = step(target + 0.5, target, jax.random.key(0))
    assert loss > 0
    assert float(jnp.abs(gradient).max()) > 0
    assert step(target, target, jax.random.key(0))[0] == 0
