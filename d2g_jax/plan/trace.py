"""FLOPs, bytes and memory of a traced program, counted from its jaxpr: what a formula can say without a compiler.

The model of a compiler behind it: products, convolutions, reductions and the like write their results to memory; what
is computed elementwise from one array is fused into whatever reads it and takes no memory of its own; the order of
operations is the program's. Of what a backward pass reads, which differentiation puts by, a compiler keeps all that is
no such function of an array in memory at least as large: of a norm of bfloat16 the float32 of its deviations. Loops are
counted as often as they run, which XLA's own cost analysis does not do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

Shares = Mapping[tuple[int, ...], float]
"""The part that one device holds of arrays of the parameters' shapes: of parameters and their gradients."""

_INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_BODIES = ("scan", "while", "cond", "shard_map", "pallas_call")
_CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""cuDNN's attention: how many products of T, d and S a kernel has; the second computes the weights again."""

_MATERIALISED = [
    "dot_general", "conv_general_dilated", "concatenate", "pad", "gather", "scatter", "scatter-add",
    "dynamic_update_slice", "sort", "cumsum", "argmax", "argmin", "top_k", "iota", "random_bits", "threefry2x32",
    "select_and_scatter_add", "reduce_window", *_CUDNN,
]  # fmt: skip
_VIEWS = ("reshape", "squeeze", "expand_dims", "slice", "split", "transpose", "copy")
_PRODUCTS = ("dot_general", "conv_general_dilated")
_RECOMPUTED = ("checkpoint", "remat2")
"""Names of `jax.checkpoint` in a backward pass, in different versions of jax."""

_LANES = 128

_SMALL = 8
"""An input so many times smaller than the result is no reason to keep anything: means, scales, biases."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one call on one device.

    Attributes:
      bfloat16_flops, float32_flops: of products and convolutions, two for a multiplication and an addition, by the
        dtype of their operands; recomputation counts.
      memory_bytes: read and written.
      temp_bytes: the most that is alive at once beside arguments and results.
      gathered_bytes: of sharded parameters when they are whole, each once, and once more where it is computed again.
      reduced_bytes: of parameters' gradients when they are whole, before they are summed over devices.
    """

    bfloat16_flops: float = 0.0
    float32_flops: float = 0.0
    memory_bytes: float = 0.0
    temp_bytes: float = 0.0
    gathered_bytes: float = 0.0
    reduced_bytes: float = 0.0

    def then(self, other: Cost, times: float = 1.0) -> Cost:
        """This and `times` the other one after it."""
        return Cost(
            self.bfloat16_flops + times * other.bfloat16_flops,
            self.float32_flops + times * other.float32_flops,
            self.memory_bytes + times * other.memory_bytes,
            max(self.temp_bytes, other.temp_bytes),
            self.gathered_bytes + times * other.gathered_bytes,
            self.reduced_bytes + times * other.reduced_bytes,
        )

    @property
    def flops(self) -> float:
        return self.bfloat16_flops + self.float32_flops


@dataclasses.dataclass(eq=False)
class _Value:
    """An array of the program; `roots` are the arrays in memory that it is computed from, itself if it is one."""

    size: float
    dtype: Any
    shape: tuple[int, ...]
    whole: float  # bytes without sharding
    counted: bool = True  # False for arguments, which are counted elsewhere
    level: int = 0  # how often the part of the program that makes it has been transposed: 1 in a backward pass
    kept: bool = False  # a part of a higher level reads it
    laid: bool = False  # a kernel reads it: in memory, as the kernel wants it
    roots: tuple[_Value, ...] = ()
    last_use: int = -1


