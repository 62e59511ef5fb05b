"""A Flax NNX module split into a static graph and pure functions over a plain parameter tree.

Everything outside `d2g_jax.models` sees a `Network` and a nested dict with string keys whose paths are those of the
PyTorch state dict (`down_blocks/0/resnets/1/conv1/kernel`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]


def string_keys(tree: Any) -> Any:
    """A nested dict with every key turned into a string (Orbax and jax.export take no integers)."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): string_keys(value) for key, value in tree.items()}


def integer_keys(tree: Any) -> Any:
    """The inverse of `string_keys`: digit keys become integers, which is how NNX names list entries.

    `nnx.merge` pairs leaves by sorted order, and "10" sorts before "2": with string keys the eleventh entry of a list
    would silently swap places with the third.
    """
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: integer_keys(value) for key, value in tree.items()}


class Keys:
    """Hands out PRNG keys to a module's layers, one per weight: what `nnx.Rngs` does, but with a plain counter.

    The counter of `nnx.Rngs` is a traced array when shapes are computed, and each step of it costs as much as all steps
    before: half a minute for SDXL.
    """

    def __init__(self, key: jax.Array):
        self.key, self.count = key, 0

    def params(self) -> jax.Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


@dataclasses.dataclass(frozen=True)
class Network:
    """A module's static graph with `init` and `apply`.

    Attributes:
      config: the frozen dataclass that the module was built from.
      graphdef: the static half of `nnx.split`; hashable, so a `Network` may be closed over by jitted functions.
      make: builds the module from a source of keys.
      shapes: the parameter tree as `jax.ShapeDtypeStruct`s.
    """

    config: Any
    graphdef: Any
    make: Callable[[Keys], nnx.Module]
    shapes: Params = dataclasses.field(compare=False, repr=False)

    @classmethod
    def build(cls, config: Any, make: Callable[[Keys], nnx.Module]) -> Network:
        """Traces `make` abstractly: no array is allocated, but it takes half a second. So the models' own `build`
        functions are cached: a `Network` never changes."""
        graphdef, state = nnx.split(nnx.eval_shape(lambda: make(Keys(jax.random.key(0)))))
        return cls(config, graphdef, make, string_keys(nnx.to_pure_dict(state)))

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters from a typed PRNG key. Not one compiled program: XLA would need a minute for it."""
        return string_keys(nnx.to_pure_dict(nnx.split(self.make(Keys(key)))[1]))

    def abstract(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s; a fresh dict with every call."""
        return jax.tree.map(lambda shape: shape, self.shapes)

    def apply(self, params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Runs `method` of the module with `params`; pure.

        Raises `ValueError` when the tree is not this network's: `nnx.merge` alone would pair leaves by their order.
        """
        if jax.tree.structure(params) != jax.tree.structure(self.shapes):
            raise ValueError(f"this parameter tree is not that of {type(self.config).__name__}: its paths differ")
        module = nnx.merge(self.graphdef, nnx.State(integer_keys(params)))
        return getattr(module, method)(*args, **kwargs)
