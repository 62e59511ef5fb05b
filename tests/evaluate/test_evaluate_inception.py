"""FID and KID by the COCO protocols against clean-fid's own functions, on one random network."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from d2g_jax.evaluate import features
from d2g_jax.evaluate.images import batches, survey
from d2g_jax.evaluate.protocols import PROTOCOLS
from d2g_jax.evaluate.reference import measure_reference, read_reference, save
from d2g_jax.results import frechet
from d2g_jax.runtime.errors import UserError

COCO = dataclasses.replace(PROTOCOLS["coco2014-30k"], size=64)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A TorchScript file with the interface of Inception's: `layers` of normalised 299x299 images to 2,048 features."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("cleanfid.inception_torchscript", exc_type=ImportError)
    torch.manual_seed(0)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Conv2d(3, 32, 13, stride=11), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d((8, 8)),
                torch.nn.Flatten(),
            )  # fmt: skip

        def forward(self, x, return_features: bool = False):
            x = torch.nn.functional.interpolate(x.float(), [299, 299], mode="bilinear")
            return self.layers((x - 128) / 128)

    file = tmp_path_factory.mktemp("inception") / features.INCEPTION_FILE
    torch.jit.script(Network()).save(str(file))
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Smooth random images: forty of one size, fifty of others."""
    made, rng = [], np.random.default_rng(0)
    for name, count in (("drawn", 40), ("real", 50)):
        folder = tmp_path_factory.mktemp(name)
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            size = (96, 96) if name == "drawn" else (int(rng.integers(70, 120)), int(rng.integers(70, 120)))
            small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:05d}.{'png' if name == 'drawn' else 'jpg'}")
        made.append(folder)
    return made


def ours(folder, extractor, mixed=False):
    return np.concatenate([extractor.run(x) for _, x in batches(survey(folder, COCO, mixed=mixed), COCO, 16)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_features_and_distances_equal_clean_fid_s(inception, folders):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision", exc_type=ImportError)
    fid = pytest.importorskip("cleanfid.fid", exc_type=ImportError)
    from cleanfid.inception_torchscript import InceptionV3W

    network = InceptionV3W(str(inception.parent), download=False)

    def crop_and_resize(image):
        """GigaGAN's evaluator, with torchvision's crop."""
        from torchvision.transforms.functional import center_crop

        image = Image.fromarray(image)
        return np.array(center_crop(image, min(image.size)).resize((64, 64), Image.Resampling.LANCZOS))

    theirs = [
        fid.get_folder_features(
            str(folder), model=network, num_workers=0, batch_size=16, device=torch.device("cpu"), mode="clean",
            custom_image_tranform=crop_and_resize, verbose=False,
        )
        for folder in folders
    ]  # fmt: skip
    extractor = features.make_extractor(COCO, inception)
    found = [ours(folder, extractor, mixed=True) for folder in folders]
    for a, b in zip(found, theirs, strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
    # Frechet's fit wants more samples than features: the first twenty of them.
    a, b = (x[:, :20].astype(np.float64) for x in theirs)
    from scipy.linalg import sqrtm

    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet.frechet_distance(*(x[:, :20] for x in found)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_cifar_s_images_are_enlarged_by_the_network_itself(inception):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    extractor = features.make_extractor(PROTOCOLS["cifar10-50k"], inception)
    network = torch.jit.load(str(inception))
    theirs = network(torch.from_numpy(images).permute(0, 3, 1, 2)).detach().numpy()
    found = extractor.run(images)
    assert np.abs(found - theirs).max() < 1e-6 * np.abs(theirs).max()
    assert np.abs(found - features.make_extractor(COCO, inception).run(images)).max() > 1e-3


def test_reference_statistics_survive_their_file(inception, folders, tmp_path):
    extractor = features.make_extractor(COCO, inception)
    both = {"inception": extractor, "other": dataclasses.replace(extractor, run=lambda x: extractor.run(x) + 1)}
    measured = measure_reference(survey(folders[1], COCO, mixed=True), COCO, both, 16)
    made = measured["inception"]
    np.testing.assert_array_equal(measured["other"].features, made.features + 1)
    save(tmp_path / "real.npz", {"inception": made}, COCO)
    again = read_reference(tmp_path / "real.npz", COCO, extractor, "inception")
    np.testing.assert_array_equal(again.features, made.features)
    assert dataclasses.replace(again, features=None, source="") == dataclasses.replace(made, features=None, source="")
    other = dataclasses.replace(PROTOCOLS["coco2017-5k"], size=64)
    with pytest.raises(UserError, match="statistics of the protocol coco2014-30k, not of coco2017-5k"):
        read_reference(tmp_path / "real.npz", other, extractor, "inception")
    with pytest.raises(UserError, match="features of other weights"):
        read_reference(tmp_path / "real.npz", COCO, dataclasses.replace(extractor, sha256="0" * 64), "inception")


def test_what_is_no_inception_file(tmp_path):
    with pytest.raises(UserError, match=r"needs --weights-inception=PATH.*nvlabs-fi-cdn"):
        features.make_extractor(COCO, None)
    with pytest.raises(UserError, match=r"inception-2015-12-05.pt under that name"):
        features.make_extractor(COCO, tmp_path / "inception.pt")


def test_a_damaged_inception_file(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("cleanfid.inception_torchscript", exc_type=ImportError)
    file = tmp_path / features.INCEPTION_FILE
    file.write_bytes(b"no network")
    with pytest.raises(UserError, match="not clean-fid's TorchScript file"):
        features.make_extractor(COCO, file)


def test_without_clean_fid(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setitem(__import__("sys").modules, "cleanfid.inception_torchscript", None)
    file = tmp_path / features.INCEPTION_FILE
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'd2g_jax\[eval\]'"):
        features.make_extractor(COCO, file)
