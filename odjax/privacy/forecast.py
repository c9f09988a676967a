"""A large private deployment simulated with small cohorts: it predicts accuracy and promises nothing."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from odjax.privacy.noise import Draw, release
from odjax.privacy.sampling import Sample, check_whole, fixed_sample, poisson_capacity, poisson_sample

if TYPE_CHECKING:
    from odjax.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class PrivacyForecast:
    """A plan of cohorts of C, simulated with c units a round: it predicts accuracy and promises nothing.

    The sum of c clipped contributions gets noise of z c / C times the sensitivity and is divided by c, so the
    noise on the mean is z / C times the sensitivity, as in the run that is predicted.

    Attributes:
      plan: what is predicted.
      cohort: c, the expected number of units a round.
      simulated: units that there are to simulate with; None for the plan's N.

    Raises:
      ValueError: a cohort that is not above 0, or larger than the plan's or than what there is.

    Source: F. Granqvist et al., pfl-research, NeurIPS 2024, arXiv 2404.06430.
    """

    plan: PrivacyPlan
    cohort: float
    simulated: int | None = None

    def __post_init__(self) -> None:
        """Checks the cohort."""
        number = isinstance(self.cohort, numbers.Real) and not isinstance(self.cohort, bool)
        if not number or not 0 < self.cohort <= self.plan.normalizer * (1 + 1e-9):
            raise ValueError(
                f"a forecast simulates with fewer units: cohort must be above 0 and at most that of the plan,"
                f" {self.plan.normalizer:g}, got {self.cohort!r}"
            )
        if self.simulated is not None and check_whole("population", self.simulated, 1) < self.cohort:
            raise ValueError(f"a cohort of {self.cohort:g} is larger than a population of {self.simulated}")
        if self.plan.sampling == "fixed" and self.cohort != round(self.cohort):
            raise ValueError(f"sampling='fixed' needs a whole cohort, got {self.cohort!r}")

    @property
    def guarantee(self) -> None:
        """None: the run itself is not private."""
        return

    @property
    def population(self) -> int:
        """Units to draw from: the plan's N, or those that there are."""
        return self.plan.population if self.simulated is None else self.simulated

    @property
    def unit(self) -> str:
        """The plan's unit."""
        return self.plan.unit

    @property
    def rate(self) -> float:
        """c over the units to draw from."""
        return self.cohort / self.population

    @property
    def clip(self) -> Any:
        """The plan's clip."""
        return self.plan.clip

    @property
    def noise_multiplier(self) -> float:
        """z c / C."""
        return self.plan.noise_multiplier * self.cohort / self.plan.normalizer

    @property
    def rounds(self) -> int:
        """The plan's rounds."""
        return self.plan.rounds

    @property
    def relation(self) -> str:
        """The plan's neighbouring relation."""
        return self.plan.relation

    @property
    def sampling(self) -> str:
        """The plan's sampling."""
        return self.plan.sampling

    @property
    def normalizer(self) -> float:
        """c, fixed."""
        return float(self.cohort)

    @property
    def capacity(self) -> int:
        """Places of a sample of c expected units."""
        if self.sampling == "fixed":
            return round(self.cohort)
        return poisson_capacity(self.population, self.rate)

    def epsilon(self, rounds: int | None = None) -> float:
        """Raises: a forecast has no epsilon of its own.

        Args:
          rounds: is not used.

        Raises:
          ValueError: always; it says where the epsilon of the predicted run is.
        """
        raise ValueError(
            f"{self}: it has no epsilon; forecast.plan.epsilon() is that of the run with a cohort of "
            f"{self.plan.normalizer:g}"
        )

    def rounds_within(self, epsilon: float) -> int:
        """The rounds of the predicted run within a budget; see `PrivacyPlan.rounds_within`.

        Args:
          epsilon: the budget of the predicted run.

        Returns:
          The number of rounds.
        """
        return self.plan.rounds_within(epsilon)

    def sample(self, seed: int, round: int) -> Sample:
        """The small cohort of a round; see `PrivacyPlan.sample`.

        Args:
          seed: of the run.
          round: its number, at least 0.

        Returns:
          ids int64 [capacity], ascending and padded with N, and mask bool [capacity].
        """
        if self.sampling == "fixed":
            return fixed_sample(seed, round, self.population, self.capacity)
        return poisson_sample(seed, round, self.population, self.rate, self.capacity)

    def sensitivity(self) -> float:
        """How far one unit moves the sum of clipped contributions, in L2 norm."""
        return self.plan.sensitivity()

    def privatize(
        self, total: Any, key: jax.Array, mask: Any = None, *, draw: Draw = jax.random.normal
    ) -> Any:
        """(total + small noise) / c; see `PrivacyPlan.privatize`.

        Args:
          total: the sum of the clipped contributions of the small cohort.
          key: a typed key of this round.
          mask: as in `PrivacyPlan.privatize`.
          draw: another source of standard normal noise.

        Returns:
          A tree like `total`.
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

    def __str__(self) -> str:
        """One line that says what it is not."""
        return f"forecast for a cohort of {self.plan.normalizer:g}; this run is not private"
