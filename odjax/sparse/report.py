"""What a sparse network is: links, neurons, bytes and FLOPs a leaf; and how its topology moves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from odjax.core.matrices import (
    DimensionNumbers,
    MatrixView,
    check_patterns,
    matrix_shape,
    view_of,
)
from odjax.core.paths import STACKED, leaves_with_paths
from odjax.core.report import format_bytes
from odjax.core.trees import dtype_of, shape_of

Side = Literal["in", "out"]

_HEADER = ("path", "shape", "links", "density", "active in", "active out", "packed", "dense", "FLOPs a row")


class LeafReport(NamedTuple):
    """The figures of one sparse leaf; counts are totals over the layers of a stack.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      links: present ones.
      size: places for links.
      active_in: input neurons with a link (a neuron counts in every layer of a stack).
      n_in: input neurons.
      active_out: output neurons with a link.
      n_out: output neurons.
      dense_bytes: of the parameter.
      packed_bytes: of the values of the links alone, and a mask of one bit a place.
      flops: multiplications and additions of the links for one row of inputs (2 a link).
      dense_flops: the same for all places.
    """

    path: str
    shape: tuple[int, ...]
    links: int
    size: int
    active_in: int
    n_in: int
    active_out: int
    n_out: int
    dense_bytes: int
    packed_bytes: int
    flops: int
    dense_flops: int

    @property
    def density(self) -> float:
        """Share of the places that have a link (0 without places, as in a layer cut down to width 0)."""
        return self.links / max(self.size, 1)

    @property
    def active_in_rate(self) -> float:
        """Share of the input neurons with a link (ANP of the inputs)."""
        return self.active_in / max(self.n_in, 1)

    @property
    def active_out_rate(self) -> float:
        """Share of the output neurons with a link (ANP of the outputs)."""
        return self.active_out / max(self.n_out, 1)


class Degrees(NamedTuple):
    """How many links every neuron of a leaf has.

    Attributes:
      inputs: int32[*batch, n_in].
      outputs: int32[*batch, n_out].
    """

    inputs: jax.Array
    outputs: jax.Array


def degrees(mask: jax.Array, view: MatrixView) -> Degrees:
    """Counts the links of every neuron of a leaf, layer by layer.

    Args:
      mask: bool, the shape of the leaf.
      view: how the leaf is a stack of matrices, of `odjax.core.matrices.view_of`.

    Returns:
      The degrees of both sides.

    Raises:
      TypeError: a mask that is not bool.

    Example:
      >>> mask = jnp.array([[True, True], [False, False], [True, False]])
      >>> degrees(mask, MatrixView((), (0,), (1,)))
      Degrees(inputs=Array([2, 0, 1], dtype=int32), outputs=Array([2, 1], dtype=int32))
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, got {mask.dtype}: unpack it first")
    batch, n_in, n_out = matrix_shape(mask.shape, view)

    def side(axes: tuple[int, ...], others: tuple[int, ...], size: int) -> jax.Array:
        # The sum first: what is left to move is small, and the mask itself stays where it is.
        counts = jnp.sum(mask, axis=others, dtype=jnp.int32)
        left = sorted((*view.batch, *axes))
        order = [left.index(axis) for axis in (*view.batch, *axes)]
        return jnp.transpose(counts, order).reshape(*batch, size)

    return Degrees(side(view.inputs, view.outputs, n_in), side(view.outputs, view.inputs, n_out))


