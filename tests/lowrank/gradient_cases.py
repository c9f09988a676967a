"""Inner transforms, an objective, and the paper's chain written out plainly, for tests of the gradient view."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.lowrank import lift, project

KEY = jax.random.key(0)
INNERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.chain(optax.trace(0.9), optax.scale(-0.03)),
    "adam": lambda: optax.chain(optax.scale_by_adam(), optax.scale(-0.02)),
    "lion": lambda: optax.chain(optax.scale_by_lion(), optax.scale(-0.01)),
    "rms": lambda: optax.chain(optax.clip(0.5), optax.scale_by_rms(), optax.scale(-0.02)),
}


def lenient(inner):
    """optax promotes int32 counts to floats."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def quadratic(shape, seed=0, dtype=jnp.float64):
    """f(W) = |C * (W - W*)|^2 / 2 + sum cos W, its start, with entries of C in [0.5, 2]."""
    rng = np.random.default_rng(seed)
    c, best, start = (
        jnp.asarray(a, dtype) for a in (rng.uniform(0.5, 2, shape), *rng.normal(size=(2, *shape)))
    )
    return lambda w: jnp.sum((c * (w - best)) ** 2) / 2 + jnp.sum(jnp.cos(w)), start


def run(transform, f, params, steps):
    """The parameters after every update."""

    def step(carry, _):
        params, state = carry
        updates, state = transform.update(jax.grad(f)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda p: jax.lax.scan(step, (p, transform.init(p)), None, length=steps)[1])(params)


def factor_view(inner, f, w, blocks, k, draw, s, side):
    """Algorithm 1 of the paper: train Z from zero for k steps on f(W + s lift(Q, Z)), merge, draw again."""
    inner = lenient(inner)

    def block(w, t):
        q = draw(t)

        def step(carry, _):
            z, state = carry
            g = jax.grad(lambda z: f(w + s * lift(q, z, side)))(z)
            u, state = inner.update(g, state)
            z = z + u
            return (z, state), w + s * lift(q, z, side)

        z = jnp.zeros_like(project(q, w, side))
        _, path = jax.lax.scan(step, (z, inner.init(z)), None, length=k)
        return path[-1], path

    return jax.jit(lambda w: jax.lax.scan(block, w, jnp.arange(blocks))[1].reshape(-1, *w.shape))(w)


def traced(function):
    """The function jitted, and a list that grows by one with every trace."""
    traces = []

    def call(*arguments):
        traces.append(len(arguments))
        return function(*arguments)

    return jax.jit(call), traces
