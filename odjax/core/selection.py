"""Exact selection of the k largest scores by a threshold, without a sort, and sampling without replacement.

A score is mapped to an unsigned integer of the same order. The k-th largest integer is then found from its
top bits down, a few bits a pass: a pass compares the whole array with 2^bits - 1 candidates and counts. Ties
are cut by a second search, over the linear index. Scores may be sharded in any way: only the counts travel
between devices, and there is no sort, no prefix sum and no gather. k may be traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from odjax.core.keys import check_key

_LONG = 256  # a row that is counted by a product on a CPU
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def _ordered(scores: jax.Array, largest: bool) -> tuple[jax.Array, jax.Array | None]:
    """Unsigned integers in the order of the scores, and which are numbers (None: all of them).

    Bit arithmetic only: float comparisons on some backends flush subnormal numbers to zero. A float's key is
    never 0.
    """
    dtype = scores.dtype
    if dtype == jnp.bool_:
        scores, dtype = scores.astype(jnp.uint8), jnp.dtype(jnp.uint8)
    width = 8 * dtype.itemsize
    unsigned = _UNSIGNED[dtype.itemsize]
    sign = unsigned(1 << (width - 1))
    valid = None
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        keys = scores
    elif jnp.issubdtype(dtype, jnp.signedinteger):
        keys = jax.lax.bitcast_convert_type(scores, unsigned) ^ sign
    else:
        bits = jax.lax.bitcast_convert_type(scores, unsigned)
        bits = jnp.where(bits == sign, unsigned(0), bits)  # -0.0 equals 0.0
        infinity = jax.lax.bitcast_convert_type(jnp.array(jnp.inf, dtype), unsigned)
        valid = (bits & ~sign) <= infinity
        keys = jnp.where((bits & sign) != 0, ~bits, bits | sign)
    return (keys if largest else ~keys), valid


def _from_ordered(key: jax.Array, dtype: Any, largest: bool) -> jax.Array:
    key = key if largest else ~key
    if dtype == jnp.bool_:
        return key.astype(jnp.bool_)
    sign = key.dtype.type(1 << (8 * key.dtype.itemsize - 1))
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return key
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return jax.lax.bitcast_convert_type(key ^ sign, dtype)
    return jax.lax.bitcast_convert_type(jnp.where((key & sign) != 0, key ^ sign, ~key), dtype)


def _count(hits: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    if not axes or hits.shape[-1] < _LONG:
        return jnp.sum(hits, axis=axes, dtype=jnp.uint32)

    def product(hits: jax.Array) -> jax.Array:
        ones = jnp.ones(hits.shape[-1:], jnp.int8)
        rows = jnp.matmul(hits.astype(jnp.int8), ones, preferred_element_type=jnp.int32)
        return jnp.sum(rows.astype(jnp.uint32), axis=axes[:-1], dtype=jnp.uint32)

    # XLA sums on a CPU in windows, of an array of integers that it writes first: thrice as slow (measured).
    return jax.lax.platform_dependent(
        hits, cpu=product, default=lambda hits: jnp.sum(hits, axis=axes, dtype=jnp.uint32)
    )


def _largest_threshold(
    keys: jax.Array, valid: jax.Array | None, k: jax.Array, width: int, bits: int
) -> jax.Array:
    """The largest t of `width` bits with at least k valid keys >= t (0 when there are fewer)."""
    kind = keys.dtype.type
    axes = tuple(range(keys.ndim))

    def count(candidate: jax.Array) -> jax.Array:
        hits = keys >= candidate
        return _count(hits if valid is None else hits & valid, axes)

    def counts(candidates: jax.Array) -> jax.Array:
        # One sum each, which XLA fuses into one pass; a broadcast over the candidates it does not (TPU).
        return jnp.stack([count(candidates[i]) for i in range(candidates.size)])

    def refine(t: jax.Array, shift: jax.Array, digits: int) -> jax.Array:
        steps = jnp.arange(1, digits, dtype=keys.dtype) << shift
        digit = jnp.sum(counts(t + steps) >= k, dtype=keys.dtype)
        return t + (digit << shift)

    passes, rest = divmod(width, bits)

    def body(i: jax.Array, t: jax.Array) -> jax.Array:
        return refine(t, (width - bits * (i + 1)).astype(keys.dtype), 1 << bits)

    t = jax.lax.fori_loop(0, passes, body, jnp.zeros([], keys.dtype))
    return refine(t, jnp.asarray(kind(0)), 1 << rest) if rest else t


def _linear_index(shape: tuple[int, ...]) -> jax.Array:
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
        stride *= shape[axis]
    return index


def _by_platform(search: Callable[[int], Any], bits: int | None) -> Any:
    # On CPU a pass costs what its comparisons cost, so one bit is best (measured). On an accelerator it is
    # one stream of the array and one all-reduce, so fewer should win: four bits (reasoned, not measured).
    if bits is not None:
        return search(bits)
    return jax.lax.platform_dependent(cpu=lambda: search(1), default=lambda: search(4))


def _prepare(
    scores: jax.Array, eligible: jax.Array | None, largest: bool
) -> tuple[jax.Array, jax.Array | None]:
    keys, valid = _ordered(scores, largest)
    if eligible is not None:
        valid = eligible if valid is None else valid & eligible
    if valid is not None and jnp.issubdtype(scores.dtype, jnp.floating):
        # 0 is the key of no number: one array to stream instead of two.
        return jnp.where(valid, keys, keys.dtype.type(0)), None
    return keys, valid


def _capped(
    keys: jax.Array, valid: jax.Array | None, floating: bool, k: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """min(k, number of candidates), and that number."""
    if valid is None and not floating:
        number = jnp.uint32(keys.size)
    else:
        number = _count(keys > 0 if valid is None else valid, tuple(range(keys.ndim)))
    return jnp.minimum(jnp.maximum(k, jnp.zeros_like(k)).astype(jnp.uint32), number), number


def _mask(
    scores: jax.Array, k: jax.Array, eligible: jax.Array | None, largest: bool, bits: int | None
) -> jax.Array:
    if scores.size == 0:
        return jnp.zeros(scores.shape, bool)
    floating = jnp.issubdtype(scores.dtype, jnp.floating)
    keys, valid = _prepare(scores, eligible, largest)
    wanted, _ = _capped(keys, valid, floating, k)
    axes = tuple(range(keys.ndim))

    def search(bits: int) -> jax.Array:
        threshold = _largest_threshold(keys, valid, wanted, 8 * keys.dtype.itemsize, bits)
        at_least = keys >= threshold if valid is None else (keys >= threshold) & valid
        above = keys > threshold if valid is None else (keys > threshold) & valid
        ties = at_least & ~above
        missing = wanted - _count(above, axes)  # at least 1 unless nothing is wanted

        def cut() -> jax.Array:
            # The first `missing` ties: the largest reversed index r that has as many ties at or above it.
            width = max(1, (scores.size - 1).bit_length())
            reverse = np.uint32(scores.size - 1) - _linear_index(scores.shape)
            bound = _largest_threshold(reverse, ties, missing, width, bits)
            return above | (ties & (reverse >= bound))

        exact = _count(at_least, axes) == wanted
        return jax.lax.cond(exact, lambda: at_least, cut) & (wanted > 0)

    return _by_platform(search, bits)


def _kth(
    scores: jax.Array, k: jax.Array, eligible: jax.Array | None, largest: bool, bits: int | None
) -> jax.Array:
    floating = jnp.issubdtype(scores.dtype, jnp.floating)
    nothing = jnp.array(jnp.nan, scores.dtype) if floating else jnp.zeros([], scores.dtype)
    if scores.size == 0:
        return nothing
    keys, valid = _prepare(scores, eligible, largest)
    wanted, _ = _capped(keys, valid, floating, k)
    key = _by_platform(lambda b: _largest_threshold(keys, valid, wanted, 8 * keys.dtype.itemsize, b), bits)
    return jnp.where(wanted > 0, _from_ordered(key, scores.dtype, largest), nothing)


def _checked(
    scores: Any, k: Any, eligible: Any, batch_dims: int, bits_per_pass: int | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    scores = jnp.asarray(scores)
    dtype = scores.dtype
    floating = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 2
    integral = dtype == jnp.bool_ or (jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits >= 8)
    if not floating and not integral:
        raise TypeError(f"scores must be real numbers (float16 to float64, integers or bool), got {dtype}")
    if not 0 <= batch_dims <= scores.ndim:
        raise ValueError(
            f"batch_dims must be between 0 and {scores.ndim} for scores {scores.shape}, got {batch_dims}"
        )
    if bits_per_pass is not None and not 1 <= bits_per_pass <= 8:
        raise ValueError(f"bits_per_pass must be between 1 and 8, got {bits_per_pass}")
    if isinstance(k, int | np.integer) and k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    k = jnp.asarray(k)
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(f"k must be an integer, got {k.dtype}: round a density times the size first")
    if k.ndim and k.shape != scores.shape[:batch_dims]:
        raise ValueError(
            f"k must be a scalar or have the batch shape {scores.shape[:batch_dims]}, got {k.shape}"
        )
    if int(np.prod(scores.shape[batch_dims:], dtype=object)) >= 1 << 32:
        raise ValueError(
            f"one selection holds fewer than 2^32 scores, got {scores.shape[batch_dims:]}: use batch_dims"
        )
    if eligible is not None:
        eligible = jnp.asarray(eligible)
        if eligible.dtype != jnp.bool_ or eligible.shape != scores.shape:
            raise ValueError(
                f"eligible must be bool{list(scores.shape)} like the scores, "
                f"got {eligible.dtype}{list(eligible.shape)}"
            )
    return scores, k, eligible


def _batched(one: Callable[..., jax.Array], scores: Any, k: Any, eligible: Any, batch_dims: int) -> jax.Array:
    for _ in range(batch_dims):
        one = jax.vmap(one, in_axes=(0, 0 if k.ndim else None, None if eligible is None else 0))
    return one(scores, k, eligible)


def top_k_mask(
    scores: jax.Array,
    k: int | jax.Array,
    *,
    eligible: jax.Array | None = None,
    largest: bool = True,
    batch_dims: int = 0,
    bits_per_pass: int | None = None,
) -> jax.Array:
    """Marks the k largest scores: exactly min(k, number of candidates) entries are True.

    Among equal scores those with the lowest linear (row-major) index are taken, as by a stable sort. The
    result does not depend on how the scores are sharded.

    | case                       | result                                              |
    |----------------------------|-----------------------------------------------------|
    | k = 0, or a traced k < 0   | nothing                                             |
    | k above the candidates     | every candidate                                     |
    | NaN                        | is no candidate, never selected                     |
    | inf, -inf                  | ordinary scores, the largest and the smallest       |
    | -0.0 and 0.0               | equal                                               |
    | subnormal numbers          | told apart, also where the backend flushes them     |
    | no scores                  | an empty mask                                       |

    Args:
      scores: [...] float16, bfloat16, float32, float64 (under x64), an integer type or bool.
      k: how many; a Python int, an int scalar that may be traced, or an int array of the batch shape.
      eligible: bool, the shape of the scores: the candidates. None: all.
      largest: False marks the k smallest instead.
      batch_dims: the first `batch_dims` axes are selections of their own (layers, for example).
      bits_per_pass: bits of the threshold found in one pass over the scores; None chooses 1 on CPU, 4
        elsewhere.

    Returns:
      A bool mask with the shape (and sharding) of the scores.

    Raises:
      TypeError: scores of another kind, or a k that is no integer.
      ValueError: a negative k, a mask or k of the wrong shape, 2^32 scores or more in one selection.

    Example:
      >>> top_k_mask(jnp.array([3.0, 1.0, 3.0, jnp.nan, 3.0]), 2)
      Array([ True, False,  True, False, False], dtype=bool)
    """
    scores, k, eligible = _checked(scores, k, eligible, batch_dims, bits_per_pass)
    return _batched(lambda s, k, e: _mask(s, k, e, largest, bits_per_pass), scores, k, eligible, batch_dims)


def kth_value(
    scores: jax.Array,
    k: int | jax.Array,
    *,
    eligible: jax.Array | None = None,
    largest: bool = True,
    batch_dims: int = 0,
    bits_per_pass: int | None = None,
) -> jax.Array:
    """The k-th largest score: the threshold that `top_k_mask` cuts at.

    Args:
      scores: [...] as in `top_k_mask`.
      k: how many; above the number of candidates it means the last of them.
      eligible: bool, the shape of the scores: the candidates. None: all.
      largest: False gives the k-th smallest.
      batch_dims: the first `batch_dims` axes are selections of their own.
      bits_per_pass: see `top_k_mask`.

    Returns:
      A value of the batch shape and the dtype of the scores. With k = 0 or no candidate there is none: NaN
      for floats (no score compares as at least NaN), 0 for integers.

    Raises:
      TypeError: scores of another kind, or a k that is no integer.
      ValueError: a negative k, a mask or k of the wrong shape.

    Example:
      >>> kth_value(jnp.array([0.5, 2.0, 1.0]), 2)
      Array(1., dtype=float32)
    """
    scores, k, eligible = _checked(scores, k, eligible, batch_dims, bits_per_pass)
    return _batched(lambda s, k, e: _kth(s, k, e, largest, bits_per_pass), scores, k, eligible, batch_dims)


def perturbed(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Log weights with standard Gumbel noise: the k largest are a draw of k without replacement.

    The noise of a float32 is -log of an exponential variable E = -log(1 - v), v in the middle of one of 2^32
    equal parts of [0, 1]: one random word an entry, every probability within 2^-32, and the top of the race,
    where v is small, as fine as float32. (The float32 noise of `jax.random.gumbel` has 2^23 values, the
    largest about 16, so that races of millions end in ties; its mode "high" draws two words.)

    Args:
      key: a typed key.
      log_weights: [...] float32 or float64.

    Returns:
      The same shape and dtype; -inf stays -inf.

    Raises:
      TypeError: a legacy key, or weights of another dtype.

    Example:
      >>> int(jnp.argmax(perturbed(jax.random.key(0), jnp.array([-jnp.inf, 0.0, -jnp.inf]))))
      1
    """
    check_key(key)
    if log_weights.dtype == jnp.float64:
        return log_weights + jax.random.gumbel(key, log_weights.shape, jnp.float64)
    if log_weights.dtype != jnp.float32:
        raise TypeError(f"log_weights must be float32 or float64, got {log_weights.dtype}")
    words = jax.random.bits(key, log_weights.shape, jnp.uint32)
    v = (words.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    v = jnp.minimum(v, jnp.float32(1 - 2.0**-24))  # the conversion rounds up to 1
    return log_weights - jnp.log(-jnp.log1p(-v))


def gumbel_top_k_mask(
    key: jax.Array,
    log_weights: jax.Array,
    k: int | jax.Array,
    *,
    eligible: jax.Array | None = None,
    batch_dims: int = 0,
    bits_per_pass: int | None = None,
) -> jax.Array:
    """Draws exactly k entries without replacement, with probabilities proportional to their weights.

    The law is successive sampling (Plackett-Luce): one entry after the other, each with probability
    w_i / sum of the weights that are left. The k largest of log w_i + G_i, with independent standard Gumbel
    G_i, have exactly this law. The draw is the same on any number of devices.

    | case                      | result                                              |
    |---------------------------|-----------------------------------------------------|
    | log weight -inf or NaN    | never drawn                                         |
    | log weight inf            | drawn before every finite one, lowest index first   |
    | k above the drawable      | all that can be drawn                               |

    Args:
      key: a typed key.
      log_weights: [...] float; need not be normalised.
      k: how many; as in `top_k_mask`.
      eligible: bool, the shape of the weights: the candidates. None: all.
      batch_dims: the first `batch_dims` axes are draws of their own.
      bits_per_pass: see `top_k_mask`.

    Returns:
      A bool mask with the shape of the weights and min(k, number that can be drawn) entries True.

    Raises:
      TypeError: a legacy key, weights that are not floats, a k that is no integer.
      ValueError: a negative k, a mask or k of the wrong shape.

    References:
      J. I. Yellott, The relationship between Luce's choice axiom, Thurstone's theory of comparative judgment,
      and the double exponential distribution, J. Math. Psychology 15, 1977.
      T. Vieira, Gumbel-max trick and weighted reservoir sampling, 2014.
      W. Kool, H. van Hoof and M. Welling, Stochastic beams and where to find them, ICML 2019, arXiv
      1903.06059.

    Example:
      >>> mask = gumbel_top_k_mask(jax.random.key(0), jnp.array([0.0, -jnp.inf, 1.0, 2.0]), 2)
      >>> int(mask.sum()), bool(mask[1])
      (2, False)
    """
    check_key(key)
    log_weights = jnp.asarray(log_weights)
    if not jnp.issubdtype(log_weights.dtype, jnp.floating):
        raise TypeError(
            f"log_weights must be floats (the logarithms of the weights), got {log_weights.dtype}"
        )
    if log_weights.dtype.itemsize < 4:
        log_weights = log_weights.astype(jnp.float32)
    possible = log_weights > -jnp.inf
    eligible = possible if eligible is None else possible & eligible
    return top_k_mask(
        perturbed(key, log_weights), k, eligible=eligible, batch_dims=batch_dims, bits_per_pass=bits_per_pass
    )
