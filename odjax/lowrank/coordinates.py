"""Frozen halves that select coordinates: gathers and scatters instead of products with unit vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from odjax.lowrank.layers import Product
from odjax.lowrank.sizes import Sizes
from odjax.lowrank.sketches import Coordinates


def gathered(x: jax.Array, made: Coordinates, product: Product, sizes: Sizes) -> jax.Array:
    """The product of a layer's input with a half A that selects coordinates.

    Args:
      x: the input, its axes as `product.inputs` says.
      made: index [rank] into the flattened input axes.
      product: the layer, without batch letters.
      sizes: of the weight.

    Returns:
      x with the summed axes replaced by one of the rank, at the end.

    Example:
      >>> product = Product("...i", "", "i", "o", "...o")
      >>> made = Coordinates(jnp.array([2, 0]), 10.0, 3)
      >>> gathered(jnp.array([[1.0, 2.0, 3.0]]), made, product, Sizes((), (3,), (4,)))
      Array([[30., 10.]], dtype=float32)
    """
    before, _, after = product.inputs.partition("...")
    spread = x.ndim - len(before) - len(after) if "..." in product.inputs else 0
    place = {c: i if c in before else i + spread for i, c in enumerate(before + after)}
    n = len(product.contracted)
    moved = jnp.moveaxis(x, [place[c] for c in product.contracted], range(x.ndim - n, x.ndim))
    picked = moved[(..., *jnp.unravel_index(made.index, sizes.inputs))]
    return picked * jnp.asarray(made.size, x.dtype)


def scattered(hidden: jax.Array, made: Coordinates, outputs: tuple[int, ...]) -> jax.Array:
    """The product of a rank axis with a half B that selects coordinates.

    Args:
      hidden: [..., rank].
      made: index [rank] into the flattened output axes, all different.
      outputs: the output axes of the weight.

    Returns:
      [..., outputs...], zero but at the coordinates.

    Example:
      >>> scattered(jnp.array([1.0, 2.0]), Coordinates(jnp.array([2, 0]), 10.0, 3), (3,))
      Array([20.,  0., 10.], dtype=float32)
    """
    empty = jnp.zeros((*hidden.shape[:-1], *outputs), hidden.dtype)
    at = (..., *jnp.unravel_index(made.index, outputs))
    return empty.at[at].add(hidden * jnp.asarray(made.size, hidden.dtype), unique_indices=True)


def added(
    kernel: jax.Array, factor: jax.Array, made: Coordinates, scale: float, sizes: Sizes, *, right: bool
) -> jax.Array:
    """W + s A B where one half selects coordinates: rows or columns of W change, in place if donated.

    Args:
      kernel: W [batch..., inputs..., outputs...].
      factor: the other half, B [batch..., rank, outputs...] or A [batch..., inputs..., rank].
      made: index [batch..., rank].
      scale: s.
      sizes: of the weight.
      right: whether A selects (inputs) or B (outputs).

    Returns:
      Like `kernel`.

    Example:
      >>> made = Coordinates(jnp.array([1]), 2.0, 2)
      >>> added(jnp.zeros((2, 2)), jnp.ones((1, 2)), made, 0.5, Sizes((), (2,), (2,)), right=True)
      Array([[0., 0.],
             [1., 1.]], dtype=float32)
    """

    def one(w: jax.Array, z: jax.Array, index: jax.Array) -> jax.Array:
        at = jnp.unravel_index(index, sizes.inputs if right else sizes.outputs)
        return w.at[at if right else (..., *at)].add(z, unique_indices=True)

    for _ in sizes.batch:
        one = jax.vmap(one)
    return one(kernel, factor.astype(kernel.dtype) * (scale * made.size), made.index)
