"""Pixel LPIPS against PyTorch, its invariants, the decoded baseline, files and errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from d2g_jax.digits.config import get_config
from d2g_jax.losses import augment, perceptual
from d2g_jax.losses.lpips import KIND, LPIPS, DecodedLPIPS, save_lpips
from d2g_jax.losses.perceptual import regression_loss
from d2g_jax.models import pixels, vae, vgg
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.runtime.errors import UserError
from d2g_jax.train.setup import load_metric

NARROW = vgg.VGGConfig(3, (4, 6, 6, 8, 8), (1, 1, 1, 1, 1), vgg.PIXELS.pools, batch_norm=False, tap="pre_pool")


@pytest.fixture(scope="module")
def trunk():
    """(parameters, heads) of a narrow metric."""
    rng = np.random.default_rng(0)

    def value(leaf):
        deviation = np.sqrt(2 / np.prod(leaf.shape[:-1])) if len(leaf.shape) == 4 else 0.1
        return rng.normal(0, deviation, leaf.shape).astype(np.float32)

    params = jax.tree.map(value, vgg.build(NARROW).abstract())
    return params, [rng.random(width).astype(np.float32) for width in NARROW.widths]


@pytest.fixture(scope="module")
def metric(trunk):
    return LPIPS.from_params(*trunk, NARROW)


@jax.jit
def value_and_grad(metric, a, b):
    values, pull = jax.vjp(lambda a: metric.distance(a, b), a)
    return values, pull(jnp.ones_like(values))[0]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.uniform(-1, 1, (3, 16, 16, 3)), jnp.float32) for _ in range(2))


def torch_lpips(torch, features, heads):
    """The lpips package's published architecture over torchvision's layers `features`: (a, b) NCHW -> (B,)."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)

    def taps(x):
        x, found = (x - shift) / scale, []
        for i, layer in enumerate(features):
            x = layer(x)
            if i in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                length = torch.sqrt(torch.sum(x**2, dim=1, keepdim=True))
                found.append(x / (length + 1e-10))
        return found

    def distance(a, b):
        terms = [head((x - y) ** 2).mean((2, 3)) for head, x, y in zip(heads, taps(a), taps(b), strict=True)]
        return sum(terms)[:, 0]

    return distance


def torch_vgg16(torch):
    """`features` of torchvision's vgg16 and the five heads, at random."""
    layers, channels, widths = [], 3, (64, 128, 256, 512, 512)
    for width, convs in zip(widths, (2, 2, 3, 3, 3), strict=True):
        for _ in range(convs):
            conv = torch.nn.Conv2d(channels, width, 3, padding=1)
            torch.nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            torch.nn.init.normal_(conv.bias, 0, 0.1)
            layers += [conv, torch.nn.ReLU()]
            channels = width
        layers.append(torch.nn.MaxPool2d(2))
    heads = [torch.nn.Conv2d(width, 1, 1, bias=False) for width in widths]
    for head in heads:
        torch.nn.init.uniform_(head.weight)
    return torch.nn.Sequential(*layers), heads


