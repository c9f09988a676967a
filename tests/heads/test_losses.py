"""Dot regression, inverse temperatures and class lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.heads.codes import class_code, etf_matrix
from odjax.heads.losses import (
    batch_class_lengths,
    cross_entropy,
    dot_regression_loss,
    etf_logits,
    scale_for_probability,
    unit_features,
)

K, D, N = 5, 6, 7
seeds = st.integers(0, 30)


def batch(seed, dtype=jnp.float32):
    h, y = jax.random.split(jax.random.key(seed))
    return jax.random.normal(h, (N, D), dtype), jax.random.randint(y, (N,), 0, K)


def mean_loss(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@given(seeds)
def test_cross_entropy_of_a_simplex_is_that_of_orthonormal_vectors_with_a_scale(seed):
    with jax.enable_x64(True):
        h, labels = batch(seed, jnp.float64)
        u = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, K)))[0]
        m = jnp.asarray(np.sqrt(K / (K - 1)) * u @ (np.eye(K) - 1 / K))
        u = jnp.asarray(u)
        simplex = jax.value_and_grad(lambda h: mean_loss(etf_logits(h, m, 3.0), labels))(h)
        scale = 3.0 * float(np.sqrt(K / (K - 1)))
        orthonormal = jax.value_and_grad(lambda h: mean_loss(etf_logits(h, u, scale), labels))(h)
    np.testing.assert_allclose(simplex[0], orthonormal[0], rtol=1e-12)
    np.testing.assert_allclose(simplex[1], orthonormal[1], atol=1e-14)


@given(seeds)
def test_dot_regression_pulls_towards_the_own_vertex_alone(seed):
    h, labels = batch(seed)
    code = etf_matrix(jax.random.key(1), K, D)
    gradient = jax.grad(lambda h: jnp.sum(dot_regression_loss(h, labels, code)))(h)
    own = code.T[labels]
    along = jnp.sum(gradient * own, axis=1, keepdims=True) * own
    np.testing.assert_allclose(gradient, along, atol=1e-5)
    assert bool(jnp.all(jnp.sum(gradient * own, axis=1) <= 1e-6))


@given(seeds)
def test_dot_regression_of_unit_features_is_half_the_squared_distance_of_the_cosine_from_one(seed):
    h, labels = batch(seed)
    h, code = unit_features(h), etf_matrix(jax.random.key(1), K, D)
    cosine = jnp.sum(h * code.T[labels], axis=1)
    np.testing.assert_allclose(dot_regression_loss(h, labels, code), (cosine - 1) ** 2 / 2, atol=1e-6)
    np.testing.assert_allclose(
        dot_regression_loss(h, labels, code, weight=10.0), 5 * (cosine - 1) ** 2, atol=1e-5
    )


def test_dot_regression_is_zero_at_the_vertices_and_only_there():
    code = etf_matrix(jax.random.key(1), K, D)
    labels = jnp.arange(K)
    np.testing.assert_allclose(dot_regression_loss(code.T, labels, code), 0, atol=1e-12)
    assert bool(jnp.all(dot_regression_loss(code.T, (labels + 1) % K, code) > 0.5))


@given(seeds, st.permutations(range(K)))
def test_permuting_classes_and_labels_together_changes_no_loss(seed, order):
    h, labels = batch(seed)
    code, order = etf_matrix(jax.random.key(1), K, D), jnp.asarray(order)
    place = jnp.argsort(order)  # class k moves to place[k]
    before = dot_regression_loss(h, labels, code)
    np.testing.assert_allclose(dot_regression_loss(h, place[labels], code[:, order]), before, atol=1e-6)
    logits = etf_logits(h, code)
    np.testing.assert_allclose(etf_logits(h, code[:, order]), logits[:, order], atol=1e-6)


@given(seeds)
def test_rotating_features_and_code_together_changes_nothing(seed):
    h, labels = batch(seed)
    code = etf_matrix(jax.random.key(1), K, D)
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0], jnp.float32)
    np.testing.assert_allclose(etf_logits(h @ turn, turn.T @ code), etf_logits(h, code), atol=5e-6)
    np.testing.assert_allclose(
        dot_regression_loss(h @ turn, labels, turn.T @ code), dot_regression_loss(h, labels, code), atol=5e-6
    )


@given(st.sampled_from([2, 3, 10]), st.sampled_from([0.6, 0.9, 0.999]))
def test_a_feature_on_its_vertex_has_the_probability_that_the_scale_was_chosen_for(k, p):
    code = np.asarray(etf_matrix(jax.random.key(0), k, k), np.float64)
    logits = scale_for_probability(k, p) * code.T @ code
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.diag(share), p, rtol=1e-5)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.sampled_from([None, 3]))
def test_class_lengths_keep_the_size_of_the_batch(labels, padded):
    weights = None if padded is None else jnp.asarray([1.0] * len(labels) + [0.0] * padded)
    given_labels = jnp.asarray(labels + [0] * (padded or 0))
    lengths = np.asarray(batch_class_lengths(given_labels, 6, weights))
    counts = np.bincount(labels, minlength=6)
    np.testing.assert_allclose((counts * lengths**2).sum(), len(labels), rtol=1e-5)
    np.testing.assert_array_equal(lengths[counts == 0], 1)


def test_class_lengths_of_eight_devices_are_those_of_the_whole_batch():
    labels = jnp.asarray([0, 0, 0, 1, 2, 2, 4, 4] * 2)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    local = jax.shard_map(
        lambda y: batch_class_lengths(y, 5, axis_name="data"),
        mesh=mesh,
        in_specs=spec("data"),
        out_specs=spec(),
    )
    np.testing.assert_allclose(jax.jit(local)(labels), batch_class_lengths(labels, 5), rtol=1e-6)


def test_lengths_weigh_the_loss_by_their_square():
    h, labels = batch(0)
    h, code = unit_features(h), etf_matrix(jax.random.key(1), K, D)
    lengths = batch_class_lengths(labels, K)
    np.testing.assert_allclose(
        dot_regression_loss(h, labels, code, lengths),
        dot_regression_loss(h, labels, code) * lengths[labels] ** 2,
        rtol=1e-5,
    )


def test_zero_rows_are_legal_and_non_finite_ones_stay_in_their_row():
    code = etf_matrix(jax.random.key(1), K, D)
    h = jnp.zeros((3, D)).at[1].set(jnp.nan).at[2].set(1.0)
    unit = unit_features(h)
    np.testing.assert_array_equal(unit[0], 0)
    assert bool(jnp.isnan(unit[1]).all())
    np.testing.assert_allclose(jnp.linalg.norm(unit[2]), 1, rtol=1e-6)
    loss = dot_regression_loss(h, jnp.array([0, 1, 2]), code)
    np.testing.assert_array_equal(jnp.isnan(loss), [False, True, False])

    def total(h):
        return jnp.sum(etf_logits(unit_features(h), code)) + jnp.sum(
            dot_regression_loss(h, jnp.array([0]), code)
        )

    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros((1, D))), 0)


def test_the_norm_penalty_has_the_gradient_of_the_norm():
    h, labels = batch(0)
    code = class_code(jax.random.key(1), K, D)
    with_it, without = (
        jax.grad(lambda h, p=p: jnp.sum(dot_regression_loss(h, labels, code, norm_penalty=p)))(h)
        for p in (0.01, 0.0)
    )
    np.testing.assert_allclose(with_it - without, 0.01 * unit_features(h), atol=1e-6)


def test_no_gradient_reaches_the_code():
    h, labels = batch(0)
    code = etf_matrix(jax.random.key(1), K, D)
    gradient = jax.grad(
        lambda m: jnp.sum(etf_logits(h, m)) + jnp.sum(dot_regression_loss(h, labels, m, norm_penalty=0.1))
    )(code)
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_features_are_accumulated_in_float32():
    ones = jnp.ones((1, 1001), jnp.bfloat16)
    low = etf_logits(ones, jnp.ones((1001, 2)))
    assert low.dtype == jnp.float32
    np.testing.assert_array_equal(low, 1001)  # bfloat16 holds 1000 and 1004


@pytest.mark.parametrize("size", [1e-4, 1e19, 1e30])
def test_features_of_any_size_have_a_direction(size):
    h = size * jax.random.normal(jax.random.key(0), (3, D))
    np.testing.assert_allclose(jnp.linalg.norm(unit_features(h), axis=1), 1, rtol=1e-5)
    code, labels = etf_matrix(jax.random.key(1), K, D), jnp.array([0, 1, 2])
    loss = dot_regression_loss(h, labels, code)
    np.testing.assert_allclose(loss / size, dot_regression_loss(h / size, labels, code), rtol=1e-4)


@given(seeds)
def test_the_gradient_of_unit_features_is_that_of_their_definition(seed):
    with jax.enable_x64(True):
        h = batch(seed, jnp.float64)[0]
        way = jnp.cos(jnp.arange(D, dtype=jnp.float64))[None]
        found = jax.grad(lambda h: jnp.sum(way * unit_features(h)))(h)
        wanted = jax.grad(lambda h: jnp.sum(way * h / jnp.sqrt(jnp.sum(h * h, axis=1, keepdims=True))))(h)
    np.testing.assert_allclose(found, wanted, atol=1e-13)


def test_cross_entropy_of_a_label_that_is_no_class_is_the_log_sum_exp():
    logits = jax.random.normal(jax.random.key(0), (4, K))
    found = cross_entropy(logits, jnp.array([-1, K, 2, 0]))
    np.testing.assert_allclose(found[:2], jax.nn.logsumexp(logits, axis=1)[:2], rtol=1e-6)
    np.testing.assert_allclose(
        found[2:], optax.softmax_cross_entropy_with_integer_labels(logits[2:], jnp.array([2, 0])), rtol=1e-6
    )


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda h, m: etf_logits(h, m.T), ValueError, r"do not fit: \(7, 6\) and \(5, 6\)"),
        (lambda h, m: etf_logits(h.astype(int), m), TypeError, "features must be floating point, got int32"),
        (lambda h, m: etf_logits(h, m, -1.0), ValueError, "scale must be a positive number, got -1"),
        (lambda h, m: dot_regression_loss(h, jnp.full(7, 5), m), ValueError, r"in \[0, 5\), got 5"),
        (lambda h, m: dot_regression_loss(h, jnp.zeros(7), m), TypeError, "labels must be integers"),
        (lambda h, m: dot_regression_loss(h, jnp.zeros(3, int), m), ValueError, r"differ: \(7, 6\), \(3,\)"),
        (
            lambda h, m: dot_regression_loss(h, jnp.zeros(7, int), m, jnp.ones(4)),
            ValueError,
            r"lengths must be \[5\]",
        ),
        (lambda h, m: scale_for_probability(10, 0.1), ValueError, "between 1/10 and 1, got 0.1"),
        (lambda h, m: scale_for_probability(1), ValueError, "num_classes must be at least 2, got 1"),
        (
            lambda h, m: batch_class_lengths(jnp.zeros(3, int), 2, jnp.ones(2)),
            ValueError,
            "shape of the labels",
        ),
    ],
    ids=range(10),
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(batch(0)[0], etf_matrix(jax.random.key(1), K, D))
