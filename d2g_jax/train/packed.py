"""Parameters as a few vectors, one for each part of a network, in place of hundreds of small arrays.

What is updated leaf by leaf is compiled leaf by leaf: of the digits' steps that was up to a third of the compilation
(docs/bench.md). Optimiser, average and checkpoints see the vectors; whatever calls a network unpacks them first
(`step.generator`, `step.discriminator`, `Sampler`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2g_jax.models.network import Params


@functools.partial(jax.tree_util.register_dataclass, data_fields=("vector",), meta_fields=("structure", "shapes"))
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A tree of arrays of one dtype as one vector.

    Attributes:
      vector: (n,), the leaves one behind another.
      structure, shapes: of the tree, and of its leaves in that order. A checkpoint does not hold them.
    """

    vector: jax.Array
    structure: jax.tree_util.PyTreeDef
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tree: Any) -> Packed:
        """A tree with at least one leaf. Raises `ValueError` for leaves of several dtypes."""
        leaves, structure = jax.tree.flatten(tree)
        if len({leaf.dtype for leaf in leaves}) != 1:
            raise ValueError(f"leaves of {', '.join(sorted({str(leaf.dtype) for leaf in leaves})) or 'no dtype'}")
        return cls(jnp.concatenate([leaf.ravel() for leaf in leaves]), structure, tuple(leaf.shape for leaf in leaves))

    def tree(self) -> Any:
        """The tree again, with the vector's dtype."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        leaves = jnp.split(self.vector, ends[:-1])
        return self.structure.unflatten(leaf.reshape(shape) for leaf, shape in zip(leaves, self.shapes, strict=True))


@jax.jit  # one program in place of one for each number of leaves
def pack(params: Params) -> Params:
    """Each part of a network, by its name, as a `Packed`."""
    return {name: Packed.of(part) for name, part in params.items()}


def unpack(params: Params) -> Params:
    """The inverse; what is not packed stays as it is."""
    return {name: part.tree() if isinstance(part, Packed) else part for name, part in params.items()}
