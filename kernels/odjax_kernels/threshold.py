"""Weighted draws without replacement by a threshold, with noise that is never stored: a kernel for TPUs.

The k largest of log w_i + G_i, with independent standard Gumbel G_i, are a draw of k entries, one after the
other, each with probability proportional to the weights left (Plackett-Luce). The k-th largest key is found
from its top bits down, 4 bits a pass: a pass compares every key with 15 candidates and counts. Here a pass
makes the noise anew from a counter, so that HBM holds the log weights and one bit an entry, and neither noise
nor keys. A ninth pass writes the mask; it is the only one that may have to look at ties.

The noise of entry j (row-major) of slice s is made from the two words of Threefry-2x32 with 20 rounds of the
counter (s, j) under a key of two words, as `gumbel_noise` says. It has 57 bits in its tails: its values lie
between -3.7 and 39.5, where noise made of 24 bits ends at 16.6 and ties at the top of a race of millions.

Source: J. Salmon, M. Moraes, R. Dror and D. Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011; J. I.
Yellott, J. Math. Psychology 15, 1977 (the law). The kernel is ours.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from odjax_kernels.packing import BITS, GROUP, WORDS, check_words, pack_rows, unpack_words

Ref = Any  # a block of an operand in VMEM, or scalars
_LANES = 128
_CHUNK = 8 * _LANES
_BLOCK_BYTES = 1 << 21
_DIGIT = 4
_PASSES = 32 // _DIGIT
_CANDIDATES = (1 << _DIGIT) - 1
_NOTHING = -(1 << 31)  # the key of no number
_THRESHOLD, _ABOVE, _AT_LEAST, _LEFT, _BOUND = range(5)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry_2x32(
    key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds: two words that look random, of two words under a key of two.

    Args:
      key: two uint32.
      counter: two uint32 arrays of one shape.

    Returns:
      Two uint32 arrays of that shape.

    Source: Salmon et al. 2011, section 4.2 and its Random123 code (constants).

    Example:
      >>> zero = jnp.uint32(0)
      >>> [hex(word) for word in threefry_2x32((zero, zero), (zero, zero))]
      ['0x6b200159', '0x99ba4efe']
    """
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def _gumbel(high: jax.Array, low: jax.Array) -> jax.Array:
    """-log E with E exponential, from 64 bits: a uniform number or its complement, the smaller one."""
    high, low = (jax.lax.bitcast_convert_type(word, jnp.int32) for word in (high, low))
    upper = high < 0
    high, low = jnp.where(upper, ~high, high), jnp.where(upper, ~low, low)
    fraction = (jax.lax.shift_right_logical(low, 8).astype(jnp.float32) + 0.5) * 2.0**-24
    v = (high.astype(jnp.float32) + fraction) * 2.0**-32  # in [2^-57, 1/2]
    # E = -log v, or -log(1 - v) without the loss of 1 - v.
    rest = 1.0 - v
    lost = jnp.where(rest == 1.0, 1.0, 1.0 - rest)
    small = jnp.where(rest == 1.0, v, -jnp.log(rest) * (v / lost))
    return -jnp.log(jnp.where(upper, -jnp.log(v), small))


def gumbel_noise(seed: jax.Array, shape: tuple[int, int], index: int | jax.Array = 0) -> jax.Array:
    """The noise of one matrix of weights, in plain jnp.

    With (x, y) = Threefry-2x32 of (index, j) under the seed and V = (2^32 x + y) / 2^64, it is
    -log(-log(1 - V)), where V or 1 - V, the smaller one, keeps 24 significant bits down to 2^-57.

    Args:
      seed: uint32 [2].
      shape: (n, m); entry j = row m + column.
      index: of the matrix among the slices of a batch.

    Returns:
      float32 [n, m], standard Gumbel.

    Example:
      >>> gumbel_noise(jnp.array([1, 2], jnp.uint32), (2, 2)).shape
      (2, 2)
    """
    flat = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    slices = jnp.full(shape, jnp.asarray(index).astype(jnp.uint32))
    return _gumbel(*threefry_2x32((seed[0], seed[1]), (slices, flat)))


