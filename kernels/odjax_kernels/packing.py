"""The layout of packed masks, as kernels read it: one bit a link, 32 rows in a word.

Rows come in groups of 256, and bit r of word (8 g + i) is row 256 g + 8 r + i: a tile of eight words and 128
lanes holds 32 tiles of eight rows, and unpacking it is 32 shifts that move nothing. Matrices of fewer than
225 rows take w = ceil(rows / 32) < 8 words, of which bit r of word i is row w r + i. This is the layout of
`odjax.sparse.masks` for a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

BITS = 32
WORDS = 8
GROUP = BITS * WORDS


def words_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the words of a matrix.

    Args:
      shape: (n, m) of the mask.

    Returns:
      (words, m).

    Example:
      >>> words_shape((64, 10)), words_shape((2048, 5461))
      ((2, 10), (64, 5461))
    """
    n, m = shape
    words = max(1, min(WORDS, -(-n // BITS)))
    return words * -(-n // (BITS * words)), m


def check_words(words: jax.Array, shape: tuple[int, int], name: str = "words") -> tuple[jax.Array, int, int]:
    """Makes sure that packed words are those of a mask of this shape.

    Args:
      words: uint32 [..., words, m].
      shape: (n, m).
      name: the argument's name for the error.

    Returns:
      The words as an array, n and m.

    Raises:
      TypeError: words that are not uint32.
      ValueError: a shape that is no matrix, or words of another one.

    Example:
      >>> check_words(jnp.zeros((3, 5), jnp.uint32), (64, 5))
      Traceback (most recent call last):
      ValueError: words of a mask of shape (64, 5) are [..., 2, 5], got (3, 5): pack a matrix of that shape
    """
    words = jnp.asarray(words)
    if words.dtype != jnp.uint32:
        raise TypeError(f"{name} must be uint32, got {words.dtype}: pack a bool mask first")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape must be that of a matrix with entries, (n, m), got {tuple(shape)}")
    n, m = shape
    want = words_shape((n, m))
    if words.shape[-2:] != want:
        raise ValueError(
            f"{name} of a mask of shape {(n, m)} are [..., {want[0]}, {want[1]}], got {words.shape}: "
            "pack a matrix of that shape"
        )
    return words, n, m


def unpack_words(words: jax.Array, rows: int) -> jax.Array:
    """The mask that was packed, in plain jnp.

    Args:
      words: uint32 [words, m].
      rows: n of the mask.

    Returns:
      bool [n, m].

    Example:
      >>> unpack_words(jnp.array([[5]], jnp.uint32), 3)[:, 0]
      Array([ True, False,  True], dtype=bool)
    """
    high, m = words.shape
    each = min(WORDS, high)
    shifts = jnp.arange(BITS, dtype=jnp.uint32)[None, :, None, None]
    tiles = jnp.broadcast_to(words.reshape(high // each, 1, each, m), (high // each, BITS, each, m))
    return (((tiles >> shifts) & jnp.uint32(1)) != 0).reshape(high * BITS, m)[:rows]


def pack_rows(mask: jax.Array) -> jax.Array:
    """Packs a mask, in plain jnp.

    Args:
      mask: bool [n, m].

    Returns:
      uint32 [words, m]; bits of the padding are 0.

    Example:
      >>> pack_rows(jnp.array([[True], [False], [True]]))
      Array([[5]], dtype=uint32)
    """
    n, m = mask.shape
    high = words_shape((n, m))[0]
    each = min(WORDS, high)
    tiles = jnp.pad(mask, ((0, high * BITS - n), (0, 0))).reshape(high // each, BITS, each, m)
    shifts = jnp.arange(BITS, dtype=jnp.uint32)[None, :, None, None]
    return jnp.sum(tiles.astype(jnp.uint32) << shifts, axis=1, dtype=jnp.uint32).reshape(high, m)


def unpack_tiles(words: jax.Array, dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
    """The rows of whole groups as 0 and 1, inside a kernel: shifts of tiles in place.

    Args:
      words: uint32 [8 g, lanes].
      dtype: of the result.

    Returns:
      [256 g, lanes].

    Example:
      >>> int(unpack_tiles(jnp.full((8, 1), 1 << 31, jnp.uint32)).argmax())
      248
    """
    high, lanes = words.shape
    tiled = (high // WORDS, BITS, WORDS, lanes)
    bits = jax.lax.broadcasted_iota(jnp.int32, tiled, 1)
    words = jax.lax.bitcast_convert_type(words, jnp.int32).reshape(tiled[0], 1, WORDS, lanes)
    rows = ((jnp.broadcast_to(words, tiled) >> bits) & 1).reshape(high * BITS, lanes)
    return rows.astype(jnp.float32).astype(dtype)


def over_matrices(one: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Maps a function of matrices over their leading axes, one after the other.

    Args:
      one: matrices -> a matrix.
      *arrays: [..., a, b], with the same leading axes.

    Returns:
      [..., c, d].
    """
    batch = arrays[0].shape[:-2]
    if not batch:
        return one(*arrays)
    flat = [jnp.reshape(x, (math.prod(batch), *x.shape[-2:])) for x in arrays]
    out = jax.lax.map(lambda xs: one(*xs), flat)
    return jnp.reshape(out, (*batch, *out.shape[1:]))
