"""Stacked sign-flipped Hadamard bases: a code of any number of classes that is computed and never stored.

Block b holds the d columns of D_b H / sqrt(d), with H the d x d Walsh-Hadamard matrix H[i, j] =
(-1)^popcount(i & j) and D_b random signs from `fold_in(key, b)`. Class k is column k mod d of block k // d.

Logits need no column. With i = (i_hi, i_lo), j = (j_hi, j_lo) and w the number of values of j_lo,

    sqrt(d) h . w_k = sum_{i_lo} H_w[j_lo, i_lo] sum_{i_hi} H_{d/w}[j_hi, i_hi] D_b[i_hi, i_lo] h[i_hi, i_lo]

so that w classes share everything but the last sum: d / w + w operations a class (2 sqrt(d) at best) in two
matrix products instead of d in one, and log2(d) for w = d with the butterflies of radix 2.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from odjax.core import statistics_dtype
from odjax.heads.checks import check_features

# As wide as the matrix units of TPUs.
WIDTH = 128
# Where the first sum is fused into the second product it has few terms; see benchmarks/fixed_head.py.
_FUSED_WIDTH, _FUSED_TERMS, _FUSED_GROUPS = 512, 8, 64


def is_power_of_two(n: int) -> bool:
    """Whether n is 1, 2, 4, ..."""
    return n > 0 and n & (n - 1) == 0


def walsh_matrix(n: int) -> np.ndarray:
    """The Walsh-Hadamard matrix in natural order, int8 [n, n] of 1 and -1; n a power of two.

    Example:
      >>> walsh_matrix(2)
      array([[ 1,  1],
             [ 1, -1]], dtype=int8)
    """
    index = np.arange(n, dtype=np.uint32)
    return (1 - 2 * (np.bitwise_count(index[:, None] & index[None, :]) & 1)).astype(np.int8)


def walsh_hadamard(x: jax.Array, *, radix: int = WIDTH) -> jax.Array:
    """The fast Walsh-Hadamard transform of the last axis, not normalized: y = H x, and H H = n I.

    n is split into factors of at most `radix`, H into a Kronecker product of as many small matrices: n
    (r - 1) additions a factor r. Radix 2 is the butterfly, n log2(n) additions in all; a large radix has
    fewer passes over memory, as matrix products.

    Args:
      x: [..., n], n a power of two; bfloat16 is summed in float32 and rounded once a factor.
      radix: largest factor, a power of two above 1.

    Returns:
      [..., n] in the dtype of `x`.

    Raises:
      ValueError: n or the radix is no power of two.

    Source: Fino and Algazi 1976, "Unified Matrix Treatment of the Fast Walsh-Hadamard Transform".

    Example:
      >>> walsh_hadamard(jnp.array([1.0, 0.0, 0.0, 1.0]))
      Array([2., 0., 0., 2.], dtype=float32)
    """
    n = x.shape[-1]
    if not is_power_of_two(n):
        raise ValueError(f"the last axis must be a power of two, got shape {x.shape}")
    if radix < 2 or not is_power_of_two(radix):
        raise ValueError(f"radix must be 2, 4, 8, ..., got {radix}")
    return _transform(x, radix).astype(x.dtype)


def _transform(x: jax.Array, radix: int) -> jax.Array:
    """`walsh_hadamard` whose last factor is not rounded: float32 (float64 for float64)."""
    n, dtype = x.shape[-1], x.dtype
    shape, right = x.shape, 1
    while right < n:
        factor = min(radix, n // right)
        left = n // (right * factor)
        y = jnp.reshape(x.astype(dtype), (*shape[:-1], left, factor, right))
        if factor == 2:
            a, b = (y[..., i, :].astype(statistics_dtype(dtype)) for i in (0, 1))
            y = jnp.stack([a + b, a - b], axis=-2)
        else:
            y = _dot("fg,...gr->...fr", jnp.asarray(walsh_matrix(factor), dtype), y)
        x, right = jnp.reshape(y, shape), right * factor
    return x.astype(statistics_dtype(dtype))


def _dot(equation: str, signs: jax.Array, x: jax.Array) -> jax.Array:
    """A product with signs, in float32 (float64 for float64)."""
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, signs, x, precision=precision, preferred_element_type=statistics_dtype(x))


def block_signs(key: jax.Array, blocks: jax.Array, dim: int) -> jax.Array:
    """The diagonals D_b.

    Args:
      key: a typed key.
      blocks: numbers of blocks, int32 [n].
      dim: a power of two.

    Returns:
      bool [n, dim], True for a minus. A row depends on the key and the number of its block alone.
    """
    words = -(-dim // 32)
    drawn = jax.vmap(lambda b: jax.random.bits(jax.random.fold_in(key, b), (words,), jnp.uint32))(blocks)
    place = jnp.arange(32, dtype=jnp.uint32)
    bits = (drawn[:, :, None] >> place[None, None, :]) & 1
    return jnp.reshape(bits, (blocks.shape[0], words * 32))[:, :dim] == 1


def hadamard_columns(key: jax.Array | None, classes: jax.Array, dim: int) -> jax.Array:
    """Columns of the code, each computed from its number.

    Args:
      key: of the signs; None: no signs, for the first `dim` classes.
      classes: int32 [n].
      dim: a power of two.

    Returns:
      float32 [n, dim], of length 1.
    """
    i = jnp.arange(dim, dtype=jnp.uint32)
    j = (classes % dim).astype(jnp.uint32)
    minus = (jax.lax.population_count(i[None, :] & j[:, None]) & 1) == 1
    if key is not None:
        minus = minus ^ block_signs(key, classes // dim, dim)
    unit = jnp.float32(1 / math.sqrt(dim))
    return jnp.where(minus, -unit, unit)


def hadamard_group_logits(
    key: jax.Array | None, h: jax.Array, groups: jax.Array, width: int, *, radix: int = WIDTH
) -> jax.Array:
    """Logits of some groups of neighbouring classes, in the layout in which they come out.

    Args:
      key: as in `hadamard_columns`.
      h: features [n, d], d a power of two.
      groups: int32 [g]; group s holds the classes s * width to (s + 1) * width - 1.
      width: a power of two that divides d.
      radix: of the last transform.

    Returns:
      [n, g, width], float32 (float64 for float64 features); products are in the dtype of `h`.
    """
    count, dim = h.shape
    left = dim // width
    signs = _group_signs(key, groups, width, dim, h.dtype)
    x = jnp.reshape(h, (count, left, width)) * jnp.asarray(1 / math.sqrt(dim), h.dtype)
    if left == 1:
        sums = signs[None, :, 0] * x
    else:
        sums = _dot("gip,nip->ngp", signs, x).astype(h.dtype)
    return _transform(sums, radix)


def _group_signs(
    key: jax.Array | None, groups: jax.Array, width: int, dim: int, dtype: DTypeLike
) -> jax.Array:
    """H_{d/w}[j_hi, i_hi] D_b[i_hi, i_lo], for j_hi and b of every group: [g, d / width, width]."""
    classes = groups * width
    i_hi = jnp.arange(dim // width, dtype=jnp.uint32)
    j_hi = ((classes % dim) // width).astype(jnp.uint32)
    minus = (jax.lax.population_count(i_hi[None, :] & j_hi[:, None]) & 1) == 1
    minus = jnp.broadcast_to(minus[:, :, None], (groups.shape[0], dim // width, width))
    if key is not None:
        minus = minus ^ jnp.reshape(block_signs(key, classes // dim, dim), minus.shape)
    return jnp.where(minus, -1, 1).astype(dtype)


def range_width(classes: int, dim: int, dtype: DTypeLike) -> int:
    """What the ends of the ranges of `range_logits` must be multiples of.

    Args:
      classes: that are computed on one device.
      dim: a power of two.
      dtype: of the features.

    Returns:
      A power of two that divides `dim`.
    """
    most = max(_FUSED_WIDTH, dim // _FUSED_TERMS) if dtype == jnp.bfloat16 else WIDTH
    return min(dim, most, 1 << (classes.bit_length() - 1))


def range_logits(key: jax.Array | None, h: jax.Array, first: jax.Array, count: int, width: int) -> jax.Array:
    """Logits of neighbouring classes, whose transpose is `range_features`; not to be differentiated.

    A sum of few terms is cheapest as an operand of the second product on a TPU, in bfloat16: its matrix unit
    would pad the short sums of a product of their own, and the layouts of the two would differ. With float32
    features, and elsewhere, it is a product of its own.

    Args:
      key: as in `hadamard_columns`.
      h: features [n, d], d a power of two.
      first: the first class, a multiple of `width`.
      count: of classes, a multiple of `width`.
      width: of `range_width`.

    Returns:
      [n, count], float32 (float64 for float64 features).
    """
    dim = h.shape[-1]

    def fused(h: jax.Array, first: jax.Array) -> jax.Array:
        groups = first // width + jnp.arange(count // width, dtype=jnp.int32)
        signs = _group_signs(key, groups, width, dim, h.dtype)
        x = h
        parts = [x[:, i * width : (i + 1) * width] for i in range(dim // width)]
        sums = functools.reduce(jnp.add, [signs[None, :, i] * part[:, None] for i, part in enumerate(parts)])
        out = _in_bfloat16("ngp,pf->ngf", sums, width) / math.sqrt(dim)
        return jnp.reshape(out, (-1, count))

    def by_products(h: jax.Array, first: jax.Array) -> jax.Array:
        return jnp.reshape(_product_logits(key, h, first, count, width), (-1, count))

    if h.dtype != jnp.bfloat16 or count // width > _FUSED_GROUPS:
        return by_products(h, first)
    return jax.lax.platform_dependent(h, first, tpu=fused, default=by_products)


def range_features(
    key: jax.Array | None, shares: jax.Array, first: jax.Array, width: int, h: jax.Array
) -> jax.Array:
    """The transpose of `range_logits`: sum_k shares[n, k] w_k, over a range of classes.

    Args:
      key: as in `range_logits`.
      shares: [n, count], float32 (float64 for float64 features); rounded to the dtype of `h` in products.
      first: as in `range_logits`.
      width: as in `range_logits`.
      h: the features, for their shape [n, d] and dtype.

    Returns:
      [n, d] in the dtype of `shares`.
    """
    samples, dim = h.shape
    count = shares.shape[1]

    def fused(shares: jax.Array, first: jax.Array) -> jax.Array:
        groups = first // width + jnp.arange(count // width, dtype=jnp.int32)
        signs = _group_signs(key, groups, width, dim, jnp.float32) / math.sqrt(dim)
        sums = _in_bfloat16("ngf,fp->ngp", jnp.reshape(shares, (samples, -1, width)), width)
        sums = sums.astype(jnp.bfloat16)  # a rounding a factor, for half of the traffic
        parts = [sums[:, g].astype(jnp.float32) for g in range(count // width)]
        rows = [
            functools.reduce(jnp.add, [signs[None, g, i] * part for g, part in enumerate(parts)])
            for i in range(dim // width)
        ]
        return jnp.concatenate(rows, axis=1)

    def by_products(shares: jax.Array, first: jax.Array) -> jax.Array:
        transpose = jax.linear_transpose(lambda h: _product_logits(key, h, first, count, width), h)
        return transpose(jnp.reshape(shares, (samples, -1, min(width, WIDTH))))[0].astype(shares.dtype)

    if h.dtype != jnp.bfloat16 or count // width > _FUSED_GROUPS:
        return by_products(shares, first)
    return jax.lax.platform_dependent(shares, first, tpu=fused, default=by_products)


def _product_logits(
    key: jax.Array | None, h: jax.Array, first: jax.Array, count: int, width: int
) -> jax.Array:
    width = min(width, WIDTH)
    groups = first // width + jnp.arange(count // width, dtype=jnp.int32)
    return hadamard_group_logits(key, h, groups, width)


def _in_bfloat16(equation: str, x: jax.Array, width: int) -> jax.Array:
    signs = jnp.asarray(walsh_matrix(width), jnp.bfloat16)
    return jnp.einsum(equation, x.astype(jnp.bfloat16), signs, preferred_element_type=jnp.float32)


def hadamard_logits(
    key: jax.Array | None, h: jax.Array, num_classes: int, *, width: int | None = None, radix: int = WIDTH
) -> jax.Array:
    """Products of features with all columns of the code, without the code.

    Args:
      key: as in `hadamard_columns`.
      h: features [..., d], d a power of two.
      num_classes: K.
      width: classes that share their partial sums, a power of two that divides d; None: 128 at most. The
        operations are K (d / width) and those of K / width transforms.
      radix: of these transforms; `width=d, radix=2` is the butterfly, K log2(d) additions.

    Returns:
      [..., K] float32 (float64 for float64 features).

    Raises:
      TypeError: features that are not floating point.
      ValueError: d is no power of two, or the width does not divide it.

    Example:
      >>> hadamard_logits(None, jnp.array([2.0, 1.0, 0.0, 1.0]), 4)
      Array([2., 0., 1., 1.], dtype=float32)
    """
    check_features(h)
    dim = h.shape[-1]
    if not is_power_of_two(dim):
        raise ValueError(f"a Hadamard code needs features of a width that is a power of two, got {h.shape}")
    width = range_width(num_classes, dim, jnp.float32) if width is None else width
    if not is_power_of_two(width) or dim % width:
        raise ValueError(f"width must be a power of two that divides the dimension {dim}, got {width}")
    groups = jnp.arange(-(-num_classes // width), dtype=jnp.int32)
    flat = jnp.reshape(h, (math.prod(h.shape[:-1]), dim))
    out = hadamard_group_logits(key, flat, groups, width, radix=radix)
    return jnp.reshape(out, (*h.shape[:-1], groups.size * width))[..., :num_classes]