@dataclasses.dataclass(frozen=True)
class _Op:
    name: str
    params: Mapping[str, Any]
    inputs: tuple[_Value, ...]
    outputs: tuple[_Value, ...]


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a count takes for granted.

    Attributes:
      shares: of the parameters' shapes; an array of another shape is whole on every device.
      fused_from: half-precision attention on so many keys or more runs in one kernel, which never writes its weights;
        None if there is no such kernel.
    """

    shares: Shares
    fused_from: int | None = None


def program_cost(jaxpr: core.ClosedJaxpr, assumptions: Assumptions = Assumptions({})) -> Cost:
    """The cost of one call."""
    return _cost(jaxpr.jaxpr, assumptions, carried=0)


def _cost(jaxpr: core.Jaxpr, given: Assumptions, carried: int) -> Cost:
    """`carried`: how many results are updated in place by a loop that this is the body of."""
    environment: dict[core.Var, _Value] = {}
    for var in (*jaxpr.invars, *jaxpr.constvars):
        environment[var] = _argument(var.aval, given.shares)
    ops = list(_flatten(jaxpr, environment, given.shares))
    results = [environment[var] for var in jaxpr.outvars if not isinstance(var, core.Literal)]
    _keep_what_is_viewed(ops)
    _fuse(ops, given)
    _set_last_uses(ops, results, carried)
    gathers = _gathers(ops)
    total = Cost(gathered_bytes=sum(whole for whole, _, _ in gathers))
    live, starts, ends = 0.0, [0.0 for _ in ops], [0.0 for _ in ops]
    for whole, first, last in gathers:
        starts[first] += whole
        ends[last] += whole
    for index, op in enumerate(ops):
        inside = _own_cost(op, given)
        made = [value for value in op.outputs if value.roots == (value,)]
        live += starts[index] + sum(v.size for v in made)
        total = total.then(dataclasses.replace(inside, temp_bytes=live + inside.temp_bytes + _staged(op)))
        for value in made:
            ends[value.last_use] += value.size
        live -= ends[index]
    # Results that are fused into nothing are written here: an optimiser's update reads and writes every state.
    written = [value for value in results if value.roots != (value,)]
    moved = sum(v.size + sum(root.size for root in v.roots) for v in written)
    return dataclasses.replace(total, memory_bytes=total.memory_bytes + moved)


def _gathers(ops: Iterable[_Op]) -> list[tuple[float, int, int]]:
    """Sharded parameters that products read: each gathered once, and kept until the last product that reads it.

    Of each its bytes in one piece, and the indices of the first and the last operation that reads it.
    """
    first: dict[_Value, tuple[float, int]] = {}
    last: dict[_Value, int] = {}
    for index, op in enumerate(ops):
        for value in op.inputs if op.name in _PRODUCTS else ():
            if 0 < value.size < value.whole and len(value.roots) == 1 and not value.roots[0].counted:
                first.setdefault(value.roots[0], (value.whole, index))
                last[value.roots[0]] = index
    return [(*first[root], last[root]) for root in first]


def _flatten(jaxpr: core.Jaxpr, environment: dict[core.Var, _Value], shares: Shares, around: int = 0) -> Iterator[_Op]:
    """The operations of a jaxpr in order, with calls inlined (jit, checkpoint, custom derivatives), bodies kept.

    `around` is the level of the call that the jaxpr is of.
    """
    for eqn in jaxpr.eqns:
        level = max(around, str(eqn.source_info.name_stack).count("transpose("))
        if eqn.primitive.name == "optimization_barrier":
            environment.update({out: environment[v] for out, v in zip(eqn.outvars, eqn.invars, strict=True)})
            continue
        inputs = tuple(environment[v] for v in eqn.invars if not isinstance(v, core.Literal))
        inner = next((eqn.params[key] for key in _INLINED if key in eqn.params), None)
        if inner is None or eqn.primitive.name in _BODIES or eqn.primitive.name.startswith("reduce"):
            outputs = tuple(_value(var.aval, shares, level=level) for var in eqn.outvars)
            for value in inputs:
                value.kept |= value.counted and value.level < level
                value.laid |= eqn.primitive.name == "pallas_call"
            environment.update(zip(eqn.outvars, outputs, strict=True))
            yield _Op(eqn.primitive.name, eqn.params, inputs, outputs)
            continue
        inner = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
        scope = {var: _argument(var.aval, shares) for var in inner.constvars}
        again = eqn.primitive.name in _RECOMPUTED
        for var, outer in zip(inner.invars, eqn.invars, strict=True):
            if isinstance(outer, core.Literal) or (again and _is_shared(environment[outer])):
                scope[var] = _argument(var.aval, shares)  # a parameter that is gathered anew
            else:
                scope[var] = environment[outer]
        yield from _flatten(inner, scope, shares, level)
        for var, outer in zip(inner.outvars, eqn.outvars, strict=True):
            literal = isinstance(var, core.Literal)
            environment[outer] = _argument(var.aval, shares) if literal else scope[var]


def _value(aval: Any, shares: Shares, counted: bool = True, level: int = 0) -> _Value:
    shape = tuple(getattr(aval, "shape", ()))
    dtype = getattr(aval, "dtype", np.dtype(np.float32))
    itemsize = 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).itemsize
    whole = float(math.prod(shape) * itemsize)
    return _Value(whole * shares.get(shape, 1.0), dtype, shape, whole, counted, level)


def _argument(aval: Any, shares: Shares) -> _Value:
    value = _value(aval, shares, counted=False)
    value.roots = (value,)
    return value


def _is_shared(value: _Value) -> bool:
    """Whether it is an argument of which a device holds a part."""
    return value.size < value.whole and not value.counted


def _keep_what_is_viewed(ops: list[_Op]) -> None:
    """What a backward pass reads in another shape, it reads where that is from."""
    for op in reversed(ops):
        if op.name in _VIEWS and any(value.kept for value in op.outputs):
            op.inputs[0].kept = op.inputs[0].counted
            for value in op.outputs:
                value.kept = False


def _fuse(ops: Iterable[_Op], given: Assumptions) -> None:
    """Sets `roots`: of an elementwise result of one array in memory that array, else the result itself."""
    for op in ops:
        for out in op.outputs:
            if given.fused_from is not None and _is_attention_weights(op, out, given.fused_from):
                out.size = 0.0
            roots = dict.fromkeys(root for value in op.inputs for root in value.roots)
            large = [root for root in roots if root.whole * _SMALL > out.whole]
            kept = [root for root in large if root.counted]
            narrows = op.name == "convert_element_type" and bool(kept) and out.whole < kept[0].whole and kept[0].size
            fused = len(kept) <= 1 and not narrows and op.name not in (*_MATERIALISED, *_BODIES)
            fused = fused and not op.name.startswith("reduce_")
            fused = fused and not (out.kept and kept and kept[0].whole < out.whole)
            if out.laid or op.name == "pallas_call":
                out.size, fused = out.size * _padding(out.shape), False
            out.roots = tuple(large) if fused else (out,)
            if not fused and kept and op.name not in _MATERIALISED and not any(root.size for root in kept):
                out.size = 0.0  # computed from attention weights inside the kernel


def _padding(shape: tuple[int, ...]) -> float:
    """Times its numbers' bytes an operand of a TPU's kernel takes: 40 channels of a head have the place of 128."""
    return -(-shape[-1] // _LANES) * _LANES / shape[-1] if shape and shape[-1] else 1.0


def _is_attention_weights(op: _Op, out: _Value, keys: int) -> bool:
    """A half-precision batched product that is larger than either operand: queries with so many keys or more."""
    if op.name != "dot_general" or not op.params["dimension_numbers"][1][0]:
        return False
    elements = lambda value: math.prod(value.shape)  # noqa: E731
    half = all(np.dtype(value.dtype).itemsize == 2 for value in op.inputs)
    return half and sorted(out.shape)[-2] >= keys and elements(out) > max(elements(value) for value in op.inputs)


def _set_last_uses(ops: list[_Op], results: list[_Value], carried: int) -> None:
    for index, op in enumerate(ops):
        for value in op.inputs:
            for root in value.roots:
                root.last_use = index
        for value in op.outputs:
            value.last_use = max(value.last_use, index)
    for value in results[carried:]:
        for root in value.roots:
            root.last_use = len(ops) - 1


def _own_cost(op: _Op, given: Assumptions) -> Cost:
    """FLOPs and bytes of one operation, and the memory that the body of a loop takes."""
    if op.name == "scan":
        body = op.params["jaxpr"].jaxpr
        # What is stacked over the turns has one axis more than in the body; how params say it differs between versions.
        carried = [out.shape == var.aval.shape for out, var in zip(op.outputs, body.outvars, strict=True)]
        return Cost().then(_cost(body, given, sum(carried)), op.params["length"])
    if op.name == "while":
        return _cost(op.params["body_jaxpr"].jaxpr, given, len(op.outputs))  # of one turn: how many is not known
    if op.name == "cond":
        branches = [_cost(branch.jaxpr, given, 0) for branch in op.params["branches"]]
        return max(branches, key=lambda cost: cost.flops)
    if op.name == "shard_map":
        return Cost().then(_cost(op.params["jaxpr"], given, 0), op.params["mesh"].size)
    made = [value for value in op.outputs if value.roots == (value,)]
    if not made:
        return Cost()
    read = dict.fromkeys(root for value in op.inputs for root in value.roots)
    moved = sum(v.size for v in read) + sum(v.size for v in made)
    flops = _flops(op)
    narrow = flops and all(np.dtype(v.dtype).itemsize <= 2 for v in op.inputs[:2])
    gradients = sum(v.whole for v in made if op.name in _PRODUCTS and v.shape in given.shares)
    return Cost(flops if narrow else 0.0, 0.0 if narrow else flops, moved, reduced_bytes=gradients)


def _staged(op: _Op) -> float:
    """What a product needs beside its results while it runs: fused inputs, which are not in memory as they are, and a
    parameter's gradient in one piece. What a kernel keeps to itself, of size 0, is neither.
    """
    if op.name not in _PRODUCTS:
        return 0.0
    scattered = sum(v.whole for v in op.outputs if 0 < v.size < v.whole)
    fused = [v for v in op.inputs if v.roots != (v,) and v.size == v.whole and any(root.size for root in v.roots)]
    return scattered + sum(v.size for v in fused)


def _flops(op: _Op) -> float:
    if op.name == "dot_general":
        (contracted, _), _ = op.params["dimension_numbers"]
        inner = math.prod(op.inputs[0].shape[axis] for axis in contracted)
        return 2.0 * math.prod(op.outputs[0].shape) * inner
    if op.name == "conv_general_dilated":
        numbers = op.params["dimension_numbers"]
        kernel, features = op.inputs[1].shape, op.inputs[1].shape[numbers.rhs_spec[0]]
        # Zeros that dilation puts between the rows of an input are not multiplied.
        useful = math.prod(op.inputs[0].shape) and 1.0 / math.prod(op.params["lhs_dilation"])
        return 2.0 * math.prod(op.outputs[0].shape) * math.prod(kernel) / features * useful
    if op.name in _CUDNN:  # queries (B, T, N, d), keys (B, S, N, d)
        return 2.0 * _CUDNN[op.name] * math.prod(op.inputs[0].shape) * op.inputs[1].shape[1]
    if op.name == "pallas_call":
        tile = _cost(op.params["jaxpr"], Assumptions({}), 0)
        return math.prod(op.params["grid_mapping"].grid) * tile.flops
    return 0.0
