"""One leaf of the gradient view: its sketch, its factor's gradient, and the update that this stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core.keys import fold_path, fold_step
from odjax.core.matrices import MatrixView, from_matrices, matrix_shape, to_matrices
from odjax.lowrank.sketches import (
    COORDINATES,
    Bernoulli,
    Coordinates,
    Law,
    Scale,
    Sketch,
    column_norm,
    dense,
    draw,
    inverse_gram,
    lift,
    project,
)


class Leaf(NamedTuple):
    """What is fixed about an adapted leaf.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      view: how it is a stack of matrices.
      rank: of its updates.
      side: where its sketch acts, or the law of the side.
      law: of the sketch.
      scale: of the sketch.
      dtype: of the factor.
    """

    path: str
    shape: tuple[int, ...]
    view: MatrixView
    rank: int
    side: Literal["left", "right"] | Bernoulli
    law: Law
    scale: Scale
    dtype: DTypeLike

    def dim(self, side: str) -> int:
        """Length of the columns of a sketch on a side.

        Args:
          side: "left" or "right".

        Returns:
          The number of outputs or of inputs.
        """
        _, inputs, outputs = matrix_shape(self.shape, self.view)
        return outputs if side == "left" else inputs

    def factor_shape(self) -> tuple[int, ...]:
        """Shape of the trained factor, in the axes of the leaf.

        Returns:
          The shape; for a side that is drawn, one that holds either factor.
        """
        batch, inputs, outputs = matrix_shape(self.shape, self.view)
        if isinstance(self.side, Bernoulli):
            return (*batch, self.rank, max(inputs, outputs))
        if self.side == "left":
            return (*batch, *(self.shape[axis] for axis in self.view.inputs), self.rank)
        return (*batch, self.rank, *(self.shape[axis] for axis in self.view.outputs))

    def draw(self, key: jax.Array, block: int | jax.Array, side: str) -> Sketch:
        """The sketch of a block.

        Args:
          key: of the run.
          block: its number.
          side: "left" or "right".

        Returns:
          The sketch.
        """
        batch, _, _ = matrix_shape(self.shape, self.view)
        return draw(
            *(key, block, self.path, self.dim(side), self.rank, self.law, self.dtype),
            batch=batch,
            scale=self.scale,
        )

    def stored(self, key: jax.Array, block: int | jax.Array) -> jax.Array:
        """The sketch of a block as one array, for the state of an optimizer.

        Args:
          key: of the run.
          block: its number.

        Returns:
          [*batch, dim, rank], or the coordinates [*batch, rank].
        """
        made = self.draw(key, block, self.side)
        return made.index if isinstance(made, Coordinates) else made

    def loaded(self, array: jax.Array) -> Sketch:
        """The inverse of `stored`.

        Args:
          array: what `stored` gave.

        Returns:
          The sketch.
        """
        if self.law not in COORDINATES:
            return array
        dim = self.dim(self.side)
        return Coordinates(array, column_norm(self.scale, dim), dim)


def _down(leaf: Leaf, made: Sketch, matrices: jax.Array, side: str, s: float, precondition: bool) -> Any:
    """The factor's gradient s project(Q, G), or s^-1 (Q^T Q)^+ project(Q, G), as a stack of matrices."""
    z = project(made, matrices, side) * jnp.asarray(1 / s if precondition else s, matrices.dtype)
    if not precondition:
        return z
    inverse = inverse_gram(made, leaf.law, leaf.scale, leaf.dim(side))
    if isinstance(inverse, float):
        return z * jnp.asarray(inverse, z.dtype)
    return jnp.matmul(*((z, inverse) if side == "left" else (inverse, z)), precision="highest")


class Coin(NamedTuple):
    """A leaf's sketches in a block whose side is drawn: only the one that is needed is made, in a branch."""

    left: jax.Array
    key: jax.Array
    block: jax.Array