def leaf_report(path: str, leaf: Any, found: Degrees) -> LeafReport:
    """The figures of one leaf from the degrees of its neurons.

    Args:
      path: of the leaf.
      leaf: the parameter or its `jax.ShapeDtypeStruct`.
      found: of `degrees`.

    Returns:
      The report.

    Example:
      >>> found = Degrees(jnp.array([2, 0, 1]), jnp.array([2, 1]))
      >>> leaf_report("kernel", jax.ShapeDtypeStruct((3, 2), "float32"), found).links
      3
    """
    inputs, outputs = (np.asarray(side) for side in found)
    links, shape, itemsize = int(inputs.sum(dtype=np.int64)), tuple(shape_of(leaf)), dtype_of(leaf).itemsize
    size = math.prod(shape)
    return LeafReport(
        path=path,
        shape=shape,
        links=links,
        size=size,
        active_in=int(np.count_nonzero(inputs)),
        n_in=inputs.size,
        active_out=int(np.count_nonzero(outputs)),
        n_out=outputs.size,
        dense_bytes=size * itemsize,
        packed_bytes=links * itemsize + 4 * -(-size // 32),
        flops=2 * links,
        dense_flops=2 * size,
    )


def sparsity_report(
    params: Any,
    masks: Any,
    *,
    dimension_numbers: DimensionNumbers = None,
    stacked: str | None = STACKED,
) -> tuple[LeafReport, ...]:
    """Links, active neurons, bytes and FLOPs of every leaf with a mask.

    Args:
      params: tree of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are used.
      masks: tree of bool masks by the paths of the parameters (or a dict path -> mask; None where a leaf has
        none).
      dimension_numbers: which axes of a leaf are inputs and outputs, as for `odjax.core.matrices.view_of`;
        the leaves of `odjax.models` need none.
      stacked: regular expression for the paths of stacked layers; None where there are none.

    Returns:
      One report a mask, in the order of the masks.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: a mask without its parameter or of another shape, a leaf that is no matrix or could be
        several, a pattern that matches nothing.

    Example:
      >>> params = {"kernel": jax.ShapeDtypeStruct((4, 2), "float32")}
      >>> mask = np.array([[True, False], [True, False], [False, False], [False, False]])
      >>> (row,) = sparsity_report(params, {"kernel": mask})
      >>> row.links, row.active_in, row.active_out, row.packed_bytes
      (2, 2, 1, 12)
    """
    leaves = dict(leaves_with_paths(params))
    found = leaves_with_paths(masks)
    check_patterns(dimension_numbers, [path for path, _ in found])
    rows = []
    for path, mask in found:
        if path not in leaves:
            raise ValueError(f"there is a mask for {path!r}, which is no leaf of the parameters")
        mask, shape = np.asarray(mask), tuple(shape_of(leaves[path]))
        if mask.dtype != bool:
            raise TypeError(f"the mask of {path!r} must be bool, got {mask.dtype}: unpack it first")
        if mask.shape != shape:
            raise ValueError(f"the mask of {path!r} has the shape {mask.shape}, the parameter {shape}")
        view = view_of(path, shape, dimension_numbers, stacked=stacked)
        batch, n_in, n_out = matrix_shape(shape, view)
        matrices = mask.transpose([*view.batch, *view.inputs, *view.outputs]).reshape(*batch, n_in, n_out)
        sides = (np.count_nonzero(matrices, axis=axis) for axis in (-1, -2))
        rows.append(leaf_report(path, leaves[path], Degrees(*sides)))
    return tuple(rows)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"


def format_report(rows: Iterable[LeafReport]) -> str:
    """A report as aligned plain text, with a line of totals.

    Args:
      rows: of `sparsity_report`.

    Returns:
      The table.

    Example:
      >>> params = {"kernel": jax.ShapeDtypeStruct((4, 2), "float32")}
      >>> print(format_report(sparsity_report(params, {"kernel": np.eye(4, 2, dtype=bool)})))
      path    shape   links  density  active in  active out  packed  dense  FLOPs a row
      kernel  (4, 2)      2  25.00 %    50.00 %    100.00 %  12 B    32 B             4
      total: 2 of 8 links (25.00 %), 12 B of 32 B, 4 of 16 FLOPs a row
    """
    rows = tuple(rows)
    right = (2, 3, 4, 5, 8)
    table = [_HEADER] + [
        (
            row.path,
            "(" + ", ".join(map(str, row.shape)) + ")",
            f"{row.links:,}",
            _percent(row.links, row.size),
            _percent(row.active_in, row.n_in),
            _percent(row.active_out, row.n_out),
            format_bytes(row.packed_bytes),
            format_bytes(row.dense_bytes),
            f"{row.flops:,}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in table
    ]
    links, size = sum(row.links for row in rows), sum(row.size for row in rows)
    packed, dense = sum(row.packed_bytes for row in rows), sum(row.dense_bytes for row in rows)
    flops, dense_flops = sum(row.flops for row in rows), sum(row.dense_flops for row in rows)
    lines.append(
        f"total: {links:,} of {size:,} links ({_percent(links, size)}), {format_bytes(packed)} of "
        f"{format_bytes(dense)}, {flops:,} of {dense_flops:,} FLOPs a row"
    )
    return "\n".join(line.rstrip() for line in lines)


def degree_histogram(mask: jax.Array, side: Side) -> jax.Array:
    """How many neurons of one side have 0, 1, 2, ... links.

    Args:
      mask: bool[..., n_in, n_out]; leading axes are layers of a stack.
      side: "in" or "out", whose degrees are counted.

    Returns:
      int32[..., n + 1], n the number of neurons of the other side: entry d counts the neurons of degree d.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: a mask that is no matrix, or an unknown side.

    Example:
      >>> degree_histogram(jnp.array([[True, True, False], [False, True, False]]), "out")
      Array([1, 1, 1], dtype=int32)
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, got {mask.dtype}: unpack it first")
    if mask.ndim < 2:
        raise ValueError(f"mask must be [..., n_in, n_out], got {list(mask.shape)}")
    if side not in ("in", "out"):
        raise ValueError(f"side must be 'in' or 'out', got {side!r}")
    axis = -2 if side == "out" else -1
    found, length = jnp.sum(mask, axis=axis, dtype=jnp.int32), mask.shape[axis] + 1
    counts = jax.vmap(lambda d: jnp.bincount(d, length=length))(found.reshape(-1, found.shape[-1]))
    return counts.astype(jnp.int32).reshape(*found.shape[:-1], length)


def _check_words(words: Any) -> None:
    dtype = getattr(words, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.unsignedinteger):
        raise TypeError(f"packed masks are unsigned integers, got {dtype}: pack them first")


def observe_links(ever: Any, words: Any) -> Any:
    """Adds the links of now to those that were ever active.

    In-time over-parametrisation asks how many of the places a sparse network has tried during training. What
    is kept is one bit a place. Start with the packed masks of the first step.

    Args:
      ever: tree of packed masks (unsigned integers, one bit a place, in any layout): the links seen so far.
      words: tree of packed masks in the same layout: the links of now.

    Returns:
      The tree of packed masks of all links seen.

    Raises:
      TypeError: masks that are not packed.
      ValueError: words of another shape or dtype, trees of another structure.

    Source:
      S. Liu, L. Yin, D. C. Mocanu and M. Pechenizkiy, Do we actually need dense over-parameterization?
      In-time over-parameterization in sparse training, ICML 2021, arXiv 2102.02887.

    Example:
      >>> first, second = jnp.array([0b0011], jnp.uint8), jnp.array([0b0110], jnp.uint8)
      >>> exploration(observe_links(first, second), 4)
      0.75
    """

    def join(seen: jax.Array, now: jax.Array) -> jax.Array:
        _check_words(seen)
        _check_words(now)
        if seen.shape != now.shape or seen.dtype != now.dtype:
            raise ValueError(
                f"packed masks must have one layout: seen are {seen.dtype}{list(seen.shape)}, now "
                f"{now.dtype}{list(now.shape)}"
            )
        return seen | now

    return jax.tree.map(join, ever, words)


def exploration(ever: Any, places: int) -> float:
    """The share of places that had a link at some time (the rate R_s of in-time over-parametrisation).

    Args:
      ever: tree of packed masks, of `observe_links`; bits of a padding are 0.
      places: how many there are over all leaves of the tree.

    Returns:
      A number from 0 to 1. It is fetched from the device.

    Raises:
      TypeError: masks that are not packed.
      ValueError: more links than places.

    Source:
      Liu et al., ICML 2021, arXiv 2102.02887, section 3.

    Example:
      >>> exploration({"kernel": jnp.array([0b0111, 0b0001], jnp.uint8)}, 16)
      0.25
    """
    links = 0
    for words in jax.tree.leaves(ever):
        _check_words(words)
        links += int(jnp.sum(jax.lax.population_count(jnp.asarray(words)), dtype=jnp.uint32))
    if links > places:
        raise ValueError(f"{links} links were seen at {places} places: count the places of every leaf")
    return links / places if places else 0.0


def overlap(removed: jax.Array, regrown: jax.Array, *, batch_dims: int = 0) -> jax.Array:
    """The share of the regrown links that had just been removed: 1 where a topology stands still.

    Args:
      removed: bool[...], the links that a topology step took away.
      regrown: bool[...], the links that it put in.
      batch_dims: the first `batch_dims` axes are layers, each with its own share.

    Returns:
      float32 of the batch shape; 1 also where nothing was regrown.

    Raises:
      TypeError: masks that are not bool.
      ValueError: masks of different shapes, more batch axes than axes.

    Source:
      Zhang et al., ICLR 2024: the layer stops evolving above 0.9.

    Example:
      >>> overlap(jnp.array([True, True, False]), jnp.array([False, True, True]))
      Array(0.5, dtype=float32)
    """
    removed, regrown = jnp.asarray(removed), jnp.asarray(regrown)
    if removed.dtype != jnp.bool_ or regrown.dtype != jnp.bool_:
        raise TypeError(f"removed and regrown must be bool, got {removed.dtype} and {regrown.dtype}")
    if removed.shape != regrown.shape:
        raise ValueError(f"removed {removed.shape} and regrown {regrown.shape} must have one shape")
    if not 0 <= batch_dims <= removed.ndim:
        raise ValueError(f"batch_dims must be from 0 to {removed.ndim}, got {batch_dims}")
    axes = tuple(range(batch_dims, removed.ndim))
    common = jnp.sum(removed & regrown, axis=axes, dtype=jnp.int32)
    grown = jnp.sum(regrown, axis=axes, dtype=jnp.int32)
    share = common.astype(jnp.float32) / jnp.maximum(grown, 1).astype(jnp.float32)
    return jnp.where(grown > 0, share, jnp.ones_like(share))
