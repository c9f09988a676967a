"""Path based Cannistraci-Hebb scores."""

import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from odjax.sparse.path_scores import PATH_PREDICTORS, path_scores

N, M = 7, 5
# Sums of at most N M positive terms, each a product of a few rounded factors.
CLOSE = {"rtol": 4e-6}


def graphs(shape=(N, M)):
    """Masks of every density."""

    def draw(seed: int, density: float) -> np.ndarray:
        return np.random.default_rng(seed).random(shape) < density

    return st.builds(draw, st.integers(0, 2**32 - 1), st.floats(0, 1))


@functools.cache
def compiled(predictor, max_links, chunk):
    return jax.jit(functools.partial(path_scores, predictor=predictor, max_links=max_links, chunk=chunk))


def scores(mask, predictor="CH3_L3p", max_links=N * M, chunk=8):
    return np.asarray(compiled(predictor, max_links, chunk)(jnp.asarray(mask)))


def by_enumeration(mask: np.ndarray) -> dict[str, np.ndarray]:
    """The definition, path by path."""
    n, m = mask.shape
    ins = [set(np.flatnonzero(row)) for row in mask]
    outs = [set(np.flatnonzero(column)) for column in mask.T]
    total = {name: np.zeros((n, m)) for name in PATH_PREDICTORS}
    for u in range(n):
        for v in range(m):
            if mask[u, v]:
                continue
            paths = [(a, b) for a in ins[u] for b in outs[v] if a in ins[b]]
            for a, b in paths:
                ia = len({y for x, y in paths if x == a})
                ib = len({x for x, y in paths if y == b})
                ea, eb = len(outs[a]) - ia - 1, len(ins[b]) - ib - 1
                total["CH3_L3p"][u, v] += 1 / math.sqrt((1 + ea) * (1 + eb))
                total["CH2_L3p"][u, v] += math.sqrt((1 + ia) * (1 + ib) / ((1 + ea) * (1 + eb)))
                total["CH3.1_L3p"][u, v] += 1 / math.sqrt((1 / (1 + ia) + ea) * (1 / (1 + ib) + eb))
    return total


@given(mask=graphs())
def test_the_closed_form_is_the_sum_over_the_paths(mask):
    for predictor, want in by_enumeration(mask).items():
        np.testing.assert_allclose(scores(mask, predictor), want, **CLOSE)


@given(mask=graphs())
def test_a_score_is_positive_exactly_where_a_link_is_absent_and_a_path_of_length_three_joins_its_ends(mask):
    a = mask.astype(np.int64)
    for predictor in PATH_PREDICTORS:
        np.testing.assert_array_equal(scores(mask, predictor) > 0, (a @ a.T @ a > 0) & ~mask)


@given(mask=graphs(), seed=st.integers(0, 1000))
def test_scores_move_with_the_nodes_and_with_the_sides(mask, seed):
    rng = np.random.default_rng(seed)
    p, q = rng.permutation(N), rng.permutation(M)
    np.testing.assert_allclose(scores(mask[p][:, q]), scores(mask)[p][:, q], **CLOSE)
    np.testing.assert_allclose(scores(mask.T), scores(mask).T, **CLOSE)


@given(mask=graphs((2, N, M)))
def test_stacked_layers_and_chunks_of_links_change_nothing(mask):
    apart = np.stack([scores(layer) for layer in mask])
    np.testing.assert_array_equal(scores(mask), apart)
    np.testing.assert_allclose(scores(mask, chunk=3), apart, **CLOSE)
    np.testing.assert_allclose(scores(mask, chunk=10_000), apart, **CLOSE)


def test_the_scores_of_graphs_small_enough_for_the_hand():
    mask = np.array([[True, True, False], [False, True, True]])
    np.testing.assert_allclose(scores(mask), [[0, 0, 1], [1, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(scores(mask, "CH2_L3p"), [[0, 0, 2], [2, 0, 0]], rtol=1e-6)
    complete = np.ones((5, 4), bool)
    complete[2, 1] = False
    np.testing.assert_allclose(scores(complete)[2, 1], (5 - 1) * (4 - 1), rtol=1e-6)


@given(mask=graphs())
def test_the_bound_on_the_links_may_be_tight_and_a_layer_beyond_it_is_no_number(mask):
    few = mask & (np.cumsum(mask.reshape(-1)).reshape(mask.shape) <= 9)
    np.testing.assert_allclose(scores(few, max_links=9, chunk=4), scores(few), **CLOSE)
    over = scores(mask, max_links=9, chunk=4)
    assert np.isnan(over).all() == (mask.sum() > 9)


def test_bad_input_is_named():
    mask = jnp.ones((2, 3), bool)
    with pytest.raises(TypeError, match="type mask != 0"):
        path_scores(jnp.ones((2, 3)), max_links=6)
    with pytest.raises(ValueError, match=r"got bool\[3\]"):
        path_scores(jnp.ones(3, bool), max_links=6)
    with pytest.raises(
        ValueError, match=r"one of CH3_L3p.*got 'CH2_L3n'; for a sum over nodes use ch_scores"
    ):
        path_scores(mask, "CH2_L3n", max_links=6)
    with pytest.raises(ValueError, match="max_links must be at least 1, got 0"):
        path_scores(mask, max_links=0)
    with pytest.raises(ValueError, match="chunk must be at least 1, got -1"):
        path_scores(mask, max_links=6, chunk=-1)
    with pytest.raises(ValueError, match=r"mask \[2, 3\] has 6 links: type max_links=6 or more"):
        path_scores(mask, max_links=5)
