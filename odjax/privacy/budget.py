"""What a budget buys: the least noise for a number of rounds, the most rounds for a noise."""

from __future__ import annotations

import functools
import math

from odjax.privacy.accounting import (
    COARSE,
    LEAST,
    cached_epsilon,
    check_accountant,
    check_delta,
    check_epsilon,
    epsilon_of,
)
from odjax.privacy.sampling import check_rate, check_whole

MOST_ROUNDS = 10**9
"""`rounds_within` looks no further."""


def _guess(low: float, high: float, low_value: float, high_value: float, target: float) -> float:
    """Where a power law through two points has the target, kept off the ends; else the geometric middle."""
    if not (0 < low_value < math.inf and 0 < high_value < math.inf) or low_value == high_value:
        return math.sqrt(low * high)
    share = math.log(low_value / target) / math.log(low_value / high_value)
    return low * (high / low) ** min(max(share, 0.02), 0.98)


@functools.lru_cache(maxsize=1024)
def _calibrate(
    rate: float, rounds: int, epsilon: float, delta: float, accountant: str, relation: str
) -> float:
    # A looser accountant, which costs next to nothing, says where to look.
    rough = {"pld": COARSE, COARSE: "moments", "rdp": "moments"}.get(accountant)
    start, factor = 1.0, 2.0
    if rough is not None:
        start = _calibrate(rate, rounds, epsilon, delta, rough, "add_or_remove_one")
        factor = 1.001 if rough == COARSE else 1.25

    def spent(z: float) -> float:
        return cached_epsilon(z, rate, rounds, delta, accountant, relation)

    low = high = start
    low_value = high_value = spent(start)
    while high_value > epsilon:
        if high > 1e9:
            raise ValueError(
                f"no noise proves epsilon={epsilon:g} at delta={delta:g} by accountant={accountant!r}: take "
                f"a larger epsilon, or accountant='pld'"
            )
        low, low_value = high, high_value
        high, factor = high * factor, factor**2
        high_value = spent(high)
    while low_value <= epsilon and low >= LEAST:
        high, high_value = low, low_value
        low, factor = low / factor, factor**2
        low_value = spent(low)
    close = 1e-4 * min(1.0, epsilon)
    for step in range(200):
        if epsilon - high_value <= close or high / low - 1 < 1e-10:
            break
        # A power law is nearly right; the middle every third time bounds the number of evaluations.
        aim = epsilon - close / 2
        middle = math.sqrt(low * high) if step % 3 == 2 else _guess(low, high, low_value, high_value, aim)
        value = spent(middle)
        if value <= epsilon:
            high, high_value = middle, value
        else:
            low, low_value = middle, value
    return high


def calibrate(
    rate: float,
    rounds: int,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
) -> float:
    """The smallest noise multiplier with which T rounds spend at most epsilon.

    Args:
      rate: q in (0, 1], cohort / population.
      rounds: T >= 1.
      epsilon: the budget, above 0.
      delta: in (0, 1).
      accountant: "pld", "rdp" or "moments".
      relation: "add_or_remove_one" or "replace_one".

    Returns:
      z, on the safe side: `epsilon_of(z, ...)` is at most epsilon, and below it by at most 1e-4 times the
      smaller of epsilon and 1 (unless less than no noise at all would do).

    Raises:
      ValueError: a number outside its range, an accountant that cannot count the relation, a budget that the
        accountant can prove for no noise, or dp-accounting is missing.

    Example:
      >>> z = calibrate(0.01, 1000, 2.1078, 1e-5, accountant="moments")
      >>> round(z, 3)
      1.0
    """
    check_accountant(accountant, relation)
    rate, rounds, delta = check_rate(rate), check_whole("rounds", rounds, 1), check_delta(delta)
    return _calibrate(rate, rounds, check_epsilon(epsilon), delta, accountant, relation)


def rounds_within(
    epsilon: float,
    noise_multiplier: float,
    rate: float,
    delta: float,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
) -> int:
    """The largest number of rounds whose epsilon stays within a budget.

    Args:
      epsilon: the budget, at least 0.
      noise_multiplier: z >= 0.
      rate: q in (0, 1].
      delta: in (0, 1).
      accountant: "pld", "rdp" or "moments".
      relation: "add_or_remove_one" or "replace_one".

    Returns:
      The number; 0 where one round is too much, at most `MOST_ROUNDS`.

    Raises:
      ValueError: as `epsilon_of`.

    Example:
      >>> rounds_within(2.1079, 1.0, 0.01, 1e-5, accountant="moments")
      1000
    """
    if epsilon == 0:
        return 0
    epsilon = check_epsilon(epsilon)

    epsilon_of(noise_multiplier, rate, 0, delta, accountant, relation)  # checks the numbers
    low, factor = 0, 4.0
    if accountant == "pld":
        low, factor = _rounds(epsilon, noise_multiplier, rate, delta, COARSE, relation, 0, 4.0), 1.0005
    return _rounds(epsilon, noise_multiplier, rate, delta, accountant, relation, low, factor)


def _rounds(
    epsilon: float,
    noise_multiplier: float,
    rate: float,
    delta: float,
    accountant: str,
    relation: str,
    start: int,
    factor: float,
) -> int:
    def spent(rounds: int) -> float:
        return cached_epsilon(float(noise_multiplier), float(rate), rounds, delta, accountant, relation)

    low, low_value = start, spent(start)
    high, high_value = low, low_value
    while low_value > epsilon:  # ends at 0
        high, high_value = low, low_value
        low, factor = min(low - 1, int(low / factor)), factor**2
        low_value = spent(low)
    while high_value <= epsilon:
        if high >= MOST_ROUNDS:
            return MOST_ROUNDS
        low, low_value = high, high_value
        high, factor = min(max(high + 1, int(high * factor)), MOST_ROUNDS), min(factor**2, 4.0)
        high_value = spent(high)
    step = 0
    while high - low > 1:
        middle = (low + high) // 2
        if step % 3 < 2 and low > 0:
            middle = min(max(round(_guess(low, high, low_value, high_value, epsilon)), low + 1), high - 1)
        value = spent(middle)
        if value <= epsilon:
            low, low_value = middle, value
        else:
            high, high_value = middle, value
        step += 1
    return low
