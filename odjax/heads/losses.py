"""Losses of fixed codes: dot regression, inverse temperatures, class lengths for imbalanced labels."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from odjax.core import statistics_dtype
from odjax.heads.checks import check_features, check_labels, check_scale

EPS = 1e-8


def unit_features(h: jax.Array) -> jax.Array:
    """Features of length 1, in float32; a row shorter than 1e-8 becomes zero and has no gradient.

    Args:
      h: [..., d].

    Returns:
      [..., d], float32 (float64 for float64).
    """
    h = h.astype(statistics_dtype(h))
    return h / _length(h)[..., None]


def _length(h: jax.Array) -> jax.Array:
    """|h|, [...], without overflow; a row shorter than 1e-8 has the length inf and no gradient."""
    # What is divided by is a constant: the quotient's length takes the gradient.
    most = jax.lax.stop_gradient(jnp.max(jnp.abs(h), axis=-1, initial=0))
    unit = jnp.where((most > 0) | jnp.isnan(most), most, 1)
    share = h / unit[..., None]
    square = jnp.sum(share * share, axis=-1)
    short = most * jnp.sqrt(jnp.where(square > 0, jax.lax.stop_gradient(square), 0)) <= EPS
    return jnp.where(short, jnp.inf, most * jnp.sqrt(jnp.where(short, 1.0, square)))


def etf_logits(h: jax.Array, code: jax.Array, scale: float = 1.0) -> jax.Array:
    """scale * h . m_k for every class, accumulated in float32; no gradient reaches the code.

    Args:
      h: features [..., d].
      code: [d, K], in any floating dtype; products are taken in that of `h`.
      scale: inverse temperature.

    Returns:
      [..., K] float32 (float64 for float64 features).

    Raises:
      ValueError: a code of another dimension, or a scale that is not positive.

    Source: Yang et al. 2022, arXiv 2203.09081, section 3.

    Example:
      >>> etf_logits(jnp.array([1.0, 0.0]), jnp.array([[1.0, -1.0], [0.0, 0.0]]), 2.0)
      Array([ 2., -2.], dtype=float32)
    """
    _check_code(h, code)
    check_scale(scale)
    code = jax.lax.stop_gradient(code).astype(h.dtype)
    wide = statistics_dtype(h)
    precision = None if h.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    y = jnp.einsum("...d,dk->...k", h, code, preferred_element_type=wide, precision=precision)
    return y * jnp.asarray(scale, wide)


def dot_regression_loss(
    h: jax.Array,
    labels: jax.Array,
    code: jax.Array,
    lengths: jax.Array | None = None,
    weight: float = 1.0,
    norm_penalty: float = 0.0,
) -> jax.Array:
    """Squared distance of a feature's product with its own class vector from the largest it could be.

    (weight / 2) (m_y . h - |m_y| |h|)^2 / |h|, with |h| a constant for the gradient; for features and vectors
    of length 1 that is (weight / 2) (cos - 1)^2: a pull to the own vertex, and no push from the others.

    Args:
      h: features [..., d].
      labels: [...], in [0, K); traced ones are not checked.
      code: [d, K].
      lengths: [K], multiply the class vectors (`batch_class_lengths`); None: 1.
      weight: of the loss; 1 for long-tailed data and 10 for few-shot increments in the papers' code.
      norm_penalty: weight of |h|, with its gradient.

    Returns:
      Loss of every example, [...] float32. A row of zeros has loss 0.

    Raises:
      TypeError: labels that are no integers.
      ValueError: shapes that do not fit, labels outside [0, K).

    Source: Yang et al. 2022, arXiv 2203.09081, equation 12, in the form of its code; Yang et al. 2023, arXiv
      2302.03004.

    Example:
      >>> code = jnp.array([[1.0, -1.0], [0.0, 0.0]])
      >>> dot_regression_loss(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0]), code)
      Array([0. , 0.5], dtype=float32)
    """
    _check_code(h, code)
    check_labels(labels, code.shape[1], h)
    if lengths is not None and lengths.shape != code.shape[1:]:
        raise ValueError(f"lengths must be [{code.shape[1]}], one a class, got shape {lengths.shape}")
    own = jnp.moveaxis(code[:, labels], 0, -1)
    own = own if lengths is None else own * lengths.astype(own.dtype)[labels][..., None]
    return vertex_regression(h, own, weight, norm_penalty)


def vertex_regression(h: jax.Array, own: jax.Array, weight: float, norm_penalty: float = 0.0) -> jax.Array:
    """`dot_regression_loss` of features whose class vectors are at hand.

    Args:
      h: features [..., d].
      own: the vector of each one's class, [..., d]; a constant.
      weight: of the loss.
      norm_penalty: weight of |h|.

    Returns:
      Loss of every example, [...] float32.
    """
    wide = statistics_dtype(h)
    h, own = h.astype(wide), jax.lax.stop_gradient(own).astype(wide)
    size = _length(h)
    short = jnp.isinf(size) & jnp.all(jnp.isfinite(h), axis=-1)
    size = jnp.where(short, 1.0, size)
    known = jax.lax.stop_gradient(size)
    # (m . h - |m| |h|)^2 / |h| = |h| (m . h / |h| - |m|)^2, which does not overflow.
    away = jnp.sum(own * (h / known[..., None]), axis=-1) - jnp.sqrt(jnp.sum(own * own, axis=-1))
    loss = jnp.asarray(weight / 2, wide) * away * away * known + jnp.asarray(norm_penalty, wide) * size
    return jnp.where(short, jnp.zeros_like(loss), loss)


def scale_for_probability(num_classes: int, probability: float = 0.999) -> float:
    """The inverse temperature at which a feature on its vertex of a simplex has a given probability.

    s = (K - 1) / K log((K - 1) p / (1 - p)).

    Args:
      num_classes: K.
      probability: p, between 1 / K and 1.

    Returns:
      s.

    Raises:
      ValueError: K below 2, or p not between 1 / K and 1.

    Example:
      >>> round(scale_for_probability(10, 0.999), 3)
      8.194
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if not 1 / num_classes < probability < 1:
        raise ValueError(f"probability must be between 1/{num_classes} and 1, got {probability}")
    odds = (num_classes - 1) * probability / (1 - probability)
    return (num_classes - 1) / num_classes * math.log(odds)


