"""Calls of the score and selection kernels to compile ahead of time: (name, function, shapes)."""

import functools

import jax
import jax.numpy as jnp

from odjax_kernels.link_scores import link_scores
from odjax_kernels.packing import words_shape
from odjax_kernels.threshold import gumbel_threshold_mask


def _scores(shape, **options):
    name = f"link_scores {shape[0]} x {shape[1]} {options}"
    words = jax.ShapeDtypeStruct(words_shape(shape), jnp.uint32)
    return name, functools.partial(link_scores, shape=shape, **options), (words,)


def _draw(shape, candidates):
    name = f"gumbel_threshold_mask {shape[0]} x {shape[1]}{' of candidates' if candidates else ''}"
    words = jax.ShapeDtypeStruct(words_shape(shape), jnp.uint32)
    arguments = (
        jax.ShapeDtypeStruct((), jax.random.key(0).dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    if not candidates:
        return name, gumbel_threshold_mask, arguments
    return name, lambda *x: gumbel_threshold_mask(*x[:3], eligible=x[3]), (*arguments, words)


AOT_CASES = [
    _scores((1024, 1024), exact=True),
    _scores((1024, 1024), predictor="CH3.1_L3n", exact=True),
    _scores((2048, 5461), exact=False),
    _scores((200, 300), exact=True),
    _draw((1024, 1024), candidates=True),
    _draw((2048, 5461), candidates=False),
    _draw((200, 300), candidates=True),
]
