"""Encoder-decoder Transformer for translation.

Source: Vaswani et al. 2017, "Attention Is All You Need"; Xiong et al. 2020, "On Layer Normalization in the
Transformer Architecture" (pre-normalization, the default here).
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import named
from odjax.models.attention import Attention, AttentionFn, check_attention, segment_mask
from odjax.models.axes import constrain
from odjax.models.dense import matrix_dot
from odjax.models.embedding import attend_tokens, table_by_vocab
from odjax.models.feedforward import FeedForward, SwiGLU, activation_named
from odjax.models.norms import LayerNorm
from odjax.models.positions import sinusoidal_positions
from odjax.models.stack import check_remat, run_layers


class TransformerLayer(nn.Module):
    """One layer of either stack: self-attention, cross attention in the decoder, feed-forward.

    Attributes as `EncoderDecoder`'s.
    """

    heads: int
    mlp_width: int
    activation: str
    pre_norm: bool
    dropout: float
    norm_eps: float
    attention: str | AttentionFn | None
    causal: bool
    cross: bool
    cache_length: int | None
    train: bool
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Maps `x` [B, T, width] to the same shape; the decoder also reads `memory` [B, S, width]."""
        x = constrain(x, "batch", "length", "act_embed")
        x = self._residual(x, "attn", lambda h: self._attention("attn", x)(h, mask=mask, positions=positions))
        if self.cross:
            x = self._residual(x, "cross", lambda h: self._attention("cross", x)(h, memory, mask=memory_mask))
        x = self._residual(x, "mlp", self._feedforward())
        return constrain(x, "batch", "length", "act_embed")

    def _residual(self, x: jax.Array, name: str, inner: Callable[[jax.Array], jax.Array]) -> jax.Array:
        norm = LayerNorm(self.norm_eps, self.dtype, self.param_dtype, name=f"{name}_norm")
        dropout = nn.Dropout(self.dropout, deterministic=not self.train)
        return x + dropout(inner(norm(x))) if self.pre_norm else norm(x + dropout(inner(x)))

    def _attention(self, name: str, x: jax.Array) -> Attention:
        return Attention(
            self.heads,
            self.heads,
            x.shape[-1] // self.heads,
            use_bias=True,
            causal=self.causal and name == "attn",
            implementation=self.attention,
            cache_length=self.cache_length,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _feedforward(self) -> nn.Module:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.activation == "swiglu":
            return SwiGLU(self.mlp_width, use_bias=True, **dtypes, name="mlp")
        return FeedForward(self.mlp_width, self.activation, **dtypes, name="mlp")


class Stack(nn.Module):
    """The layers of the encoder or of the decoder, and the norm that ends a pre-normalized stack.

    Attributes:
        layers: depth.
        sizes: attributes of `TransformerLayer`, but for `train` and `cache_length`.
        scan: whether layers are scanned.
        remat: a key of `odjax.models.stack.REMAT_POLICIES`.
    """

    layers: int
    sizes: Mapping[str, Any]
    scan: bool
    remat: str

    @nn.compact
    def __call__(
        self, x: jax.Array, *shared: jax.Array | None, train: bool, cache_length: int | None = None
    ) -> jax.Array:
        """Maps `x` [B, T, width] to the same shape."""

        def make(name: str) -> TransformerLayer:
            return TransformerLayer(**self.sizes, train=train, cache_length=cache_length, name=name)

        x = run_layers(make, x, shared=shared, layers=self.layers, scan=self.scan, remat=self.remat)
        if not self.sizes["pre_norm"]:
            return x
        return LayerNorm(self.sizes["norm_eps"], self.sizes["dtype"], self.sizes["param_dtype"], name="norm")(
            x
        )


class EncoderDecoder(nn.Module):
    """Encoder-decoder Transformer.

    Parameters: `embed/embedding` [vocab, width] (`source_embed` too if the embeddings are not shared),
    `encoder/layers/...` and `decoder/layers/...` (`attn`, `cross`, `mlp` and their norms), `encoder/norm` and
    `decoder/norm` if pre-normalized, `positions` [max_length, width] if learned, `lm_head/kernel` if not
    shared.

    Attributes:
        vocab: target token types.
        layers: depth of each stack.
        width: of the residual stream.
        heads: attention heads.
        mlp_width: hidden width of the feed-forward layers.
        source_vocab: source token types; None: as many as `vocab`.
        max_length: longest source and longest target.
        activation: a key of `odjax.models.feedforward.ACTIVATIONS`, or "swiglu".
        pre_norm: normalize before each residual's inner layer (and once at the end), or after each addition.
        shared: one embedding table for source, target and the head (section 3.4); otherwise three matrices.
        learned_positions: learned or sinusoidal.
        dropout: of each residual and of the embeddings while training; key "dropout".
        norm_eps: of every LayerNorm.
        attention: implementation, see `odjax.models.attention.attend`.
        remat: a key of `odjax.models.stack.REMAT_POLICIES`.
        scan: whether layers are scanned.
        dtype: of the computation; logits are float32.
        param_dtype: of the parameters.

    Raises:
        ValueError: at construction, for sizes that do not fit together.

    Example:
        >>> model = encoder_decoder("tiny", vocab=50)
        >>> source, target = jnp.ones((2, 7), jnp.int32), jnp.ones((2, 5), jnp.int32)
        >>> model.init_with_output(jax.random.key(0), source, target)[0].shape
        (2, 5, 50)
    """

    vocab: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    source_vocab: int | None = None
    max_length: int = 1024
    activation: str = "relu"
    pre_norm: bool = True
    shared: bool = True
    learned_positions: bool = False
    dropout: float = 0.0
    norm_eps: float = 1e-6
    attention: str | AttentionFn | None = None
    remat: str = "none"
    scan: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.width % 2 and not self.learned_positions:
            raise ValueError(f"sinusoidal positions need an even width, got {self.width}")
        if self.shared and self.source_vocab not in (None, self.vocab):
            raise ValueError(
                f"a shared embedding needs one vocabulary, got {self.source_vocab} and {self.vocab}; "
                f"set shared=False"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.activation != "swiglu":
            activation_named(self.activation)
        check_attention(self.attention)
        check_remat(self.remat)

    def setup(self) -> None:
        """Makes the tables, the two stacks and the head."""
        init = nn.initializers.normal(self.width**-0.5)

        def table(vocab: int) -> nn.Embed:
            return nn.Embed(
                vocab,
                self.width,
                dtype=jnp.float32,
                param_dtype=self.param_dtype,
                embedding_init=named(init, "vocab", "embed"),
                promote_dtype=table_by_vocab,
            )

        self.embed = table(self.vocab)
        if not self.shared:
            self.source_embed = table(self.source_vocab or self.vocab)
            self.lm_head = nn.Dense(
                self.vocab,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                dot_general_cls=matrix_dot(jnp.float32),
                kernel_init=named(init, "embed", "vocab"),
            )
        if self.learned_positions:
            shape = (self.max_length, self.width)
            self.positions = self.param("positions", named(init, "position", "norm"), shape, self.param_dtype)
        sizes = {
            "heads": self.heads,
            "mlp_width": self.mlp_width,
            "activation": self.activation,
            "pre_norm": self.pre_norm,
            "dropout": self.dropout,
            "norm_eps": self.norm_eps,
            "attention": self.attention,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        self.encoder = Stack(self.layers, {**sizes, "causal": False, "cross": False}, self.scan, self.remat)
        self.decoder = Stack(self.layers, {**sizes, "causal": True, "cross": True}, self.scan, self.remat)
        self.embed_dropout = nn.Dropout(self.dropout)

    def __call__(
        self,
        source: jax.Array,
        tokens: jax.Array,
        source_mask: jax.Array | None = None,
        *,
        source_segments: jax.Array | None = None,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        source_positions: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Predicts the next target token at every position.

        Args:
            source: tokens to translate [B, S] int32.
            tokens: the translation so far, from its start symbol [B, T] int32.
            source_mask: True where the source is not padding [B, S] bool.
            source_segments: ids of packed sources [B, S] int32.
            segments: ids of packed targets [B, T] int32; they attend to the source with the same id.
            positions: of the target [B, T] int32; None: 0..T-1.
            source_positions: of the source [B, S] int32; None: 0..S-1.
            train: whether dropout is on.

        Returns:
            Logits [B, T, vocab] float32.

        Raises:
            ValueError: if a sequence is longer than `max_length`, or only one side has segments.
        """
        if (source_segments is None) != (segments is None):
            raise ValueError("segments are for both sides: give source_segments and segments, or neither")
        memory = self.encode(
            source,
            source_mask,
            source_segments=source_segments,
            source_positions=source_positions,
            train=train,
        )
        x = self.features(
            tokens,
            memory,
            source_mask,
            source_segments=source_segments,
            segments=segments,
            positions=positions,
            train=train,
        )
        return self.logits(x)

    def encode(
        self,
        source: jax.Array,
        source_mask: jax.Array | None = None,
        *,
        source_segments: jax.Array | None = None,
        source_positions: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Reads the source.

        Args:
            source: like `__call__`.
            source_mask: like `__call__`.
            source_segments: like `__call__`.
            source_positions: like `__call__`.
            train: like `__call__`.

        Returns:
            The encoder's output [B, S, width] in `dtype`.

        Raises:
            ValueError: if the source is longer than `max_length`.
        """
        x = self._embed(self.embed if self.shared else self.source_embed, source, source_positions, train)
        return self.encoder(x, _mask(source_mask, source_segments, source_segments), train=train)

    def features(
        self,
        tokens: jax.Array,
        memory: jax.Array,
        source_mask: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        source_segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        train: bool = False,
        cache_length: int | None = None,
    ) -> jax.Array:
        """What the head sees: the decoder's output.

        Args:
            tokens: like `__call__`.
            memory: from `encode`.
            source_mask: like `__call__`.
            segments: like `__call__`.
            source_segments: like `__call__`.
            positions: like `__call__`.
            train: like `__call__`.
            cache_length: slots of the cache that generation keeps in the "cache" collection.

        Returns:
            [B, T, width] in `dtype`.

        Raises:
            ValueError: if the target or the cache is longer than `max_length`.
        """
        if (cache_length or 0) > self.max_length:
            raise ValueError(f"a target of {cache_length} tokens is longer than max_length {self.max_length}")
        x = self._embed(self.embed, tokens, positions, train)
        mask = None if segments is None else segment_mask(segments, segments)
        if cache_length is not None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] if positions is None else positions
            positions = jnp.broadcast_to(positions, tokens.shape)
            mask = (jnp.arange(cache_length)[None, None] <= positions[:, :, None])[:, None]
        memory_mask = _mask(source_mask, segments, source_segments)
        return self.decoder(x, mask, memory, memory_mask, positions, train=train, cache_length=cache_length)

    def logits(self, features: jax.Array) -> jax.Array:
        """The head alone, for losses that take the sequence in pieces.

        Args:
            features: [B, T, width].

        Returns:
            Logits [B, T, vocab] float32.
        """
        y = attend_tokens(self.embed, features) if self.shared else self.lm_head(features)
        return constrain(y.astype(jnp.float32), "batch", "length", "act_vocab")

    def _embed(
        self, table: nn.Embed, tokens: jax.Array, positions: jax.Array | None, train: bool
    ) -> jax.Array:
        """Token vectors times sqrt(width), plus positions (sections 3.4 and 3.5)."""
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"a sequence of {length} tokens is longer than max_length {self.max_length}")
        if self.learned_positions:
            rows = self.positions.astype(jnp.float32)
        else:
            rows = sinusoidal_positions(self.max_length, self.width)
        rows = rows[None, :length] if positions is None else rows[positions]
        x = (table(tokens) * self.width**0.5 + rows).astype(self.dtype)
        x = constrain(x, "batch", "length", "act_embed")
        return self.embed_dropout(x, deterministic=not train)


def _mask(
    source_mask: jax.Array | None, segments: jax.Array | None, source_segments: jax.Array | None
) -> jax.Array | None:
    """What queries with `segments` may see of the source, bool [B, 1, 1 or T, S]."""
    mask = None if source_mask is None else source_mask[:, None, None, :]
    if segments is None:
        return mask
    same = segment_mask(segments, source_segments)
    return same if mask is None else same & mask


PRESETS: dict[str, dict[str, Any]] = {
    # For tests and a CPU.
    "tiny": {"layers": 2, "width": 64, "heads": 4, "mlp_width": 128, "max_length": 256},
    # Translation of Multi30k on two cores, and as in Zhang et al. 2025 (arXiv 2501.19107, appendix).
    "multi30k-small": {"layers": 2, "width": 128, "heads": 4, "mlp_width": 256, "dropout": 0.1},
    "multi30k": {"layers": 6, "width": 512, "heads": 8, "mlp_width": 1024, "dropout": 0.1},
    # Vaswani et al. 2017, table 3; give the vocabulary.
    "base": {"layers": 6, "width": 512, "heads": 8, "mlp_width": 2048, "dropout": 0.1},
    "big": {"layers": 6, "width": 1024, "heads": 16, "mlp_width": 4096, "dropout": 0.3},
}


def encoder_decoder(preset: str, *, vocab: int, **overrides: Any) -> EncoderDecoder:
    """An encoder-decoder of a named size.

    Args:
        preset: a key of `PRESETS`.
        vocab: target token types (source too unless `source_vocab` is given).
        **overrides: attributes of `EncoderDecoder` that replace the preset's.

    Returns:
        The model.

    Raises:
        ValueError: if the preset is unknown, naming those there are.

    Example:
        >>> encoder_decoder("base", vocab=37000, dtype=jnp.bfloat16).layers
        6
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown encoder-decoder preset {preset!r}; there are {', '.join(PRESETS)}")
    return EncoderDecoder(**{**PRESETS[preset], "vocab": vocab, **overrides})
