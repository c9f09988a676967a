"""Multi-layer perceptron."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import named
from odjax.models.axes import constrain
from odjax.models.feedforward import activation_named

hidden_init = nn.initializers.he_normal()


class MLP(nn.Module):
    """Dense layers with an activation between them; the input is flattened.

    Parameters: `dense_i/kernel` and `dense_i/bias`. Hidden layers alternate between splitting their outputs
    and their inputs over the tensor axis, so that two layers need one reduction.

    Attributes:
        features: widths of the layers, the last one without activation (logits).
        activation: a key of `odjax.models.feedforward.ACTIVATIONS`.
        dropout: probability of dropping a hidden unit while training.
        dtype: of the computation; the result is float32.
        param_dtype: of the parameters.

    Raises:
        ValueError: at construction, for no features, an unknown activation, or a dropout outside [0, 1).

    Example:
        >>> MLP((16, 10)).init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 1)))[0].shape
        (2, 10)
    """

    features: Sequence[int]
    activation: str = "relu"
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.features or min(self.features) < 1:
            raise ValueError(f"features must be positive widths, at least one, got {tuple(self.features)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        activation_named(self.activation)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `x` [B, ...] to [B, features[-1]] float32; training with dropout takes the key "dropout"."""
        x = jnp.reshape(x, (x.shape[0], math.prod(x.shape[1:]))).astype(self.dtype)
        last = len(self.features) - 1
        for i, width in enumerate(self.features):
            inputs = "mlp" if i % 2 else ("channels" if i == 0 else "embed")
            outputs = "classes" if i == last else ("embed" if i % 2 else "mlp")
            x = nn.Dense(
                width,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=named(hidden_init, inputs, outputs),
                bias_init=named(nn.initializers.zeros, "mlp" if outputs == "mlp" else "norm"),
                name=f"dense_{i}",
            )(x)
            if i < last:
                x = activation_named(self.activation)(x)
                x = constrain(x, "batch", "act_embed" if i % 2 else "act_mlp")
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x.astype(jnp.float32)
