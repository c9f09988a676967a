"""Average precision: scikit-learn's values, ties and gaps included, and the same in any batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from odjax.core.average_precision import average_precision, average_precision_over

compiled = jax.jit(average_precision)


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 5, 100]))
def test_it_is_that_of_scikit_learn_with_ties_and_with_gaps(seed, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-levels, levels, 12) / 4
    labels, observed = rng.integers(0, 2, 12), rng.random(12) < 0.8
    labels[0], observed[0] = 1, True
    found = compiled(jnp.asarray(scores, jnp.float32), jnp.asarray(labels), jnp.asarray(observed))
    expected = average_precision_score(labels[observed], scores[observed])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_values_by_hand():
    labels = jnp.array([1, 0, 1, 0])
    np.testing.assert_allclose(average_precision(jnp.array([4.0, 3.0, 2.0, 1.0]), labels), (1 + 2 / 3) / 2)
    np.testing.assert_allclose(average_precision(jnp.array([4.0, 1.0, 4.0, 0.0]), labels), 1)
    np.testing.assert_allclose(average_precision(jnp.zeros(4), labels), 0.5)
    # The first two are tied: both positives have the precision at the end of their score.
    np.testing.assert_allclose(
        average_precision(jnp.array([3.0, 3.0, 2.0, 1.0]), labels), (1 / 2 + 2 / 3) / 2
    )
    assert average_precision(jnp.array([-jnp.inf, jnp.inf]), jnp.array([1, 0])) == 0.5


def test_it_depends_on_the_order_of_the_scores_alone():
    scores, labels = jax.random.normal(jax.random.key(0), (3, 20)), jnp.arange(60).reshape(3, 20) % 3 == 0
    value = average_precision(scores, labels)
    assert value.shape == (3,)
    np.testing.assert_array_equal(average_precision(jnp.exp(3 * scores), labels), value)
    np.testing.assert_array_equal(average_precision(scores[:, ::-1], labels[:, ::-1]), value)
    one = [average_precision(scores[i], labels[i]) for i in range(3)]
    np.testing.assert_array_equal(jnp.stack(one), value)


def test_it_is_float64_for_float64_and_float32_for_bfloat16():
    with jax.enable_x64(True):
        scores, labels = np.random.default_rng(0).normal(size=50), np.arange(50) % 4 == 0
        found = average_precision(jnp.asarray(scores, jnp.float64), jnp.asarray(labels))
        np.testing.assert_allclose(found, average_precision_score(labels, scores), rtol=1e-14)
    low = average_precision(jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([1, 1]))
    assert low.dtype == jnp.float32


def test_what_has_no_average_precision_is_nan():
    scores = jnp.array([1.0, jnp.nan])
    assert jnp.isnan(average_precision(jnp.ones(2), jnp.zeros(2)))
    assert jnp.isnan(average_precision(scores, jnp.array([1, 0])))
    assert average_precision(scores, jnp.array([1, 0]), jnp.array([True, False])) == 1
    assert jnp.isnan(average_precision(jnp.ones(2), jnp.ones(2), jnp.zeros(2, bool)))


@given(st.integers(0, 10**6))
def test_batches_with_padding_give_the_value_of_all_rows(seed):
    rng = np.random.default_rng(seed)
    scores = jnp.asarray(rng.integers(-3, 3, (12, 2)) / 2, jnp.float32)
    labels = jnp.asarray(rng.integers(-1, 2, (12, 2)))
    weights = jnp.asarray(rng.integers(0, 2, 12), jnp.float32)
    stat = average_precision_over(12, 2)
    state = stat.zero()
    for i in range(0, 12, 4):
        state = stat.observe(state, scores[i : i + 4], labels[i : i + 4], weights[i : i + 4])
    observed = (labels >= 0) & (weights != 0)[:, None]
    expected = average_precision(scores.T, (labels == 1).T, observed.T)
    np.testing.assert_allclose(stat.result(state), expected, rtol=1e-6)
    assert state.count == weights.sum()


def test_more_rows_than_there_is_room_for_give_nan_and_never_a_wrong_value():
    stat = average_precision_over(3, 1)
    two = stat.observe(stat.zero(), jnp.ones((2, 1)), jnp.ones((2, 1)))
    assert stat.result(two) == 1
    assert jnp.isnan(stat.result(stat.combine(two, two)))
    assert jnp.isnan(stat.result(stat.observe(two, jnp.ones((2, 1)), jnp.ones((2, 1)))))


def test_arguments_that_make_no_sense_are_named():
    with pytest.raises(TypeError, match="scores must be floating point, got int32"):
        average_precision(jnp.arange(3), jnp.arange(3))
    with pytest.raises(ValueError, match=r"must be \[..., N\], N at least 1, got \(3,\) and \(2,\)"):
        average_precision(jnp.ones(3), jnp.ones(2))
    with pytest.raises(TypeError, match="observed must be bool, got float32"):
        average_precision(jnp.ones(3), jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"observed must have the shape of scores \(3,\), got \(2,\)"):
        average_precision(jnp.ones(3), jnp.ones(3), jnp.ones(2, bool))
    with pytest.raises(ValueError, match="capacity and columns must be at least 1, got 0 and 2"):
        average_precision_over(0, 2)
    stat = average_precision_over(3, 2)
    with pytest.raises(ValueError, match=r"must be \[n, 2\], got \(1, 3\) and \(1, 3\)"):
        stat.observe(stat.zero(), jnp.ones((1, 3)), jnp.ones((1, 3)))
