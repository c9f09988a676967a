"""Masks of links: one bit a weight in memory, exact counts, and selections within groups (N:M, blocks).

A packed mask is uint32. Its layout is that of a register tile of a TPU: along the packed axis, rows come in
groups of 256, and bit r of word (8 g + i) is row 256 g + 8 r + i, so that unpacking shifts a tile of eight
rows 32 times and moves nothing. Fewer than 256 rows take ceil(rows / 32) words each way. The other axes stay
as they are, and so does their sharding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from odjax.core.selection import top_k_mask

_BITS = 32
_SUBLANES = 8


def packed_axis(shape: tuple[int, ...]) -> int:
    """The axis whose bits are gathered into words: the longest one, the last only where there is no other.

    Args:
      shape: of the mask, of rank 1 or more.

    Returns:
      The axis; the last of several of one length.

    Example:
      >>> packed_axis((64, 128)), packed_axis((512, 8, 64)), packed_axis((12, 512, 2048))
      (0, 0, 1)
    """
    if len(shape) == 1:
        return 0
    return max(range(len(shape) - 1), key=lambda axis: (shape[axis], axis))


def _tiling(rows: int) -> tuple[int, int]:
    """Groups of rows, and words of one group."""
    words = max(1, min(_SUBLANES, -(-rows // _BITS)))
    return -(-rows // (_BITS * words)), words


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the words of a mask.

    Args:
      shape: of the mask.

    Returns:
      The shape with the packed axis 32 times shorter, padded to whole tiles.

    Raises:
      ValueError: a scalar.

    Example:
      >>> packed_shape((64, 10)), packed_shape((2048, 5461))
      ((2, 10), (64, 5461))
    """
    if not shape:
        raise ValueError("a mask needs at least one axis, got the shape (): leave scalars out of the plan")
    axis = packed_axis(shape)
    groups, words = _tiling(shape[axis])
    return (*shape[:axis], groups * words, *shape[axis + 1 :])


def pack(mask: jax.Array) -> jax.Array:
    """Packs a mask, one bit a weight.

    Args:
      mask: bool [...], of any shape but ().

    Returns:
      uint32 words of `packed_shape(mask.shape)`; bits of the padding are 0.

    Raises:
      TypeError: the mask is not bool.
      ValueError: a scalar.

    Example:
      >>> pack(jnp.array([True, False, True]))
      Array([5], dtype=uint32)
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"a mask must be bool, got {mask.dtype}: compare first, such as w != 0")
    target = packed_shape(mask.shape)
    axis = packed_axis(mask.shape)
    groups, words = _tiling(mask.shape[axis])
    # The TPU compiler dies of some fusions of the mask's own computation with its words.
    mask = jax.lax.optimization_barrier(mask)
    padding = [(0, 0)] * mask.ndim
    padding[axis] = (0, groups * words * _BITS - mask.shape[axis])
    head, tail = mask.shape[:axis], mask.shape[axis + 1 :]
    tiles = jnp.pad(mask, padding).reshape(*head, groups, _BITS, words, *tail).astype(jnp.uint32)
    shifts = jax.lax.broadcasted_iota(jnp.uint32, tiles.shape, axis + 1)
    return jnp.sum(tiles << shifts, axis=axis + 1, dtype=jnp.uint32).reshape(target)


def unpack(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask that was packed.

    Args:
      words: uint32, of `packed_shape(shape)`.
      shape: of the mask.

    Returns:
      bool [shape].

    Raises:
      TypeError: the words are not uint32.
      ValueError: the words are not those of a mask of this shape.

    Example:
      >>> unpack(pack(jnp.array([True, False, True])), (3,))
      Array([ True, False,  True], dtype=bool)
    """
    words = jnp.asarray(words)
    if words.dtype != jnp.uint32:
        raise TypeError(f"packed words must be uint32, got {words.dtype}")
    shape = tuple(shape)
    if words.shape != packed_shape(shape):
        raise ValueError(
            f"a mask of shape {shape} packs into words of shape {packed_shape(shape)}, got {words.shape}: "
            "unpack with the shape that was packed"
        )
    axis = packed_axis(shape)
    groups, count = _tiling(shape[axis])
    head, tail = shape[:axis], shape[axis + 1 :]
    tiles = words.reshape(*head, groups, 1, count, *tail)
    tiled = (*head, groups, _BITS, count, *tail)
    shifts = jax.lax.broadcasted_iota(jnp.uint32, tiled, axis + 1)
    bits = (jnp.broadcast_to(tiles, tiled) >> shifts) & jnp.uint32(1)
    rows = bits.reshape(*head, groups * _BITS * count, *tail)
    return jax.lax.slice_in_dim(rows, 0, shape[axis], axis=axis) != 0


