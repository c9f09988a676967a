"""Which dtype to reduce in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def statistics_dtype(x: jax.Array | DTypeLike) -> jnp.dtype:
    """The dtype for sums, norms and statistics of an array: float32, or float64 for float64.

    Args:
      x: an array, or its dtype.

    Returns:
      The dtype.

    Example:
      >>> str(statistics_dtype(jnp.bfloat16)), str(statistics_dtype(jnp.ones(1)))
      ('float32', 'float32')
    """
    dtype = jnp.dtype(getattr(x, "dtype", x))
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
