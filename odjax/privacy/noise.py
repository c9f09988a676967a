"""Gaussian noise whose size is taken from the clip that bounded the sensitivity, never typed in.

The order is clip, sum, noise, anything else. Noise is added once, after the sum over all devices.

Samples of float32 are not real numbers: which values can occur at all depends on the sum, and an attacker who
sees exact bits can use that (I. Mironov, On significance of the least significant bits for differential
privacy, CCS 2012). The guarantee is that of the ideal mechanism. `draw=` takes another source of noise.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core.dtypes import statistics_dtype
from odjax.core.keys import check_key, fold_path, fold_step
from odjax.core.paths import leaves_with_paths
from odjax.privacy.clipping import check_relation

Draw = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
"""A source of standard normal noise: `draw(key, shape, dtype) -> array`, as `jax.random.normal`."""


def sensitivity_of(clip: Any, relation: str) -> float:
    """The sensitivity that a clip declares.

    Args:
      clip: an object with `sensitivity(relation) -> float`, such as `Clip`.
      relation: "add_or_remove_one" or "replace_one".

    Returns:
      The sensitivity, above 0; inf where nothing is bounded.

    Raises:
      TypeError: the clip declares none.
      ValueError: what it declares is no number above 0, or the relation is unknown.
    """
    check_relation(relation)
    declared = getattr(clip, "sensitivity", None)
    if not callable(declared):
        raise TypeError(
            f"noise needs a clip that declares its sensitivity, got {clip!r}: give the clip itself, such as "
            f"odjax.privacy.Clip(1.0), not its norm"
        )
    value = declared(relation)
    if not isinstance(value, numbers.Real) or not value > 0:
        raise ValueError(f"{clip!r}.sensitivity({relation!r}) must be a number above 0, got {value!r}")
    return float(value)


def standard_deviation(clip: Any, noise_multiplier: float, relation: str = "add_or_remove_one") -> float:
    """The standard deviation of the noise on a sum of clipped trees: z times the sensitivity.

    Args:
      clip: an object with `sensitivity(relation) -> float`.
      noise_multiplier: z >= 0.
      relation: "add_or_remove_one" or "replace_one".

    Returns:
      z * sensitivity; 0 for z = 0.

    Raises:
      TypeError: the clip declares no sensitivity.
      ValueError: z is no finite number of at least 0, or z > 0 and the sensitivity is infinite.

    Example:
      >>> from odjax.privacy import Clip
      >>> standard_deviation(Clip(0.5), 3.0), standard_deviation(Clip(0.5), 3.0, "replace_one")
      (1.5, 3.0)
    """
    if not isinstance(noise_multiplier, numbers.Real) or not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be a finite number of at least 0, got {noise_multiplier!r}")
    sensitivity = sensitivity_of(clip, relation)
    if noise_multiplier == 0:
        return 0.0
    if math.isinf(sensitivity):
        raise ValueError(
            f"no noise hides a contribution without bound: {clip!r} has infinite sensitivity; give it a "
            f"finite norm, or noise_multiplier=0 for a run without privacy"
        )
    return float(noise_multiplier) * sensitivity


def gaussian_noise(
    clip: Any,
    noise_multiplier: float,
    key: jax.Array,
    tree: Any,
    *,
    relation: str = "add_or_remove_one",
    mask: Any = None,
    draw: Draw = jax.random.normal,
) -> Any:
    """Adds N(0, (z * sensitivity)^2) to every number of a tree: a sum of clipped contributions.

    The noise of a leaf depends on the key and on the leaf's path alone, neither on the other leaves nor on
    how the leaf is sharded. It is drawn and added in float32 (float64 for float64 leaves) and rounded once to
    the leaf's dtype. z = 0 returns the tree as it is.

    Args:
      clip: what bounded every contribution: an object with `sensitivity(relation) -> float`.
      noise_multiplier: z >= 0, the standard deviation in units of the sensitivity.
      key: a typed key of this round. Two releases must never share one.
      tree: a tree of real floats, the sum over all contributions and all devices.
      relation: the accountant's neighbouring relation.
      mask: a tree of 0 and 1 or bool, each leaf broadcastable to that of `tree`; where it is 0 no noise is
        added. Nothing of a contribution may be there: it would be released as it is.
      draw: another source of standard normal noise.

    Returns:
      A tree like `tree`.

    Raises:
      TypeError: the clip declares no sensitivity, the key is no typed one, or a leaf is no real float.
      ValueError: z below 0 or not finite, infinite sensitivity with z > 0, or a mask of another structure or
        shape.

    Source: C. Dwork and A. Roth, The Algorithmic Foundations of Differential Privacy, 2014, Appendix A; the
      sum with noise of H. B. McMahan et al., arXiv 1710.06963, Algorithm 1.

    Example:
      >>> from odjax.privacy import Clip
      >>> total = {"w": jnp.zeros((2,)), "b": jnp.zeros((1,))}
      >>> noisy = gaussian_noise(Clip(1.0), 2.0, jax.random.key(0), total, mask={"w": 1, "b": 0})
      >>> noisy["b"], bool((noisy["w"] != 0).all())
      (Array([0.], dtype=float32), True)
    """
    check_key(key)
    stddev = standard_deviation(clip, noise_multiplier, relation)
    leaves, structure = leaves_with_paths(tree), jax.tree.structure(tree)
    masks = [None] * len(leaves) if mask is None else _masks(mask, tree)

    def one(path: str, leaf: Any, keep: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"the leaf {path!r} is {leaf.dtype}: noise is added to real floats only")
        if stddev == 0:
            return leaf
        wide = statistics_dtype(leaf)
        noise = draw(fold_path(key, path), leaf.shape, wide)
        noisy = (leaf.astype(wide) + noise * wide.type(stddev)).astype(leaf.dtype)
        return noisy if keep is None else jnp.where(_spread(path, keep, leaf.shape), noisy, leaf)

    return structure.unflatten([one(path, leaf, m) for (path, leaf), m in zip(leaves, masks, strict=True)])


def _masks(mask: Any, tree: Any) -> list[Any]:
    try:
        return jax.tree.structure(tree).flatten_up_to(mask)
    except ValueError as error:
        raise ValueError(f"mask must be a tree with the structure of the noised one: {error}") from None


def _spread(path: str, keep: Any, shape: tuple[int, ...]) -> jax.Array:
    try:
        return jnp.broadcast_to(jnp.asarray(keep).astype(bool), shape)
    except ValueError:
        raise ValueError(
            f"the mask of {path!r} has shape {np.shape(keep)}, which does not broadcast to {shape}"
        ) from None


class PrivatizerState(NamedTuple):
    """State of `privatizer`.

    Attributes:
      key: uint32, the data of the key that the noise is drawn from.
      count: int32 [], updates so far; every update has a key of its own.
    """

    key: jax.Array
    count: jax.Array


def privatizer(
    clip: Any,
    noise_multiplier: float,
    key: jax.Array,
    *,
    normalizer: float = 1.0,
    relation: str = "add_or_remove_one",
    mask: Any = None,
    draw: Draw = jax.random.normal,
) -> optax.GradientTransformation:
    """`gaussian_noise` as an optax transform: (sum of clipped updates + noise) / normalizer.

    It stands first in a chain: what it is given must be the sum of clipped contributions. All that follows is
    postprocessing.

    Args:
      clip: what bounded every contribution: an object with `sensitivity(relation) -> float`.
      noise_multiplier: z >= 0.
      key: a typed key, used for nothing else; update t draws from `fold_step(key, t)`.
      normalizer: a fixed number above 0 to divide by, such as `plan.normalizer`; never the size of the cohort
        that came.
      relation: the accountant's neighbouring relation.
      mask: as in `gaussian_noise`.
      draw: another source of standard normal noise.

    Returns:
      A transform with a `PrivatizerState`.

    Raises:
      TypeError: the clip declares no sensitivity, or the key is no typed one.
      ValueError: a number outside its range, or infinite sensitivity with z > 0.

    Example:
      >>> from odjax.privacy import Clip
      >>> noise = privatizer(Clip(1.0), 0.5, jax.random.key(0), normalizer=10.0)
      >>> optimizer = optax.chain(noise, optax.sgd(0.1))
      >>> state = optimizer.init(jnp.zeros(2))
      >>> updates, state = optimizer.update(jnp.ones(2), state)
      >>> int(state[0].count), bool((updates != -0.01).all())
      (1, True)
    """
    check_key(key)
    check_normalizer(normalizer)
    standard_deviation(clip, noise_multiplier, relation)
    impl = jax.random.key_impl(key)

    def init(params: Any) -> PrivatizerState:
        del params
        # A copy: a loop that donates the state must not take the caller's key with it.
        return PrivatizerState(jnp.array(jax.random.key_data(key), copy=True), jnp.zeros([], jnp.int32))

    def update(updates: Any, state: PrivatizerState, params: Any = None) -> tuple[Any, PrivatizerState]:
        del params
        own = fold_step(jax.random.wrap_key_data(state.key, impl=impl), state.count)
        noisy = gaussian_noise(clip, noise_multiplier, own, updates, relation=relation, mask=mask, draw=draw)
        return divided(noisy, normalizer), PrivatizerState(state.key, optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def check_normalizer(normalizer: float) -> float:
    """Makes sure that a normalizer is a fixed number above 0.

    Args:
      normalizer: what came.

    Returns:
      The normalizer.

    Raises:
      TypeError: it is an array, which may depend on the data.
      ValueError: it is not finite and above 0.
    """
    if isinstance(normalizer, bool) or not isinstance(normalizer, numbers.Real):
        raise TypeError(
            f"normalizer must be a fixed Python number, q N of the plan, got {normalizer!r}: dividing by the "
            f"size of the cohort that came would release it without noise"
        )
    if not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer must be a finite number above 0, got {normalizer!r}")
    return float(normalizer)


def divided(tree: Any, normalizer: float) -> Any:
    """Divides every leaf by a fixed number, in float32 (float64 for float64 leaves).

    Args:
      tree: a tree of real floats.
      normalizer: the divisor.

    Returns:
      A tree like `tree`.
    """
    if normalizer == 1:
        return tree

    def one(leaf: jax.Array) -> jax.Array:
        wide = statistics_dtype(leaf)
        return (leaf.astype(wide) / wide.type(normalizer)).astype(leaf.dtype)

    return jax.tree.map(one, tree)


def release(
    clip: Any,
    noise_multiplier: float,
    key: jax.Array,
    total: Any,
    *,
    normalizer: float,
    relation: str,
    mask: Any = None,
    draw: Draw = jax.random.normal,
) -> Any:
    """(total + noise) / normalizer, and exactly 0 where the mask is 0, whatever the sum holds there.

    Args:
      clip: what bounded every contribution.
      noise_multiplier: z >= 0.
      key: a typed key of this round.
      total: the sum of clipped contributions.
      normalizer: the fixed number to divide by.
      relation: the accountant's neighbouring relation.
      mask: a tree of 0 and 1, each leaf broadcastable to that of `total`.
      draw: another source of standard normal noise.

    Returns:
      A tree like `total`.

    Raises:
      TypeError: see `gaussian_noise`.
      ValueError: see `gaussian_noise`.
    """
    if mask is not None:
        leaves, structure = leaves_with_paths(total), jax.tree.structure(total)
        total = structure.unflatten(
            [
                jnp.where(_spread(path, keep, leaf.shape), leaf, jnp.zeros_like(leaf))
                for (path, leaf), keep in zip(leaves, _masks(mask, total), strict=True)
            ]
        )
    noisy = gaussian_noise(clip, noise_multiplier, key, total, relation=relation, mask=mask, draw=draw)
    return divided(noisy, normalizer)
