"""How a run's steps are compiled."""

from __future__ import annotations

import pytest

from d2g_jax.runtime import mesh as meshes
from d2g_jax.train.programs import compiler_options


@pytest.mark.parametrize(
    ("name", "level", "options"),
    [
        ("d", "O1", {"xla_backend_optimization_level": 1}),
        ("r1", "O1", {"xla_backend_optimization_level": 0}),
        ("d", "UNKNOWN", {}),
        ("r1", "UNKNOWN", {}),
    ],
)
def test_levels_are_llvms_on_cpus(name, level, options):
    assert compiler_options(name, level, meshes.make_mesh()) == options
