"""The loss of a guard: half for "unsafe", half for the mean of the categories, rare ones weighted up."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from odjax.core import statistics_dtype


class PositiveWeights(NamedTuple):
    """Weights of the positive examples: `categories` [C] and `unsafe` []; float32."""

    categories: jax.Array
    unsafe: jax.Array


def guard_loss(
    unsafe: jax.Array,
    categories: jax.Array,
    targets: jax.Array,
    *,
    pos_weight: jax.Array | None = None,
    unsafe_pos_weight: jax.Array | float | None = None,
    label_mask: jax.Array | None = None,
    unsafe_targets: jax.Array | None = None,
) -> jax.Array:
    """The loss of every text,

      1/2 bce(u, y0; w0) + sum_j 1/(2C) bce(c_j, y_j; w_j),
      bce(z, y; w) = -(w y log sigma(z) + (1 - y) log sigma(-z)).

    y0 is 1 where any observed y_j is; with labels missing that is a lower bound. A text of which nothing is
    observed has no y0, and a loss of zero.

    Args:
      unsafe: logits u [B].
      categories: logits c [B, C].
      targets: y [B, C], 0 or 1 (of any dtype) where observed.
      pos_weight: w [C]; None: ones.
      unsafe_pos_weight: w0; None: 1.
      label_mask: bool [B, C], True where a label is observed; None: all are.
      unsafe_targets: y0 [B], where it is known by other means; then every text has one.

    Returns:
      [B] float32, or float64 for float64 logits.

    Raises:
      ValueError: shapes that do not fit, or (when they are concrete) observed targets that are neither 0 nor
        1.
      TypeError: logits that are not floating point, or a mask that is not bool.

    Source: Elesedy et al. 2024, "LoRA-Guard", and the weights of its implementation.

    Example:
      >>> guard_loss(jnp.zeros(1), jnp.zeros((1, 2)), jnp.array([[1, 0]]))  # log 2
      Array([0.6931472], dtype=float32)
    """
    for name, logits in (("unsafe", unsafe), ("categories", categories)):
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise TypeError(f"{name} must be logits, got {logits.dtype}")
    if categories.ndim != 2 or unsafe.shape != categories.shape[:1]:
        raise ValueError(
            f"unsafe [B] and categories [B, C] do not fit: {tuple(unsafe.shape)}, {tuple(categories.shape)}"
        )
    if targets.shape != categories.shape:
        raise ValueError(
            f"targets must have the shape of categories {tuple(categories.shape)}, got {tuple(targets.shape)}"
        )
    if pos_weight is not None and jnp.shape(pos_weight) != categories.shape[1:]:
        raise ValueError(
            f"pos_weight must have a number a category {tuple(categories.shape[1:])}, got shape "
            f"{tuple(jnp.shape(pos_weight))}"
        )
    y, observed = _labels(targets, label_mask)
    wide = statistics_dtype(categories)
    u, c = unsafe.astype(wide), categories.astype(wide)
    w = jnp.ones(c.shape[1], wide) if pos_weight is None else jnp.asarray(pos_weight).astype(wide)
    each = jnp.where(observed, _binary(c, y, w[None]), 0)
    if unsafe_targets is None:
        y0, known = jnp.any(y, axis=1), jnp.any(observed, axis=1)
    else:
        if unsafe_targets.shape != unsafe.shape:
            raise ValueError(
                f"unsafe_targets must have the shape {tuple(unsafe.shape)}, got {tuple(unsafe_targets.shape)}"
            )
        y0, known = _labels(unsafe_targets[:, None], None)
        y0, known = y0[:, 0], known[:, 0]
    w0 = jnp.asarray(1.0 if unsafe_pos_weight is None else unsafe_pos_weight, wide)
    first = jnp.where(known, _binary(u, y0, w0.reshape(1)), 0)
    return first / 2 + jnp.sum(each, axis=1) / (2 * c.shape[1])


def _binary(z: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    """Weighted binary cross-entropy of logits `z` for bool `y`."""
    return jnp.where(y, w * jax.nn.softplus(-z), jax.nn.softplus(z))


def _labels(targets: jax.Array, label_mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Which labels are positive, and which are observed; both bool."""
    if label_mask is None:
        label_mask = jnp.ones(targets.shape, bool)
    if label_mask.dtype != jnp.bool_:
        raise TypeError(f"label_mask must be bool, got {label_mask.dtype}: compare first, such as m != 0")
    if label_mask.shape != targets.shape:
        raise ValueError(
            f"label_mask must have the shape of targets {tuple(targets.shape)}, got {tuple(label_mask.shape)}"
        )
    if is_concrete(targets) and is_concrete(label_mask):
        seen = np.asarray(targets)[np.asarray(label_mask)]
        if (wrong := seen[(seen != 0) & (seen != 1)]).size:
            raise ValueError(f"targets must be 0 or 1 where they are observed, got {wrong[0]}")
    return label_mask & targets.astype(bool), label_mask


def is_concrete(x: jax.Array) -> bool:
    """Whether the values of an array can be looked at.

    Args:
      x: an array, or a tracer.

    Returns:
      False where it is traced, or lies on other hosts too.
    """
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def positive_weights(
    targets: jax.Array, label_mask: jax.Array | None = None, cap: float | None = None
) -> PositiveWeights:
    """How much rarer positives are than negatives: n_negative / n_positive on a training set.

    Then w_j mean(y_j) = mean(1 - y_j): both sides of a category weigh the same in `guard_loss`. Compute them
    on all of the data: those of a small part of it (a client's) explode.

    Args:
      targets: like `guard_loss`, of the whole training set.
      label_mask: like `guard_loss`.
      cap: the largest weight; None: there is none.

    Returns:
      The weights of the categories and of "unsafe", whose labels are those of `guard_loss`.

    Raises:
      ValueError: without a cap (and when it is concrete), a category without a positive; a cap that is not
        positive; labels as in `guard_loss`.

    Source: Elesedy et al. 2024, "LoRA-Guard", and the weights of its implementation.

    Example:
      >>> positive_weights(jnp.array([[1, 0], [0, 0], [0, 1], [0, 1]]))
      PositiveWeights(categories=Array([3., 1.], dtype=float32), unsafe=Array(0.33333334, dtype=float32))
    """
    if cap is not None and not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}: the largest weight, such as 100")
    if targets.ndim != 2:
        raise ValueError(f"targets must be [B, C], got shape {tuple(targets.shape)}")
    y, observed = _labels(jnp.asarray(targets), label_mask)
    y = jnp.concatenate([y, jnp.any(y, axis=1, keepdims=True)], axis=1)
    observed = jnp.concatenate([observed, jnp.any(observed, axis=1, keepdims=True)], axis=1)
    positive = jnp.sum(y, axis=0, dtype=jnp.float32)
    negative = jnp.sum(observed & ~y, axis=0, dtype=jnp.float32)
    if cap is None:
        if is_concrete(positive) and (rare := np.flatnonzero(np.asarray(positive) == 0)).size:
            raise ValueError(
                f"targets have no positive in category {rare[0]}, whose weight would be infinite: give cap="
            )
        weights = negative / positive
    else:
        weights = jnp.minimum(negative / jnp.maximum(positive, 1e-9), cap)
    return PositiveWeights(weights[:-1], weights[-1])
