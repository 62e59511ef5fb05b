"""The same numbers on any mesh and any number of processes, and what the compiled programs send between devices."""

import json
import re

import numpy as np
import pytest
from simulated import work

pytestmark = pytest.mark.slow  # compiling takes minutes; tests/train/test_step.py has two devices in the default run

TOLERANCE = 1e-5
NEAR_ZERO = ("logit_real", "logit_fake")
"""Means of values of both signs: 1e-5 of the values, not of what is left of them."""
DIGITS_GRADIENTS = 4e-5
"""Of the norms of the digits' gradients, which are the first to grow apart: 1.3e-5 after five steps."""
NO_GRADIENT = r"\.discriminator\['heads'\]\['\d'\]\['conv_out'\]\['bias'\]"
"""At first the real and the fake half pull at these equally: the gradient is zero, and rounding decides Adam's step."""
PARTS = ("generator", "ema", "generator_optimizer", "discriminator", "discriminator_optimizer")


def metrics_of(arrays):
    return {name: value for name, value in arrays.items() if name.startswith("metrics")}


def assert_same(ours, theirs, gradients=TOLERANCE):
    """Metrics within 1e-5 each, norms of `gradients` as given; each network, average and optimiser within 1e-5 in norm.

    Single parameters are within 1e-5 of their array's largest too, but for a few in a thousand, whose gradient is all
    but zero (most of all in biases that begin at zero), so that rounding decides the step.
    """
    assert ours.keys() == theirs.keys()
    wrong = {
        name: (ours[name], theirs[name])
        for name in theirs
        if name.startswith("metrics")
        and not np.allclose(
            ours[name],
            theirs[name],
            rtol=gradients if "['gradient_" in name else TOLERANCE,
            atol=TOLERANCE if any(mean in name for mean in NEAR_ZERO) else 1e-7,
        )
    }
    assert not wrong
    for part in PARTS:
        names = [name for name in theirs if name.startswith(f".{part}[") and theirs[name].size]
        apart, size, off, count = 0.0, 0.0, 0, 0
        for name in names:
            difference = np.abs(np.float64(ours[name]) - theirs[name])
            apart, size = apart + np.square(difference).sum(), size + np.square(np.float64(theirs[name])).sum()
            off += np.count_nonzero(difference > TOLERANCE * np.abs(theirs[name]).max())
            count += difference.size
        print(f"{part}: {np.sqrt(apart / size):.1e} apart in norm, {off} of {count} single values off")
        assert np.sqrt(apart / size) <= TOLERANCE, part
        assert off <= (0.005 if "optimizer" not in part else 0.1) * count, part


def assert_every_parameter_same(ours, theirs):
    """Each value of both networks and the average within 1e-5 of its array's largest, but for the listed leaves."""
    for name, value in theirs.items():
        if name.startswith((".generator[", ".ema[", ".discriminator[")) and value.size:
            tolerance = 1e-2 if re.match(NO_GRADIENT, name) else TOLERANCE
            apart = np.abs(np.float64(ours[name]) - value).max()
            assert apart <= tolerance * np.abs(value).max(), name


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
    """Two processes x 2 devices, parameters sharded, a step and a save; one process x 2 devices makes another step."""
    spec = {"devices": 2, "steps": 1, "checkpoints": str(tmp_path / "checkpoints")}
    first = work(2, fsdp=4, save=True, out=str(tmp_path / "first.npz"), **spec)
    second = work(restore=True, out=str(tmp_path / "second.npz"), **spec)
    assert_same(metrics_of(first) | second, one_device)


DIGITS = {"problem": "digits", "size": 64, "groups": 8, "steps": 5}
"""The demo's networks, losses, rates and batch; 8 groups, so that they divide over 8 devices."""


@pytest.fixture(scope="module")
def digits_on_one_device(tmp_path_factory):
    return work(devices=1, out=str(tmp_path_factory.mktemp("digits") / "one.npz"), **DIGITS)


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_digits_on_every_mesh_of_eight_devices(fsdp, digits_on_one_device, tmp_path):
    """Five full G, D and R1 steps on (8, 1), (4, 2), (2, 4), (1, 8)."""
    ours = work(devices=8, fsdp=fsdp, out=str(tmp_path / "mesh.npz"), **DIGITS)
    assert_same(ours, digits_on_one_device, gradients=DIGITS_GRADIENTS)
    assert_every_parameter_same(ours, digits_on_one_device)


def test_packed_digits_in_two_processes_of_four_devices(digits_on_one_device, tmp_path):
    """Vectors whose length four divides shared by four devices; saved, and gone on with on a mesh of another shape."""
    spec = {**DIGITS, "packed": True, "checkpoints": str(tmp_path / "checkpoints")}
    first = work(2, devices=4, fsdp=4, save=True, out=str(tmp_path / "first.npz"), **{**spec, "steps": 3})
    second = work(devices=2, fsdp=1, restore=True, out=str(tmp_path / "second.npz"), **{**spec, "steps": 2})
    ours, theirs = metrics_of(first) | metrics_of(second), metrics_of(digits_on_one_device)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_digits_in_two_processes_of_four_devices(digits_on_one_device, tmp_path):
    """Three steps and a sharded checkpoint of two processes; one process of two devices makes the other two steps."""
    spec = {**DIGITS, "checkpoints": str(tmp_path / "checkpoints")}
    first = work(2, devices=4, fsdp=4, save=True, out=str(tmp_path / "first.npz"), **{**spec, "steps": 3})
    second = work(devices=2, fsdp=2, restore=True, out=str(tmp_path / "second.npz"), **{**spec, "steps": 2})
    ours = metrics_of(first) | second
    assert_same(ours, digits_on_one_device, gradients=DIGITS_GRADIENTS)
    assert_every_parameter_same(ours, digits_on_one_device)
