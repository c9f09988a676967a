"""Rows of the contract matrix: rounds of clients, and privacy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .contract_row import KEY, Row


def _clients():
    """Four clients with 11 examples of 6 features, one without any."""
    import numpy as np

    from odjax.federated import group_by_client

    random = np.random.default_rng(0)
    examples = {
        "x": random.normal(size=(11, 6)).astype(np.float32),
        "y": random.normal(size=11).astype(np.float32),
    }
    return group_by_client(examples, np.array([0] * 5 + [1] * 2 + [3] * 4), 4)


def _error(outputs, batch, mask):
    error = jnp.square(outputs - batch["y"])
    return {"loss": (jnp.sum(jnp.where(mask, error, 0.0)), jnp.sum(mask.astype(jnp.float32)))}


def _linear_loss(params, shared, batch, mask, key):
    noise = jax.random.normal(key, (6,))
    kernel = params["body"]["kernel"][:, 0] + 0.1 * noise
    return _error(batch["x"] @ kernel + params["body"]["bias"][0], batch, mask)


def _privacy():
    from odjax.privacy import privacy_plan

    return privacy_plan(population=4, cohort=4, clip=0.1, rounds=2, delta=1e-2, noise_multiplier=0.5)


def _fed_avg(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.federated import fed_avg, private_sum

        if options.get("private"):
            algorithm = fed_avg(_linear_loss, optax.sgd(0.1), aggregator=private_sum(_privacy()))
        else:
            algorithm = fed_avg(_linear_loss, optax.sgd(0.1, 0.9), **options)
        params = {"body": {"kernel": jnp.arange(6.0)[:, None] / 10, "bias": jnp.zeros(1)}}
        return algorithm, params, None, _clients()

    return build


def _scaffold():
    from odjax.federated import scaffold

    _, params, frozen, clients = _fed_avg()()
    return scaffold(_linear_loss, 0.1), params, frozen, clients


def _fed_low_rank(method: str, name: str) -> Callable[[], Any]:
    def build():
        import flax.linen as nn

        from odjax import federated
        from odjax.core import partition
        from odjax.lowrank import FACTORS, adapt

        model, clients = adapt(nn.Dense(3), rank=2, method=method), _clients()
        params = nn.unbox(model.init(KEY, jnp.asarray(clients.examples["x"]))["params"])

        def loss(model, params, batch, mask, key):
            return _error(model.apply({"params": params}, batch["x"]).sum(-1), batch, mask)

        if name == "fed_low_rank":
            algorithm = federated.fed_low_rank(
                model, loss, optax.sgd(0.1), aggregator=federated.private_sum(_privacy())
            )
        elif name == "fed_dylora":
            algorithm = federated.fed_dylora(model, params, loss, optax.sgd(0.1), federated.fed_adam(0.1))
        else:
            algorithm = federated.dp_dylora(model, params, loss, optax.sgd(0.1), _privacy())
        return algorithm, *partition(params, FACTORS), clients

    return build


def _round():
    from odjax.federated import fed_avg, init, make_round, plan_round

    clients = _clients()

    def loss(params, shared, batch, mask, key):
        kernel = params["w"].reshape(-1)[:6]
        return _error(batch["x"] @ kernel, batch, mask)

    algorithm = fed_avg(loss, optax.sgd(0.1))
    run, plan = make_round(algorithm), plan_round(clients, range(4), 0, batch=2, seed=0, lanes=2)

    def after(w):
        return run(init(algorithm, {"w": w}, 4), clients.examples, plan, KEY)[0].params["w"]

    return after, (jnp.arange(32.0).reshape(8, 4) / 32,)


def _private_sum():
    from odjax.federated import private_sum

    aggregator = private_sum(_privacy())

    def update(deltas):
        statistic = aggregator.statistic(deltas[0], len(deltas))
        total = statistic.zero()
        for i, delta in enumerate(deltas):
            lifted, _ = aggregator.lift(delta, None)
            total = statistic.observe(total, lifted, jnp.float32(1), jnp.int32(i), KEY)
        return aggregator.finish(total, KEY, None)

    return update, (jax.random.normal(KEY, (4, 8)),)


def _private_gradient():
    from odjax.privacy import private_gradient

    gradient = private_gradient(lambda w, x: jnp.sum(jnp.sin(w) * x), _privacy())
    batch, mask = jax.random.normal(KEY, (4, 8, 4)), jnp.array([True, True, True, False])
    return lambda w: gradient(w, batch, mask, KEY)[0], (jax.random.normal(jax.random.key(1), (8, 4)),)


def _server(name: str, *arguments: Any) -> Callable[[], Any]:
    def build():
        from odjax.federated import server

        return getattr(server, name)(*arguments)

    return build


def _privatizer():
    from odjax.privacy import Clip, privatizer

    return privatizer(Clip(1.0), 0.5, KEY, normalizer=10.0)


FEDERATED: tuple[Row, ...] = (
    Row("odjax.federated.server.fed_avg", "transform", _server("fed_avg")),
    Row("odjax.federated.server.fed_avgm", "transform", _server("fed_avgm", 1.0, 0.9)),
    Row("odjax.federated.server.fed_adam", "transform", _server("fed_adam", 0.1)),
    Row("odjax.privacy.noise.privatizer", "transform", _privatizer),
    Row("odjax.federated.algorithms.make_round", "function", _round, "", 1e-5),
    Row("odjax.federated.aggregate.private_sum", "function", _private_sum, "", 1e-5),
    Row("odjax.privacy.dp_sgd.private_gradient", "function", _private_gradient, "", 1e-5),
    Row("odjax.federated.algorithms.fed_avg", "algorithm", _fed_avg()),
    Row("odjax.federated.algorithms.fed_avg", "algorithm", _fed_avg(proximal=0.1), "prox"),
    Row("odjax.federated.algorithms.fed_avg", "algorithm", _fed_avg(private=True), "private"),
    Row("odjax.federated.algorithms.scaffold", "algorithm", _scaffold),
    Row("odjax.federated.lowrank.fed_low_rank", "algorithm", _fed_low_rank("asym", "fed_low_rank")),
    Row("odjax.federated.dylora.fed_dylora", "algorithm", _fed_low_rank("lora", "fed_dylora")),
    Row("odjax.federated.dylora.dp_dylora", "algorithm", _fed_low_rank("lora", "dp_dylora")),
)
