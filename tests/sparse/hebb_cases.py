"""Small networks and runs of CHT, CHTs and CHTss that several modules of tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.models.mlp import MLP
from odjax.sparse import (
    cht,
    chts,
    chtss,
    uniform,
    unpack,
    wiring_of,
)
from odjax.sparse.rewiring import Layer

KEY = jax.random.key(7)
RNG = np.random.default_rng(1)
SHAPES = {"dense_0": (12, 16), "dense_1": (16, 16), "dense_2": (16, 4)}
PARAMS = {
    name: {"kernel": RNG.normal(size=shape).astype(np.float32), "bias": np.zeros(shape[1], np.float32)}
    for name, shape in SHAPES.items()
}
PLAN = uniform(PARAMS, 0.75, where="dense_1/kernel")
TWO = uniform(PARAMS, 0.75, where="dense_[01]/kernel")
GOAL = jax.tree.map(lambda p: RNG.normal(size=p.shape).astype(np.float32), PARAMS)
WIRING = wiring_of(MLP((16, 16, 4)))


def slope(params):
    return jax.tree.map(lambda p, goal: p - goal, params, GOAL)


def masks_of(state, plan=PLAN):
    return {path: np.asarray(unpack(state.masks[path], leaf.shape)) for path, leaf in plan.items()}


def run(optimizer, steps, params=PARAMS):
    """Parameters and states after every update, from a step that is compiled once."""
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        return optimizer.update(slope(params), state, params)

    state = jax.jit(optimizer.init)(params)
    found = [(params, state)]
    for _ in range(steps):
        updates, state = step(*found[-1])
        found.append((optax.apply_updates(found[-1][0], updates), state))
    # Density, zeta and temperature change as it runs; on a mesh the first step lays things out.
    assert len(traces) <= 1 + (len(jax.typeof(state.count).sharding.mesh.shape) > 0)
    return found


@functools.cache
def run_of(name):
    return run(METHODS[name](), 9)


def layer(mask, w=None, count=4, key=KEY, step=1):
    mask = jnp.asarray(mask)
    w = jnp.where(mask, 1.0, 0.0) if w is None else jnp.asarray(w)
    return Layer(key, w, mask, None, jnp.int32(step), jnp.int32(count))


def sgd():
    return optax.sgd(0.05, momentum=0.9)


METHODS = {
    "chts": lambda **o: chts(sgd(), PLAN, key=KEY, end=9, interval=3, **o),
    "chts, fixed and percolating": lambda **o: chts(
        sgd(),
        TWO,
        key=KEY,
        end=None,
        interval=3,
        zeta=0.5,
        adaptive_zeta=False,
        temperature=1.0,
        wiring=WIRING,
        **o,
    ),
    "chtss": lambda **o: chtss(sgd(), PLAN, key=KEY, end=9, interval=3, **o),
    "cht": lambda **o: cht(sgd(), PLAN, key=KEY, interval=3, wiring=WIRING, **o),
}
PLANS = {"chts, fixed and percolating": TWO}
