"""What a plan takes for kernels and for what has no estimate, on instructions written by hand."""

import pytest

from odjax_kernels import hlo
from odjax_train.plan.chips import TPUS
from odjax_train.plan.kernels import attention_seconds
from odjax_train.plan.schedule import play

from .test_plan_schedule import TOPOLOGY, mesh_of

CHIP = TPUS["v5e"]


def kernel(name, queries, keys, heads=4, width=128):
    """Operands as the kernels have them: blocks of the mask first, then queries, keys and values."""
    text = (
        "ENTRY %main (m: s8[1,2,2]) -> bf16[1] {\n"
        "  %m = s8[1,2,2]{2,1,0} parameter(0)\n"
        f"  %q = bf16[{heads},{queries},{width}]{{2,1,0}} parameter(1)\n"
        f"  %k = bf16[{heads},{keys},{width}]{{2,1,0}} parameter(2)\n"
        f"  %v = bf16[{heads},{keys},{width}]{{2,1,0}} parameter(3)\n"
        f"  ROOT %{name} = bf16[{heads},{queries},{width}]{{2,1,0}} custom-call(%m, %q, %k, %v), "
        'custom_call_target="tpu_custom_call"\n}\n'
    )
    return hlo.parse(text)


def seconds(*args, **kwargs):
    instructions = kernel(*args, **kwargs).computations["main"]
    return attention_seconds(instructions[-1], {i.name: i for i in instructions}, CHIP)


def test_a_block_takes_the_words_of_its_schedule():
    assert seconds("splash_mha_fwd_residuals.1", 1024, 1024) == pytest.approx(4 * 6170 / CHIP.clock)
    assert seconds("splash_mha_dkv_no_residuals.1", 1024, 1024) == pytest.approx(4 * 10350 / CHIP.clock)


def test_blocks_behind_the_diagonal_are_skipped():
    one = seconds("splash_mha_fwd_residuals.1", 1024, 1024)
    assert seconds("splash_mha_fwd_residuals.1", 2048, 2048) == pytest.approx(3 * one)
    assert seconds("splash_mha_fwd_residuals.1", 1024, 2048) == pytest.approx(2 * one)


def test_narrow_heads_take_the_time_of_wide_ones():
    narrow, wide = (seconds("splash_mha_fwd_residuals.1", 1024, 1024, width=width) for width in (64, 256))
    assert narrow == pytest.approx(wide / 2)


def test_other_kernels_are_not_known():
    assert seconds("flash.1", 1024, 1024) is None


def test_a_kernel_is_time_in_kernels():
    use = play(kernel("splash_mha_fwd_residuals.1", 1024, 1024), mesh_of(1, 16, 1), TOPOLOGY).use
    assert use.kernels == pytest.approx(use.seconds) == pytest.approx(4 * 6170 / CHIP.clock)


def fused(body, operands="%x"):
    return hlo.parse(
        f"%f (x: f32[64,1024,1024]) -> f32[1024,1024] {{\n{body}\n}}\n\n"
        "ENTRY %main (x: f32[64,1024,1024]) -> f32[1024,1024] {\n"
        "  %x = f32[64,1024,1024]{2,1,0} parameter(0)\n"
        f"  ROOT %y = f32[1024,1024]{{1,0}} fusion({operands}), kind=kLoop, calls=%f\n}}\n"
    )


def test_of_an_array_that_is_sliced_the_slice_counts():
    program = fused(
        "  %x = f32[64,1024,1024]{2,1,0} parameter(0)\n"
        "  %i = s32[] constant(3)\n"
        "  ROOT %s = f32[1024,1024]{1,0} dynamic-slice(%x, %i, %i, %i), dynamic_slice_sizes={1,1024,1024}"
    )
    use = play(program, mesh_of(1, 16, 1), TOPOLOGY).use
    assert use.modelled == pytest.approx(2 * 4 * 2**20 / CHIP.bandwidth)  # read and written


def test_an_array_that_is_renamed_costs_nothing():
    program = fused(
        "  %x = f32[64,1024,1024]{2,1,0} parameter(0)\n  ROOT %b = f32[1024,1024]{1,0} bitcast(%x)"
    )
    assert play(program, mesh_of(1, 16, 1), TOPOLOGY).use.seconds == 0.0


def test_a_sum_of_which_each_device_keeps_a_part_is_a_reduce_scatter():
    program = hlo.parse(
        "%all-reduce-scatter.1 (x: f32[1024,1024]) -> f32[64,1024] {\n"
        "  %x = f32[1024,1024]{1,0} parameter(0)\n"
        "  %r = f32[1024,1024]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,16]<=[16]\n"
        "  %i = s32[] constant(0)\n"
        "  ROOT %s = f32[64,1024]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={64,1024}\n}\n\n"
        "ENTRY %main (x: f32[1024,1024]) -> f32[64,1024] {\n"
        "  %x = f32[1024,1024]{1,0} parameter(0)\n"
        "  ROOT %y = f32[64,1024]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1\n}\n"
    )
    ((found, times),) = play(program, mesh_of(1, 16, 1), TOPOLOGY).collectives
    assert (found.kind, times) == ("reduce-scatter", 1)
    assert found.sent == 15 * 4 * 2**20 // 16
