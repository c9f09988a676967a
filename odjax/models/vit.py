"""Vision Transformer, with the options that DINOv2 weights need.

Pre-normalized layers, learned positions, class token, optional register tokens, LayerScale, a GELU or SwiGLU
feed-forward layer, separate query, key and value projections with biases.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; Oquab et al. 2024, "DINOv2"; Darcet et al.
2024, "Vision Transformers Need Registers"; Touvron et al. 2021, "Going deeper with Image Transformers"
(LayerScale).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import named
from odjax.models.attention import Attention, AttentionFn, check_attention, linear_init
from odjax.models.axes import constrain
from odjax.models.feedforward import FeedForward, SwiGLU, activation_named
from odjax.models.norms import LayerNorm
from odjax.models.positions import INTERPOLATIONS, interpolate_positions
from odjax.models.recalibration import Recalibration, add_residual, check_recalibration
from odjax.models.stack import check_remat, run_layers

token_init = nn.initializers.normal(0.02)
POOLS = ("cls", "mean", "cls+mean")


class Tokens(NamedTuple):
    """What a ViT ends with, after the last norm: class token, registers and patches, in `dtype`."""

    cls: jax.Array  # [B, width]
    registers: jax.Array  # [B, registers, width]
    patches: jax.Array  # [B, height / patch * width / patch, width], row by row


class ViTLayer(nn.Module):
    """One pre-normalized layer of `ViT`. Attributes as there."""

    heads: int
    mlp_width: int
    activation: str
    layer_scale: float | None
    dropout: float
    norm_eps: float
    attention: str | AttentionFn | None
    drop_path: bool
    train: bool
    dtype: DTypeLike
    param_dtype: DTypeLike
    recalibration: Recalibration | None = None

    @nn.compact
    def __call__(self, x: jax.Array, drop: jax.Array) -> jax.Array:
        """Maps `x` [B, N, width] to the same shape; `drop` [] is the probability of skipping a residual."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = constrain(x, "batch", "length", "act_embed")
        h = LayerNorm(self.norm_eps, **dtypes, name="attn_norm")(x)
        h = Attention(
            self.heads,
            self.heads,
            x.shape[-1] // self.heads,
            use_bias=True,
            implementation=self.attention,
            **dtypes,
            name="attn",
        )(h)
        x = x + self._residual(h, drop, "attn_scale")
        h = LayerNorm(self.norm_eps, **dtypes, name="mlp_norm")(x)
        if self.activation == "swiglu":
            h = SwiGLU(self.mlp_width, use_bias=True, **dtypes, name="mlp")(h)
        else:
            h = FeedForward(self.mlp_width, self.activation, **dtypes, name="mlp")(h)
        h = self._residual(h, drop, "mlp_scale")
        x = add_residual(x, h, self.recalibration, **dtypes)
        return constrain(x, "batch", "length", "act_embed")

    def _residual(self, h: jax.Array, drop: jax.Array, name: str) -> jax.Array:
        h = nn.Dropout(self.dropout, deterministic=not self.train)(h)
        if self.layer_scale is not None:
            init = named(nn.initializers.constant(self.layer_scale), "norm")
            scale = self.param(name, init, (h.shape[-1],), self.param_dtype)
            h = h * scale.astype(h.dtype)[None, None]
        if self.train and self.drop_path:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop, (h.shape[0], 1, 1))
            h = jnp.where(keep, h / (1 - drop).astype(h.dtype), jnp.zeros((), h.dtype))
        return h


