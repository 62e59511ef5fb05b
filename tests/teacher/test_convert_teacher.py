"""EDM's networks read: against numbers of NVIDIA's own code with closed-form weights; a flax tree; what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import image, tensor

from d2g_jax import __main__ as cli
from d2g_jax.diffusion.schedule import Schedule, one_step
from d2g_jax.models import denoisers
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.pipeline.weights import to_params, to_state_dict
from d2g_jax.runtime.errors import UserError
from d2g_jax.teacher import edm
from d2g_jax.teacher.convert import SCHEDULER, convert

NUMBERS = json.loads((Path(__file__).parent / "data" / "edm.json").read_text())
"""Outputs of NVlabs/edm's networks at 008a4e5, every 31st number, for the weights and inputs of closed_form.py."""


def nvidia_state(kind):
    made = {}
    for name, shape in NUMBERS[kind]["shapes"].items():
        taps = np.asarray(NUMBERS[kind]["taps"], np.float32)
        made[name] = np.outer(taps, taps).reshape(shape) / taps.sum() ** 2 if "filter" in name else tensor(name, shape)
        if name.endswith("freqs"):
            made[name] = made[name] * np.float32(16)
    return made


def nhwc(x):
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def picked(y):
    return np.asarray(y).transpose(0, 3, 1, 2).reshape(-1)[::31]


@pytest.fixture(scope="module", params=["ddpmpp", "ncsnpp", "adm"])
def converted(request):
    config, state = edm.from_nvidia(nvidia_state(request.param), "teacher.pt")
    network = denoisers.build(config)
    return request.param, network, to_params(state, network.abstract(), source="teacher.pt")


def test_networks_equal_nvidias_code(converted):
    kind, network, params = converted
    x = nhwc(image((2, 3, 8, 8)))
    labels = None if network.config.num_class_embeds is None else np.eye(3, dtype=np.float32)[[1, 2]]
    apply = jax.jit(network.apply)
    output = apply(params, x, np.array([0.3, -0.7], np.float32), labels)
    bound = 1e-5 * NUMBERS[kind]["largest"]
    np.testing.assert_allclose(picked(output), NUMBERS[kind]["output"], atol=bound)

    def denoise(x, t):
        return apply(params, x, jnp.broadcast_to(t, x.shape[:1]), labels)

    student = one_step(denoise, Schedule.from_config(SCHEDULER), 999, x)
    np.testing.assert_allclose(picked(student), NUMBERS[kind]["denoised_at_80"], atol=2e-5)


def test_the_command_writes_a_folder_that_loads(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(v) for k, v in nvidia_state("ncsnpp").items()}, tmp_path / "teacher.pt")
    assert cli.main(["teacher", "convert", str(tmp_path / "teacher.pt"), f"--out={tmp_path / 'teacher'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "teacher")
    pipeline = Pipeline.load(tmp_path / "teacher")
    config, state = edm.from_nvidia(nvidia_state("ncsnpp"), "teacher.pt")
    assert pipeline.unet.config == config
    assert pipeline.classes == 0
    for name, value in to_state_dict(pipeline.params["unet"]).items():
        np.testing.assert_array_equal(value, state[name])


def flax_tree(network, params):
    """The tree that the same network is in consistency_models_cifar10."""
    layers, levels = network.config.layers_per_block, len(network.config.block_out_channels)
    linear = lambda p, k="kernel", b="bias": {k: p["kernel"], b: p["bias"]}  # noqa: E731
    resnets, attentions = [], []
    for level, block in params["down_blocks"].items():
        resnets += block["resnets"].values()
        attentions += block.get("attentions", {}).values()
        resnets += block["downsamplers"].values() if int(level) < levels - 1 else ()
    resnets.append(params["mid_block"]["resnets"]["0"])
    attentions.append(params["mid_block"]["attentions"]["0"])
    resnets.append(params["mid_block"]["resnets"]["1"])
    for index, block in params["up_blocks"].items():
        resnets += block["resnets"].values()
        attentions += block.get("attentions", {}).values()
        resnets += block["upsamplers"].values() if int(index) < levels - 1 else ()
    assert len(resnets) == 2 * levels * layers + levels + 2 + 2 * (levels - 1)
    tree = {
        "GaussianFourierProjection_0": {"W": np.asarray(network.config.fourier, np.float32)},
        "Dense_0": params["time_embedding"]["linear_1"],
        "Dense_1": params["time_embedding"]["linear_2"],
        "Conv_0": params["conv_in"],
        "Conv_1": params["conv_out"],
        "GroupNorm_0": params["conv_norm_out"],
    }
    for i, p in enumerate(resnets):
        tree[f"ResnetBlockBigGANpp_{i}"] = {
            "GroupNorm_0": p["norm1"], "Conv_0": p["conv1"], "Dense_0": p["time_emb_proj"],
            "GroupNorm_1": p["norm2"], "Conv_1": p["conv2"],
            **({"Conv_2": p["conv_shortcut"]} if "conv_shortcut" in p else {}),
        }  # fmt: skip
    for i, p in enumerate(attentions):
        parts = (p["to_q"], p["to_k"], p["to_v"], p["to_out"]["0"])
        tree[f"AttnBlockpp_{i}"] = {"GroupNorm_0": p["group_norm"]}
        tree[f"AttnBlockpp_{i}"] |= {f"NIN_{j}": linear(part, "W", "b") for j, part in enumerate(parts)}
    for i, p in params["input_convs"].items():
        tree[f"Downsample_{i}"] = {"Conv2d_0": linear(p, "weight")}
    return tree


def test_flax_parameters_come_back_as_they_were(tmp_path):
    from flax import serialization

    config, state = edm.from_nvidia(
        {k: v for k, v in nvidia_state("ncsnpp").items() if "map_augment" not in k}, "teacher.pt"
    )
    network = denoisers.build(config)
    params = to_params(state, network.abstract(), source="teacher.pt")
    average = {"params": flax_tree(network, params)}
    other = jax.tree.map(np.zeros_like, average)
    data = serialization.msgpack_serialize({"params": other, "params_ema": average, "step": 3})
    (tmp_path / "edm_cifar10_ema").write_bytes(data)
    convert(tmp_path / "edm_cifar10_ema", tmp_path / "teacher")
    pipeline = Pipeline.load(tmp_path / "teacher")
    assert pipeline.unet.config.fourier == config.fourier
    for name, value in to_state_dict(pipeline.params["unet"]).items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("edm-cifar10-32x32-cond-vp.pkl", b"\x80\x04", r"a pickle of NVIDIA's holds code.*state_dict\(\)"),
        ("teacher.pt", pickle.dumps({"ema": Code()}), "refused, it is damaged or holds Python objects"),
        ("teacher.pt", None, "no network of EDM; give a state dict of its SongUNet or DhariwalUNet"),
        ("teacher.pt", ["model.enc.8x8_conv.bias", "out_norm.weight", "map_layer0.weight"], "is missing, which tells"),
        ("edm_cifar10_ema", b"\x93\x01", "neither a .pt of tensors nor Flax's msgpack"),
        ("edm_cifar10_ema", b"\x81\xa1a\x01", "holds no NCSN"),
    ],
)
def test_what_is_no_such_teacher_is_refused(tmp_path, capsys, name, content, message):
    file = tmp_path / name
    torch = pytest.importorskip("torch") if name.endswith(".pt") else None
    if not isinstance(content, bytes):
        torch.save({key: torch.zeros(1) for key in content or ["conv.weight"]}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert(file, tmp_path / "teacher")
    assert "run" not in capsys.readouterr().out
    assert not (tmp_path / "teacher").exists()
