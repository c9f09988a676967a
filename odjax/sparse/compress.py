"""Cutting dead neurons out of a trained sparse network, and formats for what is left. Runs on the host.

A neuron between two dense layers is dead when no link leaves it, or when none reaches it. The first kind has
no effect. The second kind is a constant, activation(bias), which is folded into the bias of the next layer.
Both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from odjax.core.paths import leaves_with_paths, map_with_path


class Series(NamedTuple):
    """Two dense layers, one after the other: second(activation(first(x))), and nothing else in between.

    Attributes:
      first: path of the kernel [inputs, neurons] that gives the neurons.
      second: path of the kernel [neurons, outputs] that takes them.
      activation: elementwise, between the two; called on a vector of biases.
      first_bias: path of the bias [neurons], or None.
      second_bias: path of the bias [outputs], or None.
    """

    first: str
    second: str
    activation: Callable[[Any], Any]
    first_bias: str | None = None
    second_bias: str | None = None


class Compressed(NamedTuple):
    """A network without its dead neurons.

    Attributes:
      params: the tree that came, with smaller leaves where neurons were cut.
      masks: path -> bool mask, for the kernels of the wiring and all that came with a mask.
      kept: path of the first kernel of a pair -> the indices of its neurons that are left.
    """

    params: Any
    masks: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]


def _matrix(leaves: dict[str, Any], path: str, role: str) -> np.ndarray:
    if path not in leaves:
        some = ", ".join(map(repr, list(leaves)[:4]))
        raise ValueError(f"the wiring names {path!r}, which is no leaf of the parameters; there are {some}")
    shape = np.shape(leaves[path])
    if len(shape) != 2:
        raise ValueError(
            f"{role} {path!r} must be a kernel [inputs, outputs], got {shape}: unstack the layers of a scan "
            "and join the axes of heads first"
        )
    return np.array(leaves[path])


def _vector(leaves: dict[str, Any], path: str, size: int) -> np.ndarray:
    if path not in leaves:
        raise ValueError(f"the wiring names the bias {path!r}, which is no leaf: None where there is no bias")
    if np.shape(leaves[path]) != (size,):
        raise ValueError(
            f"the bias {path!r} must be [{size}] like the outputs of its kernel, got {np.shape(leaves[path])}"
        )
    return np.array(leaves[path])


def _twice(paths: list[str], role: str) -> None:
    double = next((path for path in paths if paths.count(path) > 1), None)
    if double is not None:
        raise ValueError(
            f"{double!r} is {role} of two pairs: a neuron with two successors, or one made of two layers, "
            "is no chain of dense layers"
        )


def _checked_masks(masks: Any, leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    found = {}
    for path, mask in leaves_with_paths(masks):
        if path not in leaves:
            raise ValueError(f"there is a mask for {path!r}, which is no leaf of the parameters")
        mask = np.array(mask)
        if mask.dtype != bool:
            raise TypeError(f"the mask of {path!r} must be bool, got {mask.dtype}: unpack it first")
        if mask.shape != np.shape(leaves[path]):
            raise ValueError(
                f"the mask of {path!r} has the shape {mask.shape}, the parameter {np.shape(leaves[path])}"
            )
        found[path] = mask
    return found


def _constants(pair: Series, leaves: dict[str, np.ndarray], neurons: np.ndarray) -> np.ndarray:
    """What the neurons give that no link reaches: float64[len(neurons)]."""
    bias = np.zeros(neurons.size, leaves[pair.first].dtype)
    if pair.first_bias is not None:
        bias = leaves[pair.first_bias][neurons]
    values = np.asarray(pair.activation(jnp.asarray(bias)))
    if values.shape != bias.shape:
        raise ValueError(
            f"the activation between {pair.first!r} and {pair.second!r} must be elementwise, it made "
            f"{values.shape} of {bias.shape}"
        )
    return values.astype(np.float64)


def _cut(
    pair: Series, leaves: dict[str, np.ndarray], masks: dict[str, np.ndarray], alive: np.ndarray
) -> bool:
    """Marks the dead neurons of one pair and takes their links away; whether there were any."""
    reached = masks[pair.first].any(axis=0)
    leaving = masks[pair.second].any(axis=1)
    useless = alive & ~leaving
    constant = alive & leaving & ~reached
    if constant.any():
        neurons = np.flatnonzero(constant)
        values = _constants(pair, leaves, neurons)
        if pair.second_bias is not None:
            bias = leaves[pair.second_bias]
            added = values @ leaves[pair.second][neurons].astype(np.float64)
            leaves[pair.second_bias] = (bias.astype(np.float64) + added).astype(bias.dtype)
        else:
            constant[neurons[values != 0]] = False  # nowhere to put the constant: the neuron stays
    dead = useless | constant
    masks[pair.first][:, dead] = False
    masks[pair.second][dead] = False
    alive &= ~dead
    return bool(dead.any())


def compress(params: Any, masks: Any, wiring: Sequence[Series]) -> Compressed:
    """Cuts out the neurons that no link leaves or no link reaches; the outputs of the network stay.

    Cutting a neuron can make others dead; it goes on until none is left. A constant is added in float64 and
    rounded once to the dtype of the bias. A neuron whose constant is not 0 stays where the second layer has
    no bias to take it.

    Nothing else may depend on the neurons between two layers: no normalisation over them, no skip
    connection, no second layer that reads them. A layer whose neurons are all dead gets the width 0.

    Args:
      params: tree of parameters; the kernels of the wiring are [inputs, outputs].
      masks: tree of bool masks by the paths of the parameters (or a dict path -> mask; None where a leaf has
        none). Links outside their mask count as 0. A kernel without a mask has all its links.
      wiring: the pairs of layers, in any order; the second kernel of one may be the first of another.

    Returns:
      The smaller parameters and masks, and which neurons were kept. Leaves are numpy arrays.

    Raises:
      TypeError: a mask that is not bool, or a wiring that does not hold `Series`.
      ValueError: a path that is no leaf, kernels whose shared width differs, shapes that do not fit, a
        kernel that is the first or the second of two pairs.

    Example:
      >>> import jax
      >>> params = {
      ...     "a": {"kernel": jnp.ones((1, 3)), "bias": jnp.array([0.0, 2.0, 0.0])},
      ...     "b": {"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(1)},
      ... }
      >>> masks = {"a/kernel": [[True, False, True]], "b/kernel": [[True], [True], [False]]}
      >>> masks = {path: np.array(mask) for path, mask in masks.items()}
      >>> pair = Series("a/kernel", "b/kernel", jax.nn.relu, "a/bias", "b/bias")
      >>> small = compress(params, masks, [pair])
      >>> small.kept["a/kernel"], small.params["b"]["bias"]
      (array([0]), array([2.], dtype=float32))
    """
    dense = dict(leaves_with_paths(params))
    links = _checked_masks(masks, dense)
    leaves: dict[str, np.ndarray] = {}
    alive: dict[str, np.ndarray] = {}
    for pair in wiring:
        if not isinstance(pair, Series):
            raise TypeError(f"the wiring must hold Series(first, second, activation, ...), got {pair!r}")
        first, second = _matrix(dense, pair.first, "first"), _matrix(dense, pair.second, "second")
        if first.shape[1] != second.shape[0]:
            raise ValueError(
                f"{pair.first!r} {first.shape} gives {first.shape[1]} neurons, {pair.second!r} "
                f"{second.shape} takes {second.shape[0]}: they are not one after the other"
            )
        leaves |= {pair.first: first, pair.second: second}
        for path, size in ((pair.first_bias, first.shape[1]), (pair.second_bias, second.shape[1])):
            if path is not None:
                leaves[path] = _vector(dense, path, size)
        alive[pair.first] = np.ones(first.shape[1], bool)
    _twice([pair.first for pair in wiring], "the first")
    _twice([pair.second for pair in wiring], "the second")
    for path, leaf in leaves.items():
        if leaf.ndim == 2:
            links.setdefault(path, np.ones(leaf.shape, bool))
    for path, mask in links.items():
        leaves[path] = np.where(mask, np.asarray(dense[path]), np.zeros((), np.asarray(dense[path]).dtype))

    while any(_cut(pair, leaves, links, alive[pair.first]) for pair in wiring):
        pass

    for pair in wiring:
        kept = alive[pair.first]
        leaves[pair.first], links[pair.first] = leaves[pair.first][:, kept], links[pair.first][:, kept]
        leaves[pair.second], links[pair.second] = leaves[pair.second][kept], links[pair.second][kept]
        if pair.first_bias is not None:
            leaves[pair.first_bias] = leaves[pair.first_bias][kept]
            if pair.first_bias in links:
                links[pair.first_bias] = links[pair.first_bias][kept]
    return Compressed(
        map_with_path(lambda path, leaf: leaves.get(path, np.asarray(leaf)), params),
        links,
        {path: np.flatnonzero(kept) for path, kept in alive.items()},
    )


def to_bcsr(kernel: Any, mask: Any = None) -> sparse.BCSR:
    """A kernel as compressed rows, one an output neuron: for inference on CPUs at a few per cent of links.

    jax multiplies compressed rows from the left, so that the kernel is transposed: y = (rows @ x.T).T.

    Args:
      kernel: [inputs, outputs].
      mask: bool, the shape of the kernel: the links that are stored, zeros among them; None: all that are
        not 0.

    Returns:
      BCSR of shape [outputs, inputs], columns of a row in ascending order.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: a kernel that is no matrix, a mask of another shape.

    Example:
      >>> kernel, x = jnp.array([[0.0, 2.0], [3.0, 0.0], [0.0, 4.0]]), jnp.ones((5, 3))
      >>> rows = to_bcsr(kernel)
      >>> rows.nse, bool(((rows @ x.T).T == x @ kernel).all())
      (3, True)
    """
    kernel = np.asarray(kernel)
    if kernel.ndim != 2:
        raise ValueError(f"kernel must be [inputs, outputs], got {kernel.shape}: take one layer of a stack")
    mask = kernel != 0 if mask is None else np.asarray(mask)
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}: type mask != 0")
    if mask.shape != kernel.shape:
        raise ValueError(f"the mask has the shape {mask.shape}, the kernel {kernel.shape}")
    rows, columns = np.nonzero(mask.T)
    starts = np.searchsorted(rows, np.arange(kernel.shape[1] + 1)).astype(np.int32)
    parts = (kernel.T[rows, columns], columns.astype(np.int32), starts)
    data, indices, indptr = map(jnp.asarray, parts)
    return sparse.BCSR(
        (data, indices, indptr), shape=kernel.shape[::-1], indices_sorted=True, unique_indices=True
    )


def _groups(x: np.ndarray, n: int, m: int, axis: int) -> np.ndarray:
    """[..., groups, m], the axis last."""
    if not 0 < n <= m:
        raise ValueError(f"n of m needs 0 < n <= m, got {n}:{m}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is no axis of an array {x.shape}")
    if x.shape[axis] % m:
        raise ValueError(f"axis {axis} of {x.shape} has {x.shape[axis]} entries, no multiple of {m}")
    moved = np.moveaxis(x, axis, -1)
    return moved.reshape(*moved.shape[:-1], moved.shape[-1] // m, m)


def fits_n_of_m(mask: Any, n: int = 2, m: int = 4, *, axis: int = -2) -> bool:
    """Whether no group of m consecutive places has more than n links: the layout of sparse tensor cores.

    Args:
      mask: bool (or an array whose links are not 0).
      n: links a group may have.
      m: places of a group.
      axis: along which the groups lie; -2 is the inputs of a kernel, which are summed over.

    Returns:
      True when every group fits.

    Raises:
      ValueError: n and m that make no group, an axis that m does not divide.

    Example:
      >>> fits_n_of_m(jnp.array([[1, 1, 0, 0], [1, 1, 1, 0]]), axis=-1)
      False
    """
    return bool((np.count_nonzero(_groups(np.asarray(mask), n, m, axis), axis=-1) <= n).all())


def nm_compress(kernel: Any, n: int = 2, m: int = 4, *, axis: int = -2) -> tuple[np.ndarray, np.ndarray]:
    """The values of an n:m sparse kernel and their places in the groups.

    Args:
      kernel: an array with at most n entries other than 0 in every group of m.
      n: entries of a group that are stored.
      m: places of a group.
      axis: along which the groups lie.

    Returns:
      (values, indices), the shape of the kernel with n / m of its axis. Indices are uint8, ascending in a
      group; a group with fewer links is filled up with zeros at its first free places.

    Raises:
      ValueError: a group with more than n links, n and m that make no group, an axis that m does not divide,
        groups of more than 256.

    Example:
      >>> values, places = nm_compress(jnp.array([0.0, 5.0, 0.0, 6.0]), axis=-1)
      >>> values, places
      (array([5., 6.], dtype=float32), array([1, 3], dtype=uint8))
    """
    kernel = np.asarray(kernel)
    groups = _groups(kernel, n, m, axis)
    if m > 256:
        raise ValueError(f"a place in a group is stored in 8 bits: m must be at most 256, got {m}")
    most = np.count_nonzero(groups, axis=-1).max(initial=0)
    if most > n:
        raise ValueError(f"a group of {m} has {most} links, {n}:{m} allows {n}: choose the mask by groups")
    places = np.sort(np.argsort(groups == 0, axis=-1, kind="stable")[..., :n], axis=-1)
    values = np.take_along_axis(groups, places, axis=-1)

    def flat(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x.reshape(*x.shape[:-2], -1), -1, axis)

    return flat(values), flat(places.astype(np.uint8))


def nm_expand(values: Any, indices: Any, n: int = 2, m: int = 4, *, axis: int = -2) -> np.ndarray:
    """The inverse of `nm_compress`.

    Args:
      values: the stored values.
      indices: their places in the groups, the shape of the values.
      n: stored entries of a group.
      m: places of a group.
      axis: along which the groups lie.

    Returns:
      The kernel.

    Raises:
      ValueError: shapes that differ, an axis that n does not divide, n and m that make no group, places of m
        or more.

    Example:
      >>> nm_expand(np.array([5.0, 6.0]), np.array([1, 3]), axis=-1)
      array([0., 5., 0., 6.])
    """
    values, indices = np.asarray(values), np.asarray(indices)
    if values.shape != indices.shape:
        raise ValueError(f"values {values.shape} and indices {indices.shape} must have one shape")
    if indices.size and int(indices.max()) >= m:
        raise ValueError(f"indices must be below m = {m}, got {int(indices.max())}")
    if not 0 < n <= m:
        raise ValueError(f"n of m needs 0 < n <= m, got {n}:{m}")
    stored, places = (_groups(x, n, n, axis) for x in (values, indices.astype(np.int64)))
    groups = np.zeros((*stored.shape[:-1], m), values.dtype)
    np.put_along_axis(groups, places, stored, axis=-1)
    return np.moveaxis(groups.reshape(*groups.shape[:-2], -1), -1, axis)
