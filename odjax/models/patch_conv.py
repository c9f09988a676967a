"""Convolution as patches times a matrix, without any convolution in the program.

XLA on CPUs runs a convolution inside a compiled loop several times slower than outside, and makes a grouped
one of a kernel for each of several models (`jax.vmap` over kernels). A product of matrices is neither.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def patch_conv(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """What `jax.lax.conv_general_dilated` computes, from static slices and one product of matrices.

    It has that function's arguments: `nn.Conv(..., conv_general_dilated=patch_conv)` is a module without
    convolutions. The patches take as many times the memory of the inputs as the window has places, divided by
    the strides.

    Args:
        inputs: [batch, *spatial, channels], any number of spatial axes.
        kernel: [*window, channels, features].
        window_strides: a stride for every spatial axis.
        padding: "SAME", "VALID", or (low, high) for every spatial axis, not negative.
        lhs_dilation: only ones: it is for transposed convolutions.
        rhs_dilation: a dilation of the window for every spatial axis.
        dimension_numbers: those of `nn.Conv`, channels last; None for them.
        feature_group_count: only 1.
        batch_group_count: only 1.
        precision: of the product.
        preferred_element_type: of the product.

    Returns:
        [batch, *spatial, features].

    Raises:
        ValueError: groups, another layout, dilated inputs, negative padding, or shapes that do not fit.

    Source: K. Chellapilla, S. Puri, P. Simard, High Performance Convolutional Neural Networks for Document
        Processing, 2006, section 3.1 (unrolling a convolution into a product).

    Example:
        >>> import flax.linen as nn
        >>> model = nn.Conv(8, (3, 3), strides=2, conv_general_dilated=patch_conv)
        >>> images = jnp.ones((2, 9, 9, 3))
        >>> model.init_with_output(jax.random.key(0), images)[0].shape
        (2, 5, 5, 8)
    """
    axes = inputs.ndim - 2
    rhs_dilation = tuple(rhs_dilation or (1,) * axes)
    if feature_group_count != 1 or batch_group_count != 1:
        raise ValueError(
            f"patch_conv has no groups, got feature_group_count={feature_group_count} and "
            f"batch_group_count={batch_group_count}: take jax.lax.conv_general_dilated"
        )
    if lhs_dilation is not None and any(size != 1 for size in lhs_dilation):
        raise ValueError(
            f"patch_conv does not dilate inputs, got lhs_dilation={tuple(lhs_dilation)}: "
            f"take jax.lax.conv_general_dilated"
        )
    _check_shapes(inputs, kernel, dimension_numbers, window_strides, rhs_dilation)
    window, strides = kernel.shape[:axes], tuple(window_strides)
    extent = tuple((size - 1) * dilation + 1 for size, dilation in zip(window, rhs_dilation, strict=True))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs.shape[1:-1], extent, strides, padding)
    if len(padding) != axes or any(low < 0 or high < 0 for low, high in padding):
        raise ValueError(f"padding must be (low, high) for each of {axes} axes, not negative, got {padding}")
    padded = jnp.pad(inputs, ((0, 0), *padding, (0, 0)))
    sizes = tuple(
        (size - length) // stride + 1
        for size, length, stride in zip(padded.shape[1:-1], extent, strides, strict=True)
    )
    if min(sizes) < 1:
        raise ValueError(
            f"the window takes {extent} places, the padded inputs have {padded.shape[1:-1]}: nothing is left"
        )

    patches = []
    for place in itertools.product(*map(range, window)):
        begin = tuple(at * dilation for at, dilation in zip(place, rhs_dilation, strict=True))
        end = tuple(b + (n - 1) * s + 1 for b, n, s in zip(begin, sizes, strides, strict=True))
        patches.append(
            lax.slice(padded, (0, *begin, 0), (padded.shape[0], *end, padded.shape[-1]), (1, *strides, 1))
        )
    columns = jnp.concatenate(patches, axis=-1)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return lax.dot_general(
        columns,
        matrix,
        (((columns.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def _check_shapes(
    inputs: jax.Array,
    kernel: jax.Array,
    dimension_numbers: Any,
    strides: Sequence[int],
    dilation: Sequence[int],
) -> None:
    rank = inputs.ndim
    if kernel.ndim != rank or rank < 3 or inputs.shape[-1] != kernel.shape[-2]:
        raise ValueError(
            f"inputs must be [batch, *spatial, channels] and the kernel [*window, channels, features], got "
            f"{inputs.shape} and {kernel.shape}"
        )
    for name, numbers in (("window_strides", strides), ("rhs_dilation", dilation)):
        if len(numbers) != rank - 2 or min(numbers) < 1:
            raise ValueError(
                f"{name} must be a number of at least 1 for each of {rank - 2} axes, got {tuple(numbers)}"
            )
    if dimension_numbers is None:
        return
    given = lax.conv_dimension_numbers(inputs.shape, kernel.shape, dimension_numbers)
    spatial = range(1, rank - 1)
    layout = (0, rank - 1, *spatial)
    if (tuple(given.lhs_spec), tuple(given.rhs_spec), tuple(given.out_spec)) != (
        layout,
        (rank - 1, rank - 2, *range(rank - 2)),
        layout,
    ):
        raise ValueError(f"channels must come last, as in nn.Conv, got dimension_numbers {dimension_numbers}")
