"""One-vs-rest margins: closed forms, brute force over the faces of the hull, and a certificate that holds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.heads.margins import hull_distances, margin_metrics, one_vs_rest_margins, project_simplex

seeds = st.integers(0, 10_000)
distances = jax.jit(hull_distances, static_argnames=("iterations", "batch_size"))
metrics_of = jax.jit(margin_metrics)
project, of_optax = jax.jit(project_simplex), jax.jit(optax.projections.projection_simplex)


def simplex(classes, dim):
    vertices = np.sqrt(classes / (classes - 1)) * (np.eye(classes) - 1 / classes)
    basis = np.linalg.svd(vertices)[2][: classes - 1]  # the vertices lie in classes - 1 dimensions
    return np.pad(vertices @ basis.T, [(0, 0), (0, dim - classes + 1)]).T


def rotation(seed, dim):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def nearest_by_faces(code, k):
    """The exact distance to the hull of the others: the nearest point lies inside some face."""
    target, others = code[:, k], np.delete(code, k, axis=1)
    best = np.inf
    for size in range(1, others.shape[1] + 1):
        for face in itertools.combinations(range(others.shape[1]), size):
            corner, edges = others[:, face[0]], others[:, face[1:]] - others[:, face[:1]]
            inner = np.linalg.lstsq(edges, target - corner)[0] if size > 1 else np.zeros(0)
            if (inner >= 0).all() and inner.sum() <= 1:
                best = min(best, np.linalg.norm(target - corner - edges @ inner))
    return best


@given(seeds, st.sampled_from([1, 2, 7]), st.sampled_from([0.1, 1.0, 100.0]))
def test_the_projection_is_that_of_optax(seed, size, scale):
    y = jnp.asarray(scale * np.random.default_rng(seed).normal(size=size), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        expected = of_optax(y)
    np.testing.assert_allclose(project(y), expected, atol=1e-5)


@given(seeds)
def test_entries_of_minus_infinity_are_not_there_for_the_projection(seed):
    y = np.random.default_rng(seed).normal(size=7).astype(np.float32)
    there = np.array([True, False, True, True, False, True, True])
    got = np.asarray(project(jnp.where(there, y, -jnp.inf)))
    np.testing.assert_array_equal(got[~there], 0)
    np.testing.assert_allclose(got[there], project(jnp.asarray(y[there])), atol=1e-6)


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (3, 2), (5, 4), (5, 9), (12, 16)])
def test_vertices_of_a_simplex_have_the_margin_k_over_k_minus_one(classes, dim):
    code = jnp.asarray(rotation(classes, dim) @ simplex(classes, dim), jnp.float32)
    result = distances(code, iterations=20)
    np.testing.assert_allclose(result.distance, classes / (classes - 1), rtol=1e-5)
    np.testing.assert_allclose(result.lower, classes / (classes - 1), rtol=1e-5)


@pytest.mark.parametrize(("classes", "dim"), [(4, 2), (5, 3), (6, 3), (6, 4), (8, 4)])
def test_an_orthoplex_with_two_antipodal_pairs_has_the_margin_one(classes, dim):
    # All of +e_i and the first K - d of -e_i: K >= d + 2 makes two pairs.
    code = np.concatenate([np.eye(dim), -np.eye(dim)[:, : classes - dim]], axis=1)
    result = distances(jnp.asarray(rotation(classes, dim) @ code, jnp.float32))
    np.testing.assert_allclose(result.distance, 1, rtol=1e-5)
    np.testing.assert_allclose(result.lower, 1, rtol=1e-4)


def test_with_one_antipodal_pair_its_vectors_are_further_than_one():
    code = jnp.asarray(np.concatenate([np.eye(3), -np.eye(3)[:, :1]], axis=1), jnp.float32)
    # e_1 sees the triangle of -e_1, e_2, e_3: nearest is the middle of e_2 e_3, at distance sqrt(1 + 1/2).
    expected = [np.sqrt(1.5), 1, 1, np.sqrt(1.5)]
    np.testing.assert_allclose(distances(code).distance, expected, rtol=1e-5)


@pytest.mark.parametrize("classes", [4, 5, 9])
def test_corners_of_a_regular_polygon_are_as_far_as_the_chord_of_their_neighbours(classes):
    angles = 2 * np.pi * np.arange(classes) / classes
    code = jnp.asarray([np.cos(angles), np.sin(angles)], jnp.float32)
    np.testing.assert_allclose(distances(code).distance, 1 - np.cos(2 * np.pi / classes), rtol=1e-4)


@pytest.mark.parametrize("dim", [2, 3])
@given(seeds)
def test_the_interval_holds_the_exact_distance_and_closes(dim, seed):
    code = np.random.default_rng(seed).normal(size=(dim, 5)).astype(np.float32)
    exact = np.array([nearest_by_faces(code.astype(float), k) for k in range(5)])
    for iterations, width in ((1, np.inf), (500, 1e-3)):
        result = distances(jnp.asarray(code), iterations=iterations)
        assert (np.asarray(result.lower) <= exact + 1e-5).all()
        assert (np.asarray(result.distance) >= exact - 1e-5).all()
        outside = exact > 0.05
        assert (np.asarray(result.distance - result.lower)[outside] < width).all()
    np.testing.assert_allclose(result.distance, exact, atol=2e-3)


def test_double_precision_closes_the_interval_to_its_own_rounding():
    with jax.enable_x64(True):
        code = np.random.default_rng(0).normal(size=(4, 5))
        result = distances(jnp.asarray(code), iterations=1000)
        assert result.distance.dtype == jnp.float64
        exact = [nearest_by_faces(code, k) for k in range(5)]
        np.testing.assert_allclose(result.distance, exact, rtol=1e-11)
        np.testing.assert_allclose(result.lower, exact, rtol=1e-11)


@given(seeds, st.sampled_from([0.01, 1.0, 50.0]))
def test_margins_follow_the_scale_and_see_neither_rotation_nor_shift(seed, scale):
    rng = np.random.default_rng(seed)
    code = rng.normal(size=(4, 6))
    base = distances(jnp.asarray(code, jnp.float32)).distance
    moved = scale * (rotation(seed, 4) @ code + rng.normal(size=(4, 1)))
    got = distances(jnp.asarray(moved, jnp.float32)).distance
    np.testing.assert_allclose(got / scale, base, rtol=2e-3, atol=2e-3)


def test_a_vector_among_the_others_has_no_margin():
    square = np.array([[1, 1, -1, -1], [1, -1, 1, -1]], np.float32)
    inside = jnp.asarray(np.concatenate([square, [[0.3], [-0.2]]], axis=1))
    twice = jnp.asarray(np.concatenate([square, square[:, :1]], axis=1))
    result = distances(inside)
    assert float(result.distance[4]) < 1e-4
    assert float(result.lower[4]) < 1e-4
    np.testing.assert_allclose(distances(twice).distance[jnp.array([0, 4])], 0, atol=1e-4)


def test_equal_vectors_alone_have_no_margin_and_are_not_nan():
    result = distances(jnp.ones((3, 4)))
    np.testing.assert_array_equal(result.distance, 0)
    np.testing.assert_array_equal(result.lower, 0)


def test_the_number_of_classes_solved_at_a_time_changes_nothing():
    code = jnp.asarray(np.random.default_rng(1).normal(size=(3, 7)), jnp.float32)
    whole = distances(code)
    for batch_size in (1, 3, 7):
        part = distances(code, batch_size=batch_size)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), part, whole)


def test_a_batch_holds_no_more_coefficients_than_it_was_told():
    text = str(jax.make_jaxpr(lambda w: hull_distances(w, batch_size=5))(jnp.ones((3, 1000))))
    assert "[5,1000]" in text
    assert "[1000,1000]" not in text


def test_metrics_of_a_square_in_closed_form():
    # Four sides of sqrt(2) and two diagonals of 2: the logs differ by log(2)/2 and split as 2/3 and 1/3.
    metrics = metrics_of(jnp.array([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]))
    np.testing.assert_allclose(metrics["min_margin"], 1, rtol=1e-6)
    np.testing.assert_allclose(metrics["mean_margin"], 1, rtol=1e-6)
    np.testing.assert_allclose(metrics["log_distance_variance"], 2 / 9 * (np.log(2) / 2) ** 2, rtol=1e-5)


def test_metrics_of_a_simplex_and_of_a_simplex_with_a_moved_vertex():
    code = simplex(4, 5)
    even = metrics_of(jnp.asarray(code, jnp.float32))
    assert float(even["log_distance_variance"]) < 1e-10
    code[:, 0] *= 0.5
    moved = metrics_of(jnp.asarray(code, jnp.float32))
    # The moved vertex is 1/2 + 1/3 from the centroid of the others, nearer than any other from its face.
    np.testing.assert_allclose(moved["min_margin"], 1 / 2 + 1 / 3, rtol=1e-4)
    assert float(moved["mean_margin"]) < float(even["mean_margin"])
    assert float(moved["log_distance_variance"]) > 1e-3


def test_near_vectors_keep_their_distance_and_equal_ones_have_no_logarithm():
    apart = 1e-5
    code = jnp.array([[1.0, 1.0, 1.0], [0.0, apart, -apart]])
    logs = np.log([apart, apart, 2 * apart])
    np.testing.assert_allclose(metrics_of(code)["log_distance_variance"], logs.var(), rtol=1e-4)
    assert np.isnan(metrics_of(jnp.ones((2, 3)))["log_distance_variance"])


def test_bfloat16_codes_are_solved_in_float32():
    code = jnp.asarray(np.random.default_rng(2).normal(size=(3, 6)), jnp.bfloat16)
    margins = one_vs_rest_margins(code)
    assert margins.dtype == jnp.float32
    np.testing.assert_array_equal(margins, one_vs_rest_margins(code.astype(jnp.float32)))


@pytest.mark.parametrize("function", [one_vs_rest_margins, hull_distances, margin_metrics])
def test_what_does_not_fit_is_named(function):
    code = jnp.eye(3)
    cases = [
        (ValueError, r"code must be \[d, K\] with at least 2 classes, got \(3, 1\)", code[:, :1], {}),
        (ValueError, r"got \(3,\): class vectors are its columns", code[0], {}),
        (TypeError, r"code must be floating, got int32: use code.astype", code.astype(jnp.int32), {}),
        (ValueError, "iterations must be at least 1, got 0", code, {"iterations": 0}),
        (TypeError, r"iterations must be an int, got 10\.0", code, {"iterations": 10.0}),
        (ValueError, "batch_size must be at least 1, got -1", code, {"batch_size": -1}),
    ]
    for error, message, argument, options in cases:
        with pytest.raises(error, match=message):
            function(argument, **options)