def test_equals_the_lpips_package(tmp_path):
    """Forward to 1e-5 and gradient to 1e-4, with random weights at full width, read by the package's names."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    features, heads = torch_vgg16(torch)
    slices = {i: s for s, indices in enumerate(vgg.conv_indices(vgg.PIXELS), 1) for i in indices}
    state = {f"net.slice{slices[int(k.split('.')[0])]}.{k}": v.numpy() for k, v in features.state_dict().items()}
    state |= {f"lin{i}.model.1.weight": head.weight.detach().numpy() for i, head in enumerate(heads)}
    save_file(state, tmp_path / "metric.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"metric": KIND, **vgg.PIXELS.to_json()}))

    a, b = np.random.default_rng(2).uniform(-1, 1, (2, 2, 3, 32, 48)).astype(np.float32)
    first = torch.tensor(a, requires_grad=True)
    expected = torch_lpips(torch, features, heads)(first, torch.tensor(b))
    expected.sum().backward()
    metric = LPIPS.load(tmp_path)
    values, gradient = value_and_grad(metric, *(jnp.asarray(x.transpose(0, 2, 3, 1)) for x in (a, b)))
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5)
    expected_gradient = first.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-4 * np.abs(expected_gradient).max())


def test_zero_symmetric_and_positive(metric, images):
    a, b = images
    forward, backward = value_and_grad(metric, a, b)[0], value_and_grad(metric, b, a)[0]
    assert (forward > 0).all()
    assert (forward == backward).all()
    values, gradient = value_and_grad(metric, a, a + 0)
    assert (values == 0).all()
    assert (gradient == 0).all()


def test_a_sample_does_not_depend_on_its_batch(metric, images):
    a, b = images
    alone = [value_and_grad(metric, a[i : i + 1], b[i : i + 1])[0][0] for i in range(2)]
    np.testing.assert_allclose(value_and_grad(metric, a, b)[0][:2], alone, rtol=1e-6)


def test_layers_add_up(metric, images):
    layers = jax.jit(lambda a, b: perceptual.weighted(metric.channel_differences(a, b), metric.heads))(*images)
    assert layers.shape == (3, 5)
    np.testing.assert_allclose(layers.sum(-1), value_and_grad(metric, *images)[0], rtol=1e-6)


def test_gradient_by_finite_differences(trunk, images):
    with jax.enable_x64(True):
        metric = LPIPS.from_params(*trunk, NARROW, jnp.float64)
        a, b = (jnp.asarray(np.asarray(x, np.float64)) for x in images)
        direction = np.random.default_rng(3).normal(size=a.shape)
        slope = np.vdot(value_and_grad(metric, a, b)[1], direction)
        steps = [value_and_grad(metric, a + h * direction, b)[0].sum() for h in (1e-6, -1e-6)]
        np.testing.assert_allclose(slope, (steps[0] - steps[1]) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_constant_images_give_no_nan(trunk, images, dtype):
    metric = LPIPS.from_params(*trunk, NARROW, dtype)
    for value in (-1.0, 0.0):
        flat = jnp.full_like(images[0], value, dtype)
        for a, b in ((flat, flat), (flat, images[1].astype(dtype))):
            values, gradient = value_and_grad(metric, a, b)
            assert values.dtype == jnp.float32
            assert jnp.isfinite(values).all()
            assert jnp.isfinite(gradient.astype(jnp.float32)).all()


def test_features_that_are_all_zero_give_no_nan(trunk, images):
    """The root has no derivative at 0: with every ReLU closed for one image the gradient is 0, not NaN."""
    params, heads = trunk
    closed = {name: {i: {**layer, "bias": layer["bias"] - 100} for i, layer in s.items()} for name, s in params.items()}
    values, gradient = value_and_grad(LPIPS.from_params(closed, heads, NARROW), *images)
    assert (values == 0).all()
    assert (gradient == 0).all()
    # Open for bright images alone: zero features on one side, unit features on the other.
    kernel = np.ones_like(params["slice1"]["0"]["kernel"])
    half = {**params, "slice1": {"0": {"kernel": kernel, "bias": np.zeros_like(params["slice1"]["0"]["bias"])}}}
    metric = LPIPS.from_params(half, heads, NARROW)
    bright = jnp.abs(images[0]) + 1
    for a, b in ((-bright, bright), (bright, -bright)):
        values, gradient = value_and_grad(metric, a, b)
        assert (values > 0).all()
        assert jnp.isfinite(gradient).all()


def test_no_gradient_reaches_the_metric_or_the_target(metric, images):
    by_metric, by_target = jax.jit(jax.grad(lambda m, b: m.distance(images[0], b).sum(), (0, 1)))(metric, images[1])
    leaves = jax.tree.leaves(by_metric)
    assert len(leaves) == len(jax.tree.leaves((metric.params, metric.heads)))
    assert all((leaf == 0).all() for leaf in leaves)
    assert (by_target == 0).all()


def test_lpips_of_latents(metric):
    """The distance of the decoded images, with a gradient through the decoder to the first latents alone."""
    config = vae.VaeConfig(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), norm_num_groups=2, scaling_factor=0.5,
    )  # fmt: skip
    network = vae.build(config)
    params = network.init(jax.random.key(0))
    frozen = DecodedLPIPS(metric, params, network)
    decode = lambda z: network.apply(params, vae.unscale_latents(config, z), method="decode")  # noqa: E731
    rng = np.random.default_rng(4)
    a, b = (jnp.asarray(rng.normal(size=(2, 8, 8, 4)), jnp.float32) for _ in range(2))

    @jax.jit
    def run(a, b):
        values, pull = jax.vjp(frozen.distance, a, b)
        images = decode(a), decode(b)
        _, chain = jax.vjp(decode, a)
        by_image = jax.grad(lambda x: metric.distance(x, images[1]).sum())(images[0])
        return values, pull(jnp.ones_like(values)), metric.distance(*images), chain(by_image)[0]

    values, (by_a, by_b), expected, expected_gradient = run(a, b)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(by_a, expected_gradient, atol=1e-4 * np.abs(expected_gradient).max())
    assert (by_b == 0).all()
    assert np.abs(by_a).max() > 0

    # The same as a loss: one frozen pytree, in which nothing learns
    def loss(frozen, a, b):
        return regression_loss("lpips", frozen, l1_weight=2.0)(jax.random.key(0), a, b).sum()

    total, (for_frozen, for_a, for_b) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(frozen, a, b)
    absolute = np.abs(np.asarray(a - b)).mean((1, 2, 3))
    np.testing.assert_allclose(total, np.sum(values + 2 * absolute), rtol=1e-5)
    np.testing.assert_allclose(for_a, by_a + 2 * np.sign(a - b) / a[0].size, atol=1e-4 * np.abs(by_a).max())
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((for_frozen, for_b)))


def test_images_are_enlarged_and_transformed_together(metric):
    """`loss.size` as PyTorch enlarges; of E-LPIPS one draw for both images, zero for equal ones."""
    torch = pytest.importorskip("torch")
    network = pixels.build(pixels.PixelConfig(3, 8))
    seen = DecodedLPIPS(metric, {}, network, 28)
    rng = np.random.default_rng(4)
    a, b = (rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32) for _ in range(2))

    def enlarged(x):
        large = torch.nn.functional.interpolate(torch.tensor(x.transpose(0, 3, 1, 2)), [28, 28], mode="bilinear")
        return large.numpy().transpose(0, 2, 3, 1)

    wanted = metric.distance(enlarged(a), enlarged(b))
    np.testing.assert_allclose(seen.distance(a, b), wanted, rtol=1e-4)
    loss, key = regression_loss("e_lpips", seen, "bgo"), jax.random.key(0)
    values = loss(key, a, b)
    assert np.abs(np.asarray(values) - wanted).min() > 1e-4
    np.testing.assert_array_equal(loss(key, a, a), 0)
    transform = augment.draw(key, "bgo", 2)
    both = (enlarged(np.asarray(augment.apply(transform, x))) for x in (a, b))
    np.testing.assert_allclose(values, metric.distance(*both), rtol=1e-4)
    np.testing.assert_allclose(regression_loss("e_lpips", seen, "none")(key, a, b), wanted, rtol=1e-4)
    by_a, by_b = jax.grad(lambda a, b: loss(key, a, b).sum(), argnums=(0, 1))(a, b)
    assert np.abs(by_a).max() > 0
    assert (np.asarray(by_b) == 0).all()


def test_training_needs_the_folder_of_a_pixel_metric():
    config = get_config().loss
    config.name = "lpips"
    for folder, words in (("", "loss.lpips is empty"), (config.metric, "that of a latent metric")):
        config.lpips = folder
        with pytest.raises(UserError, match=words):
            load_metric(config, None)


@pytest.mark.parametrize("name", ["e_latent_lpips", "lpips"])
def test_the_loss_has_a_dtype_of_its_own(name):
    config = get_config()
    config.loss.name, config.loss.dtype = name, "bfloat16"
    pipeline = Pipeline.load(config.pipeline)
    metric = load_metric(config.loss, pipeline)
    trunk, channels = (metric.network, 4) if name == "e_latent_lpips" else (metric.lpips.network, 3)
    taps = jax.eval_shape(trunk.apply, trunk.abstract(), jnp.zeros((1, 32, 32, channels)))
    assert {tap.dtype.name for tap in jax.tree.leaves(taps)} == {"bfloat16"}
    config.loss.dtype = "half"
    with pytest.raises(UserError, match=r"loss\.dtype='half': choose float32 or bfloat16"):
        load_metric(config.loss, pipeline)


def test_wrong_images(metric):
    x = jnp.zeros((2, 16, 16, 3))
    for a, b, words in (
        (x, x[:1], "one shape"),
        (x[..., :1], x[..., :1], r"LPIPS takes \(B, H, W, 3\)"),
        (x[:, :15], x[:, :15], "at least 16x16"),
        (x.astype(jnp.uint8), x, "images are uint8 and float32"),
    ):
        with pytest.raises(UserError, match=words):
            metric.distance(a, b)


@pytest.fixture
def folder(tmp_path, trunk):
    save_lpips(tmp_path / "metric", *trunk, NARROW)
    return tmp_path / "metric"


def test_folder_round_trip(folder, metric):
    loaded = LPIPS.load(folder)
    assert loaded.network.config == NARROW
    same = jax.tree.map(lambda a, b: bool((a == b).all()), (loaded.params, loaded.heads), (metric.params, metric.heads))
    assert jax.tree.all(same)
    assert {"net.slice1.0.weight", "lin4.model.1.weight"} <= set(load_file(folder / "metric.safetensors"))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "metric.safetensors"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("net.slice2.3.bias"), r"net\.slice2\.3\.bias is missing"),
        (lambda s: s.update(extra=np.zeros(1, np.float32)), "unexpected tensor extra"),
        (lambda s: s["lin2.model.1.weight"].fill(-0.1), r"lin2\.model\.1\.weight has negative weights"),
        (lambda s: s["net.slice1.0.weight"].fill(np.nan), r"net\.slice1\.0\.weight holds NaN"),
    ],
)
def test_broken_weights(folder, change, words):
    state = load_file(folder / "metric.safetensors")
    change(state)
    save_file(state, folder / "metric.safetensors")
    with pytest.raises(UserError, match=words) as error:
        LPIPS.load(folder)
    assert "metric.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_folders(folder, trunk, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for text, words in (
        ("{", "cannot be read"),
        ("[]", "expected a JSON object"),
        (json.dumps({**config, "metric": "ssim"}), "metric is 'ssim'"),
        (json.dumps({**config, "in_channels": 4}), "LPIPS has in_channels 3"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            LPIPS.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        LPIPS.load(folder)
    with pytest.raises(UserError, match=r"config\.json is missing; a metric folder holds one"):
        LPIPS.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json cannot be read .*; a metric folder holds one"):
        LPIPS.load(folder / "metric.safetensors")
    params, heads = trunk
    with pytest.raises(UserError, match="has 3 weights"):
        save_lpips(tmp_path / "other", params, [heads[0][:3], *heads[1:]], NARROW)
    assert not (tmp_path / "other").exists()


def test_the_two_kinds_of_folders_refuse_each_other(folder, tmp_path):
    with pytest.raises(UserError, match="latent_space"):
        perceptual.LatentLPIPS.load(folder)
    config = vgg.VGGConfig(4, (2, 2), (1, 1), (False, True))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), vgg.build_training(config).abstract())
    space = perceptual.LatentSpace("digits", 4, 1.0)
    perceptual.save_metric(tmp_path / "latent", config, params, [np.ones(2, np.float32)] * 2, space)
    with pytest.raises(UserError, match="that of a latent metric"):
        LPIPS.load(tmp_path / "latent")
