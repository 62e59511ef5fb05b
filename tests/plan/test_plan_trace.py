"""Counting of jaxprs against closed forms and against XLA's own counts."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from d2g_jax.models.attention import dot_product_attention
from d2g_jax.models.layers import REMATS, ResnetBlock2D, remat_call
from d2g_jax.models.network import Keys
from d2g_jax.models.platform import ANY, compiling_for
from d2g_jax.models.transformer import BasicTransformerBlock
from d2g_jax.plan.programs import COMPILER_OPTIONS
from d2g_jax.plan.targets import described_tpu, devices, parse_topology
from d2g_jax.plan.trace import Assumptions, program_cost
from d2g_jax.runtime import mesh as meshes


def cost(function, *shapes, **assumptions):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    traced = jax.jit(function).trace(*arguments)
    return program_cost(traced.jaxpr, Assumptions(**{"shares": {}, **assumptions}))


def xla_flops(function, *shapes):
    lowered = jax.jit(function).lower(*[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes])
    return lowered.cost_analysis()["flops"]


F32, BF16 = jnp.float32, jnp.bfloat16


def test_a_product():
    counted = cost(jnp.dot, ((8, 16), F32), ((16, 4), F32))
    assert (counted.float32_flops, counted.bfloat16_flops) == (2 * 8 * 16 * 4, 0)
    assert counted.memory_bytes == 4 * (8 * 16 + 16 * 4 + 8 * 4)


def test_the_dtype_of_operands_decides_the_peak():
    counted = cost(jnp.dot, ((8, 16), BF16), ((16, 4), BF16))
    assert (counted.float32_flops, counted.bfloat16_flops) == (0, 2 * 8 * 16 * 4)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients(stride):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = ((2, 9, 9, 8), F32), ((3, 3, 8, 16), F32)
    side = (9 - 3) // stride + 1
    forward = 2 * (2 * side * side * 16) * 9 * 8
    assert cost(convolve, *shapes).flops == forward == xla_flops(convolve, *shapes)
    # Each gradient multiplies as much; the one by x is counted with its border, which XLA leaves out
    gradients = jax.grad(lambda x, kernel: jnp.sum(convolve(x, kernel) ** 2), (0, 1))
    counted, exact = cost(gradients, *shapes).flops, 3 * forward
    assert exact <= counted <= exact * 2


def test_loops_count_as_often_as_they_run():
    def loop(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, length=5)[0]

    assert cost(loop, ((8, 16), F32), ((16, 16), F32)).flops == 5 * 2 * 8 * 16 * 16


def chain(checkpoint):
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    layer = jax.checkpoint(layer) if checkpoint else layer

    def loss(x, w):
        for _ in range(6):
            x = layer(x, w)
        return jnp.sum(x)

    return jax.grad(loss, argnums=0)


def test_rematerialisation_takes_flops_and_saves_memory():
    shapes = ((1024, 32), F32), ((32, 32), F32)
    kept, computed_again = cost(chain(False), *shapes), cost(chain(True), *shapes)
    activation = 4 * 1024 * 32
    assert computed_again.flops == pytest.approx(1.5 * kept.flops)
    assert kept.temp_bytes >= 12 * activation  # two results a layer live until the backward pass
    assert computed_again.temp_bytes <= 10 * activation  # one a layer, and one layer's own


def test_what_is_elementwise_of_one_array_takes_no_memory():
    plain = cost(lambda x, w: x @ w, ((64, 64), F32), ((64, 64), F32))
    fused = cost(lambda x, w: jnp.exp(jnp.tanh(x @ w)) * 2 + 1, ((64, 64), F32), ((64, 64), F32))
    assert fused.temp_bytes == plain.temp_bytes


def norms(checkpoint):
    """Twice a product and a norm of it; the deviations are what differentiation keeps in float32."""

    def norm(x):
        centred = x.astype(F32) - x.astype(F32).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True))).astype(BF16)

    def loss(x, w):
        for _ in range(2):
            x = (jax.checkpoint(norm) if checkpoint else norm)(x @ w)
        return jnp.sum(x.astype(F32))

    return jax.grad(loss, argnums=(0, 1))


def test_what_a_backward_pass_reads_is_kept_unless_it_is_computed_again():
    shapes = ((4096, 64), BF16), ((64, 64), BF16)
    kept, again = cost(norms(False), *shapes), cost(norms(True), *shapes)
    array = 4096 * 64 * 2
    # At the end of the forward pass: of each norm its float32 deviations and its result.
    assert 6 * array <= kept.temp_bytes <= 9 * array
    assert again.temp_bytes < 0.7 * kept.temp_bytes


@pytest.mark.parametrize(("channels", "times"), [(40, 128 / 40), (128, 1)])
def test_operands_of_a_tpu_s_kernel_are_as_wide_as_its_lanes(channels, times):
    shape = (2, 512, 4, channels)
    with compiling_for("tpu"), meshes.traced_for(meshes.make_mesh(1, 1, jax.devices()[:1])):
        counted = cost(lambda *qkv: dot_product_attention(*(x * 2 for x in qkv)), *[(shape, BF16)] * 3)
    array = 2 * 512 * 4 * channels * 2
    assert 4 * times * array <= counted.temp_bytes <= 4 * times * array + array


def attention(query, key, value):
    return jnp.sum(jax.nn.dot_product_attention(query, key, value).astype(F32))


def test_a_fused_kernel_never_writes_attention_weights():
    shapes = [((1, 512, 4, 32), BF16)] * 3
    plain, fused, short = (cost(jax.grad(attention), *shapes, fused_from=keys) for keys in (None, 512, 513))
    weights = 4 * 512 * 512 * 2
    assert plain.flops == fused.flops
    assert plain.temp_bytes - fused.temp_bytes >= 2 * weights
    assert plain.memory_bytes - fused.memory_bytes >= 8 * weights  # each of two directions writes and reads several
    assert fused.temp_bytes < weights < short.temp_bytes
    assert short == plain


@pytest.mark.parametrize(("platform", "products"), [("gpu", 2 + 5), ("tpu", 2 + 7), (ANY, 2 + 4)])
@pytest.mark.parametrize("devices", [1, 2])
def test_products_inside_of_kernels_count(platform, products, devices, monkeypatch):
    """Forward and backward; kernels compute the weights again, that of TPUs twice."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    shapes = [((2, 1024, 4, 40), BF16)] * 3
    loss = lambda *inputs: dot_product_attention(*inputs).astype(F32).sum()  # noqa: E731
    with compiling_for(platform), meshes.traced_for(meshes.make_mesh(devices, 1, jax.devices()[:devices])):
        counted = cost(jax.grad(loss, argnums=(0, 1, 2)), *shapes)
    assert counted.flops == products * 2 * (2 * 4 * 1024 * 1024 * 40)


