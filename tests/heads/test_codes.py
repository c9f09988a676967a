"""Class codes: their geometry, and that they do not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.heads.codes import EXTENSIBLE, KINDS, ClassCode, class_code, etf_matrix, extend_code, helmert_rows

KEY = jax.random.key(7)
sizes = st.sampled_from([(2, 1), (2, 5), (3, 2), (5, 4), (5, 5), (7, 12)])
keys = st.sampled_from([None, 0, 1])


def key_of(seed):
    return None if seed is None else jax.random.key(seed)


def gram(code):
    code = np.asarray(code, np.float64)
    return code.T @ code


@given(sizes, keys)
def test_the_simplex_has_the_gram_matrix_of_an_equiangular_tight_frame(size, seed):
    k, d = size
    m = etf_matrix(key_of(seed), k, d)
    np.testing.assert_allclose(gram(m), k / (k - 1) * np.eye(k) - 1 / (k - 1), atol=1e-6)
    np.testing.assert_allclose(np.asarray(m).sum(axis=1), 0, atol=1e-6)
    frame = np.asarray(m, np.float64) @ np.asarray(m, np.float64).T * (k - 1) / k
    np.testing.assert_allclose(frame @ frame, frame, atol=1e-5)  # a projector ...
    np.testing.assert_allclose(np.trace(frame), k - 1, atol=1e-5)  # ... of rank K - 1


@given(st.sampled_from([2, 3, 8]))
def test_helmert_rows_are_an_orthonormal_basis_of_what_is_orthogonal_to_the_ones(k):
    v = np.asarray(helmert_rows(jnp.arange(k, dtype=jnp.int32), k), np.float64)
    np.testing.assert_allclose(v.T @ v, np.eye(k - 1), atol=1e-6)
    np.testing.assert_allclose(v.sum(axis=0), 0, atol=1e-6)


def test_helmert_rows_of_three_are_those_of_the_closed_form():
    a, b = 1 / np.sqrt(2), 1 / np.sqrt(6)
    np.testing.assert_allclose(
        helmert_rows(jnp.arange(3, dtype=jnp.int32), 3), [[a, b], [-a, b], [0, -2 * b]], atol=1e-7
    )


def test_a_rotated_simplex_of_triangles_is_uniform_over_the_circle():
    # The first vertex of a simplex of three in the plane is uniform over the circle: its mean is 0.
    first = np.stack([np.asarray(etf_matrix(jax.random.key(i), 3, 2))[:, 0] for i in range(64)])
    assert np.abs(first.mean(axis=0)).max() < 5 / np.sqrt(2 * 64)
    assert (first[:, 0] > 0).any()
    assert (first[:, 0] < 0).any()


@given(st.sampled_from([(2, 3), (3, 3), (5, 3), (6, 3), (9, 5)]), keys)
def test_the_orthoplex_has_products_of_zero_and_minus_one(size, seed):
    k, d = size
    found = gram(class_code(key_of(seed), k, d, "orthoplex"))
    i, j = np.indices((k, k))
    expected = np.where(i == j, 1.0, np.where(i % d == j % d, -1.0, 0.0))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@given(st.sampled_from([(3, 3), (2, 5)]), keys)
def test_orthonormal_vectors_are(size, seed):
    k, d = size
    np.testing.assert_allclose(gram(class_code(key_of(seed), k, d, "orthonormal")), np.eye(k), atol=1e-6)


@pytest.mark.parametrize("k, d, best", [(5, 2, np.cos(2 * np.pi / 5)), (4, 3, -1 / 3), (6, 3, 0.0)])
def test_the_optimized_code_finds_the_best_known_packings(k, d, best):
    found = gram(class_code(KEY, k, d, "optimized")) - 2 * np.eye(k)
    np.testing.assert_allclose(found.max(), best, atol=2e-3)


def test_an_optimized_code_of_twelve_in_space_is_the_icosahedron():
    found = gram(class_code(KEY, 12, 3, "optimized"))
    np.testing.assert_allclose(np.sort(np.unique(found.round(2))), [-1, -0.45, 0.45, 1])


def test_gaussian_vectors_have_lengths_of_one_in_the_mean_and_sphere_ones_exactly():
    gaussian = np.asarray(class_code(KEY, 200, 32, "gaussian"))
    lengths = (gaussian**2).sum(axis=0)
    assert abs(lengths.mean() - 1) < 5 * np.sqrt(2 / 32 / 200)
    assert lengths.std() > 0.1
    np.testing.assert_allclose(np.diag(gram(class_code(KEY, 50, 32, "sphere"))), 1, atol=1e-6)


@given(
    st.sampled_from(
        [
            (2, 4, "simplex"),
            (5, 4, "simplex"),
            (6, 4, "orthoplex"),
            (99, 32, "hadamard"),
            (9, 4, "sphere"),
            (9, 3, "sphere"),
        ]
    )
)
def test_auto_takes_the_best_code_that_there_is(case):
    k, d, kind = case
    assert ClassCode(k, d).kind == kind


@given(st.sampled_from(EXTENSIBLE), st.sampled_from([0, 1]))
def test_a_longer_code_begins_with_the_shorter_one(kind, seed):
    key = jax.random.key(seed)
    old = class_code(key, 3, 8, kind)
    new = extend_code(key, old, 8, kind)
    assert new.shape == (8, 8)
    np.testing.assert_array_equal(new[:, :3], old)
    np.testing.assert_allclose(new, class_code(key, 8, 8, kind), atol=1e-5)


@given(st.sampled_from(KINDS))
def test_columns_are_those_of_the_matrix_and_need_no_others(kind):
    code = ClassCode(4, 8, kind, 0 if kind in ("sphere", "gaussian", "hadamard", "optimized") else None)
    if not code.by_number:
        with pytest.raises(ValueError, match="made together"):
            code.columns(jnp.arange(2, dtype=jnp.int32))
        return
    picked = jnp.array([3, 1], jnp.int32)
    np.testing.assert_array_equal(code.columns(picked), code.matrix().T[picked])


def test_codes_of_one_description_are_equal_and_hashable():
    assert ClassCode(99, 32) == ClassCode(np.int64(99), 32, "hadamard", 0)
    assert len({ClassCode(99, 32), ClassCode(99, 32), ClassCode(99, 32, seed=1)}) == 2


@pytest.mark.parametrize("size", [(100, 32), (1000, 64), (10, 4), (64, 8), (100, 8), (1000, 16)])
def test_no_two_classes_of_an_automatic_code_have_one_vector(size):
    k, d = size
    for seed in range(5):
        found = gram(ClassCode(k, d, seed=seed).matrix()) - 2 * np.eye(k)
        assert found.max() < 1 - 1e-4


def test_the_matrix_is_rounded_once_and_made_in_float32():
    wide = class_code(KEY, 5, 8, "simplex")
    np.testing.assert_array_equal(class_code(KEY, 5, 8, "simplex", jnp.bfloat16), wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((5, 3, "simplex"), ValueError, "needs at least 4 dimensions, got 3: .*kind='auto' of class_code"),
        ((1, 3), ValueError, "at least 2 classes and 1 dimension, got 1 and 3"),
        ((9, 4, "orthoplex"), ValueError, "has 8 vectors, got 9"),
        ((9, 6, "hadamard"), ValueError, "power of two of dimensions, got 6: the next is 8, or .*sphere"),
        ((9, 6, "orthonormal"), ValueError, "need at least 9 dimensions, got 6"),
        ((9.0, 6), TypeError, "num_classes must be a whole number, got 9.0"),
        ((9, 6.5), TypeError, "dim must be a whole number, got 6.5"),
        ((True, 6), TypeError, "num_classes must be a whole number, got True"),
        ((9, 6, "etf"), ValueError, "kind must be auto or one of simplex, .*, got 'etf'"),
        ((9, 6, "sphere", None), ValueError, "is random: give it a seed"),
        ((99, 32, "hadamard", None), ValueError, "is random: give it a seed"),
        ((9, 4, "hadamard"), ValueError, "4 random signs are too few .* of 9 classes apart: take 64 dim"),
        ((9, 4, "auto", -1), ValueError, r"seed must be in \[0, 2\^63\), got -1"),
        ((9, 4, "auto", 0.5), TypeError, "seed must be a whole number, got 0.5"),
    ],
    ids=str,
)
def test_a_code_that_cannot_be_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ClassCode(*arguments)


def test_a_simplex_does_not_grow_and_the_error_says_what_to_do():
    old = etf_matrix(KEY, 3, 8)
    with pytest.raises(ValueError, match="moves all of its vectors .* reserve num_classes .*eval_classes"):
        extend_code(KEY, old, 5, "simplex")
    with pytest.raises(ValueError, match="has 3 classes already, got num_classes 2"):
        extend_code(KEY, class_code(KEY, 3, 8, "hadamard"), 2, "hadamard")


def test_a_key_that_is_none_of_jax_is_refused():
    with pytest.raises(TypeError, match="key must be a typed key"):
        class_code(0, 3, 4)