def links(mask: jax.Array, *, batch_dims: int = 0) -> jax.Array:
    """Number of links, exactly.

    Args:
      mask: bool [...], or packed uint32 words.
      batch_dims: the first `batch_dims` axes are counted apart (layers; they must not be the packed axis).

    Returns:
      int32 of the batch shape.

    Raises:
      TypeError: neither bool nor uint32.
      ValueError: 2^31 weights or more in one count.

    Example:
      >>> int(links(jnp.array([[True, False], [True, True]])))
      3
    """
    mask = jnp.asarray(mask)
    bits = {jnp.dtype(jnp.bool_): 1, jnp.dtype(jnp.uint32): _BITS}.get(mask.dtype)
    if bits is None:
        raise TypeError(f"links counts a bool mask or its packed uint32 words, got {mask.dtype}")
    if math.prod(mask.shape[batch_dims:]) * bits >= 1 << 31:
        raise ValueError(f"one count holds fewer than 2^31 weights, got {mask.shape}: use batch_dims")
    ones = mask if bits == 1 else jax.lax.population_count(mask)
    return jnp.sum(ones, axis=tuple(range(batch_dims, mask.ndim)), dtype=jnp.int32)


@dataclass(frozen=True)
class NM:
    """N:M sparsity: exactly n links among every m consecutive weights along an axis.

    Attributes:
      n: links in a group.
      m: weights in a group.
      axis: counted from the end; -2 is the input axis of a kernel [inputs, outputs].

    Raises:
      ValueError: not 1 <= n <= m, or an axis that is not negative.

    Example:
      >>> NM(2, 4)
      NM(n=2, m=4, axis=-2)
    """

    n: int
    m: int
    axis: int = -2

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"N:M needs 1 <= n <= m, got n={self.n}, m={self.m}: 2:4 is NM(2, 4)")
        _from_the_end(self.axis)


@dataclass(frozen=True)
class Block:
    """Links come and go in blocks of the last two axes.

    Attributes:
      rows: of a block.
      columns: of a block.
      pool: how the scores of a block become one, "mean" or "max".

    Raises:
      ValueError: an empty block or an unknown pool.
    """

    rows: int
    columns: int
    pool: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a block has at least one row and column, got {self.rows} x {self.columns}")
        _known_pool(self.pool)


@dataclass(frozen=True)
class Channel:
    """Links come and go with everything at one index of an axis.

    Attributes:
      axis: counted from the end; -1 is the output axis of a kernel.
      pool: how the scores of a channel become one, "mean" or "max".

    Raises:
      ValueError: an axis that is not negative, or an unknown pool.
    """

    axis: int = -1
    pool: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        _from_the_end(self.axis)
        _known_pool(self.pool)


Structure = NM | Block | Channel | None
"""Which links may be present together; None: any."""


def _from_the_end(axis: int) -> None:
    if axis >= 0:
        raise ValueError(f"axis is counted from the end (-1 is the last), got {axis}")


def _known_pool(pool: str) -> None:
    if pool not in ("mean", "max"):
        raise ValueError(f"pool must be 'mean' or 'max', got {pool!r}")


