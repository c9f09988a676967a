"""Masks from one look: by magnitude, by one batch's gradient, or anew in every forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from odjax.core.paths import leaves_with_paths, map_with_path
from odjax.sparse.mask_trees import Masks
from odjax.sparse.masks import top_links
from odjax.sparse.plans import Plan, check_plan, overall_density, target_links


def _by_score(
    score: Callable[[str, jax.Array], jax.Array], params: Any, plan: Plan, density: Any = None
) -> Masks:
    check_plan(plan, params)
    planned = overall_density(plan)
    found = {}
    for path, x in leaves_with_paths(params):
        if path in plan:
            leaf = plan[path]
            count = leaf.links if density is None else target_links(leaf, density, planned)
            scores = leaf.graphs(score(path, x))
            found[path] = leaf.leaf(top_links(scores, count, leaf.structure, batch_dims=leaf.batch_dims))
    return found


def _size(x: jax.Array) -> jax.Array:
    return jnp.abs(x if x.dtype.itemsize > 4 else x.astype(jnp.float32))


def magnitude_masks(params: Any, plan: Plan, *, density: float | jax.Array | None = None) -> Masks:
    """One-shot magnitude pruning: the links with the largest |w| of every leaf.

    Args:
      params: the parameters.
      plan: which leaves are sparse and how many links each has.
      density: of all sparse leaves together, on the way to the plan; may be traced. None: the plan's.

    Returns:
      {path: bool mask}, for `apply_masks` or as `masks=` of a method.

    Raises:
      ValueError: a plan that does not fit the parameters.

    Example:
      >>> from odjax.sparse.plans import LeafPlan
      >>> magnitude_masks({"w": jnp.array([[1.0, -3.0, 2.0]])}, {"w": LeafPlan((1, 3), 2)})
      {'w': Array([[False,  True,  True]], dtype=bool)}
    """
    return _by_score(lambda path, x: _size(x), params, plan, density)


def snip_masks(params: Any, gradients: Any, plan: Plan) -> Masks:
    """SNIP: before training, the links with the largest |w g| of every leaf.

    Args:
      params: the parameters at the start, dense.
      gradients: of the loss on one large batch, for all weights; the structure of `params`.
      plan: which leaves are sparse and how many links each has.

    Returns:
      {path: bool mask}, for `static(..., masks=)` or any other method.

    Raises:
      ValueError: no gradients, or those of other parameters; a plan that does not fit.

    Source: Lee, Ajanthan and Torr, ICLR 2019, arXiv 1810.02340, equation 6 (within each leaf).

    Example:
      >>> from odjax.sparse.plans import LeafPlan
      >>> w, g = {"w": jnp.array([[1.0, -3.0, 2.0]])}, {"w": jnp.array([[2.0, 0.1, 1.0]])}
      >>> snip_masks(w, g, {"w": LeafPlan((1, 3), 1)})
      {'w': Array([[ True, False, False]], dtype=bool)}
    """
    found = dict(leaves_with_paths(gradients))
    for path, leaf in plan.items():
        got = tuple(found[path].shape) if path in found else None
        if got != leaf.shape:
            raise ValueError(
                f"snip_masks needs the gradient of {path!r} with shape {leaf.shape}, got {got}: "
                "pass jax.grad(loss)(params) of the dense model"
            )
    return _by_score(lambda path, x: _size(x) * _size(found[path]), params, plan)


def ste(params: Any, masks: Plan | Callable[[str, jax.Array], jax.Array | None], **options: Any) -> Any:
    """Straight-through masks: the forward pass sees masked weights, the gradient reaches all of them.

    Not sparse training, but a strong way from dense to sparse: called on the parameters inside the loss, it
    lets a pruned weight grow and come back.

    Args:
      params: dense parameters.
      masks: a plan (the largest magnitudes, anew at every call), or `(path, w) -> bool mask` with None for
        leaves that stay dense.
      **options: of `magnitude_masks`: `density`.

    Returns:
      Parameters for the forward pass, whose gradient is that of the identity.

    Raises:
      ValueError: a mask of another shape; a plan that does not fit the parameters.

    Source: Bengio, Léonard and Courville 2013, arXiv 1308.3432.

    Example:
      >>> from odjax.sparse.plans import LeafPlan
      >>> plan, w = {"w": LeafPlan((1, 3), 1)}, {"w": jnp.array([[1.0, -3.0, 2.0]])}
      >>> loss = lambda p: jnp.sum(ste(p, plan)["w"] ** 2)
      >>> loss(w), jax.grad(loss)(w)["w"]
      (Array(9., dtype=float32), Array([[ 0., -6.,  0.]], dtype=float32))
      >>> jax.grad(lambda p: jnp.sum(ste(p, plan)["w"]))(w)["w"]
      Array([[1., 1., 1.]], dtype=float32)
    """
    if callable(masks):
        choose = masks
        if options:
            raise ValueError(
                f"{sorted(options)} are options of plans, and masks= is a function: bind them in it"
            )
    else:
        choose = magnitude_masks(jax.lax.stop_gradient(params), masks, **options).get

    def one(path: str, w: jax.Array) -> jax.Array:
        mask = choose(path, jax.lax.stop_gradient(w)) if callable(masks) else choose(path)
        if mask is None:
            return w
        if mask.shape != w.shape:
            raise ValueError(f"the mask of {path!r} has shape {mask.shape}, the leaf {w.shape}")
        # w + (masked - w) is exactly masked: x - x and x + 0 are not rounded.
        return w + jax.lax.stop_gradient(jnp.where(mask, w, jnp.zeros_like(w)) - w)

    return map_with_path(one, params)
