"""Collectives read from programs: one that is compiled here, and every way in which the compilers write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_llm.hlo import collectives, each_collective, shape_bytes

WRITTEN = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%async_scatter (param: f32[16]) -> f32[4] {
  ROOT %reduce-scatter.1 = f32[4]{0:T(128)} reduce-scatter(%param), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %all-reduce.3 = (bf16[4,8]{1,0}, /*index=1*/f32[2]{0}) all-reduce(%x, %y), replica_groups=mesh['d'=2,'t'=4], \
device_ids=([2,4]T(1,0)) {'d', 't':(1)2}, to_apply=%add, metadata={op_name="jit(f)/while/body/psum" stack_frame_id=3}
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%i, %all-reduce.3)
}

%forever (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %permute = (f32[3], f32[3], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %done = f32[3] collective-permute-done(%permute)
}

%never (p: f32[9]) -> f32[9] {
  %all-to-all.9 = f32[9] all-to-all(%p), replica_groups={}
}

ENTRY %main.7 (x: f32[16], y: bf16[4,8]) -> f32[8] {
  %w = (s32[], bf16[4,8]{1,0}) while(%t), condition=%never_called, body=%body, \
backend_config={"known_trip_count":{"n":"6"},"known_init_step":{"init":"0","step":"1"}}
  %v = (s32[], bf16[4,8]{1,0}) while(%w), condition=%never_called, body=%forever
  %s = ((f32[16]), f32[4]) async-start(%x), calls=%async_scatter
  %all-gather-start = ((f32[2], s4[3]), (f32[8], s4[12])) all-gather-start(%a, %b), replica_groups=[2,4]<=[8]
  ROOT %all-gather-done = (f32[8], s4[12]) all-gather-done(%all-gather-start)
}
"""


def test_every_way_of_writing():
    found = {one.kind: one for one in each_collective(WRITTEN, trips=50)}
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter", "collective-permute"}
    assert found["all-gather"][1:5] == (8 * 4 + 6, 1, 4, ((8,), (12,)))
    assert found["all-reduce"][1:] == (4 * 8 * 2 + 2 * 4, 6, 4, ((4, 8), (2,)), "jit(f)/while/body/psum")
    assert found["reduce-scatter"][1:5] == (4 * 4 * 4, 1, 4, ((4,),))
    assert found["collective-permute"][1:4] == (12, 50, 2)
    assert collectives(WRITTEN, trips=50)[0] == ("collective-permute", 12, 50)
    assert collectives(WRITTEN)[0] == ("all-reduce", 72, 6)


def test_bytes_of_types():
    assert shape_bytes("(f32[2,3]{1,0:T(8,128)}, pred[5], bf16[], token[])") == 24 + 5 + 2
    assert shape_bytes("f8e4m3fn[7]") == 7
    assert shape_bytes("f32[0,5]") == 0


def test_a_compiled_program():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def at(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0])

    shardings = (at(None, "fsdp"), at(("data", "fsdp")))
    program = jax.jit(jax.grad(loss), in_shardings=shardings, out_shardings=shardings[0])
    found = each_collective(program.lower(jnp.zeros((3, 16, 16)), jnp.zeros((8, 16))).compile().as_text())
    # Each layer's kernel, forward and backward, from the four devices that hold it; its gradient from all eight.
    gathered = [one for one in found if one.kind == "all-gather" and one.shapes == ((16, 16),)]
    assert sum(one.times for one in gathered) == 6 and {one.devices for one in gathered} == {4}
    assert all(one.bytes == 16 * 16 * 4 for one in gathered)
    assert sum(one.times for one in found if one.kind in ("all-reduce", "reduce-scatter")) >= 3


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match=r"compiled\.as_text"):
        collectives("stablehlo")
