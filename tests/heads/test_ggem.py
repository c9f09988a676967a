"""GGeM pooling: its theorems, its derivatives, masks and variants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.heads.ggem import ggem_pool

from .ggem_cases import GROUPS, SEEDS, VARIANTS, exponents, pool, power_mean, signs, some_tokens, uniform


def test_golden_values_by_hand():
    x = jnp.array([[3.0, 1.0], [4.0, 2.0]])
    got = pool(x, jnp.array([2.0, 3.0]))
    np.testing.assert_allclose(got, [np.sqrt(25 / 2), 4.5 ** (1 / 3)], rtol=1e-6)
    # p = 2: dy/dx_n = x_n / (N y). p = 1: dy/dp = mean(x log x) - mean(x) log mean(x).
    slope = jax.grad(lambda x: pool(x, jnp.array([2.0]))[0])(x)
    np.testing.assert_allclose(slope[:, 0], np.array([3, 4]) / (2 * np.sqrt(12.5)), rtol=1e-6)
    np.testing.assert_array_equal(slope[:, 1], [0, 0])
    slope = jax.grad(lambda p: pool(x, p)[1])(jnp.array([1.0]))
    np.testing.assert_allclose(slope, [np.log(2) - 1.5 * np.log(1.5)], rtol=2e-6)


@given(SEEDS, GROUPS)
def test_the_result_is_the_power_mean_of_each_group(seed, groups):
    x, p = signs(seed), exponents(seed, groups)
    np.testing.assert_allclose(pool(x, p), power_mean(x, p), rtol=1e-5)


@given(SEEDS, GROUPS)
def test_exponent_one_is_the_mean(seed, groups):
    x = uniform(seed)
    np.testing.assert_allclose(pool(x, np.ones(groups, np.float32)), x.mean(-2), rtol=2e-6)


@given(SEEDS)
def test_exponent_200_is_within_log_n_over_200_of_the_maximum(seed):
    x = uniform(seed)
    got, largest = pool(x, np.full(1, 200, np.float32)), x.max(-2)
    assert (got <= largest * (1 + 1e-6)).all()
    assert (got >= largest * (1 - np.log(6) / 200)).all()


@given(SEEDS)
def test_a_small_exponent_is_the_geometric_mean_and_half_the_variance_of_the_logarithms(seed):
    with jax.enable_x64(True):
        logs = np.random.default_rng(seed).uniform(-1, 1, (3, 6, 8))
        got = np.log(pool(np.exp(logs), np.full(1, 1e-2)))
    # The third cumulant of numbers in [-1, 1] is below 2, and it comes with p^2 / 6.
    np.testing.assert_allclose(got, logs.mean(-2) + 0.5e-2 * logs.var(-2), atol=2 * 1e-4 / 6)


@given(SEEDS, GROUPS)
def test_the_result_lies_between_the_smallest_and_the_largest_clamped_token(seed, groups):
    x = signs(seed)
    got, clamped = pool(x, exponents(seed, groups, 0.01, 50.0)), np.maximum(x, 1e-6)
    assert (got >= clamped.min(-2) * (1 - 1e-4)).all()
    assert (got <= clamped.max(-2) * (1 + 1e-6)).all()


@given(SEEDS, GROUPS)
def test_the_result_grows_with_the_exponent_and_with_every_token(seed, groups):
    with jax.enable_x64(True):
        x, p = signs(seed).astype(np.float64), exponents(seed, groups).astype(np.float64)
        got = pool(x, p)
        assert (pool(x, p + uniform(seed + 3, (groups,))) >= got * (1 - 1e-12)).all()
        assert (pool(x + uniform(seed + 4, low=0.0), p) >= got * (1 - 1e-12)).all()
        tokens, power = jax.grad(lambda x, p: pool(x, p).sum(), (0, 1))(x, p)
        assert (tokens >= 0).all()
        assert (power >= 0).all()


@given(SEEDS, GROUPS, st.sampled_from([0.5, 3.0, 1e3]))
def test_scaled_tokens_give_the_scaled_result(seed, groups, scale):
    x, p = uniform(seed), exponents(seed, groups)
    np.testing.assert_allclose(pool(np.float32(scale) * x, p), scale * pool(x, p), rtol=1e-5)


@given(SEEDS, GROUPS)
def test_order_and_copies_of_all_tokens_do_not_matter(seed, groups):
    x, p = signs(seed), exponents(seed, groups)
    got = pool(x, p)
    order = np.random.default_rng(seed).permutation(6)
    np.testing.assert_allclose(pool(x[:, order], p), got, rtol=1e-6)
    np.testing.assert_allclose(pool(np.concatenate([x, x], 1), p), got, rtol=1e-6)


@given(SEEDS, st.sampled_from([0.01, 0.1, 1.0, 3.0, 30.0, 200.0]))
def test_the_result_is_exact_to_float32_whatever_the_exponent(seed, exponent):
    x, p = uniform(seed, low=0.5, high=2.0), np.full(1, exponent, np.float32)
    np.testing.assert_allclose(pool(x, p), power_mean(x, p), rtol=8e-7)


@given(SEEDS, GROUPS)
def test_constant_tokens_give_the_constant_and_no_gradient_of_the_exponents(seed, groups):
    x = np.broadcast_to(uniform(seed, (3, 1, 8), 1e-5, 1e5), (3, 6, 8))
    p = exponents(seed, groups, 0.01, 100.0)
    # A division may be a product with a reciprocal: two roundings of 2^-24, which the exponent multiplies or
    # divides.
    np.testing.assert_allclose(pool(x, p), x[:, 0], rtol=2**-22)
    slopes = np.abs(jax.grad(lambda p: pool(x, p).sum())(p))
    assert (slopes <= 2**-22 * x[:, 0].sum(0).reshape(groups, -1).sum(1) / p).all()


@given(SEEDS, st.sampled_from([2, 4, 8]))
def test_equal_exponents_are_gem(seed, groups):
    x, p = signs(seed), exponents(seed, 1)
    np.testing.assert_array_equal(pool(x, np.repeat(p, groups)), pool(x, p))


@given(SEEDS, st.integers(0, 3))
def test_an_exponent_moves_only_the_channels_of_its_group(seed, group):
    x, p = signs(seed), exponents(seed, 4)
    other = p.copy()
    other[group] += 1
    changed = np.asarray(pool(x, other) != pool(x, p)).any(0)
    inside = np.arange(8) // 2 == group
    np.testing.assert_array_equal(changed, inside)


@functools.partial(jax.jit, static_argnames=("rectify", "signed"))
def _projected(x, p, mask, weights, rectify="clamp", signed=False):
    return jnp.sum(weights * ggem_pool(x, p, mask=mask, rectify=rectify, signed=signed))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(SEEDS, st.booleans())
def test_derivatives_of_both_modes_are_finite_differences_in_float64(variant, seed, masked):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        # Away from the clamp, from the least entry's neighbours and from zero, where there is a kink.
        x = rng.permutation(np.arange(3 * 6 * 8) - 71.5).reshape(3, 6, 8) / 24
        p, mask = exponents(seed, 4).astype(np.float64), some_tokens(seed) | (not masked)
        weights, dx, dp = rng.normal(size=(3, 8)), rng.normal(size=x.shape), rng.normal(size=4)
        f = functools.partial(_projected, mask=mask, weights=weights, **variant)
        step = 1e-5
        differences = (f(x + step * dx, p + step * dp) - f(x - step * dx, p - step * dp)) / (2 * step)
        _, forward = jax.jvp(f, (x, p), (dx, dp))
        gx, gp = jax.grad(f, (0, 1))(x, p)
        scale = max(1.0, np.abs(gx).max(), np.abs(gp).max())
        np.testing.assert_allclose(forward, differences, rtol=1e-6, atol=1e-6 * scale)
        np.testing.assert_allclose(np.sum(gx * dx) + gp @ dp, forward, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_second_derivatives_are_finite_differences_of_the_first(variant):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, p = rng.normal(size=(1, 4, 2)), np.array([1.5, 4.0])
        dx, dp = rng.normal(size=x.shape), rng.normal(size=2)
        mask, weights, step = np.ones((1, 4), bool), rng.normal(size=(1, 2)), 1e-5
        first = jax.jit(
            jax.grad(functools.partial(_projected, mask=mask, weights=weights, **variant), (0, 1))
        )
        _, got = jax.jvp(first, (x, p), (dx, dp))
        above, below = first(x + step * dx, p + step * dp), first(x - step * dx, p - step * dp)
        for second, a, b in zip(got, above, below, strict=True):
            np.testing.assert_allclose(second, (a - b) / (2 * step), rtol=1e-6, atol=1e-6)


@given(SEEDS)
def test_an_entry_at_or_below_eps_gets_no_gradient(seed):
    x = signs(seed)
    x[:, 0] = 1e-6
    slope = jax.jit(jax.grad(lambda x: ggem_pool(x, jnp.array([3.0, 0.5])).sum()))(x)
    np.testing.assert_array_equal(np.asarray(slope)[x <= 1e-6], 0)
    assert (np.asarray(slope)[x > 1e-3] > 0).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(SEEDS)
def test_masked_pooling_is_pooling_of_the_tokens_that_are_left(variant, seed):
    x, p, mask = signs(seed), exponents(seed, 4), some_tokens(seed)
    got = pool(x, p, mask=mask, **variant)
    for one, kept, y in zip(x, mask, got, strict=True):
        # Copies of the tokens that are left fill the shape: they change nothing (tested above).
        left = np.resize(np.flatnonzero(kept), np.lcm(int(kept.sum()), 6))
        np.testing.assert_allclose(pool(one[left], p, **variant), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 3e38])
def test_what_lies_at_masked_tokens_changes_nothing(variant, rubbish):
    x, p, mask = signs(0), exponents(0, 4), some_tokens(0)
    run = jax.value_and_grad(lambda x, p: jnp.sum(jnp.sin(pool(x, p, mask=mask, **variant))), argnums=(0, 1))
    clean = run(x, p)
    dirty = run(np.where(mask[..., None], x, np.float32(rubbish)), p)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    np.testing.assert_array_equal(np.asarray(clean[1][0])[~mask], 0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_sample_without_a_token_gives_zeros_without_a_gradient(variant):
    x, p, mask = signs(0), exponents(0, 4), some_tokens(0)
    some = np.array([True, False, True])

    @jax.jit
    def run(x, p, mask):
        def total(x, p):
            y = ggem_pool(x, p, mask=mask, **variant)
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(total, (0, 1), has_aux=True)(x, p)

    (_, y), (gx, gp) = run(x, p, mask & some[:, None])
    np.testing.assert_array_equal(y[1], np.zeros(8))
    np.testing.assert_array_equal(gx[1], np.zeros((6, 8)))
    (_, rest), (gx_rest, gp_rest) = run(x[some], p, mask[some])
    np.testing.assert_allclose(y[some], rest, rtol=1e-6)
    np.testing.assert_allclose(gx[some], gx_rest, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gp, gp_rest, rtol=1e-4, atol=1e-6)


@given(SEEDS, st.sampled_from([1e-6, 1.0, 100.0, 1e10, 1e30]), st.sampled_from([0.01, 1.0, 3.0, 20.0, 50.0]))
def test_nothing_overflows(seed, scale, exponent):
    x, p = np.float32(scale) * uniform(seed, low=-1.0, high=1.0), np.full(2, exponent, np.float32)
    value, slopes = jax.value_and_grad(lambda x, p: pool(x, p).mean(), (0, 1))(x, p)
    for leaf in (value, *slopes):
        assert np.isfinite(leaf).all()
    if exponent == 20.0 and scale == 100.0:
        with np.errstate(over="ignore"):
            assert np.isinf(np.float32(99) ** p).all()  # what the definition would do


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_hidden(bad):
    x = uniform(0)
    x[0, 2, 1] = bad
    got = np.isnan(pool(x, exponents(0, 4)))
    assert got[0, 1]
    assert got.sum() == 1


@given(SEEDS, GROUPS)
def test_bfloat16_tokens_are_pooled_in_float32_and_rounded_once(seed, groups):
    x, p = jnp.asarray(signs(seed), jnp.bfloat16), exponents(seed, groups)
    got = pool(x, p)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, pool(x.astype(jnp.float32), p).astype(jnp.bfloat16))
    slopes = jax.grad(lambda x, p: pool(x, p).sum().astype(jnp.float32), (0, 1))(x, p)
    assert [s.dtype for s in slopes] == [jnp.bfloat16, jnp.float32]


def test_vmap_and_leading_axes_are_the_same():
    x, p, mask = signs(0, (2, 3, 6, 8)), exponents(0, 4), some_tokens(0)
    got = pool(x, p, mask=np.stack([mask, mask]))
    np.testing.assert_allclose(jax.vmap(lambda x: ggem_pool(x, p, mask=mask))(x), got, rtol=1e-6)
    alone = jax.jit(jax.vmap(jax.vmap(lambda x, m: ggem_pool(x, p, mask=m))))(x, np.stack([mask, mask]))
    np.testing.assert_allclose(alone, got, rtol=1e-6)


@given(SEEDS)
def test_shift_pools_what_the_sample_exceeds_its_least_entry_by(seed):
    x, p = signs(seed), exponents(seed, 4)
    least = x.min((-2, -1), keepdims=True)
    np.testing.assert_allclose(pool(x, p, rectify="shift"), power_mean(x - least, p), rtol=1e-4)
    moved = x + uniform(seed, (3, 1, 1))
    np.testing.assert_allclose(pool(moved, p, rectify="shift"), pool(x, p, rectify="shift"), atol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(pool(x, p, rectify="shift"))))(x)
    np.testing.assert_allclose(slope.sum((-2, -1)), np.zeros(3), atol=1e-5)


def test_equal_least_entries_share_the_derivative_of_the_shift():
    x = jnp.array([[-1.0, 2.0], [-1.0, 5.0]])
    slope = jax.grad(lambda x: ggem_pool(x, jnp.array([1.0]), rectify="shift")[1])(x)
    np.testing.assert_allclose(slope, [[-0.5, 0.5], [-0.5, 0.5]], rtol=1e-6)


@given(SEEDS)
def test_softplus_pools_the_softplus(seed):
    x, p = signs(seed), exponents(seed, 4)
    expected = power_mean(np.logaddexp(x.astype(np.float64), 0), p)
    np.testing.assert_allclose(pool(x, p, rectify="softplus"), expected, rtol=1e-5)


@given(SEEDS)
def test_signed_pooling_is_odd_and_the_difference_of_both_parts(seed):
    x, p = signs(seed), exponents(seed, 4)
    got = pool(x, p, signed=True)
    np.testing.assert_allclose(got, power_mean(x, p) - power_mean(-x, p), atol=1e-5)
    np.testing.assert_array_equal(pool(-x, p, signed=True), -got)
