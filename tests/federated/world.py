"""A small population and a loss that draws from its key, shared by the tests of the engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.federated import fed_avg, group_by_client, init, make_round, plan_round, weighted_mean

SIZES = (5, 1, 3, 0, 7, 2, 4)
KEY = jax.random.key(3)
LANES = (1, 2, 3, 8)


@functools.cache
def clients(dtype="float32"):
    """Seven clients, one without examples."""
    random = np.random.default_rng(0)
    n = sum(SIZES)
    examples = {"x": random.normal(size=(n, 3)).astype(dtype), "y": random.normal(size=n).astype(dtype)}
    return group_by_client(examples, np.repeat(np.arange(len(SIZES)), SIZES), len(SIZES))


def params(dtype=jnp.float32):
    return {"w": jnp.array([0.5, -1.0, 0.25], dtype), "b": jnp.zeros((), dtype)}


def squares(params, batch, mask):
    residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.sum(jnp.where(mask, residual**2 / 2, jnp.zeros_like(residual)))


def plain(params, shared, batch, mask, key):
    """Half the squared error."""
    return {"loss": (squares(params, batch, mask), jnp.sum(mask.astype(jnp.float32)))}


def noisy(params, shared, batch, mask, key):
    """The same, and a pull into a direction that only the key knows: another key is another result."""
    pull = jax.random.normal(key, (3,), params["w"].dtype) @ params["w"]
    count = jnp.sum(mask.astype(jnp.float32))
    loss = squares(params, batch, mask) + pull * count.astype(pull.dtype)
    return {"loss": (loss, count), "weight": (params["w"].sum().astype(jnp.float32) * count, count)}


def mesh(shape=(8,), names=("clients",)):
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


@functools.cache
def algorithm(loss=noisy, aggregator=None, momentum=None, proximal=0.0):
    return fed_avg(
        loss,
        optax.sgd(0.1, momentum),
        aggregator=weighted_mean() if aggregator is None else aggregator,
        proximal=proximal,
    )


@functools.cache
def round_of(algorithm, mesh=None, rows="compiled", local_data=False):
    run = make_round(algorithm, mesh=mesh, rows=rows, local_data=local_data)
    return jax.jit(run) if rows == "compiled" else run


EVERYBODY = tuple(range(len(SIZES)))


def plan(ids=EVERYBODY, round=0, **options):
    return plan_round(clients(), list(ids), round, **{"batch": 2, "seed": 1, "epochs": 2, **options})


def start(algorithm, **options):
    return init(algorithm, params(), len(SIZES), **options)


def trained(algorithm, plan, mesh=None, rows="compiled", state=None):
    """(state, figures) after one round."""
    state = start(algorithm) if state is None else state
    return round_of(algorithm, mesh, rows)(state, clients().examples, plan, KEY)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