def prepare(leaf: Leaf, key: jax.Array, block: jax.Array) -> Sketch | Coin:
    """The sketch of a leaf in a block.

    Args:
      leaf: the leaf.
      key: of the run.
      block: its number.

    Returns:
      The sketch, or a `Coin` where its side is drawn.
    """
    if isinstance(leaf.side, Bernoulli):
        coin = fold_path(fold_path(fold_step(key, block), leaf.path), "side")
        return Coin(jax.random.bernoulli(coin, leaf.side.p), key, block)
    return leaf.draw(key, block, leaf.side)


def to_factor(leaf: Leaf, made: Sketch | Coin, g: jax.Array, s: float, precondition: bool) -> jax.Array:
    """The gradient of a leaf's factor.

    Args:
      leaf: the leaf.
      made: its sketch.
      g: gradient of the leaf.
      s: the scale of the update.
      precondition: whether to multiply by s^-2 (Q^T Q)^+.

    Returns:
      Shaped `leaf.factor_shape()`.
    """
    matrices = to_matrices(g, leaf.view).astype(leaf.dtype)
    if not isinstance(made, Coin):
        return _down(leaf, made, matrices, leaf.side, s, precondition).reshape(leaf.factor_shape())

    def one(side: str) -> Callable[[], jax.Array]:
        def run() -> jax.Array:
            z = _down(leaf, leaf.draw(made.key, made.block, side), matrices, side, s, precondition)
            z = jnp.swapaxes(z, -1, -2) if side == "left" else z
            return jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, leaf.factor_shape()[-1] - z.shape[-1])])

        return run

    return jax.lax.cond(made.left, one("left"), one("right"))


def from_factor(leaf: Leaf, made: Sketch | Coin, z: jax.Array, s: float) -> jax.Array:
    """The update of a leaf from that of its factor.

    Args:
      leaf: the leaf.
      made: its sketch.
      z: update of the factor.
      s: the scale of the update.

    Returns:
      Shaped like the leaf.
    """
    batch, inputs, outputs = matrix_shape(leaf.shape, leaf.view)
    if isinstance(made, Coin):

        def one(side: str) -> Callable[[], jax.Array]:
            def run() -> jax.Array:
                part = z[..., : inputs if side == "left" else outputs]
                part = jnp.swapaxes(part, -1, -2) if side == "left" else part
                return lift(leaf.draw(made.key, made.block, side), part, side)

            return run

        full = jax.lax.cond(made.left, one("left"), one("right"))
    else:
        shape = (inputs, leaf.rank) if leaf.side == "left" else (leaf.rank, outputs)
        full = lift(made, z.reshape(*batch, *shape), leaf.side)
    return from_matrices(full * jnp.asarray(s, full.dtype), leaf.view, leaf.shape)


def turn(leaf: Leaf, key: jax.Array, block: jax.Array, moment: jax.Array, squared: bool) -> jax.Array:
    """A moment in the coordinates of a new block: R M, or (R * R) V, with R = Q_new^T Q_old / |column|^2.

    Args:
      leaf: the leaf.
      key: of the run.
      block: the new block.
      moment: of the factor.
      squared: whether it is a second moment.

    Returns:
      The moment.

    Source: FLORA, arXiv 2402.03293.
    """
    old, new = (dense(leaf.draw(key, b, leaf.side), leaf.dtype) for b in (block - 1, block))
    r = jnp.matmul(jnp.swapaxes(new, -1, -2), old, precision="highest")
    r = r * jnp.asarray(1.0 / column_norm(leaf.scale, leaf.dim(leaf.side)) ** 2, r.dtype)
    r = r * r if squared else r
    batch, inputs, outputs = matrix_shape(leaf.shape, leaf.view)
    shape = (inputs, leaf.rank) if leaf.side == "left" else (leaf.rank, outputs)
    z = moment.reshape(*batch, *shape).astype(leaf.dtype)
    turned = (
        jnp.matmul(z, jnp.swapaxes(r, -1, -2), precision="highest")
        if leaf.side == "left"
        else jnp.matmul(r, z, precision="highest")
    )
    return turned.reshape(moment.shape)
