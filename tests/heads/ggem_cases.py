"""What the tests of GGeM share."""

import jax
import numpy as np
from hypothesis import strategies as st

from odjax.heads.ggem import RECTIFIERS, ggem_pool

SEEDS = st.integers(0, 2**31)
GROUPS = st.sampled_from([1, 2, 4, 8])
VARIANTS = [*({"rectify": name} for name in RECTIFIERS), {"signed": True}]
pool = jax.jit(ggem_pool, static_argnames=("eps", "rectify", "signed", "axis_name"))


def uniform(seed, shape=(3, 6, 8), low=0.1, high=4.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def signs(seed, shape=(3, 6, 8)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def exponents(seed, groups, low=0.5, high=8.0):
    return uniform(seed + 1, (groups,), low, high)


def some_tokens(seed, shape=(3, 6)):
    """A mask that keeps at least one token of every sample."""
    rng = np.random.default_rng(seed + 2)
    mask = rng.random(shape) < 0.5
    mask[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = True
    return mask


def power_mean(x, p, eps=1e-6):
    """The definition, in float64."""
    r = np.maximum(np.asarray(x, np.float64), eps)
    p = np.repeat(np.asarray(p, np.float64), x.shape[-1] // len(p))
    return np.mean(r**p, axis=-2) ** (1 / p)
