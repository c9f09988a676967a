"""Kernels stored as their blocks that hold links, and the product with them.

Worth it on TPU where fewer than about half of the blocks hold a link, by the compiler's estimates: blocks of
128 x 128 on v5e, of 256 x 256 on v6e (docs/kernels.md). Masks without block structure touch nearly all of
their blocks at 5 % of links already, see `block_density`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from odjax_kernels import block_sparse as kernels
from odjax_kernels.block_sparse import BlockLists

_LANES = 128


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("blocks", "row", "column", "used", "by_column", "by_row"),
    meta_fields=("shape",),
)
@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """A matrix as its stored blocks. The values are trained; where they lie is not.

    Attributes:
      blocks: [slots, bk, bn]; the slots behind `used` are 0.
      row: int32 [slots], the block row of each slot; the last used one's behind `used`.
      column: int32 [slots], the block column, ascending.
      used: int32 [], how many slots hold a block.
      by_column: the blocks of each block column, for x W.
      by_row: the blocks of each block row, for dy W^T.
      shape: (k, n), static.
    """

    blocks: jax.Array
    row: jax.Array
    column: jax.Array
    used: jax.Array
    by_column: BlockLists
    by_row: BlockLists
    shape: tuple[int, int]

    def with_blocks(self, blocks: jax.Array) -> BlockSparse:
        """The same places with other values.

        Args:
          blocks: [slots, bk, bn].

        Returns:
          A matrix of the same structure.

        Raises:
          ValueError: blocks of another shape.
        """
        if blocks.shape != self.blocks.shape:
            raise ValueError(
                f"blocks must be {self.blocks.shape} like those they replace, got {blocks.shape}"
            )
        return dataclasses.replace(self, blocks=blocks)


def _bucket(number: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, ... that is not smaller."""
    power = 1 << max(0, math.ceil(math.log2(max(1, number))))
    return 3 * power // 4 if power >= 4 and number <= 3 * power // 4 else power


