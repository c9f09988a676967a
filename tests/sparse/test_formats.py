"""Formats hold the kernel, and are recognised."""

import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.sparse.formats import fits_n_of_m, nm_compress, nm_expand, to_bcsr

KERNELS = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31 - 1), st.floats(0, 1))


@given(KERNELS)
def test_compressed_rows_are_the_kernel(drawn):
    n, m, seed, density = drawn
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(n, m)).astype(np.float32)
    mask = rng.random((n, m)) < density
    rows = to_bcsr(kernel, mask)
    assert rows.nse == mask.sum()
    dense = np.zeros((m, n), np.float32)
    for row in range(m):
        for place in range(int(rows.indptr[row]), int(rows.indptr[row + 1])):
            dense[row, int(rows.indices[place])] = rows.data[place]
    np.testing.assert_array_equal(dense.T, np.where(mask, kernel, 0))


def test_compressed_rows_multiply_like_the_dense_kernel():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(30, 20)).astype(np.float32) * (rng.random((30, 20)) < 0.1)
    kernel[:, 4] = 0
    x = rng.normal(size=(7, 30)).astype(np.float32)
    y = jax.jit(lambda rows, x: (rows @ x.T).T)(to_bcsr(kernel), x)
    np.testing.assert_allclose(y, x @ kernel, atol=1e-6)


def test_links_of_weight_zero_are_stored_when_the_mask_has_them():
    kernel = np.array([[0.0, 1.0]], np.float32)
    assert to_bcsr(kernel, np.ones((1, 2), bool)).nse == 2
    assert to_bcsr(kernel).nse == 1


GROUPS = st.sampled_from([(2, 4), (1, 4), (1, 2), (4, 8), (3, 3)])


@given(GROUPS, st.sampled_from([0, 1, -1, -2]), st.integers(0, 2**31 - 1), st.floats(0, 1))
def test_n_of_m_round_trips_and_its_layout_is_recognised(group, axis, seed, density):
    n, m = group
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(2 * m, 3 * m)).astype(np.float32) * (rng.random((2 * m, 3 * m)) < density)
    fits = all(
        np.count_nonzero(np.take(kernel, range(start, start + m), axis=axis), axis=axis).max() <= n
        for start in range(0, kernel.shape[axis], m)
    )
    assert fits_n_of_m(kernel, n, m, axis=axis) == fits
    if not fits:
        with pytest.raises(ValueError, match=f"{n}:{m} allows {n}"):
            nm_compress(kernel, n, m, axis=axis)
        return
    values, places = nm_compress(kernel, n, m, axis=axis)
    assert values.shape[axis] == kernel.shape[axis] * n // m
    np.testing.assert_array_equal(nm_expand(values, places, n, m, axis=axis), kernel)


def test_places_ascend_and_free_places_fill_up():
    values, places = nm_compress(np.array([[0, 0, 0, 7.0], [0, 0, 0, 0], [3.0, 0, 4.0, 0]]), axis=-1)
    np.testing.assert_array_equal(values, [[0, 7], [0, 0], [3, 4]])
    np.testing.assert_array_equal(places, [[0, 3], [0, 1], [0, 2]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: to_bcsr(np.ones((2, 3, 4))), ValueError, "take one layer of a stack"),
        (lambda: to_bcsr(np.ones((2, 3)), np.ones((2, 3))), TypeError, "mask must be bool, got float64"),
        (
            lambda: to_bcsr(np.ones((2, 3)), np.ones((3, 2), bool)),
            ValueError,
            "shape (3, 2), the kernel (2, 3)",
        ),
        (
            lambda: fits_n_of_m(np.ones((6, 4))),
            ValueError,
            "axis -2 of (6, 4) has 6 entries, no multiple of 4",
        ),
        (lambda: fits_n_of_m(np.ones((4, 4)), 5, 4), ValueError, "needs 0 < n <= m, got 5:4"),
        (lambda: fits_n_of_m(np.ones(4)), ValueError, "axis -2 is no axis of an array (4,)"),
        (lambda: nm_compress(np.zeros((512, 1)), 2, 512), ValueError, "m must be at most 256, got 512"),
        (lambda: nm_expand(np.ones(2), np.ones(3, int), axis=-1), ValueError, "must have one shape"),
        (lambda: nm_expand(np.ones(2), np.array([1, 4]), axis=-1), ValueError, "below m = 4, got 4"),
    ],
)
def test_kernels_that_fit_no_format_are_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
