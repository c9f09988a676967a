"""Shrink and perturb: pull the weights towards zero and add noise before training goes on with more data.

J. T. Ash and R. P. Adams, On Warm-Starting Neural Network Training, NeurIPS 2020, arXiv 1910.08475.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from odjax.core.edits import Edit
from odjax.core.keys import fold_path, keys_like
from odjax.core.optimizer_state import reset_moments
from odjax.core.paths import Where, is_box, map_with_path, select
from odjax.core.trees import unbox


def shrink_perturb(
    every: int,
    *,
    shrink: float = 0.4,
    scale: float = 0.1,
    where: Where = ".*",
    fresh: Callable[[jax.Array], Any] | None = None,
    reset: bool = True,
    name: str = "shrink-perturb",
    start: int | None = None,
    stop: int | None = None,
) -> Edit:
    """Shrinks the selected parameters and perturbs them with noise every so many updates.

    A network that was trained on part of the data and then goes on with more of it often generalises worse
    than one trained from scratch on all of it. Shrinking keeps the direction of what was learned, noise
    restores the balance of gradient sizes between old and new examples. With theta_i a selected parameter,

      theta_i <- shrink * theta_i + p_i,

    where p_i ~ N(0, scale^2), or p = scale * fresh(key) when `fresh` is given: a newly initialised network,
    whose noise has the layers' own scale.

    Promises: `shrink=1, scale=0` returns every parameter bit for bit; a leaf that is not selected is never
    touched; the noise of a leaf depends on the key, the step and the path of the leaf alone; the arithmetic
    is float32 (float64 for float64 parameters) and rounds once to the parameter's dtype.

    Args:
      every: the cadence in updates; the number of updates that are made on one stage of the data.
      shrink: the factor lambda, in [0, 1]; 0 starts anew from the noise, 1 keeps the weights.
      scale: the standard deviation of the noise, or the factor of the fresh network; at least 0.
      where: which parameters; those that are not floats must not be among them.
      fresh: `fresh(key) -> params`, the initialisation of the model, for example
        `lambda key: model.init(key, x)["params"]`; boxes are opened where `params` has none. None: normal
        noise.
      reset: set the optimizer's moments of the selected parameters to zero.
      name: the edit's name, which its randomness depends on.
      start: the first update number after which it may happen; None for no limit.
      stop: the last update number after which it may happen; None for no limit.

    Returns:
      An `Edit`; `odjax.core.edits.as_transform` makes a transform of it.

    Raises:
      ValueError: a factor outside its range; when it runs: nothing is selected, a selected leaf that is no
        float, or a `fresh` tree that has another shape somewhere.

    References:
      J. T. Ash and R. P. Adams, On Warm-Starting Neural Network Training, NeurIPS 2020, arXiv 1910.08475.

    Example:
      >>> edit = shrink_perturb(every=100, shrink=0.5, scale=0.0, where="kernel")
      >>> params, _ = edit.apply(jax.random.key(0), 100, {"kernel": jnp.ones(2), "bias": jnp.ones(1)}, ())
      >>> params["kernel"], params["bias"]
      (Array([0.5, 0.5], dtype=float32), Array([1.], dtype=float32))
    """
    if not 0 <= shrink <= 1:
        raise ValueError(f"shrink must be in [0, 1] (1 keeps the weights), got {shrink}")
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be a finite number of at least 0 (0 adds no noise), got {scale}")

    def apply(key: jax.Array, step: jax.Array, params: Any, opt_state: Any) -> tuple[Any, Any]:
        del step  # the key is folded with it
        chosen = select(params, where)
        if fresh is None or scale == 0:
            noise = keys_like(key, params)
        else:
            noise = fresh(fold_path(key, "fresh"))
            if not any(is_box(node) for node in jax.tree.leaves(params, is_leaf=is_box)):
                noise = unbox(noise)
            if jax.tree.structure(noise) != jax.tree.structure(params):
                raise ValueError("fresh(key) must return parameters with the structure of those in training")

        def move(path: str, leaf: jax.Array, hit: bool, source: Any) -> jax.Array:
            if not hit or (shrink == 1 and scale == 0):
                return leaf
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"shrink_perturb selects {path!r}, which is {leaf.dtype}: narrow where= to floats"
                )
            wide = leaf.dtype if leaf.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
            moved = leaf.astype(wide) * jnp.asarray(shrink, wide)
            if scale > 0:
                drawn = jax.random.normal(source, leaf.shape, wide) if fresh is None else source.astype(wide)
                if drawn.shape != leaf.shape:
                    raise ValueError(
                        f"fresh(key) has shape {drawn.shape} at {path!r}, the parameter {leaf.shape}"
                    )
                moved += jnp.asarray(scale, wide) * drawn
            return moved.astype(leaf.dtype)

        moved = map_with_path(move, params, chosen, noise)
        return moved, reset_moments(opt_state, params, where) if reset else opt_state

    return Edit(apply, every, name, start, stop)
