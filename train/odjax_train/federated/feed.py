"""The rounds of a run: cohorts sampled and packed on the host, one round ahead of the devices."""

import concurrent.futures
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from odjax.federated import Clients, RoundPlan, plan_round
from odjax_train.errors import UserError
from odjax_train.federated.section import Federated
from odjax_train.federated.step import LANES, plan_shardings
from odjax_train.mesh import replicated


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

    Raises:
        UserError: the section does not fit the number of clients.
    """

    def __init__(
        self, federated: Federated, clients: Clients, fingerprint: str, seed: int, mesh: Mesh
    ) -> None:
        federated.require(clients.count)
        self._federated, self._clients, self._seed = federated, clients, seed
        self._lanes = federated.lanes * mesh.shape[LANES]
        if federated.strategy == "loop":
            self._lanes = mesh.shape[LANES]
        self._identity = {"seed": seed, "clients": fingerprint}
        self._examples = _placed(clients.examples, dict.fromkeys(clients.examples, replicated(mesh)))
        self._shardings = plan_shardings(mesh)
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "rounds")
        self._step = 0
        self._ahead: concurrent.futures.Future[RoundPlan] | None = None

    def plan(self, round: int) -> RoundPlan:
        """The plan of a round, on the host."""
        federated = self._federated
        sample = federated.sample(self._seed, round, self._clients.count)
        if not sample.mask.any():
            # A Poisson cohort may be empty: the round is then noise alone.
            sample = sample._replace(ids=np.zeros_like(sample.ids))
        return plan_round(
            self._clients,
            sample.ids,
            round,
            batch=federated.batch,
            seed=self._seed,
            epochs=federated.epochs,
            steps=federated.local_steps,
            lanes=self._lanes,
            strategy=federated.strategy,
            mask=sample.mask,
            uniform=federated.uniform or federated.privacy is not None,
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._ahead is None:
            self._ahead = self._worker.submit(self.plan, self._step)
        plan, self._ahead = self._ahead.result(), None
        self._step += 1
        self._ahead = self._worker.submit(self.plan, self._step)
        return {"examples": self._examples, "plan": _placed(plan, self._shardings)}

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


def _placed(tree: Any, shardings: Any) -> Any:
    """Arrays on the mesh; every process has them whole and gives its part."""

    def placed(array: Any, sharding: Sharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(placed, tree, shardings)
