"""Token poolings behind one interface: what turns the tokens of a backbone into the features of a head.

A pooling is a Flax module that is called as

    pool(tokens [..., N, D], *, cls: [..., D] | None = None, mask: [..., N] | None = None) -> [..., F]

- `tokens` are floating point, without the class token where the backbone has one beside the others.
- `cls` is the class token; a pooling that does not look at it ignores it, one that needs it says so.
- `mask` is bool and True at tokens. What lies at a masked token changes nothing and gets no gradient, NaN
  included. A sample without a token is an error when the mask is concrete; traced, it gives zeros (of a power
  mean, a mean, a maximum) with zero gradients.
- The order of the tokens does not matter. Statistics are float32, float64 for float64. F is the pooling's
  own; a dense layer behind it finds out.

`odjax.models.ViT(pool=...)` and `odjax.models.Bert(pooling=...)` take any module of this kind, and so do
loops of one's own: `features = pool.apply(variables, tokens, mask=mask)`. `token_pooling` makes one by name.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from odjax.core import statistics_dtype

KINDS = ("cls", "mean", "max")
NAMES = (*KINDS, "gem", "ggem")


def check_tokens(tokens: jax.Array, mask: jax.Array | None = None) -> None:
    """Raises for what no pooling can pool.

    Args:
      tokens: [..., N, D].
      mask: [..., N], or None.

    Raises:
      ValueError: tokens of rank below 2 or without a token, a mask of another shape, or (when it is concrete)
        one with a sample that has no token.
      TypeError: tokens that are not floating point, a mask that is not bool.

    Example:
      >>> check_tokens(jnp.ones((2, 3, 4)), jnp.zeros((2, 3), bool))
      Traceback (most recent call last):
      ValueError: mask has no token for 2 of 2 samples: leave those samples out
    """
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise TypeError(f"tokens must be floating point, got {tokens.dtype}: tokens.astype(jnp.float32)")
    if tokens.ndim < 2 or not tokens.shape[-2]:
        raise ValueError(f"tokens must be [..., N, D] with N at least 1, got shape {tuple(tokens.shape)}")
    if mask is not None:
        check_mask(mask, tokens.shape[:-1])


def check_mask(mask: jax.Array, shape: tuple[int, ...]) -> None:
    """The part of `check_tokens` that looks at the mask.

    Args:
      mask: the mask.
      shape: what it must be.

    Raises:
      ValueError: a mask of another shape, or (when it is concrete) one with a sample that has no token.
      TypeError: a mask that is not bool.
    """
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, got {mask.dtype}: compare first, such as mask != 0")
    if mask.shape != shape:
        raise ValueError(
            f"mask must be [..., N], here {tuple(shape)}, got {tuple(mask.shape)}: "
            f"jnp.broadcast_to(mask, {tuple(shape)})"
        )
    # On the host: under `jit`, operations on concrete arrays are traced too.
    if not isinstance(mask, jax.core.Tracer) and getattr(mask, "is_fully_addressable", True):
        empty = int(np.sum(~np.any(np.asarray(mask), axis=-1)))
        if empty:
            samples = mask.size // mask.shape[-1]
            raise ValueError(f"mask has no token for {empty} of {samples} samples: leave those samples out")


def token_count(
    length: int, mask: jax.Array | None, dtype: jnp.dtype, axis_name: str | tuple[str, ...] | None = None
) -> jax.Array:
    """The number of tokens over all devices, at least 1.

    Args:
      length: places on this device, N.
      mask: [..., N], or None: every place is a token.
      dtype: of the result.
      axis_name: the mesh axis, or several, over which N is split.

    Returns:
      [...] of `mask`, or [] without one.

    Example:
      >>> token_count(3, jnp.array([[True, True, False], [False] * 3]), jnp.float32)
      Array([2., 1.], dtype=float32)
    """
    if mask is None:
        devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
        return jnp.asarray(length * devices, dtype)
    count = jnp.sum(mask, axis=-1, dtype=dtype)
    if axis_name is not None:
        count = jax.lax.psum(count, axis_name)
    return jnp.maximum(count, 1)


def token_mean(
    tokens: jax.Array, mask: jax.Array | None = None, axis_name: str | tuple[str, ...] | None = None
) -> jax.Array:
    """`mean_pool` in float32, or float64 for float64.

    Args:
      tokens: like `mean_pool`.
      mask: like `mean_pool`.
      axis_name: the mesh axis, or several, over which N is split.

    Returns:
      [..., D].
    """
    check_tokens(tokens, mask)
    wide = tokens.astype(statistics_dtype(tokens))
    if mask is not None:
        wide = jnp.where(mask[..., None], wide, 0)
    total = jnp.sum(wide, axis=-2)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    count = token_count(tokens.shape[-2], mask, wide.dtype, axis_name)
    return total / (count if mask is None else count[..., None])


def mean_pool(tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean of the tokens.

    Args:
      tokens: [..., N, D] floating point.
      mask: bool [..., N], True at tokens; None: all are.

    Returns:
      [..., D] in the dtype of the tokens, summed in float32 (float64 for float64); zeros for a sample without
      a token under a traced mask.

    Raises:
      ValueError: like `check_tokens`.
      TypeError: like `check_tokens`.

    Example:
      >>> mean_pool(jnp.array([[1.0], [3.0], [8.0]]), jnp.array([True, True, False]))
      Array([2.], dtype=float32)
    """
    return token_mean(tokens, mask).astype(tokens.dtype)


