"""Products with a matrix that is stored as its blocks: y = x W, dx = dy W^T, and the blocks of dW = x^T dy.

Each block column of W has a list of its blocks: how many there are, and for each the block row and the slot
where it is stored (count, inner, slot). The lists are read before the kernel's blocks are fetched (scalar
prefetch), so that an absent block costs no memory traffic and no arithmetic. A panel of x with all its inputs
stays in VMEM while the blocks stream past it. Lists are padded by repeating their last entry, which fetches
nothing; a padded step costs its bookkeeping only.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_PANEL = 12 << 20  # bytes of x that stay in VMEM, of which there are two
_SAMPLES = 4096


class BlockLists(NamedTuple):
    """Which blocks lie in each block column, or, for the transpose, in each block row.

    Attributes:
      count: int32 [columns], how many.
      inner: int32 [columns, longest], the block rows, the last repeated behind `count`.
      slot: int32 [columns, longest], where the blocks are stored, the last repeated behind `count`.
    """

    count: jax.Array
    inner: jax.Array
    slot: jax.Array


def _dot(x: jax.Array, w: jax.Array, transposed: bool, precision: Any) -> jax.Array:
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=jnp.float32)


def block_matmul_reference(
    x: jax.Array, blocks: jax.Array, lists: BlockLists, *, transposed: bool = False, precision: Any = None
) -> jax.Array:
    """`block_matmul` by plain operations: one batched product for each place of the lists.

    Args:
      x: [m, k].
      blocks: [slots, bk, bn].
      lists: of the block columns; of the block rows where transposed.
      transposed: multiplies by W^T.
      precision: of the products.

    Returns:
      The dtype of x, [m, n].
    """
    inner, outer = blocks.shape[2:0:-1] if transposed else blocks.shape[1:]
    tiles = x.reshape(x.shape[0], -1, inner).transpose(1, 0, 2)
    contracted = 2 if transposed else 1

    def add(place: jax.Array, total: jax.Array) -> jax.Array:
        product = lax.dot_general(
            jnp.take(tiles, lists.inner[:, place], axis=0),
            jnp.take(blocks, lists.slot[:, place], axis=0),
            (((2,), (contracted,)), ((0,), (0,))),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        there = (place < lists.count)[:, None, None]
        return total + jnp.where(there, product, jnp.zeros_like(product))

    columns, longest = lists.inner.shape
    total = jnp.zeros((columns, x.shape[0], outer), jnp.float32)
    total = lax.fori_loop(0, longest, add, total)
    return total.transpose(1, 0, 2).reshape(x.shape[0], -1).astype(x.dtype)


def _matmul_kernel(
    count_ref: Any,
    inner_ref: Any,
    slot_ref: Any,
    x_ref: Any,
    w_ref: Any,
    y_ref: Any,
    sum_ref: Any,
    *,
    inner: int,
    transposed: bool,
    precision: Any,
) -> None:
    column, place, longest = pl.program_id(1), pl.program_id(2), pl.num_programs(2)

    @pl.when(place == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(place < count_ref[column])
    def _() -> None:
        first = pl.multiple_of(inner_ref[column * longest + place] * inner, _LANES)
        sum_ref[...] += _dot(x_ref[:, pl.ds(first, inner)], w_ref[0], transposed, precision)

    @pl.when(place == longest - 1)
    def _() -> None:
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _rows(size: int, bytes_of_a_row: int, budget: int, largest: int) -> int:
    """Rows of a block: a power of two times 16 that fits into the budget, no more than there are."""
    rows = 16
    while 2 * rows <= largest and 2 * rows * bytes_of_a_row <= budget and rows < size:
        rows *= 2
    return rows


def block_matmul(
    x: jax.Array,
    blocks: jax.Array,
    lists: BlockLists,
    *,
    transposed: bool = False,
    precision: Any = None,
    rows: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """y = x W, or x W^T, as a TPU kernel that skips the absent blocks of W.

    Args:
      x: bfloat16 or float32 [m, k].
      blocks: the dtype of x, [slots, bk, bn], both multiples of 128.
      lists: of the block columns; of the block rows where transposed.
      transposed: multiplies by W^T.
      precision: of the products.
      rows: of x in a panel; None chooses.
      interpret: True or `pltpu.InterpretParams()` runs it anywhere, slowly.

    Returns:
      The dtype of x, [m, n]; sums are float32.
    """
    (m, k), (columns, longest) = x.shape, lists.inner.shape
    inner, outer = blocks.shape[2:0:-1] if transposed else blocks.shape[1:]
    size = x.dtype.itemsize
    if rows is None:
        rows = _rows(m, k * size, _PANEL, 1024)
    held = 2 * rows * k * size + 2 * inner * outer * size + rows * outer * (4 + 4 + 2 * size)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(pl.cdiv(m, rows), columns, longest),
        in_specs=[
            pl.BlockSpec((rows, k), lambda i, j, s, *_: (i, 0)),
            pl.BlockSpec(
                (1, *blocks.shape[1:]), lambda i, j, s, count, inner, slot: (slot[j * longest + s], 0, 0)
            ),
        ],
        out_specs=pl.BlockSpec((rows, outer), lambda i, j, s, *_: (i, j)),
        scratch_shapes=[pltpu.VMEM((rows, outer), jnp.float32)],
    )
    return pl.pallas_call(
        functools.partial(_matmul_kernel, inner=inner, transposed=transposed, precision=precision),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((m, columns * outer), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=max(16 << 20, 2 * held),
        ),
        interpret=interpret,
        name="block_matmul",
    )(lists.count, lists.inner.reshape(-1), lists.slot.reshape(-1), x, blocks)


def block_gradient_reference(
    x: jax.Array,
    dy: jax.Array,
    row: jax.Array,
    column: jax.Array,
    used: jax.Array,
    block: tuple[int, int],
    *,
    dtype: Any = jnp.float32,
    precision: Any = None,
) -> jax.Array:
    """`block_gradient` by plain operations, one block after the other.

    Args:
      x: [m, k].
      dy: [m, n].
      row: int32 [slots].
      column: int32 [slots].
      used: int32 [].
      block: rows and columns of a block.
      dtype: of the result.
      precision: of the products.

    Returns:
      dtype [slots, *block].
    """
    bk, bn = block

    def one(place: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        slot, i, j = place
        product = lax.dot_general(
            lax.dynamic_slice_in_dim(x, i * bk, bk, 1),
            lax.dynamic_slice_in_dim(dy, j * bn, bn, 1),
            (((0,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return jnp.where(slot < used, product, jnp.zeros_like(product)).astype(dtype)

    return lax.map(one, (jnp.arange(row.shape[0], dtype=jnp.int32), row, column))


def _gradient_kernel(
    row_ref: Any,
    column_ref: Any,
    used_ref: Any,
    x_ref: Any,
    dy_ref: Any,
    dw_ref: Any,
    sum_ref: Any,
    *,
    samples: int,
    precision: Any,
) -> None:
    slot, step, steps = pl.program_id(0), pl.program_id(1), pl.num_programs(1)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(slot < used_ref[0])
    def _() -> None:
        x, dy = x_ref[...], dy_ref[...]
        here = x.shape[0]
        if samples % here:  # what lies behind the last sample may be anything, NaN too
            left = samples - step * here

            def real(tile: jax.Array) -> jax.Array:
                sample = lax.broadcasted_iota(jnp.int32, tile.shape, 0)
                return jnp.where(sample < left, tile, jnp.zeros_like(tile))

            x, dy = real(x), real(dy)
        sum_ref[...] += lax.dot_general(
            x, dy, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    @pl.when(step == steps - 1)
    def _() -> None:
        dw_ref[0] = sum_ref[...].astype(dw_ref.dtype)


def block_gradient(
    x: jax.Array,
    dy: jax.Array,
    row: jax.Array,
    column: jax.Array,
    used: jax.Array,
    block: tuple[int, int],
    *,
    dtype: Any = jnp.float32,
    precision: Any = None,
    samples: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The stored blocks of x^T dy as a TPU kernel: a sampled dense-dense product.

    Blocks of one column that follow one another share the fetch of its gradients.

    Args:
      x: bfloat16 or float32 [m, k].
      dy: the dtype of x, [m, n].
      row: int32 [slots], the block row of each slot.
      column: int32 [slots], the block column of each slot.
      used: int32 [], how many slots hold a block; the blocks of the others are 0.
      block: rows and columns of a block, both multiples of 128.
      dtype: of the result; sums are float32.
      precision: of the products.
      samples: in a block of x and dy; None chooses.
      interpret: True or `pltpu.InterpretParams()` runs it anywhere, slowly.

    Returns:
      dtype [slots, *block].
    """
    m, (bk, bn), slots = x.shape[0], block, row.shape[0]
    size = x.dtype.itemsize
    if samples is None:
        samples = _rows(m, (bk + bn) * size, _PANEL, _SAMPLES)
    held = 2 * samples * (bk + bn) * size + bk * bn * (4 + 4 + 2 * jnp.dtype(dtype).itemsize)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(slots, pl.cdiv(m, samples)),
        in_specs=[
            pl.BlockSpec((samples, bk), lambda b, s, row, column, used: (s, row[b])),
            pl.BlockSpec((samples, bn), lambda b, s, row, column, used: (s, column[b])),
        ],
        out_specs=pl.BlockSpec((1, bk, bn), lambda b, s, *_: (b, 0, 0)),
        scratch_shapes=[pltpu.VMEM((bk, bn), jnp.float32)],
    )
    return pl.pallas_call(
        functools.partial(_gradient_kernel, samples=m, precision=precision),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((slots, bk, bn), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=max(16 << 20, 2 * held)
        ),
        interpret=interpret,
        name="block_gradient",
    )(row, column, used.reshape(1), x, dy)
