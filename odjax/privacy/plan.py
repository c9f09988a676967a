"""One object for a private run: the cohorts, the clip, the noise, and the epsilon that is theirs."""

from __future__ import annotations

import math
import numbers
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from odjax.privacy import accounting, budget
from odjax.privacy.clipping import Clip
from odjax.privacy.forecast import PrivacyForecast
from odjax.privacy.noise import Draw, release, sensitivity_of, standard_deviation
from odjax.privacy.sampling import (
    Sample,
    check_rate,
    check_whole,
    fixed_sample,
    poisson_capacity,
    poisson_sample,
)

_RELATION = {"poisson": "add_or_remove_one", "fixed": "replace_one"}


class Guarantee(NamedTuple):
    """What a run promises: (epsilon, delta)-differential privacy.

    Attributes:
      epsilon: of all its rounds together.
      delta: the probability that is left out.
      unit: whose data are protected, all of them at once.
      relation: what two neighbouring populations differ in.
    """

    epsilon: float
    delta: float
    unit: str
    relation: str


@dataclass(frozen=True)
class PrivacyPlan:
    """A subsampled Gaussian mechanism, T times: what runs and what is counted are the same numbers.

    A round is `sample`, then for every member `clip`, the sum over all members and devices, and `privatize`,
    once. The members count alike: no weights. Made by `privacy_plan`, which calibrates; built by hand it is
    checked all the same.

    Attributes:
      population: N units.
      rate: q in (0, 1], the share that takes part in a round.
      clip: called as `clip(tree) -> (clipped tree, norm)`, declares `sensitivity(relation) -> float`.
      noise_multiplier: z >= 0, the standard deviation of the noise over the sensitivity.
      rounds: T >= 1.
      delta: in (0, 1), below 1 / N.
      sampling: "poisson", or "fixed" for cohorts of exactly q N.
      accountant: "pld", "rdp" or "moments".
      unit: whose contribution the clip bounds, for people to read: "user", "record".

    Raises:
      ValueError: a number outside its range, or parts that do not go together.
      TypeError: the clip declares no sensitivity.
    """

    population: int
    rate: float
    clip: Any
    noise_multiplier: float
    rounds: int
    delta: float
    sampling: str = "poisson"
    accountant: str = "pld"
    unit: str = "user"

    def __post_init__(self) -> None:
        """Checks that the parts go together."""
        check_whole("population", self.population, 1)
        check_whole("rounds", self.rounds, 1)
        check_rate(self.rate)
        accounting.check_delta(self.delta)
        _check_sampling(self.sampling, self.accountant)
        standard_deviation(self.clip, self.noise_multiplier, self.relation)
        if self.sampling == "fixed" and abs(self.normalizer - round(self.normalizer)) > 1e-6:
            raise ValueError(
                f"sampling='fixed' needs a whole cohort, rate * population is {self.normalizer:g}: give "
                f"privacy_plan a whole number as cohort"
            )
        if self.noise_multiplier > 0 and self.delta >= 1 / self.population:
            warnings.warn(
                f"delta={self.delta:g} is not below 1 / population = {1 / self.population:g}: releasing all "
                f"data of one {self.unit} would satisfy it",
                stacklevel=3,
            )
        if 0 < self.noise_multiplier < 0.3:
            warnings.warn(
                f"noise_multiplier={self.noise_multiplier:g} is below 0.3: such noise hides next to nothing; "
                f"see plan.epsilon()",
                stacklevel=3,
            )

    @property
    def relation(self) -> str:
        """The neighbouring relation: "add_or_remove_one" (Poisson) or "replace_one" (fixed)."""
        return _RELATION[self.sampling]

    @property
    def normalizer(self) -> float:
        """What the sum is divided by: q N, fixed, never the size of the cohort that came."""
        return self.rate * self.population

    @property
    def capacity(self) -> int:
        """Places of a sample: all that arrays of a round need."""
        if self.sampling == "fixed":
            return round(self.normalizer)
        return poisson_capacity(self.population, self.rate)

    @property
    def guarantee(self) -> Guarantee:
        """What a run of all rounds promises."""
        return Guarantee(self.epsilon(), self.delta, self.unit, self.relation)

    def epsilon(self, rounds: int | None = None) -> float:
        """The epsilon that is spent after so many rounds.

        Args:
          rounds: their number, at least 0; None: all of the plan.

        Returns:
          epsilon at the plan's delta; 0 for no round, inf without noise.
        """
        rounds = self.rounds if rounds is None else rounds
        return accounting.epsilon_of(
            self.noise_multiplier, self.rate, rounds, self.delta, self.accountant, self.relation
        )

    def rounds_within(self, epsilon: float) -> int:
        """The largest number of rounds, more than the plan's perhaps, that spends at most a budget.

        Args:
          epsilon: the budget, at least 0.

        Returns:
          The number of rounds.
        """
        return budget.rounds_within(
            epsilon, self.noise_multiplier, self.rate, self.delta, self.accountant, self.relation
        )

    def sample(self, seed: int, round: int) -> Sample:
        """The cohort of a round.

        Args:
          seed: of the run; whoever knows it knows who took part.
          round: its number, at least 0.

        Returns:
          ids int64 [capacity], ascending and padded with N, and mask bool [capacity].

        Raises:
          ValueError: more units joined than there are places.
        """
        if self.sampling == "fixed":
            return fixed_sample(seed, round, self.population, self.capacity)
        return poisson_sample(seed, round, self.population, self.rate, self.capacity)

    def sensitivity(self) -> float:
        """How far one unit moves the sum of clipped contributions, in L2 norm."""
        return sensitivity_of(self.clip, self.relation)

    def privatize(
        self, total: Any, key: jax.Array, mask: Any = None, *, draw: Draw = jax.random.normal
    ) -> Any:
        """(total + noise) / (q N): the release of a round.

        Args:
          total: the sum of clipped contributions, over all devices; each of weight 1, 0 for padding.
          key: a typed key of this round, used for nothing else.
          mask: a tree of 0 and 1, each leaf broadcastable to that of `total`: where it is 0 nothing is
            released, whatever the sum holds there, and the result is exactly 0. It must not depend on the
            data.
          draw: another source of standard normal noise.

        Returns:
          A tree like `total`.

        Raises:
          TypeError: the key is no typed one, or a leaf is no real float.
          ValueError: a mask of another structure or shape.
        """
        return release(
            self.clip,
            self.noise_multiplier,
            key,
            total,
            normalizer=self.normalizer,
            relation=self.relation,
            mask=mask,
            draw=draw,
        )

    def forecast(self, cohort: float, population: int | None = None) -> PrivacyForecast:
        """The simulation of this plan with fewer units a round: a prediction of accuracy, not private.

        Args:
          cohort: c, the expected number of units a round, at most that of the plan.
          population: units that there are to simulate with; None for the plan's N.

        Returns:
          A `PrivacyForecast` with the methods of a plan.

        Raises:
          ValueError: a cohort that is not above 0 or larger than the plan's.
        """
        return PrivacyForecast(self, cohort, population)

    def __str__(self) -> str:
        """One line: what is promised to whom, and by which numbers."""
        epsilon = self.epsilon()
        promise = "not private" if math.isinf(epsilon) else f"epsilon {epsilon:.4g}, delta {self.delta:g}"
        return (
            f"{promise} for one {self.unit} ({self.relation}): z {self.noise_multiplier:.4g}, "
            f"{self.sampling} q {self.rate:.4g} of {self.population:,}, {self.rounds:,} rounds, "
            f"{self.accountant}"
        )


