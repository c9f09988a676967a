"""Calls of the score and selection kernels to compile ahead of time: (name, function, shapes)."""

import functools

import jax
import jax.numpy as jnp

from odjax_kernels.link_scores import link_scores
from odjax_kernels.packing import words_shape


def _scores(shape, **options):
    name = f"link_scores {shape[0]} x {shape[1]} {options}"
    words = jax.ShapeDtypeStruct(words_shape(shape), jnp.uint32)
    return name, functools.partial(link_scores, shape=shape, **options), (words,)


AOT_CASES = [
    _scores((1024, 1024), exact=True),
    _scores((1024, 1024), predictor="CH3.1_L3n", exact=True),
    _scores((2048, 5461), exact=False),
    _scores((200, 300), exact=True),
]
