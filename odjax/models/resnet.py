"""Residual networks for small images: the CIFAR family of depth 6n + 2.

A 3x3 convolution, three stages of n basic blocks whose widths double and whose maps halve, pooling, a linear
classifier. Convolutions have no biases and are padded by one on every side, as PyTorch pads them: with stride
2, "SAME" padding would shift the map by a pixel.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition", sections 3.3 and 4.2.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import named, statistics_dtype
from odjax.models.axes import constrain

conv_init = nn.initializers.he_normal()
SHORTCUTS = ("pad", "projection")
STAGES = 3


class BatchNorm(nn.Module):
    """Batch normalization: `(x - mean) / sqrt(variance + eps) * scale + bias`, channel by channel.

    While training, mean and variance are those of the batch, and the running ones in the collection
    "batch_stats" (float32) move towards them; otherwise the running ones are used. As in PyTorch, the running
    variance takes the unbiased one of the batch (divided by n - 1). The batch is all of the array, so under
    `jit` on a mesh it is that of all devices.

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithms 1 and 2.

    Attributes:
        axis: logical name of the channels.
        eps: added to the variance.
        momentum: how much of the running statistics stays, 1 less what PyTorch calls so.
        dtype: of the result.
        param_dtype: of `scale` and `bias`, both [channels].

    Example:
        >>> norm = BatchNorm()
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = norm.init(jax.random.key(0), x)
        >>> y, moved = norm.apply(variables, x, train=True, mutable="batch_stats")
        >>> [round(float(v), 3) for v in (y[1, 0], *map(jnp.squeeze, moved["batch_stats"].values()))]
        [1.0, 0.2, 1.1]
    """

    axis: str = "norm"
    eps: float = 1e-5
    momentum: float = 0.9
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Normalizes `x` [..., channels]."""
        width = (x.shape[-1],)
        scale = self.param("scale", named(nn.initializers.ones, self.axis), width, self.param_dtype)
        bias = self.param("bias", named(nn.initializers.zeros, self.axis), width, self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, width, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, width, jnp.float32)
        y = x.astype(statistics_dtype(x))
        leading = tuple(range(x.ndim - 1))

        def channels(value: jax.Array) -> jax.Array:
            return jnp.expand_dims(value.astype(y.dtype), leading)

        centre, spread = channels(mean.value), channels(variance.value)
        if train:
            count = x.size // x.shape[-1]
            if count < 2:
                raise ValueError(
                    f"x {list(x.shape)} has {count} value a channel, training needs at least 2: give a "
                    "larger batch, or train=False"
                )
            centre = jnp.mean(y, axis=leading, keepdims=True)
            spread = jnp.mean((y - centre) ** 2, axis=leading, keepdims=True)
            if not self.is_initializing():
                self._move(mean, centre)
                self._move(variance, spread * (count / (count - 1)))
        y = (y - centre) * jax.lax.rsqrt(spread + self.eps)
        return (y * channels(scale) + channels(bias)).astype(self.dtype)

    def _move(self, running: nn.Variable, new: jax.Array) -> None:
        new = jnp.ravel(new).astype(jnp.float32)
        running.value = self.momentum * running.value + (1 - self.momentum) * new


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them: `relu(shortcut(x) + f(x))`.

    Source: He et al. 2016, equations 1 and 2, figure 2.

    Attributes:
        width: channels that come out.
        stride: of the first convolution; the shortcut takes every such pixel.
        shortcut: where the shape changes: "pad" fills up channels with zeros, the same number before and
            after (option A), "projection" is a 1x1 convolution with a norm (option B).
        norm_eps: of the norms.
        momentum: of the norms' running statistics.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    width: int
    stride: int = 1
    shortcut: str = "pad"
    norm_eps: float = 1e-5
    momentum: float = 0.9
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `x` [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), width]."""
        rest = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"eps": self.norm_eps, "momentum": self.momentum, **rest}
        y = convolution(self.width, 3, self.stride, ("embed", "mlp"), "conv_1", **rest)(x)
        y = nn.relu(BatchNorm("mlp", **norm, name="norm_1")(y, train=train))
        y = constrain(y, "batch", None, None, "act_mlp")
        y = convolution(self.width, 3, 1, ("mlp", "embed"), "conv_2", **rest)(y)
        y = BatchNorm("norm", **norm, name="norm_2")(y, train=train)
        if self.stride == 1 and x.shape[-1] == self.width:
            shortcut = x
        elif self.shortcut == "projection":
            shortcut = convolution(self.width, 1, self.stride, ("channels", "embed"), "shortcut", **rest)(x)
            shortcut = BatchNorm("norm", **norm, name="shortcut_norm")(shortcut, train=train)
        else:
            missing = self.width - x.shape[-1]
            shortcut = jnp.pad(
                x[:, :: self.stride, :: self.stride],
                ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)),
            )
        return constrain(nn.relu(shortcut + y), "batch", None, None, "act_embed")


def convolution(
    width: int,
    window: int,
    stride: int,
    axes: tuple[str, str],
    name: str,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> nn.Conv:
    """A convolution without bias, padded by half its window on every side.

    Args:
        width: channels that come out.
        window: height and width of the kernel, odd.
        stride: in both directions.
        axes: logical names of the input and output channels.
        name: of the module.
        dtype: of the computation.
        param_dtype: of the kernel [window, window, in, width].

    Returns:
        The module.
    """
    return nn.Conv(
        width,
        (window, window),
        strides=(stride, stride),
        padding=((window // 2, window // 2),) * 2,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=named(conv_init, None, None, *axes),
        name=name,
    )


class ResNet(nn.Module):
    """Residual network of the CIFAR family: images to class logits, or to features without classes.

    Parameters: `stem/kernel`, `stem_norm/(scale|bias)`, `stage_{1..3}_block_{0..n-1}/(conv_1|conv_2)/kernel`,
    `.../(norm_1|norm_2)/(scale|bias)`, with projections `.../shortcut/kernel` and
    `.../shortcut_norm/(scale|bias)`, `head`, and those of a `pool` that has some. Running statistics are
    beside the norms in the collection "batch_stats": `.../(mean|var)`.

    Attributes:
        depth: number of layers with weights, 6n + 2: 20, 32, 44, 56, 110.
        classes: outputs of the head; None: features come out.
        channels: of the images.
        width: channels of the first stage; the others have two and four times as many.
        shortcut: "pad" (option A, no parameters) or "projection" (option B).
        pool: "mean", or a module `pool(tokens [B, N, D], cls=None, mask=None) -> [B, F]` that sees the pixels
            of the last map row by row.
        norm_eps: of every norm.
        momentum: of the running statistics, 1 less what PyTorch calls so.
        dtype: of the computation; logits are float32.
        param_dtype: of the parameters; running statistics are float32.

    Raises:
        ValueError: at construction, for sizes that do not fit together.
        TypeError: at construction, for a pool that is neither text nor a module.

    Example:
        >>> model = resnet("resnet20", classes=10)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        >>> images = jnp.ones((2, 32, 32, 3))
        >>> logits, moved = model.apply(variables, images, train=True, mutable="batch_stats")
        >>> logits.shape
        (2, 10)
    """

    depth: int
    classes: int | None = None
    channels: int = 3
    width: int = 16
    shortcut: str = "pad"
    pool: str | nn.Module = "mean"
    norm_eps: float = 1e-5
    momentum: float = 0.9
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 8 or (self.depth - 2) % (2 * STAGES):
            raise ValueError(
                f"depth must be 6n + 2 with n from 1 (8, 14, 20, 32, 44, 56, 110), got {self.depth}"
            )
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {self.shortcut!r}")
        if not isinstance(self.pool, str | nn.Module):
            raise TypeError(f"pool must be 'mean' or a module, got {type(self.pool).__name__}")
        if isinstance(self.pool, str) and self.pool != "mean":
            raise ValueError(f"pool must be 'mean' or a module, got {self.pool!r}")

    def setup(self) -> None:
        """Makes the head."""
        if self.classes is not None:
            self.head = nn.Dense(
                self.classes,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=named(nn.initializers.zeros, "embed", "classes"),
                bias_init=named(nn.initializers.zeros, "classes"),
            )

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
            images: [B, H, W, channels] floating point.
            train: whether norms use the batch's statistics and move the running ones, which takes
                `mutable="batch_stats"`.

        Returns:
            Logits [B, classes] float32, or pooled features [B, F] float32 without classes.

        Raises:
            ValueError: for images without pixels or with another number of axes or channels, or, when
                training, with one value a channel.
        """
        pooled = self.pooled(self.features(images, train=train))
        if self.classes is not None:
            pooled = self.head(pooled)
        return pooled.astype(jnp.float32)

    def pooled(self, features: jax.Array) -> jax.Array:
        """What the head sees.

        Args:
            features: [B, h, w, 4 width] from `features`.

        Returns:
            [B, 4 width], or what the pool makes of the pixels.
        """
        tokens = jnp.reshape(features, (features.shape[0], -1, features.shape[-1]))
        if isinstance(self.pool, str):
            return jnp.mean(tokens.astype(statistics_dtype(tokens)), axis=1).astype(tokens.dtype)
        return self.pool(tokens, cls=None, mask=None)

    @nn.compact
    def features(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """The last map, without negative entries.

        Args:
            images: [B, H, W, channels] floating point.
            train: as for a call.

        Returns:
            [B, ceil(H / 4), ceil(W / 4), 4 width] in `dtype`.

        Raises:
            ValueError: as for a call.
        """
        if images.ndim != 4 or images.shape[-1] != self.channels or 0 in images.shape[1:3]:
            raise ValueError(
                f"images must be [batch, height, width, {self.channels}], got shape {tuple(images.shape)}"
            )
        rest = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = convolution(self.width, 3, 1, ("channels", "embed"), "stem", **rest)(images)
        norm = BatchNorm("norm", self.norm_eps, self.momentum, **rest, name="stem_norm")
        x = constrain(nn.relu(norm(x, train=train)), "batch", None, None, "act_embed")
        for stage in range(STAGES):
            for block in range((self.depth - 2) // (2 * STAGES)):
                x = BasicBlock(
                    self.width << stage,
                    2 if stage and not block else 1,
                    self.shortcut,
                    self.norm_eps,
                    self.momentum,
                    **rest,
                    name=f"stage_{stage + 1}_block_{block}",
                )(x, train=train)
        return x


PRESETS: dict[str, dict[str, Any]] = {
    f"resnet{depth}": {"depth": depth} for depth in (8, 14, 20, 32, 44, 56, 110)
}


def resnet(preset: str, **overrides: Any) -> ResNet:
    """A ResNet of the CIFAR family of a named size.

    Args:
        preset: a key of `PRESETS`: "resnet20" to "resnet110", and the small "resnet8" and "resnet14".
        **overrides: attributes of `ResNet` that replace the preset's.

    Returns:
        The model.

    Raises:
        ValueError: if the preset is unknown, naming those there are.

    Example:
        >>> resnet("resnet56", classes=100).depth
        56
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown ResNet preset {preset!r}; there are {', '.join(PRESETS)}")
    return ResNet(**{**PRESETS[preset], **overrides})
