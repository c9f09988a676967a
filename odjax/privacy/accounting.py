"""What a run spends: epsilon of T rounds of the subsampled Gaussian mechanism.

All of it is float64 on the host. The accountants "pld" and "rdp" are those of the package dp-accounting;
"moments" is written out here and needs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from odjax.privacy.clipping import check_relation
from odjax.privacy.sampling import check_rate, check_whole

ACCOUNTANTS = ("pld", "rdp", "moments")
"""Privacy loss distributions (the tightest), Renyi divergences of dp-accounting's orders, and of 2 to 256."""

_ORDERS = np.arange(2, 257)
_INTERVAL = 1e-4  # of dp-accounting's discretized privacy loss
COARSE = "pld with wide intervals"  # ten times faster, finds where to look
_STEPS = 2e6  # most intervals up to epsilon before they are made wider (still an upper bound)
_ABSURD = 1e5  # an epsilon that no discretization is worth
LEAST = 1e-3  # noise multipliers below count as none


def _package() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ValueError(
            "accountant='pld' and 'rdp' need the package dp-accounting: pip install 'odjax[privacy]', or "
            "take accountant='moments', which is looser and needs nothing"
        ) from error
    return dp_accounting


@contextlib.contextmanager
def _no_warnings_of_orders() -> Iterator[None]:
    """Keeps dp-accounting from logging a line for every fractional order that it leaves out."""

    def other(record: logging.LogRecord) -> bool:
        return "failed to converge" not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _log_sum_exp(terms: np.ndarray) -> np.ndarray:
    most = terms.max(axis=-1)
    return most + np.log(np.exp(terms - most[..., None]).sum(axis=-1))


def renyi_divergences(noise_multiplier: float, rate: float, orders: np.ndarray = _ORDERS) -> np.ndarray:
    """Renyi divergence of one round of the Poisson-sampled Gaussian mechanism, at integer orders a.

      rho(a) = 1 / (a - 1) log sum_{k=0..a} C(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 z^2)),

    and a / (2 z^2) for q = 1.

    Args:
      noise_multiplier: z > 0.
      rate: q in (0, 1].
      orders: whole numbers of at least 2.

    Returns:
      float64, one number an order.

    Source: I. Mironov, K. Talwar and L. Zhang, Renyi Differential Privacy of the Sampled Gaussian Mechanism,
      arXiv 1908.10530, Section 3.3.

    Example:
      >>> renyi_divergences(2.0, 1.0, np.array([2, 8]))
      array([0.25, 1.  ])
    """
    orders = np.asarray(orders)
    if rate == 1:
        return orders / (2.0 * noise_multiplier**2)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, orders.max() + 1)))])
    a, k = orders[:, None], np.arange(orders.max() + 1)[None]
    rest = np.maximum(a - k, 0)
    terms = (
        log_factorial[a]
        - log_factorial[k]
        - log_factorial[rest]
        + rest * math.log1p(-rate)
        + k * math.log(rate)
        + k * (k - 1) / (2.0 * noise_multiplier**2)
    )
    return np.maximum(_log_sum_exp(np.where(k <= a, terms, -np.inf)) / (orders - 1), 0.0)


def _moments_epsilon(noise_multiplier: float, rate: float, rounds: int, delta: float) -> float:
    # eps = min_a [T rho(a) + log(1 - 1/a) - log(delta a) / (a - 1)], arXiv 2004.00010, Proposition 12;
    # 0 where delta^2 > 1 - exp(-T rho), the bound by the Kullback-Leibler divergence.
    total = rounds * renyi_divergences(noise_multiplier, rate)
    epsilon = total + np.log1p(-1.0 / _ORDERS) - np.log(delta * _ORDERS) / (_ORDERS - 1)
    epsilon = np.where(delta**2 + np.expm1(-total) > 0, 0.0, epsilon)
    return max(0.0, float(epsilon.min()))


def _package_epsilon(
    noise_multiplier: float, rate: float, rounds: int, delta: float, accountant: str, relation: str
) -> float:
    package = _package()
    gaussian = package.GaussianDpEvent(noise_multiplier)
    if relation == "replace_one":
        share = Fraction(rate).limit_denominator(10**12)
        event = package.SampledWithoutReplacementDpEvent(share.denominator, share.numerator, gaussian)
        counter = package.rdp.RdpAccountant(neighboring_relation=package.NeighboringRelation.REPLACE_ONE)
    else:
        event = package.PoissonSampledDpEvent(rate, gaussian)
        bound = _moments_epsilon(noise_multiplier, rate, rounds, delta)
        if accountant == "rdp" or bound > _ABSURD:
            counter = package.rdp.RdpAccountant()
        else:
            width = max(_INTERVAL * (10 if accountant == COARSE else 1), bound / _STEPS)
            counter = package.pld.PLDAccountant(value_discretization_interval=width)
    with _no_warnings_of_orders():
        counter.compose(package.SelfComposedDpEvent(event, rounds))
        return float(counter.get_epsilon(delta))


