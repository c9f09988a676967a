"""Attention by JAX's splash kernels for TPU: no scores in memory, packed documents by their ids."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from odjax.models.blocked_attention import blocked_attention

LANES = 128
LONG = 1024  # lengths above are padded to multiples of WIDE, so that blocks stay large
WIDE = 512
NOWHERE = -(2**31)  # the document of padding
RESIDUALS = "splash_attention"  # output and log-sum-exp, for a policy of `jax.checkpoint` to save
Block = tuple[int, int, int]


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    segments: tuple[jax.Array, jax.Array] | None = None,
    block: Block = (1024, 1024, 512),
    backward: Block | None = None,
    fused: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """`softmax(query key^T / sqrt(head_dim)) value` in Pallas kernels, forward and backward.

    Blocks behind the diagonal are skipped, scores never reach the memory, key heads are not repeated. It is
    the TPU kernel whatever device JAX runs on, so that a program can be compiled for a TPU elsewhere.

    The kernel is for whole sequences. `blocked_attention` is taken in its place, with the same result, where

    - a mask differs between queries or heads: generation with a cache has such a mask;
    - there are fewer than 128 queries or keys.

    Lengths are padded to a multiple of 128, above 1024 of 512; what is added belongs to a document of its
    own. A block is the largest multiple of 128 up to `block` that divides the padded length.

    XLA does not divide a kernel over devices. Where a mesh is in force (`jax.set_mesh`) and rules are
    (`flax.linen.logical_axis_rules`), every device runs the kernel on its "batch" and "act_heads"; what does
    not divide by its mesh axes stays whole. With fewer key heads than parts, each is repeated just as often
    as that takes.

    A query that may see nothing gets some average of values, and no useful gradient.

    Args:
        query: [B, T, heads, head_dim].
        key: [B, S, kv_heads, head_dim]; every `heads / kv_heads` consecutive queries share a key head.
        value: like `key`.
        mask: bool, broadcastable to [B, heads, T, S], of rank 4; True where attention may look.
        is_causal: whether token t sees only tokens 0..t.
        segments: ids of packed documents, of the queries [B, T] and of the keys [B, S], int32; a query sees
            its own document only.
        block: queries and keys of a step of the forward kernel, and keys that are multiplied at once.
        backward: the same for the backward kernels; None: like `block`.
        fused: whether one kernel computes all three gradients. It adds up the queries' from one array for
            each block of keys, in the dtype of `query`.
        interpret: whether the kernel is interpreted, on any device and slowly: for tests.

    Returns:
        [B, T, heads, head_dim] in the dtype of `query`.

    Raises:
        ValueError: for blocks that are no multiples of 128, for segments of another shape, or if the rules
            divide sequences.

    Source: Dao et al. 2022, "FlashAttention", algorithms 1 and 2; the kernels are those of
    `jax.experimental.pallas.ops.tpu.splash_attention`.

    Example:
        >>> x = jnp.ones((1, 128, 2, 8))
        >>> splash_attention(x, x, x, is_causal=True, interpret=True).shape
        (1, 128, 2, 8)
    """
    backward = backward or block
    _check_block("block", block)
    _check_block("backward", backward)
    if segments is not None:
        _check_segments(query, key, segments)
    if min(query.shape[1], key.shape[1]) < LANES or (mask is not None and mask.shape[1:3] != (1, 1)):
        return _plain(query, key, value, mask, is_causal, segments)

    run = functools.partial(
        _kernel, is_causal=is_causal, block=block, backward=backward, fused=fused, interpret=interpret
    )
    # The kernels mix dtypes and ranks, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return _on_mesh(run, query, key, value, _ids(query, key, mask, segments))


def _check_block(name: str, block: Block) -> None:
    if len(block) != 3 or any(size < LANES or size % LANES for size in block) or block[1] % block[2]:
        raise ValueError(
            f"{name} must be (queries, keys, keys at once), multiples of {LANES} of which the third divides "
            f"the second, such as (1024, 1024, 512), got {block}"
        )


def _check_segments(query: jax.Array, key: jax.Array, segments: tuple[jax.Array, jax.Array]) -> None:
    shapes = tuple(ids.shape for ids in segments)
    if shapes != (query.shape[:2], key.shape[:2]):
        raise ValueError(
            f"segments must be ids of the queries {query.shape[:2]} and of the keys {key.shape[:2]}, "
            f"got shapes {', '.join(map(str, shapes))}"
        )


def _plain(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    is_causal: bool,
    segments: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    if segments is not None:
        same = (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return blocked_attention(query, key, value, mask=mask, is_causal=is_causal)


def _ids(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, ...]:
    """Documents of queries and keys; a mask of keys [B or 1, 1, 1, S or 1] puts those out of all of them."""
    if segments is None and mask is None:
        return ()
    if segments is None:
        segments = jnp.zeros(query.shape[:2], jnp.int32), jnp.zeros(key.shape[:2], jnp.int32)
    queries, keys = (ids.astype(jnp.int32) for ids in segments)
    if mask is not None:
        keys = jnp.where(jnp.broadcast_to(mask[:, 0, 0], keys.shape), keys, NOWHERE)
    return queries, keys


def _on_mesh(
    run: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: tuple[jax.Array, ...],
) -> jax.Array:
    """Runs it on every device's part of the batch and of the heads, by the rules in force."""
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of a surrounding `shard_map` are divided already.
    free = {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }
    if not nn.get_logical_axis_rules() or math.prod(free.values()) == 1:
        return run(query, key, value, *ids)

    def parts(axes: Sequence[str]) -> int:
        return math.prod(free[name] for name in axes)

    batch, length, heads = (
        tuple(name for name in ((axis,) if isinstance(axis, str) else axis or ()) if free.get(name, 1) > 1)
        for axis in nn.logical_to_mesh_axes(("batch", "length", "act_heads"))
    )
    if length:
        raise ValueError(
            f"splash attention needs whole sequences, the rules divide 'length' over {', '.join(length)}: "
            f"map it to None, or type attention='xla'"
        )
    batch = batch if query.shape[0] % parts(batch) == 0 else ()
    heads = heads if query.shape[2] % parts(heads) == 0 else ()
    repeats = parts(heads) // math.gcd(parts(heads), key.shape[2])
    if repeats > 1:
        key, value = jnp.repeat(key, repeats, axis=2), jnp.repeat(value, repeats, axis=2)
    whole = P(batch, None, heads, None)
    return jax.shard_map(
        run,
        in_specs=(whole, whole, whole, *(P(batch, None) for _ in ids)),
        out_specs=whole,
        axis_names=set(free),
        check_vma=False,
    )(query, key, value, *ids)


