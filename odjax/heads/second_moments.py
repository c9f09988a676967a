"""Second moments between groups of channels (heads) of a set of tokens, normalized by columns.

Source: Gao, Wang, Lin, Zhu, Hu and Zhou 2023, "Tuning Pre-trained Model via Moment Probing", arXiv
2307.11342.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from odjax.core import statistics_dtype
from odjax.heads.pooling import check_mask, token_count, token_mean

PAIRS = ("near", "half", "all", "first")
CENTERS = ("global", "channel", "none")

Axis = str | tuple[str, ...] | None


def head_pairs(heads: int, pairs: str = "near") -> tuple[tuple[int, int], ...]:
    """Which heads are multiplied with which.

    | pairs   | heads i and j               | how many      | in the authors' code |
    |---------|-----------------------------|---------------|----------------------|
    | "near"  | neighbours, i and i + 1     | H - 1         | near                 |
    | "half"  | i and i + H/2               | H / 2         | n/2                  |
    | "all"   | every i < j                 | H (H - 1) / 2 | cn2                  |
    | "first" | the first with every other  | H - 1         | one                  |

    Args:
      heads: the number of heads H.
      pairs: one of `PAIRS`.

    Returns:
      The pairs (i, j), in the order of the maps of `cross_moments`.

    Raises:
      ValueError: fewer than two heads, an unknown name, or "half" with an odd number of heads.

    Source: Gao et al. 2023, "Tuning Pre-trained Model via Moment Probing" (multi-head convolutional
    cross-covariance).

    Example:
      >>> head_pairs(4, "near"), head_pairs(4, "half")
      (((0, 1), (1, 2), (2, 3)), ((0, 2), (1, 3)))
    """
    if pairs not in PAIRS:
        raise ValueError(f"pairs must be one of {', '.join(PAIRS)}, got {pairs!r}")
    if heads < 2:
        raise ValueError(f"heads must be at least 2, got {heads}: cross moments are of two heads")
    if pairs == "half" and heads % 2:
        raise ValueError(f"pairs='half' needs an even number of heads, got {heads}: take pairs='near'")
    if pairs == "all":
        return tuple(itertools.combinations(range(heads), 2))
    if pairs == "half":
        return tuple((i, i + heads // 2) for i in range(heads // 2))
    return tuple((0 if pairs == "first" else i, i + 1) for i in range(heads - 1))


def cross_moments(
    z: jax.Array,
    pairs: str = "near",
    center: str = "global",
    mask: jax.Array | None = None,
    axis_name: Axis = None,
) -> jax.Array:
    """Second moments between the heads of a set of tokens, S_ij = (1/L) sum_l (z_il - c_i) (z_jl - c_j)^T.

    All pairs are one batched matrix product, accumulated in float32 whatever the dtype of `z`.

    | center    | c_i                                              | S is                          |
    |-----------|--------------------------------------------------|-------------------------------|
    | "global"  | one number a head, its mean over tokens and      | as in the authors' code; an   |
    |           | channels (after a LayerNorm: that of its bias)   | uncentred moment at the start |
    | "channel" | one number a channel, its mean over tokens       | the cross-covariance          |
    | "none"    | 0                                                | the uncentred moment          |

    Args:
      z: [..., L, H, m] floating point: L tokens of H heads with m channels.
      pairs: which heads, see `head_pairs`.
      center: one of `CENTERS`.
      mask: bool [..., L], True at tokens; what lies at other places is ignored, NaN included, and
        the divisor is the number of tokens. A set without a token gives zeros. None: every place is a token.
      axis_name: inside `jax.shard_map` or `jax.vmap`, the mesh axis (or several) over which L is split. Sums
        go over it, and the result is the same on every device.

    Returns:
      [..., P, m, m], P as in `head_pairs`, float32 (float64 for float64); the rows are channels of the first
      head of a pair.

    Raises:
      ValueError: `z` without an axis of tokens or without a token, fewer than two heads, an unknown name, or
        a mask of another shape.
      TypeError: `z` is not floating point.

    Source: Gao et al. 2023, "Tuning Pre-trained Model via Moment Probing" (multi-head convolutional
    cross-covariance).

    Example:
      >>> z = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])  # one token, two heads of two channels
      >>> cross_moments(z, center="none")
      Array([[[3., 4.],
              [6., 8.]]], dtype=float32)
    """
    if center not in CENTERS:
        raise ValueError(f"center must be one of {', '.join(CENTERS)}, got {center!r}")
    if z.ndim < 3:
        raise ValueError(
            f"z must be [..., tokens, heads, channels], got shape {tuple(z.shape)}: split the channels of "
            "tokens with z.reshape(*z.shape[:-1], heads, -1)"
        )
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise TypeError(f"z must be floating point, got {z.dtype}: convert it with z.astype(jnp.float32)")
    if not z.shape[-3]:
        raise ValueError(f"z must have at least one token, got shape {tuple(z.shape)}")
    if mask is not None:
        check_mask(mask, z.shape[:-2])
    heads, m = z.shape[-2:]
    chosen = head_pairs(heads, pairs)
    if center != "none":
        flat = z.reshape(*z.shape[:-2], heads * m)
        c = token_mean(flat, mask, axis_name).reshape(*z.shape[:-3], 1, heads, m)
        if center == "global":
            c = jnp.mean(c, axis=-1, keepdims=True)
        z = (z.astype(c.dtype) - c).astype(z.dtype)
    if mask is not None:
        z = jnp.where(mask[..., None, None], z, jnp.zeros((), z.dtype))
    if pairs == "first":
        left, equation = z[..., 0, :], "...li,...lpj->...pij"
    else:
        left, equation = _take(z, [i for i, _ in chosen]), "...lpi,...lpj->...pij"
    right = _take(z, [j for _, j in chosen])
    precision = None if z.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    s = jnp.einsum(equation, left, right, precision=precision, preferred_element_type=statistics_dtype(z))
    if axis_name is not None:
        s = jax.lax.psum(s, axis_name)
    return _divide(s, token_count(z.shape[-3], mask, s.dtype, axis_name))


def column_normalize(s: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Divides every column by its length, S[:, j] / max(|S[:, j]|, eps).

    The gradient is finite everywhere: a column shorter than `eps`, one of zeros included, is divided by the
    constant `eps`.

    Args:
      s: [..., m, n] floating point; a column runs along the first of the two.
      eps: the smallest divisor.

    Returns:
      Like `s`; columns have length 1, or less where they were shorter than `eps`.

    Raises:
      ValueError: `s` has fewer than two axes, or `eps` is below 1e-18.

    Source: Gao et al. 2023, "Tuning Pre-trained Model via Moment Probing" (multi-head convolutional
    cross-covariance).

    Example:
      >>> column_normalize(jnp.array([[3.0, 0.0], [4.0, 0.0]]))
      Array([[0.6, 0. ],
             [0.8, 0. ]], dtype=float32)
    """
    if s.ndim < 2:
        raise ValueError(f"s must be [..., rows, columns], got shape {tuple(s.shape)}")
    if not eps >= 1e-18:
        raise ValueError(f"eps must be at least 1e-18, so that its square is a float32, got {eps}")
    wide = s.astype(statistics_dtype(s))
    square = jnp.sum(wide * wide, axis=-2, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, eps * eps))).astype(s.dtype)


def _divide(total: jax.Array, count: jax.Array) -> jax.Array:
    """Divides `total` [..., *rest] by `count`, [...] or []."""
    return total / (count.reshape(*count.shape, *(1,) * (total.ndim - count.ndim)) if count.ndim else count)


def _take(z: jax.Array, heads: list[int]) -> jax.Array:
    """The heads of `z` [..., L, H, m] with these numbers; neighbours are one slice."""
    if heads == list(range(heads[0], heads[0] + len(heads))):
        return z[..., heads[0] : heads[0] + len(heads), :]
    return jnp.stack([z[..., i, :] for i in heads], axis=-2)
