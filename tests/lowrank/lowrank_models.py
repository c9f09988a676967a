"""Small models with every kind of layer that can be adapted."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from odjax.core import combine, partition
from odjax.lowrank.methods import FACTORS
from odjax.models import MLP, decoder, vit

KEY = jax.random.key(0)
ANY = r".*(kernel|embedding)"
TOKENS = jnp.arange(1, 9, dtype=jnp.int32).reshape(2, 4)
SMALL = {"layers": 2, "width": 16, "heads": 4, "mlp_width": 24}


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), strides=2, padding="CIRCULAR", name="first")(x)
        x = nn.Conv(5, (2, 2), kernel_dilation=2, use_bias=False, name="second")(jnp.tanh(x))
        return nn.Dense(4)(jnp.mean(x, (-3, -2)))


class Products(nn.Module):
    """Every kind of product: batched DenseGeneral, several axes, einsums with a batch letter and an ellipsis."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 3), axis=-1, batch_dims=(0,), name="batched")(x)
        x = nn.DenseGeneral(6, axis=(-1, -2), name="swapped")(jnp.tanh(x))
        x = nn.Einsum((2, 6, 4), "bti,bio->bto", name="einsum")(x)
        return nn.Einsum((4, 5), "...i,io->...o", use_bias=False, name="plain")(x)


def small_decoder(**change):
    sizes = {"vocab": 16, **SMALL, "kv_heads": 2, "head_dim": 4, "max_length": 8, **change}
    return decoder("tiny", **sizes)


MODELS = {
    "scanned decoder": (small_decoder(tied=False, remat="full"), (TOKENS,), ANY),
    "unrolled tied decoder": (small_decoder(scan=False, tied=True), (TOKENS,), ANY),
    "vit": (vit("tiny-digits", classes=8, **SMALL), (jnp.linspace(0, 1, 128).reshape(2, 8, 8, 1),), ANY),
    "mlp": (MLP((8, 6, 4)), (jnp.linspace(-1.0, 1.0, 12).reshape(2, 6),), ANY),
    "conv net": (Convolutions(), (jnp.linspace(-1.0, 1.0, 96).reshape(1, 8, 6, 2),), ANY),
    "products": (Products(), (jnp.linspace(-1.0, 1.0, 30).reshape(2, 3, 5),), ANY),
}


@functools.cache
def bare(name):
    model, inputs, _ = MODELS[name]
    params = nn.unbox(jax.jit(model.init)(KEY, *inputs)["params"])
    return params, jax.jit(lambda p: model.apply({"params": p}, *inputs))


def trained(params):
    """The same tree with factors as after some training."""
    free, frozen = partition(params, FACTORS)
    noise = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape, x.dtype), free)
    return combine(noise, frozen)
