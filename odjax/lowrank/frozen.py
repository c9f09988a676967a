"""The frozen half of an update: drawn from its key in the step, and the preconditioner that it defines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from odjax.lowrank.methods import LowRank, scale_of, sketch_of
from odjax.lowrank.sizes import Sizes, dims, wide
from odjax.lowrank.sketches import COORDINATES, Coordinates, Sketch, column_norm, dense, draw, inverse_gram


def new_sketch(key: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """State of a frozen half: for each matrix two words of a key, and block 0.

    Args:
      key: a typed key.
      batch: the batch axes of the weight.

    Returns:
      uint32 [batch..., 3].
    """
    words = jax.random.bits(key, (*batch, 2), jnp.uint32)
    return jnp.concatenate([words, jnp.zeros((*batch, 1), jnp.uint32)], axis=-1)


def frozen_sketch(spec: LowRank, leaves: Mapping[str, Any], sizes: Sizes) -> Sketch:
    """The sketch of the current block, drawn from its key, in the form that is cheapest to apply.

    Args:
      spec: the method.
      leaves: name -> array; of the trained half only the shape is used.
      sizes: of the weight.

    Returns:
      Q [batch..., dim, rank], or `Coordinates` with index [batch..., rank]; dim is that of all inputs where A
      is frozen, of all outputs where B is. Float32, float64 for float64 factors.
    """
    inputs, outputs = dims(sizes)
    law, scale = sketch_of(spec)
    right = "lora_b" in leaves
    dim = inputs if right else outputs
    rank = leaves["lora_b"].shape[len(sizes.batch)] if right else leaves["lora_a"].shape[-1]

    def one(words: jax.Array) -> jax.Array:
        # Threefry whatever the default: its values do not depend on the mesh or the device.
        key = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
        made = draw(key, words[2], "", dim, rank, law, wide(spec.dtype), scale=scale)
        return made.index if isinstance(made, Coordinates) else made

    for _ in sizes.batch:
        one = jax.vmap(one)
    made = one(leaves["lora_sketch"])
    return Coordinates(made, column_norm(scale, dim), dim) if law in COORDINATES else made


def frozen_half(spec: LowRank, leaves: Mapping[str, Any], sizes: Sizes) -> jax.Array:
    """The random half of the current block as an array.

    Args:
      spec: the method.
      leaves: name -> array; of the trained half only the shape is used.
      sizes: of the weight.

    Returns:
      A [batch..., inputs..., rank], or B [batch..., rank, outputs...]; float32, float64 for float64 factors.
    """
    q = dense(frozen_sketch(spec, leaves, sizes), wide(spec.dtype))
    if "lora_b" in leaves:
        return q.reshape(*sizes.batch, *sizes.inputs, q.shape[-1])
    return jnp.swapaxes(q, -1, -2).reshape(*sizes.batch, q.shape[-1], *sizes.outputs)


def preconditioned(spec: LowRank, path: str, leaves: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The leaves, with a gradient of the trained half that is multiplied by s^-2 (Q^T Q)^+.

    Their values stay; the gradient does not pass the stopped part.

    Args:
      spec: the method, with `precondition` or without, which gives the leaves back.
      path: of the weight.
      leaves: name -> array.
      sizes: of the weight.

    Returns:
      name -> array.

    Source: Malinovsky et al. 2024, "RAC-LoRA", section 4 (the projected step).
    """
    if not spec.precondition:
        return dict(leaves)
    right = "lora_b" in leaves
    name, z = ("lora_b", leaves["lora_b"]) if right else ("lora_a", leaves["lora_a"])
    n = len(sizes.batch)
    law, size = sketch_of(spec)
    if "lora_frozen" in leaves:
        made = leaves["lora_frozen"]
        made = made if right else jnp.moveaxis(made, n, -1)
        made = made.reshape(*sizes.batch, -1, made.shape[-1]).astype(wide(spec.dtype))
    else:
        made = frozen_sketch(spec, leaves, sizes)
    rank = z.shape[n] if right else z.shape[-1]
    inverse = inverse_gram(made, law, size, dims(sizes)[0 if right else 1])
    change = (z - jax.lax.stop_gradient(z)) * scale_of(spec, path, rank) ** -2
    if isinstance(inverse, float):
        change = change * inverse
    else:
        rows = change.reshape(*sizes.batch, *((rank, -1) if right else (-1, rank))).astype(inverse.dtype)
        rows = jnp.matmul(*((inverse, rows) if right else (rows, inverse)), precision="highest")
        change = rows.reshape(z.shape).astype(z.dtype)
    return {**leaves, name: jax.lax.stop_gradient(z) + change}
