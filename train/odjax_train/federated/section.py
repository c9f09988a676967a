"""The federated section of an experiment: who trains in a round, how, and under what promise."""

import dataclasses
import math
from collections.abc import Callable

import optax

from odjax.federated import Aggregator, Algorithm, private_sum, weighted_mean
from odjax.federated.clients import STRATEGIES
from odjax.federated.local import Loss
from odjax.privacy import PrivacyForecast, PrivacyPlan, Sample, fixed_sample
from odjax_train.errors import UserError

MakeAlgorithm = Callable[[Loss, optax.GradientTransformation, Aggregator], Algorithm]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Federated:
    """How a run is federated: its steps are rounds, its optimizer is the server's.

    Args:
        algorithm: `(loss, server, aggregator) -> Algorithm`; the loss is the experiment's task on a client's
            batch. For example `lambda loss, server, aggregator: fed_avg(loss, optax.sgd(0.1), server,
            aggregator=aggregator)`.
        cohort: clients of a round; with privacy their expected number, which the plan knows.
        batch: examples of a local step.
        epochs: passes of a client over its examples.
        local_steps: at most so many, None for all.
        privacy: the plan that samples the cohort, bounds each client and adds the noise; None for none.
        budget: epsilon that may be spent; the run ends before the round that would exceed it. None for the
            rounds of the plan.
        aggregator: without privacy, how deltas become an update; None for the mean weighted by examples.
        uniform: without privacy, whether all clients weigh the same.
        lanes: side by side on each part of the mesh axis `data`.
        strategy: "lanes", "chunks" or "loop" (see `odjax.federated.plan_round`).

    Raises:
        UserError: naming the argument that makes no sense.
    """

    algorithm: MakeAlgorithm
    cohort: int | None = None
    batch: int = 10
    epochs: int = 1
    local_steps: int | None = None
    privacy: PrivacyPlan | PrivacyForecast | None = None
    budget: float | None = None
    aggregator: Aggregator | None = None
    uniform: bool = False
    lanes: int = 1
    strategy: str = "lanes"

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "lanes"):
            if getattr(self, name) < 1:
                raise UserError(f"federated {name} must be at least 1, got {getattr(self, name)}")
        if self.local_steps is not None and self.local_steps < 1:
            raise UserError(f"federated local_steps must be at least 1, got {self.local_steps}")
        if self.strategy not in STRATEGIES:
            raise UserError(
                f"federated strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}"
            )
        if self.privacy is None:
            if self.cohort is None or self.cohort < 1:
                raise UserError(f"a federated cohort must be at least 1, got {self.cohort}")
            if self.budget is not None:
                raise UserError("federated budget= is of epsilon: it needs privacy=")
            return
        if self.cohort is not None:
            raise UserError("with privacy= the plan samples the cohort: give privacy_plan(cohort=) alone")
        if self.aggregator is not None or self.uniform:
            raise UserError(
                "with privacy= deltas are clipped, summed and noised: drop aggregator= and uniform="
            )
        if self.budget is not None and not (self.budget > 0 and math.isfinite(self.budget)):
            raise UserError(f"federated budget must be a positive epsilon, got {self.budget}")
        if self.budget is not None and (self.is_forecast or self.privacy.rounds_within(self.budget) < 1):
            what = "a forecast spends nothing" if self.is_forecast else "not even one round is within it"
            raise UserError(f"federated budget {self.budget}: {what}")

    @property
    def is_forecast(self) -> bool:
        """Whether the noise only predicts what a larger cohort would reach."""
        return isinstance(self.privacy, PrivacyForecast)

    @property
    def is_private(self) -> bool:
        """Whether the run makes a promise."""
        return self.privacy is not None and not self.is_forecast

    @property
    def expected_cohort(self) -> float:
        """Clients of a round, on average."""
        return float(self.cohort if self.privacy is None else self.privacy.normalizer)

    @property
    def rounds(self) -> int | None:
        """Rounds that the promise allows; None for any number."""
        if not self.is_private:
            return None
        if self.budget is None or self.privacy.epsilon() <= self.budget:
            return self.privacy.rounds
        return self.privacy.rounds_within(self.budget)

    def aggregation(self) -> Aggregator:
        """What the algorithm has to aggregate with."""
        if self.privacy is not None:
            return private_sum(self.privacy)
        return self.aggregator or weighted_mean()

    def checked(self, algorithm: Algorithm) -> Algorithm:
        """The algorithm, if it keeps the promise.

        Raises:
            UserError: it aggregates in another way than privacy demands.
        """
        if self.privacy is None:
            return algorithm
        if algorithm.aggregator.plan is not self.privacy:
            raise UserError(
                "with privacy= the algorithm must use the aggregator that it is given: "
                "fed_avg(loss, client, server, aggregator=aggregator)"
            )
        if algorithm.private is not None or algorithm.control:
            raise UserError(
                "with privacy= an algorithm must keep nothing of a client: control= and private= do"
            )
        return algorithm

    def sample(self, seed: int, round: int, clients: int) -> Sample:
        """The cohort of a round, a function of (seed, round).

        Args:
            seed: of the run.
            round: its number.
            clients: number of clients.
        """
        if self.privacy is not None:
            return self.privacy.sample(seed, round)
        return fixed_sample(seed, round, clients, self.cohort)

    def epsilon(self, rounds: int) -> float | None:
        """What is spent after some rounds; None without a promise."""
        return float(self.privacy.epsilon(rounds)) if self.is_private else None

    def require(self, clients: int) -> None:
        """Makes sure that the data has the clients that were counted on.

        Raises:
            UserError: it has not.
        """
        if self.privacy is not None and self.privacy.population != clients:
            remedy = "give forecast(cohort, population=)" if self.is_forecast else "epsilon would be another"
            raise UserError(
                f"the privacy plan is for a population of {self.privacy.population}, the data has {clients} "
                f"clients: {remedy}"
            )
        if self.cohort is not None and self.cohort > clients:
            raise UserError(f"a cohort of {self.cohort} is larger than the {clients} clients of the data")

    def describe(self) -> dict[str, object]:
        """What a report says about it."""
        return {
            "cohort": f"{self.expected_cohort:g}" + ("" if self.privacy is None else " expected"),
            "local batch": self.batch,
            "local epochs": self.epochs,
            "privacy": "none" if self.privacy is None else str(self.privacy),
            **(
                {"to be shown": "the parameters and epsilon, nothing else of the folder"}
                if self.is_private
                else {}
            ),
            **({} if self.budget is None else {"budget": f"epsilon {self.budget:g}"}),
        }
