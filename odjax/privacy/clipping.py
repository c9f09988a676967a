"""Clipping to one global L2 norm, with the sensitivity of a sum of clipped trees as part of the clip."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from odjax.core.paths import leaves_with_paths

RELATIONS = ("add_or_remove_one", "replace_one")
"""What two neighbouring populations differ in: one unit more or less, or one unit that is another."""

# Factors that keep the squares of float32 numbers within its range. Powers of two: no digit is lost.
_DOWN, _UP = 2.0**-80, 2.0**80
_LARGE, _SMALL = 2.0**50, 2.0**-40


def check_relation(relation: str) -> str:
    """Makes sure that a neighbouring relation is one of `RELATIONS`.

    Args:
      relation: what came.

    Returns:
      The relation.

    Raises:
      ValueError: it is not.
    """
    if relation not in RELATIONS:
        raise ValueError(f"relation must be 'add_or_remove_one' or 'replace_one', got {relation!r}")
    return relation


def _total(x: jax.Array) -> jax.Array:
    # Axis by axis: the rounding error is that of the longest axis, and no axis is gathered for it.
    while x.ndim:
        x = jnp.sum(x, axis=-1)
    return x


def _check_floats(tree: Any) -> list[jax.Array]:
    leaves = []
    for path, leaf in leaves_with_paths(tree):
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"the leaf {path!r} is {leaf.dtype}: only real floats are clipped; leave it out with "
                f"odjax.partition, or convert it"
            )
        if leaf.dtype == jnp.float16:
            raise TypeError(
                f"the leaf {path!r} is float16, whose smallest numbers are so far apart that rounding leads "
                f"beyond the bound: convert it to bfloat16 or float32"
            )
        leaves.append(leaf)
    return leaves


@dataclass(frozen=True)
class Clip:
    """Scales a tree to a global L2 norm of at most C: x min(1, C / ||x||), one norm over all leaves.

    Called as `clip(tree) -> (clipped tree, norm before)`. The norm is accumulated in float32 (float64 with a
    float64 leaf) and returned in it. Structure and dtypes stay.

    | input                    | output                  | norm  |
    |--------------------------|-------------------------|-------|
    | norm at most C           | the same bits           | ||x|| |
    | norm above C             | norm <= C (1 + 1e-6)    | ||x|| |
    | zero, no leaves          | the same                | 0     |
    | NaN or inf in any leaf   | zero in every leaf      | inf   |

    A leaf of bfloat16 that is scaled is scaled by a rounding unit (2^-8) less than the others, so that
    rounding to nearest does not lead beyond C. Squares neither overflow nor underflow.

    Attributes:
      norm: C > 0; inf leaves everything finite as it is.

    Raises:
      ValueError: a norm that is not above 0.
      TypeError: when called, a leaf that is no real float, or one of float16.

    Source: M. Abadi et al., Deep Learning with Differential Privacy, CCS 2016, arXiv 1607.00133, Algorithm 1;
      for the updates of users H. B. McMahan et al., arXiv 1710.06963.

    Example:
      >>> clipped, norm = Clip(1.0)({"a": jnp.array([3.0]), "b": jnp.array([4.0])})
      >>> [round(float(x[0]), 6) for x in (clipped["a"], clipped["b"])], float(norm)
      ([0.6, 0.8], 5.0)
    """

    norm: float

    def __post_init__(self) -> None:
        """Checks the norm."""
        if isinstance(self.norm, bool) or not isinstance(self.norm, numbers.Real) or not self.norm > 0:
            raise ValueError(
                f"the clipping norm must be a number above 0 (math.inf for no clipping), got {self.norm!r}"
            )

    def __call__(self, tree: Any) -> tuple[Any, jax.Array]:
        """Clips a tree; see the class."""
        leaves = _check_floats(tree)
        wide = jnp.dtype(jnp.float32)
        if any(leaf.dtype == jnp.float64 for leaf in leaves):
            wide = jnp.dtype(jnp.float64)
        filled = [leaf for leaf in leaves if leaf.size]
        if not filled:
            return tree, jnp.zeros((), wide)
        number = wide.type
        # NaN survives a maximum, so one number tells whether everything is finite.
        most = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)).astype(wide) for leaf in filled]))
        finite = jnp.isfinite(most)
        factor = jnp.where(most > number(_LARGE), number(_DOWN), number(1))
        factor = jnp.where(most < number(_SMALL), number(_UP), factor)
        squares = [_total(jnp.square(leaf.astype(wide) * factor)) for leaf in filled]
        scaled = jnp.sqrt(sum(squares[1:], start=squares[0]))
        norm = jnp.where(finite, scaled / factor, number(math.inf))
        bound = number(self.norm)
        scale = bound / jnp.where(finite & (scaled > 0), scaled, number(1))

        def one(leaf: jax.Array) -> jax.Array:
            less = 1 - float(jnp.finfo(leaf.dtype).eps) / 2 if leaf.dtype.itemsize < 4 else 1
            smaller = ((leaf.astype(wide) * factor) * (scale * number(less))).astype(leaf.dtype)
            return jnp.where(finite, jnp.where(norm > bound, smaller, leaf), jnp.zeros_like(leaf))

        return jax.tree.structure(tree).unflatten([one(leaf) for leaf in leaves]), norm

    def sensitivity(self, relation: str = "add_or_remove_one") -> float:
        """How far the sum of clipped trees moves, in L2 norm, when one unit changes.

        Args:
          relation: "add_or_remove_one" (a unit more or less) or "replace_one" (a unit is another one).

        Returns:
          C, or 2 C for "replace_one".

        Raises:
          ValueError: an unknown relation.

        Example:
          >>> Clip(0.5).sensitivity(), Clip(0.5).sensitivity("replace_one")
          (0.5, 1.0)
        """
        return float(self.norm) * (2.0 if check_relation(relation) == "replace_one" else 1.0)
