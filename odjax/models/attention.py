"""Multi-head attention with grouped keys, rotary positions, masks and a cache."""

import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from odjax.core import named
from odjax.models.axes import constrain
from odjax.models.blocked_attention import blocked_attention
from odjax.models.dense import PROJECTION, matrix_dot
from odjax.models.norms import RMSNorm
from odjax.models.rotary import rotate
from odjax.models.splash_attention import splash_attention

AttentionFn = Callable[..., jax.Array]
Segments = tuple[jax.Array, jax.Array]
IMPLEMENTATIONS = (None, "xla", "cudnn", "blocked", "splash")

linear_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def check_attention(implementation: str | AttentionFn | None) -> None:
    """Raises if `implementation` is neither callable nor one of `IMPLEMENTATIONS`.

    Args:
        implementation: what is to be used.

    Raises:
        ValueError: naming the value and the choices.
    """
    if not callable(implementation) and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {IMPLEMENTATIONS} or a function, got {implementation!r}")


def takes_segments(implementation: str | AttentionFn | None) -> bool:
    """Whether an implementation takes the ids of packed documents in place of their mask.

    Args:
        implementation: see `attend`; of a function, whether it has an argument `segments`.

    Returns:
        True if `attend` hands them on as they are.

    Example:
        >>> takes_segments("splash"), takes_segments("xla")
        (True, False)
    """
    if callable(implementation):
        return "segments" in inspect.signature(implementation).parameters
    return implementation == "splash"


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
    implementation: str | AttentionFn | None = None,
    segments: Segments | None = None,
) -> jax.Array:
    """`softmax(query key^T / sqrt(head_dim)) value`, with the softmax in float32.

    Args:
        query: [B, T, heads, head_dim].
        key: [B, S, kv_heads, head_dim]; every `heads / kv_heads` consecutive queries share a key head.
        value: like `key`.
        mask: bool, broadcastable to [B, heads, T, S]; True where attention may look.
        causal: whether token t sees only tokens 0..t.
        implementation: None (JAX chooses), "xla", "cudnn", "blocked" (plain JAX, see `blocked_attention`),
            "splash" (Pallas kernels for TPU, see `splash_attention`), or a function
            `(query, key, value, *, mask, is_causal) -> [B, T, heads, head_dim]`. One with an argument
            `segments` too gets the ids, every other one the mask that they make.
        segments: ids of packed documents, of the queries [B, T] and of the keys [B, S], int32; a query sees
            its own document only.

    Returns:
        [B, T, heads, head_dim].

    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023, "GQA".

    Example:
        >>> ones = jnp.ones((1, 3, 2, 4))
        >>> attend(ones, ones, ones, causal=True).shape
        (1, 3, 2, 4)
    """
    if implementation == "blocked":
        implementation = blocked_attention
    elif implementation == "splash":
        implementation = splash_attention
    if segments is not None and takes_segments(implementation):
        return implementation(query, key, value, mask=mask, is_causal=causal, segments=segments)
    if segments is not None:
        same = segment_mask(*segments)
        mask = same if mask is None else mask & same
    if callable(implementation):
        return implementation(query, key, value, mask=mask, is_causal=causal)
    # JAX's own function mixes bf16 and float32, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=causal, implementation=implementation
        )


def segment_mask(query: jax.Array, key: jax.Array) -> jax.Array:
    """True where a query and a key belong to the same packed document.

    Args:
        query: segment ids [B, T] int32.
        key: segment ids [B, S] int32.

    Returns:
        Bool [B, 1, T, S].

    Example:
        >>> segment_mask(jnp.array([[1, 2]]), jnp.array([[1, 2]]))[0, 0].tolist()
        [[True, False], [False, True]]
    """
    return (query[:, :, None] == key[:, None, :])[:, None]


