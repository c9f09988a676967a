"""Block-sparse products: kernels, plain forms and the dense product agree, exactly on integers."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis.extra.numpy import arrays
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from odjax.sparse.block_sparse import (
    _bucket,
    block_density,
    bs_matmul,
    from_block_sparse,
    to_block_sparse,
)
from odjax_kernels.block_sparse import block_gradient, block_matmul

ROWS, COLUMNS, SAMPLES = 3, 4, 8
LIMITS = {"slots": ROWS * COLUMNS, "per_column": ROWS, "per_row": COLUMNS}
HOLES = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
"""A row without a block, a column without one, one whole but for that row, and one with a single block."""

patterns = arrays(bool, (ROWS, COLUMNS))


def kernel_of(pattern, seed=0, dtype=jnp.float32):
    """Integers with gaps where the pattern has a block."""
    links = np.random.default_rng(seed).integers(-2, 3, (ROWS * 128, COLUMNS * 128))
    return jnp.asarray(np.where(np.kron(pattern, np.ones((128, 128), bool)), links, 0), dtype)


def operands(dtype=jnp.float32, samples=SAMPLES):
    random = np.random.default_rng(1)
    sizes = (ROWS * 128, COLUMNS * 128)
    return tuple(jnp.asarray(random.integers(-2, 3, (samples, size)), dtype) for size in sizes)


def exact(*matrices):
    return functools.reduce(np.matmul, [np.asarray(matrix, np.float64) for matrix in matrices])


def product_and_gradients(x, w, dy, **options):
    y, pull = jax.vjp(lambda x, blocks: bs_matmul(x, w.with_blocks(blocks), **options), x, w.blocks)
    return y, *pull(dy)


def check(x, w, dy, kernel, pattern, found):
    """y and dx are those of the dense kernel, rounded once, dW that of the stored blocks, whole."""
    y, dx, blocks = found
    for part, sums in ((y, exact(x, kernel)), (dx, exact(dy, kernel.T))):
        assert part.dtype == x.dtype
        np.testing.assert_array_equal(part, jnp.asarray(sums, x.dtype))
    stored = np.kron(pattern, np.ones((128, 128), bool))
    np.testing.assert_array_equal(
        from_block_sparse(w.with_blocks(blocks)).astype(jnp.float32), np.where(stored, exact(x.T, dy), 0)
    )
    assert not blocks[int(w.used) :].any()


@pytest.fixture(scope="module")
def compiled():
    """One program for every pattern, and how often it was traced."""
    traces = []

    @jax.jit
    def run(x, w, dy):
        traces.append(1)
        return product_and_gradients(x, w, dy)

    return run, traces


@given(patterns)
@example(np.zeros((ROWS, COLUMNS), bool))
@example(np.ones((ROWS, COLUMNS), bool))
@example(HOLES)
def test_plain_form_equals_the_dense_product_for_every_pattern_in_one_program(compiled, pattern):
    run, traces = compiled
    kernel, (x, dy) = kernel_of(pattern), operands()
    w = to_block_sparse(kernel, **LIMITS)
    check(x, w, dy, kernel, pattern, run(x, w, dy))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("interpret", "dtype"),
    [(True, jnp.float32), (pltpu.InterpretParams(), jnp.bfloat16)],
    ids=["XLA-float32", "TPU-bfloat16"],
)
def test_kernels_equal_the_dense_product_with_empty_rows_and_columns(interpret, dtype):
    kernel, (x, dy) = kernel_of(HOLES, dtype=dtype), operands(dtype, samples=5)
    w = to_block_sparse(kernel, slots=7)
    check(x, w, dy, kernel, HOLES, product_and_gradients(x, w, dy, interpret=interpret))


def test_samples_that_no_panel_divides_are_summed_over_panels():
    kernel, (x, dy) = kernel_of(HOLES), operands(samples=40)
    w = to_block_sparse(kernel)
    y = block_matmul(x, w.blocks, w.by_column, rows=16, interpret=True)
    np.testing.assert_array_equal(y, exact(x, kernel))
    blocks = block_gradient(x, dy, w.row, w.column, w.used, (128, 128), samples=16, interpret=True)
    full = exact(x.T, dy).reshape(ROWS, 128, COLUMNS, 128).transpose(0, 2, 1, 3)
    used = int(w.used)
    np.testing.assert_array_equal(blocks[:used], full[w.row[:used], w.column[:used]])
    assert not blocks[used:].any()


@given(patterns, st.integers(0, 9))
def test_blocks_give_back_the_kernel_and_every_block_is_in_one_column_and_one_row(pattern, seed):
    kernel = kernel_of(pattern, seed)
    w = to_block_sparse(kernel, **LIMITS)
    np.testing.assert_array_equal(from_block_sparse(w), kernel)
    used = int(w.used)
    assert used == pattern.sum() == block_density(kernel) * pattern.size
    places = sorted(zip(w.column[:used].tolist(), w.row[:used].tolist(), strict=True))
    assert places == [(j, i) for j, i in np.ndindex(COLUMNS, ROWS) if pattern[i, j]]
    for lists, inner, outer in ((w.by_column, w.row, w.column), (w.by_row, w.column, w.row)):
        listed = []
        for j in range(lists.count.size):
            slots = lists.slot[j, : int(lists.count[j])]
            np.testing.assert_array_equal(inner[slots], lists.inner[j, : slots.size])
            np.testing.assert_array_equal(outer[slots], np.full(slots.size, j))
            listed += slots.tolist()
        assert sorted(listed) == list(range(used))


def test_a_mask_is_stored_with_the_zeros_among_its_links_and_nothing_outside_it():
    mask = np.zeros((256, 128), bool)
    mask[130, 5] = True
    w = to_block_sparse(np.ones((256, 128), np.float32), mask)
    assert (int(w.used), w.row.tolist(), float(w.blocks.sum())) == (1, [1], 1.0)
    np.testing.assert_array_equal(from_block_sparse(w), mask)
    assert int(to_block_sparse(np.zeros((256, 128), np.float32), mask).used) == 1


def test_gradient_of_wide_blocks_is_not_rounded_to_the_dtype_of_the_inputs():
    w = to_block_sparse(np.ones((128, 128), np.float32))
    x = jnp.ones((1, 257, 128), jnp.bfloat16)
    gradient = jax.grad(lambda blocks: bs_matmul(x, w.with_blocks(blocks)).astype(jnp.float32).sum())(
        w.blocks
    )
    assert gradient.dtype == jnp.float32
    assert (gradient == 257).all()  # bfloat16 has no 257


def test_buckets_grow_by_half_at_most():
    sizes = [_bucket(n) for n in range(1, 2000)]
    assert sizes[:9] == [1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert all(n <= size and 2 * size <= 3 * n for n, size in enumerate(sizes, 1))


def test_sharded_samples_give_the_unsharded_product_and_gradients():
    kernel, (x, dy) = kernel_of(HOLES), operands()
    w = to_block_sparse(kernel, **LIMITS)
    data, whole = PartitionSpec("data"), PartitionSpec()
    product = jax.shard_map(
        bs_matmul,
        mesh=Mesh(np.array(jax.devices()), ("data",)),
        in_specs=(data, whole),
        out_specs=data,
        check_vma=False,
    )

    @jax.jit
    def run(x, blocks, dy):
        y, pull = jax.vjp(lambda x, blocks: product(x, w.with_blocks(blocks)), x, blocks)
        return y, *pull(dy)

    check(x, w, dy, kernel, HOLES, run(x, w.blocks, dy))


@pytest.mark.parametrize(("implementation", "kernels"), [("pallas", 3), ("xla", 0)])
def test_product_and_gradients_lower_for_tpu(implementation, kernels):
    w = to_block_sparse(kernel_of(HOLES))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (operands()[0], w, operands()[1]))
    run = jax.jit(functools.partial(product_and_gradients, implementation=implementation))
    # A structure of its own would have to be serializable; its leaves are.
    leaves, structure = jax.tree.flatten(shapes)
    flat = jax.jit(lambda *leaves: run(*jax.tree.unflatten(structure, leaves)))
    lowered = jax.export.export(flat, platforms=["tpu"])(*leaves)
    assert lowered.mlir_module().count("tpu_custom_call") == kernels


def test_bad_input_is_an_error_that_says_what_to_type():
    kernel, x = kernel_of(HOLES), operands()[0]
    w = to_block_sparse(kernel)
    for options, message in (
        ({"slots": 4}, "5 blocks hold links, 4 were allowed: type slots=5"),
        ({"per_column": 1}, "per_column holds 2 blocks, 1 were allowed: type per_column=2"),
        ({"per_row": 2}, "per_row holds 3 blocks, 2 were allowed: type per_row=3"),
        ({"block": (64, 128)}, r"multiples of 128, the lanes of a TPU, got \(64, 128\)"),
        (
            {"block": (256, 128)},
            "blocks of 256 x 128 do not divide a kernel of 384 x 512: pad it to 512 x 512",
        ),
        ({"mask": np.ones((3, 3), bool)}, r"the mask has the shape \(3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            to_block_sparse(kernel, **options)
    with pytest.raises(ValueError, match=r"\[inputs, outputs\], got \(1, 384, 512\): take one of a stack"):
        to_block_sparse(kernel[None])
    with pytest.raises(TypeError, match="got float32: type mask != 0"):
        to_block_sparse(kernel, kernel)
    with pytest.raises(ValueError, match="blocks must be"):
        w.with_blocks(w.blocks[:1])
    with pytest.raises(TypeError, match=r"type to_block_sparse\(kernel, mask\)"):
        bs_matmul(x, kernel)
    with pytest.raises(
        ValueError, match=r"x must be \[..., 384\] for a kernel of \(384, 512\), got \(8, 10\)"
    ):
        bs_matmul(x[:, :10], w)
    with pytest.raises(TypeError, match="floating, got int32"):
        bs_matmul(x.astype(jnp.int32), w)
    with pytest.raises(ValueError, match="'pallas' or 'xla', got 'triton'"):
        bs_matmul(x, w, implementation="triton")
