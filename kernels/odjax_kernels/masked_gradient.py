"""Weight gradients with a bit-packed mask in the epilogue of their matrix product, one bit a weight.

dW = where(mask, x^T dy, 0). The layout of the words is that of `odjax_kernels.packing`: unpacking 256 rows
shifts one tile of (8, lanes) 32 times and moves nothing.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from odjax_kernels.packing import BITS, GROUP, WORDS, pack_rows, unpack_words, words_shape

_LANES = 128

Implementation = Literal["xla", "pallas"]


def _in_groups(words: jax.Array, rows: int) -> jax.Array:
    """The words of a mask of few rows as those of one whole group."""
    if words.shape[0] % WORDS == 0:
        return words
    return pack_rows(jnp.pad(unpack_words(words, rows), ((0, GROUP - rows), (0, 0))))


def _tn(x: jax.Array, dy: jax.Array, precision: lax.PrecisionLike) -> jax.Array:
    return lax.dot_general(
        x, dy, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def masked_weight_gradient_reference(
    x: jax.Array, dy: jax.Array, words: jax.Array, *, dtype: Any = jnp.float32, precision: Any = None
) -> jax.Array:
    """`masked_weight_gradient` by plain operations, on two matrices.

    Args:
      x: [m, k].
      dy: [m, n].
      words: uint32 of `words_shape((k, n))`.
      dtype: of the result.
      precision: of the product.

    Returns:
      [k, n].
    """
    dense = _tn(x, dy, precision)
    return jnp.where(unpack_words(words, x.shape[1]), dense, jnp.zeros_like(dense)).astype(dtype)


def _kernel(
    x_ref: Any, dy_ref: Any, words_ref: Any, dw_ref: Any, sum_ref: Any, *, samples: int, precision: Any
) -> None:
    step, steps = pl.program_id(2), pl.num_programs(2)
    x, dy = x_ref[...], dy_ref[...]
    here = x.shape[0]
    if samples % here:  # what lies behind the last sample may be anything, NaN too
        left = samples - step * here

        def real(block: jax.Array) -> jax.Array:
            row = lax.broadcasted_iota(jnp.int32, block.shape, 0)
            return jnp.where(row < left, block, jnp.zeros_like(block))

        x, dy = real(x), real(dy)
    product = _tn(x, dy, precision)

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = product

    @pl.when(step > 0)
    def _() -> None:
        sum_ref[...] += product

    @pl.when(step == steps - 1)
    def _() -> None:
        for group in range(sum_ref.shape[0] // GROUP):
            rows = pl.ds(group * GROUP, GROUP)
            tile = words_ref[pl.ds(group * WORDS, WORDS), :]
            tiles = jnp.broadcast_to(tile[None], (BITS, *tile.shape))
            bits = (tiles >> lax.broadcasted_iota(jnp.uint32, tiles.shape, 0)) & jnp.uint32(1)
            mask = bits.reshape(GROUP, tile.shape[1]) != 0
            dense = sum_ref[rows, :]
            dw_ref[rows, :] = jnp.where(mask, dense, jnp.zeros_like(dense)).astype(dw_ref.dtype)


def _tile(size: int, largest: int, smallest: int) -> int:
    """A block size: the multiple of `smallest` from half of `largest` on that pads the size the least."""
    if size <= smallest:
        return smallest
    return min(range(largest, largest // 2, -smallest), key=lambda block: -(-size // block) * block)


def masked_weight_gradient_pallas(
    x: jax.Array,
    dy: jax.Array,
    words: jax.Array,
    *,
    dtype: Any = jnp.float32,
    precision: Any = None,
    block: tuple[int, int, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`masked_weight_gradient` as a TPU kernel, on two matrices.

    Args:
      x: [m, k].
      dy: [m, n].
      words: uint32 of `words_shape((k, n))`.
      dtype: of the result.
      precision: of the product.
      block: samples, rows and columns of a block; None chooses.
      interpret: True or `pltpu.InterpretParams()` runs it anywhere, slowly.

    Returns:
      [k, n].
    """
    (m, k), n = x.shape, dy.shape[1]
    words = _in_groups(words, k)
    if block is None:
        block = (_tile(m, 4096 // x.dtype.itemsize, _LANES), _tile(k, 1024, GROUP), _tile(n, 512, _LANES))
    bm, bk, bn = block
    size = x.dtype.itemsize
    held = 2 * bm * (bk + bn) * size + bk * bn * (4 + 4 + 2 * jnp.dtype(dtype).itemsize)
    return pl.pallas_call(
        functools.partial(_kernel, samples=m, precision=precision),
        grid=(pl.cdiv(k, bk), pl.cdiv(n, bn), pl.cdiv(m, bm)),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda i, j, s: (s, i)),
            pl.BlockSpec((bm, bn), lambda i, j, s: (s, j)),
            pl.BlockSpec((bk // BITS, bn), lambda i, j, s: (i, j)),
        ],
        out_specs=pl.BlockSpec((bk, bn), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((k, n), dtype),
        scratch_shapes=[pltpu.VMEM((bk, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=max(16 << 20, 2 * held),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * k * n,
            bytes_accessed=m * (k + n) * size + k * n * jnp.dtype(dtype).itemsize + k * n // 8,
            transcendentals=0,
        ),
        interpret=interpret,
        name="masked_weight_gradient",
    )(x, dy, words)


def _checked(x: jax.Array, dy: jax.Array, words: jax.Array) -> None:
    if x.dtype != dy.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x and dy must be floating and of one dtype, got {x.dtype} and {dy.dtype}: cast one")
    if words.dtype != jnp.uint32:
        raise TypeError(f"the mask must be packed into uint32 words, got {words.dtype}: type pack(mask)")
    if x.ndim < 1 or x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(
            f"x [..., inputs] and dy [..., outputs] must have the same samples, got {x.shape} and {dy.shape}"
        )
    k, n = x.shape[-1], dy.shape[-1]
    if words.shape != words_shape((k, n)):
        raise ValueError(
            f"a mask of {k} x {n} packs into words of {words_shape((k, n))}, got {words.shape}: pack the "
            "mask of this very kernel"
        )


def masked_weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    words: jax.Array,
    *,
    dtype: Any = jnp.float32,
    precision: lax.PrecisionLike = None,
    implementation: Implementation = "xla",
    interpret: Any = False,
) -> jax.Array:
    """The gradient of y = x W with respect to the links of W, 0 elsewhere.

    The product is accumulated in float32 and rounded once. Masked entries are selected, not multiplied: NaN
    and infinity outside the mask are gone. Pallas kernels are not partitioned by the compiler: where operands
    are sharded, call "pallas" inside `jax.shard_map(..., check_vma=False)`, and sum over the samples there.

    Args:
      x: bfloat16 or float32 [..., k], the layer's inputs.
      dy: the dtype of x, [..., n], the gradient of its outputs.
      words: uint32 of `words_shape((k, n))`, the mask.
      dtype: of the result.
      precision: of the product, as for `jax.lax.dot_general`.
      implementation: "xla" leaves the fusion of the mask to the compiler, which is as fast (docs/kernels.md);
        "pallas" is the kernel on TPU, and plain operations elsewhere.
      interpret: runs the kernel anywhere, slowly: True or `pltpu.InterpretParams()`.

    Returns:
      dtype [k, n].

    Raises:
      TypeError: operands of two dtypes, a mask that is not packed.
      ValueError: shapes that do not fit, an unknown implementation.

    Example:
      >>> x, dy = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[10.0]])
      >>> masked_weight_gradient(x, dy, jnp.array([[5]], jnp.uint32))[:, 0]
      Array([10.,  0., 30.], dtype=float32)
    """
    x, dy, words = jnp.asarray(x), jnp.asarray(dy), jnp.asarray(words)
    _checked(x, dy, words)
    m, k, n = math.prod(x.shape[:-1]), x.shape[-1], dy.shape[-1]
    x, dy = x.reshape(m, k), dy.reshape(m, n)
    options = {"dtype": dtype, "precision": precision}
    plain = functools.partial(masked_weight_gradient_reference, **options)
    kernel = functools.partial(masked_weight_gradient_pallas, interpret=interpret, **options)
    if implementation not in ("xla", "pallas"):
        raise ValueError(f"implementation must be 'xla' or 'pallas', got {implementation!r}")
    if 0 in (m, k, n) or implementation == "xla":
        return plain(x, dy, words)
    if interpret:
        return kernel(x, dy, words)
    return lax.platform_dependent(x, dy, words, tpu=kernel, default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _masked_dense(
    x: jax.Array, w: jax.Array, words: jax.Array, precision: Any, implementation: Any, interpret: Any
) -> jax.Array:
    return lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), precision=precision)


def _masked_dense_forward(
    x: jax.Array, w: jax.Array, words: jax.Array, precision: Any, implementation: Any, interpret: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _masked_dense(x, w, words, precision, implementation, interpret), (x, w, words)


def _masked_dense_backward(
    precision: Any, implementation: Any, interpret: Any, saved: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, words = saved
    dx = lax.dot_general(dy, w.astype(x.dtype), (((dy.ndim - 1,), (1,)), ((), ())), precision=precision)
    dw = masked_weight_gradient(
        x, dy, words, dtype=w.dtype, precision=precision, implementation=implementation, interpret=interpret
    )
    return dx, dw, None


_masked_dense.defvjp(_masked_dense_forward, _masked_dense_backward)


def masked_dense(
    x: jax.Array,
    w: jax.Array,
    words: jax.Array,
    *,
    precision: lax.PrecisionLike = None,
    implementation: Implementation = "xla",
    interpret: Any = False,
) -> jax.Array:
    """y = x W, whose weight gradient is masked where it is made: for masks that stay for a while.

    The weights hold their zeros, so that the product needs no mask. No gradient of an absent link is ever
    written to memory; regrowth by gradients (RigL) needs those, and takes a plain product in those steps.

    Args:
      x: bfloat16 or float32 [..., k].
      w: [k, n], 0 outside the mask. It may be wider than x: it is rounded to the dtype of x for the product,
        and its gradient comes from the float32 sums, rounded once.
      words: uint32 of `words_shape((k, n))`, the mask.
      precision: of the products.
      implementation: of the weight gradient, as for `masked_weight_gradient`.
      interpret: as for `masked_weight_gradient`.

    Returns:
      The dtype of x, [..., n].

    Raises:
      TypeError: a mask that is not packed.
      ValueError: shapes that do not fit.

    Example:
      >>> x, w, words = jnp.ones((2, 3)), jnp.array([[1.0], [0.0], [2.0]]), jnp.array([[5]], jnp.uint32)
      >>> jax.grad(lambda w: masked_dense(x, w, words).sum())(w)[:, 0]
      Array([2., 0., 2.], dtype=float32)
    """
    x, w, words = jnp.asarray(x), jnp.asarray(w), jnp.asarray(words)
    if w.ndim != 2 or x.shape[-1:] != w.shape[:1]:
        raise ValueError(f"x [..., inputs] and w [inputs, outputs] must fit, got {x.shape} and {w.shape}")
    _checked(x, jax.ShapeDtypeStruct((*x.shape[:-1], w.shape[1]), x.dtype), words)
    return _masked_dense(x, w, words, precision, implementation, interpret)
