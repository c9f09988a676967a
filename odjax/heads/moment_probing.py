"""Moment probing: a classifier of frozen tokens that sees their second moments beside their mean.

`MHC3` follows the interface of poolings, `pool(tokens, cls=None, mask=None) -> features`; `MomentProbe`
averages a linear classifier of its features and one of the class token or the mean.

Source: Gao, Wang, Lin, Zhu, Hu and Zhou 2023, "Tuning Pre-trained Model via Moment Probing", arXiv
2307.11342.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import named, statistics_dtype
from odjax.heads.pooling import check_tokens, token_mean
from odjax.heads.second_moments import (
    CENTERS,
    Axis,
    column_normalize,
    cross_moments,
    head_pairs,
)

FIRST_ORDERS = ("cls", "mean", "mean_norm")


def feature_size(dim: int = 512, heads: int = 4, pairs: str = "near", conv_layers: int = 2) -> int:
    """The number of features of `MHC3`, P r^2 with r the side of a map after the convolutions.

    A convolution takes a side of r to floor((r - 3) / 2) + 1.

    Args:
      dim: width of the projection, D.
      heads: number of heads, H; a map has the side D / H.
      pairs: see `head_pairs`, which gives P.
      conv_layers: number of convolutions.

    Returns:
      The number of features.

    Raises:
      ValueError: D is not a multiple of H, or the maps are too small for the convolutions; see also
        `head_pairs`.

    Source: Gao et al. 2023, "Tuning Pre-trained Model via Moment Probing" (multi-head convolutional
    cross-covariance).

    Example:
      >>> feature_size(512, 4)  # 3 maps of 31 x 31
      2883
    """
    maps = len(head_pairs(heads, pairs))
    if conv_layers < 0:
        raise ValueError(f"conv_layers must be at least 0, got {conv_layers}")
    if dim % heads:
        raise ValueError(
            f"dim must be a multiple of heads, got {dim} and {heads}: take dim={max(dim // heads, 1) * heads}"
        )
    side, least = dim // heads, 2 ** (conv_layers + 1) - 1
    if side < least:
        raise ValueError(
            f"a head has {side} channels (dim / heads), {conv_layers} convolutions need at least {least}: "
            f"take dim={least * heads} or more, or fewer conv_layers"
        )
    for _ in range(conv_layers):
        side = (side - 3) // 2 + 1
    return maps * side**2


class MHC3(nn.Module):
    """Multi-head convolutional cross-covariance: a set of tokens to a vector of second moments.

    Tokens are projected and split into heads, each head is normalized by one LayerNorm that all heads share,
    the cross moments of pairs of heads are normalized by columns, and 3x3 convolutions of stride 2 without
    padding or bias, with exact GELU between them, shrink the maps. The features are in the order (map, row,
    column).

    Parameters: `projection/kernel` [width, dim], `projection/bias` [dim], `norm/scale` and `norm/bias`
    [dim / heads], `conv_<i>/kernel` [3, 3, P, P].

    Attributes:
      dim: width of the projection.
      heads: number of heads.
      pairs: which heads are multiplied, see `head_pairs`.
      center: what is subtracted from a head, see `cross_moments`.
      conv_layers: number of convolutions.
      interleaved: whether channel j of the projection belongs to head j mod H, as in the authors' heads for
        CNNs; otherwise a head has consecutive channels.
      norm_eps: of the LayerNorm; released weights were trained with 1e-5.
      axis_name: the mesh axis over which tokens are split, see `cross_moments`.
      dtype: of the computation; moments are float32.
      param_dtype: of the parameters.

    Raises:
      ValueError: at construction, for sizes that do not fit together.

    Source: Gao et al. 2023, "Tuning Pre-trained Model via Moment Probing" (multi-head convolutional
    cross-covariance).

    Example:
      >>> pool, tokens = MHC3(dim=32, heads=4), jnp.ones((2, 5, 6))
      >>> pool.init_with_output(jax.random.key(0), tokens)[0].shape
      (2, 3)
    """

    dim: int = 512
    heads: int = 4
    pairs: str = "near"
    center: str = "global"
    conv_layers: int = 2
    interleaved: bool = False
    norm_eps: float = 1e-5
    axis_name: Axis = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moments(self)

    @nn.compact
    def __call__(
        self, tokens: jax.Array, *, cls: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Second moments of tokens.

        Args:
          tokens: [..., N, width] floating point.
          cls: the class token; not used.
          mask: bool [..., N], True at tokens; what lies at other places is ignored.

        Returns:
          [..., feature_size(...)] in `dtype`.

        Raises:
          ValueError: tokens without an axis of tokens or without a token, or a mask of another shape.
          TypeError: tokens are not floating point.
        """
        tokens = _inert(tokens, mask)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        z = nn.Dense(
            self.dim,
            **dtypes,
            kernel_init=named(nn.initializers.lecun_normal(), "embed", None),
            bias_init=named(nn.initializers.zeros, "norm"),
            name="projection",
        )(tokens)
        m = self.dim // self.heads
        if self.interleaved:
            z = jnp.swapaxes(z.reshape(*z.shape[:-1], m, self.heads), -1, -2)
        else:
            z = z.reshape(*z.shape[:-1], self.heads, m)
        z = _normalized(_layer_norm(self.norm_eps, **dtypes, name="norm"), z, self.dtype)
        s = column_normalize(cross_moments(z, self.pairs, self.center, mask, self.axis_name))
        maps = s.shape[-3]
        s = jnp.moveaxis(s.astype(self.dtype), -3, -1)  # convolutions want [..., rows, columns, maps]
        for i in range(self.conv_layers):
            s = nn.Conv(
                maps,
                (3, 3),
                strides=(2, 2),
                padding="VALID",
                use_bias=False,
                **dtypes,
                kernel_init=named(nn.initializers.lecun_normal(), None, None, "channels", None),
                name=f"conv_{i}",
            )(jax.nn.gelu(s, approximate=False) if i else s)
        s = jnp.moveaxis(s, -1, -3)
        return s.reshape(*s.shape[:-3], -1)


