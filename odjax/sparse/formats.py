"""Formats for the links of a trained sparse kernel: compressed rows and n:m groups. Runs on the host."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse


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