def max_pool(tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The largest entry of each channel; equal ones share the gradient.

    Args:
      tokens: [..., N, D] floating point.
      mask: bool [..., N], True at tokens; None: all are.

    Returns:
      [..., D] in the dtype of the tokens; zeros for a sample without a token under a traced mask.

    Raises:
      ValueError: like `check_tokens`.
      TypeError: like `check_tokens`.

    Example:
      >>> max_pool(jnp.array([[1.0], [3.0], [8.0]]), jnp.array([True, True, False]))
      Array([3.], dtype=float32)
    """
    check_tokens(tokens, mask)
    if mask is None:
        return jnp.max(tokens, axis=-2)
    lowest = jnp.asarray(-jnp.inf, tokens.dtype)
    largest = jnp.max(jnp.where(mask[..., None], tokens, lowest), axis=-2)
    return jnp.where(jnp.any(mask, axis=-1)[..., None], largest, 0)


class TokenPool(nn.Module):
    """The class token, the mean or the maximum: a pooling without parameters.

    Attributes:
      kind: "cls", "mean" or "max".
      dtype: of the result.

    Raises:
      ValueError: at construction, for an unknown kind; when called, like `check_tokens`, or without the class
        token that "cls" takes.
      TypeError: when called, like `check_tokens`.

    Example:
      >>> TokenPool("mean").apply({}, jnp.array([[1.0], [3.0]]))
      Array([2.], dtype=float32)
    """

    kind: str
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    def __call__(
        self, tokens: jax.Array, *, cls: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Pools tokens.

        Args:
          tokens: [..., N, D] floating point.
          cls: the class token [..., D], for "cls".
          mask: bool [..., N], True at tokens; None: all are.

        Returns:
          [..., D] in `dtype`.
        """
        if self.kind == "mean":
            return token_mean(tokens, mask).astype(self.dtype)
        if self.kind == "max":
            return max_pool(tokens, mask).astype(self.dtype)
        if cls is None:
            raise ValueError("kind 'cls' takes the class token: pool(tokens, cls=tokens[..., 0, :])")
        return cls.astype(self.dtype)


def token_pooling(name: str, **options: Any) -> nn.Module:
    """A pooling by name.

    Args:
      name: "cls", "mean", "max", "gem" (one exponent) or "ggem" (an exponent a group of channels).
      **options: attributes of `TokenPool`, or of `odjax.heads.ggem.GGeM`; "ggem" needs `num_groups`.

    Returns:
      The module, see the head of this file for how it is called.

    Raises:
      ValueError: an unknown name, "ggem" without `num_groups`, or "gem" with one.
      TypeError: an option that the module does not have.

    Example:
      >>> token_pooling("ggem", num_groups=12).p_init
      3.0
    """
    if name in KINDS:
        return TokenPool(name, **options)
    if name not in NAMES:
        raise ValueError(f"there is no pooling {name!r}; there are {', '.join(NAMES)}")
    from odjax.heads.ggem import GGeM  # its checks are those of this file

    if name == "gem":
        if "num_groups" in options:
            raise ValueError(
                f"'gem' has one group: write token_pooling('ggem', num_groups={options['num_groups']})"
            )
        return GGeM(1, **options)
    if "num_groups" not in options:
        raise ValueError("'ggem' needs its number of groups: write token_pooling('ggem', num_groups=heads)")
    return GGeM(**options)
