"""Masked weight gradients: kernel, plain form and autodiff agree, exactly where the numbers are integers."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from odjax.sparse.masks import pack
from odjax_kernels.masked_gradient import (
    masked_dense,
    masked_weight_gradient,
    masked_weight_gradient_pallas,
)


def integers(m, k, n, dtype=jnp.float32, seed=0):
    """Operands whose products are exact in every dtype and order, and a mask."""
    random = np.random.default_rng(seed)
    x, dy = (jnp.asarray(random.integers(-3, 4, (m, size)), dtype) for size in (k, n))
    return x, dy, jnp.asarray(random.random((k, n)) < 0.3)


def dense(x, dy, mask):
    return np.where(mask, np.asarray(x, np.float64).T @ np.asarray(dy, np.float64), 0)


@pytest.mark.parametrize(
    ("interpret", "dtype"),
    [(True, jnp.float32), (pltpu.InterpretParams(), jnp.bfloat16)],
    ids=["XLA-float32", "TPU-bfloat16"],
)
def test_kernel_is_the_masked_product_on_shapes_that_no_block_divides(interpret, dtype):
    x, dy, mask = integers(140, 300, 130, dtype)
    out = masked_weight_gradient_pallas(x, dy, pack(mask), block=(128, 256, 128), interpret=interpret)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, dense(x, dy, mask))


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 40, 2)])
def test_kernel_takes_masks_of_less_than_a_group_of_rows(shape):
    x, dy, mask = integers(*shape)
    out = masked_weight_gradient(x, dy, pack(mask), implementation="pallas", interpret=True)
    np.testing.assert_array_equal(out, dense(x, dy, mask))


plain = jax.jit(masked_weight_gradient)


@given(st.sampled_from([(3, 300, 4), (0, 40, 2)]), st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]))
def test_plain_form_is_the_masked_product(shape, seed, density):
    x, dy, _ = integers(*shape, seed=seed)
    mask = jnp.asarray(np.random.default_rng(seed).random(shape[1:]) < density)
    np.testing.assert_array_equal(plain(x, dy, pack(mask)), dense(x, dy, mask))


@pytest.mark.parametrize(
    "options", [{}, {"implementation": "pallas", "interpret": True}], ids=["plain", "kernel"]
)
def test_nan_and_infinity_outside_the_mask_are_gone(options):
    x, dy, mask = integers(4, 5, 3)
    mask = mask.at[0].set(False).at[1].set(False)
    wild = x.at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
    np.testing.assert_array_equal(masked_weight_gradient(wild, dy, pack(mask), **options), dense(x, dy, mask))


@pytest.mark.parametrize(
    "options", [{}, {"implementation": "pallas", "interpret": True}], ids=["plain", "kernel"]
)
def test_gradients_of_a_masked_layer_are_those_of_the_dense_one_with_its_mask(options):
    x, dy, mask = integers(6, 40, 5)
    w = jnp.where(mask, integers(40, 5, 5, seed=1)[0], 0.0)
    x, dy = x.reshape(2, 3, 40), dy.reshape(2, 3, 5)

    def of_dense(x, w):
        return jnp.einsum("abk,kn->abn", x, jnp.where(mask, w, 0.0))

    y, pull = jax.vjp(functools.partial(masked_dense, words=pack(mask), **options), x, w)
    expected, pull_dense = jax.vjp(of_dense, x, w)
    np.testing.assert_array_equal(y, expected)
    for found, wanted in zip(pull(dy), pull_dense(dy), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_gradient_of_wide_weights_is_not_rounded_to_the_dtype_of_the_inputs():
    x, w, words = jnp.ones((257, 1), jnp.bfloat16), jnp.ones((1, 1)), jnp.ones((1, 1), jnp.uint32)

    def summed(w):
        return masked_dense(x, w, words).astype(jnp.float32).sum()

    assert jax.grad(summed)(w) == 257  # bfloat16 has no 257
    narrow = masked_weight_gradient(x, x, words, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    assert narrow == 256


def test_layers_of_a_stack_are_mapped():
    (x, dy, mask), words = integers(4, 40, 6), jax.vmap(pack)
    masks = jnp.stack([mask, ~mask])
    both = jax.vmap(
        lambda words: masked_weight_gradient(x, dy, words, implementation="pallas", interpret=True)
    )(words(masks))
    np.testing.assert_array_equal(both, np.stack([dense(x, dy, mask), dense(x, dy, ~mask)]))


def test_a_sum_over_shards_of_the_samples_is_the_whole_gradient():
    x, dy, mask = integers(16, 40, 6)
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def shard(x, dy, words):
        part = masked_weight_gradient(x, dy, words, implementation="pallas", interpret=True)
        return jax.lax.psum(part, "data")

    mesh = Mesh(np.array(jax.devices()), ("data",))
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(rows, rows, whole), out_specs=whole, check_vma=False)
    np.testing.assert_array_equal(jax.jit(sharded)(x, dy, pack(mask)), dense(x, dy, mask))


@pytest.mark.parametrize(("implementation", "kernels"), [("pallas", 1), ("xla", 0)])
def test_the_backward_pass_lowers_for_tpu(implementation, kernels):
    def loss(x, w, words):
        return masked_dense(x, w, words, implementation=implementation).astype(jnp.float32).sum()

    shapes = [((700, 600), jnp.bfloat16), ((600, 300), jnp.float32), ((24, 300), jnp.uint32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    lowered = jax.export.export(jax.jit(jax.grad(loss, argnums=(0, 1))), platforms=["tpu"])(*arguments)
    assert lowered.mlir_module().count("tpu_custom_call") == kernels


def test_bad_input_is_an_error_that_says_what_to_type():
    x, dy, mask = integers(4, 40, 6)
    words = pack(mask)
    with pytest.raises(TypeError, match="float32 and bfloat16: cast one"):
        masked_weight_gradient(x, dy.astype(jnp.bfloat16), words)
    with pytest.raises(TypeError, match=r"got bool: type pack\(mask\)"):
        masked_weight_gradient(x, dy, mask)
    with pytest.raises(ValueError, match=r"40 x 6 packs into words of \(2, 6\), got \(2, 5\)"):
        masked_weight_gradient(x, dy, words[:, :5])
    with pytest.raises(ValueError, match=r"the same samples, got \(4, 40\) and \(3, 6\)"):
        masked_weight_gradient(x, dy[:3], words)
    with pytest.raises(ValueError, match="'xla' or 'pallas', got 'mosaic'"):
        masked_weight_gradient(x, dy, words, implementation="mosaic")
    with pytest.raises(ValueError, match=r"must fit, got \(4, 40\) and \(6, 40\)"):
        masked_dense(x, jnp.ones((6, 40)), words)
