"""Masks by path: drawing them, applying them to parameters, and checking them against a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from odjax.core.paths import map_with_path
from odjax.sparse.masks import links, packed_shape, top_links, unpack
from odjax.sparse.plans import LeafPlan, Plan

Masks = dict[str, jax.Array]
"""{path: bool mask}, or packed words where it says so."""

Initial = Callable[[jax.Array, LeafPlan, int], jax.Array]
"""`(key, leaf plan, links of a slice) -> bool mask of the leaf's shape`."""


def random_mask(key: jax.Array, leaf: LeafPlan, count: int | jax.Array) -> jax.Array:
    """Links drawn uniformly, as the structure allows.

    Args:
      key: a typed key.
      leaf: what is planned.
      count: links of each slice.

    Returns:
      bool mask of the leaf's shape.
    """
    scores = leaf.graphs(jax.random.bits(key, leaf.shape))
    return leaf.leaf(top_links(scores, count, leaf.structure, batch_dims=leaf.batch_dims))


def apply_masks(params: Any, masks: Masks) -> Any:
    """Parameters with zeros where there is no link, as `dst` has them after its first update.

    Call it once on fresh parameters, so that the first gradient too is that of the sparse model.

    Args:
      params: the parameters.
      masks: {path: packed mask}, `DstState.masks`, or {path: bool mask}.

    Returns:
      The parameters.

    Example:
      >>> apply_masks({"w": jnp.ones(3)}, {"w": jnp.array([True, False, True])})
      {'w': Array([1., 0., 1.], dtype=float32)}
    """

    def one(path: str, x: jax.Array) -> jax.Array:
        if path not in masks:
            return x
        mask = masks[path] if masks[path].dtype == jnp.bool_ else unpack(masks[path], x.shape)
        return jnp.where(mask, x, jnp.zeros_like(x))

    return map_with_path(one, params)


def check_masks(masks: Masks, plan: Plan, *, exact: bool = True) -> None:
    """Makes sure that masks, such as restored ones, are those of a plan.

    Args:
      masks: {path: packed mask}.
      plan: path -> `LeafPlan`.
      exact: also compare the numbers of links (not where a density schedule has not come to its end).

    Raises:
      ValueError: other paths, shapes or numbers of links.
    """
    for path in sorted({*masks, *plan}):
        if path not in plan or path not in masks:
            has, lacks = ("masks", "plan") if path in masks else ("plan", "masks")
            raise ValueError(f"the {has} have {path!r} and the {lacks} do not: restore with the same plan")
        leaf = plan[path]
        if masks[path].shape != packed_shape(leaf.shape):
            raise ValueError(
                f"the mask of {path!r} has words of shape {masks[path].shape}, a leaf of shape {leaf.shape} "
                f"needs {packed_shape(leaf.shape)}"
            )
        mask = leaf.graphs(unpack(masks[path], leaf.shape))
        found = np.asarray(links(mask, batch_dims=leaf.batch_dims))
        if exact and (found != leaf.links).any():
            raise ValueError(
                f"the mask of {path!r} has {found.tolist()} links, the plan {leaf.links}: it was made with "
                "another plan"
            )


def check_initial(masks: Any, plan: Plan, exact: bool) -> None:
    """Makes sure that the masks given for the start fit a plan.

    Args:
      masks: {path: bool mask}; None and functions pass.
      plan: path -> `LeafPlan`.
      exact: also compare the numbers of links.

    Raises:
      ValueError: other paths, shapes, dtypes or numbers of links.
    """
    if masks is None or callable(masks):
        return
    for path in sorted({*masks, *plan}):
        if path not in plan or path not in masks:
            where = "which are not in the plan" if path in masks else "which masks= lacks"
            raise ValueError(f"masks= must have the paths of the plan; look at {path!r}, {where}")
        mask, leaf = masks[path], plan[path]
        if mask.dtype != jnp.bool_ or mask.shape != leaf.shape:
            raise ValueError(
                f"the mask of {path!r} must be bool{list(leaf.shape)}, got {mask.dtype}{list(mask.shape)}"
            )
        if exact and not isinstance(mask, jax.core.Tracer):
            with jax.ensure_compile_time_eval():
                found = np.asarray(links(leaf.graphs(mask), batch_dims=leaf.batch_dims))
            if (found != leaf.links).any():
                raise ValueError(
                    f"the mask of {path!r} has {found.tolist()} links, the plan {leaf.links}: "
                    "give every slice the number that was planned"
                )
