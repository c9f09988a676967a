"""Cannistraci-Hebb scores of absent links, straight from a bit-packed mask: a kernel for TPUs.

S = M_U A + A M_V^T on absent links, where A is the mask as 0 and 1 and M_U[u, b] = f(i, e) of the nodes b
that share i = (A A^T)[u, b] links with u and have e others (M_V alike for columns). The plain form writes M_U
and M_V, n^2 + m^2 numbers, to HBM. Here a block of M_U (of M_V) is made and used in VMEM: HBM holds the
words, 1 bit a link, and the scores.

One call makes M_U A and a second one, in place, adds A M_V^T. Each has a grid of (blocks of rows or columns
whose communities are looked at) x (phase one: blocks of the nodes they are compared with; phase two: blocks
of the result). A block of A is unpacked where it is used.

Source: Zhang et al. 2025, arXiv 2501.19107 (CH2-L3n, CH3-L3n); Muscoloni et al. 2022 (CH3.1). The matrix form
and the kernel are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from odjax_kernels.packing import GROUP, WORDS, check_words, over_matrices, unpack_tiles, unpack_words

Ref = Any  # a block of an operand in VMEM
NodeWeight = Callable[[jax.Array, jax.Array], jax.Array]

PREDICTORS: dict[str, NodeWeight] = {
    "CH2_L3n": lambda i, e: (1 + i) / (1 + e),
    "CH3_L3n": lambda i, e: 1 / (1 + e),
    "CH3.1_L3n": lambda i, e: (1 + i) * (1 + e) ** -(1 + e / (1 + e)),
}
"""f(i, e) of a node of the local community, with i >= 1 internal and e >= 0 external links."""

_LANES = 128
_LARGEST_SIDE = 1 << 16  # the sums of 8-bit digits stay integers that float32 holds
_DIGITS = (16, 8, 0)
_WEIGHTS_BYTES = 1 << 25  # of VMEM for a block of M, where a block of 256 rows or 128 columns fits


def _node_weights(common: jax.Array, degrees: jax.Array, weight: NodeWeight) -> jax.Array:
    external = degrees - common - 1
    return jnp.where((common > 0) & (external >= 0), weight(common, jnp.maximum(external, 0)), 0.0)


def _exponent(largest: jax.Array) -> jax.Array:
    """e with largest < 2^e, the smallest; 0 for 0. Normal numbers only, by their bits."""
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    return jnp.where(largest > 0, (bits >> 23) - 126, 0)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _fixed(weights: jax.Array, exponent: jax.Array) -> jax.Array:
    """Weights in units of 2^(exponent - 24): integers below 2^24, held as float32."""
    units = jnp.round(weights * _power_of_two(24 - exponent))
    return jnp.where(weights > 0, jnp.maximum(units, 1.0), 0.0)  # a path of length three is never lost


def _operands(weights: jax.Array, exact: bool) -> list[jax.Array]:
    """What the matrix unit multiplies with 0 and 1: digits of 8 bits, or the weights rounded to bfloat16."""
    if not exact:
        return [weights.astype(jnp.bfloat16)]
    units = weights.astype(jnp.int32)
    return [((units >> shift) & 255).astype(jnp.float32).astype(jnp.bfloat16) for shift in _DIGITS]


def _combined(sums: list[jax.Array], exponent: jax.Array, exact: bool) -> jax.Array:
    if not exact:
        return sums[0]
    high, middle, low = sums
    return (low * 2.0**-24 + middle * 2.0**-16 + high * 2.0**-8) * _power_of_two(exponent)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _slice(i: jax.Array | int, size: int) -> pl.Slice:
    return pl.ds(pl.multiple_of(i * size, size), size)


def _rows_kernel(
    own_words: Ref,
    row_words: Ref,
    column_words: Ref,
    degrees: Ref,
    out: Ref,
    own: Ref,
    weights: Ref,
    largest: Ref,
    *,
    weight: NodeWeight,
    exact: bool,
    blocks: int,
    lanes: int,
) -> None:
    """A block of rows of M_U A. own: those rows of A; weights: those of M_U."""
    step = pl.program_id(1)
    chunks = own.shape[1] // lanes
    size = row_words.shape[0] * 32

    @pl.when(step == 0)
    def unpack_own() -> None:
        def chunk(c: jax.Array, _: None) -> None:
            at = _slice(c, lanes)
            own[:, at] = unpack_tiles(own_words[:, at])

        jax.lax.fori_loop(0, chunks, chunk, None)
        largest[...] = jnp.zeros_like(largest)

    @pl.when(step < blocks)
    def compare() -> None:
        def chunk(c: jax.Array, total: jax.Array) -> jax.Array:
            at = _slice(c, lanes)
            return total + _dot(own[:, at], unpack_tiles(row_words[:, at]), (1, 1))

        common = jax.lax.fori_loop(0, chunks, chunk, jnp.zeros((own.shape[0], size), jnp.float32))
        block = _node_weights(common, degrees[...], weight)
        weights[:, _slice(step, size)] = block
        largest[...] = jnp.maximum(largest[...], jnp.max(block, axis=1, keepdims=True))

    @pl.when(step >= blocks)
    def multiply() -> None:
        exponent = _exponent(largest[:, :1])

        def chunk(c: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
            a = unpack_tiles(column_words[_slice(c, size // 32), :])
            block = weights[:, _slice(c, size)]
            parts = _operands(_fixed(block, exponent) if exact else block, exact)
            return [total + _dot(part, a, (1, 0)) for total, part in zip(totals, parts, strict=True)]

        zeros = [jnp.zeros(out.shape, jnp.float32)] * (len(_DIGITS) if exact else 1)
        sums = jax.lax.fori_loop(0, blocks, chunk, zeros)
        out[...] = _combined(sums, exponent, exact)


def _columns_kernel(
    own_words: Ref,
    column_words: Ref,
    row_words: Ref,
    degrees: Ref,
    left: Ref,
    out: Ref,
    own: Ref,
    weights: Ref,
    largest: Ref,
    *,
    weight: NodeWeight,
    exact: bool,
    blocks: int,
    lanes: int,
) -> None:
    """A block of columns of the scores. own: those columns of A; weights: those of M_V^T."""
    column, step = pl.program_id(0), pl.program_id(1)
    high = row_words.shape[0]
    chunks = own_words.shape[0] // high

    @pl.when(step == 0)
    def unpack_own() -> None:
        def chunk(c: jax.Array, _: None) -> None:
            own[_slice(c, high * 32), :] = unpack_tiles(own_words[_slice(c, high), :])

        jax.lax.fori_loop(0, chunks, chunk, None)
        largest[...] = jnp.zeros_like(largest)

    @pl.when(step < blocks)
    def compare() -> None:
        def chunk(c: jax.Array, total: jax.Array) -> jax.Array:
            others = unpack_tiles(column_words[_slice(c, high), :])
            return total + _dot(others, own[_slice(c, high * 32), :], (0, 0))

        common = jax.lax.fori_loop(0, chunks, chunk, jnp.zeros((lanes, lanes), jnp.float32))
        block = _node_weights(common, degrees[...].T[:, :1], weight)
        weights[_slice(step, lanes), :] = block
        largest[...] = jnp.maximum(largest[...], jnp.max(block, axis=0, keepdims=True))

    @pl.when(step >= blocks)
    def multiply() -> None:
        exponent = _exponent(largest[:1, :])

        def chunk(c: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
            at = _slice(c, lanes)
            a = unpack_tiles(row_words[:, at])
            parts = _operands(_fixed(weights[at, :], exponent) if exact else weights[at, :], exact)
            return [total + _dot(a, part, (1, 0)) for total, part in zip(totals, parts, strict=True)]

        zeros = [jnp.zeros(out.shape, jnp.float32)] * (len(_DIGITS) if exact else 1)
        sums = jax.lax.fori_loop(0, blocks, chunk, zeros)
        present = unpack_tiles(row_words[:, _slice(column, lanes)], jnp.float32) > 0
        out[...] = jnp.where(present, 0.0, left[...] + _combined(sums, exponent, exact))


def _vmem(*buffers: tuple[tuple[int, int], int]) -> pltpu.CompilerParams:
    """The limit for these buffers, (shape, bytes of a number), and for what the code holds."""
    total = sum(rows * columns * size for (rows, columns), size in buffers)
    limit = total + (24 << 20)
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit)


def _row_degrees(words: jax.Array) -> jax.Array:
    """Links of every row, in the order of the rows, without the unpacked mask: one bit after the other."""

    def bit(r: jax.Array) -> jax.Array:
        return jnp.sum((words >> r) & jnp.uint32(1), axis=1, dtype=jnp.int32)

    counts = jax.lax.map(bit, jnp.arange(32, dtype=jnp.uint32))  # [32, words]
    return jnp.swapaxes(counts.reshape(32, -1, WORDS), 0, 1).reshape(-1).astype(jnp.float32)


def _column_degrees(words: jax.Array) -> jax.Array:
    return jnp.sum(jax.lax.population_count(words), axis=0, dtype=jnp.uint32).astype(jnp.float32)


def _scores(
    words: jax.Array, n: int, m: int, weight: NodeWeight, exact: bool, lanes: int, interpret: object
) -> jax.Array:
    """Of words in whole groups and whole chunks of lanes."""
    high, wide = words.shape
    rows = 2 * GROUP if high % (2 * WORDS) == 0 and 8 * GROUP * high * 32 <= _WEIGHTS_BYTES else GROUP
    own_high = rows // 32
    tall = high * 32
    row_blocks, column_blocks = tall // rows, wide // lanes
    # Blocks over the edge write what is there. The TPU interpreter of jax 0.10.2 cannot do so in place.
    in_place = not isinstance(interpret, pltpu.InterpretParams)
    scores = jax.ShapeDtypeStruct((n, m) if in_place else (tall, wide), jnp.float32)
    options = {"weight": weight, "exact": exact, "lanes": lanes}

    def early(step: jax.Array, blocks: int) -> jax.Array:  # phase one walks, phase two waits at the end
        return jnp.minimum(step, blocks - 1)

    def late(step: jax.Array, blocks: int) -> jax.Array:  # phase one waits at the start
        return jnp.maximum(step - blocks, 0)

    left = pl.pallas_call(
        functools.partial(_rows_kernel, blocks=row_blocks, **options),
        out_shape=scores,
        grid=(row_blocks, row_blocks + column_blocks),
        in_specs=[
            pl.BlockSpec((own_high, wide), lambda u, step: (u, 0)),
            pl.BlockSpec((own_high, wide), lambda u, step: (early(step, row_blocks), 0)),
            pl.BlockSpec((high, lanes), lambda u, step: (0, late(step, row_blocks))),
            pl.BlockSpec((1, rows), lambda u, step: (0, early(step, row_blocks))),
        ],
        out_specs=pl.BlockSpec((rows, lanes), lambda u, step: (u, late(step, row_blocks))),
        scratch_shapes=[
            pltpu.VMEM((rows, wide), jnp.bfloat16),
            pltpu.VMEM((rows, tall), jnp.float32),
            pltpu.VMEM((rows, _LANES), jnp.float32),
        ],
        compiler_params=_vmem(
            ((rows, wide), 2), ((rows, tall), 4), ((4 * own_high, wide), 4), ((2 * high, lanes), 4)
        ),
        interpret=interpret,
        name="link_scores_rows",
    )(words, words, words, _row_degrees(words)[None])
    whole = pl.pallas_call(
        functools.partial(_columns_kernel, blocks=column_blocks, **options),
        out_shape=scores,
        grid=(column_blocks, column_blocks + row_blocks),
        in_specs=[
            pl.BlockSpec((high, lanes), lambda v, step: (0, v)),
            pl.BlockSpec((high, lanes), lambda v, step: (0, early(step, column_blocks))),
            pl.BlockSpec((own_high, wide), lambda v, step: (late(step, column_blocks), 0)),
            pl.BlockSpec((WORDS, lanes), lambda v, step: (0, early(step, column_blocks))),
            pl.BlockSpec((rows, lanes), lambda v, step: (late(step, column_blocks), v)),
        ],
        out_specs=pl.BlockSpec((rows, lanes), lambda v, step: (late(step, column_blocks), v)),
        scratch_shapes=[
            pltpu.VMEM((tall, lanes), jnp.bfloat16),
            pltpu.VMEM((wide, lanes), jnp.float32),
            pltpu.VMEM((WORDS, lanes), jnp.float32),
        ],
        input_output_aliases={4: 0},
        compiler_params=_vmem(
            ((tall, lanes), 2), ((wide, lanes), 4), ((2 * own_high, wide), 4), ((4 * high, lanes), 4)
        ),
        interpret=interpret,
        name="link_scores_columns",
    )(words, words, words, jnp.broadcast_to(_column_degrees(words), (WORDS, wide)), left)
    return whole if in_place else whole[:n, :m]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _link_scores(
    words: jax.Array,
    shape: tuple[int, int],
    weight: NodeWeight,
    exact: bool,
    lanes: int | None,
    interpret: object,
) -> jax.Array:
    n, m = shape
    each = min(WORDS, words.shape[-2])
    if lanes is None:
        lanes = min(4 * _LANES, -(-m // _LANES) * _LANES)
        while lanes % (2 * _LANES) == 0 and 4 * lanes * m > _WEIGHTS_BYTES:
            lanes //= 2

    def one(words: jax.Array) -> jax.Array:
        # Words of links that are not there: nodes without links change no score.
        words = jnp.pad(words, ((0, WORDS - each), (0, -m % lanes)))
        if each == WORDS:
            return _scores(words, n, m, weight, exact, lanes, interpret)
        # A narrow group is a whole one whose rows stand elsewhere, and scores move with their nodes.
        scores = _scores(words, GROUP, m, weight, exact, lanes, interpret)
        return scores.reshape(32, WORDS, m)[:, :each].reshape(32 * each, m)[:n]

    return over_matrices(one, words)


def link_scores(
    words: jax.Array,
    shape: tuple[int, int],
    predictor: str | NodeWeight = "CH2_L3n",
    *,
    exact: bool = True,
    lanes: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Scores of the absent links of a packed mask, in HBM nothing but the words and the scores. For TPUs.

    The same formula, and where `exact` the same bits, as `link_scores_reference`: see there.

    | memory   | link_scores                     | plain form                               |
    |----------|---------------------------------|------------------------------------------|
    | HBM      | n m / 8 + 4 n m bytes           | n^2 + m^2 numbers more                   |
    | VMEM     | up to 3072 max(n, m) bytes      |                                          |

    Args:
      words: uint32 [..., words, m], in the layout of `odjax_kernels.packing`; leading axes are layers, done
        one after the other.
      shape: (n, m) of the mask.
      predictor: a key of `PREDICTORS`, or f(i, e) itself (float32 arrays, at least 2^-60 where i >= 1).
      exact: node weights in fixed point, 24 bits below the largest of a row (a column): three products for
        one. False: weights rounded to bfloat16.
      lanes: columns in a block, a multiple of 128. None: up to 512, fewer where VMEM would not do.
      interpret: run as plain operations, on any platform.

    Returns:
      float32 [..., n, m]: positive exactly where the link is absent and a path of length three joins its
      ends, 0 elsewhere.

    Raises:
      TypeError: words that are not uint32.
      ValueError: words of another shape, an unknown predictor, 2^16 nodes a side or more, or a number of
        lanes that is no multiple of 128.

    Example:
      >>> from odjax_kernels.packing import pack_rows
      >>> words = pack_rows(jnp.array([[True, True, False], [False, True, True]]))
      >>> link_scores(words, (2, 3), interpret=True)
      Array([[0., 0., 4.],
             [4., 0., 0.]], dtype=float32)
    """
    words, n, m = check_words(words, shape)
    weight = _weight(predictor, n, m)
    if lanes is not None and (lanes < _LANES or lanes % _LANES):
        raise ValueError(f"lanes must be a multiple of {_LANES}, got {lanes}")
    return _link_scores(words, (n, m), weight, exact, lanes, interpret)


