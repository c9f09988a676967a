"""Cohorts are those that the accountants assume."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from odjax.privacy import fixed_sample, poisson_capacity, poisson_sample

RATES = st.sampled_from([1e-4, 0.01, 0.3, 0.9, 1.0])


@given(st.integers(0, 2**70), st.integers(0, 10**6), st.sampled_from([1, 7, 1000]), RATES)
def test_ids_are_ascending_distinct_members_padded_beyond_the_population(seed, round, population, rate):
    sample = poisson_sample(seed, round, population, rate, population)
    members = sample.ids[sample.mask]
    assert sample.ids.dtype == np.int64
    assert sample.mask.dtype == np.bool_
    assert sample.ids.shape == sample.mask.shape == (population,)
    assert (np.diff(members) > 0).all()
    assert ((members >= 0) & (members < population)).all()
    assert (sample.ids[~sample.mask] == population).all()
    assert sample.mask[: len(members)].all()


@given(st.integers(0, 2**40), st.integers(0, 100))
def test_a_cohort_is_a_function_of_seed_and_round(seed, round):
    for draw in (lambda s, r: poisson_sample(s, r, 500, 0.2, 400), lambda s, r: fixed_sample(s, r, 500, 100)):
        np.testing.assert_array_equal(draw(seed, round).ids, draw(seed, round).ids)
        assert not np.array_equal(draw(seed, round).ids, draw(seed, round + 1).ids)
        assert not np.array_equal(draw(seed, round).ids, draw(seed + 1, round).ids)


def test_seeds_and_rounds_beyond_32_bits_are_not_mixed_up():
    assert not np.array_equal(fixed_sample(2**32, 5, 10**6, 50).ids, fixed_sample(0, 5, 10**6, 50).ids)
    assert not np.array_equal(fixed_sample(0, 1 + 2**32, 10**6, 50).ids, fixed_sample(0, 1, 10**6, 50).ids)


def test_every_unit_joins_with_the_rate_and_independently_of_the_others():
    population, rate, rounds = 12, 0.3, 20_000
    joined = np.zeros((rounds, population))
    for r in range(rounds):
        sample = poisson_sample(1, r, population, rate, population)
        joined[r, sample.ids[sample.mask]] = 1
    # Six standard deviations of a mean, and of a product of two centred Bernoulli variables.
    spread = math.sqrt(rate * (1 - rate))
    assert np.abs(joined.mean(0) - rate).max() < 6 * spread / math.sqrt(rounds)
    covariance = np.cov(joined.T, bias=True)
    np.testing.assert_allclose(np.diag(covariance), rate * (1 - rate), atol=6 * 0.2 / math.sqrt(rounds))
    off = covariance[~np.eye(population, dtype=bool)]
    assert np.abs(off).max() < 6 * spread**2 / math.sqrt(rounds)


@pytest.mark.parametrize("population, rate", [(10**6, 1e-3), (10**9, 1e-6), (10**9, 1e-7)])
def test_the_size_of_a_cohort_is_binomial_for_large_populations(population, rate):
    mean = population * rate
    capacity = poisson_capacity(population, rate)
    sizes = [poisson_sample(3, r, population, rate, capacity).mask.sum() for r in range(400)]
    assert abs(np.mean(sizes) - mean) < 6 * math.sqrt(mean / 400)
    assert 0.7 < np.var(sizes) / (mean * (1 - rate)) < 1.4  # chi-square of 399, four standard deviations


def test_members_are_spread_evenly_over_a_large_population():
    ids = np.concatenate([(s := poisson_sample(5, r, 10**9, 1e-6, 1400)).ids[s.mask] for r in range(100)])
    counts = np.histogram(ids, bins=10, range=(0, 10**9))[0]
    expected = len(ids) / 10
    assert np.abs(counts - expected).max() < 6 * math.sqrt(expected)


def test_sampling_a_billion_units_takes_the_memory_of_the_cohort():
    poisson_sample(0, 0, 10**9, 1e-6, 1200)
    tracemalloc.start()
    poisson_sample(0, 1, 10**9, 1e-6, 1200)
    fixed_sample(0, 1, 10**9, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


def test_a_rate_of_one_takes_everybody():
    sample = poisson_sample(0, 0, 9, 1.0, 9)
    np.testing.assert_array_equal(sample.ids, np.arange(9))
    assert sample.mask.all()


def test_a_cohort_is_never_cut_off():
    sizes = [int(poisson_sample(0, r, 1000, 0.01, 1000).mask.sum()) for r in range(40)]
    r, size = int(np.argmax(sizes)), max(sizes)
    np.testing.assert_array_equal(
        poisson_sample(0, r, 1000, 0.01, size).ids, poisson_sample(0, r, 1000, 0.01, 1000).ids[:size]
    )
    with pytest.raises(ValueError, match="cutting some off would change the mechanism"):
        poisson_sample(0, r, 1000, 0.01, size - 1)


@pytest.mark.parametrize(
    ("population", "rate"), [(10**6, 5e-3), (10**4, 0.01), (1000, 1e-3), (10**6, 1e-6), (50, 0.5)]
)
def test_fewer_than_one_round_in_ten_to_the_ten_needs_more_than_the_capacity(population, rate):
    capacity = poisson_capacity(population, rate)
    assert binom.sf(capacity, population, rate) < 1e-10
    # And not many places more than that needs.
    assert capacity <= binom.isf(1e-10, population, rate) + 10 + 0.1 * rate * population


def test_the_capacity_is_that_of_bernsteins_inequality():
    # t = a + sqrt(a^2 + 6 a q N) with a = ln(10^10) / 3 = 7.675: 100 + 7.67 + 68.3.
    assert poisson_capacity(10_000, 0.01) == 176
    assert poisson_capacity(40, 0.9) == 40


@given(st.integers(0, 2**40), st.sampled_from([(1, 1), (10, 3), (10, 9), (10, 10), (10**9, 100)]))
def test_a_fixed_cohort_has_its_size_and_no_double(seed, shape):
    population, size = shape
    sample = fixed_sample(seed, 0, population, size)
    assert sample.mask.all()
    assert sample.ids.shape == (size,)
    assert (np.diff(sample.ids) > 0).all()
    assert sample.ids[0] >= 0
    assert sample.ids[-1] < population


@pytest.mark.parametrize("size", [2, 4])
def test_all_fixed_cohorts_are_equally_likely(size):
    rounds = 6000
    seen: dict[tuple, int] = {}
    for r in range(rounds):
        cohort = tuple(fixed_sample(2, r, 6, size).ids.tolist())
        seen[cohort] = seen.get(cohort, 0) + 1
    assert len(seen) == 15
    expected = rounds / 15
    assert sum((n - expected) ** 2 / expected for n in seen.values()) < 45  # chi-square of 14: p = 4e-5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: poisson_sample(0, 0, 10, 0.0, 5), r"rate must be a probability in \(0, 1\].*got 0.0"),
        (lambda: poisson_sample(0, 0, 10, 1.5, 5), "rate must be a probability"),
        (lambda: poisson_sample(0, 0, 10, float("nan"), 5), "rate must be a probability"),
        (lambda: poisson_sample(0, 0, 0, 0.5, 5), "population must be a whole number of at least 1, got 0"),
        (lambda: poisson_sample(0, 0, 10, 0.5, 0), "capacity must be a whole number of at least 1"),
        (lambda: poisson_sample(-1, 0, 10, 0.5, 5), "seed must be a whole number of at least 0"),
        (lambda: poisson_sample(0, 1.5, 10, 0.5, 5), "round must be a whole number"),
        (lambda: fixed_sample(0, 0, 10, 11), "size must be at most the population of 10, got 11"),
        (lambda: fixed_sample(0, 0, 10, 0), "size must be a whole number of at least 1"),
    ],
)
def test_bad_input_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
