"""The order of the data: permutations and random bits from (seed, index)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax_train.data.examples import Examples
from odjax_train.data.shuffle import key_of, mix, permute


@given(size=st.integers(1, 2000), seed=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_of_the_range(size, seed):
    out = permute(np.arange(size), size, key_of(seed))
    assert sorted(out.tolist()) == list(range(size))


@given(size=st.integers(2, 2**61), seed=st.integers(0, 2**32), start=st.integers(0, 2**61))
def test_permute_of_a_huge_range_stays_inside_and_is_injective(size, seed, start):
    index = (start + np.arange(min(size, 64))) % size
    out = permute(index, size, key_of(seed))
    assert ((out >= 0) & (out < size)).all()
    assert np.unique(out).size == index.size


@given(seed=st.integers(0, 2**32), cut=st.integers(1, 99))
def test_permute_of_parts_is_the_part_of_the_permutation(seed, cut):
    index = np.arange(100)
    whole = permute(index, 100, key_of(seed))
    np.testing.assert_array_equal(permute(index[cut:], 100, key_of(seed)), whole[cut:])
    np.testing.assert_array_equal(permute(index, 100, np.repeat(key_of(seed), 100)), whole)


@pytest.mark.parametrize("size", [2, 3, 5, 10])
def test_every_place_is_equally_likely_over_seeds(size):
    seeds = np.arange(20000)
    for index in range(size):
        out = permute(np.full(seeds.size, index), size, key_of(seeds))
        counts = np.bincount(out, minlength=size)
        # Binomial(20000, 1/size): five standard deviations.
        expected = seeds.size / size
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * (1 - 1 / size))


def test_neighbours_are_not_kept_together():
    out = permute(np.arange(10000), 10000, key_of(3))
    # A random permutation has about two pairs of neighbours that stay neighbours.
    assert (np.abs(np.diff(out)) == 1).sum() < 15
    # Spearman's correlation of a random permutation: standard deviation 0.01.
    assert abs(np.corrcoef(out, np.arange(10000))[0, 1]) < 0.05


def test_mix_is_splitmix64():
    # The first outputs of SplitMix64 from the state 0 are the finalizer of the multiples of its increment.
    states = (np.arange(1, 4, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    assert [hex(int(x)) for x in mix(states)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_seed_and_epoch_do_not_play_into_each_other():
    keys = [int(key_of(seed, epoch)[0]) for seed in range(50) for epoch in range(50)]
    assert len(set(keys)) == 2500


def _numbers(size, seed):
    return Examples(lambda rows, draws: {"row": rows, "draw": draws}, size, seed=seed)


@given(size=st.integers(1, 40), seed=st.integers(0, 1000), epoch=st.integers(0, 5))
def test_each_example_comes_once_per_epoch(size, seed, epoch):
    rows = _numbers(size, seed).take(epoch * size + np.arange(size))["row"]
    assert sorted(rows.tolist()) == list(range(size))


def test_epochs_are_shuffled_differently():
    dataset = _numbers(100, seed=0)
    first, second = (dataset.take(epoch * 100 + np.arange(100))["row"] for epoch in (0, 1))
    assert (first != second).sum() > 80


@given(seed=st.integers(0, 100), start=st.integers(0, 500), count=st.integers(1, 20))
def test_one_at_a_time_equals_many_at_once(seed, start, count):
    dataset = _numbers(37, seed)
    many = dataset.take(start + np.arange(count))
    for place in range(count):
        one = dataset[start + place]
        assert one["row"] == many["row"][place]
        assert one["draw"] == many["draw"][place]


def test_draws_differ_between_epochs_of_the_same_example():
    dataset = _numbers(50, seed=1)
    both = dataset.take(np.arange(100))
    assert np.unique(both["draw"]).size == 100


def test_without_a_seed_the_order_is_that_of_the_source_and_ends():
    dataset = _numbers(5, None)
    assert len(dataset) == 5
    assert [int(dataset[i]["row"]) for i in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError, match="example 5 of 5"):
        dataset[5]


def test_examples_are_a_grain_dataset():
    dataset = _numbers(6, seed=2).map(lambda example: int(example["row"])).batch(3)
    expected = _numbers(6, seed=2).take(np.arange(6))["row"].reshape(2, 3)
    np.testing.assert_array_equal(np.stack([dataset[0], dataset[1]]), expected)
