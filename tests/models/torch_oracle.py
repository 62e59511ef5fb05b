"""PyTorch modules as oracles: their weights in our trees, their outputs and gradients as NHWC numpy arrays."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from d2g_jax.models.network import Network, Params
from d2g_jax.pipeline import weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)


def randomised(module: Any) -> Any:
    """The module with every parameter moved: biases and norms at their initial 0 and 1 would hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def params_of(module: Any, network: Network) -> Params:
    """The module's weights as the network's parameters; every name and shape must fit."""
    state = {key: value.detach().numpy() for key, value in module.state_dict().items()}
    return weights.to_params(state, network.abstract(), source="oracle")


def nchw(x: np.ndarray) -> Any:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: Any) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def error(ours: Any, theirs: Any, floor: float = 0.0) -> float:
    """max |a - b| / max |b| over the whole tensor, where max |b| counts as `floor` at least."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), floor))


def quick_jit(function: Any) -> Any:
    """`jax.jit` for programs that run once: half the compile time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
