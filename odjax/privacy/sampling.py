"""Who takes part in a round: the samplings that the accountants assume, drawn on the host.

A cohort is a function of (seed, round), drawn from raw words of the Philox generator, so that neither the
process nor a release of NumPy changes it. Memory is that of the cohort, whatever the population.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

_POISSON, _FIXED = 0, 1  # the streams of one (seed, round)


class Sample(NamedTuple):
    """A cohort in arrays of fixed size.

    Attributes:
      ids: int64 [capacity], ascending; a padded place holds the size of the population, one beyond the last
        unit, so that a scatter with `mode="drop"` writes nothing there.
      mask: bool [capacity], True where a unit takes part.
    """

    ids: np.ndarray
    mask: np.ndarray


def check_whole(name: str, value: object, low: int) -> int:
    """Makes sure that an argument is a whole number of at least `low`.

    Args:
      name: the argument's name for the error.
      value: what came.
      low: the least value that is allowed.

    Returns:
      The number as a Python int.

    Raises:
      ValueError: it is no whole number, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
    return int(value)


def check_rate(rate: float) -> float:
    """Makes sure that a sampling rate is a probability above 0.

    Args:
      rate: what came.

    Returns:
      The rate as a Python float.

    Raises:
      ValueError: it is not in (0, 1].
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not 0 < rate <= 1:
        raise ValueError(f"rate must be a probability in (0, 1], cohort / population, got {rate!r}")
    return float(rate)


def _words(seed: int, round: int, stream: int) -> np.random.Philox:
    seed, round = check_whole("seed", seed, 0), check_whole("round", round, 0)
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=(stream, round)))


def poisson_capacity(population: int, rate: float) -> int:
    """Places for a Poisson cohort; fewer than one round in 10^10 needs more, and then the sampler raises.

    By Bernstein's inequality P(K >= q N + t) <= exp(-t^2 / (2 q N + 2 t / 3)); that is q N and about 7
    times its root for large cohorts, and 16 places more for small ones.

    Args:
      population: N, the number of units.
      rate: q, the probability with which a unit joins.

    Returns:
      The capacity, at least 1.

    Raises:
      ValueError: a population below 1 or a rate outside (0, 1].

    Example:
      >>> poisson_capacity(1_000_000, 0.005)
      5488
    """
    population, rate = check_whole("population", population, 1), check_rate(rate)
    mean, third = rate * population, 10 * math.log(10) / 3
    return min(population, math.ceil(mean + third + math.sqrt(third**2 + 6 * third * mean)))


def poisson_sample(seed: int, round: int, population: int, rate: float, capacity: int) -> Sample:
    """Lets every unit join by itself with probability `rate` (Poisson sampling).

    The gaps between the units that join are geometric, floor(log U / log(1 - q)) + 1, so time and memory are
    those of the cohort. U has 53 bits; the probabilities are exact to its rounding.

    The guarantee of a subsampled mechanism is against who does not know who took part: keep the seed secret.

    Args:
      seed: of the run, at least 0.
      round: the number of the round, at least 0.
      population: N, the number of units; they are 0 .. N - 1.
      rate: q in (0, 1].
      capacity: places of the result, such as `poisson_capacity(population, rate)`.

    Returns:
      A `Sample` of `capacity` places.

    Raises:
      ValueError: an argument outside its range, or more units join than there are places. They are never
        cut off: that would be another mechanism than the one the accountant counts.

    Example:
      >>> poisson_sample(0, 3, population=10, rate=0.3, capacity=6).mask.sum() <= 6
      np.True_
      >>> poisson_sample(0, 3, population=4, rate=1.0, capacity=4).ids
      array([0, 1, 2, 3])
    """
    population, capacity = check_whole("population", population, 1), check_whole("capacity", capacity, 1)
    rate, source = check_rate(rate), _words(seed, round, _POISSON)
    count = min(capacity + 1, population)
    if rate == 1:
        gaps = np.ones(count, np.int64)
    else:
        uniform = ((source.random_raw(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        # A gap beyond the population ends the cohort, whatever its size.
        gaps = (
            np.minimum(np.floor(np.log(uniform) / math.log1p(-rate)), float(population)).astype(np.int64) + 1
        )
    ids = np.cumsum(gaps) - 1
    ids = ids[ids < population]
    if len(ids) > capacity:
        raise ValueError(
            f"more than capacity={capacity} units joined round {round} (rate {rate:g} of {population}, "
            f"{rate * population:g} expected): cutting some off would change the mechanism and its epsilon; "
            f"give more places, poisson_capacity(population, rate) is {poisson_capacity(population, rate)}"
        )
    return _padded(ids, capacity, population)


def _padded(ids: np.ndarray, capacity: int, population: int) -> Sample:
    places = np.full(capacity, population, np.int64)
    places[: len(ids)] = ids
    return Sample(places, np.arange(capacity) < len(ids))


def _distinct(source: np.random.Philox, population: int, size: int) -> np.ndarray:
    """The first `size` different values of a stream of uniform integers: a uniform subset, ascending."""
    limit = (2**64 // population) * population  # words beyond it would favour small remainders
    found = np.empty(0, np.int64)
    while len(found) < size:
        words = source.random_raw(size + 16)
        if limit < 2**64:
            words = words[words < np.uint64(limit)]
        found = np.concatenate([found, (words % np.uint64(population)).astype(np.int64)])
        _, first = np.unique(found, return_index=True)
        found = found[np.sort(first)]
    return np.sort(found[:size])


def fixed_sample(seed: int, round: int, population: int, size: int) -> Sample:
    """Draws a cohort of exactly `size` units, all subsets equally likely.

    Another mechanism than Poisson sampling, with another guarantee: see `privacy_plan(sampling="fixed")`.

    Args:
      seed: of the run, at least 0.
      round: the number of the round, at least 0.
      population: N, the number of units; they are 0 .. N - 1.
      size: of the cohort, at most N.

    Returns:
      A `Sample` of `size` places, all taken.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> fixed_sample(0, 0, population=1_000_000_000, size=3).mask
      array([ True,  True,  True])
    """
    population, size = check_whole("population", population, 1), check_whole("size", size, 1)
    if size > population:
        raise ValueError(f"size must be at most the population of {population}, got {size}")
    source = _words(seed, round, _FIXED)
    if 2 * size <= population:
        ids = _distinct(source, population, size)
    else:
        absent = _distinct(source, population, population - size)
        ids = np.setdiff1d(np.arange(population), absent, assume_unique=True)
    return _padded(ids, size, population)
