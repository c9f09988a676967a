"""Statistics are monoids: however the batches are cut and wherever they are combined, the answer is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core.statistics import (
    Moments,
    Statistic,
    moments,
    product,
    reduce_over_axis,
    scan_over,
    vmap_over,
    weighted_mean,
)

P = jax.sharding.PartitionSpec
STATS = {"moments": moments((3,)), "weighted-mean": weighted_mean((3,))}
seeds = st.integers(0, 10_000)


def rows(seed, n):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 3)) * [1, 10, 0.1] + [0, 100, -5]).astype(np.float32)
    return x, rng.integers(0, 4, n).astype(np.float32)


observe = jax.jit(lambda stat, state, x, w: stat.observe(state, x, w), static_argnums=0)
combine = jax.jit(lambda stat, a, b: stat.combine(a, b), static_argnums=0)
drive_jit = jax.jit(lambda drive, stat, batches: drive(stat, batches), static_argnums=(0, 1))


def observed(stat, x, w):
    return observe(stat, stat.zero(), np.asarray(x), np.asarray(w, np.float32))


def close(a, b, rtol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5), a, b)


@pytest.mark.parametrize("name", STATS)
@given(seeds)
def test_combine_is_associative_commutative_and_zero_is_its_identity(name, seed):
    stat = STATS[name]
    a, b, c = (observed(stat, *rows(seed + i, 4 + i)) for i in range(3))
    left, right = combine(stat, combine(stat, a, b), c), combine(stat, a, combine(stat, b, c))
    close(stat.result(left), stat.result(right))
    close(stat.result(combine(stat, a, b)), stat.result(combine(stat, b, a)))
    for same in (combine(stat, a, stat.zero()), combine(stat, stat.zero(), a)):
        jax.tree.map(np.testing.assert_array_equal, same, a)


@pytest.mark.parametrize("name", STATS)
@given(seeds, st.sampled_from([0, 1, 5, 12]))
def test_the_cut_between_batches_does_not_matter(name, seed, cut):
    stat = STATS[name]
    x, w = rows(seed, 12)
    state = observe(stat, observed(stat, x[:cut], w[:cut]), x[cut:], w[cut:])
    close(stat.result(state), stat.result(observed(stat, x, w)))


@given(seeds)
def test_moments_are_those_of_numpy_in_float64(seed):
    x, w = rows(seed, 20)
    w[0] = 1
    stat = STATS["moments"]
    got = stat.result(drive_jit(scan_over, stat, (x.reshape(5, 4, 3), w.reshape(5, 4))))
    wide = x.astype(np.float64)
    mean = np.average(wide, axis=0, weights=w)
    assert float(got.count) == w.sum()
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.variance, np.average((wide - mean) ** 2, axis=0, weights=w), rtol=2e-5)


@pytest.mark.parametrize("drive", [scan_over, vmap_over])
def test_variance_survives_a_mean_a_million_times_larger(drive):
    rng = np.random.default_rng(0)
    x = (1e4 + 1e-2 * rng.normal(size=4096)).astype(np.float32)
    truth = x.astype(np.float64)
    stat = moments()
    got = jax.jit(lambda x: stat.result(drive(stat, (x,))))(x.reshape(64, 64))
    # Deviations from the first row of a batch are exact, so only sums of 64 terms and 6 to 64 merges round.
    np.testing.assert_allclose(float(got.variance), truth.var(), rtol=1e-4)
    np.testing.assert_allclose(float(got.mean), truth.mean(), rtol=2**-24)
    naive = np.float32(np.mean(x * x, dtype=np.float32)) - np.float32(np.mean(x, dtype=np.float32)) ** 2
    assert abs(naive - truth.var()) > 0.5 * truth.var()  # the textbook formula would fail this test


def test_moments_of_a_small_example_in_closed_form():
    stat = moments(ddof=1)
    state = stat.combine(
        stat.observe(stat.zero(), jnp.array([1.0, 2.0])), stat.observe(stat.zero(), jnp.array([6.0]))
    )
    assert [float(v) for v in stat.result(state)] == [3.0, 3.0, 7.0]
    assert isinstance(state, Moments)


def test_integer_weights_are_repetitions():
    x, w = rows(3, 10)
    stat = STATS["moments"]
    close(
        stat.result(observed(stat, x, w)),
        stat.result(observed(stat, np.repeat(x, w.astype(int), 0), np.ones(int(w.sum())))),
    )


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("name", STATS)
def test_scan_and_vmap_agree_for_any_number_of_batches(name, count):
    stat = STATS[name]
    x, w = rows(count, 4 * count)
    batches = (x.reshape(count, 4, 3), w.reshape(count, 4))
    tree, line = drive_jit(vmap_over, stat, batches), drive_jit(scan_over, stat, batches)
    close(stat.result(tree), stat.result(line))


def test_no_batches_give_zero():
    stat = STATS["moments"]
    empty = (jnp.zeros((0, 4, 3)), jnp.zeros((0, 4)))
    for drive in (scan_over, vmap_over):
        jax.tree.map(np.testing.assert_array_equal, drive_jit(drive, stat, empty), stat.zero())


@pytest.mark.parametrize("axes", [("x",), ("x", "y")], ids=["one-axis", "two-axes"])
@pytest.mark.parametrize("name", [*STATS, "product"])
def test_eight_devices_agree_with_one(name, axes):
    stat = product(a=STATS["moments"], b=STATS["weighted-mean"]) if name == "product" else STATS[name]
    sizes = (8,) if len(axes) == 1 else (4, 2)
    mesh = jax.make_mesh(sizes, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    x, w = rows(9, 64)

    def local(x, w):
        return reduce_over_axis(stat, stat.observe(stat.zero(), x, w), axes)

    reduced = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=P(), check_vma=False))(x, w)
    close(stat.result(reduced), stat.result(observed(stat, x, w)))


def test_an_additive_statistic_is_one_psum_and_the_others_gather():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def primitives(stat):
        def local(x):
            return reduce_over_axis(stat, stat.observe(stat.zero(), x), "x")

        sharded = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False)
        return str(jax.make_jaxpr(sharded)(jnp.ones((8, 3))))

    assert "all_gather" not in primitives(STATS["weighted-mean"])
    assert "psum" in primitives(STATS["weighted-mean"])
    assert "all_gather" in primitives(STATS["moments"])


def test_a_product_is_additive_only_when_all_are():
    assert product(a=weighted_mean(), b=weighted_mean()).additive
    assert not product(a=weighted_mean(), b=moments()).additive
    with pytest.raises(ValueError, match="at least one statistic"):
        product()


@pytest.mark.parametrize("name", STATS)
def test_rows_of_weight_zero_are_ignored_whatever_they_hold(name):
    stat = STATS[name]
    x, _ = rows(1, 6)
    w = np.array([0, 1, 1, 0, 2, 1], np.float32)
    padded = x.copy()
    padded[w == 0] = np.nan
    jax.tree.map(
        np.testing.assert_array_equal,
        observed(stat, padded, w),
        observed(stat, np.where(w[:, None] > 0, x, 0), w),
    )


def test_nothing_observed_has_no_mean():
    for stat in STATS.values():
        for state in (stat.zero(), observed(stat, np.ones((4, 3), np.float32), np.zeros(4))):
            result = stat.result(state)
            assert np.isnan(result.mean if isinstance(result, tuple) else result).all()
    assert np.isnan(moments().result(moments().zero()).variance)
    one = moments(ddof=1)
    assert np.isnan(one.result(one.observe(one.zero(), jnp.ones(1))).variance)


def test_bfloat16_observations_are_accumulated_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 3)), jnp.bfloat16)
    got = STATS["moments"].result(STATS["moments"].observe(STATS["moments"].zero(), x))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(got.variance, np.asarray(x, np.float64).var(0), rtol=1e-5)


def test_wrong_shapes_are_named():
    stat = moments((3,))
    with pytest.raises(ValueError, match=r"observations of shape \(3,\), got a batch \(4, 2\)"):
        stat.observe(stat.zero(), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"weights must have one number a row, shape \(4,\), got \(3,\)"):
        stat.observe(stat.zero(), jnp.ones((4, 3)), jnp.ones(3))
    with pytest.raises(ValueError, match="share one leading axis"):
        scan_over(stat, (jnp.ones((2, 4, 3)), jnp.ones((3, 4))))


def test_a_statistic_of_ones_own_is_four_functions():
    largest = Statistic(
        lambda: jnp.float32(-jnp.inf), lambda s, x: jnp.maximum(s, x.max()), jnp.maximum, lambda s: s
    )
    batches = (jnp.arange(12.0).reshape(3, 4),)
    assert float(scan_over(largest, batches)) == float(vmap_over(largest, batches)) == 11
