"""What the tests of second moments and of moment probing share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from odjax.heads.second_moments import CENTERS, PAIRS, column_normalize, cross_moments

seeds = st.integers(0, 1000)
pairings = st.sampled_from(PAIRS)
centers = st.sampled_from(CENTERS)

moments = jax.jit(cross_moments, static_argnames=("pairs", "center"))
normalize = jax.jit(column_normalize)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(got, want, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


@functools.cache
def compiled(module, method="__call__"):
    return jax.jit(functools.partial(module.apply, method=method))


def run(module, params, *inputs, method="__call__", **more):
    return compiled(module, method)({"params": params}, *inputs, **more)


def moved(module, *inputs, **more):
    """Parameters away from their start, so that nothing is hidden by a zero."""
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), *inputs, **more))["params"]
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(p + 0.3 * noise.normal(size=p.shape), p.dtype), params)
