"""Topologies by name: what they are, and one line for what is none."""

import warnings

import jax
import pytest

from d2g_jax.__main__ import main
from d2g_jax.plan import targets
from d2g_jax.plan.programs import compiled_text
from d2g_jax.plan.targets import CHIPS, GIB, parse_topology
from d2g_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    ("topology", "name", "count"),
    [
        ("v5e:4x4", "v5e", 16),
        ("v5p:2x2x4", "v5p", 16),
        ("v6e:16x16", "v6e", 256),
        ("gpu:8xH100", "H100", 8),
        ("gpu:1xA100-80G", "A100-80G", 1),
        ("cpu:8", "cpu", 8),
    ],
)
def test_known_topologies(topology, name, count):
    target = parse_topology(topology)
    assert (target.chip.name, target.count, target.topology) == (name, count, topology)


@pytest.mark.parametrize("topology", ["v9:4x4", "v5e", "v5e:4", "v5e:4x0", "gpu:H100", "gpu:0xH100", "cpu:0", "cpu:x"])
def test_unknown_topologies(topology):
    with pytest.raises(UserError, match="--topology=") as caught:
        parse_topology(topology)
    assert "v5e:4x4" in str(caught.value)


def test_an_unknown_gpu_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="'H101' is unknown; known are H100, H200, A100-80G"):
        parse_topology("gpu:8xH101")


def test_gpus_of_several_nodes():
    with pytest.raises(UserError, match="at most 8"):
        parse_topology("gpu:16xH100")


def test_chips_are_in_units_of_one_scale():
    for chip in CHIPS.values():
        assert 10 * GIB < chip.memory_bytes < 200 * GIB
        assert 50e12 < chip.bf16_flops < 1000e12
        assert chip.bf16_flops >= chip.float32_flops
        assert 100e9 < chip.memory_bandwidth < 5000e9
        assert chip.link_bandwidth < chip.memory_bandwidth


def test_simulated_devices_share_the_memory_of_the_host():
    assert parse_topology("cpu:8").chip.memory_bytes == pytest.approx(parse_topology("cpu:2").chip.memory_bytes / 4)


def line(capsys, *arguments):
    assert main(["plan", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("d2g: ")
    assert err.count("\n") == 1
    return err


def test_what_training_refuses_is_not_planned(capsys):
    assert "train.groups=64 is train.batch_size" in line(capsys, "--topology=gpu:1xL4", "--config.train.groups=64")


def test_without_libtpu(capsys, monkeypatch):
    monkeypatch.setattr(targets, "libtpu_version", lambda: None)
    assert "pip install 'd2g_jax[tpu]'" in line(capsys, "--topology=v5e:2x2")


@pytest.mark.parametrize(("version", "told"), [("0.0.42.1", False), ("0.0.52", True), ("0.0.4", True)])
def test_a_libtpu_of_another_jax_is_named(version, told, monkeypatch):
    requirements = ["numpy>=2", 'libtpu==0.0.42.* ; extra == "tpu"']
    monkeypatch.setattr(targets, "libtpu_version", lambda: version)
    monkeypatch.setattr(targets.metadata, "requires", lambda name: requirements)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        targets.check_libtpu(parse_topology("v5e:2x2"))
    assert bool(caught) == told
    assert all(f"libtpu {version} is not the one" in str(warning.message) for warning in caught)


def test_a_libtpu_of_another_jax_is_named_once(monkeypatch):
    """`d2g plan` looks when it starts, and again when it compiles."""
    monkeypatch.setattr(targets, "libtpu_version", lambda: "0.0.1")
    monkeypatch.setattr(targets.metadata, "requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"'])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        targets.check_libtpu(parse_topology("v5e:2x2"))
        targets.check_libtpu(parse_topology("v5e:2x2"))
    assert len(caught) == 1


def test_a_compiled_text_that_jax_cannot_read_is_one_line():
    class Compiled:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\n*** stack")

    with pytest.raises(UserError, match=r"cannot read what it compiled \(INTERNAL: RET_CHECK failure\)") as caught:
        compiled_text(Compiled())
    assert "--method=formula" in str(caught.value)


def test_an_unknown_topology_on_the_command_line(capsys):
    assert "--topology=v5x:2x2: unknown" in line(capsys, "--topology=v5x:2x2")


def test_a_mesh_that_does_not_divide(capsys):
    told = line(capsys, "--topology=v5e:4x4", "--method=formula", "--config.mesh.fsdp=3")
    assert "mesh.fsdp=3 does not divide the 16 devices" in told


@pytest.mark.parametrize(("topology", "devices"), [("v5e:4x4", 16), ("v5p:2x2x2", 8), ("gpu:8xH100", 8)])
def test_a_batch_that_does_not_divide(topology, devices, capsys):
    """The README's own default on more devices: which setting to change, and to what."""
    told = line(capsys, f"--topology={topology}", "--method=formula")
    assert f"train.groups=2 is not a multiple of the {devices} devices of the mesh; set it to {devices} or more" in told


def test_the_setting_that_is_told_is_the_one(capsys):
    told = line(capsys, "--topology=v5e:4x4", "--method=formula", "--config.train.groups=24")
    assert "train.batch_size=64 is not a multiple of train.groups=24; change one of them" in told


def test_an_unknown_pipeline(capsys):
    told = line(
        capsys, "--topology=gpu:1xH100", "--config.pipeline=some/model", "--config.mesh.data=1", "--config.mesh.fsdp=1"
    )
    assert "pipeline='some/model'" in told
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in told


def test_a_table_of_something_else(capsys, tmp_path):
    file = tmp_path / "other.json"
    file.write_text("{}")
    assert f"{file}: not a plan" in line(capsys, "table", str(file))
