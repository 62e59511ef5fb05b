"""Collectives out of HLO text: every way in which XLA writes groups, loops, and one program of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from d2g_jax.plan.collectives import Collective, parse_collectives, ring_bytes
from d2g_jax.runtime.errors import UserError
from d2g_jax.runtime.mesh import make_mesh

GATHER = "  %all-gather.1 = f32[1024,8]{1,0:T(8,128)} all-gather(%p), channel_id=1, replica_groups=%s, dimensions={0}"
APART = {
    "{{0,4},{1,5},{2,6},{3,7}}": 2,
    "[4,2]<=[2,4]T(1,0)": 2,
    "mesh['a'=2,'b'=4] {'a'}": 2,
    "mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}": 2,
}
GROUPS = {"{{0,1,2,3},{4,5,6,7}}": 4, "[2,4]<=[8]": 4, "mesh['a'=2,'b'=4] {'b'}": 4, "mesh['a'=8] {'a':(2)4}": 4}
GROUPS |= {"mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": 4, "mesh['a'=8], device_ids=(7,6,5,4,3,2,1,0) {'a'}": 8}


@pytest.mark.parametrize(("written", "size"), [*GROUPS.items(), ("{}", 8), *APART.items()])
def test_groups(written, size):
    text = "ENTRY %main (p: f32[256,8]) -> f32[1024,8] {\n" + GATHER.replace("%s", written) + "\n}\n"
    assert parse_collectives(text, 8) == [Collective("all-gather", 4 * 1024 * 8, size, apart=written in APART)]


def test_tuples_starts_and_what_is_none():
    text = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %r = (f32[8,4]{1,0}, bf16[16]{0}) all-reduce(%p, %q), replica_groups=[1,4]<=[4], to_apply=%add
  %s = (bf16[8], bf16[32]) all-gather-start(%p), replica_groups=[1,4]<=[4], dimensions={0}
  %d = bf16[32] all-gather-done(%s)
  %c = f32[8] reduce-scatter(%p), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  %g = f32[8] get-tuple-element(%all-reduce.3), index=0
}
"""
    assert parse_collectives(text, 4) == [
        Collective("all-reduce", 4 * 32 + 2 * 16, 4),
        Collective("all-gather", 2 * 32, 4),
        Collective("reduce-scatter", 4 * 8 * 4, 4),
    ]


LOOP = """
%inner (p: f32[8]) -> f32[8] {
  %r = f32[8] all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
}
%region_0 (t: (f32[8])) -> (f32[8]) {
  %f = f32[8] fusion(%x), kind=kCustom, calls=%inner
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (f32[8]) while(%t), condition=%cond, body=%region_0, backend_config={"known_trip_count":{"n":"6"}}
}
"""


def test_loops_count_as_often_as_they_run():
    assert parse_collectives(LOOP, 4) == [Collective("all-reduce", 32, 4, 6)]


OF_A_TPU = LOOP.replace(', backend_config={"known_trip_count":{"n":"6"}}', "").replace(
    "ENTRY",
    """%cond (t: (s32[], f32[8])) -> pred[] {
  %constant.8 = s32[]{:T(128)} constant(32)
  %t = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %get-tuple-element.51 = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt.4 = pred[]{:T(512)} compare(%get-tuple-element.51, %constant.8), direction=LT, metadata={op_name="lt"}
}
ENTRY""",
)


def test_a_tpu_s_loops_are_as_long_as_their_condition_says():
    assert parse_collectives(OF_A_TPU, 4) == [Collective("all-reduce", 32, 4, 32)]
    with pytest.raises(UserError, match="a loop of unknown length around all-reduce"):
        parse_collectives(OF_A_TPU.replace("direction=LT", "direction=NE"), 4)


def test_a_slice_of_an_all_reduce_is_a_reduce_scatter():
    fused = LOOP.replace("inner", "all-reduce-scatter.3")
    assert parse_collectives(fused, 4) == [Collective("reduce-scatter", 32, 4, 6)]


BESIDE_FUSIONS = """
%fused (p: bf16[48,1280]) -> bf16[768,1280] {
  %all-gather.1 = bf16[768,1280]{0,1} all-gather(%p), channel_id=184, dimensions={0}, FLAGS
}
%async_collective_fusion.2 (p: bf16[48,1280]) -> bf16[768,1280] {
  %all-gather.2 = bf16[768,1280]{0,1} all-gather(%p), channel_id=184, dimensions={0}, FLAGS
}
ENTRY %main (p: bf16[48,1280]) -> bf16[768,1280] {
  %async-collective-start = bf16[768,1280]{0,1} fusion(%p), kind=kCustom, calls=%fused
  %fusion.2 = bf16[768,1280]{0,1} fusion(%async-collective-start), kind=kOutput, calls=%async_collective_fusion.2
}
""".replace("FLAGS", 'backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}')


def test_a_gather_beside_fusions_counts_once():
    once = [Collective("all-gather", 2 * 768 * 1280, 16)]
    assert parse_collectives(BESIDE_FUSIONS, 16) == once
    assert parse_collectives(BESIDE_FUSIONS.replace("async_collective_fusion_config", "other"), 16) == 2 * once
    assert parse_collectives(BESIDE_FUSIONS.replace("184", "185", 1), 16) == 2 * once


def test_ring_arithmetic():
    assert ring_bytes("all-gather", 800, 8) == 700
    assert ring_bytes("reduce-scatter", 800, 8) == 700
    assert ring_bytes("all-reduce", 800, 8) == 1400
    assert ring_bytes("collective-permute", 800, 8) == 800
    assert ring_bytes("all-gather", 800, 1) == 0
    assert Collective("all-reduce", 800, 8, 2).received_bytes == 2800


def test_a_program_of_xla():
    mesh = make_mesh()
    shape = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    compiled = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=NamedSharding(mesh, P())).lower(shape).compile()
    found = parse_collectives(compiled.as_text(), mesh.size)
    assert [(c.kind, c.whole_bytes, c.group) for c in found] == [("all-reduce", 4 * 128, 2)]
    assert np.isclose(found[0].received_bytes, 4 * 128)