def _check_sampling(sampling: str, accountant: str) -> None:
    if sampling not in _RELATION:
        raise ValueError(f"sampling must be 'poisson' or 'fixed', got {sampling!r}")
    accounting.check_accountant(accountant, _RELATION[sampling])


def privacy_plan(
    *,
    population: int,
    cohort: float,
    clip: Any,
    rounds: int,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    sampling: str = "poisson",
    accountant: str = "pld",
    unit: str = "user",
) -> PrivacyPlan:
    """Plans a private run: the noise for a budget, or the budget of a noise.

    Args:
      population: N, the number of units.
      cohort: C, the expected number of units a round (the exact one for sampling="fixed"); q = C / N.
      clip: a `Clip`, its norm as a number, or an object that is called and declares its sensitivity alike.
      rounds: T >= 1.
      delta: in (0, 1), below 1 / N.
      epsilon: the budget; the noise is calibrated to it. Or
      noise_multiplier: z. Exactly one of the two.
      sampling: "poisson": every unit joins with probability q; neighbours differ by one unit more or less.
        "fixed": C units without replacement; neighbours differ by one unit that is another, so the
        sensitivity is 2 C; accountant="rdp" only.
      accountant: "pld" (tightest), "rdp", or "moments" (needs no package).
      unit: whose contribution the clip bounds: "user", "record".

    Returns:
      A `PrivacyPlan`.

    Raises:
      ValueError: a number outside its range, or parts that do not go together.
      TypeError: the clip declares no sensitivity.

    Example:
      >>> import jax.numpy as jnp
      >>> plan = privacy_plan(population=100_000, cohort=1000, clip=0.5, rounds=1000, delta=1e-6,
      ...                     epsilon=2.0, accountant="moments")
      >>> print(plan)  # doctest: +NORMALIZE_WHITESPACE
      epsilon 2, delta 1e-06 for one user (add_or_remove_one): z 1.096, poisson q 0.01 of 100,000,
      1,000 rounds, moments
      >>> sample = plan.sample(seed=0, round=0)
      >>> total = {"w": jnp.zeros(3)}  # of plan.clip(update)[0] over the members
      >>> plan.privatize(total, jax.random.key(0))["w"].shape, plan.capacity
      ((3,), 1223)
    """
    population = check_whole("population", population, 1)
    number = isinstance(cohort, int | float | np.number) and not isinstance(cohort, bool)
    if not number or not 0 < cohort <= population:
        raise ValueError(f"cohort must be above 0 and at most the population of {population}, got {cohort!r}")
    if sampling == "fixed" and cohort != round(cohort):
        raise ValueError(f"sampling='fixed' needs a whole number as cohort, got {cohort!r}")
    if (epsilon is None) == (noise_multiplier is None):
        raise ValueError(
            f"give exactly one of epsilon (the noise is calibrated) and noise_multiplier (epsilon follows), "
            f"got epsilon={epsilon!r} and noise_multiplier={noise_multiplier!r}"
        )
    _check_sampling(sampling, accountant)
    clip = Clip(clip) if isinstance(clip, numbers.Real) else clip
    sensitivity = sensitivity_of(clip, _RELATION[sampling])
    rate = float(cohort) / population
    if epsilon is not None:
        if math.isinf(sensitivity):
            raise ValueError(
                f"no noise gives epsilon={epsilon!r} to contributions without bound: {clip!r} must have a "
                f"finite norm"
            )
        noise_multiplier = budget.calibrate(rate, rounds, epsilon, delta, accountant, _RELATION[sampling])
    return PrivacyPlan(
        population, rate, clip, float(noise_multiplier), rounds, float(delta), sampling, accountant, unit
    )
