"""JSON of other people as dataclasses: null, text and truth where numbers are meant."""

import math

import pytest

from d2g_jax.diffusion.schedule import Schedule
from d2g_jax.inputs.fields import check_kinds
from d2g_jax.models.clip import ClipTextConfig
from d2g_jax.models.unet_config import UNetConfig
from d2g_jax.models.vae import VaeConfig
from d2g_jax.runtime.errors import UserError

BETAS = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Kinds:
    count: int
    factor: float
    name: str
    used: bool
    size: int | tuple[int, int] | None
    depths: tuple[int | tuple[int, ...], ...]
    libraries: dict[str, str]


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"count": 0},
        {"factor": 2},
        {"used": False},
        {"size": 8},
        {"size": (8, 16)},
        {"size": None},
        {"depths": (1, (2, 3))},
        {"depths": ()},
        {"libraries": {"jax": "1"}},
    ],
)
def test_values_of_their_kind(good):
    check_kinds(Kinds, good, "config.json")


@pytest.mark.parametrize(
    "bad",
    [
        {"count": "1"}, {"count": 1.0}, {"count": True}, {"count": None}, {"factor": None}, {"factor": "0.5"},
        {"factor": math.nan}, {"factor": False}, {"name": 1}, {"used": 1}, {"used": None}, {"size": "8"},
        {"size": (8, "16")}, {"size": [8]}, {"size": (8, 8, 8)}, {"depths": (1, ("2",))}, {"libraries": []},
    ],
)  # fmt: skip
def test_values_of_another_kind(bad):
    ((name, value),) = bad.items()
    with pytest.raises(UserError) as caught:
        check_kinds(Kinds, bad, "config.json")
    assert str(caught.value).startswith(f"config.json: {name} = {value!r}; give ")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (VaeConfig, {"scaling_factor": None}, "vae.json: scaling_factor = None; give float"),
        (VaeConfig, {"scaling_factor": "0.18215"}, "vae.json: scaling_factor = '0.18215'; give float"),
        (VaeConfig, {"layers_per_block": [1]}, r"vae.json: layers_per_block = \(1,\); give int"),
        (UNetConfig, {"sample_size": "64"}, "vae.json: sample_size = '64'; give int | tuple"),
        (UNetConfig, {"use_linear_projection": "false"}, "vae.json: use_linear_projection = 'false'; give bool"),
        (ClipTextConfig, {"layer_norm_eps": None}, "vae.json: layer_norm_eps = None; give float"),
    ],
)
def test_networks(kind, values, message):
    kind.from_json({}, source="vae.json")
    with pytest.raises(UserError, match=message):
        kind.from_json(values, source="vae.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta_start": None}, "s.json: beta_start=None; give a number from 0 to 1"),
        ({"beta_end": "0.012"}, "s.json: beta_end='0.012'; give a number"),
        ({"num_train_timesteps": "1000"}, "s.json: num_train_timesteps='1000'; give a whole number from 1"),
        ({"num_train_timesteps": 0}, "s.json: num_train_timesteps=0; give a whole number from 1"),
        ({"steps_offset": None}, "s.json: steps_offset=None; give a whole number from 0"),
        ({"trained_betas": "abc"}, "s.json: trained_betas=abc; give a list, each a number from 0 to 1"),
        ({"trained_betas": [0.1, None]}, "s.json: trained_betas=.*; give a list"),
    ],
)
def test_schedules(values, message):
    Schedule.from_config(BETAS, source="s.json")
    with pytest.raises(UserError, match=message):
        Schedule.from_config({**BETAS, **values}, source="s.json")
