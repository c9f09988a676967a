"""Class moments are sums: any cut, any device, any order; and an origin keeps the digits of tight classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core import ClassMoments, class_moments, reduce_over_axis, scan_over, vmap_over

P = jax.sharding.PartitionSpec
K, D = 3, 4
ORIGIN = np.random.default_rng(7).normal(size=(K, D)).astype(np.float32)
STATS = {"plain": class_moments(K, D), "origin": class_moments(K, D, origin=jnp.asarray(ORIGIN))}
seeds = st.integers(0, 10_000)

observe = jax.jit(lambda stat, state, *batch: stat.observe(state, *batch), static_argnums=0)
combine = jax.jit(lambda stat, a, b: stat.combine(a, b), static_argnums=0)
drive_jit = jax.jit(lambda drive, stat, batches: drive(stat, batches), static_argnums=(0, 1))


def rows(seed, n):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, n).astype(np.int32)
    features = (ORIGIN[labels] + rng.normal(size=(n, D))).astype(np.float32)
    return features, labels, rng.integers(0, 4, n).astype(np.float32)


def observed(stat, *batch):
    return observe(stat, stat.zero(), *map(jnp.asarray, batch))


def close(a, b, rtol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5), a, b)


def exact(features, labels, weights):
    """Count, mean and variance of every class by their definitions, in float64."""
    wide, count, mean, variance = features.astype(np.float64), [], [], []
    for k in range(K):
        h, w = wide[labels == k], weights[labels == k].astype(np.float64)
        count.append(w.sum())
        seen = w.sum() > 0
        mean.append(np.average(h, axis=0, weights=w) if seen else np.full(D, np.nan))
        variance.append(np.average(((h - mean[-1]) ** 2).sum(1), weights=w) if seen else np.float64(np.nan))
    return np.array(count), np.array(mean), np.array(variance)


@pytest.mark.parametrize("name", STATS)
@given(seeds)
def test_they_are_those_of_the_definitions_in_float64(name, seed):
    batch = rows(seed, 12)
    close(tuple(STATS[name].result(observed(STATS[name], *batch))), exact(*batch))


@pytest.mark.parametrize("name", STATS)
@given(seeds)
def test_combine_is_associative_commutative_and_zero_is_its_identity(name, seed):
    stat = STATS[name]
    a, b, c = (observed(stat, *rows(seed + i, 4 + i)) for i in range(3))
    left, right = combine(stat, combine(stat, a, b), c), combine(stat, a, combine(stat, b, c))
    close(stat.result(left), stat.result(right))
    jax.tree.map(np.testing.assert_array_equal, combine(stat, a, b), combine(stat, b, a))
    for same in (combine(stat, a, stat.zero()), combine(stat, stat.zero(), a)):
        jax.tree.map(np.testing.assert_array_equal, same, a)


@pytest.mark.parametrize("name", STATS)
@given(seeds, st.sampled_from([0, 1, 5, 12]))
def test_the_cut_between_batches_does_not_matter(name, seed, cut):
    stat = STATS[name]
    batch = rows(seed, 12)
    state = observe(stat, observed(stat, *(x[:cut] for x in batch)), *(x[cut:] for x in batch))
    close(stat.result(state), stat.result(observed(stat, *batch)))


@given(seeds)
def test_the_origin_changes_nothing_but_rounding(seed):
    batch = rows(seed, 12)
    plain, shifted = (stat.result(observed(stat, *batch)) for stat in STATS.values())
    close(plain, shifted)


def test_an_origin_for_all_classes_is_the_same_one_for_each():
    batch = rows(0, 12)
    each = class_moments(K, D, origin=jnp.broadcast_to(ORIGIN[:1], (K, D)))
    one = class_moments(K, D, origin=jnp.asarray(ORIGIN[0]))
    jax.tree.map(np.testing.assert_array_equal, observed(one, *batch), observed(each, *batch))


def test_the_means_of_a_first_pass_are_an_origin_even_when_a_class_was_empty():
    features, labels, weights = rows(1, 12)
    first = STATS["plain"]
    means = first.result(observed(first, features, labels, weights * (labels != 1))).mean
    assert np.isnan(means[1]).all()
    second = class_moments(K, D, origin=means)
    result = second.result(observed(second, features, labels, weights))
    close(tuple(result), exact(features, labels, weights))


@pytest.mark.parametrize(
    ("spread", "plain_error", "origin_error"), [(1, 1e-4, 5e-6), (0.1, 1e-2, 5e-6), (0.01, 1, 5e-6)]
)
def test_tight_classes_keep_their_variance_with_an_origin_and_lose_it_without(
    spread, plain_error, origin_error
):
    rng = np.random.default_rng(0)
    labels = np.arange(2048) % 2
    features = (10 + spread * rng.normal(size=(2048, 64))).astype(np.float32)
    wide = features.astype(np.float64)
    truth = np.array([wide[labels == k].var(axis=0).sum() for k in range(2)])

    def error(origin):
        stat = class_moments(2, 64, origin=origin)
        batches = (jnp.asarray(features).reshape(16, 128, 64), jnp.asarray(labels).reshape(16, 128))
        got = stat.result(drive_jit(scan_over, stat, batches)).variance
        return np.abs(np.asarray(got) / truth - 1).max()

    assert error(jnp.asarray(features[:2])) < origin_error
    assert plain_error / 100 < error(None) <= plain_error  # why there is an origin


def test_identical_rows_far_from_the_origin_have_no_negative_variance():
    stat = class_moments(1, 3)
    features = np.full((7, 3), 1234.567, np.float32)
    labels = np.zeros(7, np.int32)
    assert float(stat.result(observed(stat, features, labels)).variance[0]) >= 0
    near = class_moments(1, 3, origin=jnp.asarray(features[0]))
    assert float(near.result(observed(near, features, labels)).variance[0]) == 0


def test_a_small_example_in_closed_form():
    stat = class_moments(3, 2)
    features = jnp.array([[0.0, 0.0], [2.0, 4.0], [5.0, 6.0]])
    result = stat.result(
        stat.observe(stat.zero(), features, jnp.array([2, 2, 0]), jnp.array([1.0, 3.0, 2.0]))
    )
    np.testing.assert_array_equal(result.count, [2, 0, 4])
    np.testing.assert_array_equal(result.mean, [[5, 6], [np.nan, np.nan], [1.5, 3]])
    # Class 2: E||h||^2 - ||mu||^2 = 3/4 20 - (1.5^2 + 3^2).
    np.testing.assert_array_equal(result.variance, [0, np.nan, 15 - 11.25])


@pytest.mark.parametrize("name", STATS)
def test_traced_labels_outside_the_classes_count_nowhere(name):
    stat = STATS[name]
    features, labels, weights = rows(2, 8)
    wrong = np.array([-1, K, -K, 1000, -(2**31), 2**31 - 1, -2, K + 1], np.int32)
    state = observed(stat, np.concatenate([features, features]), np.concatenate([labels, wrong]))
    jax.tree.map(np.testing.assert_array_equal, state, observed(stat, features, labels))
    jax.tree.map(np.testing.assert_array_equal, observed(stat, features, wrong, weights), stat.zero())


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.uint32])
def test_labels_may_be_of_any_integer_type_even_one_too_narrow_for_the_classes(dtype):
    labels = np.array([0, 100, 127, 100], dtype)
    stat = class_moments(70_000, 1)
    state = observed(stat, np.ones((4, 1), np.float32), labels)
    assert float(state.count[100]) == 2
    assert float(state.count.sum()) == 4
    jax.tree.map(np.testing.assert_array_equal, stat.observe(stat.zero(), jnp.ones((4, 1)), labels), state)


def test_the_largest_unsigned_label_is_not_a_class():
    stat = class_moments(300, 1)
    state = observed(stat, np.ones((1, 1), np.float32), np.array([2**32 - 1], np.uint32))
    assert float(state.count.sum()) == 0


@pytest.mark.parametrize("name", STATS)
def test_rows_of_weight_zero_are_ignored_whatever_they_hold(name):
    stat = STATS[name]
    features, labels, _ = rows(3, 6)
    weights = np.array([0, 1, 1, 0, 2, 1], np.float32)
    padded = np.where(weights[:, None] > 0, features, np.nan)
    expected = observed(stat, features[weights > 0], labels[weights > 0], weights[weights > 0])
    jax.tree.map(np.testing.assert_array_equal, observed(stat, padded, labels, weights), expected)
    ignored = np.where(weights > 0, labels, -1)
    eager = stat.observe(stat.zero(), jnp.asarray(padded), ignored, weights)
    close(stat.result(eager), stat.result(expected))


def test_a_row_that_is_not_finite_spoils_its_own_class_alone():
    features, labels, _ = rows(4, 12)
    bad = features.copy()
    row = int(np.argmax(labels == 1))
    bad[row, 2] = np.nan
    stat = STATS["plain"]
    spoilt, clean = (stat.result(observed(stat, x, labels)) for x in (bad, features))
    assert np.isnan(spoilt.variance[1])
    assert np.isnan(spoilt.mean[1]).tolist() == [False, False, True, False]
    for k in (0, 2):
        close(jax.tree.map(lambda x, k=k: x[k], spoilt), jax.tree.map(lambda x, k=k: x[k], clean))


def test_nothing_observed_has_no_mean_and_no_variance():
    stat = STATS["origin"]
    empty = observed(stat, np.zeros((0, D), np.float32), np.zeros(0, np.int32))
    for state in (stat.zero(), empty):
        result = stat.result(state)
        assert not result.count.any()
        assert np.isnan(result.mean).all()
        assert np.isnan(result.variance).all()


def test_bfloat16_features_are_accumulated_in_float32():
    features, labels, weights = rows(5, 12)
    narrow = jnp.asarray(features, jnp.bfloat16)
    result = STATS["origin"].result(observed(STATS["origin"], narrow, labels, weights))
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(jnp.float32)}
    close(tuple(result), exact(np.asarray(narrow, np.float32), labels, weights))


def test_double_precision_is_accumulated_in_double_precision():
    with jax.enable_x64(True):
        features, labels, weights = rows(6, 12)
        wide = features.astype(np.float64) + 1e-9
        stat = class_moments(K, D, origin=jnp.asarray(wide[:K]), dtype=jnp.float64)
        result = stat.result(observed(stat, wide, labels.astype(np.int64), weights))
        assert result.mean.dtype == jnp.float64
        for got, expected in zip(result, exact(wide, labels, weights), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("drive", [scan_over, vmap_over])
@pytest.mark.parametrize("name", STATS)
def test_drivers_agree_with_one_big_batch(name, drive):
    stat = STATS[name]
    batch = rows(8, 20)
    batches = jax.tree.map(lambda x: x.reshape(5, 4, *x.shape[1:]), batch)
    close(stat.result(drive_jit(drive, stat, batches)), stat.result(observed(stat, *batch)))


@pytest.mark.parametrize("name", STATS)
def test_eight_devices_agree_with_one_by_a_psum(name):
    stat = STATS[name]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = rows(9, 32)

    def local(*rows):
        return reduce_over_axis(stat, stat.observe(stat.zero(), *rows), "data")

    over = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P()))
    close(stat.result(over(*batch)), stat.result(observed(stat, *batch)))
    assert "all_gather" not in str(jax.make_jaxpr(over)(*batch))


def test_no_array_has_a_row_for_each_example_and_a_column_for_each_class():
    stat = class_moments(1009, 5, origin=jnp.zeros((1009, 5)))
    program = jax.make_jaxpr(stat.observe)(stat.zero(), jnp.ones((37, 5)), jnp.zeros(37, jnp.int32))
    assert "37,5" in str(program)
    assert "37,1009" not in str(program)
    assert "1009,37" not in str(program)


def test_what_does_not_fit_is_named():
    stat = class_moments(K, D)
    x, y = jnp.ones((5, D)), jnp.zeros(5, jnp.int32)
    cases = [
        (ValueError, r"labels must be in \[0, 3\), got values from -1 to 2", (x, np.array([-1, 0, 1, 2, 0]))),
        (ValueError, r"got values from 0 to 3: give rows that do not count", (x, jnp.array([0, 3, 1, 2, 0]))),
        (TypeError, r"labels must be integers in \[0, 3\), got float32: use", (x, jnp.zeros(5))),
        (ValueError, r"one class a row, shape \(5,\), got \(5, 3\)", (x, jnp.zeros((5, 3), jnp.int32))),
        (ValueError, r"features must be \[n, 4\], got \(5, 2\)", (x[:, :2], y)),
        (ValueError, r"features must be \[n, 4\], got \(5, 1, 4\)", (x[:, None], y)),
        (ValueError, r"weights must have one number a row, shape \(5,\), got \(5, 1\)", (x, y, x[:, :1])),
    ]
    for error, message, batch in cases:
        with pytest.raises(error, match=message):
            stat.observe(stat.zero(), *batch)


def test_a_state_of_other_sizes_is_named_with_both():
    stat, other = class_moments(K, D), class_moments(K + 1, D).zero()
    assert isinstance(other, ClassMoments)
    message = r"class_moments\(3, 4\) has states with sums \(3, 4\), got one with \(4, 4\)"
    for call in (
        lambda: stat.combine(stat.zero(), other),
        lambda: stat.combine(other, stat.zero()),
        lambda: stat.observe(other, jnp.ones((1, D)), jnp.zeros(1, jnp.int32)),
        lambda: stat.result(other),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_sizes_origin_and_dtype_are_checked_when_it_is_built():
    with pytest.raises(TypeError, match=r"num_classes must be an int, got 3\.0"):
        class_moments(3.0, 4)
    with pytest.raises(TypeError, match=r"dim must be an int, got 4\.5"):
        class_moments(3, 4.5)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        class_moments(0, 4)
    with pytest.raises(ValueError, match=r"origin must be \(3, 4\) or \(4,\), got \(3,\)"):
        class_moments(3, 4, origin=jnp.zeros(3))
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got bfloat16"):
        class_moments(3, 4, dtype=jnp.bfloat16)
