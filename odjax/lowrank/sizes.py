"""Which axes of a weight are which: batch, inputs, outputs; how it follows from the factors beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike


class Sizes(NamedTuple):
    """The shape of a weight by the kind of axis: batch, inputs, outputs."""

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def wide(dtype: DTypeLike) -> DTypeLike:
    """What sums over a dtype are made in: float32, or the dtype itself where it is wider.

    Args:
      dtype: a floating dtype.

    Returns:
      A dtype.

    Example:
      >>> wide(jnp.bfloat16) == jnp.float32
      True
    """
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


def dims(sizes: Sizes) -> tuple[int, int]:
    """The dimensions of the matrix: all inputs, all outputs.

    Args:
      sizes: of the weight.

    Returns:
      (inputs, outputs).

    Example:
      >>> dims(Sizes((), (16,), (4, 8)))
      (16, 32)
    """
    return math.prod(sizes.inputs), math.prod(sizes.outputs)


def sizes_of(shape: tuple[int, ...], leaves: Mapping[str, Any]) -> Sizes:
    """The kinds of the axes of a weight, from the leaves beside it.

    Args:
      shape: of the weight.
      leaves: name -> array, for the names that start with "lora_".

    Returns:
      The sizes.

    Raises:
      ValueError: the leaves do not fit the weight, or one of them is missing.

    Example:
      >>> sizes_of((16, 4, 8), {"lora_a": jnp.zeros((16, 2)), "lora_b": jnp.zeros((2, 4, 8))})
      Sizes(batch=(), inputs=(16,), outputs=(4, 8))
    """
    outputs = len(shape) - leaves["lora_a"].ndim + 1 if "lora_a" in leaves else None
    inputs = len(shape) - leaves["lora_b"].ndim + 1 if "lora_b" in leaves else None
    if outputs is None or inputs is None:
        if "lora_sketch" not in leaves or (outputs is None and inputs is None):
            raise ValueError(
                f"a weight {list(shape)} has {sorted(leaves)} beside it: it needs lora_a and lora_b, or one "
                "of them and lora_sketch"
            )
        batch = leaves["lora_sketch"].ndim - 1
    else:
        batch = len(shape) - inputs - outputs
    inputs = len(shape) - batch - outputs if inputs is None else inputs
    cut = batch + inputs
    sizes = Sizes(tuple(shape[:batch]), tuple(shape[batch:cut]), tuple(shape[cut:]))
    for name, expected in (
        ("lora_a", (*sizes.batch, *sizes.inputs)),
        ("lora_b", (*sizes.batch, *sizes.outputs)),
    ):
        if name in leaves:
            at = -1 if name == "lora_a" else batch
            found = list(leaves[name].shape)
            del found[at]
            if tuple(found) != expected:
                raise ValueError(
                    f"{name} {list(leaves[name].shape)} does not fit a weight {list(shape)}: without its "
                    f"rank it must be {list(expected)}"
                )
    if "lora_a" in leaves and "lora_b" in leaves:
        ranks = leaves["lora_a"].shape[-1], leaves["lora_b"].shape[batch]
        if ranks[0] != ranks[1]:
            raise ValueError(
                f"lora_a {list(leaves['lora_a'].shape)} has rank {ranks[0]} and lora_b "
                f"{list(leaves['lora_b'].shape)} rank {ranks[1]} beside a weight {list(shape)}"
            )
    return sizes
