"""What happens to an optimizer's state when a chain's sketches change: moments are in old coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from odjax.core.optimizer_state import reset_moments
from odjax.core.paths import name_of

BOUNDARIES = ("reset", "keep", "rotate")
_FIRST = ("mu", "trace", "ema", "m")
_SECOND = ("nu", "nu_max", "sum_of_squares", "v")


def check_boundary(on_boundary: str) -> None:
    """Raises when the choice is unknown.

    Args:
      on_boundary: what came.

    Raises:
      ValueError: naming the choices.
    """
    if on_boundary not in BOUNDARIES:
        raise ValueError(f"on_boundary must be one of {BOUNDARIES}, got {on_boundary!r}")


def _place(key_path: tuple[Any, ...], leaf: Any, factors: Mapping[str, Any]) -> tuple[str, str] | None:
    """(field of the optimizer's state, path of the factor) of a leaf that has the shape of a factor."""
    path = name_of(key_path[-1]) if key_path else ""
    if path not in factors or jnp.shape(factors[path]) != jnp.shape(leaf):
        return None
    fields = [key.name for key in key_path[:-1] if isinstance(key, jax.tree_util.GetAttrKey)]
    return (fields[-1] if fields else ""), path


def check_state(state: Any, factors: Mapping[str, Any], on_boundary: str) -> None:
    """Makes sure that a boundary knows what to do with every array of an optimizer's state.

    Args:
      state: of the inner optimizer, initialised with `factors`; arrays or shapes.
      factors: path -> factor.
      on_boundary: "reset", "keep" or "rotate".

    Raises:
      ValueError: an array belongs to no factor, or "rotate" cannot tell which moment it is.
    """
    if on_boundary == "keep":
        return
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if jnp.ndim(leaf) == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        place, name = _place(key_path, leaf, factors), jax.tree_util.keystr(key_path)
        if place is None:
            raise ValueError(
                f"on_boundary={on_boundary!r}: the inner state{name} of shape {jnp.shape(leaf)} has the "
                "shape of no factor; use an inner transform with moments of the factors' shapes "
                "(scale_by_adam, trace, ...) or on_boundary='keep'"
            )
        if on_boundary == "rotate" and place[0] not in _FIRST + _SECOND:
            raise ValueError(
                f"on_boundary='rotate' knows the first moments {_FIRST} and the second moments {_SECOND}, "
                f"not the inner state{name}; use on_boundary='reset' or 'keep'"
            )


def reset(inner: optax.GradientTransformation, state: Any, factors: Mapping[str, Any]) -> Any:
    """Moments of all factors, and the counts beside them, as at the start; schedules go on.

    Args:
      inner: the optimizer.
      state: its state.
      factors: path -> anything of the factor's shape and dtype.

    Returns:
      The state.
    """
    return reset_moments(state, dict(factors), init=inner.init)


def rotate(state: Any, factors: Mapping[str, Any], turn: Callable[[str, jax.Array, bool], jax.Array]) -> Any:
    """First moments times R, second moments times R * R.

    Args:
      state: of the inner optimizer.
      factors: path -> anything of the factor's shape.
      turn: `(path, moment, squared) -> moment` in the new coordinates.

    Returns:
      The state.
    """

    def move(key_path: tuple[Any, ...], leaf: Any) -> Any:
        place = _place(key_path, leaf, factors)
        if place is None:
            return leaf
        field, path = place
        return turn(path, leaf, field in _SECOND).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(move, state)
