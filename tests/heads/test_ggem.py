"""GGeM pooling: its theorems, its derivatives and what they keep, masks, meshes, the module, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.core import leaves_with_paths
from odjax.heads.ggem import RECTIFIERS, GGeM, ggem_pool

SEEDS = st.integers(0, 2**31)
GROUPS = st.sampled_from([1, 2, 4, 8])
VARIANTS = [*({"rectify": name} for name in RECTIFIERS), {"signed": True}]
pool = jax.jit(ggem_pool, static_argnames=("eps", "rectify", "signed", "axis_name"))


def uniform(seed, shape=(3, 6, 8), low=0.1, high=4.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def signs(seed, shape=(3, 6, 8)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def exponents(seed, groups, low=0.5, high=8.0):
    return uniform(seed + 1, (groups,), low, high)


def some_tokens(seed, shape=(3, 6)):
    """A mask that keeps at least one token of every sample."""
    rng = np.random.default_rng(seed + 2)
    mask = rng.random(shape) < 0.5
    mask[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = True
    return mask


def power_mean(x, p, eps=1e-6):
    """The definition, in float64."""
    r = np.maximum(np.asarray(x, np.float64), eps)
    p = np.repeat(np.asarray(p, np.float64), x.shape[-1] // len(p))
    return np.mean(r**p, axis=-2) ** (1 / p)


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


def kept_for_the_backward_pass(x, p, **options):
    """What the derivative at x and p holds on to and is no smaller than x."""
    pull = jax.eval_shape(lambda x, p: jax.vjp(functools.partial(ggem_pool, **options), x, p)[1], x, p)
    return [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= x.size]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_keeps_the_tokens_and_no_powers(variant, dtype):
    x, p = jnp.ones((4, 256, 16), dtype), jnp.full(4, 3.0)
    (kept,) = kept_for_the_backward_pass(x, p, **variant)
    assert (kept.shape, kept.dtype) == (x.shape, x.dtype)
    _, pull = jax.vjp(functools.partial(ggem_pool, **variant), x, p)
    assert any(leaf is x for leaf in jax.tree.leaves(pull))


def test_the_compiled_forward_pass_hands_the_tokens_and_no_powers_to_the_backward_pass():
    x, p = jnp.ones((4, 256, 16)), jnp.full(4, 3.0)

    def naive(x, p):
        r = jnp.maximum(x, 1e-6)
        q = jnp.repeat(p, 4)
        return jnp.mean(r ** q[None, None], axis=-2) ** (1 / q)[None]

    def handed_over(f):
        compiled = jax.jit(lambda x, p: jax.vjp(f, x, p)).lower(x, p).compile()
        return compiled.memory_analysis().output_size_in_bytes / x.nbytes

    assert 1 <= handed_over(ggem_pool) < 1.1
    assert handed_over(naive) > 3

    # The derivative as a whole: one array of powers at a time.
    def temporary(f):
        loss = jax.grad(lambda x, p: jnp.sum(f(x, p) ** 2), (0, 1))
        return jax.jit(loss).lower(x, p).compile().memory_analysis().temp_size_in_bytes / x.nbytes

    assert temporary(ggem_pool) < temporary(naive) / 2


SHARDED = [
    pytest.param(variant, masked, checked, id=f"{variant}-{'mask' if masked else 'whole'}-{checked}")
    for variant, masked, checked in [
        (VARIANTS[0], False, True),
        (VARIANTS[0], False, False),
        (VARIANTS[0], True, True),
        (VARIANTS[0], True, False),
        (VARIANTS[1], True, True),
        (VARIANTS[2], True, True),
        (VARIANTS[2], True, False),
        (VARIANTS[3], True, True),
    ]
]


@pytest.mark.parametrize("variant, masked, checked", SHARDED)
def test_tokens_sharded_over_a_sequence_axis_pool_like_whole_ones(variant, masked, checked):
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    x, p = signs(0, (4, 8, 8)), exponents(0, 4)
    # With two tokens a device, some devices have none that is kept.
    mask = some_tokens(0, (4, 8)) if masked else np.ones((4, 8), bool)
    mask[0, 2:] = not masked
    mask[0, 0] = True
    weights = signs(1, (4, 8))
    sharded = jax.shard_map(
        lambda x, p, mask: ggem_pool(x, p, mask=mask, axis_name="sequence", **variant),
        mesh=mesh,
        in_specs=(P("data", "sequence"), P(), P("data", "sequence")),
        out_specs=P("data"),
        check_vma=checked,
    )

    def run(f):
        loss = jax.value_and_grad(lambda x, p: jnp.sum(weights * f(x, p, mask)), (0, 1))
        return jax.jit(loss)(x, p)

    got = run(sharded)
    expected = run(lambda x, p, mask: ggem_pool(x, p, mask=mask, **variant))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_whole_groups_of_channels_on_a_device_need_no_collective():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x, p, layout = signs(0, (4, 6, 8)), exponents(0, 4), NamedSharding(mesh, P("data", None, "tensor"))
    run = jax.jit(
        ggem_pool,
        in_shardings=(layout, NamedSharding(mesh, P())),
        out_shardings=NamedSharding(mesh, P("data", "tensor")),
    )
    program = run.lower(x, p).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program
    np.testing.assert_allclose(run(x, p), pool(x, p), rtol=1e-6)


def test_the_module_is_the_function_with_a_parameter_p():
    x, mask = signs(0), some_tokens(0)
    module = GGeM(4, p_init=2.0, rectify="softplus")
    variables = module.init(jax.random.key(0), x)
    box = variables["params"]["p"]
    assert isinstance(box, nn.LogicallyPartitioned)
    assert box.names == (None,)
    np.testing.assert_array_equal(box.value, np.full(4, 2.0, np.float32))
    p = exponents(0, 4)
    got = jax.jit(module.apply)({"params": {"p": p}}, x, mask=mask, cls=x[:, 0])
    np.testing.assert_array_equal(got, pool(x, p, mask=mask, rectify="softplus"))


def test_fixed_exponents_are_no_parameters_and_tokens_still_get_gradients():
    x, module = signs(0), GGeM(4, p_init=2.0, learnable=False)
    assert not jax.tree.leaves(module.init(jax.random.key(0), x))
    p = np.full(4, 2.0, np.float32)
    np.testing.assert_array_equal(module.apply({}, x), pool(x, p))
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(module.apply({}, x))))(x)
    np.testing.assert_array_equal(slope, jax.grad(lambda x: jnp.sum(jnp.sin(pool(x, p))))(x))


@pytest.mark.parametrize("start", [-1e6, -1.0, 0.0, 0.009])
def test_an_exponent_below_the_least_counts_as_the_least_and_comes_back(start):
    x, module = uniform(0), GGeM(2)
    run = jax.jit(lambda p: module.apply({"params": {"p": p}}, x))
    low = jnp.full(2, start)
    np.testing.assert_array_equal(run(low), run(jnp.full(2, 0.01)))
    slope = jax.jit(jax.grad(lambda p: -jnp.sum(module.apply({"params": {"p": p}}, x))))
    np.testing.assert_array_equal(slope(low), slope(jnp.full(2, 0.01)))
    assert (slope(low) < 0).all()  # descent raises them


def test_trained_exponents_find_those_that_made_the_targets():
    x, made = uniform(0, (16, 6, 8)), np.array([1.0, 6.0], np.float32)
    module, targets = GGeM(2), pool(x, made)

    @jax.jit
    def descend(p):
        def step(p, _):
            return p - 20.0 * jax.grad(
                lambda p: jnp.mean((module.apply({"params": {"p": p}}, x) - targets) ** 2)
            )(p), None

        return jax.lax.scan(step, p, length=300)[0]

    np.testing.assert_allclose(descend(jnp.full(2, 3.0)), made, rtol=1e-2)
    # Also from where all powers are the least one.
    np.testing.assert_allclose(descend(jnp.full(2, -0.5)), made, rtol=1e-2)


def test_the_result_has_the_dtype_of_the_module_and_parameters_stay_float32():
    x = jnp.asarray(signs(0), jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):
        module = GGeM(4, dtype=dtype)
        got, variables = module.init_with_output(jax.random.key(0), x)
        assert got.dtype == dtype
        assert {leaf.dtype for _, leaf in leaves_with_paths(variables)} == {jnp.dtype(jnp.float32)}
        wide = pool(x.astype(jnp.float32), np.full(4, 3.0, np.float32))
        np.testing.assert_array_equal(got, wide.astype(dtype))


X, P4 = np.ones((2, 3, 8), np.float32), np.full(4, 3.0, np.float32)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X, np.ones(3, np.float32)), {}, ValueError, "8 channels are not a multiple of 3 groups"),
        (
            (X, np.float32(3)),
            {},
            ValueError,
            r"p must be floating point \[groups\], got float32 of shape \(\)",
        ),
        ((X, np.ones(4, np.int32)), {}, ValueError, r"got int32 of shape \(4,\): write jnp.full"),
        ((X, jnp.array([1.0, 0.0])), {}, ValueError, "exponents must be positive, got p = "),
        ((X, jnp.array([jnp.nan])), {}, ValueError, "exponents must be positive"),
        ((X[:, :0], P4), {}, ValueError, r"with N at least 1, got shape \(2, 0, 8\)"),
        ((X[0, 0], P4), {}, ValueError, r"tokens must be \[..., N, D\] with N at least 1, got shape \(8,\)"),
        ((X.astype(np.int32), P4), {}, TypeError, r"got int32: tokens.astype\(jnp.float32\)"),
        ((X, P4), {"eps": 0.0}, ValueError, r"eps must be positive .*, got 0.0: take eps=1e-6"),
        ((X, P4), {"eps": -1.0}, ValueError, "eps must be positive"),
        ((X, P4), {"rectify": "relu"}, ValueError, "one of clamp, softplus, shift, got 'relu'"),
        (
            (X, P4),
            {"rectify": "shift", "signed": True},
            ValueError,
            "needs rectify='clamp', got rectify='shift'",
        ),
        ((X, P4), {"mask": jnp.ones((2, 4), bool)}, ValueError, r"here \(2, 3\), got \(2, 4\)"),
        ((X, P4), {"mask": jnp.ones((2, 3))}, TypeError, "mask must be bool, got float32: .* mask != 0"),
        (
            (X, P4),
            {"mask": jnp.array([[True] * 3, [False] * 3])},
            ValueError,
            "mask has no token for 1 of 2 samples: leave those samples out",
        ),
    ],
)
def test_what_cannot_be_pooled_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ggem_pool(*arguments, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
        ({"num_groups": 4, "p_init": 0.0}, "p_init must be positive and at least p_min 0.01, got 0.0"),
        ({"num_groups": 4, "p_init": -3.0}, "p_init must be positive"),
        ({"num_groups": 4, "p_min": 0.0}, "p_min must be positive, got 0.0"),
        ({"num_groups": 4, "eps": 0.0}, "eps must be positive"),
        ({"num_groups": 4, "rectify": "abs"}, "one of clamp, softplus, shift, got 'abs'"),
        ({"num_groups": 4, "rectify": "shift", "signed": True}, "needs rectify='clamp'"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        GGeM(**options)


def test_channels_that_the_groups_do_not_divide_are_refused_by_the_module():
    with pytest.raises(ValueError, match="8 channels are not a multiple of 3 groups: take as many groups"):
        GGeM(3).init(jax.random.key(0), X)
