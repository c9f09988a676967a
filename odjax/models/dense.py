"""The product of activations with a kernel, as one plain matrix product."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import DTypeLike

PROJECTION = "projection"  # what a layer's large products give, for a policy of `jax.checkpoint` to save

Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def matrix_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Dimensions,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` on matrices: one axis of tokens, one contracted axis, one of features.

    The gradient of the kernel is then a product that contracts one axis, not batch and length. On the CPU
    that spares transposed copies of the activations (a third of a SwiGLU layer's time); elsewhere it changes
    nothing.

    Args:
        lhs: activations [*tokens, *contracted].
        rhs: kernel [*contracted, *features].
        dimension_numbers: as for `jax.lax.dot_general`; the last axes of `lhs` with the first of `rhs`.
        precision: as for `jax.lax.dot_general`.
        preferred_element_type: as for `jax.lax.dot_general`.

    Returns:
        [*tokens, *features].

    Raises:
        ValueError: for other axes, or batch axes.

    Example:
        >>> x, w = jax.numpy.ones((2, 3, 4, 5)), jax.numpy.ones((4, 5, 6))
        >>> matrix_dot_general(x, w, (((2, 3), (0, 1)), ((), ()))).shape
        (2, 3, 6)
    """
    (lhs_axes, rhs_axes), batch_axes = dimension_numbers
    contracted = len(lhs_axes)
    tokens = lhs.ndim - contracted
    if (
        any(batch_axes)
        or tuple(lhs_axes) != tuple(range(tokens, lhs.ndim))
        or tuple(rhs_axes) != tuple(range(contracted))
    ):
        raise ValueError(
            f"needs the last axes of the activations with the first of the kernel, got {dimension_numbers}"
        )
    size = math.prod(rhs.shape[:contracted])
    y = jax.lax.dot_general(
        jax.lax.reshape(lhs, (math.prod(lhs.shape[:tokens]), size)),
        jax.lax.reshape(rhs, (size, math.prod(rhs.shape[contracted:]))),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return jax.lax.reshape(y, (*lhs.shape[:tokens], *rhs.shape[contracted:]))


def matrix_dot(preferred_element_type: DTypeLike | None = None) -> Callable[[], Callable[..., jax.Array]]:
    """A `dot_general_cls` for `nn.Dense` and `nn.DenseGeneral`.

    Args:
        preferred_element_type: dtype of the result, for example float32 logits of bf16 operands.

    Returns:
        A function that returns `matrix_dot_general`.

    Example:
        >>> import flax.linen as nn
        >>> dense = nn.Dense(3, dot_general_cls=matrix_dot())
        >>> dense.init_with_output(jax.random.key(0), jax.numpy.ones((2, 4)))[0].shape
        (2, 3)
    """
    dot = functools.partial(matrix_dot_general, preferred_element_type=preferred_element_type)
    return lambda: dot
