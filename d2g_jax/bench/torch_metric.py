"""LatentLPIPS's network in PyTorch, for `d2g bench loss`: a plain one of our own, and the official package where it is.

Nothing here is imported unless that bench runs, torch only inside functions, and neither is a dependency. Both take the
weights of our metric, so that they give its value.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from d2g_jax.bench import torch_pipeline
from d2g_jax.bench.measure import Candidate
from d2g_jax.losses import perceptual
from d2g_jax.models import vgg
from d2g_jax.models.network import Params
from d2g_jax.pipeline.weights import to_state_dict

OFFICIAL = "elatentlpips"
"""The package of the paper's authors, under licences that allow no commercial use; called, where it is installed."""

Distance = Callable[[Any, Any], Any]
"""(generated NCHW, target NCHW) -> (B,), of torch tensors."""


def candidates(
    config: vgg.VGGConfig,
    params: Params,
    heads: Sequence[np.ndarray],
    space: perceptual.LatentSpace,
    latents: tuple[np.ndarray, np.ndarray],
    dtypes: Sequence[str],
) -> list[Candidate]:
    """Both networks, forward and backward to the generated latent, on the device that JAX uses.

    Args:
      config, params: the trunk with its batch norms, `vgg.build_training`'s whole tree.
      heads: of each tap the weights (C_k,).
      latents: generated and target, scaled, float32 (B, h, w, C).
      dtypes: of the plain network's trunk; the official one runs in float32 only.

    Returns:
      `latent_lpips (torch)` for each dtype and `latent_lpips (elatentlpips)`, with `not_run` where it does not run.
    """
    folded = vgg.fold_batch_norm(*vgg.split_statistics(params))
    reason = torch_pipeline.missing(("torch",))
    rows = [
        _candidate(
            "latent_lpips (torch)", dtype, functools.partial(_plain, config, folded, heads, dtype), latents, reason
        )
        for dtype in dtypes
    ]
    if "float32" in dtypes:
        reason = torch_pipeline.missing(("torch", OFFICIAL)) or _other_topology(config)
        build = functools.partial(_official, params, heads, space)
        rows.append(_candidate(f"latent_lpips ({OFFICIAL})", "float32", build, latents, reason))
    return rows


def _other_topology(config: vgg.VGGConfig) -> str | None:
    same = config == vgg.VGGConfig(in_channels=config.in_channels)
    return None if same else f"{OFFICIAL} has the full-size trunk only"


def _candidate(
    name: str, dtype: str, build: Callable[[], Distance], latents: tuple[np.ndarray, np.ndarray], reason: str | None
) -> Candidate:
    if reason:
        return Candidate(name, dtype, None, not_run=reason)
    import torch

    device = torch_pipeline.device()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another project's code
        try:
            distance = build()
        except (ImportError, RuntimeError, AttributeError, TypeError, KeyError) as error:
            # Other people's code in a version unknown to us: the rest of the bench does not depend on it.
            return Candidate(name, dtype, None, not_run=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    nchw = (torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(device) for x in latents)
    generated, target = nchw
    generated.requires_grad_()

    def call() -> tuple[Any, Any]:
        value = distance(generated, target).mean()
        (gradient,) = torch.autograd.grad(value, generated)
        if device == "cuda":
            torch.cuda.synchronize()
        return value.detach(), gradient

    return Candidate(name, dtype, call, describe=lambda result: {"value": float(result[0])})


def _plain(config: vgg.VGGConfig, folded: Params, heads: Sequence[np.ndarray], dtype: str) -> Distance:
    """Folded convolutions, ReLU and pools; features, as ours, are brought to unit length in float32."""
    import torch
    import torch.nn.functional as F

    device = torch_pipeline.device()
    place = lambda array, dtype: torch.from_numpy(np.array(array)).to(device, dtype)  # noqa: E731
    compute = getattr(torch, dtype)
    state = {key: place(array, compute) for key, array in to_state_dict(folded).items()}
    weights = [place(head, torch.float32).reshape(1, -1, 1, 1) for head in heads]

    def unit_features(x: Any) -> list[Any]:
        x, taps = x.to(compute), []
        for s, indices in enumerate(vgg.conv_indices(config)):
            for i in indices:
                name = f"slice{s + 1}.{i}"
                x = F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1))
            if config.pools[s]:
                x = F.max_pool2d(x, 2)
            tap = x.float()
            taps.append(tap * torch.rsqrt(tap.square().sum(1, keepdim=True) + perceptual.UNIT_EPS))
        return taps

    def distance(generated: Any, target: Any) -> Any:
        with torch.no_grad():
            theirs = unit_features(target)
        ours = unit_features(generated)
        terms = zip(ours, theirs, weights, strict=True)
        return sum(((x - y).square() * weight).sum(1).mean((1, 2)) for x, y, weight in terms)

    return distance


def _official(params: Params, heads: Sequence[np.ndarray], space: perceptual.LatentSpace) -> Distance:
    """The package's module with our weights. Its constructor would download some, or build a trunk for pixels.

    The latter is made without memory and turned into the one for latents: another first convolution, and nothing in
    place of three pools.
    """
    import torch

    with torch.device("meta"):
        module = importlib.import_module(OFFICIAL).ELatentLPIPS(
            pretrained=False, pnet_rand=True, encoder=space.name, augment=None, verbose=False
        )
        module.net.slice1[0] = torch.nn.Conv2d(space.channels, 64, 3, padding=1)
    for part in (module.net.slice1, module.net.slice2, module.net.slice3):
        part[-1] = torch.nn.Identity()
    state = {f"net.{key}": torch.from_numpy(np.array(value)) for key, value in to_state_dict(params).items()}
    for key in [key for key in state if key.endswith("running_mean")]:
        state[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    for i, head in enumerate(heads):
        for name in (f"lin{i}", f"lins.{i}"):
            state[f"{name}.model.1.weight"] = torch.from_numpy(np.array(head)).reshape(1, -1, 1, 1)
    module.load_state_dict(state, strict=True, assign=True)
    module = module.to(torch_pipeline.device()).eval().requires_grad_(False)
    return lambda generated, target: module(generated, target, ensembling=False, add_l1_loss=False).flatten()
