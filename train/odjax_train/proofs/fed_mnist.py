"""What the federated proofs share: MNIST dealt out to clients, one loss, and a loop over rounds."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.federated import Clients, FederatedState, RoundPlan, group_by_client, plan_round
from odjax.privacy import fixed_sample

Data = tuple[np.ndarray, np.ndarray]


def mnist_file() -> Path:
    """Where `mnist.npz` would be."""
    return Path(os.environ.get("ODJAX_DATA_DIR", ".")) / "mnist.npz"


def mnist(digits: Sequence[int] = range(10), path: Path | None = None) -> dict[str, Data]:
    """Some digits of MNIST.

    Args:
        digits: which; the labels are their places in this list.
        path: of the npz file.

    Returns:
        "train", "test" -> images float32 [n, 784] in 0..1 and labels int32.
    """
    parts = {}
    with np.load(path or mnist_file()) as file:
        for part in ("train", "test"):
            x, y = file[f"x_{part}"], file[f"y_{part}"]
            rows = np.isin(y, list(digits))
            labels = np.searchsorted(list(digits), y[rows]).astype(np.int32)
            parts[part] = (x[rows].reshape(-1, 784).astype(np.float32) / 255, labels)
    return parts


def dealt(data: Data, owner: np.ndarray) -> Clients:
    """Images and labels by client.

    Args:
        data: images and labels.
        owner: the client of each image.

    Returns:
        Clients with the examples "x" and "y".
    """
    return group_by_client({"x": data[0], "y": data[1]}, owner)


def figures(model: nn.Module, params: Any, batch: Any, mask: jax.Array, key: jax.Array) -> Any:
    """Cross-entropy as a loss of clients; see `odjax.federated.lowrank.ModelLoss`."""
    del key
    logits = model.apply({"params": params}, batch["x"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    counts = mask.astype(jnp.float32)
    return {"loss": (jnp.sum(counts * nll), jnp.sum(counts))}


def whole(model: nn.Module) -> Callable[..., Any]:
    """The loss where all parameters are trained; see `odjax.federated.local.Loss`."""
    return lambda params, shared, batch, mask, key: figures(model, params, batch, mask, key)


def accuracy(model: nn.Module, params: Any, data: Data) -> float:
    """Per cent of the images named rightly."""
    return 100 * float(np.mean(np.asarray(_named(model)(params, data[0])) == data[1]))


@cache
def _named(model: nn.Module) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, x: jnp.argmax(model.apply({"params": params}, x), -1))


def pretrained(model: nn.Module, data: Data, epochs: int, key: jax.Array) -> Any:
    """Parameters of a model after some epochs of AdamW, batches of 128.

    Args:
        model: of images [n, 784].
        data: images and labels.
        epochs: how many.
        key: of the start and the order.

    Returns:
        The parameters, without axis names.
    """
    x, y = (jnp.asarray(part) for part in data)
    params = nn.unbox(model.init(key, x[:1])["params"])
    optimizer, steps = optax.adamw(1e-3, weight_decay=0.01), len(y) // 128

    def step(carry: Any, rows: jax.Array) -> Any:
        params, state = carry

        def loss(params: Any) -> jax.Array:
            total, count = figures(model, params, {"x": x[rows], "y": y[rows]}, jnp.ones(128), key)["loss"]
            return total / count

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def epoch(carry: Any, key: jax.Array) -> Any:
        order = jax.random.permutation(key, len(y))[: steps * 128].reshape(steps, 128)
        return jax.lax.scan(step, carry, order)[0]

    carry = (params, optimizer.init(params))
    for i in range(epochs):
        carry = epoch(carry, jax.random.fold_in(key, i))
    return carry[0]


def plans(
    clients: Clients, rounds: int, cohort: Any, *, batch: int, seed: int, lanes: int, uniform: bool = False
) -> list[RoundPlan]:
    """The rounds of a run.

    Args:
        clients: the population.
        rounds: how many.
        cohort: the number of clients of a round, or an object with `sample(seed, round)`, a plan of privacy.
        batch: images of a local step.
        seed: of cohorts and orders.
        lanes: of the packing.
        uniform: all clients weigh 1.

    Returns:
        A plan a round.
    """
    found = []
    for t in range(rounds):
        private = hasattr(cohort, "sample")
        sample = cohort.sample(seed, t) if private else fixed_sample(seed, t, clients.count, cohort)
        found.append(
            plan_round(
                clients,
                sample.ids,
                t,
                batch=batch,
                seed=seed,
                lanes=lanes,
                mask=sample.mask,
                uniform=uniform or private,
                bucket=256,
            )
        )
    return found


def simulate(
    round: Callable[..., Any],
    state: FederatedState,
    frozen: Any,
    data: Any,
    rounds: Sequence[RoundPlan],
    key: jax.Array,
    *,
    rate: float | None = None,
) -> tuple[FederatedState, Any]:
    """Runs rounds.

    Args:
        round: compiled, of `make_round` or `chain_round`.
        state: at the start.
        frozen: what is not trained, or None; a chain changes it.
        data: examples of all clients.
        rounds: their plans.
        key: of the run.
        rate: of the server, where its optimizer is made by `optax.inject_hyperparams`.

    Returns:
        (state, frozen) at the end.
    """
    data = jax.device_put(data)
    if rate is not None:
        hyper = {**state.server.hyperparams, "learning_rate": jnp.float32(rate)}
        state = state._replace(server=state.server._replace(hyperparams=hyper))
    for plan in rounds:
        result = round(state, frozen, data, plan, key)
        state, frozen = result[0], result[1]
    return state, frozen


def plain(round: Callable[..., Any]) -> Callable[..., Any]:
    """A round of `make_round` with the arguments of one of `chain_round`."""
    return lambda state, frozen, data, plan, key: (round(state, data, plan, key, frozen)[0], frozen)