def link_scores_reference(
    words: jax.Array, shape: tuple[int, int], predictor: str | NodeWeight = "CH2_L3n", *, exact: bool = True
) -> jax.Array:
    """What `link_scores` computes, in plain jnp on any platform.

    Args:
      words: uint32 [..., words, m].
      shape: (n, m) of the mask.
      predictor: a key of `PREDICTORS`, or f(i, e) itself.
      exact: as in `link_scores`.

    Returns:
      float32 [..., n, m].

    Raises:
      TypeError: words that are not uint32.
      ValueError: words of another shape, an unknown predictor, or 2^16 nodes a side or more.

    Example:
      >>> from odjax_kernels.packing import pack_rows
      >>> words = pack_rows(jnp.array([[True, True, False], [False, True, True]]))
      >>> link_scores_reference(words, (2, 3), "CH3_L3n")
      Array([[0., 0., 2.],
             [2., 0., 0.]], dtype=float32)
    """
    words, n, m = check_words(words, shape)
    weight = _weight(predictor, n, m)

    def half(a: jax.Array) -> jax.Array:
        common = _dot(a, a, (1, 1))
        weights = _node_weights(common, jnp.sum(a, axis=1)[None], weight)
        exponent = _exponent(jnp.max(weights, axis=1, keepdims=True))
        parts = _operands(_fixed(weights, exponent) if exact else weights, exact)
        return _combined([_dot(part.astype(jnp.float32), a, (1, 0)) for part in parts], exponent, exact)

    def one(words: jax.Array) -> jax.Array:
        mask = unpack_words(words, n)
        a = mask.astype(jnp.float32)
        return jnp.where(mask, 0.0, half(a) + half(a.T).T)

    return over_matrices(one, words)


def _weight(predictor: str | NodeWeight, n: int, m: int) -> NodeWeight:
    if max(n, m) >= _LARGEST_SIDE:
        raise ValueError(f"link scores take fewer than 2^16 nodes a side, got {(n, m)}")
    if callable(predictor):
        return predictor
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}, got {predictor!r}")
    return PREDICTORS[predictor]
