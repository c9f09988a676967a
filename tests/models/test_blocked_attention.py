"""Attention in blocks is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.models import Attention
from odjax.models.blocked_attention import blocked_attention

from . import golden

compiled = jax.jit(blocked_attention, static_argnames=("is_causal", "blocks"))


def heads(kv_heads=2, length=8, keys=8):
    rng = np.random.default_rng(0)
    shapes = ((2, length, 4, 6), (2, keys, kv_heads, 6), (2, keys, kv_heads, 6))
    return [rng.normal(size=shape) for shape in shapes]


def as_float32(arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_causal_blocks_follow_the_equation(blocks, kv_heads):
    with jax.enable_x64(True):
        y = compiled(*map(jnp.asarray, heads(kv_heads)), is_causal=True, blocks=blocks)
        expected = golden.attention(*heads(kv_heads), np.tril(np.ones((8, 8), bool)))
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 7), st.sampled_from([1, 2, 4]))
def test_segments_are_kept_apart(cut, blocks):
    ids = jnp.broadcast_to(jnp.arange(8) >= cut, (2, 8))
    same = (ids[:, :, None] == ids[:, None])[:, None]
    y = compiled(*as_float32(heads()), mask=same, is_causal=True, blocks=blocks)
    causal = np.tril(np.ones((8, 8), bool)) & np.asarray(same[:, 0])
    np.testing.assert_allclose(y, golden.attention(*heads(), causal), rtol=1e-4, atol=1e-5)


def test_other_lengths_and_masks_fall_back_to_one_block():
    q, k, v = heads(length=5, keys=7)
    mask = np.arange(7) < 4
    y = compiled(*as_float32((q, k, v)), mask=jnp.asarray(mask)[None, None, None])
    np.testing.assert_allclose(y, golden.attention(q, k, v, mask), rtol=1e-4, atol=1e-5)
    q, k, v = heads(length=7, keys=7)
    y = compiled(*as_float32((q, k, v)), is_causal=True)
    causal = np.tril(np.ones((7, 7), bool))
    np.testing.assert_allclose(y, golden.attention(q, k, v, causal), rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow():
    q, k, v = as_float32(heads())
    y = compiled(1e4 * q, k, v, is_causal=True)
    assert np.isfinite(y).all()


def test_gradients_are_those_of_jax():
    arrays = as_float32(heads())

    def loss(attend):
        return lambda arrays: jnp.sum(attend(*arrays, is_causal=True) ** 2)

    ours = jax.grad(loss(blocked_attention))(arrays)
    theirs = jax.grad(loss(jax.nn.dot_product_attention))(arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_blocks_multiply_less_than_the_whole():
    shapes = [jax.ShapeDtypeStruct((2, 128, 4, 16), jnp.float32)] * 3

    def flops(blocks):
        run = jax.jit(lambda *a: blocked_attention(*a, is_causal=True, blocks=blocks))
        return run.lower(*shapes).compile().cost_analysis()["flops"]

    assert flops(4) / flops(1) == pytest.approx(5 / 8, abs=0.05)


def test_it_is_an_implementation_of_the_module():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12)), jnp.float32)
    layer = Attention(heads=4, kv_heads=2, head_dim=4, causal=True, implementation="blocked")
    y, params = layer.init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y, layer.clone(implementation="xla").apply(params, x), rtol=1e-4, atol=1e-5)


def test_a_mask_for_each_head_is_refused():
    with pytest.raises(ValueError, match="one mask for all heads"):
        blocked_attention(*as_float32(heads()), mask=jnp.ones((2, 4, 8, 8), bool))
