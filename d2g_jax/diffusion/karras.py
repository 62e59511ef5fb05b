"""EDM's noise levels (Karras et al., arXiv 2206.00364) as a table like any other, of which solvers may ask between.

Place t of `LEVELS` has sigma = (a + t / (LEVELS - 1) (b - a))^rho with a, b the rho-th roots of sigma_min and
sigma_max: N of them, equally far apart, are the paper's equation 5, and the last of them is sigma_max.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.inputs.numbers import Range
from d2g_jax.runtime.errors import UserError

LEVELS = 1000
SIGMA_DATA = 0.5
"""Deviation of images in [-1, 1], by which EDM preconditions; no network of another is known here."""

TIME_SCALES = {
    "EDMEulerScheduler": 1.0,
    "EDMDPMSolverMultistepScheduler": 1.0,
    "CMStochasticIterativeScheduler": 1000.0,
}
"""diffusers' schedulers of these levels, and what networks of each expect log(sigma) / 4 to be multiplied by."""

_SIGMA = Range(1e-6, 1e6)
_RHO = Range(0.2, 100)
"""Roots that float32 holds of each of these levels."""


@dataclasses.dataclass(frozen=True)
class Karras:
    """The levels of one teacher; `time_scale` times log(sigma) / 4 is what its network is told of a level."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    time_scale: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str) -> Karras:
        """From a `scheduler_config.json` of one of `TIME_SCALES`; raises `UserError` for what is not implemented."""
        known = {"sigma_data": SIGMA_DATA, "sigma_schedule": "karras", "prediction_type": "epsilon"}
        for key, value in known.items():
            if config.get(key, value) != value:
                raise UserError(f"{source}: {key}={config[key]!r} is not implemented; only {value!r} is")
        given = {name: config.get(name, getattr(cls, name)) for name in ("sigma_min", "sigma_max", "rho")}
        for name, value in given.items():
            (_RHO if name == "rho" else _SIGMA).check(f"{source}: {name}", value)
        if given["sigma_min"] >= given["sigma_max"]:
            raise UserError(f"{source}: sigma_min={given['sigma_min']} is not below sigma_max={given['sigma_max']}")
        return cls(**given, time_scale=TIME_SCALES[config["_class_name"]])

    def sigmas(self, places: np.ndarray) -> np.ndarray:
        """float64 noise levels at places 0 to LEVELS - 1, whole or not."""
        return np.asarray(self._root(np.asarray(places, np.float64))) ** self.rho

    def told(self, places: jax.Array) -> jax.Array:
        """What the network is told of the levels at `places`: float32."""
        return self.time_scale * self.rho / 4 * jnp.log(self._root(places.astype(jnp.float32)))

    def _root(self, places: Any) -> Any:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return low + places / (LEVELS - 1) * (high - low)
