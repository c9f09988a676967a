"""Learning rates that optax does not have."""

import jax
import jax.numpy as jnp
import optax

from odjax_train.errors import UserError


def noam(width: int, factor: float, warmup: int) -> optax.Schedule:
    """Up in a straight line, then down with the square root of the step.

    factor width^(-1/2) min(n^(-1/2), n warmup^(-3/2)), where n = step + 1 counts from 1.

    Args:
        width: of the model's residual stream.
        factor: scale of it all.
        warmup: steps until it is highest, factor (width warmup)^(-1/2).

    Returns:
        step -> float32 [].

    Raises:
        UserError: a number that is not positive.

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 3.

    Example:
        >>> [float(noam(4, 2.0, 16)(step)) for step in (0, 15, 63)]
        [0.015625, 0.25, 0.125]
    """
    for name, value in (("width", width), ("factor", factor), ("warmup", warmup)):
        if not value > 0:
            raise UserError(f"{name} must be positive, got {value}")

    def schedule(step: int | jax.Array) -> jax.Array:
        n = jnp.asarray(step, jnp.float32) + 1
        return jnp.float32(factor * width**-0.5) * jnp.minimum(n**-0.5, n * jnp.float32(warmup**-1.5))

    return schedule