def _kernel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *ids: jax.Array,
    is_causal: bool,
    block: Block,
    backward: Block,
    fused: bool,
    interpret: bool,
) -> jax.Array:
    """On one device, whole sequences: [B, T, heads, head_dim] with [B, S, kv_heads, head_dim]."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, keys = query.shape[1], key.shape[1]
    long, wide = _padded(length), _padded(keys)
    # Behind the diagonal no query of the sequence looks at what is added.
    if not ids and wide > keys and not (is_causal and length <= keys):
        ids = jnp.zeros(query.shape[:2], jnp.int32), jnp.zeros(key.shape[:2], jnp.int32)
    if ids:
        ids = _lengthened(ids[0], long, NOWHERE), _lengthened(ids[1], wide, NOWHERE)

    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    query, key, value = (
        jnp.swapaxes(_lengthened(x, size, 0), 1, 2) for x, size in ((query, long), (key, wide), (value, wide))
    )
    forward, back = _fitted(block, long, wide), _fitted(backward, long, wide)
    sizes = splash.BlockSizes(
        *forward,
        *back,
        block_q_dq=None if fused else back[0],
        block_kv_dq=None if fused else back[1],
        use_fused_bwd_kernel=fused,
    )
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([_mask(is_causal, long, wide)] * query.shape[1]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    y = jax.vmap(attend)(query, key, value, splash.SegmentIds(*ids) if ids else None)
    return jnp.swapaxes(y, 1, 2)[:, :length]


@functools.lru_cache(maxsize=32)
def _mask(is_causal: bool, length: int, keys: int) -> Any:
    """The same object for the same lengths: JAX traces the kernel anew for another one."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.CausalMask((length, keys)) if is_causal else splash.FullMask((length, keys))


def _padded(length: int) -> int:
    step = WIDE if length > LONG else LANES
    return -(-length // step) * step


def _lengthened(x: jax.Array, length: int, fill: int) -> jax.Array:
    if x.shape[1] == length:
        return x
    widths = [(0, length - x.shape[1] if i == 1 else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def _fitted(block: Block, length: int, keys: int) -> Block:
    """The largest multiples of 128 up to the sizes asked for that divide; of the third the nearest."""

    def divisors(whole: int) -> list[int]:
        return [n for n in range(LANES, whole + 1, LANES) if whole % n == 0]

    wide = max(n for n in divisors(keys) if n <= block[1])
    at_once = min(divisors(wide), key=lambda n: (abs(n - block[2]), -n))
    return max(n for n in divisors(length) if n <= block[0]), wide, at_once