def unit(structure: Structure, shape: tuple[int, ...]) -> int:
    """By how many links the number of links of one leaf can change.

    Args:
      structure: N:M, blocks, channels or None.
      shape: of the leaf without its batch axes.

    Returns:
      The number of N:M groups, the size of a block or a channel, or 1.

    Raises:
      ValueError: an axis that groups or blocks do not divide, or that is not there.

    Example:
      >>> unit(NM(2, 4), (8, 3)), unit(Block(4, 4), (8, 8)), unit(None, (8, 3))
      (6, 16, 1)
    """
    if structure is None:
        return 1
    size = math.prod(shape)
    if isinstance(structure, Block):
        if len(shape) < 2 or shape[-2] % structure.rows or shape[-1] % structure.columns:
            raise ValueError(
                f"blocks of {structure.rows} x {structure.columns} do not divide the shape {tuple(shape)}: "
                "the last two axes must be multiples of the block's"
            )
        return structure.rows * structure.columns
    if -structure.axis > len(shape):
        raise ValueError(f"{structure} names an axis that the shape {tuple(shape)} does not have")
    if isinstance(structure, Channel):
        return size // shape[structure.axis]
    if shape[structure.axis] % structure.m:
        raise ValueError(
            f"{structure.n}:{structure.m} along axis {structure.axis} of {tuple(shape)} needs a multiple of "
            f"{structure.m} there, got {shape[structure.axis]}"
        )
    return size // structure.m


