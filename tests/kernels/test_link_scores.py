"""Link scores from packed masks: the kernel, its reference and the library's scores agree."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.experimental.pallas import tpu as pltpu

from odjax.sparse.link_prediction import NODE_PREDICTORS, ch_scores
from odjax.sparse.masks import pack, packed_shape, unpack
from odjax_kernels.link_scores import PREDICTORS, link_scores, link_scores_reference
from odjax_kernels.packing import pack_rows, unpack_words, words_shape

SHAPES = {"narrow": (70, 130), "blocks": (300, 150)}
"""A group of less than eight words, and a block of two groups by two chunks of columns, none of them whole."""

kernel = functools.partial(link_scores, lanes=128, interpret=True)
reference = jax.jit(link_scores_reference, static_argnums=(1, 2), static_argnames="exact")


def graph(shape, seed=0, density=0.1):
    return np.random.default_rng(seed).random(shape) < density


@pytest.mark.parametrize("shape", [(1, 1), (33, 4), (224, 3), (225, 3), (256, 2), (300, 5)])
def test_the_layout_restated_here_is_that_of_the_masks(shape):
    mask = jnp.asarray(graph(shape, density=0.5))
    words = pack(mask)
    assert words.shape == words_shape(shape) == packed_shape(shape)
    np.testing.assert_array_equal(pack_rows(mask), words)
    np.testing.assert_array_equal(unpack_words(words, shape[0]), mask)
    np.testing.assert_array_equal(unpack(pack_rows(mask), shape), mask)


def test_the_predictors_restated_here_are_those_of_the_library():
    i, e = jnp.arange(1.0, 9), jnp.arange(8.0)
    assert list(PREDICTORS) == list(NODE_PREDICTORS)
    for name, weight in PREDICTORS.items():
        np.testing.assert_array_equal(weight(i, e), NODE_PREDICTORS[name](i, e))


@pytest.mark.parametrize(
    ("shape", "exact"), [(SHAPES["narrow"], True), (SHAPES["blocks"], True), (SHAPES["blocks"], False)]
)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0, 1))
def test_the_kernel_gives_the_bits_of_its_reference(shape, exact, seed, density):
    words = pack(jnp.asarray(graph(shape, seed, density)))
    np.testing.assert_array_equal(kernel(words, shape, exact=exact), reference(words, shape, exact=exact))


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_in_fixed_point_the_kernel_gives_the_bits_of_the_library_for_every_predictor(predictor):
    shape = SHAPES["narrow"]
    mask = jnp.asarray(graph(shape))
    want = ch_scores(mask, predictor)
    assert want.max() > 0
    np.testing.assert_array_equal(kernel(pack(mask), shape, predictor), want)
    np.testing.assert_array_equal(reference(pack(mask), shape, predictor), want)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_weights_in_bfloat16_are_within_its_rounding_of_float32(predictor):
    shape = SHAPES["blocks"]
    mask = jnp.asarray(graph(shape))
    got = reference(pack(mask), shape, predictor, exact=False)
    # Terms are positive, so that a sum errs by at most what a term does: half a step of eight binary digits.
    np.testing.assert_allclose(got, ch_scores(mask, predictor, exact=False), rtol=2.0**-8)


@pytest.mark.parametrize("interpret", [True, pltpu.InterpretParams()])
def test_three_groups_are_three_blocks_of_rows_in_both_interpreters(interpret):
    shape = (520, 140)
    words = pack(jnp.asarray(graph(shape)))
    assert words.shape[0] == 24
    got = link_scores(words, shape, lanes=128, interpret=interpret)
    np.testing.assert_array_equal(got, reference(words, shape))


def test_layers_are_scored_alone():
    shape = SHAPES["narrow"]
    masks = jnp.asarray(graph((2, 1, *shape)))
    words = jnp.stack([pack(mask[0])[None] for mask in masks])
    got = kernel(words, shape)
    assert got.shape == (2, 1, *shape)
    for layer in range(2):
        np.testing.assert_array_equal(got[layer, 0], kernel(words[layer, 0], shape))


def test_empty_and_full_masks_score_nothing():
    shape = SHAPES["blocks"]
    for density in (0, 1):
        words = pack(jnp.asarray(graph(shape, density=density)))
        np.testing.assert_array_equal(kernel(words, shape), np.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "predictor", "exact"), [((40, 30), "CH3.1_L3n", True), ((2048, 5461), "CH2_L3n", False)]
)
def test_it_lowers_for_tpus_on_a_machine_without_one(shape, predictor, exact):
    fn = jax.jit(lambda words: link_scores(words, shape, predictor, exact=exact))
    exported = jax.export.export(fn, platforms=["tpu"])(jax.ShapeDtypeStruct(words_shape(shape), jnp.uint32))
    assert "link_scores_rows" in exported.mlir_module()
    assert "link_scores_columns" in exported.mlir_module()
    assert exported.out_avals[0].shape == shape


def test_bad_input_is_named():
    words = jnp.zeros((1, 3), jnp.uint32)
    with pytest.raises(TypeError, match="words must be uint32, got bool: pack a bool mask first"):
        link_scores(jnp.zeros((2, 3), bool), (2, 3))
    with pytest.raises(
        ValueError, match=r"words of a mask of shape \(40, 3\) are \[\.\.\., 2, 3\], got \(1, 3\)"
    ):
        link_scores(words, (40, 3))
    with pytest.raises(
        ValueError, match=r"shape must be that of a matrix with entries, \(n, m\), got \(2, 3, 4\)"
    ):
        link_scores(words, (2, 3, 4))
    with pytest.raises(ValueError, match="predictor must be one of CH2_L3n.*got 'CH2'"):
        link_scores_reference(words, (2, 3), "CH2")
    with pytest.raises(ValueError, match="lanes must be a multiple of 128, got 100"):
        link_scores(words, (2, 3), lanes=100)
    with pytest.raises(ValueError, match=r"fewer than 2\^16 nodes a side, got \(1, 65536\)"):
        jax.eval_shape(lambda w: link_scores(w, (1, 1 << 16)), jax.ShapeDtypeStruct((1, 1 << 16), jnp.uint32))
