"""Cannistraci-Hebb scores of the absent links of a bipartite graph, node based: matrix products, no gradient.

A layer is a graph between inputs and outputs. An absent link scores high when many paths of length three join
its ends and the nodes on those paths keep to themselves: `i` counts the links of such a node inside the local
community, `e` those that leave it, and a node is worth f(i, e).

Source: Zhang et al. 2025, "Brain network science modelling of sparse neural networks enables Transformers and
LLMs to perform as fully connected", section 3 and appendix; Muscoloni, Michieli, Zhang and Cannistraci 2022,
"Adaptive network automata modelling of complex networks" (CH2, CH3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

NodeWeight = Callable[[jax.Array, jax.Array], jax.Array]

NODE_PREDICTORS: dict[str, NodeWeight] = {
    "CH2_L3n": lambda i, e: (1 + i) / (1 + e),
    "CH3_L3n": lambda i, e: 1 / (1 + e),
    "CH3.1_L3n": lambda i, e: (1 + i) * (1 + e) ** -(1 + e / (1 + e)),
}
"""f(i, e) of a node of the local community, with i >= 1 internal and e >= 0 external links."""

_LARGEST_COUNT = 1 << 24  # beyond it float32 does not hold every integer
_BITS = 32
_WORDS = 16  # counted together; 8 and 32 are slower (measured)


def check_mask(mask: Any, name: str = "mask") -> jax.Array:
    """Makes sure that a mask is a stack of bool matrices whose counts are exact.

    Args:
      mask: what came.
      name: the argument's name for the error.

    Returns:
      The mask as an array, bool [..., n, m].

    Raises:
      TypeError: it is not bool.
      ValueError: fewer than two axes, or an axis of 2^24 nodes or more.

    Example:
      >>> check_mask(jnp.ones((2, 3)))
      Traceback (most recent call last):
      TypeError: mask must be bool [..., n, m], got float32[2, 3]: type mask != 0
    """
    mask = jnp.asarray(mask)
    came = f"{mask.dtype}{list(mask.shape)}"
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{name} must be bool [..., n, m], got {came}: type {name} != 0")
    if mask.ndim < 2:
        raise ValueError(f"{name} must be bool [..., n, m], got {came}: reshape a kernel to a matrix first")
    if max(mask.shape[-2:]) >= _LARGEST_COUNT:
        raise ValueError(
            f"{name} must have fewer than 2^24 nodes a side (counts are exact there), got {came}"
        )
    return mask


def common_neighbours(mask: jax.Array) -> jax.Array:
    """How many neighbours each two rows share: A A^T, in exact integers.

    Args:
      mask: bool [..., n, m]. Transpose it for the columns.

    Returns:
      int32 [..., n, n]; the diagonal is the degrees.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: fewer than two axes, or 2^24 nodes a side.

    Example:
      >>> common_neighbours(jnp.array([[True, True, False], [False, True, True]]))
      Array([[2, 1],
             [1, 2]], dtype=int32)
    """
    a = check_mask(mask).astype(jnp.float32)
    return shared_links(a, a).astype(jnp.int32)


def shared_links(rows: jax.Array, every: jax.Array) -> jax.Array:
    """Counts of shared neighbours in float32, which are exact integers in every matmul precision.

    A matrix product whose operands are 0 and 1, which bfloat16 and TF32 hold too, with float32 accumulators.
    On a CPU the ones of packed words are counted instead.

    Args:
      rows: float32 [..., r, m] of 0 and 1.
      every: float32 [..., n, m] of 0 and 1.

    Returns:
      float32 [..., r, n].
    """

    def product(rows: jax.Array, every: jax.Array) -> jax.Array:
        return jnp.matmul(rows, jnp.swapaxes(every, -1, -2), preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(rows, every, cpu=_ones_in_common, default=product)


def _ones_in_common(rows: jax.Array, every: jax.Array) -> jax.Array:
    left, right = _words(rows), _words(every)
    start = jnp.zeros((*rows.shape[:-1], every.shape[-2]), jnp.uint32)

    def more(total: jax.Array, words: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        # Written out: the compiler turns a sum over an axis into one that keeps all pairs in memory.
        for one, other in zip(*words, strict=True):
            total += jax.lax.population_count(one[..., :, None] & other[..., None, :])
        return total, None

    return jax.lax.scan(more, start, (left, right))[0].astype(jnp.float32)


def _words(rows: jax.Array) -> jax.Array:
    """Zeros and ones [..., r, m] as uint32 [chunks, words of a chunk, ..., r]: a word is 32 columns."""
    *batch, count, columns = rows.shape
    words = -(-columns // _BITS)
    chunk = min(words, _WORDS)
    total = -(-words // chunk) * chunk
    padded = jnp.pad(rows != 0, [(0, 0)] * (rows.ndim - 1) + [(0, total * _BITS - columns)])
    bits = jnp.reshape(padded, (*batch, count, total, _BITS)).astype(jnp.uint32)
    shifts = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1)
    packed = jnp.sum(bits << shifts, axis=-1, dtype=jnp.uint32)
    return jnp.reshape(jnp.moveaxis(packed, -1, 0), (total // chunk, chunk, *batch, count))


def node_weights(common: jax.Array, degrees: jax.Array, weight: NodeWeight) -> jax.Array:
    """f(i, e) of every node b that can lie in a local community of u, 0 for the others.

    Args:
      common: float32 [r, n], the links shared by u (a row) and b (a column), which are internal to b.
      degrees: float32 [n] of b.
      weight: f.

    Returns:
      float32 [r, n].
    """
    # One of b's links goes to the other end v of the absent link. Where b has no link but those shared with u
    # there is no such v: leaving those out (the diagonal among them) keeps the largest weight of a row small.
    external = degrees[None, :] - common - 1
    return jnp.where((common > 0) & (external >= 0), weight(common, jnp.maximum(external, 0)), 0)


def ch_scores(
    mask: jax.Array,
    predictor: str = "CH2_L3n",
    *,
    row_block: int | None = None,
    exact: bool = True,
    precision: jax.lax.PrecisionLike = None,
    implementation: Literal["xla", "pallas"] = "xla",
) -> jax.Array:
    """Scores of the absent links, a sum over the nodes of their local communities.

    With A the mask as 0 and 1, M_U[u, b] = f(i, e) for the inputs b that share outputs with u, and M_V alike
    for the outputs: S = M_U A + A M_V^T on absent links, 0 on present ones. 4 n m (n + m) operations, and no
    gradient.

    | predictor   | f(i, e)                           |
    |-------------|-----------------------------------|
    | `CH2_L3n`   | (1 + i) / (1 + e)                 |
    | `CH3_L3n`   | 1 / (1 + e)                       |
    | `CH3.1_L3n` | (1 + i) / (1 + e)^(1 + e/(1 + e)) |

    Rows and columns of the mask mean the same: the scores of the transposed mask are the transposed scores.

    Args:
      mask: bool [..., n, m]; leading axes are layers of their own.
      predictor: a key of `NODE_PREDICTORS`.
      row_block: nodes whose communities are looked at together. None: all of them, some n^2 + m^2 floats a
        layer and all layers at once; otherwise some row_block (n + m), one layer after the other.
      exact: sum in fixed point, so that the scores are the same bits for any `row_block`, any batch, any
        number of devices and any order of the nodes, and links with equal scores stay equal. Three products
        in bfloat16 for one in float32; node weights are cut at 2^-24 of the largest one of a row or column.
        False: float32.
      precision: of the products with M where not exact, as in `jax.lax.dot_general`. Counts are always exact.
        `jax.lax.DotAlgorithmPreset.BF16_BF16_F32` rounds M to bfloat16 on every platform.
      implementation: "xla", or "pallas" for a kernel on a TPU that keeps no M in memory
        (`odjax_kernels.link_scores`), one layer after the other; elsewhere that is "xla". The same bits where
        exact, and M rounded to bfloat16 where not. XLA cannot divide a kernel over devices: in a program of
        several call it inside `jax.shard_map`.

    Returns:
      float32 [..., n, m]: positive exactly where the link is absent and a path of length three joins its
      ends, 0 elsewhere.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: fewer than two axes, an unknown predictor or implementation, a row_block below 1, more than
        2^16 nodes a side or a precision with `exact`, or a precision with "pallas".

    Source: Zhang et al. 2025, arXiv 2501.19107, section 3 (CH2-L3n, CH3-L3n); the authors' code (CH3.1-L3n).
      The matrix form is ours.

    Example:
      >>> ch_scores(jnp.array([[True, True, False], [False, True, True]]))
      Array([[0., 0., 4.],
             [4., 0., 0.]], dtype=float32)
    """
    mask = check_mask(mask)
    _check_options(mask, predictor, row_block, exact, precision)
    if implementation == "xla":
        return _scores(mask, predictor, row_block, exact, precision)
    if implementation != "pallas":
        raise ValueError(f"implementation must be 'xla' or 'pallas', got {implementation!r}")
    if precision is not None:
        raise ValueError(
            f"precision={precision!r} is for implementation='xla': the kernel multiplies bfloat16"
        )
    return jax.lax.platform_dependent(
        mask,
        tpu=functools.partial(_kernel_scores, predictor=predictor, exact=exact),
        default=lambda mask: _scores(mask, predictor, row_block, exact, precision),
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _scores(
    mask: jax.Array, predictor: str, row_block: int | None, exact: bool, precision: jax.lax.PrecisionLike
) -> jax.Array:
    def one(mask: jax.Array) -> jax.Array:
        a = mask.astype(jnp.float32)
        left, right = (_half(x, x, predictor, row_block, precision, exact) for x in (a, a.T))
        return jnp.where(mask, 0, left + right.T)

    return over_layers(one, mask, sequential=row_block is not None)


def _kernel_scores(mask: jax.Array, predictor: str, exact: bool) -> jax.Array:
    # Pallas is loaded where it is used.
    from odjax_kernels.link_scores import link_scores
    from odjax_kernels.packing import pack_rows

    def one(mask: jax.Array) -> jax.Array:
        return link_scores(pack_rows(mask), mask.shape, NODE_PREDICTORS[predictor], exact=exact)

    return over_layers(one, mask, sequential=True)


def sharded_ch_scores(
    mask: jax.Array,
    predictor: str = "CH2_L3n",
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str | tuple[str, ...] | None = None,
    row_block: int | None = None,
    exact: bool = True,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """`ch_scores` of one graph computed by many devices: the work and the memory divide by their number.

    Every device holds the whole mask (bool), looks at its share of the inputs and of the outputs, and one
    all-to-all of a share of the scores brings the two together. No score is gathered, as long as the devices
    divide n or m. Where they divide neither, XLA has no even layout for the result: a program whose output
    are the scores gathers them, one that goes on to select links gathers only the selected mask.

    Args:
      mask: bool [..., n, m], sharded in any way.
      predictor: a key of `NODE_PREDICTORS`.
      mesh: of the devices, its axes automatic (`AxisType.Auto`). None: the mesh in force, of `jax.set_mesh`;
        where there is none, this is `ch_scores`.
      axis: name of the mesh axis, or axes, to divide the work over. None: all of them.
      row_block: as in `ch_scores`, of one device.
      exact: as in `ch_scores`.
      precision: as in `ch_scores`.

    Returns:
      float32 [..., n, m], its rows sharded over `axis`; its columns where the devices divide m but not n.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: as `ch_scores`, an axis that the mesh does not have, or one that is not automatic.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> sharded_ch_scores(jnp.array([[True, True, False], [False, True, True]]), mesh=mesh, axis="data")
      Array([[0., 0., 4.],
             [4., 0., 0.]], dtype=float32)
    """
    mask = check_mask(mask)
    _check_options(mask, predictor, row_block, exact, precision)
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
    if axis is None:
        axis = tuple(mesh.axis_names)
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in axes:
        if mesh.empty:
            raise ValueError(f"no mesh is in force for the axis {name!r}: type mesh=, or jax.set_mesh(mesh)")
        if name not in mesh.shape:
            raise ValueError(f"the mesh has no axis {name!r}, only {', '.join(map(repr, mesh.shape))}")
        kind = mesh.axis_types[mesh.axis_names.index(name)]
        if kind != AxisType.Auto:
            raise ValueError(
                f"the mesh axis {name!r} must be of type Auto, got {kind.name}: name others with axis="
            )
    if not axes:
        return _scores(mask, predictor, row_block, exact, precision)
    return _sharded_scores(mask, predictor, mesh, axes, row_block, exact, precision)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _sharded_scores(
    mask: jax.Array,
    predictor: str,
    mesh: Mesh | AbstractMesh,
    axes: tuple[str, ...],
    row_block: int | None,
    exact: bool,
    precision: jax.lax.PrecisionLike,
) -> jax.Array:
    devices = math.prod(mesh.shape[name] for name in axes)
    n, m = mask.shape[-2:]
    turned = n % devices != 0 and m % devices == 0
    if turned:  # the side that the devices divide is the one that comes out in shards
        mask, n, m = jnp.swapaxes(mask, -1, -2), m, n
    # Nodes without links change no score.
    padded = jnp.pad(mask, [(0, 0)] * (mask.ndim - 2) + [(0, -n % devices), (0, -m % devices)])

    def one(mask: jax.Array) -> jax.Array:
        a = mask.astype(jnp.float32)
        here = jax.lax.axis_index(axes)

        def share(x: jax.Array) -> jax.Array:
            size = x.shape[0] // devices
            return jax.lax.dynamic_slice_in_dim(x, here * size, size)

        left, right = (_half(share(x), x, predictor, row_block, precision, exact) for x in (a, a.T))
        right = jax.lax.all_to_all(right.T, axes, split_axis=0, concat_axis=1, tiled=True)
        return jnp.where(share(mask), 0, left + right)

    scores = jax.shard_map(
        lambda mask: over_layers(one, mask, sequential=True),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(*[None] * (mask.ndim - 2), axes, None),
        axis_names=set(axes),
        check_vma=False,
    )(padded)[..., :n, :m]
    return jnp.swapaxes(scores, -1, -2) if turned else scores


def over_layers(one: Callable[[jax.Array], jax.Array], mask: jax.Array, *, sequential: bool) -> jax.Array:
    """Maps a function of one matrix over the leading axes of a mask.

    Args:
      one: bool [n, m] -> an array.
      mask: bool [..., n, m].
      sequential: one layer after the other (the memory of one) instead of all at once.

    Returns:
      What `one` gives, with the leading axes of the mask.
    """
    batch = mask.shape[:-2]
    if not batch:
        return one(mask)
    flat = jnp.reshape(mask, (math.prod(batch), *mask.shape[-2:]))
    out = jax.lax.map(one, flat) if sequential else jax.vmap(one)(flat)
    return jnp.reshape(out, (*batch, *out.shape[1:]))


def _half(
    rows: jax.Array,
    a: jax.Array,
    predictor: str,
    row_block: int | None,
    precision: jax.lax.PrecisionLike,
    exact: bool,
) -> jax.Array:
    """M_U A for some rows of a graph, [r, m], from blocks of rows of M_U."""
    degrees, weight = jnp.sum(a, axis=1), NODE_PREDICTORS[predictor]

    def block(rows: jax.Array) -> jax.Array:
        weights = node_weights(shared_links(rows, a), degrees, weight)
        if exact:
            return _exact_product(weights, a)
        if precision == jax.lax.DotAlgorithmPreset.BF16_BF16_F32:  # on CPUs XLA multiplies float32 for it
            operands, kind = (weights.astype(jnp.bfloat16), a.astype(jnp.bfloat16)), None
        else:
            operands, kind = (weights, a), precision
        return jnp.matmul(*operands, precision=kind, preferred_element_type=jnp.float32)

    count = rows.shape[0]
    if row_block is None or row_block >= count:
        return block(rows)
    blocks = -(-count // row_block)
    padded = jnp.pad(rows, ((0, blocks * row_block - count), (0, 0)))
    out = jax.lax.map(block, jnp.reshape(padded, (blocks, row_block, rows.shape[1])))
    return jnp.reshape(out, (blocks * row_block, a.shape[1]))[:count]


def _exact_product(weights: jax.Array, a: jax.Array) -> jax.Array:
    """weights @ a, in fixed point: the same bits in whatever order the products are summed.

    Each row is written in 24 bits below the row's largest weight, cut into digits. Products of digits with 0
    and 1 are integers that the operands of the matrix unit hold, and their sums are integers that float32
    holds.
    """
    largest = jnp.max(weights, axis=1, keepdims=True, initial=0)
    exponent = jnp.frexp(largest)[1]
    one = jnp.ones_like(largest)
    # Powers of two, so that scaling a row is exact.
    fixed = jnp.rint(weights * jnp.ldexp(one, 24 - exponent)).astype(jnp.int32)
    fixed = jnp.where(weights > 0, jnp.maximum(fixed, 1), 0)  # a path of length three is never lost

    def digit(shift: int) -> jax.Array:
        part = ((fixed >> shift) & 255).astype(jnp.bfloat16)
        sums = jnp.matmul(part, a.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        return sums * 2.0 ** (shift - 24)

    # From the lowest digit up; a power of two changes no digit of a sum.
    total = digit(0) + digit(8) + digit(16)
    return total * jnp.ldexp(one, exponent)


def _check_options(
    mask: jax.Array, predictor: str, row_block: int | None, exact: bool, precision: jax.lax.PrecisionLike
) -> None:
    if predictor not in NODE_PREDICTORS:
        hint = "; for a sum over paths use path_scores" if str(predictor).endswith("L3p") else ""
        raise ValueError(f"predictor must be one of {', '.join(NODE_PREDICTORS)}, got {predictor!r}{hint}")
    if row_block is not None and row_block < 1:
        raise ValueError(f"row_block must be at least 1, or None for all rows at once, got {row_block}")
    if exact and precision is not None:
        raise ValueError(
            f"precision={precision!r} is for exact=False: an exact sum is exact in any precision"
        )
    if exact and max(mask.shape[-2:]) > 1 << 16:
        raise ValueError(
            f"an exact sum goes up to 2^16 nodes a side, got {list(mask.shape)}: type exact=False"
        )
