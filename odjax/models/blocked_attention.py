"""Causal attention in plain JAX that leaves out most of the masked half."""

import jax
import jax.numpy as jnp

from odjax.core import statistics_dtype

MASKED = -1e30  # finite, so that a row without anything to see stays finite


def blocked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    blocks: int = 4,
) -> jax.Array:
    """`softmax(query key^T / sqrt(head_dim)) value`, a block of queries at a time.

    A causal block of queries meets only the keys up to its end, so that `(blocks + 1) / (2 blocks)` of the
    products remain. The softmax is normalized after the product with the values. Scores and softmax are
    float32.

    Args:
        query: [B, T, heads, head_dim].
        key: [B, S, kv_heads, head_dim].
        value: like `key`.
        mask: bool, broadcastable to [B, heads, T, S], its head axis 1; True where attention may look.
        is_causal: whether token t sees only tokens 0..t.
        blocks: number of blocks; 1 if it does not divide T or if attention is not causal.

    Returns:
        [B, T, heads, head_dim] in the dtype of `query`.

    Raises:
        ValueError: if the mask differs between heads.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax" (late normalization).

    Example:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> blocked_attention(x, x, x, is_causal=True).shape
        (1, 8, 2, 4)
    """
    if mask is not None and mask.shape[1] != 1:
        raise ValueError(f"blocked attention takes one mask for all heads, got shape {mask.shape}")
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    query = jnp.reshape(query, (batch, length, kv_heads, heads // kv_heads, width))
    if not is_causal or length != key.shape[1] or length % blocks:
        blocks = 1
    size = length // blocks
    out = []
    for i in range(blocks):
        rows = slice(i * size, (i + 1) * size)
        seen = slice(0, (i + 1) * size if is_causal else None)
        allowed = None
        if mask is not None:
            allowed = mask[:, 0, rows if mask.shape[2] > 1 else slice(None), seen]
        if is_causal:
            before = jnp.arange(rows.start, rows.stop)[:, None] >= jnp.arange(key[:, seen].shape[1])[None]
            allowed = before[None] if allowed is None else allowed & before[None]
        out.append(_attend(query[:, rows], key[:, seen], value[:, seen], allowed))
    y = out[0] if blocks == 1 else jnp.concatenate(out, axis=1)
    return jnp.reshape(y, (batch, length, heads, width))


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """[B, t, K, G, D] with [B, s, K, D], where `allowed` [B or 1, t or 1, s] lets it."""
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    accumulate = statistics_dtype(query)
    scores = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=accumulate)
    if allowed is not None:
        penalty = jnp.where(allowed, 0.0, MASKED).astype(accumulate)[:, None, None]
        scores = scores + penalty
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = jnp.moveaxis(jnp.sum(weights, axis=-1), -1, 1)[..., None]
    y = jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value, preferred_element_type=accumulate)
    return (y / total).astype(query.dtype)