@functools.lru_cache(maxsize=4096)
def cached_epsilon(
    noise_multiplier: float, rate: float, rounds: int, delta: float, accountant: str, relation: str
) -> float:
    """`epsilon_of` for numbers that were checked."""
    if rounds == 0:
        return 0.0
    if noise_multiplier < LEAST:
        return math.inf
    if accountant == "moments":
        return _moments_epsilon(noise_multiplier, rate, rounds, delta)
    return _package_epsilon(noise_multiplier, rate, rounds, delta, accountant, relation)


def check_delta(delta: float) -> float:
    """Makes sure that delta is in (0, 1).

    Args:
      delta: what came.

    Returns:
      delta as a Python float.

    Raises:
      ValueError: it is not.
    """
    if isinstance(delta, bool) or not isinstance(delta, int | float | np.number) or not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), below 1 / population, got {delta!r}")
    return float(delta)


def check_epsilon(epsilon: float) -> float:
    """Makes sure that a budget is a finite number above 0.

    Args:
      epsilon: what came.

    Returns:
      epsilon as a Python float.

    Raises:
      ValueError: it is not.
    """
    number = isinstance(epsilon, int | float | np.number) and not isinstance(epsilon, bool)
    if not number or not 0 < epsilon < math.inf:
        raise ValueError(
            f"epsilon must be a finite number above 0, got {epsilon!r}; a run without privacy is "
            f"noise_multiplier=0"
        )
    return float(epsilon)


def check_accountant(accountant: str, relation: str) -> None:
    """Makes sure that an accountant counts what a neighbouring relation and its sampling ask for.

    Args:
      accountant: "pld", "rdp" or "moments".
      relation: "add_or_remove_one" (Poisson sampling) or "replace_one" (cohorts of fixed size).

    Raises:
      ValueError: an unknown name, or an accountant that cannot count cohorts of fixed size.
    """
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be 'pld', 'rdp' or 'moments', got {accountant!r}")
    if check_relation(relation) == "replace_one" and accountant != "rdp":
        raise ValueError(
            f"accountant={accountant!r} counts Poisson sampling, not cohorts of fixed size: only 'rdp' knows "
            f"sampling without replacement; type accountant='rdp', or sampling='poisson'"
        )


def epsilon_of(
    noise_multiplier: float,
    rate: float,
    rounds: int,
    delta: float,
    accountant: str = "pld",
    relation: str = "add_or_remove_one",
) -> float:
    """The epsilon that T rounds of the subsampled Gaussian mechanism spend at a delta.

    The relation says the sampling too: "add_or_remove_one" is Poisson sampling, "replace_one" a cohort of
    fixed size drawn without replacement (accountant "rdp" only). The noise multiplier is the standard
    deviation over the sensitivity under that relation: C or 2 C for contributions of norm C.

    "pld" is the tightest; its discretization is pessimistic, and is made wider than the package's default
    where epsilon is in the hundreds. Results are cached.

    Args:
      noise_multiplier: z >= 0.
      rate: q in (0, 1], cohort / population.
      rounds: T >= 0.
      delta: in (0, 1).
      accountant: "pld", "rdp", or "moments": integer orders 2 to 256.
      relation: "add_or_remove_one" or "replace_one".

    Returns:
      epsilon; 0 for no round, inf for z below 0.001.

    Raises:
      ValueError: a number outside its range, an accountant that cannot count the relation, or dp-accounting
        is missing.

    Source: I. Mironov, K. Talwar and L. Zhang, arXiv 1908.10530 (Renyi); A. Koskela, J. Jalko and A. Honkela,
      arXiv 1906.03049, and V. Doroshenko et al., arXiv 2207.04380 (privacy loss distributions); Y. Wang,
      B. Balle and S. Kasiviswanathan, arXiv 1808.00087, Theorem 27 (fixed size).

    Example:
      >>> round(epsilon_of(1.0, 0.01, 1000, 1e-5, accountant="moments"), 4)
      2.1078
    """
    if isinstance(noise_multiplier, bool) or not isinstance(noise_multiplier, int | float | np.number):
        raise ValueError(f"noise_multiplier must be a number of at least 0, got {noise_multiplier!r}")
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be a finite number of at least 0, got {noise_multiplier!r}")
    check_accountant(accountant, relation)
    rate, rounds, delta = check_rate(rate), check_whole("rounds", rounds, 0), check_delta(delta)
    return cached_epsilon(float(noise_multiplier), rate, rounds, delta, accountant, relation)
