"""Normalization over the last axis, with statistics in float32 whatever the dtype of the activations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import named, statistics_dtype


class RMSNorm(nn.Module):
    """Root-mean-square normalization: `x / sqrt(mean(x^2) + eps) * scale`.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.

    Attributes:
        eps: added to the mean square.
        dtype: of the result.
        param_dtype: of `scale` [width].

    Example:
        >>> norm = RMSNorm()
        >>> y, _ = norm.init_with_output(jax.random.key(0), jnp.array([3.0, 4.0]))
        >>> round(float(jnp.mean(y**2)), 4)
        1.0
    """

    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` [..., width]."""
        scale = self.param("scale", named(nn.initializers.ones, "norm"), (x.shape[-1],), self.param_dtype)
        y = x.astype(statistics_dtype(x))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale.astype(y.dtype), tuple(range(x.ndim - 1)))
        return (y * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalization: `(x - mean) / sqrt(variance + eps) * scale + bias`.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4.

    Attributes:
        eps: added to the variance.
        dtype: of the result.
        param_dtype: of `scale` and `bias`, both [width].

    Example:
        >>> norm = LayerNorm()
        >>> y, _ = norm.init_with_output(jax.random.key(0), jnp.array([1.0, 3.0]))
        >>> [round(float(v), 4) for v in y]
        [-1.0, 1.0]
    """

    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` [..., width]."""
        width = (x.shape[-1],)
        scale = self.param("scale", named(nn.initializers.ones, "norm"), width, self.param_dtype)
        bias = self.param("bias", named(nn.initializers.zeros, "norm"), width, self.param_dtype)
        y = x.astype(statistics_dtype(x))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        leading = tuple(range(x.ndim - 1))
        scale = jnp.expand_dims(scale.astype(y.dtype), leading)
        bias = jnp.expand_dims(bias.astype(y.dtype), leading)
        return (y * scale + bias).astype(self.dtype)
