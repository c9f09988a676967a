"""The blocks against their equations."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core import named
from odjax.models import Attention, FeedForward, LayerNorm, RMSNorm, RotaryScaling, SwiGLU, attend
from odjax.models.axes import constrain
from odjax.models.feedforward import activation_named
from odjax.models.rotary import rotary_angles, rotary_frequencies, rotate

from . import golden


def randn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nn.unbox(tree))


def test_rms_norm_follows_its_equation():
    with jax.enable_x64(True):
        x, scale = randn(0, 2, 3, 8), randn(1, 8)
        norm = RMSNorm(eps=1e-3, dtype=jnp.float64, param_dtype=jnp.float64)
        y = norm.apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))
        np.testing.assert_allclose(y, golden.rms_norm(x, scale, 1e-3), rtol=1e-12)


def test_layer_norm_follows_its_equation():
    with jax.enable_x64(True):
        x, scale, bias = randn(0, 2, 3, 8), randn(1, 8), randn(2, 8)
        norm = LayerNorm(eps=1e-3, dtype=jnp.float64, param_dtype=jnp.float64)
        params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        y = norm.apply({"params": params}, jnp.asarray(x))
        np.testing.assert_allclose(y, golden.layer_norm(x, scale, bias, 1e-3), rtol=1e-11, atol=1e-13)


def test_norm_statistics_of_bf16_activations_are_float32():
    x = jnp.asarray(randn(0, 4, 512) + 30.0, jnp.bfloat16)
    y, _ = LayerNorm(dtype=jnp.float32).init_with_output(jax.random.key(0), x)
    exact = golden.layer_norm(np.asarray(x, np.float64), 1.0, 0.0, 1e-6)
    np.testing.assert_allclose(y, exact, atol=2e-5)


def test_rotation_pairs_the_two_halves_of_a_head():
    with jax.enable_x64(True):
        x = randn(0, 2, 5, 3, 8)
        positions = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (2, 5))
        y = rotate(jnp.asarray(x), rotary_angles(positions, rotary_frequencies(8, 100.0)))
        # The angles themselves are float32.
        np.testing.assert_allclose(y, golden.rotary(x, 100.0), atol=2e-6)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 50))
def test_rotated_products_depend_on_the_distance_alone(i, j, shift):
    q, k = jnp.asarray(randn(0, 1, 1, 1, 16)), jnp.asarray(randn(1, 1, 1, 1, 16))
    frequencies = rotary_frequencies(16)

    def product(a, b):
        a, b = (rotary_angles(jnp.full((1, 1), t, jnp.int32), frequencies) for t in (a, b))
        return float(jnp.vdot(rotate(q, a), rotate(k, b)))

    assert product(i, j) == pytest.approx(product(i + shift, j + shift), abs=2e-3)


def test_rotation_keeps_lengths():
    x = jnp.asarray(randn(0, 1, 4, 2, 6), jnp.float32)
    y = rotate(x, rotary_angles(jnp.array([[0, 7, 99, 1000]]), rotary_frequencies(6)))
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rotary_scaling_stretches_low_frequencies_and_keeps_high_ones():
    scaling = RotaryScaling(factor=8.0, low=1.0, high=4.0, original_length=8192)
    plain, scaled = rotary_frequencies(128, 5e5), rotary_frequencies(128, 5e5, scaling)
    between = 0
    for f, g in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            assert g == f
        elif wavelength > 8192 / 1:
            assert g == pytest.approx(f / 8, rel=1e-12)
        else:
            between += 1
            smooth = (8192 / wavelength - 1) / (4 - 1)
            assert g == pytest.approx((1 - smooth) * f / 8 + smooth * f, rel=1e-12)
    assert between > 0


def test_rotary_positions_refuse_an_odd_head():
    with pytest.raises(ValueError, match=r"head_dim must be even.*got 7"):
        rotary_frequencies(7)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_consecutive_query_heads_share_a_key_head(kv_heads):
    q, k, v = randn(0, 2, 5, 4, 8), randn(1, 2, 5, kv_heads, 8), randn(2, 2, 5, kv_heads, 8)
    y = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), causal=True)
    causal = np.tril(np.ones((5, 5), bool))
    np.testing.assert_allclose(y, golden.attention(q, k, v, causal), atol=2e-6)


@pytest.mark.parametrize("use_bias", [False, True])
def test_attention_module_follows_its_equation(use_bias):
    layer = Attention(heads=4, kv_heads=2, head_dim=6, use_bias=use_bias, causal=True)
    x = randn(0, 2, 5, 8)
    variables = layer.init(jax.random.key(0), jnp.asarray(x, jnp.float32))
    params = jax.tree.map(lambda p: p + 0.1, nn.unbox(variables)["params"])
    y = layer.apply({"params": params}, jnp.asarray(x, jnp.float32))
    p = as_float64(params)
    q, k, v = (golden.project(x, p[name]) for name in "qkv")
    expected = golden.merge_heads(golden.attention(q, k, v, np.tril(np.ones((5, 5), bool))), p["o"])
    np.testing.assert_allclose(y, expected, rtol=2e-4, atol=2e-5)


def test_query_and_key_norm_makes_attention_blind_to_their_scale():
    layer = Attention(heads=2, kv_heads=1, head_dim=4, qk_norm=True, norm_eps=0.0)
    x = jnp.asarray(randn(0, 1, 3, 8), jnp.float32)
    params = nn.unbox(layer.init(jax.random.key(0), x))["params"]
    scaled = {**params, "q": {"kernel": 7.0 * params["q"]["kernel"]}}
    y, z = (layer.apply({"params": p}, x) for p in (params, scaled))
    np.testing.assert_allclose(y, z, atol=1e-5)
    assert params["q_norm"]["scale"].shape == params["k_norm"]["scale"].shape == (4,)


def test_cross_attention_reads_the_source():
    layer = Attention(heads=2, kv_heads=2, head_dim=4)
    x, source = jnp.asarray(randn(0, 1, 3, 8), jnp.float32), jnp.asarray(randn(1, 1, 5, 6), jnp.float32)
    mask = jnp.array([True, True, False, True, True])[None, None, None]
    params = layer.init(jax.random.key(0), x, source)
    y = layer.apply(params, x, source, mask=mask)
    np.testing.assert_allclose(y, layer.apply(params, x, source.at[:, 2].set(9.0), mask=mask), atol=1e-6)
    assert not np.allclose(y, layer.apply(params, x, source.at[:, 3].set(9.0), mask=mask))


def test_a_function_can_take_the_place_of_the_attention():
    calls = []

    def mean_of_values(query, key, value, *, mask, is_causal):
        calls.append((mask is None, is_causal))
        return jnp.broadcast_to(value.mean(1, keepdims=True), query.shape)

    layer = Attention(heads=2, kv_heads=2, head_dim=4, causal=True, implementation=mean_of_values)
    y, _ = layer.init_with_output(jax.random.key(0), jnp.asarray(randn(0, 1, 3, 8), jnp.float32))
    np.testing.assert_allclose(y[:, 0], y[:, 2], atol=1e-6)
    assert calls == [(True, True)]


def test_attention_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 4 and 3"):
        Attention(heads=4, kv_heads=3, head_dim=8)
    with pytest.raises(ValueError, match=r"attention must be one of .*cudnn.*got 'flash'"):
        Attention(heads=4, kv_heads=2, head_dim=8, implementation="flash")


def test_swiglu_follows_its_equation():
    x = randn(0, 2, 3, 8)
    layer = SwiGLU(12)
    variables = nn.unbox(layer.init(jax.random.key(0), jnp.asarray(x, jnp.float32)))
    y = layer.apply(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, golden.swiglu(x, as_float64(variables)["params"]), rtol=1e-4, atol=1e-6)


def test_gelu_is_the_exact_one_by_default():
    x = np.linspace(-4, 4, 41)
    np.testing.assert_allclose(
        activation_named("gelu")(jnp.asarray(x, jnp.float32)), golden.gelu(x), atol=1e-6
    )


def test_an_unknown_activation_names_the_known_ones():
    layer = FeedForward(4, activation="swish")
    with pytest.raises(ValueError, match=r"relu, gelu.*got 'swish'"):
        layer.init(jax.random.key(0), jnp.ones((1, 2, 4)))


def test_constraints_are_the_identity_without_mesh_or_rules():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "length") is x
    with nn.logical_axis_rules([("batch", "data")]):
        assert constrain(x, "batch", "length") is x


def test_a_multi_axis_kernel_can_be_initialized_under_a_mesh_with_rules():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    layer = nn.DenseGeneral(
        (2, 3), kernel_init=named(nn.initializers.ones, "embed", "heads", "head_dim"), use_bias=False
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules([("embed", "fsdp"), ("heads", "tensor")]):
        variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 4)))
    assert variables["params"]["kernel"].names == ("embed", "heads", "head_dim")