def _touched(mask: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    if mask.ndim != 2:
        raise ValueError(f"a mask or kernel must be [inputs, outputs], got {mask.shape}: take one of a stack")
    if len(block) != 2 or block[0] < 1 or block[1] < 1:
        raise ValueError(f"block must be (rows, columns), got {block}")
    (k, n), (bk, bn) = mask.shape, block
    if k % bk or n % bn:
        raise ValueError(
            f"blocks of {bk} x {bn} do not divide a kernel of {k} x {n}: pad it to "
            f"{-(-k // bk) * bk} x {-(-n // bn) * bn}"
        )
    return mask.reshape(k // bk, bk, n // bn, bn).any(axis=(1, 3))


def block_density(mask: Any, block: tuple[int, int] = (_LANES, _LANES)) -> float:
    """The share of blocks that hold a link: what a block-sparse product has to do of a dense one.

    Args:
      mask: bool [k, n], or a kernel whose links are not 0.
      block: rows and columns of a block.

    Returns:
      From 0 to 1.

    Raises:
      ValueError: no matrix, or a block that does not divide it.

    Example:
      >>> block_density(jnp.eye(4), (2, 2))
      0.5
    """
    return float(_touched(np.asarray(mask) != 0, tuple(block)).mean())


def _lists(row: np.ndarray, column: np.ndarray, columns: int, longest: int | None, role: str) -> BlockLists:
    """Lists by column of the blocks at (row, column), in the order of their slots."""
    count = np.bincount(column, minlength=columns).astype(np.int32)
    most = int(count.max(initial=0))
    if longest is None:
        longest = _bucket(most)
    if longest < max(1, most):
        raise ValueError(
            f"a block {role} holds {most} blocks, {longest} were allowed: type {role}={most} or more"
        )
    inner, slot = np.zeros((columns, longest), np.int32), np.zeros((columns, longest), np.int32)
    for j in range(columns):
        slots = np.flatnonzero(column == j)
        if slots.size:
            padded = slots[np.minimum(np.arange(longest), slots.size - 1)]
            inner[j], slot[j] = row[padded], padded
    return BlockLists(*map(jnp.asarray, (count, inner, slot)))


def to_block_sparse(
    kernel: Any,
    mask: Any = None,
    *,
    block: tuple[int, int] = (_LANES, _LANES),
    slots: int | None = None,
    per_column: int | None = None,
    per_row: int | None = None,
) -> BlockSparse:
    """Stores the blocks of a kernel that hold a link. Runs on the host.

    What is compiled depends on the sizes and not on the places: with `slots`, `per_column`, `per_row` given
    (or in the same bucket: 1, 2, 3, 4, 6, 8, 12, ...), a new mask compiles nothing.

    Args:
      kernel: [k, n].
      mask: bool [k, n], the links; None: what is not 0. Values outside the mask are stored as 0.
      block: rows and columns of a block, multiples of 128, the lanes of a TPU.
      slots: how many blocks can be stored; None: the bucket of how many there are.
      per_column: how many blocks a block column can hold; None: the bucket of the most.
      per_row: the same of a block row.

    Returns:
      The kernel as blocks, sorted by column and row.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: no matrix, a mask of another shape, blocks that do not divide it or are no multiples of 128,
        more blocks than allowed.

    Example:
      >>> kernel = jnp.zeros((256, 384)).at[0, 200].set(1.0)
      >>> w = to_block_sparse(kernel)
      >>> w.blocks.shape, int(w.row[0]), int(w.column[0])
      ((1, 128, 128), 0, 1)
    """
    kernel, block = np.asarray(kernel), (int(block[0]), int(block[1]))
    mask = kernel != 0 if mask is None else np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}: type mask != 0, or unpack(words, shape)")
    if mask.shape != kernel.shape:
        raise ValueError(f"the mask has the shape {mask.shape}, the kernel {kernel.shape}")
    if block[0] % _LANES or block[1] % _LANES:
        raise ValueError(
            f"a block's rows and columns must be multiples of {_LANES}, the lanes of a TPU, got {block}"
        )
    touched = _touched(mask, block)
    column, row = (places.astype(np.int32) for places in np.nonzero(touched.T))
    used = row.size
    if slots is None:
        slots = _bucket(used)
    if slots < max(1, used):
        raise ValueError(f"{used} blocks hold links, {slots} were allowed: type slots={used} or more")
    (bk, bn), rows, columns = block, *touched.shape
    tiles = (
        np.where(mask, kernel, np.zeros((), kernel.dtype))
        .reshape(rows, bk, columns, bn)
        .transpose(0, 2, 1, 3)
    )
    blocks = np.zeros((slots, bk, bn), kernel.dtype)
    blocks[:used] = tiles[row, column]
    last = np.minimum(np.arange(slots), max(0, used - 1))
    nothing = np.zeros(1, np.int32)
    return BlockSparse(
        blocks=jnp.asarray(blocks),
        row=jnp.asarray((row if used else nothing)[last]),
        column=jnp.asarray((column if used else nothing)[last]),
        used=jnp.asarray(used, jnp.int32),
        by_column=_lists(row, column, columns, per_column, "per_column"),
        by_row=_lists(column, row, rows, per_row, "per_row"),
        shape=kernel.shape,
    )


def from_block_sparse(w: BlockSparse) -> jax.Array:
    """The dense kernel.

    Args:
      w: a kernel as blocks.

    Returns:
      [k, n], 0 outside the stored blocks.

    Example:
      >>> kernel = jnp.zeros((128, 256)).at[3, 200].set(1.0)
      >>> bool((from_block_sparse(to_block_sparse(kernel)) == kernel).all())
      True
    """
    (k, n), (slots, bk, bn) = w.shape, w.blocks.shape
    # The slots behind the last used one repeat its place.
    row = jnp.where(jnp.arange(slots, dtype=jnp.int32) < w.used, w.row, k // bk)
    tiles = jnp.zeros((k // bk, n // bn, bk, bn), w.blocks.dtype)
    tiles = tiles.at[row, w.column].set(w.blocks, mode="drop")
    return tiles.transpose(0, 2, 1, 3).reshape(k, n)


def _product(
    x: jax.Array, blocks: jax.Array, lists: BlockLists, transposed: bool, options: tuple[Any, ...]
) -> jax.Array:
    precision, implementation, interpret = options
    settings = {"transposed": transposed, "precision": precision}
    plain = functools.partial(kernels.block_matmul_reference, **settings)
    kernel = functools.partial(kernels.block_matmul, interpret=interpret, **settings)
    if implementation == "xla" or x.shape[0] == 0:
        return plain(x, blocks, lists)
    if interpret:
        return kernel(x, blocks, lists)
    return lax.platform_dependent(x, blocks, lists, tpu=kernel, default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: jax.Array, blocks: jax.Array, places: BlockSparse, options: tuple[Any, ...]) -> jax.Array:
    return _product(x, blocks.astype(x.dtype), places.by_column, False, options)


def _forward(
    x: jax.Array, blocks: jax.Array, places: BlockSparse, options: tuple[Any, ...]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, BlockSparse]]:
    return _matmul(x, blocks, places, options), (x, blocks, places)


def _backward(
    options: tuple[Any, ...], saved: tuple[jax.Array, jax.Array, BlockSparse], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, blocks, places = saved
    precision, implementation, interpret = options
    dx = _product(dy, blocks.astype(x.dtype), places.by_row, True, options)
    settings = {"block": blocks.shape[1:], "dtype": blocks.dtype, "precision": precision}
    plain = functools.partial(kernels.block_gradient_reference, **settings)
    kernel = functools.partial(kernels.block_gradient, interpret=interpret, **settings)
    operands = (x, dy, places.row, places.column, places.used)
    if implementation == "xla" or x.shape[0] == 0:
        return dx, plain(*operands), None
    if interpret:
        return dx, kernel(*operands), None
    return dx, lax.platform_dependent(*operands, tpu=kernel, default=plain), None


_matmul.defvjp(_forward, _backward)


def bs_matmul(
    x: jax.Array,
    w: BlockSparse,
    *,
    precision: lax.PrecisionLike = None,
    implementation: Literal["pallas", "xla"] = "pallas",
    interpret: Any = False,
) -> jax.Array:
    """y = x W for a kernel stored as blocks; sums are float32.

    The gradient is that of the stored blocks, whole: where links are absent inside a block, mask it or the
    update. Pallas kernels are not partitioned by the compiler: where x is sharded on TPU, call it inside
    `jax.shard_map(..., check_vma=False)`.

    Args:
      x: bfloat16 or float32 [..., k].
      w: the kernel. Its blocks may be wider than x: they are rounded to the dtype of x for the product, and
        their gradient comes from the float32 sums, rounded once.
      precision: of the products, as for `jax.lax.dot_general`.
      implementation: "pallas" is the kernel on TPU and plain operations elsewhere; "xla" plain operations, a
        batched product for each place of the lists.
      interpret: runs the kernels anywhere, slowly: True or `pltpu.InterpretParams()`.

    Returns:
      The dtype of x, [..., n].

    Raises:
      TypeError: no `BlockSparse`, or an x that is not floating.
      ValueError: an x that does not fit, an unknown implementation.

    Example:
      >>> kernel = jnp.zeros((256, 128)).at[200, 3].set(2.0)
      >>> bs_matmul(jnp.ones((4, 256)), to_block_sparse(kernel))[:, 3]
      Array([2., 2., 2., 2.], dtype=float32)
    """
    if not isinstance(w, BlockSparse):
        raise TypeError(
            f"w must be a BlockSparse, got {type(w).__name__}: type to_block_sparse(kernel, mask)"
        )
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got {x.dtype}")
    if x.shape[-1:] != w.shape[:1]:
        raise ValueError(f"x must be [..., {w.shape[0]}] for a kernel of {w.shape}, got {x.shape}")
    if implementation not in ("pallas", "xla"):
        raise ValueError(f"implementation must be 'pallas' or 'xla', got {implementation!r}")
    y = _matmul(x.reshape(-1, w.shape[0]), w.blocks, w, (precision, implementation, interpret))
    return y.reshape(*x.shape[:-1], w.shape[1])
