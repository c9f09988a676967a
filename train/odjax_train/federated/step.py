"""A round as a step of a run: from the experiment's task to the engine of `odjax.federated`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.core import Edit, combine, fold_path, fold_step
from odjax.federated import Algorithm, FederatedState, RoundPlan, Shared, init, make_round
from odjax.federated.local import Figures
from odjax.lowrank import Adapted, restart
from odjax_train.errors import UserError
from odjax_train.federated.section import Federated
from odjax_train.mesh import Rules
from odjax_train.tasks import Batch, Task

LANES = "data"
"""The mesh axis of the lanes; the others divide the model."""


class ServerState(NamedTuple):
    """What stands in the place of an optimizer's state.

    Attributes:
        server: state of the server's optimizer.
        control: the server's control variate, or None.
        population: what clients keep, or None.
    """

    server: Any
    control: Any
    population: Any


def algorithm_of(
    federated: Federated,
    model: nn.Module,
    task: Task,
    optimizer: optax.GradientTransformation,
    rules: Rules,
) -> Algorithm:
    """The federated algorithm of an experiment.

    Args:
        federated: the experiment's section.
        model: its model.
        task: its task.
        optimizer: of the server.
        rules: logical axis -> mesh axis.

    Raises:
        UserError: the algorithm does not keep the section's promise.
    """
    inside = tuple((name, _without_lanes(name, axis)) for name, axis in rules)
    loss = ClientLoss(model, task, inside)
    return federated.checked(federated.algorithm(loss, optimizer, federated.aggregation()))


@dataclasses.dataclass(frozen=True)
class ClientLoss:
    """The task's loss on a client's batch, as the algorithms of `odjax.federated` take it.

    Args:
        model: of the experiment.
        task: of the experiment.
        rules: logical axis -> mesh axis, inside a lane.
    """

    model: nn.Module
    task: Task
    rules: Rules

    def __call__(self, params: Any, shared: Shared, batch: Batch, mask: jax.Array, key: jax.Array) -> Figures:
        """Sums over the examples that count."""
        variables = {"params": combine(params, shared.frozen), **shared.collections}
        return self._sums(self.model, variables, batch, mask, key)

    def of_model(
        self, model: nn.Module, params: Any, batch: Batch, mask: jax.Array, key: jax.Array
    ) -> Figures:
        """The same for a model that the algorithm has changed (`fed_dylora`), which has parameters alone."""
        return self._sums(model, {"params": params}, batch, mask, key)

    def _sums(
        self, model: nn.Module, variables: Any, batch: Batch, mask: jax.Array, key: jax.Array
    ) -> Figures:
        with nn.logical_axis_rules(self.rules):
            sums, _ = self.task.loss(model, variables, weighted(batch, mask), key)
        return {name: (s.total.astype(jnp.float32), s.count) for name, s in sums.items()}


def _without_lanes(name: str, axis: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """Inside a lane a batch is small and whole, and nothing is divided over the lanes' axis."""
    if name == "batch" or axis == LANES:
        return None
    return tuple(each for each in axis if each != LANES) if isinstance(axis, tuple) else axis


def weighted(batch: Mapping[str, jax.Array], mask: jax.Array) -> dict[str, jax.Array]:
    """A batch whose weights are 0 where the mask is False.

    Args:
        batch: with `weight [B]` or `weights [B, ...]`.
        mask: bool [B].

    Raises:
        UserError: examples without weights.
    """
    name = next((name for name in ("weight", "weights") if name in batch), None)
    if name is None:
        raise UserError(f"examples need a weight to be left out by, they hold {', '.join(batch)}")
    weight = batch[name]
    there = jnp.expand_dims(mask, tuple(range(1, weight.ndim)))
    return {**batch, name: jnp.where(there, weight, jnp.zeros_like(weight))}


def start(algorithm: Algorithm, free: Any, clients: int) -> ServerState:
    """The state before the first round.

    Args:
        algorithm: of the experiment.
        free: trainable parameters.
        clients: number of clients.
    """
    state = init(algorithm, free, clients)
    return ServerState(state.server, state.control, state.population)


