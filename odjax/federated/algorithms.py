"""Federated algorithms as records of their parts, and the round that all of them run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from odjax.core import fold_path, fold_step, statistics_dtype
from odjax.federated.aggregate import Aggregator, weighted_mean
from odjax.federated.clients import RoundPlan
from odjax.federated.local import Controlled, Figures, LocalStep, Loss, Shared, local_scaffold, local_sgd
from odjax.federated.population import gather, population_of, scatter
from odjax.federated.server import fed_avg as fed_avg_server
from odjax.federated.server import server_step
from odjax.federated.simulate import simulate_cohort


@dataclass(frozen=True)
class Algorithm:
    """What makes a federated algorithm.

    Attributes:
      local: what a client does.
      aggregator: how deltas become an update.
      server: optimizer of the server, which takes minus the update for a gradient.
      private: `params -> row`, what a client keeps at the start, or None for nothing.
      control: whether the server has a control variate, which the deltas change (`Controlled`).
      context: `(key, round) -> tree`, what the server draws anew each round and everybody knows.
      mask: `(params, context) -> tree` of 0 and 1, the entries that take part in a round; None for all.
    """

    local: LocalStep
    aggregator: Aggregator
    server: optax.GradientTransformation
    private: Callable[[Any], Any] | None = None
    control: bool = False
    context: Callable[[jax.Array, jax.Array], Any] | None = None
    mask: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.aggregator.private and (self.private is not None or self.control):
            raise ValueError(
                "a private aggregator covers the update alone: what a client keeps (control variates, "
                "personal parameters) would show its data without noise"
            )


class FederatedState(NamedTuple):
    """State of a federated run.

    Attributes:
      params: of the server, what is trained.
      server: state of the server's optimizer.
      control: the server's control variate, or None.
      population: what clients keep, [N, ...], or None.
      round: int32 scalar, rounds done.
    """

    params: Any
    server: Any
    control: Any
    population: Any
    round: jax.Array


def fed_avg(
    loss: Loss,
    client: optax.GradientTransformation,
    server: optax.GradientTransformation | None = None,
    *,
    aggregator: Aggregator | None = None,
    proximal: float = 0.0,
) -> Algorithm:
    """FedAvg; with another server FedAvgM and FedAdam, with `proximal` FedProx, with `private_sum` DP-FedAvg.

    Args:
      loss: sums over a client's batch.
      client: optimizer of local steps.
      server: optimizer of the server; None for `optax.sgd(1.0)`.
      aggregator: None for the weighted mean.
      proximal: mu of FedProx.

    Returns:
      The algorithm.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    algorithm 1; Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 1; Li et al. 2020, "Federated
    Optimization in Heterogeneous Networks", algorithm 2.

    Example:
      >>> from odjax.federated import fed_adam, fed_avg
      >>> def loss(params, shared, batch, mask, key):
      ...     return {"loss": (jnp.sum(mask * (params["w"] - batch["x"]) ** 2 / 2), jnp.sum(mask * 1.0))}
      >>> algorithm = fed_avg(loss, optax.sgd(0.1), fed_adam(0.01), proximal=0.1)
      >>> algorithm.control, algorithm.aggregator.uniform
      (False, False)
    """
    return Algorithm(
        local_sgd(loss, client, proximal=proximal),
        aggregator or weighted_mean(),
        server or fed_avg_server(),
    )


def scaffold(
    loss: Loss, learning_rate: float, server: optax.GradientTransformation | None = None
) -> Algorithm:
    """SCAFFOLD, option II: control variates of clients and server take out the drift of local steps.

    theta <- theta + eta_g mean(y - theta) and c <- c + (K / N) mean(c_i' - c_i) over a cohort of K, all of
    equal weight (plan rounds with `uniform=True`). Control variates are float32 (float64 for float64).

    Args:
      loss: sums over a client's batch.
      learning_rate: of the local steps.
      server: None for `optax.sgd(1.0)`.

    Returns:
      The algorithm; its population state is one tree like the parameters a client.

    Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    algorithm 1.

    Example:
      >>> import numpy as np
      >>> from odjax.federated import group_by_client, init, make_round, plan_round, scaffold
      >>> def loss(params, shared, batch, mask, key):
      ...     pull = batch["h"] * (params["w"] - batch["x"]) ** 2 / 2
      ...     return {"loss": (jnp.sum(mask * pull), jnp.sum(mask * 1.0))}
      >>> examples = {"x": np.array([1.0, 4.0], np.float32), "h": np.array([2.0, 1.0], np.float32)}
      >>> clients = group_by_client(examples, np.array([0, 1]))
      >>> algorithm = scaffold(loss, learning_rate=0.2)
      >>> state = init(algorithm, {"w": jnp.zeros(())}, clients.count)
      >>> plan = plan_round(clients, [0, 1], 0, batch=1, seed=0, epochs=5, uniform=True)
      >>> run = jax.jit(make_round(algorithm))
      >>> for _ in range(40):
      ...     state, _ = run(state, clients.examples, plan, jax.random.key(0))
      >>> round(float(state.params["w"]), 4)  # the minimum of 2 (w - 1)^2 + (w - 4)^2
      2.0
    """
    return Algorithm(
        local_scaffold(loss, learning_rate),
        replace(weighted_mean(), uniform=True),
        server or fed_avg_server(),
        private=_control_of,
        control=True,
    )


def _control_of(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros(p.shape, statistics_dtype(p)), params)


def init(algorithm: Algorithm, params: Any, clients: int, *, host: bool = False) -> FederatedState:
    """The state before the first round.

    Args:
      algorithm: the algorithm.
      params: what is trained.
      clients: number of clients N.
      host: keep the population's state in the memory of the host.

    Returns:
      The state.

    Raises:
      ValueError: no client.
    """
    row = None if algorithm.private is None else algorithm.private(params)
    return FederatedState(
        params,
        algorithm.server.init(params),
        _control_of(params) if algorithm.control else None,
        None if row is None else population_of(row, clients, host=host),
        jnp.zeros((), jnp.int32),
    )


def make_round(
    algorithm: Algorithm,
    *,
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = "clients",
    rows: str = "compiled",
    local_data: bool = False,
) -> Callable[..., tuple[FederatedState, Figures]]:
    """One round: the cohort trains, its deltas are summed, the server steps.

    Args:
      algorithm: the algorithm.
      mesh: see `simulate_cohort`.
      axis: see `simulate_cohort`.
      rows: see `simulate_cohort`; with "called" the round is no function for `jax.jit`.
      local_data: see `simulate_cohort`.

    Returns:
      `(state, data, plan, key, frozen=None, collections=None, noise_key=None) -> (state, figures)`. `key` is
      the run's and never changes. `noise_key`, as constant, is for what the aggregator draws, and is folded
      from `key` where it is None: the noise of a private sum hides nothing from who knows its key. Figures
      are sums and counts over the cohort, empty where they are private. It may go into `jax.jit`, but where
      the population lies on the host: then call it as it is. Its parts are compiled, and only the cohort's
      rows move. Put `data` on the devices once (`jax.device_put`).

    Raises:
      ValueError: as `simulate_cohort`, and a delta that is no tree like the parameters.

    Source: Granqvist et al. 2024, "pfl-research", section 3 (the parts of a round) and 4.4 (balancing).

    Example:
      >>> import numpy as np
      >>> from odjax.federated import fed_avg, group_by_client, init, make_round, plan_round
      >>> def loss(params, shared, batch, mask, key):
      ...     return {"loss": (jnp.sum(mask * (params["w"] - batch["x"]) ** 2 / 2), jnp.sum(mask * 1.0))}
      >>> clients = group_by_client({"x": np.array([1.0, 3.0, 8.0], np.float32)}, np.array([0, 0, 1]))
      >>> algorithm = fed_avg(loss, optax.sgd(1.0))
      >>> state = init(algorithm, {"w": jnp.zeros(())}, clients.count)
      >>> plan = plan_round(clients, [0, 1], 0, batch=2, seed=0)
      >>> state, _ = jax.jit(make_round(algorithm))(state, clients.examples, plan, jax.random.key(0))
      >>> state.params["w"]  # the mean of the clients' means 2 and 8, weighted by their 2 and 1 examples
      Array(4., dtype=float32)
    """
    cohort = simulate_cohort(
        algorithm.local, algorithm.aggregator, mesh=mesh, axis=axis, rows=rows, local_data=local_data
    )
    finish = algorithm.aggregator.finish

    def serve(state: FederatedState, total: Any, mask: Any, key: jax.Array, clients: int) -> FederatedState:
        update = finish(total, fold_step(key, state.round), mask)
        control = state.control
        if algorithm.control:
            if not isinstance(update, Controlled):
                raise ValueError("an algorithm with control variates needs deltas that are `Controlled`")
            share = total.weight / clients
            control = jax.tree.map(
                lambda c, by: c + (share.astype(by.dtype) * by).astype(c.dtype), control, update.control
            )
            update = update.params
        params, server = server_step(algorithm.server, state.params, state.server, update, mask)
        return state._replace(params=params, server=server, control=control, round=state.round + 1)

    serve = jax.jit(serve, static_argnums=4)

    def round(
        state: FederatedState,
        data: Any,
        plan: RoundPlan,
        key: jax.Array,
        frozen: Any = None,
        collections: Any = None,
        noise_key: jax.Array | None = None,
    ) -> tuple[FederatedState, Figures]:
        context = mask = None
        if algorithm.context is not None:
            context = algorithm.context(fold_step(fold_path(key, "context"), state.round), state.round)
        if algorithm.mask is not None:
            mask = algorithm.mask(state.params, context)
        shared = Shared(state.params, frozen, state.control, context, collections)
        private = None if state.population is None else gather(state.population, plan.client)
        own = fold_path(key, "clients")
        result = cohort(shared, private, data, plan, own, mask)
        rest = state._replace(population=None)
        clients = 1
        if state.population is not None:
            clients = jax.tree.leaves(state.population)[0].shape[0]
        drawn = fold_path(key, "aggregate") if noise_key is None else noise_key
        stepped = serve(rest, result.total, mask, drawn, clients)
        population = state.population
        if population is not None:
            population = scatter(population, plan.client, result.private)
        return stepped._replace(population=population), result.figures

    return round
