"""Published PyTorch files to metric folders: layouts, values, and what is refused."""

import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from d2g_jax.inputs.torch_files import read_torch
from d2g_jax.losses.lpips import LPIPS
from d2g_jax.losses.perceptual import LatentLPIPS
from d2g_jax.metric.convert import convert
from d2g_jax.models import vgg
from d2g_jax.runtime.errors import UserError

torch = pytest.importorskip("torch")

WIDTHS = (64, 128, 256, 512, 512)
LATENT_CONVS = ((0, 3), (7, 10), (14, 17, 20), (24, 27, 30), (34, 37, 40))
PIXEL_CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def flat(shape, value=0.5):
    """A tensor of any shape in four bytes, in memory and in a file."""
    return torch.tensor(value).expand(shape)


def released(channels=4, make=flat):
    """The 101 entries of a released `{space}_latest_vgg16_tuned.pth`."""
    state = {}
    for s, (width, indices) in enumerate(zip(WIDTHS, LATENT_CONVS, strict=True), 1):
        for i in indices:
            conv, norm = f"net.slice{s}.{i}", f"net.slice{s}.{i + 1}"
            state |= {f"{conv}.weight": make((width, channels, 3, 3)), f"{conv}.bias": make((width,))}
            state |= {f"{norm}.{name}": make((width,)) for name in ("weight", "bias", "running_mean", "running_var")}
            state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
            channels = width
    for k, width in enumerate(WIDTHS):
        state[f"lin{k}.model.1.weight"] = state[f"lins.{k}.model.1.weight"] = make((1, width, 1, 1))
    return state


def torchvision_vgg16():
    """torchvision's state dict, every tensor of another constant."""
    state, channels, value = {}, 3, 0.0
    for width, indices in zip(WIDTHS, PIXEL_CONVS, strict=True):
        for i in indices:
            state[f"features.{i}.weight"] = flat((width, channels, 3, 3), value := value + 1)
            state[f"features.{i}.bias"] = flat((width,), value := value + 1)
            channels = width
    for i, shape in ((0, (4096, 25088)), (3, (4096, 4096)), (6, (1000, 4096))):
        state |= {f"classifier.{i}.weight": flat(shape), f"classifier.{i}.bias": flat(shape[:1])}
    return state


def heads(value=0.25):
    return {f"lin{k}.model.1.weight": flat((1, width, 1, 1), value + k) for k, width in enumerate(WIDTHS)}


def saved(folder, state, name="source.pth", **options):
    torch.save(state, folder / name, **options)
    return folder / name


def refused(*arguments, **keywords):
    with pytest.raises(UserError) as error:
        convert(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_released_layout(tmp_path):
    """All 101 tensors at random, at full width: the folder holds them under their names, and the metric loads."""
    torch.manual_seed(0)
    state = released(16, lambda shape: torch.rand(shape) + 0.1)
    assert len(state) == 101
    out = convert(saved(tmp_path, state, "sd3_latest_vgg16_tuned.pth"), tmp_path / "metric", "sd3")
    assert out == tmp_path / "metric"
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "metric.safetensors"]
    stored = load_file(out / "metric.safetensors")
    assert len(stored) == 101 - 5 - 13  # without the heads' copies and the batch counters
    assert all((stored[key] == state[key].numpy()).all() for key in stored)
    metric = LatentLPIPS.load(out)
    assert (metric.space.name, metric.space.channels) == ("sd3", 16)
    assert metric.network.config == vgg.VGGConfig(in_channels=16)
    assert (metric.heads[3] == state["lin3.model.1.weight"].reshape(-1).numpy()).all()


def test_torchvision_and_lpips_layout(tmp_path):
    source, lins = torchvision_vgg16(), heads()
    out = convert(saved(tmp_path, source), tmp_path / "lpips", heads=saved(tmp_path, lins, "vgg.pth"))
    metric = LPIPS.load(out)
    assert metric.network.config == vgg.PIXELS
    for s, indices in enumerate(PIXEL_CONVS, 1):
        for i in indices:
            for leaf, name in (("kernel", "weight"), ("bias", "bias")):
                assert (metric.params[f"slice{s}"][str(i)][leaf] == float(source[f"features.{i}.{name}"].max())).all()
    assert [float(head[0]) for head in metric.heads] == [0.25 + k for k in range(5)]
    assert len(jax.tree.leaves(metric)) == 2 * 13 + 5


def test_read_torch(tmp_path):
    """Half precision, parameters, and files of PyTorch before 1.6, as torchvision's VGG16 is."""
    state = {"half": torch.ones(2).bfloat16(), "own": torch.nn.Parameter(torch.ones(2)), "n": torch.tensor(3)}
    for legacy in (False, True):
        read = read_torch(saved(tmp_path, state, _use_new_zipfile_serialization=not legacy))
        assert [value.dtype.name for value in read.values()] == ["float32", "float32", "int64"]


