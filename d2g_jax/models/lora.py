"""Low-rank updates of kernels (LoRA, Hu et al. 2021, arXiv 2106.09685) as pure functions on parameter trees.

An update is a tree with a base's paths in which a kernel's place holds {"down": (..., in, r), "up": (r, out)}: of a
linear layer A and B, of a convolution one of its size to r channels and a pointwise one behind it, as all formats have
them. Networks know nothing of it: they are given `merge(base, update)`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from d2g_jax.models.initializers import torch_uniform, zeros
from d2g_jax.models.network import Params
from d2g_jax.runtime.errors import UserError

TARGETS = {
    "attention": r"/attn[12]/to_(q|k|v|out/0)/kernel$",
    "feed_forward": r"/ff/net/(0/proj|2)/kernel$",
    "convolutions": r"/resnets/\d+/conv(1|2|_shortcut)/kernel$|/(down|up)samplers/0/conv/kernel$",
    "all": r"/kernel$",
}
"""Which kernels of a UNet are meant by a name of `lora.targets`."""

flat = functools.partial(traverse_util.flatten_dict, sep="/")
nested = functools.partial(traverse_util.unflatten_dict, sep="/")
"""A tree as its leaves by their paths, joined by slashes, and back."""


def target_paths(base: Params, targets: Sequence[str]) -> list[str]:
    """Paths, joined by slashes, of the kernels that `targets`, names of `TARGETS`, mean in a tree.

    Raises `UserError` for another name, and where none is meant.
    """
    for target in targets:
        if target not in TARGETS:
            raise UserError(f"lora.targets: {target!r} is unknown; choose of {', '.join(TARGETS)}")
    found = [path for path in sorted(flat(base)) if any(re.search(TARGETS[target], f"/{path}") for target in targets)]
    if not found:
        raise UserError(f"lora.targets={tuple(targets)}: the network has none; choose of {', '.join(TARGETS)}")
    return found


def init(key: jax.Array, base: Params, rank: int, targets: Sequence[str]) -> Params:
    """A float32 update that changes nothing yet: A random as a linear layer's weights are, B zero.

    Only shapes of `base` are looked at. Raises `UserError` as `target_paths`, and for a rank above a kernel's sides.
    """
    leaves, update = flat(base), {}
    for number, path in enumerate(target_paths(base, targets)):
        *inputs, out = leaves[path].shape
        if rank > min(math.prod(inputs), out):
            raise UserError(f"lora.rank={rank}: {path} has sides {math.prod(inputs)} and {out}; choose a lower rank")
        down = torch_uniform(jax.random.fold_in(key, number), (*inputs, rank))
        update[path] = {"down": down, "up": zeros(key, (rank, out), jnp.float32)}
    return nested(update)


def abstract(base: Params, rank: int, targets: Sequence[str]) -> Params:
    """The shapes of such an update."""
    return jax.eval_shape(lambda: init(jax.random.key(0), base, rank, targets))


def scale(settings: Mapping[str, Any]) -> float | None:
    """What a config's section `lora` has updates multiplied by; None for rank 0."""
    if not settings["rank"]:
        return None
    return 1.0 if settings["alpha"] is None else settings["alpha"] / settings["rank"]


def scaled(update: Params, scale: float) -> Params:
    """The same update times `scale`, which stands in B."""
    return nested({path: leaf * scale if path.endswith("/up") else leaf for path, leaf in flat(update).items()})


def merge(base: Params, update: Params, scale: float = 1.0) -> Params:
    """`base` with its kernels plus `scale` x down x up where `update` has them, summed in float32, in base's dtype.

    What `update` has beside them (the heads of a discriminator whose backbone is frozen) stands in the result as it is,
    so that with an empty base the result is `update`.
    """
    if not isinstance(base, Mapping):
        if set(update) != {"down", "up"}:
            raise ValueError(f"no low-rank update of a kernel: {sorted(update)}")
        return _sum(base, update["down"], update["up"], scale)
    merged = dict(base)
    for name, part in update.items():
        merged[name] = merge(base[name], part, scale) if name in base else part
    return merged


@jax.jit  # outside of a step too one program a shape, where each operation would be compiled by itself
def _sum(kernel: jax.Array, down: jax.Array, up: jax.Array, scale: float) -> jax.Array:
    product = jnp.tensordot(down, up, 1, precision="highest")  # the kernel's shape
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)


def truncate(difference: np.ndarray, rank: int) -> tuple[dict[str, np.ndarray], float]:
    """The nearest update of a rank to a kernel's whole one (Eckart and Young 1936), as float32.

    Returns it, and its relative error: the Frobenius norm of what it lacks over that of the whole; 0 of a zero one.
    """
    *inputs, out = difference.shape
    left, values, right = np.linalg.svd(difference.reshape(-1, out).astype(np.float64), full_matrices=False)
    rank, root = min(rank, len(values)), np.sqrt(values)
    lost, whole = np.linalg.norm(values[rank:]), np.linalg.norm(values)
    down = (left * root)[:, :rank].reshape(*inputs, rank).astype(np.float32)
    up = (root[:, None] * right)[:rank].astype(np.float32)
    return {"down": down, "up": up}, float(lost / whole) if whole else 0.0