def _ordered(z: jax.Array) -> jax.Array:
    """int32 in the order of the keys; -2^31 for those that are no candidates (-inf and NaN)."""
    bits = jax.lax.bitcast_convert_type(jnp.where(z == 0, 0.0, z), jnp.int32)  # -0.0 equals 0.0
    return jnp.where(z > -jnp.inf, jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _NOTHING)


def _kernel(
    scalars: Ref,
    x: Ref,
    eligible: Ref | None,
    words: Ref,
    keys: Ref,
    counts: Ref,
    state: Ref,
    *,
    shape: tuple[int, int],
    blocks: int,
) -> None:
    """One block of rows in one pass. scalars: the seed, the slice, k; state: what passes tell one another."""
    turn, block = pl.program_id(0), pl.program_id(1)
    n, m = shape
    rows, wide = keys.shape
    tiles = rows // WORDS
    first_tile = block * tiles
    k = jnp.maximum(scalars[3], 0)

    def over_chunks(one: Any, start: Any) -> Any:
        """Folds one(tile, slice of lanes, their number, total) over the block, in pieces of eight rows."""
        whole, rest = divmod(wide, _CHUNK)

        def tile(t: jax.Array, total: Any) -> Any:
            if whole:
                total = jax.lax.fori_loop(
                    0,
                    whole,
                    lambda c, total: one(t, pl.multiple_of(c * _CHUNK, _CHUNK), _CHUNK, total),
                    total,
                )
            return one(t, whole * _CHUNK, rest, total) if rest else total

        return jax.lax.fori_loop(0, tiles, tile, start)

    def place(t: jax.Array, start: Any, width: int) -> tuple[Any, Any]:
        return pl.ds(pl.multiple_of(t * WORDS, WORDS), WORDS), pl.ds(start, width)

    def folded(hits: jax.Array) -> jax.Array:
        hits = hits.astype(jnp.int32)
        return sum(hits[:, at : at + _LANES] for at in range(0, hits.shape[1], _LANES))

    def local(t: jax.Array, start: Any, width: int) -> tuple[jax.Array, jax.Array]:
        row = jax.lax.broadcasted_iota(jnp.int32, (WORDS, width), 0) + t * WORDS
        return row, jax.lax.broadcasted_iota(jnp.int32, (WORDS, width), 1) + start

    # Keys are made here and nowhere else, so that every pass sees the same ones to the last bit.
    def make(t: jax.Array, start: Any, width: int, _: None) -> None:
        row, column = local(t, start, width)
        row = row + block * rows
        flat = jax.lax.bitcast_convert_type(row * m + column, jnp.uint32)
        words = [
            jax.lax.bitcast_convert_type(jnp.full((WORDS, width), scalars[at], jnp.int32), jnp.uint32)
            for at in range(3)
        ]
        noise = _gumbel(*threefry_2x32((words[0], words[1]), (words[2], flat)))
        z = x[place(t, start, width)] + noise
        inside = (row < n) & (column < m)
        if eligible is not None:
            bit = (first_tile + t) & (BITS - 1)
            inside = inside & (((eligible[:, pl.ds(start, width)] >> bit) & 1) != 0)
        keys[place(t, start, width)] = jnp.where(inside, _ordered(z), _NOTHING)

    over_chunks(make, None)

    @pl.when((turn == 0) & (block == 0))
    def begin() -> None:
        state[_THRESHOLD] = 0
        state[_ABOVE] = 0
        state[_AT_LEAST] = -1

    @pl.when(block == 0)
    def reset() -> None:
        counts[...] = jnp.zeros_like(counts)

    @pl.when(turn < _PASSES)
    def search() -> None:
        shift = 32 - _DIGIT * (turn + 1)
        # Thresholds are unsigned, keys signed: the same order with the top bit flipped.
        candidates = [(state[_THRESHOLD] + (j << shift)) ^ _NOTHING for j in range(1, _CANDIDATES + 1)]

        def count(t: jax.Array, start: Any, width: int, _: None) -> None:
            here = keys[place(t, start, width)]
            for j, candidate in enumerate(candidates):
                counts[j] += folded(here >= candidate)

        over_chunks(count, None)

        @pl.when(block == blocks - 1)
        def narrow() -> None:
            digit, above, at_least = jnp.int32(0), state[_ABOVE], state[_AT_LEAST]
            for j in range(_CANDIDATES):  # fewer and fewer
                total = jnp.sum(counts[j])
                enough = total >= k
                digit += enough.astype(jnp.int32)
                at_least = jnp.where(enough, total, at_least)
                above = jnp.where(enough, above, jnp.maximum(above, total))
            state[_THRESHOLD] += digit << shift
            state[_ABOVE] = above
            state[_AT_LEAST] = at_least
            state[_LEFT] = k - above

    @pl.when(turn == _PASSES)
    def write() -> None:
        threshold = state[_THRESHOLD] ^ _NOTHING

        def ties(t: jax.Array, start: Any, width: int) -> jax.Array:
            here = keys[place(t, start, width)]
            return (here == threshold) & (here > _NOTHING)

        def number(bound: Any) -> jax.Array:
            """Of the ties in the block before a place in it."""

            def count(t: jax.Array, start: Any, width: int, total: jax.Array) -> jax.Array:
                row, column = local(t, start, width)
                return total + folded(ties(t, start, width) & (row * wide + column < bound))

            return jnp.sum(over_chunks(count, jnp.zeros((WORDS, _LANES), jnp.int32)))

        everything = rows * wide
        state[_BOUND] = everything

        @pl.when(state[_AT_LEAST] != k)
        def cut() -> None:
            here = number(everything)
            left = state[_LEFT]
            state[_LEFT] = jnp.maximum(left - here, 0)

            @pl.when(here > left)
            def find() -> None:
                bits = everything.bit_length()

                def refine(i: jax.Array, bound: jax.Array) -> jax.Array:
                    more = bound + (1 << (bits - 1 - i))
                    return jnp.where(number(more) <= left, more, bound)

                state[_BOUND] = jax.lax.fori_loop(0, bits, refine, jnp.int32(0))

        @pl.when(first_tile & (BITS - 1) == 0)
        def clear() -> None:
            words[...] = jnp.zeros_like(words)

        bound = state[_BOUND]

        def mark(t: jax.Array, start: Any, width: int, _: None) -> None:
            row, column = local(t, start, width)
            above = keys[place(t, start, width)] > threshold
            taken = above | (ties(t, start, width) & (row * wide + column < bound))
            words[:, pl.ds(start, width)] |= taken.astype(jnp.int32) << ((first_tile + t) & (BITS - 1))

        over_chunks(mark, None)


