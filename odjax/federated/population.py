"""What clients keep between rounds: one row a client, of which only the cohort's move."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from odjax.core import leaves_with_paths, select
from odjax.core import partition as _partition


def population_of(row: Any, clients: int, *, host: bool = False) -> Any:
    """The same private state for every client.

    Args:
      row: a tree of arrays, the state of one client.
      clients: number of clients N.
      host: in the memory of the host, as NumPy arrays; rows of zeros then take no memory before they are
        written (on Linux; elsewhere it depends on the system).

    Returns:
      The tree with a leading axis [N, ...].

    Raises:
      ValueError: no client.

    Example:
      >>> population_of({"c": jnp.zeros(2)}, 3)["c"].shape
      (3, 2)
    """
    if clients < 1:
        raise ValueError(f"a population needs at least 1 client, got {clients}")
    if not host:
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (clients, *x.shape)), row)

    def held(x: Any) -> np.ndarray:
        x = np.asarray(x)
        if not x.any():
            return _untouched((clients, *x.shape), x.dtype)
        return np.broadcast_to(x, (clients, *x.shape)).copy()

    return jax.tree.map(held, row)


def _untouched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that take memory page by page as they are written.

    NumPy asks for huge pages, of which each row of a few kilobytes would then take one of two megabytes.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0 or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def gather(population: Any, ids: Any) -> Any:
    """The rows of some clients.

    Args:
      population: tree of [N, ...], of NumPy or JAX.
      ids: int, any shape; -1 for nobody (some row comes back, never to be scattered).

    Returns:
      Tree of [*ids.shape, ...].

    Example:
      >>> gather(np.array([10.0, 20.0]), np.array([[1, -1]])).shape
      (1, 2)
    """

    def rows(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return leaf[np.maximum(np.asarray(ids), 0)]
        return jnp.take(leaf, jnp.maximum(ids, 0), axis=0)

    return jax.tree.map(rows, population)


def scatter(population: Any, ids: Any, rows: Any) -> Any:
    """The population with new rows for some clients; those of -1 are dropped, all others stay bit for bit.

    Args:
      population: tree of [N, ...]; NumPy arrays are changed in place.
      ids: int, any shape, no client twice; -1 for nobody.
      rows: tree of [*ids.shape, ...].

    Returns:
      The population.

    Example:
      >>> scatter(jnp.zeros(3), jnp.array([2, -1]), jnp.array([5.0, 7.0]))
      Array([0., 0., 5.], dtype=float32)
    """

    def written(leaf: Any, new: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            there = np.asarray(ids) >= 0
            leaf[np.asarray(ids)[there]] = np.asarray(new)[there]
            return leaf
        ids_ = jnp.asarray(ids)
        place = jnp.where(ids_ >= 0, ids_, leaf.shape[0])
        return leaf.at[place].set(new.astype(leaf.dtype), mode="drop")

    return jax.tree.map(written, population, rows)


def split(params: Any, private: str | Callable[[str, Any], bool]) -> tuple[Any, Any]:
    """Parameters that clients share, and those that each keeps for itself (personal heads, normalization).

    Args:
      params: a tree.
      private: `where` of what a client keeps.

    Returns:
      (shared, private), trees with holes; `odjax.core.combine` puts them together.

    Raises:
      ValueError: `private` selects nothing, or everything.

    Example:
      >>> split({"body": 1.0, "head": 2.0}, "head")
      ({'body': 1.0, 'head': None}, {'body': None, 'head': 2.0})
    """
    own, shared = _partition(params, private)
    if not jax.tree.leaves(shared):
        raise ValueError(
            f"private={private!r} selects all {len(leaves_with_paths(params))} parameters: nothing is shared"
        )
    select(params, private)
    return shared, own
