"""Compiled programs read from their text: products are counted exactly, and as often as loops run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax_kernels import hlo, hlo_flops

SIZES = st.integers(1, 5)


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_product_counts_two_operations_a_term():
    assert hlo_flops.flops(compiled(lambda a, b: a @ b, (3, 5), (5, 7))) == 2 * 3 * 5 * 7


def test_a_scan_counts_as_often_as_it_runs():
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    assert hlo_flops.flops(compiled(loop, (4, 4), (6, 4, 4))) == 6 * 2 * 4**3


def test_a_loop_in_a_loop_multiplies():
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x)

    def outer(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: inner(x, w), x)

    assert hlo_flops.flops(compiled(outer, (8, 8), (8, 8))) == 15 * 2 * 8**3


@pytest.mark.parametrize("start, end, trips", [(0, 7, 7), (2, 7, 5), (7, 7, 0)])
def test_trips_are_read_from_the_loops_own_bounds(start, end, trips):
    program = compiled(lambda x, w: jax.lax.fori_loop(start, end, lambda _, x: x @ w, x), (8, 8), (8, 8))
    assert hlo_flops.flops(program) == trips * 2 * 8**3


def test_a_loop_that_ends_when_the_data_says_so_counts_once():
    def loop(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 100.0, lambda x: x @ w, x)

    program = compiled(loop, (8, 8), (8, 8))
    found = [(name, i) for name, i, _ in hlo.walk(program) if i.opcode == "while"]
    assert [hlo.trips(program, name, i) for name, i in found] == [None]
    assert hlo_flops.flops(program) == 2 * 8**3


def test_of_two_branches_the_one_with_more_counts():
    def branch(p, x, w):
        return jax.lax.cond(p.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert hlo_flops.flops(compiled(branch, (1,), (8, 8), (8, 8))) == 2 * 2 * 8**3


@given(
    out=SIZES,
    lhs=SIZES,
    window=SIZES,
    stride=st.integers(1, 3),
    pad=st.integers(0, 3),
    base=st.integers(1, 3),
    dilate=st.integers(1, 3),
)
def test_pairs_of_output_and_window_are_those_that_meet_an_input(out, lhs, window, stride, pad, base, dilate):
    places = stride * np.arange(out)[:, None] + dilate * np.arange(window)[None] - pad
    meets = (places >= 0) & (places % base == 0) & (places // base < lhs)
    assert hlo_flops._pairs(out, lhs, window, stride, pad, base, dilate) == meets.sum()


@pytest.mark.parametrize("padding, strides", [("SAME", (1, 1)), ("VALID", (2, 2))])
def test_a_convolution_counts_its_windows(padding, strides):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    out = jax.eval_shape(convolve, jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4)))
    taps = np.ones((out.shape[1], 3), int)
    if padding == "SAME":  # at both ends one tap of three meets padding
        taps[0, 0] = taps[-1, 2] = 0
    expected = 2 * 2 * taps.sum() ** 2 * 3 * 4
    text = HEAD + (
        f"  ROOT %c = f32[{','.join(map(str, out.shape))}]{{3,2,1,0}} convolution(%x, %w), "
        f"window={{size=3x3 stride={strides[0]}x{strides[1]} pad={'1_1x1_1' if padding == 'SAME' else '0_0x0_0'}}}, "
        "dim_labels=b01f_01io->b01f\n}\n"
    )
    assert hlo_flops.flops(hlo.parse(text)) == expected


HEAD = (
    "HloModule m\n\nENTRY %main (x: f32[2,8,8,3], w: f32[3,3,3,4]) -> f32[] {\n"
    "  %x = f32[2,8,8,3]{3,2,1,0} parameter(0)\n  %w = f32[3,3,3,4]{3,2,1,0} parameter(1)\n"
)


def test_a_convolution_within_groups_of_the_batch_counts_each_output_once():
    # The gradient of a depthwise kernel: the channels are the batch, in groups of one.
    text = (
        "HloModule m\n\nENTRY %main (x: f32[8,8,3,2], g: f32[8,8,2,3]) -> f32[3,3,1,3] {\n"
        "  %x = f32[8,8,3,2]{3,2,1,0} parameter(0)\n  %g = f32[8,8,2,3]{3,2,1,0} parameter(1)\n"
        "  ROOT %c = f32[3,3,1,3]{3,2,1,0} convolution(%x, %g), window={size=8x8 pad=1_1x1_1}, "
        "dim_labels=01bf_01io->01bf, batch_group_count=3\n}\n"
    )
    inside = 8 + 7 + 7  # rows that the kernel's three rows meet, padding left out
    assert hlo_flops.flops(hlo.parse(text)) == 2 * 3 * 2 * inside**2


def test_products_of_cublas_count():
    text = (
        "HloModule m\n\nENTRY %main (a: bf16[2,8,16], b: bf16[2,16,4]) -> bf16[2,8,4] {\n"
        "  %a = bf16[2,8,16]{2,1,0} parameter(0)\n  %b = bf16[2,16,4]{2,1,0} parameter(1)\n"
        "  %c = (bf16[2,8,4]{2,1,0}, s8[4096]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":0,'
        '"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],'
        '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}\n'
        "  ROOT %r = bf16[2,8,4]{2,1,0} get-tuple-element(%c), index=0\n}\n"
    )
    program = hlo.parse(text)
    assert hlo_flops.flops(program) == 2 * 2 * 8 * 16 * 4
    assert hlo_flops.instruction_flops(program, "main", program.find("main", "c")) == hlo_flops.flops(program)


def counted(condition, body):
    """A loop with a counter that starts at 1 and goes to 64, by its two last lines."""
    return hlo.parse(
        f"%cond (p: (s32[])) -> pred[] {{\n  %p = (s32[]) parameter(0)\n"
        f"  %i = s32[] get-tuple-element(%p), index=0\n{condition}}}\n\n"
        f"%body (p: (s32[])) -> (s32[]) {{\n  %p = (s32[]) parameter(0)\n"
        f"  %i = s32[] get-tuple-element(%p), index=0\n{body}}}\n\n"
        "ENTRY %main (n: f32[]) -> (s32[]) {\n  %one = s32[] constant(1)\n  %t = (s32[]) tuple(%one)\n"
        "  ROOT %w = (s32[]) while(%t), condition=%cond, body=%body\n}\n"
    )


BOUND = "  %n = {0}[] constant(64)\n  ROOT %c = pred[] compare(%i, %n), direction=LT\n"
STEP = "  %k = s32[] constant(2)\n  %j = s32[] {0}(%i, %k)\n  ROOT %t = (s32[]) tuple(%j)\n{1}"


@pytest.mark.parametrize(
    "condition, body, trips",
    [
        (BOUND.format("s32"), STEP.format("add", ""), 32),
        (
            BOUND.format("s32"),
            STEP.format("add", "  %late = token[] after-all()\n"),
            32,
        ),  # the root is not last
        (BOUND.format("s32"), STEP.format("multiply", ""), None),
        (BOUND.format("f32"), STEP.format("add", ""), None),
    ],
)
def test_trips_are_known_of_integers_that_grow_by_a_constant(condition, body, trips):
    program = counted(condition, body)
    assert hlo.trips(program, "main", program.find("main", "w")) == trips


def test_layouts_with_tiles_and_memory_spaces_are_read():
    text = (
        "ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {\n"
        "  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)\n"
        "  %s = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) "
        'copy-start(%p), metadata={op_name="jit(f)/a/b"}, backend_config={"estimated_cycles":"17"}\n'
        "  ROOT %d = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)\n}\n"
    )
    program = hlo.parse(text)
    start = program.find("main", "s")
    assert [shape.space for shape in start.shapes] == [0, 1, 2]
    assert (start.shapes[0].bytes, start.op_name, start.cycles) == (64, "jit(f)/a/b", 17)
    assert program.find("main", "d").operands == ("s",)


def test_metadata_with_line_breaks_belongs_to_its_instruction():
    text = (
        "ENTRY %main (p: f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n"
        '  ROOT %c = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={"a\n'
        'x = 1\n"}, backend_config={"estimated_cycles":"5"}\n}\n'
    )
    program = hlo.parse(text)
    assert [i.name for i in program.computations["main"]] == ["p", "c"]
    assert program.find("main", "c").cycles == 5


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("hello")