def pooled(x: jax.Array, structure: Block | Channel, batch_dims: int, pool: str) -> jax.Array:
    """One number a block or channel.

    Args:
      x: [*batch, ...].
      structure: blocks or channels.
      batch_dims: how many axes are batch axes.
      pool: "mean", "max" or "any".

    Returns:
      [*batch, rows of blocks, columns of blocks], or [*batch, channels].
    """
    reduce = {"mean": jnp.mean, "max": jnp.max, "any": jnp.any}[pool]
    if isinstance(structure, Block):
        *lead, rows, columns = x.shape
        bh, bw = structure.rows, structure.columns
        return reduce(x.reshape(*lead, rows // bh, bh, columns // bw, bw), axis=(-3, -1))
    others = tuple(a for a in range(batch_dims, x.ndim) if a != x.ndim + structure.axis)
    return reduce(x, axis=others)


def unpooled(
    blocks: jax.Array, structure: Block | Channel, shape: tuple[int, ...], batch_dims: int
) -> jax.Array:
    """The inverse of `pooled`: every link gets the number of its block or channel.

    Args:
      blocks: as `pooled` gives it.
      structure: blocks or channels.
      shape: of the links, [*batch, ...].
      batch_dims: how many axes are batch axes.

    Returns:
      An array of the shape.
    """
    if isinstance(structure, Block):
        return jnp.repeat(jnp.repeat(blocks, structure.rows, -2), structure.columns, -1)
    kept = {*range(batch_dims), len(shape) + structure.axis}
    wide = blocks.reshape([n if a in kept else 1 for a, n in enumerate(shape)])
    return jnp.broadcast_to(wide, shape)


def _checked(scores: jax.Array, k: int | jax.Array, structure: Structure, batch_dims: int) -> int:
    shape = scores.shape[batch_dims:]
    step = unit(structure, shape)
    if not isinstance(k, jax.Array) and k > math.prod(shape):
        raise ValueError(
            f"{k} links do not fit into {shape} with its {math.prod(shape)} weights: "
            f"{k - math.prod(shape)} short"
        )
    if not isinstance(k, jax.Array) and k % step:
        raise ValueError(f"k must be a multiple of {step} for {structure} on {shape}, got {k}")
    return step


def _numbers(scores: jax.Array) -> jax.Array:
    # A NaN is no candidate of a selection, and the count would come out short.
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    return jnp.where(jnp.isnan(scores), jnp.array(-jnp.inf, scores.dtype), scores)


def top_links(
    scores: jax.Array,
    k: int | jax.Array,
    structure: Structure = None,
    *,
    eligible: jax.Array | None = None,
    batch_dims: int = 0,
) -> jax.Array:
    """The k links with the largest scores that a structure allows.

    For N:M these are the k / groups best of every group; for blocks and channels the best by pooled score.

    Args:
      scores: float or integer [...]; NaN counts as -inf.
      k: how many links, of each slice of the batch axes; a multiple of `unit`. A traced one is rounded down
        to a multiple, and saturates at the number of candidates.
      structure: N:M, blocks, channels or None.
      eligible: bool, the shape of the scores: the candidates; a block is one if any of its links is. None:
        all.
      batch_dims: the first `batch_dims` axes are selections of their own.

    Returns:
      bool mask of the shape of the scores.

    Raises:
      ValueError: k is more than the leaf holds, or no multiple of `unit`.

    Example:
      >>> top_links(jnp.array([[3.0, 1.0, 2.0, 5.0]]), 2, NM(1, 2, axis=-1)).astype(int)
      Array([[1, 0, 0, 1]], dtype=int32)
    """
    scores = _numbers(jnp.asarray(scores))
    step = _checked(scores, k, structure, batch_dims)
    if structure is None:
        return top_k_mask(scores, k, eligible=eligible, batch_dims=batch_dims)
    if isinstance(structure, NM):
        nothing = jnp.zeros(scores.shape, bool)
        return _fill_groups(nothing, scores, k // step, structure, eligible, batch_dims)
    if eligible is not None:
        scores = jnp.where(eligible, scores, jnp.zeros_like(scores))
        eligible = pooled(eligible, structure, batch_dims, "any")
    best = top_k_mask(
        _numbers(pooled(scores, structure, batch_dims, structure.pool)),
        k // step,
        eligible=eligible,
        batch_dims=batch_dims,
    )
    return unpooled(best, structure, scores.shape, batch_dims)


def _fill_groups(
    kept: jax.Array,
    scores: jax.Array,
    per_group: int | jax.Array,
    structure: NM,
    eligible: jax.Array | None,
    batch_dims: int,
) -> jax.Array:
    def grouped(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, structure.axis, -1)
        return x.reshape(*x.shape[:-1], -1, structure.m)

    kept_groups, candidates = grouped(kept), grouped(~kept if eligible is None else eligible & ~kept)
    if isinstance(per_group, jax.Array) and per_group.ndim:
        per_group = per_group.reshape(per_group.shape + (1,) * (kept_groups.ndim - 1 - per_group.ndim))
    missing = per_group - jnp.sum(kept_groups, axis=-1, dtype=jnp.int32)
    new = top_k_mask(grouped(scores), missing, eligible=candidates, batch_dims=kept_groups.ndim - 1)
    full = kept_groups | new
    moved = jnp.moveaxis(kept, structure.axis, -1).shape
    return jnp.moveaxis(full.reshape(moved), -1, structure.axis)


def add_links(
    kept: jax.Array,
    scores: jax.Array,
    k: int | jax.Array,
    structure: Structure = None,
    *,
    batch_dims: int = 0,
) -> jax.Array:
    """Adds the absent links with the largest scores until there are k.

    Args:
      kept: bool [...], links that stay; whole blocks where the structure is blocks or channels.
      scores: float or integer, the shape of `kept`; NaN counts as -inf.
      k: links afterwards, of each slice of the batch axes; as in `top_links`.
      structure: N:M, blocks, channels or None; every N:M group is filled up to k / groups.
      batch_dims: the first `batch_dims` axes are selections of their own.

    Returns:
      bool mask that holds `kept`, with k links (more only where more were kept).

    Raises:
      ValueError: k is more than the leaf holds, or no multiple of `unit`.

    Example:
      >>> add_links(jnp.array([True, False, False]), jnp.array([0.0, 1.0, 2.0]), 2)
      Array([ True, False,  True], dtype=bool)
    """
    scores = _numbers(jnp.asarray(scores))
    step = _checked(scores, k, structure, batch_dims)
    if isinstance(structure, NM):
        return _fill_groups(kept, scores, k // step, structure, None, batch_dims)
    missing = k - links(kept, batch_dims=batch_dims)
    if structure is None:
        return kept | top_k_mask(scores, missing, eligible=~kept, batch_dims=batch_dims)
    held = pooled(kept, structure, batch_dims, "any")
    best = top_k_mask(
        _numbers(pooled(scores, structure, batch_dims, structure.pool)),
        missing // step,
        eligible=~held,
        batch_dims=batch_dims,
    )
    return kept | unpooled(best, structure, scores.shape, batch_dims)
