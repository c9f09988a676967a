"""Feed-forward layers of a Transformer."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from odjax.core import named
from odjax.models.attention import linear_init
from odjax.models.axes import constrain
from odjax.models.dense import PROJECTION, matrix_dot


def gelu(x: jax.Array) -> jax.Array:
    """The exact Gaussian error linear unit, `x * Phi(x)`, that ViT and DINOv2 were trained with.

    Args:
        x: any shape.

    Returns:
        Same shape and dtype.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.

    Example:
        >>> round(float(gelu(jnp.array(1.0))), 4)
        0.8413
    """
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation_named(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function of a name.

    Args:
        name: a key of `ACTIVATIONS`.

    Returns:
        The function.

    Raises:
        ValueError: naming the choices.

    Example:
        >>> float(activation_named("relu")(jnp.array(-1.0)))
        0.0
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


class SwiGLU(nn.Module):
    """Gated feed-forward layer: `down(silu(gate(x)) * up(x))`.

    Parameters: `gate/kernel` and `up/kernel` [width, mlp], `down/kernel` [mlp, width].

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.

    Attributes:
        mlp_width: hidden width.
        use_bias: whether the three matrices have biases.
        dtype: of the computation.
        param_dtype: of the parameters.

    Example:
        >>> SwiGLU(8).init_with_output(jax.random.key(0), jnp.ones((1, 2, 4)))[0].shape
        (1, 2, 4)
    """

    mlp_width: int
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [B, T, width] to the same shape."""
        gate = _linear(self, "gate", self.mlp_width, ("embed", "mlp"), "mlp")(x)
        up = _linear(self, "up", self.mlp_width, ("embed", "mlp"), "mlp")(x)
        gate, up = checkpoint_name(gate, PROJECTION), checkpoint_name(up, PROJECTION)
        h = constrain(jax.nn.silu(gate) * up, "batch", "length", "act_mlp")
        # Inside the product below the TPU compiler would compute it anew for every block of outputs.
        h = jax.lax.optimization_barrier(h)
        return _linear(self, "down", x.shape[-1], ("mlp", "embed"), "norm")(h)


class FeedForward(nn.Module):
    """Feed-forward layer: `down(activation(up(x)))`.

    Parameters: `up/kernel` [width, mlp], `down/kernel` [mlp, width] and their biases.

    Source: Vaswani et al. 2017, equation 2.

    Attributes:
        mlp_width: hidden width.
        activation: a key of `ACTIVATIONS`.
        use_bias: whether both matrices have biases.
        dtype: of the computation.
        param_dtype: of the parameters.

    Example:
        >>> FeedForward(8).init_with_output(jax.random.key(0), jnp.ones((1, 2, 4)))[0].shape
        (1, 2, 4)
    """

    mlp_width: int
    activation: str = "gelu"
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` [B, T, width] to the same shape."""
        up = checkpoint_name(_linear(self, "up", self.mlp_width, ("embed", "mlp"), "mlp")(x), PROJECTION)
        h = constrain(activation_named(self.activation)(up), "batch", "length", "act_mlp")
        return _linear(self, "down", x.shape[-1], ("mlp", "embed"), "norm")(h)


def _linear(
    layer: SwiGLU | FeedForward, name: str, features: int, kernel: tuple[str, str], bias: str
) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=layer.use_bias,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        dot_general_cls=matrix_dot(),
        kernel_init=named(linear_init, *kernel),
        bias_init=named(nn.initializers.zeros, bias),
        name=name,
    )
