"""The rounds of a run: cohorts sampled and packed on the host, one round ahead of the devices."""

import concurrent.futures
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from odjax.federated import Clients, RoundPlan, plan_round
from odjax_train.errors import UserError
from odjax_train.federated import secret as secrets
from odjax_train.federated.section import Federated
from odjax_train.federated.step import LANES, plan_shardings
from odjax_train.mesh import replicated

if TYPE_CHECKING:
    from odjax_train.program import Program


class RoundFeed:
    """Iterator over the batches of a federated run: all examples, and the plan of the round.

    The plan is a function of (seed, round), so the number of the next round is the whole state. The examples
    are put on the devices once.

    Args:
        federated: the experiment's section.
        clients: examples of every client.
        fingerprint: identifies them.
        seed: of cohorts and local orders.
        mesh: lanes lie along its axis `data`.
        secret: what cohorts and noise of a private run follow from; None for the seed, which anybody may
            know.

    Raises:
        UserError: the section does not fit the number of clients.
    """

    def __init__(
        self,
        federated: Federated,
        clients: Clients,
        fingerprint: str,
        seed: int,
        mesh: Mesh,
        *,
        secret: int | None = None,
    ) -> None:
        federated.require(clients.count)
        self._federated, self._clients, self._seed = federated, clients, seed
        self._secret = seed if secret is None else secret
        self._lanes = lanes_of(federated, mesh)
        if federated.is_private:
            fingerprint = secrets.keyed(self._secret, fingerprint)
        self._identity = {"seed": seed, "clients": fingerprint}
        self._noise: dict[str, jax.Array] = {}
        if federated.privacy is not None:
            self._noise["noise"] = _placed(secrets.noise_key(self._secret), replicated(mesh))
        self._examples = _placed(clients.examples, dict.fromkeys(clients.examples, replicated(mesh)))
        self._shardings = plan_shardings(mesh)
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "rounds")
        self._step = 0
        self._ahead: concurrent.futures.Future[RoundPlan] | None = None

    def _plan(self, round: int) -> RoundPlan:
        return planned(self._federated, self._clients, self._seed, round, self._lanes, self._secret)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._ahead is None:
            self._ahead = self._worker.submit(self._plan, self._step)
        plan, self._ahead = self._ahead.result(), None
        self._step += 1
        self._ahead = self._worker.submit(self._plan, self._step)
        return {"examples": self._examples, "plan": _placed(plan, self._shardings), **self._noise}

    def get_state(self) -> dict[str, Any]:
        """What to store to go on behind the last round that was taken; JSON."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where a stored state was taken.

        Raises:
            UserError: it belongs to other clients or another seed.
        """
        for name, mine in self._identity.items():
            if name in state and state[name] != mine:
                raise UserError(f"the stored position is of {name} {state[name]}, this run has {mine}")
        self._ahead = None
        self._step = int(state["step"])

    def close(self) -> None:
        """Stops the background work."""
        self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def opened(program: "Program", secret: int | None = None) -> RoundFeed:
    """The rounds of a federated run.

    Args:
        program: the run's functions.
        secret: of a private run.

    Raises:
        UserError: the section does not fit the data.
    """
    experiment = program.experiment
    data = experiment.data
    return RoundFeed(
        experiment.federated,
        data.clients(),
        data.fingerprint,
        experiment.seed,
        program.mesh,
        secret=secret,
    )


def step_inputs(program: "Program") -> Any:
    """Shapes of what a step takes besides the state; of a federated run, for which data are opened, the first
    round's.

    Args:
        program: of any run.
    """
    experiment = program.experiment
    if experiment.federated is None:
        return program.batch
    if experiment.federated.strategy == "loop":
        raise UserError(
            "strategy 'loop' runs the rows of a round from Python, and no program is the round: plan it with "
            "strategy='lanes'"
        )
    clients, whole = experiment.data.clients(), replicated(program.mesh)
    examples = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole)
        for name, array in clients.examples.items()
    }
    lanes = lanes_of(experiment.federated, program.mesh)
    plan = planned(experiment.federated, clients, experiment.seed, 0, lanes)
    shaped = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(np.shape(array), array.dtype, sharding=sharding),
        plan,
        plan_shardings(program.mesh),
    )
    noise = {}
    if experiment.federated.privacy is not None:
        noise["noise"] = jax.ShapeDtypeStruct((2,), np.uint32, sharding=whole)
    return {"examples": examples, "plan": shaped, **noise}


def round_examples(program: "Program") -> float:
    """Examples that a round of a federated run trains on, on average and those of every epoch.

    Args:
        program: of a federated run.
    """
    federated, clients = program.experiment.federated, program.experiment.data.clients()
    each = clients.sizes * federated.epochs
    if federated.local_steps is not None:
        each = np.minimum(each, federated.local_steps * federated.batch)
    return float(each.mean() * federated.expected_cohort)


def lanes_of(federated: Federated, mesh: Mesh) -> int:
    """Lanes over the whole mesh."""
    return mesh.shape[LANES] * (1 if federated.strategy == "loop" else federated.lanes)


def planned(
    federated: Federated, clients: Clients, seed: int, round: int, lanes: int, secret: int | None = None
) -> RoundPlan:
    """The plan of a round, on the host.

    Args:
        federated: the experiment's section.
        clients: examples of every client.
        seed: of the run.
        round: its number.
        lanes: over the whole mesh.
        secret: what the cohort follows from; None for the seed.
    """
    sample = federated.sample(seed if secret is None else secret, round, clients.count)
    return plan_round(
        clients,
        # A Poisson cohort may be empty: the round is then noise alone.
        np.where(sample.mask, sample.ids, 0),
        round,
        batch=federated.batch,
        seed=seed,
        epochs=federated.epochs,
        steps=federated.local_steps,
        lanes=lanes,
        strategy=federated.strategy,
        mask=sample.mask,
        uniform=federated.uniform or federated.privacy is not None,
    )


def _placed(tree: Any, shardings: Any) -> Any:
    """Arrays on the mesh; every process has them whole and gives its part."""

    def placed(array: Any, sharding: Sharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(placed, tree, shardings)