class MomentProbe(nn.Module):
    """Moment probing: the mean of the logits of a first-order and a second-order linear classifier.

    The backbone is frozen: with `stop_gradient`, no gradient reaches the tokens, so that nothing of it is
    differentiated. Its parameters must not be trained either (weight decay would still move them): see
    `odjax.core.partition`.

    Parameters: `moments/...` as in `MHC3`, `first/(kernel|bias)`, `second/(kernel|bias)`, and with
    first_order "mean_norm" `norm/(scale|bias)`. Both classifiers start at zero. Second moments overfit with
    few labels: keep weight decay on `second/kernel` (the paper: 0.05).

    Attributes:
      num_classes: outputs.
      first_order: what the first classifier sees: "cls" the class token (ViT), "mean" the mean of the tokens
        (MLP networks), "mean_norm" that mean after a LayerNorm (CNNs).
      dim: as in `MHC3`, like the following.
      heads: number of heads.
      pairs: which heads are multiplied.
      center: what is subtracted from a head.
      conv_layers: number of convolutions.
      interleaved: whether heads have interleaved channels.
      norm_eps: of every LayerNorm.
      axis_name: the mesh axis over which tokens are split.
      stop_gradient: whether tokens and class token are constants.
      dtype: of the computation; moments and logits are float32.
      param_dtype: of the parameters.

    Raises:
      ValueError: at construction, for sizes that do not fit together.

    Source: Gao et al. 2023, "Tuning Pre-trained Model via Moment Probing".

    Example:
      >>> probe = MomentProbe(num_classes=10, first_order="mean", dim=32)
      >>> probe.init_with_output(jax.random.key(0), jnp.ones((2, 5, 6)))[0].shape
      (2, 10)
    """

    num_classes: int
    first_order: str = "cls"
    dim: int = 512
    heads: int = 4
    pairs: str = "near"
    center: str = "global"
    conv_layers: int = 2
    interleaved: bool = False
    norm_eps: float = 1e-5
    axis_name: Axis = None
    stop_gradient: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if self.first_order not in FIRST_ORDERS:
            raise ValueError(
                f"first_order must be one of {', '.join(FIRST_ORDERS)}, got {self.first_order!r}"
            )
        _check_moments(self)

    def setup(self) -> None:
        """Makes the moments and both classifiers."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.moments = MHC3(
            self.dim,
            self.heads,
            self.pairs,
            self.center,
            self.conv_layers,
            self.interleaved,
            self.norm_eps,
            self.axis_name,
            **dtypes,
        )
        if self.first_order == "mean_norm":
            self.norm = _layer_norm(self.norm_eps, **dtypes)
        self.first, self.second = (
            nn.Dense(
                self.num_classes,
                **dtypes,
                kernel_init=named(nn.initializers.zeros, inputs, "classes"),
                bias_init=named(nn.initializers.zeros, "classes"),
            )
            for inputs in ("embed", "channels")
        )

    def __call__(
        self, tokens: jax.Array, *, cls: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Classifies sets of tokens.

        Args:
          tokens: [..., N, width] floating point, without the class token.
          cls: [..., width], the class token; needed with first_order "cls", otherwise not used.
          mask: bool [..., N], True at tokens; what lies at other places is ignored.

        Returns:
          Logits [..., num_classes] float32.

        Raises:
          ValueError: tokens without an axis of tokens or without a token, a mask or class token of another
            shape, or no class token where one is needed.
          TypeError: tokens are not floating point.
        """
        first, second = self.branches(tokens, cls=cls, mask=mask)
        return (first + second) / 2

    def branches(
        self, tokens: jax.Array, *, cls: jax.Array | None = None, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The logits of both classifiers, whose mean the probe returns; `apply(..., method="branches")`.

        Args:
          tokens: like `__call__`.
          cls: like `__call__`.
          mask: like `__call__`.

        Returns:
          First-order and second-order logits, each [..., num_classes] float32.

        Raises:
          ValueError: like `__call__`.
          TypeError: like `__call__`.
        """
        tokens = _inert(tokens, mask)
        if self.stop_gradient:
            tokens, cls = jax.lax.stop_gradient((tokens, cls))
        if self.first_order == "cls":
            first = _class_token(tokens, cls)
        else:
            first = token_mean(tokens, mask, self.axis_name)
        if self.first_order == "mean_norm":
            first = _normalized(self.norm, first, self.dtype)
        logits = self.first(first), self.second(self.moments(tokens, mask=mask))
        return logits[0].astype(jnp.float32), logits[1].astype(jnp.float32)


def _layer_norm(
    eps: float, dtype: DTypeLike, param_dtype: DTypeLike, name: str | None = None
) -> nn.LayerNorm:
    """A LayerNorm for `_normalized`: it computes in the dtype of the statistics from beginning to end."""
    return nn.LayerNorm(
        eps,
        use_fast_variance=False,
        force_float32_reductions=False,
        dtype=statistics_dtype(dtype),
        param_dtype=param_dtype,
        scale_init=named(nn.initializers.ones, "norm"),
        bias_init=named(nn.initializers.zeros, "norm"),
        name=name,
    )


def _normalized(norm: nn.LayerNorm, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return norm(x.astype(statistics_dtype(dtype))).astype(dtype)


def _inert(tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Tokens that are checked, and zero where the mask is: no NaN of a padding reaches a gradient."""
    check_tokens(tokens, mask)
    if mask is None:
        return tokens
    return jnp.where(mask[..., None], tokens, jnp.zeros((), tokens.dtype))


def _class_token(tokens: jax.Array, cls: jax.Array | None) -> jax.Array:
    if cls is None:
        raise ValueError(
            "first_order='cls' needs the class token: call the probe with cls=, or take first_order='mean'"
        )
    if cls.ndim != tokens.ndim - 1 or cls.shape[:-1] != tokens.shape[:-2]:
        raise ValueError(
            f"cls must be one vector a set of tokens, [..., width] for tokens {tuple(tokens.shape)}, got "
            f"{tuple(cls.shape)}"
        )
    return cls


def _check_moments(module: MHC3 | MomentProbe) -> None:
    feature_size(module.dim, module.heads, module.pairs, module.conv_layers)
    if module.center not in CENTERS:
        raise ValueError(f"center must be one of {', '.join(CENTERS)}, got {module.center!r}")
