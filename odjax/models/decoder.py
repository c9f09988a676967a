"""Decoder-only Transformer of the Llama family.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, pre-normalization, no biases. The parameters are
laid out so that Llama checkpoints load by transposing and reshaping alone (half-split rotary positions, heads
as an axis).

Source: Touvron et al. 2023, "LLaMA", section 2.2; Grattafiori et al. 2024, "The Llama 3 Herd of Models",
table 3.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import named
from odjax.models.attention import (
    Attention,
    AttentionFn,
    Segments,
    check_attention,
    segment_mask,
    takes_segments,
)
from odjax.models.axes import constrain
from odjax.models.dense import matrix_dot
from odjax.models.embedding import attend_tokens, embedding_init, table_by_vocab
from odjax.models.feedforward import SwiGLU
from odjax.models.norms import RMSNorm
from odjax.models.rotary import RotaryScaling, rotary_angles, rotary_frequencies
from odjax.models.stack import check_remat, run_layers


class DecoderLayer(nn.Module):
    """One pre-normalized layer: attention, then SwiGLU, each added to its input. See `Decoder`."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    qk_norm: bool
    attention: str | AttentionFn | None
    cache_length: int | None
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        segments: Segments | None,
        angles: tuple[jax.Array, jax.Array],
        positions: jax.Array,
    ) -> jax.Array:
        """Maps `x` [B, T, width] to the same shape."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = constrain(x, "batch", "length", "act_embed")
        h = RMSNorm(self.norm_eps, **dtypes, name="attn_norm")(x)
        x = x + Attention(
            self.heads,
            self.kv_heads,
            self.head_dim,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
            causal=True,
            implementation=self.attention,
            cache_length=self.cache_length,
            **dtypes,
            name="attn",
        )(h, mask=mask, angles=angles, positions=positions, segments=segments)
        h = RMSNorm(self.norm_eps, **dtypes, name="mlp_norm")(x)
        x = x + SwiGLU(self.mlp_width, **dtypes, name="mlp")(h)
        return constrain(x, "batch", "length", "act_embed")


class Decoder(nn.Module):
    """Decoder-only Transformer language model.

    Parameters: `embed/embedding` [vocab, width]; `layers/...` with a first axis of `layers`
    (`attn_norm/scale`, `attn/(q|k|v|o)/kernel`, `mlp_norm/scale`, `mlp/(gate|up|down)/kernel`); `norm/scale`;
    `lm_head/kernel` [width, vocab] if not tied.

    Attributes:
        vocab: token types.
        layers: depth.
        width: of the residual stream.
        heads: query heads.
        kv_heads: key and value heads; None: as many as `heads`.
        head_dim: None: `width / heads`.
        mlp_width: hidden width of SwiGLU.
        max_length: longest sequence.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched for longer texts, or None.
        norm_eps: of every RMSNorm.
        qk_norm: whether queries and keys are normalized per head.
        tied: whether the head is the transposed embedding.
        head: a module or function [B, T, width] -> [B, T, vocab] in place of the learned head
            (`odjax.heads.FixedHead`); not with `tied`.
        attention: implementation, see `odjax.models.attention.attend`.
        remat: a key of `odjax.models.stack.REMAT_POLICIES`.
        scan: whether layers are scanned.
        dtype: of the computation; logits are float32.
        param_dtype: of the parameters.

    Raises:
        ValueError: at construction, for sizes that do not fit together.

    Example:
        >>> model = decoder("tiny")
        >>> logits, _ = model.init_with_output(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        >>> logits.shape
        (1, 8, 256)
    """

    vocab: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    kv_heads: int | None = None
    head_dim: int | None = None
    max_length: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RotaryScaling | None = None
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tied: bool = False
    head: Any = None
    attention: str | AttentionFn | None = None
    remat: str = "none"
    scan: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab", "layers", "width", "heads", "mlp_width", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: give head_dim too")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.tied and self.head is not None:
            raise ValueError("a tied embedding is the head: give either tied=True or head=, not both")
        rotary_frequencies(head_dim(self))
        check_attention(self.attention)
        check_remat(self.remat)

    def setup(self) -> None:
        """Makes what is used before and after the stack."""
        # The lookup and the tied head are float32: rounding a row once, and logits not at all.
        self.embed = nn.Embed(
            self.vocab,
            self.width,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            embedding_init=named(embedding_init, "vocab", "embed"),
            promote_dtype=table_by_vocab,
        )
        self.norm = RMSNorm(self.norm_eps, self.dtype, self.param_dtype)
        if not self.tied and self.head is None:
            self.lm_head = nn.Dense(
                self.vocab,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                dot_general_cls=matrix_dot(jnp.float32),
                kernel_init=named(embedding_init, "embed", "vocab"),
            )

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        cache_length: int | None = None,
    ) -> jax.Array:
        """Predicts the next token at every position.

        Args:
            tokens: [B, T] int32.
            segments: ids of packed documents [B, T] int32; a token sees its own document only.
            positions: [B, T] int32, restarting in every document; None: 0..T-1.
            cache_length: slots of the cache that generation keeps in the "cache" collection.

        Returns:
            Logits [B, T, vocab] float32.

        Raises:
            ValueError: if the sequence is longer than `max_length`.
        """
        return self.logits(self.features(tokens, segments, positions, cache_length=cache_length))

    @nn.compact
    def features(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        cache_length: int | None = None,
    ) -> jax.Array:
        """What the head sees: the last layer's output, normalized.

        Args:
            tokens: like `__call__`.
            segments: like `__call__`.
            positions: like `__call__`.
            cache_length: like `__call__`.

        Returns:
            [B, T, width] in `dtype`.

        Raises:
            ValueError: if the sequence or the cache is longer than `max_length`, or if both segments and a
                cache are given.
        """
        length = tokens.shape[1]
        longest = max(length, cache_length or 0)
        if longest > self.max_length:
            raise ValueError(f"a sequence of {longest} tokens is longer than max_length {self.max_length}")
        if segments is not None and cache_length is not None:
            raise ValueError("segments and cache_length exclude each other: generate one document a row")
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        mask, packed = None, None
        if segments is not None and takes_segments(self.attention):
            packed = (segments, segments)
        elif segments is not None:
            mask = segment_mask(segments, segments)
        if cache_length is not None:
            positions = jnp.broadcast_to(positions, tokens.shape)
            # Slots are positions: a query sees those up to its own.
            mask = (jnp.arange(cache_length)[None, None] <= positions[:, :, None])[:, None]
        angles = rotary_angles(
            positions, rotary_frequencies(head_dim(self), self.rope_theta, self.rope_scaling)
        )

        def layer(name: str) -> DecoderLayer:
            return DecoderLayer(
                self.heads,
                self.kv_heads or self.heads,
                head_dim(self),
                self.mlp_width,
                self.norm_eps,
                self.qk_norm,
                self.attention,
                cache_length,
                self.dtype,
                self.param_dtype,
                name=name,
            )

        x = self.embed(tokens).astype(self.dtype)
        x = constrain(x, "batch", "length", "act_embed")
        x = run_layers(
            layer,
            x,
            shared=(mask, packed, angles, positions),
            layers=self.layers,
            scan=self.scan,
            remat=self.remat,
        )
        return self.norm(x)

    def logits(self, features: jax.Array) -> jax.Array:
        """The head alone, for losses that take the sequence in pieces.

        Args:
            features: [B, T, width].

        Returns:
            Logits [B, T, vocab] float32.
        """
        if self.head is not None:
            y = self.head(features)
        elif self.tied:
            y = attend_tokens(self.embed, features)
        else:
            y = self.lm_head(features)
        return constrain(y.astype(jnp.float32), "batch", "length", "act_vocab")

    def losses(
        self,
        inputs: Sequence[jax.Array | None],
        targets: jax.Array,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """The head's own losses, for a `head` that needs no logits for them.

        Args:
            inputs: tokens, segments and positions, like `__call__`.
            targets: [B, T] int32.
            weights: [B, T], 0 for padding.
            train: whether it is training.

        Returns:
            Loss of every token [B, T] float32, not weighted, and whether its target has the largest logit.

        Raises:
            ValueError: if the head has no losses of its own.
        """
        if not hasattr(self.head, "losses"):
            raise ValueError(f"a head without losses of its own ({self.head}): use the logits")
        return self.head.losses(self.features(*inputs), targets, weights, train=train)


def head_dim(model: Decoder) -> int:
    """Width of a head.

    Args:
        model: the decoder.

    Returns:
        `head_dim` if given, else `width / heads`.

    Example:
        >>> head_dim(decoder("7b"))
        128
    """
    return model.head_dim or model.width // model.heads


LLAMA_31_SCALING = RotaryScaling(factor=8.0)
LLAMA_32_SCALING = RotaryScaling(factor=32.0)


def _sizes(
    vocab: int,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    mlp_width: int,
    max_length: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "vocab": vocab,
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads,
        "mlp_width": mlp_width,
        "max_length": max_length,
        **more,
    }


# vocab, layers, width, heads, kv_heads, mlp_width, max_length
PRESETS: dict[str, dict[str, Any]] = {
    # Byte-level: for tests, and for a CPU to train in minutes.
    "tiny": _sizes(256, 2, 96, 4, 2, 256, 256, tied=True),
    "byte-small": _sizes(256, 4, 192, 6, 6, 512, 1024, tied=True),
    # The sizes that work on memory-efficient pretraining reports (Zhao et al. 2024, "GaLore", table 2).
    "60m": _sizes(32000, 8, 512, 8, 8, 1376, 1024, norm_eps=1e-6),
    "130m": _sizes(32000, 12, 768, 12, 12, 2048, 1024, norm_eps=1e-6),
    "350m": _sizes(32000, 24, 1024, 16, 16, 2736, 1024, norm_eps=1e-6),
    # Llama 3.2 1B.
    "1b": _sizes(
        128256, 16, 2048, 32, 8, 8192, 131072, rope_theta=5e5, rope_scaling=LLAMA_32_SCALING, tied=True
    ),
    # Llama 2 7B, Llama 3 8B, Llama 3 70B.
    "7b": _sizes(32000, 32, 4096, 32, 32, 11008, 4096),
    "8b": _sizes(128256, 32, 4096, 32, 8, 14336, 8192, rope_theta=5e5),
    "70b": _sizes(128256, 80, 8192, 64, 8, 28672, 8192, rope_theta=5e5),
}


def decoder(preset: str, **overrides: Any) -> Decoder:
    """A decoder of a named size.

    Args:
        preset: a key of `PRESETS`.
        **overrides: attributes of `Decoder` that replace the preset's.

    Returns:
        The model.

    Raises:
        ValueError: if the preset is unknown, naming those there are.

    Example:
        >>> decoder("7b", dtype=jnp.bfloat16).layers
        32
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown decoder preset {preset!r}; there are {', '.join(PRESETS)}")
    return Decoder(**{**PRESETS[preset], **overrides})


def parameter_count(model: Decoder) -> int:
    """Number of parameters, in closed form; those of a given `head` are not counted.

    Args:
        model: the decoder.

    Returns:
        The number.

    Example:
        >>> parameter_count(decoder("7b"))
        6738415616
    """
    norms = 2 * model.width + (2 * head_dim(model) if model.qk_norm else 0)
    outside = model.vocab * model.width + model.width
    if not model.tied and model.head is None:
        outside += model.width * model.vocab
    return model.layers * (_layer_matrices(model) + norms) + outside


def flops_per_token(model: Decoder, length: int, *, training: bool = True) -> int:
    """Floating-point operations of the matrix products, per token of a sequence.

    Attention is counted in full, without the causal half: what is computed where the mask is applied
    afterwards. Norms, rotations, softmax and rematerialization are not counted; the embedding is a lookup.

    Args:
        model: the decoder.
        length: tokens in a sequence.
        training: forward and backward pass (three times the forward pass), or the forward pass alone.

    Returns:
        The number for one token.

    Source: Chowdhery et al. 2022, "PaLM", appendix B.

    Example:
        >>> round(flops_per_token(decoder("7b"), 4096) / 1e9, 1)
        46.1
    """
    attention = 2 * model.heads * head_dim(model) * length
    forward = 2 * (model.layers * (_layer_matrices(model) + attention) + model.width * model.vocab)
    return 3 * forward if training else forward


def _layer_matrices(model: Decoder) -> int:
    heads = 2 * model.heads + 2 * (model.kv_heads or model.heads)
    return model.width * (heads * head_dim(model) + 3 * model.mlp_width)