def round_step(
    federated: Federated, algorithm: Algorithm, mesh: Mesh
) -> Callable[..., tuple[Any, ServerState, dict[str, jax.Array]]]:
    """One round.

    Args:
        federated: the experiment's section.
        algorithm: of the experiment.
        mesh: lanes lie along its axis `data`.

    Returns:
        `(free, frozen, collections, state, round, batch, key) -> (free, state, metrics)`, where the batch is
        {"examples": ..., "plan": `RoundPlan`, "noise": data of a key where there is privacy}. Metrics of
        clients are missing where they are private; the size of the change is that of the update as it was
        released.
    """
    rows = "called" if federated.strategy == "loop" else "compiled"
    one_round = make_round(algorithm, mesh=mesh, axis=LANES, rows=rows)

    def step(
        free: Any,
        frozen: Any,
        collections: Any,
        state: ServerState,
        round: jax.Array,
        batch: Mapping[str, Any],
        key: jax.Array,
    ) -> tuple[Any, ServerState, dict[str, jax.Array]]:
        plan: RoundPlan = batch["plan"]
        before = FederatedState(free, state.server, state.control, state.population, round)
        noise = jax.random.wrap_key_data(batch["noise"]) if "noise" in batch else None
        after, figures = one_round(before, batch["examples"], plan, key, frozen, collections, noise)
        metrics = {name: total / jnp.maximum(count, 1e-9) for name, (total, count) in figures.items()}
        metrics["update_norm"] = _change(after.params, free)
        if not algorithm.aggregator.private:
            metrics["cohort"] = jnp.sum((jnp.asarray(plan.cohort) >= 0).astype(jnp.float32))
        return after.params, ServerState(after.server, after.control, after.population), metrics

    return step


@jax.jit
def _change(new: Any, old: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda a, b: (a - b).astype(jnp.float32), new, old))


def merging(
    model: Adapted, server: optax.GradientTransformation, *, every: int = 1, on_boundary: str | None = None
) -> Edit:
    """The end of a block of a federated chain: the mean factors are merged, and new ones are drawn.

    Args:
        model: adapted by "rac", "cola" or "relora".
        server: the server's optimizer, whose state begins anew.
        every: rounds of a block.
        on_boundary: see `odjax.lowrank.restart`.
    """
    return restart(
        model,
        every=every,
        on_boundary=on_boundary,
        init=lambda free: ServerState(server.init(free), None, None),
    )


def shares_of(algorithm: Algorithm, free: Any, seed: int, rounds: int) -> np.ndarray:
    """Which part of the trained numbers takes part in each round, as the server draws it.

    Args:
        algorithm: of the run.
        free: trainable parameters, of shapes.
        seed: of the run.
        rounds: how many.

    Returns:
        float64 [rounds], 1 where all of them do.
    """
    if algorithm.mask is None:
        return np.ones(rounds)
    key = fold_path(fold_path(jax.random.key(seed), "federated"), "context")

    def share(round: jax.Array) -> jax.Array:
        context = None
        if algorithm.context is not None:
            context = algorithm.context(fold_step(key, round), round)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), free)
        masks = jax.tree.map(
            lambda mask, zero: jnp.broadcast_to(mask != 0, zero.shape), algorithm.mask(zeros, context), zeros
        )
        numbers = sum(leaf.size for leaf in jax.tree.leaves(zeros))
        return sum(jnp.sum(mask.astype(jnp.float32)) for mask in jax.tree.leaves(masks)) / numbers

    every = jnp.arange(rounds, dtype=jnp.int32)
    return np.asarray(jax.jit(lambda: jax.lax.map(share, every))(), np.float64)


def plan_shardings(mesh: Mesh) -> RoundPlan:
    """Shardings of a round's plan."""
    from odjax.federated.simulate import plan_specs

    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), plan_specs(LANES), is_leaf=lambda x: isinstance(x, P)
    )