class Attention(nn.Module):
    """Multi-head attention, of a sequence to itself or to another one.

    Parameters: `q/kernel` [width, heads, head_dim], `k/kernel` and `v/kernel`
    [source width, kv_heads, head_dim], `o/kernel` [heads, head_dim, width], biases `[heads, head_dim]` and
    `[width]` if asked for, `q_norm/scale` and `k_norm/scale` [head_dim] if asked for.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: width of a head.
        use_bias: whether the four projections have biases.
        qk_norm: whether queries and keys are RMS-normalized per head before the rotation.
        norm_eps: of that normalization.
        causal: whether token t sees only tokens 0..t.
        implementation: see `attend`.
        cache_length: number of slots to keep keys and values in; None when nothing is generated.
        dtype: of the computation.
        param_dtype: of the parameters.

    Example:
        >>> layer = Attention(heads=4, kv_heads=2, head_dim=8)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 16)))
        >>> y.shape, variables["params"]["k"]["kernel"].value.shape
        ((1, 3, 16), (16, 2, 8))
    """

    heads: int
    kv_heads: int
    head_dim: int
    use_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    causal: bool = False
    implementation: str | AttentionFn | None = None
    cache_length: int | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        check_attention(self.implementation)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        source: jax.Array | None = None,
        mask: jax.Array | None = None,
        angles: tuple[jax.Array, jax.Array] | None = None,
        positions: jax.Array | None = None,
        segments: Segments | None = None,
    ) -> jax.Array:
        """Attends from `x` to itself, or to `source`.

        Args:
            x: [B, T, width].
            source: [B, S, source width], for cross attention.
            mask: bool, broadcastable to [B, heads, T, S] (to [B, heads, T, cache_length] with a cache).
            angles: of the rotary positions, for queries and keys.
            positions: [B, T] int32, consecutive in each row: the cache's slots to write. With a cache only.
            segments: see `attend`.

        Returns:
            [B, T, width].
        """
        query = self._project("q", self.heads, "heads")(x)
        if self.qk_norm:
            query = RMSNorm(self.norm_eps, self.dtype, self.param_dtype, name="q_norm")(query)
        if angles is not None:
            query = rotate(query, angles)
        query = constrain(query, "batch", "length", "act_heads", None)
        query = checkpoint_name(query, PROJECTION)

        if source is not None and self.has_variable("cache", "key"):
            key, value = self.get_variable("cache", "key"), self.get_variable("cache", "value")
        else:
            inputs = x if source is None else source
            key = self._project("k", self.kv_heads, "kv_heads")(inputs)
            value = self._project("v", self.kv_heads, "kv_heads")(inputs)
            if self.qk_norm:
                key = RMSNorm(self.norm_eps, self.dtype, self.param_dtype, name="k_norm")(key)
            if angles is not None:
                key = rotate(key, angles)
            key = constrain(key, "batch", "length", "act_kv_heads", None)
            value = constrain(value, "batch", "length", "act_kv_heads", None)
            key, value = checkpoint_name(key, PROJECTION), checkpoint_name(value, PROJECTION)
            if self.cache_length is not None:
                # The keys of a source never change: the first call keeps them whole.
                key, value = (
                    self._keep("key", key, positions if source is None else None),
                    self._keep("value", value, positions if source is None else None),
                )

        causal = self.causal and self.cache_length is None
        y = attend(
            query, key, value, mask, causal=causal, implementation=self.implementation, segments=segments
        )
        y = constrain(y, "batch", "length", "act_heads", None)
        y = nn.DenseGeneral(
            x.shape[-1],
            axis=(-2, -1),
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general_cls=matrix_dot(),
            kernel_init=named(linear_init, "heads", "head_dim", "embed"),
            bias_init=named(nn.initializers.zeros, "norm"),
            name="o",
        )(y)
        return checkpoint_name(y, PROJECTION)

    def _project(self, name: str, heads: int, axis: str) -> nn.DenseGeneral:
        return nn.DenseGeneral(
            (heads, self.head_dim),
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general_cls=matrix_dot(),
            kernel_init=named(linear_init, "embed", axis, "head_dim"),
            bias_init=named(nn.initializers.zeros, axis, "head_dim"),
            name=name,
        )

    def _keep(self, name: str, new: jax.Array, positions: jax.Array | None) -> jax.Array:
        """Writes `new` into the cache at `positions`, or as a whole, and returns the cache."""
        if positions is None:
            self.put_variable("cache", name, new)
            return new
        shape = (new.shape[0], self.cache_length, *new.shape[2:])
        cache = self.variable("cache", name, jnp.zeros, shape, new.dtype)
        write = jax.vmap(lambda old, rows, at: jax.lax.dynamic_update_slice(old, rows, (at, 0, 0)))
        kept = write(cache.value, new, positions[:, 0])
        cache.value = constrain(kept, "batch", "length", "act_kv_heads", None)
        return cache.value
