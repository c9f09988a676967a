"""Federated learning on handwritten digits: many clients, few labels each, with or without privacy.

odjax train configs/fed_digits.py
odjax train configs/fed_digits.py --method fedadam --epsilon 8
"""

from typing import Literal

import optax

from odjax.federated import Aggregator, Algorithm, fed_adam, fed_avg, fed_avgm, scaffold
from odjax.federated.local import Loss
from odjax.models import MLP
from odjax.privacy import privacy_plan
from odjax_train import ByClient, Experiment, Federated, UserError, classification
from odjax_train.data import Images
from odjax_train.federated import by_label_shards


def experiment(
    method: Literal["fedavg", "fedavgm", "fedadam", "fedprox", "scaffold"] = "fedadam",
    steps: int = 100,
    clients: int = 70,
    shards: int = 2,
    cohort: int = 14,
    local_batch: int = 10,
    epochs: int = 1,
    local_rate: float = 0.1,
    server_rate: float | None = None,
    proximal: float = 0.1,
    epsilon: float | None = None,
    delta: float = 1e-3,
    clip: float = 0.5,
    budget: float | None = None,
    width: int = 64,
    lanes: int = 2,
    source: str = "digits",
    side: int = 8,
    batch: int = 128,
    seed: int = 0,
) -> Experiment:
    """Federated learning on scikit-learn's handwritten digits, two labels a client.

    Args:
        method: what clients and server do.
        steps: rounds.
        clients: number of clients.
        shards: labels of a client, about.
        cohort: clients of a round; expected ones with privacy.
        local_batch: images in a local step.
        epochs: passes of a client over its images in a round.
        local_rate: learning rate of clients.
        server_rate: learning rate of the server, None for a good one.
        proximal: of FedProx.
        epsilon: privacy of each client against whoever sees the model, None for none.
        delta: of the same.
        clip: norm to which each client's change is cut down, with privacy.
        budget: stop before more than this epsilon is spent.
        width: hidden units.
        lanes: clients that train side by side on a device.
        source: "digits", or "npz:FILE" with images and labels.
        side: height and width of an image in pixels.
        batch: images in a batch of an evaluation.
        seed: of everything random.
    """
    privacy = None
    if epsilon is not None:
        if method == "scaffold":
            raise UserError("scaffold keeps a control variate of every client: choose another method")
        privacy = privacy_plan(
            population=clients, cohort=cohort, clip=clip, rounds=steps, delta=delta, epsilon=epsilon
        )
    rate = {"fedadam": 1e-2, "fedavgm": 0.5}.get(method, 1.0) if server_rate is None else server_rate
    server = {
        "fedadam": lambda: fed_adam(rate),
        "fedavgm": lambda: fed_avgm(rate, 0.7),
    }.get(method, lambda: optax.sgd(rate))()

    def algorithm(loss: Loss, server: optax.GradientTransformation, aggregator: Aggregator) -> Algorithm:
        if method == "scaffold":
            return scaffold(loss, local_rate, server)
        mu = proximal if method == "fedprox" else 0.0
        return fed_avg(loss, optax.sgd(local_rate), server, aggregator=aggregator, proximal=mu)

    return Experiment(
        model=MLP(features=(width, 10)),
        task=classification(),
        data=ByClient(Images(source=source, shape=(side, side, 1)), by_label_shards(clients, shards, seed=0)),
        federated=Federated(
            algorithm=algorithm,
            cohort=None if privacy else cohort,
            batch=local_batch,
            epochs=epochs,
            privacy=privacy,
            budget=budget,
            lanes=lanes,
            uniform=method == "scaffold",
        ),
        optimizer=server,
        steps=steps,
        batch=batch,
        seed=seed,
        eval_every=10,
        checkpoint_every=50,
    )
