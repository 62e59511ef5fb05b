"""The shapes that are known without a download, against published parameter counts."""

import jax
import pytest
import tiny_images

from d2g_jax.digits.config import WEIGHTS, get_config
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.plan.architectures import abstract_metric, abstract_pipeline
from d2g_jax.runtime.errors import UserError


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# UNet, text towers, VAE: the sums over the published safetensors
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, [123_060_480]),
    "stabilityai/stable-diffusion-2-1": (865_910_724, [340_387_840]),
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, [123_060_480, 694_659_840]),
    "nota-ai/bk-sdm-base": (579_384_964, [123_060_480]),
    "nota-ai/bk-sdm-small": (482_346_884, [123_060_480]),
    "nota-ai/bk-sdm-tiny": (323_384_964, [123_060_480]),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters(model):
    pipeline = abstract_pipeline(model)
    unet, towers = PUBLISHED[model]
    assert count(pipeline.params["unet"]) == unet
    assert [count(tower) for tower in pipeline.text_params.values()] == towers
    assert count(pipeline.params["vae"]) == 83_653_863
    assert pipeline.token_length == 77 * len(towers)


def test_a_local_folder_is_read_without_its_weights():
    pipeline = abstract_pipeline(str(WEIGHTS / "pipeline"))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(pipeline.params))


def test_an_unknown_model():
    with pytest.raises(UserError, match="neither a local folder nor a model whose shapes are known"):
        abstract_pipeline("nobody/nothing")


def test_the_metric_of_a_folder_has_the_shapes_of_the_loaded_one():
    loss = get_config().loss
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), (tree.params, tree.heads))  # noqa: E731
    pipeline = abstract_pipeline(get_config().pipeline)
    assert shapes(abstract_metric(loss, pipeline)) == shapes(LatentLPIPS.load(loss.metric))


def test_the_metric_without_a_folder_is_the_full_size_one():
    loss = get_config().loss
    with loss.unlocked():
        loss.metric = "metric/sd15"
    pipeline = abstract_pipeline(get_config().pipeline)
    assert count(abstract_metric(loss, pipeline).params) == 14_715_264  # VGG16's convolutions with four input channels
    with loss.unlocked():
        loss.name = "mse"
    assert abstract_metric(loss, pipeline) is None
    with loss.unlocked():
        loss.name = "lpips"
    metric = abstract_metric(loss, pipeline)
    assert count(metric.lpips.params) == 14_714_688  # VGG16's convolutions
    assert metric.decoder == pipeline.params["vae"]


def test_a_folder_below_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_images.make(tmp_path / "teacher", tiny_images.NOTHING)
    assert abstract_pipeline("~/teacher").folder == tmp_path / "teacher"


@pytest.mark.parametrize(
    ("model", "classes", "parameters"),
    [("google/ddpm-cifar10-32", 0, 35_746_307), ("teachers/edm-cifar10-32x32-cond-vp", 10, 55_735_299)],
)
def test_teachers_of_images_are_known_by_their_shapes(model, classes, parameters):
    pipeline = abstract_pipeline(model)
    assert pipeline.classes == classes
    assert count(pipeline.params["unet"]) == parameters
    assert pipeline.params["vae"] == {}
    assert pipeline.latent_shape == (32, 32, 3)
