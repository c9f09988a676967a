"""Aggregators: monoid laws of all, and each against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.federated import (
    mixed,
    norm_bounded_mean,
    private_sum,
    secure_sum,
    sign_majority,
    stacked,
    trimmed_mean,
    weighted_mean,
)
from odjax.privacy import Clip

from .world import KEY, assert_close, assert_same

SHAPES = {"w": jax.ShapeDtypeStruct((3,), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.float32)}
COUNT = 5


class Plan:
    """Stands for a privacy plan: clips to 1, divides by 4, and adds no noise."""

    clip = Clip(1.0)
    unit = "user"

    def privatize(self, total, key, mask=None):
        return jax.tree.map(lambda x: x / 4, total)


AGGREGATORS = {
    "weighted_mean": weighted_mean(),
    "norm_bounded_mean": norm_bounded_mean(0.5),
    "private_sum": private_sum(Plan()),
    "sign_majority": sign_majority(),
    "trimmed_mean": trimmed_mean(0.25),
    "mixed": mixed(np.eye(COUNT)),
    "secure_sum": secure_sum(4.0),
    "stacked": stacked(lambda stack: stack.deltas),
}
# One object for equal arguments, so that programs are shared.
bounded, trimmed, secure = map(functools.cache, (norm_bounded_mean, trimmed_mean, secure_sum))
MATRIX = np.random.default_rng(0).normal(size=(COUNT, COUNT)).astype(np.float32)
RANDOM_MIX, EQUAL_MIX = mixed(MATRIX), mixed(np.full((COUNT, COUNT), 1 / COUNT))
ALL = pytest.mark.parametrize("name", AGGREGATORS)
WEIGHTS = st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=COUNT, max_size=COUNT)
SEEDS = st.integers(0, 20)


def deltas(seed, count=COUNT):
    random = np.random.default_rng(seed)
    return {
        "w": random.normal(size=(count, 3)).astype(np.float32),
        "b": random.normal(size=count).astype(np.float32),
    }


def observed(aggregator, deltas, weights, order, count=COUNT):
    """The state after some clients, in some order."""
    return _observed(
        aggregator, deltas, jnp.asarray(weights, jnp.float32), tuple(int(i) for i in order), count
    )


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _observed(aggregator, deltas, weights, order, count):
    statistic = aggregator.statistic(SHAPES, count)
    state = statistic.zero()
    for i in order:
        delta, _ = aggregator.lift(jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), deltas), None)
        state = statistic.observe(state, delta, weights[i], jnp.int32(i), jax.random.fold_in(KEY, i))
    return state


def finished(aggregator, deltas, weights, order=range(COUNT), mask=None, count=COUNT):
    return aggregator.finish(observed(aggregator, deltas, weights, order, count), KEY, mask)


@ALL
@given(seed=SEEDS, weights=WEIGHTS, split=st.sampled_from([0, 2, COUNT]))
def test_devices_that_share_the_clients_and_add_equal_one_that_sees_all(name, seed, weights, split):
    aggregator, own = AGGREGATORS[name], deltas(seed)
    statistic = aggregator.statistic(SHAPES, COUNT)
    order = [3, 0, 4, 1, 2]
    a, b = (
        observed(aggregator, own, weights, order[:split]),
        observed(aggregator, own, weights, order[split:]),
    )
    whole = observed(aggregator, own, weights, range(COUNT))
    assert_close(statistic.combine(a, b), whole)
    assert_same(statistic.combine(a, b), statistic.combine(b, a))
    assert_same(statistic.combine(a, statistic.zero()), a)
    assert statistic.additive
    assert_same(statistic.combine(a, b), jax.tree.map(jnp.add, a, b))


@ALL
@given(seed=SEEDS, weights=WEIGHTS, absent=st.sampled_from([0, 3]))
def test_a_client_of_weight_zero_has_no_influence(name, seed, weights, absent):
    aggregator, own = AGGREGATORS[name], deltas(seed)
    weights = [0.0 if i == absent else w for i, w in enumerate(weights)]
    without = finished(aggregator, own, weights, [i for i in range(COUNT) if i != absent])
    assert_same(finished(aggregator, own, weights), without)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(without))


@ALL
def test_a_mask_keeps_entries_out_of_the_update(name):
    aggregator, own = AGGREGATORS[name], deltas(0)
    if name in ("mixed", "stacked"):  # an update for every client
        mask = {"w": jnp.ones((COUNT, 3)).at[:, 1].set(0), "b": jnp.zeros(COUNT)}
    else:
        mask = {"w": jnp.array([1, 0, 1]), "b": jnp.array(0)}
    if name == "private_sum":  # the plan masks the noise; the sum is masked before
        delta, _ = aggregator.lift(jax.tree.map(lambda x: jnp.asarray(x[0]), own), mask)
        assert delta["w"][1] == delta["b"] == 0
        # the clip sees what takes part alone
        assert_close(delta["w"], own["w"][0] * [1, 0, 1] / max(1, np.linalg.norm(own["w"][0] * [1, 0, 1])))
        return
    update = finished(aggregator, own, [1.0] * COUNT, mask=mask)
    assert (np.asarray(update["w"])[..., 1] == 0).all()
    assert (np.asarray(update["b"]) == 0).all()
    assert (np.asarray(update["w"])[..., 0] != 0).any()


@given(seed=SEEDS, weights=WEIGHTS)
def test_the_weighted_mean_is_numpys(seed, weights):
    own, w = deltas(seed), np.array(weights)
    update = finished(AGGREGATORS["weighted_mean"], own, weights)
    expected = {
        k: (x * w.reshape(-1, *[1] * (x.ndim - 1))).sum(0) / max(w.sum(), 1e-9) for k, x in own.items()
    }
    assert_close(update, expected, atol=1e-5)


@given(seed=SEEDS, bound=st.sampled_from([0.1, 1.0, 100.0]))
def test_a_bounded_mean_scales_what_is_too_long(seed, bound):
    own = deltas(seed)
    norms = np.sqrt((own["w"] ** 2).sum(1) + own["b"] ** 2)
    scale = np.minimum(1, bound / norms)
    update = finished(bounded(bound), own, [1.0] * COUNT)
    assert_close(update["w"], (own["w"] * scale[:, None]).mean(0), atol=1e-5)
    _, figures = bounded(bound).lift(jax.tree.map(lambda x: jnp.asarray(x[0]), own), None)
    assert_close(figures["norm"][0], norms[0])
    assert bool(figures["clipped"][0]) == (norms[0] > bound)


@given(
    seed=SEEDS,
    present=st.lists(st.booleans(), min_size=COUNT, max_size=COUNT),
    trim=st.sampled_from([0, 0.2, 0.25, 0.4, 0.5]),
)
def test_trimmed_means_and_the_median_are_numpys(seed, present, trim):
    own = deltas(seed)
    update = finished(trimmed(trim), own, np.array(present, np.float32))
    there = np.sort(own["w"][np.array(present)], axis=0)
    if len(there) == 0:
        expected = np.zeros(3)
    elif trim == 0.5:
        expected = np.median(there, axis=0)
    else:
        cut = int(trim * len(there))
        expected = there[cut : len(there) - cut].mean(0)
    assert_close(update["w"], expected.astype(np.float32), atol=1e-5)


def test_a_trimmed_mean_bears_a_client_without_numbers():
    own = deltas(0)
    own["w"][2] = np.nan
    assert np.isfinite(finished(trimmed_mean(0.25), own, [1, 1, 1, 1, 0])["w"]).all()


@given(seed=SEEDS)
def test_the_majority_is_the_sign_of_the_weighted_votes(seed):
    own, w = deltas(seed), np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    update = finished(AGGREGATORS["sign_majority"], own, w)
    assert_same(update["b"], np.sign((np.sign(own["b"]) * w).sum()).astype(np.float32))


@given(seed=SEEDS)
def test_mixing_is_a_product_with_the_matrix(seed):
    own = deltas(seed)
    assert_close(finished(RANDOM_MIX, own, [1.0] * COUNT)["w"], MATRIX @ own["w"], atol=1e-5)
    equal = finished(EQUAL_MIX, own, [1.0] * COUNT)
    mean = finished(AGGREGATORS["weighted_mean"], own, [1.0] * COUNT)
    assert_close(equal, jax.tree.map(lambda x: np.broadcast_to(x, (COUNT, *x.shape)), mean), atol=1e-5)
    assert_same(finished(AGGREGATORS["mixed"], own, [1.0] * COUNT), own)


@given(seed=SEEDS)
def test_secure_sums_are_within_a_quantum_of_the_mean(seed):
    own = deltas(seed)
    update = finished(secure(2.0, 16), own, [1.0] * COUNT)
    expected = np.clip(own["w"], -2, 2).mean(0)
    assert np.abs(np.asarray(update["w"]) - expected).max() <= 2 / 2**15


def test_a_secure_sum_wraps_around_and_comes_back():
    # Any order of the partial sums, also beyond 2^31, gives the sum modulo 2^32: two clients may cancel late.
    statistic = secure_sum(1.0, 30).statistic({"b": SHAPES["b"]}, 2)
    big = statistic.zero()._replace(total={"b": jnp.int32(2**31 - 1)})
    one = statistic.observe(statistic.zero(), {"b": jnp.float32(1)}, jnp.float32(1), jnp.int32(0), KEY)
    less = statistic.observe(statistic.zero(), {"b": jnp.float32(-1)}, jnp.float32(1), jnp.int32(1), KEY)
    wrapped = statistic.combine(big, one)
    assert wrapped.total["b"] == -(2**31) + 2**29 - 1
    assert statistic.combine(wrapped, less).total["b"] == 2**31 - 1


def test_the_rounding_of_a_secure_sum_has_no_bias():
    statistic = secure_sum(1.0, 2).statistic({"b": SHAPES["b"]}, 1)
    keys = jax.random.split(KEY, 4000)
    totals = jax.vmap(
        lambda key: statistic.observe(
            statistic.zero(), {"b": jnp.float32(0.3)}, jnp.float32(1), jnp.int32(0), key
        )
    )(keys).total["b"]
    assert set(np.unique(totals)) == {0, 1}  # 0.3 is 0.6 of a quantum of 1/2
    assert abs(totals.mean() - 0.6) < 4 * np.sqrt(0.24 / 4000)


def test_secure_sums_take_what_is_no_number_for_zero_and_cut_the_rest():
    odd = {"w": np.array([[np.nan, np.inf, -np.inf]], np.float32), "b": np.zeros(1, np.float32)}
    update = finished(secure_sum(2.0), odd, [1.0], [0], count=1)
    np.testing.assert_array_equal(update["w"], [0, 2, -2])


@pytest.mark.parametrize("name", sorted({*AGGREGATORS} - {"secure_sum"}))  # which sums integers
def test_float64_deltas_are_summed_in_float64(name):
    with jax.enable_x64(True):
        shapes = {"w": jax.ShapeDtypeStruct((3,), jnp.float64)}
        statistic = AGGREGATORS[name].statistic(shapes, COUNT)
        delta, _ = AGGREGATORS[name].lift({"w": jnp.array([1e-9, 0, 0.25], jnp.float64)}, None)
        state = statistic.observe(statistic.zero(), delta, jnp.float32(1), jnp.int32(0), KEY)
        update = AGGREGATORS[name].finish(state, KEY, None)
        assert update["w"].dtype == jnp.float64
        if name in ("weighted_mean", "norm_bounded_mean"):
            np.testing.assert_array_equal(update["w"], [1e-9, 0, 0.25])


def test_small_deltas_of_bfloat16_are_not_lost_in_a_long_sum():
    statistic = weighted_mean().statistic({"b": jax.ShapeDtypeStruct((), jnp.bfloat16)}, 1)
    one = {"b": jnp.bfloat16(1)}

    def body(_, state):
        return statistic.observe(state, one, jnp.float32(1), jnp.int32(0), KEY)

    assert jax.lax.fori_loop(0, 1000, body, statistic.zero()).total["b"] == 1000  # in bfloat16 it ends at 256


def test_a_private_sum_carries_the_sensitivity_of_its_clip():
    aggregator = private_sum(Plan())
    assert (aggregator.sensitivity("add_or_remove_one"), aggregator.sensitivity("replace_one")) == (1.0, 2.0)
    assert aggregator.uniform
    assert aggregator.private


@pytest.mark.parametrize(
    "build, error, match",
    [
        (lambda: norm_bounded_mean(0), ValueError, "bound must be positive, got 0"),
        (lambda: trimmed_mean(0.6), ValueError, r"trim must be in \[0, 0.5\], got 0.6"),
        (lambda: mixed(np.ones((2, 3))), ValueError, r"must be \[clients, clients\], got \(2, 3\)"),
        (lambda: secure_sum(0.0), ValueError, "positive bound and 2 to 30 bits, got 0.0 and 16"),
        (lambda: secure_sum(1.0, 31), ValueError, "2 to 30 bits, got 1.0 and 31"),
        (
            lambda: secure_sum(1.0, 30).statistic(SHAPES, 5),
            ValueError,
            "5 clients of 30 bits do not fit into 32: use at most 28 bits",
        ),
        (
            lambda: private_sum(type("Records", (), {"clip": Clip(1.0), "unit": "record"})()),
            ValueError,
            "the plan is for records, and here the data of a client are one unit",
        ),
        (
            lambda: private_sum(type("NoPlan", (), {"clip": 1.0})()),
            TypeError,
            "declares no sensitivity: make it with odjax.privacy.Clip",
        ),
    ],
)
def test_bad_input_names_the_argument(build, error, match):
    with pytest.raises(error, match=match):
        build()
