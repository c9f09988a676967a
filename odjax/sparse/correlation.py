"""Correlation between the features of a data set, for topologies that follow the data."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from odjax.core import statistics_dtype


def feature_correlation(features: jax.Array) -> jax.Array:
    """Pearson correlation between the features of a data set, with 0 where there is none.

    Args:
      features: [samples, n], real; in bfloat16 or float16 it is taken in float32.

    Returns:
      float32[n, n] (float64 for float64). The diagonal is 0, and so is every correlation with a feature that
      is constant or has a NaN or an infinity.

    Raises:
      TypeError: features that are not real numbers.
      ValueError: another rank, fewer than two samples.

    Example:
      >>> x = jnp.array([[0.0, 3.0, 1.0], [1.0, 2.0, 1.0], [2.0, 1.0, 1.0]])
      >>> feature_correlation(x).round(3) + 0.0
      Array([[ 0., -1.,  0.],
             [-1.,  0.,  0.],
             [ 0.,  0.,  0.]], dtype=float32)
    """
    x = jnp.asarray(features)
    if x.ndim != 2 or x.shape[0] < 2:
        raise ValueError(f"features must be [samples, n] with two samples or more, got {list(x.shape)}")
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"features must be real numbers, got {x.dtype}")
    x = x.astype(statistics_dtype(x))
    # Rounding of the mean would make equal numbers differ from it: constant features are found beforehand.
    useful = jnp.all(jnp.isfinite(x), axis=0) & (jnp.min(x, axis=0) < jnp.max(x, axis=0))
    x = jnp.where(useful, x, jnp.zeros_like(x))
    x /= jnp.maximum(jnp.max(jnp.abs(x), axis=0, keepdims=True), jnp.finfo(x.dtype).tiny)
    x -= jnp.mean(x, axis=0, keepdims=True)
    norm = jnp.sqrt(jnp.sum(x * x, axis=0, keepdims=True))
    x = jnp.where(norm > 0, x / jnp.where(norm > 0, norm, jnp.ones_like(norm)), jnp.zeros_like(x))
    r = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(jnp.eye(r.shape[0], dtype=bool), jnp.zeros_like(r), r)
