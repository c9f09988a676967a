"""Every kernel compiles for real TPU chips, ahead of time, where the compiler is installed.

`make test` compiles for v5e, `make aot` for every kind.
"""

import pathlib

import jax
import pytest

from odjax_kernels import aot

HERE = pathlib.Path(__file__).parent
FILES = sorted(HERE.glob("aot_cases_*.py"))

needs_libtpu = pytest.mark.skipif(
    not aot.is_available(), reason="libtpu is not installed (pip install 'odjax[aot]')"
)

SCHEDULE = """
PF: predicated region fallthrough
   0x0   :  { %7 = vsyncpa [#allocation4], 0 }
   0x1 LB: > { %242 = sbr.rel (%p1) target = $region28 }
   0x2   : > { %s1 = smov 0 }
   0x3   : > { %243 = sbr.rel (%p2) target = $region40 }
   0xd   : > { %s2 = smov 0 } /* End region 39 */
   0xe PF: > { %244 = sbr.rel (%p3) target = $region44 }
  0x1e   : > { %s3 = smov 0 } /* End region 43 :: End region 42 */
  0x1f PF: > { %s4 = smov 0 } /* End region 27 */
  0x20   : > { %20 = sbr.rel (!%p4) target = $region3 }
"""


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "topology",
    [
        pytest.param(name, marks=[pytest.mark.every_chip] if name != "v5e:2x4" else [])
        for name in aot.TOPOLOGIES
    ],
)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("aot_cases_"))
def test_every_kernel_compiles_for(file, topology):
    names = [name for name, *_ in aot.load_cases(file)]
    reports = aot.compile_cases(file, topology, names)
    assert {name: report.error for name, report in reports.items() if report.error} == {}
    assert [name for name, report in reports.items() if not report.kernels] == []


@needs_libtpu
@pytest.mark.slow
def test_a_case_that_ends_the_compilers_process_is_reported_and_the_others_go_on(tmp_path):
    file = tmp_path / "cases.py"
    file.write_text(
        "import os, jax, jax.numpy as jnp\n"
        "x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)\n"
        "AOT_CASES = [('dies', lambda x: os._exit(7), (x,)), ('fails', lambda x: x.foo, (x,)),\n"
        "             ('product', lambda x: x @ x, (x,))]\n"
    )
    dies, fails, product = aot.compile_cases(file, "v5e:2x4", ["dies", "fails", "product"]).values()
    assert dies.error == "the compiler's process ended with 7"
    assert "has no attribute foo" in fails.error
    assert (product.error, product.kernels) == ("", {})
    # Four units of 128 x 128 multiply and add in a cycle: no estimate is below that.
    assert 512**3 / (4 * 128**2) <= product.cycles < 10 * 512**3 / (4 * 128**2)
    assert (product.arguments, product.outputs) == (2 * 512**2, 2 * 512**2)


def test_every_kernel_has_a_case():
    names = " ".join(name for file in FILES for name, *_ in aot.load_cases(file))
    for kernel in (
        *("masked_weight_gradient", "block_matmul", "block_gradient"),
        *("link_scores", "gumbel_threshold_mask"),
    ):
        assert kernel in names


def test_cases_lower_for_tpu_without_its_compiler():
    for name, function, shapes in aot.load_cases(HERE / "aot_cases_products.py"):
        leaves, structure = jax.tree.flatten(shapes)

        def flat(*leaves, function=function, structure=structure):
            return function(*jax.tree.unflatten(structure, leaves))

        lowered = jax.export.export(jax.jit(flat), platforms=["tpu"])(*leaves)
        assert "tpu_custom_call" in lowered.mlir_module(), name


def test_the_sizes_of_branches_are_read_from_a_schedule():
    # The part behind $region28 holds the two others; the jump back to $region3 closes the loop.
    assert aot._regions(SCHEDULE) == ((0xD - 0x3, 0x1E - 0xE), ())


def test_the_sizes_of_inner_loops_are_read_from_a_schedule():
    schedule = """
   0x1 LB: > { %s1 = smov 0 }
   0x2 LB: >> { %s2 = smov 0 }
   0x5 LB: >>> { %s3 = smov 0 }
   0x9   : >>> { %5 = sbr.rel (!%p1) target = $region1 }
   0x15   : >> { %6 = sbr.rel (!%p2) target = $region2 }
   0x20   : > { %7 = sbr.rel (!%p3) target = $region3 }
"""
    assert aot._regions(schedule) == ((), (0x15 - 0x2, 0x9 - 0x5))


def test_estimates_are_summed_and_what_has_none_is_named():
    hlo = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"12"}
}

%short.2 (p: f32[8]) -> f32[8] {
  %d = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused.2, backend_config={"estimated_cycles":"5"}
}

%long.3 (p: f32[8]) -> f32[8] {
  %e = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused.2, backend_config={"estimated_cycles":"7"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%q, body=%body.1, metadata={op_name="while"}
  %b = f32[8]{0} fusion(%w), kind=kLoop, calls=%fused.3, backend_config={"estimated_cycles":"30"}
  %u = f32[8]{0} conditional(%i, %b, %b), branch_computations={%short.2, %long.3}
  %c = (f32[8]{0}, s32[8]{0}) sort(%u, %i), dimensions={0}
}
"""
    assert aot._cycles(hlo) == (12 + 30 + 7, (12,), ("conditional", "sort", "while"))


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(aot, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"pip install 'odjax\[aot\]'"):
        aot.compile_cases("cases.py", "v5e:2x4", ["product"])


def test_a_file_without_cases_is_an_error(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="has no list AOT_CASES"):
        aot.load_cases(tmp_path / "empty.py")
