"""Programs small enough to count by hand, compiled here or written as a TPU's compiler writes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm import hlo
from jaxrl_llm.hlo_cost import Carried, carried, costs
from jaxrl_llm.hlo_program import loops, parse, with_trips

N, LAYERS, TOKENS = 16, 5, (10, 16)


@pytest.fixture(scope="module")
def text():
    """Layers in a scan, then two sampling loops one after the other, the first up to 10 tokens, the second to 16."""

    def program(weights, x, alive):
        def token(carry):
            t, y, alive = carry
            y = jnp.tanh(y @ weights[0])
            return t + 1, y, alive & (y[:, 0] < 2)

        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        carry = jnp.int32(0), x, alive
        for end in TOKENS:
            carry = jax.lax.while_loop(lambda c, end=end: (c[0] < end) & c[2].any(), token, carry)
        return carry

    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((LAYERS, N, N), "float32"), ((N, N), "float32"), ((N,), bool))]
    return jax.jit(program).lower(*shapes).compile().as_text()


def flops(text, share=1.0):
    return sum(cost.flops for cost in costs(parse(text), share))


def test_every_loop_counts_as_often_as_it_runs(text):
    assert flops(text) == 2 * N**3 * (LAYERS + TOKENS[1])
    once = sum(cost.flops / cost.runs for cost in costs(parse(text)))
    assert once == 2 * N**3 * 3  # the compiler's way


def test_sampling_ends_early_and_layers_do_not(text):
    found = {loop.trips: loop.sampling for loop in loops(parse(text))}
    assert found == {LAYERS: False, TOKENS[0]: True, TOKENS[1] - TOKENS[0]: True}
    assert flops(text, share=0.5) == 2 * N**3 * (LAYERS + 5 + 3)


def test_other_readers_find_the_lengths_in_the_text(text):
    known = with_trips(text)
    assert known.count('"known_trip_count"') == 3
    assert parse(known).entry == parse(text).entry
    assert hlo.each_collective(known) == []


def test_what_a_sampling_loop_carries(text):
    found = carried(parse(text))
    # Changed: the token, the state and who is alive. Read: weights, at least the layer that is used.
    assert found.changed == 4 + 4 * N * N + N
    assert found.read >= 4 * N * N


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match=r"compiled\.as_text"):
        parse("module @jit_step {}")


TPU = """HloModule jit_step, is_scheduled=true

%fused (param_0: bf16[4,8,128], param_1: s32[], param_2: bf16[2,128]) -> (bf16[2,128], bf16[4,2,128]) {
  %param_0 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %param_2 = bf16[2,128]{1,0:T(2,128)(2,1)S(1)} parameter(2)
  %inner = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%param_0, %param_1), kind=kLoop, calls=%nested
  %dot.1 = bf16[2,128]{1,0:T(2,128)(2,1)} convolution(%param_2, %inner), dim_labels=bf_oi->bf
  %old = bf16[4,2,128]{2,1,0:T(2,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %new = bf16[1,2,128]{2,1,0:T(2,128)(2,1)} bitcast(%dot.1)
  %written = bf16[4,2,128]{2,1,0:T(2,128)(2,1)} dynamic-update-slice(%old, %new, %param_1, %param_1, %param_1)
  ROOT %tuple.1 = (bf16[2,128]{1,0:T(2,128)(2,1)S(1)}, bf16[4,2,128]{2,1,0:T(2,128)(2,1)}) tuple(%dot.1, %written)
}

%nested (param_0.1: bf16[4,8,128], param_1.1: s32[]) -> bf16[8,128] {
  %param_0.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = s32[]{:T(128)S(6)} parameter(1)
  %slice.1 = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0.1, %param_1.1, /*index=2*/%param_1.1, %param_1.1), dynamic_slice_sizes={1,8,128}
  ROOT %bitcast.1 = bf16[8,128]{1,0:T(8,128)(2,1)} bitcast(%slice.1)
}