class Trap:
    """What a hostile file does when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    for legacy in (False, True):
        state = {**released(), "trap": Trap(tmp_path / "ran")}
        source = saved(tmp_path, state, _use_new_zipfile_serialization=not legacy)
        message = refused(source, tmp_path / "metric", "sd15")
        assert message.startswith(f"{source}: refused")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "metric").exists()


def test_files_that_are_no_state_dict(tmp_path):
    whole = saved(tmp_path, released(), "whole.pth").read_bytes()
    for content in (b"", b"not a pickle", whole[: len(whole) // 2]):
        (tmp_path / "damaged.pth").write_bytes(content)
        assert "damaged.pth: refused, it is damaged" in refused(tmp_path / "damaged.pth", tmp_path / "out", "sd15")
    with zipfile.ZipFile(tmp_path / "some.pth", "w") as archive:
        archive.writestr("a.txt", "a")
    assert "some.pth: refused" in refused(tmp_path / "some.pth", tmp_path / "out", "sd15")
    for content, words in (
        ([torch.ones(1)], "holds a list"),
        ({}, "not a state dict"),
        ({"state_dict": released(), "epoch": 90}, "a training checkpoint"),
        ({"net": released()}, "net is not a plain tensor"),
        ({3: torch.ones(1)}, "key 3 is no tensor's name"),
    ):
        assert words in refused(saved(tmp_path, content), tmp_path / "out", "sd15")
    assert "cannot read" in refused(tmp_path / "nowhere.pth", tmp_path / "out", "sd15")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("net.slice3.21.running_var"), "tensor net.slice3.21.running_var is missing; the network"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.endswith("0.model.1.weight")],
            "tensor lin0.model.1.weight is missing",
        ),
        (lambda s: s.pop("lin0.model.1.weight"), "unexpected tensor lins.0.model.1.weight"),
        (
            lambda s: s.update({"net.slice5.43.weight": flat(3), "more": flat(3)}),
            "unexpected tensor net.slice5.43.weight",
        ),
        (
            lambda s: s.update({"net.slice2.7.weight": flat((128, 64, 1, 1))}),
            "has shape (128, 64, 1, 1), the network of its config.json needs (128, 64, 3, 3)",
        ),
        (
            lambda s: s.update({"lin1.model.1.weight": torch.ones(1, 128, 1, 1).int()}),
            "tensor lin1.model.1.weight is int32, not",
        ),
        (
            lambda s: s.update({"lin2.model.1.weight": flat((1, 256, 1, 1), 0.7)}),
            "tensors lins.2.model.1.weight and lin2.model.1.weight should be copies and differ",
        ),
        (lambda s: s.update({"net.slice1.1.bias": flat((64,), torch.nan)}), "slice1.1.bias holds NaN"),
        (
            lambda s: s.update({f"{k}.model.1.weight": flat((1, 512, 1, 1), -0.5) for k in ("lin4", "lins.4")}),
            "tensor lin4.model.1.weight has negative weights (-0.5)",
        ),
    ],
)
def test_wrong_tensors(tmp_path, change, words):
    state = released()
    change(state)
    source = saved(tmp_path, state)
    message = refused(source, tmp_path / "out", "sd15")
    assert words in message
    assert message.startswith(str(source))
    assert not (tmp_path / "out").exists()


def test_channels_of_another_space(tmp_path):
    assert "reads latents of 16 channels; sd15 has 4; give --space=sd3 or flux" in refused(
        saved(tmp_path, released(16)), tmp_path / "out", "sd15"
    )
    assert "no space that is known here" in refused(saved(tmp_path, released(7)), tmp_path / "out", "sdxl")
    assert "latent space 'sd9' is unknown" in refused(saved(tmp_path, released()), tmp_path / "out", "sd9")


def test_wrong_pixel_files(tmp_path):
    source, lins = saved(tmp_path, torchvision_vgg16()), saved(tmp_path, heads(), "vgg.pth")
    out = tmp_path / "out"
    assert "vgg.pth: unexpected tensor lin0.model.1.weight" in refused(lins, out, heads=source)
    assert "source.pth: unexpected tensor features.0.weight" in refused(source, out, heads=source)
    negative = saved(tmp_path, heads(-0.1), "negative.pth")
    assert "negative.pth: tensor lin0.model.1.weight has negative" in refused(source, out, heads=negative)
    with_norms = saved(tmp_path, {**torchvision_vgg16(), "features.1.running_mean": flat(64)}, "bn.pth")
    message = refused(with_norms, out, heads=lins)
    assert "bn.pth: unexpected tensor features.1.running_mean" in message
    assert message.endswith("; the file to convert is torchvision's vgg16 (not vgg16_bn)")
    less = torchvision_vgg16()
    del less["features.5.bias"]
    less = saved(tmp_path, less, "less.pth")
    assert "less.pth: tensor features.5.bias is missing" in refused(less, out, heads=lins)
    assert not out.exists()


def test_what_is_asked(tmp_path, monkeypatch):
    source = saved(tmp_path, released())
    for asked in ({}, {"space": "sd15", "heads": source}):
        assert "give either --space=NAME (sd15, sd21" in refused(source, tmp_path / "out", **asked)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    assert "old: holds a metric already" in refused(source, tmp_path / "old", "sd15")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch; pip install 'd2g_jax[eval]'" in refused(source, tmp_path / "out", "sd15")


def test_constants_fold_to_constants(tmp_path):
    """The flat file's first convolution after folding, by hand: batch norm's effect arrived in the metric."""
    metric = LatentLPIPS.load(convert(saved(tmp_path, released()), tmp_path / "metric", "sd21"))
    factor = 0.5 / np.sqrt(0.5 + 1e-5)
    np.testing.assert_allclose(metric.params["slice1"]["0"]["kernel"], 0.5 * factor, rtol=1e-6)
    np.testing.assert_allclose(metric.params["slice1"]["0"]["bias"], 0.5, rtol=1e-6)
