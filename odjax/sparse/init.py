"""Initial values for the links of a sparse layer, as initializers in the manner of Flax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]
"""`(key, shape, dtype) -> array`, as in `jax.nn.initializers`."""


def _checked_mask(mask: Any) -> jax.Array:
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, got {mask.dtype}: type mask != 0")
    return mask


def _check_shape(mask: jax.Array, shape: Sequence[int]) -> None:
    if tuple(shape) != mask.shape:
        raise ValueError(
            f"the mask has the shape {mask.shape}, the parameter {tuple(shape)}: make the mask for that shape"
        )


def _fan_in(
    mask: jax.Array, in_axes: Sequence[int] | None, batch_axes: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    """The number of inputs, and the axes of one layer."""
    n = mask.ndim
    given = [*batch_axes, *(in_axes or ())]
    if not all(-n <= axis < n for axis in given) or len({axis % n for axis in given}) != len(given):
        raise ValueError(
            f"in_axes {in_axes} and batch_axes {tuple(batch_axes)} must name axes of a mask {mask.shape}, "
            "each once"
        )
    batch = [axis % n for axis in batch_axes]
    layer = tuple(axis for axis in range(n) if axis not in batch)
    inputs = layer[:-1] if in_axes is None else [axis % n for axis in in_axes]
    if len(layer) < 2 or not inputs or len(inputs) == len(layer):
        raise ValueError(
            f"a layer needs input and output axes: a mask {mask.shape} with batch_axes {tuple(batch_axes)} "
            f"leaves {len(layer)} axes, {len(inputs)} of them inputs"
        )
    return math.prod(mask.shape[axis] for axis in inputs), layer


def masked(initializer: Initializer, mask: jax.Array) -> Initializer:
    """An initializer that leaves absent links at 0, for models that keep their own initial values.

    Args:
      initializer: of the dense parameter.
      mask: bool, the shape of the parameter.

    Returns:
      `(key, shape, dtype) -> array`, 0 where the mask is False.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: (when called) a shape that is not that of the mask.

    Example:
      >>> masked(jax.nn.initializers.ones, jnp.array([[True, False]]))(jax.random.key(0), (1, 2))
      Array([[1., 0.]], dtype=float32)
    """
    mask = _checked_mask(mask)

    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        _check_shape(mask, shape)
        values = initializer(key, tuple(shape), dtype)
        return jnp.where(mask, values, jnp.zeros_like(values))

    return init


def _scaled(mask: jax.Array, deviation: jax.Array) -> Initializer:
    def init(key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
        _check_shape(mask, shape)
        wide = dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32
        values = deviation.astype(wide) * jax.random.normal(key, tuple(shape), wide)
        return jnp.where(mask, values, jnp.zeros_like(values)).astype(dtype)

    return init


def kaiming(
    mask: jax.Array, *, in_axes: Sequence[int] | None = None, batch_axes: Sequence[int] = ()
) -> Initializer:
    """Normal values with the deviation of a dense layer, sqrt(2 / fan_in), on the links of a mask.

    Args:
      mask: bool, the shape of the parameter.
      in_axes: axes that are summed over when the kernel is applied; None: all axes of a layer but the last.
        Kernels (width, heads, head_dim) into attention heads need `in_axes=(0,)`.
      batch_axes: axes that count layers of a stack.

    Returns:
      `(key, shape, dtype) -> array`, 0 where the mask is False. Values are drawn in float32 or wider.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: axes that the mask does not have; (when called) a shape that is not that of the mask.

    Source:
      K. He, X. Zhang, S. Ren and J. Sun, Delving deep into rectifiers, ICCV 2015, arXiv 1502.01852, eq. 10.

    Example:
      >>> mask = jnp.arange(6).reshape(3, 2) % 2 == 0
      >>> kernel = kaiming(mask)(jax.random.key(0), (3, 2))
      >>> bool(((kernel != 0) == mask).all())
      True
    """
    mask = _checked_mask(mask)
    fan_in, _ = _fan_in(mask, in_axes, batch_axes)
    return _scaled(mask, jnp.full((1,) * mask.ndim, math.sqrt(2 / fan_in), jnp.float32))


def swi(
    mask: jax.Array, *, in_axes: Sequence[int] | None = None, batch_axes: Sequence[int] = ()
) -> Initializer:
    """Sparse weight initialisation: normal values with deviation sqrt(2 / (density * fan_in)).

    The mean number of links of an output takes the place of fan_in, so that activations keep their size
    through sparse layers as they do through dense ones. The density is that of the mask, of each layer of a
    stack by itself.

    Args:
      mask: bool, the shape of the parameter.
      in_axes: axes that are summed over when the kernel is applied; None: all axes of a layer but the last.
        Kernels (width, heads, head_dim) into attention heads need `in_axes=(0,)`.
      batch_axes: axes that count layers of a stack.

    Returns:
      `(key, shape, dtype) -> array`, 0 where the mask is False (everywhere, for a layer without links).
      Values are drawn in float32 or wider.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: axes that the mask does not have; (when called) a shape that is not that of the mask.

    Source:
      Zhang et al., NeurIPS 2025, arXiv 2501.19107; density * fan_in, not the fan_out of the published code.

    Example:
      >>> mask = jnp.array([[True], [False], [False], [False]])
      >>> sparse, plain = (init(mask)(jax.random.key(0), (4, 1)) for init in (swi, kaiming))
      >>> print(f"{float(sparse[0, 0] / plain[0, 0]):.4f}")
      2.0000
    """
    mask = _checked_mask(mask)
    fan_in, layer = _fan_in(mask, in_axes, batch_axes)
    links = jnp.sum(mask, axis=layer, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    size = math.prod(mask.shape[axis] for axis in layer)
    return _scaled(mask, jnp.sqrt(2 * size / (jnp.maximum(links, 1) * fan_in)))