def test_sharded_parameters_are_gathered_and_their_gradients_reduced():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w) @ w)

    shapes = ((64, 64), F32), ((8, 64), F32)
    whole, counted = 4 * 64 * 64, cost(jax.grad(loss), *shapes, shares={(64, 64): 1 / 4})
    assert counted.gathered_bytes == whole  # once, and kept from the forward to the backward pass
    assert counted.reduced_bytes == 2 * whole  # two products give a part of the gradient
    assert cost(jax.grad(loss), *shapes, shares={(64, 64): 1.0}).gathered_bytes == 0


@pytest.mark.parametrize(("checkpoint", "gathers", "kept"), [(False, 1, 6), (True, 2, 1)])
def test_gathered_parameters_stay_until_the_backward_pass_unless_it_recomputes(checkpoint, gathers, kept):
    def loss(parameters, x):
        layer = lambda x, w: jnp.tanh(x @ w.astype(BF16))  # noqa: E731
        for w in parameters:
            x = (jax.checkpoint(layer) if checkpoint else layer)(x, w)
        return jnp.sum(x)

    parameters, x = [jax.ShapeDtypeStruct((64, 64), F32)] * 6, jax.ShapeDtypeStruct((1, 64), BF16)
    jaxpr = jax.jit(jax.grad(loss)).trace(parameters, x).jaxpr
    whole, counted = 2 * 64 * 64, program_cost(jaxpr, Assumptions({(64, 64): 1 / 64}))
    assert counted.gathered_bytes == gathers * 6 * whole
    assert kept * whole < counted.temp_bytes < (kept + 2) * whole  # one more: a gradient before it is cut


def blocks(kind, remat):
    """Four of SD 1.5's resnets or three of its transformer blocks of 64 x 64 places, two samples: a loss' gradient."""
    shape = (2, 64, 64, 320) if kind == "resnets" else (2, 4096, 320)
    beside = (2, 1280) if kind == "resnets" else (2, 77, 768)

    def make(rngs):
        kw = {"dtype": BF16, "rngs": rngs}
        if kind == "resnets":
            return nnx.List([ResnetBlock2D(320, 320, 1280, **kw) for _ in range(4)])
        kw |= {"heads": 8, "context_dim": 768, "upcast": False, "attention": "auto", "remat": remat}
        return nnx.List([BasicTransformerBlock(320, **kw) for _ in range(3)])

    graph, state = nnx.split(nnx.eval_shape(lambda: make(Keys(jax.random.key(0)))))

    def loss(state, x, beside):
        for block in nnx.merge(graph, state):
            x = remat_call(remat, block, x, beside) if kind == "resnets" else block(x, beside)
        return jnp.sum(jnp.square(x.astype(F32)))

    return jax.grad(loss, (0, 1)), (state, jax.ShapeDtypeStruct(shape, BF16), jax.ShapeDtypeStruct(beside, BF16))


@pytest.mark.slow
def test_temporaries_of_blocks_are_a_tpu_s_compiler_s(libtpu):
    """Prints MiB by formula and compiled; docs/plan.md has them, and those of whole steps."""
    found = {}
    with described_tpu(), compiling_for("tpu"):
        one = jax.sharding.SingleDeviceSharding(devices(parse_topology("v5p:1x1x1"))[0])
        resnets = [("resnets", remat) for remat in REMATS[:2]]  # without attention "dots" is "elementwise"
        for kind, remat in resnets + [("transformers", remat) for remat in REMATS[:3]]:
            gradient, shapes = blocks(kind, remat)
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
            traced = jax.jit(gradient).trace(*shapes)
            compiled = traced.lower(lowering_platforms=("tpu",)).compile(compiler_options=COMPILER_OPTIONS["tpu"])
            taken = compiled.memory_analysis().temp_size_in_bytes
            found[kind, remat] = program_cost(traced.jaxpr).temp_bytes, taken
            print(kind, remat, *(round(n / 2**20) for n in found[kind, remat]))
    for remat in REMATS[:3]:
        counted, taken = found["transformers", remat]
        assert counted == pytest.approx(taken, rel=0.35)
    assert found["resnets", "elementwise"][1] < 0.5 * found["resnets", "none"][1]
