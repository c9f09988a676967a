"""Masked weight gradients and block-sparse products on a few tiles, for ahead-of-time compiles."""

import functools

import jax
import jax.numpy as jnp

from odjax_kernels.block_sparse import BlockLists, block_gradient, block_matmul
from odjax_kernels.masked_gradient import masked_weight_gradient_pallas
from odjax_kernels.packing import words_shape

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
shape = jax.ShapeDtypeStruct


def masked(name, m, k, n, dtype, out):
    arguments = (shape((m, k), dtype), shape((m, n), dtype), shape(words_shape((k, n)), jnp.uint32))
    return name, functools.partial(masked_weight_gradient_pallas, dtype=out), arguments


def blocks(name, m, k, n, block, slots, dtype):
    def lists(count, longest):
        return BlockLists(shape((count,), I32), shape((count, longest), I32), shape((count, longest), I32))

    rows, columns = k // block[0], n // block[1]
    x, dy, w = shape((m, k), dtype), shape((m, n), dtype), shape((slots, *block), dtype)
    places = (shape((slots,), I32), shape((slots,), I32), shape((), I32))
    return [
        (f"block_matmul {name}", block_matmul, (x, w, lists(columns, 2))),
        (
            f"block_matmul transposed {name}",
            functools.partial(block_matmul, transposed=True),
            (dy, w, lists(rows, 3)),
        ),
        (f"block_gradient {name}", functools.partial(block_gradient, block=block), (x, dy, *places)),
    ]


AOT_CASES = [
    masked("masked_weight_gradient", 3000, 1024, 1100, BF16, F32),
    masked("masked_weight_gradient float32", 600, 784, 10, F32, BF16),
    masked("masked_weight_gradient of few rows", 100, 50, 300, BF16, BF16),
    *blocks("bfloat16", 1500, 512, 768, (128, 128), 10, BF16),
    *blocks("float32", 300, 512, 768, (256, 128), 6, F32),
]