def _draw(
    scalars: jax.Array, x: jax.Array, eligible: jax.Array | None, interpret: bool | pltpu.InterpretParams
) -> jax.Array:
    n, m = x.shape
    wide = -(-m // _LANES) * _LANES
    rows = GROUP
    while rows > WORDS and (rows * wide * 4 > _BLOCK_BYTES or rows >= 2 * n):
        rows //= 2
    blocks, groups = -(-n // rows), (GROUP // rows).bit_length() - 1  # blocks of a group: a power of two
    in_specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((rows, wide), lambda turn, block: (block, 0)),
    ]
    operands = [scalars, x]
    if eligible is not None:
        in_specs.append(pl.BlockSpec((WORDS, wide), lambda turn, block: (block >> groups, 0)))
        operands.append(jax.lax.bitcast_convert_type(eligible, jnp.int32))
    body = functools.partial(_kernel, shape=(n, m), blocks=blocks)
    words = pl.pallas_call(
        body if eligible is not None else lambda scalars, x, *rest: body(scalars, x, None, *rest),
        out_shape=jax.ShapeDtypeStruct((WORDS * -(-n // GROUP), m), jnp.int32),
        grid=(_PASSES + 1, blocks),
        in_specs=in_specs,
        out_specs=pl.BlockSpec(
            (WORDS, wide), lambda turn, block: (jnp.where(turn == _PASSES, block >> groups, 0), 0)
        ),
        scratch_shapes=[
            pltpu.VMEM((rows, wide), jnp.int32),
            pltpu.VMEM((_CANDIDATES, WORDS, _LANES), jnp.int32),
            pltpu.SMEM((5,), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=3 * rows * wide * 4 + 4 * WORDS * wide * 4 + (16 << 20),
        ),
        interpret=interpret,
        name="gumbel_threshold",
    )(*operands)
    return jax.lax.bitcast_convert_type(words, jnp.uint32)


def _slices(log_weights: Any, k: Any, eligible: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Checked arguments: weights [slices, n, m], k [slices], words of the candidates [slices, words, m]."""
    log_weights = jnp.asarray(log_weights)
    came = f"{log_weights.dtype}{list(log_weights.shape)}"
    if log_weights.dtype != jnp.float32:
        raise TypeError(f"log_weights must be float32 (logarithms of the weights), got {came}")
    if log_weights.ndim < 2 or not log_weights.size:
        raise ValueError(
            f"log_weights must be [..., n, m] with entries, got {came}: reshape to a matrix first"
        )
    batch, (n, m) = log_weights.shape[:-2], log_weights.shape[-2:]
    if n * m >= 1 << 30:
        raise ValueError(f"one draw is from fewer than 2^30 entries, got {came}: use leading axes")
    if isinstance(k, int) and k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    k = jnp.asarray(k)
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(f"k must be an integer, got {k.dtype}: round a density times the size first")
    if k.ndim and k.shape != batch:
        raise ValueError(f"k must be a scalar or have the batch shape {batch}, got {k.shape}")
    count = math.prod(batch)
    if eligible is not None:
        eligible = check_words(eligible, (n, m), "eligible")[0]
        if eligible.shape[:-2] != batch:
            raise ValueError(f"eligible must have the batch shape {batch}, got {eligible.shape[:-2]}")
        eligible = eligible.reshape(count, *eligible.shape[-2:])
    k = jnp.broadcast_to(k.reshape(-1), (count,)).astype(jnp.int32)
    return log_weights.reshape(count, n, m), k, eligible


def gumbel_threshold_mask(
    key: jax.Array,
    log_weights: jax.Array,
    k: int | jax.Array,
    *,
    eligible: jax.Array | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Draws exactly k entries of a matrix without replacement, in proportion to their weights. For TPUs.

    The draw of `gumbel_threshold_mask_reference`, with the same noise. HBM traffic is nine times the log
    weights, and the words; nothing else of the size of the matrix is held.

    | case                      | result                                              |
    |---------------------------|-----------------------------------------------------|
    | log weight -inf or NaN    | never drawn                                         |
    | log weight inf            | drawn before every finite one, lowest index first   |
    | k above the drawable      | all that can be drawn                               |
    | k = 0, or a traced k < 0  | nothing                                             |

    Args:
      key: a typed key, of any generator: two words of it are the seed of `gumbel_noise`.
      log_weights: float32 [..., n, m]; need not be normalised. Leading axes are draws of their own.
      k: how many; an int, or an integer array, which may be traced, scalar or of the batch shape.
      eligible: uint32 [..., words, m], the candidates as a packed mask (`odjax_kernels.packing`). None: all.
      interpret: run as plain operations, on any platform.

    Returns:
      uint32 [..., words, m]: the packed mask, with min(k, number that can be drawn) bits in every slice.

    Raises:
      TypeError: weights that are not float32, a k that is no integer, or words that are not uint32.
      ValueError: no matrix, 2^30 entries or more, a negative k, or a k or words of another shape.

    Example:
      >>> log_weights = jnp.array([[0.0, -jnp.inf], [1.0, 2.0]])
      >>> words = gumbel_threshold_mask(jax.random.key(0), log_weights, 2, interpret=True)
      >>> int(jax.lax.population_count(words).sum()), int(words[0, 1] & 1)
      (2, 0)
    """
    x, ks, candidates = _slices(log_weights, k, eligible)
    out = _over_slices(jax.random.bits(key, (2,), jnp.uint32), x, ks, candidates, interpret)
    return out.reshape(*jnp.shape(log_weights)[:-2], *out.shape[1:])


@functools.partial(jax.jit, static_argnums=4)
def _over_slices(
    seed: jax.Array,
    x: jax.Array,
    ks: jax.Array,
    eligible: jax.Array | None,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
    n = x.shape[1]
    narrow = n <= GROUP - BITS  # words of less than eight to a group: another layout, for little

    def one(arguments: tuple[jax.Array, ...]) -> jax.Array:
        index, x, k, eligible = arguments
        scalars = jnp.stack([*jax.lax.bitcast_convert_type(seed, jnp.int32), index, k])
        if narrow and eligible is not None:
            full = jnp.pad(unpack_words(eligible, n), ((0, GROUP - n), (0, 0)))
            eligible = pack_rows(full)
        words = _draw(scalars, x, eligible, interpret)
        return pack_rows(unpack_words(words, n)) if narrow else words

    index = jnp.arange(x.shape[0], dtype=jnp.int32)
    if x.shape[0] == 1:
        return one((index[0], x[0], ks[0], None if eligible is None else eligible[0]))[None]
    return jax.lax.map(one, (index, x, ks, eligible))


def gumbel_threshold_mask_reference(
    key: jax.Array, log_weights: jax.Array, k: int | jax.Array, *, eligible: jax.Array | None = None
) -> jax.Array:
    """What `gumbel_threshold_mask` draws, in plain jnp: a sort of the same keys.

    Args:
      key: a typed key.
      log_weights: float32 [..., n, m].
      k: how many.
      eligible: uint32 [..., words, m]. None: all.

    Returns:
      uint32 [..., words, m].

    Raises:
      TypeError: as `gumbel_threshold_mask`.
      ValueError: as `gumbel_threshold_mask`.

    Example:
      >>> words = gumbel_threshold_mask_reference(jax.random.key(0), jnp.zeros((2, 3)), 4)
      >>> int(jax.lax.population_count(words).sum())
      4
    """
    x, ks, candidates = _slices(log_weights, k, eligible)
    n, m = x.shape[1:]
    seed = jax.random.bits(key, (2,), jnp.uint32)
    allowed = jnp.ones(x.shape, bool)
    if candidates is not None:
        allowed = jax.vmap(lambda words: unpack_words(words, n))(candidates)

    def one(index: jax.Array, x: jax.Array, k: jax.Array, allowed: jax.Array) -> jax.Array:
        z = x + gumbel_noise(seed, (n, m), index)
        possible = jnp.ravel(allowed & (z > -jnp.inf))
        order = jnp.argsort(jnp.where(possible, -jnp.ravel(z), jnp.inf), stable=True)
        # Those that cannot be drawn are ordered as inf; an entry whose key is -inf is one of them.
        taken = jnp.zeros(n * m, bool).at[order].set(jnp.arange(n * m) < k) & possible
        return pack_rows(taken.reshape(n, m))

    out = jax.vmap(one)(jnp.arange(x.shape[0]), x, ks, allowed)
    return out.reshape(*jnp.shape(log_weights)[:-2], *out.shape[1:])