ENTRY %main (p0: bf16[4,8,128], p1: s32[], p2: bf16[2,128]) -> (bf16[2,128], bf16[4,2,128]) {
  %p0 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %p2 = bf16[2,128]{1,0:T(2,128)(2,1)} parameter(2)
  %copy-start.1 = (bf16[2,128]{1,0:T(2,128)(2,1)S(1)}, bf16[2,128]{1,0:T(2,128)(2,1)}, u32[]{:S(2)}) copy-start(%p2)
  %copy-done.1 = bf16[2,128]{1,0:T(2,128)(2,1)S(1)} copy-done(%copy-start.1)
  ROOT %fusion.1 = (bf16[2,128]{1,0:T(2,128)(2,1)S(1)}, bf16[4,2,128]{2,1,0:T(2,128)(2,1)}) fusion(%p0, %p1, %copy-done.1), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/while/body/o_proj/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1234"}}
}
"""  # noqa: E501, as the compiler writes it


def test_a_slice_costs_the_slice_and_fast_memory_nothing():
    found = {cost.name: cost for cost in costs(parse(TPU))}
    assert set(found) == {"copy-start.1", "fusion.1"}
    assert found["copy-start.1"].bytes == 2 * 2 * 128  # read; where it goes is not main memory
    fusion = found["fusion.1"]
    assert fusion.flops == 2 * 2 * 8 * 128
    # One of four layers read, one of four rows of the result written; the rest is updated in place or stays near.
    assert fusion.bytes == 2 * 8 * 128 + 2 * 2 * 128
    assert (fusion.cycles, fusion.source) == (1234, "jit(step)/while/body/o_proj/dot_general")
    assert carried(parse(TPU)) == Carried(0, 0)


@pytest.mark.parametrize(
    ("window", "pairs"),
    [
        ("{size=8 stride=7 lhs_dilate=8}", 8),  # a batch axis: each with its own
        ("{size=8 pad=7_7 rhs_reversal=1}", 64),  # an outer product of two axes
        ("{size=3 pad=1_1}", 22),
    ],
)
def test_products_written_as_convolutions_count_where_they_meet(window, pairs):
    out = 8 if "pad=7" not in window else 15
    text = f"""HloModule m

ENTRY %main (a: f32[8,2,4], b: f32[8,4,5]) -> f32[{out},2,5] {{
  %a = f32[8,2,4]{{2,1,0}} parameter(0)
  %b = f32[8,4,5]{{2,1,0}} parameter(1)
  ROOT %c = f32[{out},2,5]{{2,1,0}} convolution(%a, %b), window={window}, dim_labels=0bf_0io->0bf
}}
"""
    size = window.split("size=")[1][0]
    text = text.replace("f32[8,4,5]", f"f32[{size},4,5]")
    (found,) = costs(parse(text))
    assert found.flops == 2 * 2 * 4 * 5 * pairs


def test_a_loop_without_a_bound_counts_as_often_as_it_is_said_to():
    def program(x):
        return jax.lax.while_loop(lambda x: (x < 9).any(), lambda x: jnp.tanh(x @ x), x)

    text = jax.jit(program).lower(jax.ShapeDtypeStruct((N, N), "float32")).compile().as_text()
    (once,) = loops(parse(text))
    assert (once.trips, once.known) == (1, False)
    assert sum(cost.flops for cost in costs(parse(text, unbounded=7))) == 7 * 2 * N**3
    assert '"known_trip_count":{"n":"7"}' in with_trips(text, unbounded=7)


KERNEL = """HloModule m

ENTRY %main (a: bf16[4,8,256,64], b: bf16[4,2,512,64]) -> bf16[4,8,256,64] {
  %a = bf16[4,8,256,64]{3,2,1,0} parameter(0)
  %b = bf16[4,2,512,64]{3,2,1,0} parameter(1)
  %splash_mha_NAME.1 = bf16[4,8,256,64]{3,2,1,0} custom-call(%a, %b, %b), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(step)/jvp(scoring)/splash"}
  ROOT %negate.1 = bf16[4,8,256,64]{3,2,1,0} negate(%splash_mha_NAME.1)
}
"""  # noqa: E501, as the compiler writes it


@pytest.mark.parametrize(("name", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_a_kernel_may_go_over_several_lines(name, products):
    text = KERNEL.replace("NAME", name)
    kernel, last = costs(parse(text))
    assert kernel.flops == products * 2 * 4 * 8 * 256 * 512 * 64
    assert kernel.source == "jit(step)/jvp(scoring)/splash"
    assert last.op == "negate"
    assert hlo.each_collective(text) == []


def test_a_kernel_for_a_batch_of_one_has_lost_its_axis():
    text = KERNEL.replace("NAME", "fwd").replace("[4,", "[").replace("{3,2,1,0}", "{2,1,0}")
    assert costs(parse(text))[0].flops == 2 * 2 * 8 * 256 * 512 * 64
