"""The formulations of attention against each other, and which of them is taken where."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from d2g_jax.diffusion.systems import OneStep
from d2g_jax.models import attention
from d2g_jax.models.platform import ANY, compiling_for
from d2g_jax.pipeline.draw import Solution, one_step_programs, teacher_programs
from d2g_jax.pipeline.folder import Pipeline
from d2g_jax.plan.collectives import parse_collectives
from d2g_jax.plan.programs import COMPILER_OPTIONS
from d2g_jax.plan.targets import described_tpu, devices, parse_topology
from d2g_jax.runtime import mesh as meshes
from d2g_jax.runtime.errors import UserError


@pytest.mark.parametrize("upcast", [False, True])
def test_plain_attention_equals_xla(upcast):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(2, 6, 3, 8)), jnp.float32) for _ in range(3))

    @jax.jit
    def attend(query, key, value):
        kw = {"upcast": upcast}
        return [attention.dot_product_attention(query, key, value, attention=name, **kw) for name in ("plain", "xla")]

    plain, xla = attend(query, key, value)
    np.testing.assert_allclose(plain, xla, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "rows"), [(2, 64), (3, 61)])
def test_attention_in_blocks_equals_plain(heads, rows, monkeypatch):
    """With its gradients and those of a derivative along a direction, which is what R1 asks for.

    The batch is split over two devices and stays so: nothing is gathered.
    """
    monkeypatch.setattr(attention, "_BLOCK_BYTES", 2**14)
    rng = np.random.default_rng(0)
    shapes = [(2, rows, heads, 8), (2, 70, heads, 8), (2, 70, heads, 8)]
    split = jax.sharding.NamedSharding(meshes.make_mesh(), meshes.BATCH)
    inputs = [jax.device_put(rng.normal(size=shape).astype(np.float32), split) for shape in shapes]
    seen, direction = (rng.normal(size=shapes[0]).astype(np.float32) for _ in range(2))

    def attend(name):
        def total(query, key, value):
            out, along = jax.jvp(
                lambda x: attention.dot_product_attention(x, key, value, attention=name), (query,), (direction,)
            )
            return (out * seen + along**2).sum(), (out, along)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)).lower(*inputs).compile()

    blocked = attend("blocked")
    assert "all-gather" not in blocked.as_text()
    for ours, expected in zip(
        jax.tree.leaves(blocked(*inputs)), jax.tree.leaves(attend("plain")(*inputs)), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "keys"), [(256, 384), (128, 512)])
def test_the_kernel_of_tpus_equals_plain(rows, keys):
    """With its gradients, interpreted on this host; several tiles of queries and of keys."""
    rng = np.random.default_rng(0)
    shapes = [(1, rows, 2, 40), (1, keys, 2, 40), (1, keys, 2, 40)]
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    seen = rng.normal(size=shapes[0])

    def attend(name, *inputs):
        def total(*inputs):
            out = attention.dot_product_attention(*inputs, attention=name, upcast=True).astype(jnp.float32)
            return (out * seen).sum(), out

        return jax.tree.leaves(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*inputs))

    with pltpu.force_tpu_interpret_mode():
        flash = attend("flash", *inputs)
    # Against float32: the kernel rounds its weights to bfloat16, as all half-precision attention does.
    for ours, exact in zip(flash, attend("plain", *(x.astype(jnp.float32) for x in inputs)), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=0.01 * float(jnp.abs(exact).max()))


def test_the_kernel_of_tpus_stays_on_each_device():
    """It is lowered, not compiled: that takes libtpu (see tests/plan)."""
    mesh = meshes.make_mesh(2, 1)
    split = jax.sharding.NamedSharding(mesh, meshes.BATCH)
    x = jax.ShapeDtypeStruct((4, 1024, 3, 64), jnp.bfloat16, sharding=split)

    def lowered(function):
        with compiling_for("tpu"), meshes.traced_for(mesh):
            return jax.jit(function).trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()

    def total(*inputs):
        return attention.dot_product_attention(*inputs).astype(jnp.float32).sum()

    for function, kernels in ((attention.dot_product_attention, 1), (jax.grad(total, argnums=(0, 1, 2)), 3)):
        calls = [line for line in lowered(function).splitlines() if "tpu_custom_call" in line]
        assert len(calls) == kernels
        assert all("tensor<2x3x1024x64xbf16>" in line and "tensor<4x1024" not in line for line in calls)


def test_samplers_split_the_kernel_of_tpus(tiny_sd):
    """Pairs and sampling on several TPUs; guidance doubles the batch."""
    mesh = meshes.make_mesh(2, 1)
    pipeline = Pipeline.load(tiny_sd, jnp.bfloat16, mesh)
    split = jax.sharding.NamedSharding(mesh, meshes.BATCH)
    drawn = jax.ShapeDtypeStruct((4, 4, 32, 32), jnp.float32, sharding=split)
    ids = jax.ShapeDtypeStruct((4, pipeline.token_length), jnp.int32, sharding=split)
    teacher = teacher_programs(pipeline, mesh, Solution(steps=2))
    student = one_step_programs(pipeline, pipeline.params["unet"], OneStep(999), mesh)
    condition = jax.eval_shape(student.encode, ids)
    for programs, samples in ((student, 2), (teacher, 4)):
        with compiling_for("tpu"):
            traced = programs.solve.func.trace(*programs.solve.args, drawn, condition)
        calls = [x for x in traced.lower(lowering_platforms=("tpu",)).as_text().splitlines() if "tpu_custom_call" in x]
        assert calls
        assert all(f": (tensor<{samples}x" in line for line in calls)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head_dim", "tokens"), [(8, 40, 4096), (8, 80, 1024), (10, 64, 4096)])
def test_the_kernel_of_tpus_compiled_writes_no_weights(heads, head_dim, tokens, libtpu):
    """One layer of SD 1.5 or SDXL, forward and backward, two samples on each of four v5e."""
    target = parse_topology("v5e:2x2")
    with described_tpu():
        mesh = meshes.make_mesh(1, 4, devices(target))
        split = jax.sharding.NamedSharding(mesh, meshes.BATCH)
        x = jax.ShapeDtypeStruct((8, tokens, heads, head_dim), jnp.bfloat16, sharding=split)

        def compiled(name):
            total = lambda *inputs: attention.dot_product_attention(*inputs, attention=name).astype(jnp.float32).sum()  # noqa: E731
            with compiling_for("tpu"), meshes.traced_for(mesh):
                lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(x, x, x).lower()
            program = lowered.compile(compiler_options=COMPILER_OPTIONS["tpu"])
            assert not parse_collectives(program.as_text(), target.count)
            moved, kept = program.cost_analysis()["bytes accessed"], program.memory_analysis().temp_size_in_bytes
            shape = f"{tokens} tokens, {heads} heads of {head_dim}"
            print(f"{name}, {shape}: MB moved {moved / 1e6:.0f}, kept {kept / 1e6:.0f}")
            return moved, kept

        (moved, kept), (plain_moved, plain_kept) = compiled("flash"), compiled("xla")
    assert moved < plain_moved / 2
    assert kept < 2 * heads * tokens**2 * 2 <= plain_kept or tokens < 4096  # smaller weights stay on the chip


@pytest.mark.parametrize(
    ("platform", "head_dim", "dtype", "rows", "keys", "chosen"),
    [
        ("cpu", 64, "bfloat16", 511, 511, "xla"),
        ("cpu", 64, "bfloat16", 512, 512, "blocked"),
        ("cpu", 64, "float32", 4096, 4096, "blocked"),
        ("gpu", 64, "bfloat16", 4096, 4096, "cudnn"),
        ("gpu", 40, "bfloat16", 4096, 77, "cudnn"),
        ("gpu", 160, "bfloat16", 4096, 4096, "xla"),  # SD 1.x's lowest levels
        ("gpu", 64, "float32", 4096, 4096, "xla"),
        ("tpu", 40, "bfloat16", 4096, 4096, "flash"),
        ("tpu", 40, "bfloat16", 4096, 77, "xla"),  # the text
        ("tpu", 160, "bfloat16", 256, 256, "xla"),
        ("tpu", 512, "bfloat16", 4096, 4096, "xla"),  # the VAE
        ("tpu", 64, "bfloat16", 60 * 60, 60 * 60, "xla"),  # no multiple of the tiles
        ("tpu", 64, "float32", 4096, 4096, "xla"),
        ("tpu", 64, "float16", 4096, 4096, "xla"),
        (ANY, 64, "bfloat16", 4096, 4096, "xla"),
    ],
)
def test_the_formulation_for_a_platform(platform, head_dim, dtype, rows, keys, chosen):
    with compiling_for(platform):
        assert attention.attention_implementation("auto", head_dim, dtype, rows, keys) == chosen
        assert attention.attention_implementation("plain", head_dim, dtype, rows, keys) == "plain"


def test_an_unknown_attention_is_told():
    with pytest.raises(UserError, match="'fast'; choose one of auto, xla, cudnn, flash"):
        attention.attention_implementation("fast", 64, jnp.bfloat16, 4096, 4096)