def batch_class_lengths(
    labels: jax.Array,
    num_classes: int,
    weights: jax.Array | None = None,
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    """Lengths sqrt(gamma / n_k) of class vectors that make up for imbalance, from the labels of a batch.

    gamma = (examples) / (classes that are there); the sum of n_k length_k^2 is the number of examples.

    Args:
      labels: [...] integers; those outside [0, K) are not counted.
      num_classes: K.
      weights: [...], 0 for padding.
      axis_name: of the mesh axes that the batch is divided over, inside `jax.shard_map`.

    Returns:
      float32 [K]; 1 for classes that are absent. For the counts of a data set pass all of its labels.

    Raises:
      ValueError: weights of another shape.

    Source: Yang et al. 2022, arXiv 2203.09081, section 4, in the form of its code.

    Example:
      >>> batch_class_lengths(jnp.array([0, 0, 0, 0, 1]), 3) ** 2
      Array([0.625, 2.5  , 1.   ], dtype=float32)
    """
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights must have the shape of the labels, {labels.shape}, got {weights.shape}")
    ones = jnp.ones(labels.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    ones = jnp.where((labels >= 0) & (labels < num_classes), ones, 0.0)
    counts = jax.ops.segment_sum(jnp.ravel(ones), jnp.ravel(labels), num_classes)
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
    there = counts > 0
    gamma = jnp.sum(counts) / jnp.maximum(jnp.sum(there.astype(jnp.float32)), 1.0)
    return jnp.where(there, jnp.sqrt(gamma / jnp.where(there, counts, 1.0)), 1.0)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of logits; of a label that is no class, the log-sum-exp.

    Args:
      logits: [..., K].
      labels: [...].

    Returns:
      [...] in the dtype of the logits.
    """
    known = (labels >= 0) & (labels < logits.shape[-1])
    place = jnp.where(known, labels, 0)[..., None]
    own = jnp.take_along_axis(logits, place, axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(known, own, 0)


def _check_code(h: jax.Array, code: jax.Array) -> None:
    check_features(h)
    if code.ndim != 2 or h.shape[-1:] != code.shape[:1]:
        raise ValueError(f"features [..., d] and code [d, K] do not fit: {h.shape} and {code.shape}")
