"""What every head checks of its input."""

from __future__ import annotations

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np


def check_labels(labels: jax.Array, num_classes: int, features: jax.Array | None = None) -> None:
    """Raises for labels that are no integers, do not fit the features, or are no class.

    Args:
      labels: [...], concrete or traced; traced ones are not compared with the number of classes.
      num_classes: K.
      features: [..., d], or None.

    Raises:
      TypeError: labels that are no integers.
      ValueError: labels of another shape than features[..., 0], or outside [0, K) in a concrete array.
    """
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"labels must be integers, got {jnp.result_type(labels)}")
    if features is not None and features.shape[:-1] != jnp.shape(labels):
        raise ValueError(f"features [..., d] and labels [...] differ: {features.shape}, {jnp.shape(labels)}")
    known = not isinstance(labels, jax.core.Tracer) and getattr(labels, "is_fully_addressable", True)
    if known and jnp.size(labels):
        low, high = (int(extreme(np.asarray(labels))) for extreme in (np.min, np.max))
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must be in [0, {num_classes}), got {low if low < 0 else high}")


def check_features(h: jax.Array, dim: int | None = None) -> None:
    """Raises for features that are not floating point, or (where it is given) of another width.

    Args:
      h: [..., d].
      dim: d.

    Raises:
      TypeError: other numbers than floating-point ones.
      ValueError: another width.
    """
    if not jnp.issubdtype(h.dtype, jnp.floating):
        raise TypeError(f"features must be floating point, got {h.dtype}: use features.astype(jnp.float32)")
    if not h.ndim or (dim is not None and h.shape[-1] != dim):
        raise ValueError(f"features must be [..., {'d' if dim is None else dim}], got shape {h.shape}")


def check_scale(scale: float) -> None:
    """Raises for an inverse temperature that is not a positive number."""
    if isinstance(scale, str) or not scale > 0 or not math.isfinite(scale):
        raise ValueError(f"scale must be a positive number, got {scale!r}")


def whole_number(name: str, value: int) -> int:
    """The value as a Python integer; raises a TypeError that names it where it is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
