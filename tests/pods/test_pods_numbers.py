"""The same numbers on any mesh and any number of processes, and what the compiled programs send between devices."""

import json

import pytest
from simulated import differences, work

TOLERANCE = 1e-5


def assert_same(ours, theirs, tolerance=TOLERANCE):
    wrong = {name: value for name, value in differences(ours, theirs).items() if not value <= tolerance}
    assert not wrong


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The tiny problem on a single device: what all meshes must agree with."""
    return work(devices=1, out=str(tmp_path_factory.mktemp("one") / "one.npz"))


def test_a_sharded_mesh_gives_the_numbers_of_one_device_and_gathers_no_activations(one_device, tmp_path):
    """8 devices as (2, 4), gradients accumulated in five parts, R1's too: metrics and the whole state."""
    found = tmp_path / "collectives.json"
    spec = {"micro_batch": 2, "r1_micro_batch": 1, "collectives": str(found)}
    assert_same(work(devices=8, fsdp=4, out=str(tmp_path / "mesh.npz"), **spec), one_device)
    programs = json.loads(found.read_text())
    for name, collectives in programs.items():
        assert any(operation == "all-gather" for operation, _ in collectives), name  # of the sharded kernels
        # Every activation has the factor 5 of the batch (80, a group for each two), no parameter has.
        assert [(operation, size) for operation, size in collectives if size % 5 == 0] == [], name


def test_two_processes_give_the_numbers_of_one_and_their_checkpoint_goes_on_anywhere(one_device, tmp_path):
    """Two processes x 2 devices, parameters sharded, a step and a save; one process x 2 devices makes the other step."""
    spec = {"devices": 2, "steps": 1, "checkpoints": str(tmp_path / "checkpoints")}
    first = work(2, fsdp=4, save=True, out=str(tmp_path / "first.npz"), **spec)
    second = work(restore=True, out=str(tmp_path / "second.npz"), **spec)
    assert_same({name: value for name, value in first.items() if name.startswith("metrics")} | second, one_device)