class ViT(nn.Module):
    """Vision Transformer: images to class logits, or to features without classes.

    Parameters: `patch/(kernel|bias)`, `cls` [1, width], `registers` [registers, width], `positions`
    [1 + patches, width] (the class token's first), `layers/...` with a first axis of `layers` (`attn_norm`,
    `attn/(q|k|v|o)`, `attn_scale`, `mlp_norm`, `mlp/(up|down)` or `mlp/(gate|up|down)`, `mlp_scale`), `norm`,
    `head`, and `pool/...` with a module that has parameters.

    Attributes:
        image: height and width of the images that the position table is made for, multiples of `patch`.
        patch: side of a patch.
        layers: depth.
        width: of the residual stream.
        heads: attention heads.
        mlp_width: hidden width of the feed-forward layer; None: four times `width`.
        classes: outputs of the head; None: features come out.
        channels: of the images.
        activation: a key of `odjax.models.feedforward.ACTIVATIONS`, or "swiglu".
        registers: number of register tokens.
        pool: "cls", "mean" (over patches), "cls+mean" (both, concatenated), or a module, called as
            `pool(patches, cls=class_token, mask=None)`, which gives what the head sees, [B, features].
        layer_scale: initial value of LayerScale, or None for none.
        interpolation: how positions reach another size of image, a key of
            `odjax.models.positions.INTERPOLATIONS`; None: another size is an error.
        dropout: probability of dropping a residual's unit while training; key "dropout".
        drop_path: probability of skipping a residual of the last layer while training, growing linearly from
            0 with depth; key "dropout".
        norm_eps: of every LayerNorm.
        attention: implementation, see `odjax.models.attention.attend`.
        remat: a key of `odjax.models.stack.REMAT_POLICIES`.
        scan: whether layers are scanned.
        dtype: of the computation; logits are float32.
        param_dtype: of the parameters.
        recalibration: makes a module of each layer, named `psrp`, that scales and shifts the residual of the
            feed-forward layer, see `odjax.models.recalibration`; for example
            `functools.partial(odjax.heads.PSRP, rank=16)`. None: there is none.

    Raises:
        ValueError: at construction, for sizes that do not fit together.
        TypeError: at construction, for a `pool` that is neither a name nor a module.

    Example:
        >>> model = vit("tiny-digits", classes=10)
        >>> model.init_with_output(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))[0].shape
        (2, 10)
    """

    image: tuple[int, int]
    patch: int
    layers: int
    width: int
    heads: int
    mlp_width: int | None = None
    classes: int | None = None
    channels: int = 3
    activation: str = "gelu"
    registers: int = 0
    pool: str | nn.Module = "cls"
    layer_scale: float | None = None
    interpolation: str | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    attention: str | AttentionFn | None = None
    remat: str = "none"
    scan: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    recalibration: Recalibration | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image[0] % self.patch or self.image[1] % self.patch:
            raise ValueError(f"image {self.image[0]}x{self.image[1]} is not a multiple of patch {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if isinstance(self.pool, str) and self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, or a module, got {self.pool!r}")
        if not isinstance(self.pool, (str, nn.Module)):
            raise TypeError(
                f"pool must be one of {', '.join(POOLS)}, or a module called as pool(tokens, cls=, mask=), "
                f"got {self.pool!r}"
            )
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation is one of None, {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}"
            )
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.activation != "swiglu":
            activation_named(self.activation)
        check_attention(self.attention)
        check_remat(self.remat)
        check_recalibration(self.recalibration)

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
            images: [B, height, width, channels] floating point.
            train: whether dropout and stochastic depth are on.

        Returns:
            Logits [B, classes] float32, or without classes what `pooled` gives, float32.

        Raises:
            ValueError: for images of the wrong size or number of channels.
        """
        pooled = self.pooled(self.features(images, train=train))
        if self.classes is not None:
            pooled = self.head(pooled)
        return pooled.astype(jnp.float32)

    def pooled(self, tokens: Tokens) -> jax.Array:
        """What the head sees.

        Args:
            tokens: from `features`.

        Returns:
            [B, width], [B, 2 width] with pool "cls+mean", or what a module gives.
        """
        if isinstance(self.pool, nn.Module):
            return self.pool(tokens.patches, cls=tokens.cls, mask=None)
        if self.pool == "cls":
            return tokens.cls
        mean = jnp.mean(tokens.patches.astype(jnp.float32), axis=1).astype(tokens.patches.dtype)
        return mean if self.pool == "mean" else jnp.concatenate([tokens.cls, mean], axis=-1)

    @nn.compact
    def features(self, images: jax.Array, *, train: bool = False) -> Tokens:
        """All tokens after the last norm.

        Args:
            images: [B, height, width, channels] floating point.
            train: whether dropout and stochastic depth are on.

        Returns:
            The class token, the registers and the patches.

        Raises:
            ValueError: for images of the wrong size or number of channels.
        """
        grid = self._grid(images)
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=named(linear_init, None, None, "channels", "embed"),
            bias_init=named(nn.initializers.zeros, "norm"),
            name="patch",
        )(images)
        batch = x.shape[0]
        x = jnp.reshape(x, (batch, grid[0] * grid[1], self.width))

        table_grid = (self.image[0] // self.patch, self.image[1] // self.patch)
        rows = 1 + table_grid[0] * table_grid[1]
        positions = self._table("positions", rows, "position")
        if grid != table_grid:
            positions = interpolate_positions(positions, table_grid, grid, self.interpolation)
        positions = positions.astype(self.dtype)[None]

        def every(tokens: jax.Array) -> jax.Array:
            return jnp.broadcast_to(tokens, (batch, *tokens.shape[1:]))

        cls = self._table("cls", 1, None).astype(self.dtype)[None]
        parts = [every(cls + positions[:, :1])]
        if self.registers:
            parts.append(every(self._table("registers", self.registers, None).astype(self.dtype)[None]))
        x = jnp.concatenate([*parts, x + positions[:, 1:]], axis=1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = constrain(x, "batch", "length", "act_embed")

        def layer(name: str) -> ViTLayer:
            return ViTLayer(
                self.heads,
                self.mlp_width or 4 * self.width,
                self.activation,
                self.layer_scale,
                self.dropout,
                self.norm_eps,
                self.attention,
                self.drop_path > 0,
                train,
                self.dtype,
                self.param_dtype,
                self.recalibration,
                name=name,
            )

        drop = jnp.linspace(0.0, self.drop_path, self.layers)
        x = run_layers(layer, x, each=drop, layers=self.layers, scan=self.scan, remat=self.remat)
        x = LayerNorm(self.norm_eps, self.dtype, self.param_dtype, name="norm")(x)
        return Tokens(x[:, 0], x[:, 1 : 1 + self.registers], x[:, 1 + self.registers :])

    def _table(self, name: str, rows: int, axis: str | None) -> jax.Array:
        return self.param(name, named(token_init, axis, "norm"), (rows, self.width), self.param_dtype)

    def _grid(self, images: jax.Array) -> tuple[int, int]:
        """Patches down and across, or an error that says what is wrong with the images."""
        if images.ndim != 4 or images.shape[-1] != self.channels:
            raise ValueError(
                f"images must be [batch, height, width, {self.channels}], got shape {tuple(images.shape)}"
            )
        height, width = images.shape[1:3]
        if (height, width) != tuple(self.image) and self.interpolation is None:
            raise ValueError(
                f"images must be {self.image[0]}x{self.image[1]}, got {height}x{width}; for other sizes "
                f"set interpolation to one of {', '.join(INTERPOLATIONS)}"
            )
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(f"images must be a multiple of patch {self.patch}, got {height}x{width}")
        return height // self.patch, width // self.patch


_DINOV2: dict[str, Any] = {
    "image": (518, 518),
    "patch": 14,
    "layer_scale": 1e-5,
    "interpolation": "bicubic_offset",
}

PRESETS: dict[str, dict[str, Any]] = {
    # The 8x8 digits of scikit-learn: 0.1 million parameters.
    "tiny-digits": {
        "image": (8, 8),
        "patch": 2,
        "channels": 1,
        "layers": 3,
        "width": 64,
        "heads": 4,
        "mlp_width": 128,
    },
    "s16": {"image": (224, 224), "patch": 16, "layers": 12, "width": 384, "heads": 6},
    "b16": {"image": (224, 224), "patch": 16, "layers": 12, "width": 768, "heads": 12},
    "l16": {"image": (224, 224), "patch": 16, "layers": 24, "width": 1024, "heads": 16},
    "dinov2-s14": {**_DINOV2, "layers": 12, "width": 384, "heads": 6},
    "dinov2-b14": {**_DINOV2, "layers": 12, "width": 768, "heads": 12},
    "dinov2-l14": {**_DINOV2, "layers": 24, "width": 1024, "heads": 16},
    "dinov2-g14": {
        **_DINOV2,
        "layers": 40,
        "width": 1536,
        "heads": 24,
        "mlp_width": 4096,
        "activation": "swiglu",
    },
}


def vit(preset: str, **overrides: Any) -> ViT:
    """A ViT of a named size.

    DINOv2 with registers is `vit("dinov2-s14", registers=4, interpolation="bicubic_antialias")`.

    Args:
        preset: a key of `PRESETS`.
        **overrides: attributes of `ViT` that replace the preset's.

    Returns:
        The model.

    Raises:
        ValueError: if the preset is unknown, naming those there are.

    Example:
        >>> vit("dinov2-g14").layers
        40
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown ViT preset {preset!r}; there are {', '.join(PRESETS)}")
    return ViT(**{**PRESETS[preset], **overrides})
