"""Which links are removed: sampling weights from the size of the weights, how many stay, how many come back.

The links to keep are drawn without replacement with probabilities proportional to a power of a score
(`gumbel_top_k_mask` of the logits), or are those of the largest logits (`top_k_mask`).

Source: Zhang et al. 2025, "Brain network science modelling of sparse neural networks enables Transformers and
LLMs to perform as fully connected", section 3 (soft removal); Zhang et al. 2024, "Epitopological learning and
Cannistraci-Hebb network shape intelligence brain-inspired theory for ultra-sparse advantage in deep learning"
(relative importance, early stop).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SMALLEST = float(np.finfo(np.float32).tiny)


def removal_logits(
    w: jax.Array,
    mask: jax.Array,
    *,
    alpha: float | jax.Array = 1.0,
    temperature: float | jax.Array = 1.0,
    eps: float = 1e-5,
) -> jax.Array:
    """Logits of keeping each link: temperature times the logarithm of its score, -inf where there is none.

    With sums over the links of a row and of a column, and D(s) = alpha + (1 - alpha) (eps + s), the score is
    R = |w| / D(column sum) + |w| / D(row sum).

    | alpha | score                                                           |
    |-------|-----------------------------------------------------------------|
    | 1     | weight magnitude (twice it, which changes no draw)              |
    | 0     | relative importance: the shares in its column and in its row    |

    The exponent of the score, here `temperature`, is delta / (1 - delta) of the paper: 0 draws uniformly, and
    the larger it is, the closer to keeping the largest. Logarithms do not underflow where |w|^9 would. A link
    of weight 0 counts as the smallest normal float32, so that it stays a candidate, the least likely one.
    With alpha 1 nothing is summed, and the logits are the same bits on any number of devices.

    Args:
      w: real [..., n, m]; leading axes are layers of their own. Weights off the mask do not matter.
      mask: bool, the shape of `w`.
      alpha: in [0, 1]; may be traced.
      temperature: at least 0; may be traced.
      eps: added to the sums.

    Returns:
      float32 [..., n, m]. A traced weight that is not finite gives NaN, which a selection takes last.

    Raises:
      TypeError: a mask that is not bool, weights that are not real floats.
      ValueError: shapes that differ, fewer than two axes, alpha or temperature out of range, and, outside of
        `jit`, a link whose weight is not finite.

    Source: Zhang et al. 2025, arXiv 2501.19107, section 3 (soft removal); eps as in the authors' code.

    Example:
      >>> removal_logits(jnp.array([[0.5, 3.0]]), jnp.array([[True, False]]))
      Array([[  0., -inf]], dtype=float32)
    """
    w, mask = _checked_pair(w, mask)
    _check_range("alpha", alpha, 0, 1)
    _check_range("temperature", temperature, 0, math.inf)
    _check_range("eps", eps, 0, math.inf)
    if not isinstance(w, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            bad = int(jnp.sum(mask & ~jnp.isfinite(w)))
        if bad:
            raise ValueError(
                f"{bad} links of w {list(w.shape)} have weights that are not finite: nothing is removed"
            )
    alpha, temperature = jnp.asarray(alpha, jnp.float32), jnp.asarray(temperature, jnp.float32)
    size = jnp.where(mask, jnp.abs(w.astype(jnp.float32)), 0)

    def inverse(axis: int) -> jax.Array:
        total = jnp.sum(size, axis=axis, keepdims=True)
        return jnp.broadcast_to(1 / (alpha + (1 - alpha) * (eps + total)), size.shape)

    logits = jnp.log(jnp.maximum(size, _SMALLEST)) + jnp.log(inverse(-2) + inverse(-1))
    return jnp.where(mask, temperature * logits, -jnp.inf)


def keep_count(links: int | jax.Array, zeta: float | Fraction | jax.Array) -> int | jax.Array:
    """How many links stay when a part zeta of them is removed: links - floor(zeta links), exactly.

    The floor is of the exact product. A Python number is the fraction that it is written as (0.3 is 3 / 10;
    up to nine digits), an array is the float32 that it holds. A product in float32 would be off by one for
    large layers, and sometimes for small ones.

    Args:
      links: at least 0, a Python int or an int32 or uint32 array.
      zeta: in [0, 1], a Python number or a float array (cut to [0, 1]); may be traced.

    Returns:
      A Python int if both are Python numbers, else an array of the dtype of `links` (int32 for a Python int).

    Raises:
      TypeError: links that are no integers, a zeta of another kind.
      ValueError: zeta outside [0, 1], a negative number of links.

    Source: Zhang et al. 2025, arXiv 2501.19107, section 3.

    Example:
      >>> keep_count(10, 0.3), keep_count(jnp.array([10, 7]), 0.3)
      (7, Array([7, 5], dtype=int32))
    """
    whole = isinstance(links, int) and not isinstance(links, bool)
    if whole and not 0 <= links < 1 << 32:
        raise ValueError(f"links must be at least 0 and below 2^32, got {links}")
    number = isinstance(zeta, int | float | Fraction) and not isinstance(zeta, np.floating)
    if number:
        _check_range("zeta", zeta, 0, 1)
        exact = Fraction(str(zeta)).limit_denominator((1 << 32) - 1)
        if whole:
            return links - math.floor(exact * links)
    links = (
        jnp.asarray(links, jnp.int32 if whole and links < 1 << 31 else jnp.uint32)
        if whole
        else jnp.asarray(links)
    )
    if links.dtype not in (jnp.int32, jnp.uint32):
        raise TypeError(f"links must be int32 or uint32, got {links.dtype}: type links.astype(jnp.int32)")
    count = links.astype(jnp.uint32)
    if number:
        removed = _times_fraction(count, exact)
    else:
        zeta = jnp.asarray(zeta)
        if not jnp.issubdtype(zeta.dtype, jnp.floating):
            raise TypeError(f"zeta must be a number or a float array, got {zeta.dtype}")
        removed = _times_float(count, zeta.astype(jnp.float32))
    return (count - removed).astype(links.dtype)


def _multiply(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """High and low word of the 64-bit product of two uint32."""
    low, half = jnp.uint32(0xFFFF), jnp.uint32(16)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    first = a0 * b0
    middle = a1 * b0 + (first >> half)
    rest = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (rest >> half), (rest << half) | (first & low)


def _times_fraction(count: jax.Array, part: Fraction) -> jax.Array:
    """floor(count p / q) for p <= q < 2^32, by the reciprocal rounded up to 64 bits."""
    if part == 1:
        return count
    # count times the error of the reciprocal is below 2^-32 <= 1 / q: it cannot reach the next integer.
    reciprocal = -((-part.numerator << 64) // part.denominator)
    high, low = (jnp.asarray(word, jnp.uint32) for word in divmod(reciprocal, 1 << 32))
    word, rest = _multiply(count, high)
    carry = rest + _multiply(count, low)[0] < rest
    return word + carry.astype(jnp.uint32)


def _times_float(count: jax.Array, part: jax.Array) -> jax.Array:
    """floor(count part) for the number that a float32 is: 24 bits times a power of two."""
    mantissa, exponent = jnp.frexp(jnp.clip(part, 0, 1))
    bits = jnp.ldexp(mantissa, 24).astype(jnp.uint32)
    high, low = _multiply(count, bits)
    shift = (24 - exponent).astype(jnp.uint32)  # 23 or more
    up, down = jnp.uint32(32) - jnp.minimum(shift, jnp.uint32(32)), jnp.minimum(shift, jnp.uint32(31))
    small = (high << up) | (low >> down)
    large = high >> jnp.minimum(jnp.maximum(shift, jnp.uint32(32)) - jnp.uint32(32), jnp.uint32(31))
    return jnp.where(shift < 32, small, large)


def _checked_pair(w: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
    w, mask = jnp.asarray(w), jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, got {mask.dtype}: type mask != 0")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w must be real floats, got {w.dtype}")
    if w.shape != mask.shape or w.ndim < 2:
        raise ValueError(
            f"w and mask must be [..., n, m] of one shape, got {list(w.shape)} and {list(mask.shape)}"
        )
    return w, mask


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, jax.Array) and not (low <= value <= high and math.isfinite(value)):
        above = "" if high == math.inf else f" and at most {high}"
        raise ValueError(f"{name} must be at least {low}{above}, got {value}")
