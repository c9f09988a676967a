"""BERT: a Transformer encoder that sees a text whole, with the sizes of MiniLM sentence encoders.

Post-normalized layers, learned positions, token types, exact GELU, biases everywhere. The parameters are laid
out so that checkpoints load by transposing and reshaping alone, see `odjax.io.huggingface`.

Source: Devlin et al. 2019, "BERT", section 3; Wang et al. 2020, "MiniLM"; Reimers and Gurevych 2019,
"Sentence-BERT", section 3 (pooling).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import named
from odjax.models.attention import Attention, AttentionFn, check_attention, linear_init
from odjax.models.axes import constrain
from odjax.models.dense import matrix_dot
from odjax.models.embedding import embedding_init, table_by_vocab
from odjax.models.feedforward import FeedForward, activation_named
from odjax.models.norms import LayerNorm
from odjax.models.recalibration import Recalibration, add_residual, check_recalibration
from odjax.models.stack import check_remat, run_layers

POOLINGS = ("mean", "cls", "pooler")


class BertLayer(nn.Module):
    """One post-normalized layer of `Bert`. Attributes as there."""

    heads: int
    mlp_width: int
    activation: str
    dropout: float
    norm_eps: float
    attention: str | AttentionFn | None
    train: bool
    dtype: DTypeLike
    param_dtype: DTypeLike
    recalibration: Recalibration | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Maps `x` [B, T, width] to the same shape; `mask` [B, 1, 1, T] is True at tokens."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not self.train)
        x = constrain(x, "batch", "length", "act_embed")
        h = Attention(
            self.heads,
            self.heads,
            x.shape[-1] // self.heads,
            use_bias=True,
            implementation=self.attention,
            **dtypes,
            name="attn",
        )(x, mask=mask)
        x = LayerNorm(self.norm_eps, **dtypes, name="attn_norm")(x + drop(h))
        h = FeedForward(self.mlp_width, self.activation, **dtypes, name="mlp")(x)
        x = add_residual(x, drop(h), self.recalibration, **dtypes)
        x = LayerNorm(self.norm_eps, **dtypes, name="mlp_norm")(x)
        return constrain(x, "batch", "length", "act_embed")


class Bert(nn.Module):
    """BERT encoder: token ids to class logits, or to one vector a text without classes.

    Parameters: `embed/embedding` [vocab, width], `positions/embedding` [max_length, width],
    `types/embedding` [token_types, width], `embed_norm`, `layers/...` with a first axis of `layers`
    (`attn/(q|k|v|o)/(kernel|bias)`, `attn_norm`, `mlp/(up|down)/(kernel|bias)`, `mlp_norm`), `pooler` with
    pooling "pooler", `pooling/...` with a module that has parameters, `head` with classes.

    The probabilities of attention are not dropped while training, residuals and embeddings are.

    Attributes:
        vocab: token types of the tokenizer.
        layers: depth.
        width: of the residual stream.
        heads: attention heads.
        mlp_width: hidden width of the feed-forward layer; None: four times `width`.
        max_length: rows of the position table, the longest text.
        token_types: rows of the table of segments (first and second text of a pair).
        classes: outputs of the head; None: pooled features come out.
        pooling: "mean" over the tokens of the mask, "cls" (the first token), "pooler" (the first token
            through a layer with tanh, as BERT classifies), or a module, called as
            `pooling(features, cls=first_token, mask=mask)`, which gives what the head sees, [B, features];
            it gets the mask as bool, or None.
        activation: a key of `odjax.models.feedforward.ACTIVATIONS`.
        dropout: probability of dropping a unit of embeddings, residuals and pooled features while training;
            key "dropout".
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
        TypeError: at construction, for a `pooling` that is neither a name nor a module.

    Example:
        >>> model = bert("tiny", classes=2)
        >>> tokens = jnp.array([[2, 7, 9, 3], [2, 5, 3, 0]])
        >>> model.init_with_output(jax.random.key(0), tokens, tokens != 0)[0].shape
        (2, 2)
    """

    vocab: int
    layers: int
    width: int
    heads: int
    mlp_width: int | None = None
    max_length: int = 512
    token_types: int = 2
    classes: int | None = None
    pooling: str | nn.Module = "mean"
    activation: str = "gelu"
    dropout: float = 0.0
    norm_eps: float = 1e-12
    attention: str | AttentionFn | None = None
    remat: str = "none"
    scan: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    recalibration: Recalibration | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab", "layers", "width", "heads", "max_length", "token_types"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if isinstance(self.pooling, str) and self.pooling not in POOLINGS:
            raise ValueError(
                f"pooling must be one of {', '.join(POOLINGS)}, or a module, got {self.pooling!r}"
            )
        if not isinstance(self.pooling, (str, nn.Module)):
            raise TypeError(
                f"pooling must be one of {', '.join(POOLINGS)}, or a module called as "
                f"pooling(tokens, cls=, mask=), got {self.pooling!r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        activation_named(self.activation)
        check_attention(self.attention)
        check_remat(self.remat)
        check_recalibration(self.recalibration)

    def setup(self) -> None:
        """Makes what comes after the stack."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype, "dot_general_cls": matrix_dot()}
        if self.pooling == "pooler":
            self.pooler = nn.Dense(
                self.width,
                **dtypes,
                kernel_init=named(linear_init, "embed", None),
                bias_init=named(nn.initializers.zeros, "norm"),
            )
        if self.classes is not None:
            self.head = nn.Dense(
                self.classes,
                **dtypes,
                kernel_init=named(nn.initializers.zeros, "embed", "classes"),
                bias_init=named(nn.initializers.zeros, "classes"),
            )
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Classifies texts.

        Args:
            tokens: ids [B, T] int32.
            mask: [B, T] bool or 0 and 1, True at tokens and False at padding; None: no padding.
            types: segments [B, T] int32; None: all 0.
            train: whether dropout is on.

        Returns:
            Logits [B, classes] float32, or without classes what `pooled` gives, float32.

        Raises:
            ValueError: for texts above `max_length`, or a mask or types of another shape than `tokens`.
        """
        pooled = self.pooled(self.features(tokens, mask, types, train=train), mask)
        if self.classes is not None:
            pooled = self.head(self.drop(pooled, deterministic=not train))
        return pooled.astype(jnp.float32)

    def embed_sentences(
        self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None
    ) -> jax.Array:
        """Sentence vectors: the mean of the tokens' features, of length 1; a dot product is a similarity.

        Args:
            tokens: like `__call__`.
            mask: like `__call__`.
            types: like `__call__`.

        Returns:
            [B, width] float32; zeros for a text without a token.

        Raises:
            ValueError: like `__call__`.

        Source: Reimers and Gurevych 2019, "Sentence-BERT", section 3.

        Example:
            >>> model = bert("tiny")
            >>> tokens = jnp.array([[2, 7, 3]])
            >>> params = model.init(jax.random.key(0), tokens)
            >>> vector = model.apply(params, tokens, method="embed_sentences")
            >>> round(float(jnp.sum(vector**2)), 4)
            1.0
        """
        mean = _masked_mean(self.features(tokens, mask, types), mask)
        square = jnp.sum(mean * mean, axis=-1, keepdims=True)
        return mean * jax.lax.rsqrt(jnp.maximum(square, 1e-24))

    def pooled(self, features: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """What the head sees.

        Args:
            features: [B, T, width], from `features`.
            mask: like `__call__`.

        Returns:
            [B, width] in the dtype of `features`, or what a module gives.
        """
        if isinstance(self.pooling, nn.Module):
            kept = None if mask is None else mask.astype(bool)
            return self.pooling(features, cls=features[:, 0], mask=kept)
        if self.pooling == "mean":
            return _masked_mean(features, mask).astype(features.dtype)
        first = features[:, 0]
        return jnp.tanh(self.pooler(first)) if self.pooling == "pooler" else first

    @nn.compact
    def features(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """The last layer's output.

        Args:
            tokens: like `__call__`.
            mask: like `__call__`.
            types: like `__call__`.
            train: like `__call__`.

        Returns:
            [B, T, width] in `dtype`; at padding, numbers without a meaning.

        Raises:
            ValueError: like `__call__`.
        """
        self._check(tokens, mask, types)
        # Lookups are float32 and their sum is normalized in float32: one rounding.
        x = self._table("embed", self.vocab, "vocab", "embed", promote_dtype=table_by_vocab)(tokens)
        rows = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x = x + self._table("positions", self.max_length, "position", "norm")(rows)
        types = jnp.zeros((1, 1), jnp.int32) if types is None else types
        x = x + self._table("types", self.token_types, None, "norm")(types)
        x = LayerNorm(self.norm_eps, self.dtype, self.param_dtype, name="embed_norm")(x)
        x = self.drop(x, deterministic=not train)
        x = constrain(x, "batch", "length", "act_embed")

        def layer(name: str) -> BertLayer:
            return BertLayer(
                self.heads,
                self.mlp_width or 4 * self.width,
                self.activation,
                self.dropout,
                self.norm_eps,
                self.attention,
                train,
                self.dtype,
                self.param_dtype,
                self.recalibration,
                name=name,
            )

        seen = None if mask is None else mask.astype(bool)[:, None, None, :]
        return run_layers(layer, x, shared=(seen,), layers=self.layers, scan=self.scan, remat=self.remat)

    def _table(self, name: str, rows: int, *axes: str | None, **more: Any) -> nn.Embed:
        return nn.Embed(
            rows,
            self.width,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            embedding_init=named(embedding_init, *axes),
            name=name,
            **more,
        )

    def _check(self, tokens: jax.Array, mask: jax.Array | None, types: jax.Array | None) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be integers [batch, length], got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if tokens.shape[1] > self.max_length:
            raise ValueError(
                f"a text of {tokens.shape[1]} tokens is longer than max_length {self.max_length}: cut it"
            )
        for name, given in (("mask", mask), ("types", types)):
            if given is not None and given.shape != tokens.shape:
                raise ValueError(
                    f"{name} must have the shape of tokens {tuple(tokens.shape)}, got {tuple(given.shape)}"
                )


def _masked_mean(features: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Mean over the tokens of the mask, [B, T, width] to [B, width], in float32."""
    features = features.astype(jnp.float32)
    if mask is None:
        return jnp.mean(features, axis=1)
    kept = mask.astype(bool)[:, :, None]
    count = jnp.sum(kept.astype(jnp.float32), axis=1)
    return jnp.sum(jnp.where(kept, features, 0.0), axis=1) / jnp.maximum(count, 1.0)


PRESETS: dict[str, dict[str, Any]] = {
    # For tests: 0.1 million parameters.
    "tiny": {
        "vocab": 256,
        "layers": 2,
        "width": 64,
        "heads": 4,
        "mlp_width": 128,
        "max_length": 64,
    },
    # all-MiniLM-L6-v2: 22.7 million parameters.
    "minilm-l6": {"vocab": 30522, "layers": 6, "width": 384, "heads": 12},
    "bert-base": {"vocab": 30522, "layers": 12, "width": 768, "heads": 12, "pooling": "pooler"},
}


def bert(preset: str, **overrides: Any) -> Bert:
    """A BERT of a named size.

    Args:
        preset: a key of `PRESETS`.
        **overrides: attributes of `Bert` that replace the preset's.

    Returns:
        The model.

    Raises:
        ValueError: if the preset is unknown, naming those there are.

    Example:
        >>> bert("minilm-l6", classes=2).width
        384
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown BERT preset {preset!r}; there are {', '.join(PRESETS)}")
    return Bert(**{**PRESETS[preset], **overrides})
