"""Partially shared recalibration of a frozen network's residuals (PSRP), the "+" of moment probing.

A small module reads the residual stream and gives a scale and a shift for what a layer adds to it. `ViT` and
`Bert` of `odjax.models` take it as `recalibration=functools.partial(PSRP, rank=16)`.

Source: Gao, Wang, Lin, Zhu, Hu and Zhou 2023, "Tuning Pre-trained Model via Moment Probing", arXiv
2307.11342.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import named

STARTS = ("zero", "paper")

_paper_init = nn.initializers.truncated_normal(0.02)


class PSRP(nn.Module):
    """Scale and shift of a residual, read from the residual stream x through one shared low-rank projection:

      u = relu(x W_d),  scale = u W_s,  shift = u W_b.

    Parameters: `down/kernel` W_d [width, rank], `scale/kernel` W_s and `shift/kernel` W_b, both
    [rank, width]; no biases.

    Attributes:
      rank: columns of W_d.
      start: "zero" starts W_s and W_b at zero, so that a network starts as it was; "paper" draws them like
        W_d from a truncated normal distribution with parameter 0.02, so that it starts near that.
      dtype: of the computation.
      param_dtype: of the parameters.

    Raises:
      ValueError: at construction, for a rank below 1 or an unknown start.

    Source: Gao et al. 2023, "Tuning Pre-trained Model via Moment Probing" (partially shared projection).

    Example:
      >>> x = jnp.ones((2, 3, 8))
      >>> (scale, shift), _ = PSRP(rank=4).init_with_output(jax.random.key(0), x)
      >>> scale.shape, shift.shape, float(abs(scale).max())
      ((2, 3, 8), (2, 3, 8), 0.0)
    """

    rank: int = 16
    start: str = "zero"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}: the paper's is rank=16")
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {self.start!r}")

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scale and shift for what is added to the residual stream.

        Args:
          x: [..., width] floating point: the residual stream after attention, not normalized (ViT), or the
            output of the feed-forward layer itself (ConvNeXt).

        Returns:
          Scale and shift, each [..., width] in `dtype`, for `recalibrate` or `recalibrate_output`.

        Raises:
          ValueError: `x` has no axis.
        """
        if x.ndim < 1:
            raise ValueError("x must be [..., width], got a scalar: pass the residual stream")
        ups = nn.initializers.zeros if self.start == "zero" else _paper_init
        u = jax.nn.relu(self._linear("down", self.rank, _paper_init, ("embed", None))(x))
        scale, shift = (
            self._linear(name, x.shape[-1], ups, (None, "embed"))(u) for name in ("scale", "shift")
        )
        return scale, shift

    def _linear(
        self, name: str, features: int, init: nn.initializers.Initializer, axes: tuple[str | None, ...]
    ) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=named(init, *axes),
            name=name,
        )


def recalibrate(x: jax.Array, residual: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """The residual stream after a recalibrated residual: x + shift + (1 + scale) * residual.

    Args:
      x: [..., width], the residual stream that scale and shift were read from.
      residual: what the layer adds to it, like `x`.
      scale: from `PSRP`, like `x`.
      shift: from `PSRP`, like `x`.

    Returns:
      Like `x`.

    Raises:
      ValueError: the shapes differ.
      TypeError: the dtypes differ.

    Source: Gao et al. 2023, "Tuning Pre-trained Model via Moment Probing" (partially shared projection).

    Example:
      >>> x, residual = jnp.array([1.0, 2.0]), jnp.array([10.0, 20.0])
      >>> recalibrate(x, residual, scale=jnp.array([0.0, 1.0]), shift=jnp.array([0.5, 0.0]))
      Array([11.5, 42. ], dtype=float32)
    """
    _same("x", x, residual=residual, scale=scale, shift=shift)
    return x + shift + (1 + scale) * residual


def recalibrate_output(y: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """The recalibrated output of a layer that scale and shift were read from: shift + (1 + scale) * y.

    The form for ConvNeXt: y is the output of the feed-forward layer, and LayerScale and the sum with the
    residual stream come after.

    Args:
      y: [..., width], the output of the feed-forward layer.
      scale: `PSRP` of `y`, like `y`.
      shift: `PSRP` of `y`, like `y`.

    Returns:
      Like `y`.

    Raises:
      ValueError: the shapes differ.
      TypeError: the dtypes differ.

    Source: Gao et al. 2023, "Tuning Pre-trained Model via Moment Probing" (partially shared projection).

    Example:
      >>> recalibrate_output(jnp.array([10.0, 20.0]), jnp.array([0.0, 1.0]), jnp.array([0.5, 0.0]))
      Array([10.5, 40. ], dtype=float32)
    """
    _same("y", y, scale=scale, shift=shift)
    return shift + (1 + scale) * y


def _same(name: str, x: jax.Array, **others: jax.Array) -> None:
    for other, value in others.items():
        if value.shape != x.shape:
            raise ValueError(
                f"{other} must have the shape of {name} {tuple(x.shape)}, got {tuple(value.shape)}: compute "
                f"it from {name}"
            )
        if value.dtype != x.dtype:
            raise TypeError(
                f"{other} must have the dtype of {name}, {x.dtype}, got {value.dtype}: make it with "
                f"PSRP(dtype=jnp.{x.dtype})"
            )
