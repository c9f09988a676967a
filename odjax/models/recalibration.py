"""Where a layer lets its feed-forward residual be recalibrated by a module that reads the residual stream."""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.typing import DTypeLike

Recalibration = Callable[..., nn.Module]
"""Makes the module of a layer, `recalibration(dtype=, param_dtype=, name=)`; the module maps the residual
stream x to a scale and a shift, both like x. For example `functools.partial(odjax.heads.PSRP, rank=16)`."""


def check_recalibration(recalibration: Recalibration | None) -> None:
    """Raises if `recalibration` is neither None nor something that makes modules.

    Args:
        recalibration: what is to be used.

    Raises:
        TypeError: saying what to pass instead.

    Example:
        >>> check_recalibration(nn.Dense(3))
        Traceback (most recent call last):
        TypeError: recalibration must make modules, got a Dense: pass functools.partial(Dense, ...)
    """
    if isinstance(recalibration, nn.Module):
        name = type(recalibration).__name__
        raise TypeError(f"recalibration must make modules, got a {name}: pass functools.partial({name}, ...)")
    if recalibration is not None and not callable(recalibration):
        raise TypeError(
            f"recalibration must be None or make a module, got {recalibration!r}: pass "
            "functools.partial(PSRP, rank=16)"
        )


def add_residual(
    x: jax.Array,
    residual: jax.Array,
    recalibration: Recalibration | None,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> jax.Array:
    """The residual stream after a residual: x + residual, or x + shift + (1 + scale) * residual.

    Call it inside a compact method: scale and shift are those of a module named "psrp" that reads `x`.

    Args:
        x: [..., width], the residual stream before the residual.
        residual: like `x`.
        recalibration: makes the module; None: there is none.
        dtype: of `x` and of the module's computation.
        param_dtype: of the module's parameters.

    Returns:
        Like `x`.

    Source: Gao et al. 2023, "Tuning Pre-trained Model via Moment Probing" (partially shared projection).

    Example:
        >>> import jax.numpy as jnp
        >>> add_residual(jnp.ones(2), jnp.ones(2), None, dtype=jnp.float32, param_dtype=jnp.float32)
        Array([2., 2.], dtype=float32)
    """
    if recalibration is None:
        return x + residual
    scale, shift = recalibration(dtype=dtype, param_dtype=param_dtype, name="psrp")(x)
    return x + shift + (1 + scale) * residual
