"""Partially shared recalibration: its equations, its starts, its errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core import leaves_with_paths
from odjax.heads.recalibration import PSRP, recalibrate, recalibrate_output

seeds = st.integers(0, 1000)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def parameters(module, x):
    return nn.unbox(module.init(jax.random.key(0), x))["params"]


apply = jax.jit(PSRP(rank=4).apply)


@given(seeds)
def test_scale_and_shift_share_the_projection_down(seed):
    x = normal(seed, 2, 3, 8)
    down, up_scale, up_shift = normal(1, 8, 4), normal(2, 4, 8), normal(3, 4, 8)
    params = {"down": {"kernel": down}, "scale": {"kernel": up_scale}, "shift": {"kernel": up_shift}}
    scale, shift = apply({"params": params}, x)
    u = np.maximum(np.asarray(x, np.float64) @ np.asarray(down, np.float64), 0)
    np.testing.assert_allclose(scale, u @ np.asarray(up_scale, np.float64), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(shift, u @ np.asarray(up_shift, np.float64), rtol=1e-4, atol=1e-5)


@given(seeds)
def test_a_new_module_is_the_identity(seed):
    x, residual = normal(seed, 2, 3, 8), normal(seed + 1, 2, 3, 8)
    scale, shift = apply({"params": parameters(PSRP(rank=4), x)}, x)
    np.testing.assert_array_equal(recalibrate(x, residual, scale, shift), x + residual)
    np.testing.assert_array_equal(recalibrate_output(residual, scale, shift), residual)


@given(seeds)
def test_derivatives_are_one_by_shift_and_the_residual_by_scale(seed):
    x, residual, scale, shift = (normal(seed + i, 2, 8) for i in range(4))
    by_x, by_residual, by_scale, by_shift = jax.grad(
        lambda *a: jnp.sum(recalibrate(*a)), argnums=(0, 1, 2, 3)
    )(x, residual, scale, shift)
    ones = np.ones((2, 8), np.float32)
    np.testing.assert_array_equal(by_x, ones)
    np.testing.assert_array_equal(by_shift, ones)
    np.testing.assert_array_equal(by_scale, residual)
    np.testing.assert_array_equal(by_residual, ones + scale)


def test_recalibrating_an_output_is_recalibrating_a_residual_of_nothing():
    y, scale, shift = (normal(i, 2, 8) for i in range(3))
    np.testing.assert_array_equal(
        recalibrate_output(y, scale, shift), recalibrate(jnp.zeros_like(y), y, scale, shift)
    )


def test_the_start_of_the_paper_draws_all_three_matrices():
    params = parameters(PSRP(rank=64, start="paper"), jnp.zeros((1, 256)))
    for _, leaf in leaves_with_paths(params):
        # A normal distribution of scale 0.02 cut at two standard deviations has 0.88 of its spread.
        assert abs(float(jnp.std(leaf)) / (0.02 * 0.8796) - 1) < 0.02
        assert float(jnp.abs(leaf).max()) <= 0.04


def test_at_the_zero_start_the_gradient_reaches_both_ups():
    x = normal(0, 2, 3, 8)

    def loss(params):
        return sum(jnp.sum(jnp.sin(y + 1)) for y in apply({"params": params}, x))

    gradients = jax.grad(loss)(parameters(PSRP(rank=4), x))
    assert np.any(gradients["scale"]["kernel"])
    assert np.any(gradients["shift"]["kernel"])
    assert not np.any(gradients["down"]["kernel"])


def test_twelve_layers_of_vit_b_have_the_published_parameters():
    params = jax.eval_shape(PSRP(rank=16).init, jax.random.key(0), jnp.zeros((1, 196, 768)))
    assert 12 * sum(leaf.size for leaf in jax.tree.leaves(params)) == 442_368


def test_bf16_computation_keeps_float32_parameters():
    x = normal(0, 2, 8)
    module = PSRP(rank=4, start="paper", dtype=jnp.bfloat16)
    params = parameters(module, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    narrow = module.apply({"params": params}, x.astype(jnp.bfloat16))
    for got, want in zip(narrow, apply({"params": params}, x), strict=True):
        assert got.dtype == jnp.bfloat16
        assert float(jnp.abs(got.astype(jnp.float32) - want).max()) < 0.03 * float(jnp.abs(want).max())


def test_every_axis_of_every_parameter_has_a_name_or_none():
    variables = jax.eval_shape(PSRP().init, jax.random.key(0), jnp.zeros((1, 8)))
    specs = nn.get_partition_spec(variables)["params"]
    assert tuple(specs["down"]["kernel"]) == ("embed", None)
    assert tuple(specs["scale"]["kernel"]) == tuple(specs["shift"]["kernel"]) == (None, "embed")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"start": "ones"}, "start must be one of zero, paper, got 'ones'"),
    ],
)
def test_a_module_that_cannot_be_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        PSRP(**options)


def test_a_scalar_is_refused():
    with pytest.raises(ValueError, match=r"x must be \[..., width\]"):
        PSRP().init(jax.random.key(0), jnp.zeros(()))


@pytest.mark.parametrize(
    "error, wrong, message",
    [
        (ValueError, {"scale": jnp.zeros(8)}, r"scale must have the shape of x \(2, 8\), got \(8,\)"),
        (
            ValueError,
            {"residual": jnp.zeros((2, 1))},
            r"residual must have the shape of x \(2, 8\), got \(2, 1\)",
        ),
        (
            TypeError,
            {"shift": jnp.zeros((2, 8), jnp.bfloat16)},
            "shift must have the dtype of x, float32, got bfloat16",
        ),
    ],
)
def test_what_does_not_fit_the_residual_stream_is_refused(error, wrong, message):
    good = dict.fromkeys(("residual", "scale", "shift"), jnp.zeros((2, 8)))
    with pytest.raises(error, match=message):
        recalibrate(jnp.zeros((2, 8)), **{**good, **wrong})


def test_what_does_not_fit_the_output_is_refused():
    with pytest.raises(ValueError, match=r"shift must have the shape of y \(2, 8\), got \(2, 4\)"):
        recalibrate_output(jnp.zeros((2, 8)), jnp.zeros((2, 8)), jnp.zeros((2, 4)))
