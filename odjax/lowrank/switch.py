"""Adapters on or off: for a whole call, or for each example of a batch.

Off for a whole call is static: the model alone is traced, and what it computes is its own to the last bit.
With one value an example, one program serves the rows of several paths over the same weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

On = bool | jax.Array
"""True, False, or one value an example: bool [B], or floating point [B], which multiplies the update."""


def check_on(on: On) -> On:
    """Raises for what cannot switch adapters.

    Args:
      on: the switch.

    Returns:
      It, as Python's bool or an array.

    Raises:
      TypeError: neither bool nor floating point.
      ValueError: an array that is not [B].

    Example:
      >>> check_on(jnp.array([1, 0]))
      Traceback (most recent call last):
      TypeError: on must be bool or floating point, got int32: on.astype(bool)
    """
    if isinstance(on, (bool, np.bool_)):
        return bool(on)
    if not isinstance(on, (jax.Array, np.ndarray)):
        raise TypeError(f"on must be True, False or an array [B], got {on!r}")
    if on.dtype != jnp.bool_ and not jnp.issubdtype(on.dtype, jnp.floating):
        raise TypeError(f"on must be bool or floating point, got {on.dtype}: on.astype(bool)")
    if on.ndim != 1:
        raise ValueError(
            f"on must be True, False or one value an example [B], got shape {tuple(on.shape)}: "
            "jnp.full(batch, on) switches all of them"
        )
    return jnp.asarray(on)


def added(path: str, on: On, y: jax.Array, *updates: jax.Array) -> jax.Array:
    """The output of a layer and its updates, for the examples that they are switched on for.

    Args:
      path: of the layer's weight, for errors.
      on: True or [B], see `On`.
      y: [B, ...], what the layer gives.
      *updates: like y.

    Returns:
      [B, ...] in the dtype of y.

    Raises:
      ValueError: y has another number of examples.

    Example:
      >>> added("kernel", jnp.array([0.5, 0.0]), jnp.ones((2, 1)), jnp.ones((2, 1)))
      Array([[1.5],
             [1. ]], dtype=float32)
    """
    if on is True:
        return sum(updates, y)
    if not y.ndim or y.shape[0] != on.shape[0]:
        raise ValueError(
            f"on has {on.shape[0]} examples, but what the layer of {path!r} gives has the shape "
            f"{tuple(y.shape)}: give one value for each example of its first axis, or exclude it with where="
        )
    on = on.reshape((-1,) + (1,) * (y.ndim - 1))
    if on.dtype == jnp.bool_:
        return jnp.where(on, sum(updates, y), y)
    return sum((on.astype(y.dtype) * update for update in updates), y)
