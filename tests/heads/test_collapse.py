"""Neural-collapse statistics: their definitions in float64, closed forms, invariances, and any cut of the data."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core import class_moments, reduce_over_axis, scan_over, vmap_over
from odjax.heads.collapse import collapse_gram, collapse_metrics

P = jax.sharding.PartitionSpec
K, D, N = 4, 6, 24
NAMES = {"within_between", "cdnv", "nc2", "equinorm", "cosine_spread", "cosine_excess"}
ALL = NAMES | {"nc1", "nc3", "nc4", "self_duality"}
seeds = st.integers(0, 10_000)


def simplex(classes=K, dim=D):
    """Unit vertices [classes, dim] of a regular simplex in closed form."""
    vertices = np.sqrt(classes / (classes - 1)) * (np.eye(classes) - 1 / classes)
    return np.pad(vertices, [(0, 0), (0, dim - classes)])


def rotation(seed, dim=D):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def cloud(seed, classes=K, n=N, dim=D):
    """Noisy vertices with every class present, random weights and a classifier near the means."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)]).astype(np.int32)
    means = rng.normal(size=(classes, dim))
    features = means[labels] + 0.3 * rng.normal(size=(n, dim))
    classifier = means.T + 0.5 * rng.normal(size=(dim, classes))
    return features, labels, rng.integers(1, 4, n).astype(np.float64), classifier


def two_passes(features, labels, weights, classifier, num_classes, dtype):
    first = class_moments(num_classes, features.shape[1], dtype=dtype)
    moments = first.result(first.observe(first.zero(), features, labels, weights))
    second = collapse_gram(moments.mean, classifier=classifier)
    gram = second.result(second.observe(second.zero(), features, labels, weights))
    return collapse_metrics(moments, gram, classifier)


compiled = jax.jit(two_passes, static_argnums=(4, 5))


def metrics_of(features, labels, weights=None, classifier=None, num_classes=K, dtype=jnp.float32):
    weights = np.ones(len(labels)) if weights is None else weights
    classifier = np.ones((features.shape[1], num_classes)) if classifier is None else classifier
    numbers = [jnp.asarray(x, dtype) for x in (features, weights, classifier)]
    return compiled(numbers[0], jnp.asarray(labels), *numbers[1:], num_classes, dtype)


def definitions(h, y, w, classifier):
    """Every metric by its definition in float64, with the d x d covariances."""
    classes, dim = classifier.shape[1], h.shape[1]
    mu = np.array([np.average(h[y == k], axis=0, weights=w[y == k]) for k in range(classes)])
    c = mu - mu.mean(0)
    away = h - mu[y]
    sigma_w = (away * w[:, None]).T @ away / w.sum()
    sigma_b = c.T @ c / classes
    v = np.array([np.average((away[y == k] ** 2).sum(1), weights=w[y == k]) for k in range(classes)])
    t = (np.eye(classes) - 1 / classes) / np.sqrt(classes - 1)
    pairs = list(itertools.combinations(range(classes), 2))
    norms = np.linalg.norm(c, axis=1)
    cosines = np.array([c[k] @ c[l] / norms[k] / norms[l] for k, l in pairs])
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    values, vectors = np.linalg.eigh(sigma_b)
    rank = min(classes - 1, dim)
    inverse = vectors[:, -rank:] / values[-rank:] @ vectors[:, -rank:].T
    nearest = np.argmin(((h[:, None] - mu[None]) ** 2).sum(2), axis=1)
    return {
        "nc1": np.trace(inverse @ sigma_w) / classes,
        "within_between": np.trace(sigma_w) / np.trace(sigma_b),
        "cdnv": np.mean([(v[k] + v[l]) / 2 / ((mu[k] - mu[l]) ** 2).sum() for k, l in pairs]),
        "nc2": np.linalg.norm(unit(c @ c.T) - t),
        "equinorm": norms.std() / norms.mean(),
        "cosine_spread": cosines.std(),
        "cosine_excess": np.abs(cosines + 1 / (classes - 1)).mean(),
        "nc3": np.linalg.norm(unit(classifier.T @ c.T) - t),
        "self_duality": (unit(classifier.T) - unit(c)).ravel() @ (unit(classifier.T) - unit(c)).ravel(),
        "nc4": np.average(np.argmax(h @ classifier, axis=1) == nearest, weights=w),
    }


def close(a, b, rtol=2e-4, atol=2e-6):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=name)


@given(seeds)
def test_every_metric_is_its_definition(seed):
    h, y, w, classifier = (np.asarray(x, np.float32) for x in cloud(seed))
    y = y.astype(np.int32)
    close(metrics_of(h, y, w, classifier), definitions(h.astype(float), y, w.astype(float), classifier))


@pytest.mark.parametrize(("classes", "dim"), [(4, 6), (4, 3), (5, 2)], ids=["wide", "d=K-1", "K>d+1"])
def test_every_metric_is_its_definition_to_the_last_digits_of_float64(classes, dim):
    with jax.enable_x64(True):
        batch = cloud(11, classes, N, dim)
        got = metrics_of(*batch, num_classes=classes, dtype=jnp.float64)
        assert {x.dtype for x in got.values()} == {jnp.dtype(jnp.float64)}
        close(got, definitions(*batch), rtol=1e-12, atol=1e-14)


@given(seeds, st.sampled_from([1e-3, 1.0, 64.0]))
def test_features_at_the_vertices_are_collapsed(seed, scale):
    vertices = scale * simplex() @ rotation(seed)
    labels = np.arange(N) % K
    classifier = 3 * vertices.T
    metrics = metrics_of(vertices[labels], labels, None, classifier)
    assert metrics.keys() == ALL
    for name in ALL - {"nc4"}:
        assert float(metrics[name]) < 1e-5, name
    assert float(metrics["nc4"]) == 1


def test_a_cross_of_noise_around_every_vertex_has_metrics_in_closed_form():
    # Rows mu_k +- e u_j for an orthonormal basis u_1..u_d: Sigma_W = e^2 I / d, v_k = e^2; the vertices have
    # Sigma_B = P / (K - 1) with P a projection of rank K - 1, and squared distances 2K / (K - 1).
    e = 0.25
    basis = rotation(3)
    cross = np.concatenate([e * basis, -e * basis])
    features = (simplex()[:, None] + cross[None]).reshape(-1, D)
    labels = np.repeat(np.arange(K), 2 * D)
    metrics = metrics_of(features, labels)
    expected = {
        "nc1": (K - 1) ** 2 * e**2 / (D * K),
        "within_between": e**2,
        "cdnv": e**2 * (K - 1) / (2 * K),
        "nc2": 0,
        "equinorm": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_classifier_against_the_means_is_as_far_from_duality_as_can_be():
    labels = np.arange(N) % K
    metrics = metrics_of(simplex()[labels], labels, None, -simplex().T)
    np.testing.assert_allclose(metrics["self_duality"], 4, rtol=1e-5)
    np.testing.assert_allclose(metrics["nc3"], 2, rtol=1e-5)
    assert float(metrics["nc4"]) == 0


@given(seeds)
def test_rotating_features_and_classifier_and_scaling_and_shifting_the_features_change_nothing(seed):
    h, y, w, classifier = cloud(seed)
    turn = rotation(seed + 1)
    shift = np.random.default_rng(seed).normal(size=(1, D))
    base = metrics_of(h, y, w, classifier)
    close(metrics_of(h @ turn, y, w, turn.T @ classifier), base, rtol=1e-3, atol=1e-5)
    close(metrics_of(32 * h, y, w, classifier), base, rtol=1e-3, atol=1e-5)
    moved = metrics_of(h + shift, y, w, classifier)
    # The linear rule without a bias is the only one that looks at the origin.
    close(moved | {"nc4": base["nc4"]}, base, rtol=1e-3, atol=1e-5)


@given(seeds, st.permutations(range(K)))
def test_the_names_of_the_classes_do_not_matter(seed, order):
    h, y, w, classifier = cloud(seed)
    order = np.array(order)
    renamed = np.argsort(order)[y]  # class order[k] is now class k
    close(metrics_of(h, renamed, w, classifier[:, order]), metrics_of(h, y, w, classifier), 1e-3, 1e-5)


@given(seeds)
def test_classes_never_seen_are_left_out(seed):
    h, y, w, classifier = cloud(seed)
    places = np.array([0, 2, 3, 6])  # of 7 classes
    wide = np.random.default_rng(seed).normal(size=(D, 7)) * 10  # absent columns would win every argmax
    wide[:, places] = classifier
    got = metrics_of(h, places[y], w, wide, num_classes=7)
    close(got, metrics_of(h, y, w, classifier), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("labels", [[2, 2, 2, 2], []], ids=["one class", "none"])
def test_fewer_than_two_classes_have_no_metrics(labels):
    metrics = metrics_of(np.ones((len(labels), D)), np.array(labels, np.int32))
    assert metrics.keys() == ALL
    assert np.isnan(np.array(list(metrics.values()))).all()


def test_what_was_not_given_is_not_reported():
    first, second = class_moments(K, D), collapse_gram(jnp.asarray(MEANS))
    moments, gram = (jax.eval_shape(lambda stat=stat: stat.result(stat.zero())) for stat in (first, second))
    narrow = jax.ShapeDtypeStruct((D, K), jnp.bfloat16)

    def reported(*given):
        metrics = jax.eval_shape(collapse_metrics, *given)
        assert {(x.shape, x.dtype) for x in metrics.values()} == {((), jnp.dtype(jnp.float32))}
        return metrics.keys()

    assert reported(moments) == NAMES
    assert reported(moments, gram) == NAMES | {"nc1"}
    assert reported(moments, None, narrow) == NAMES | {"nc3", "self_duality"}
    assert reported(moments, gram, narrow) == ALL - {"nc4"}


def test_the_second_pass_has_the_variance_that_the_first_one_lost():
    rng = np.random.default_rng(0)
    labels = np.arange(256) % K
    means = 10 + simplex()
    features = (means[labels] + 1e-3 * rng.normal(size=(256, D))).astype(np.float32)
    truth = definitions(features.astype(float), labels, np.ones(256), simplex().T)
    first = class_moments(K, D)
    moments = first.result(first.observe(first.zero(), jnp.asarray(features), labels))
    second = collapse_gram(moments.mean)
    gram = second.result(second.observe(second.zero(), jnp.asarray(features), labels))
    one_pass, two = (jax.jit(collapse_metrics)(moments, second) for second in (None, gram))
    for name in ("within_between", "cdnv"):
        assert abs(float(one_pass[name]) / truth[name] - 1) > 0.1
    for name in ("within_between", "cdnv", "nc1"):
        np.testing.assert_allclose(two[name], truth[name], rtol=1e-4)


def test_agreement_counts_by_hand_and_takes_a_bias():
    means = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    features = jnp.array([[0.5, 0.0], [-0.5, 0.0], [0.1, 0.0], [-3.0, 1.0]])
    labels, weights = jnp.array([0, 1, 1, 1]), jnp.array([1.0, 1.0, 4.0, 2.0])

    def share(classifier, bias=None):
        stat = collapse_gram(means, classifier=classifier, bias=bias)
        return float(stat.result(stat.observe(stat.zero(), features, labels, weights)).agreement)

    assert share(means.T) == 1
    assert share(-means.T) == 0
    # h W + b: the second class wins where -h > h - 1, that is h < 1/2; the third row (weight 4) is nearest
    # to the first mean, and so is the first row, on whose tie argmax takes the first class.
    assert share(means.T, jnp.array([-1.0, 0.0])) == 0.5


# The means of the first pass, fixed, for the tests of the second pass alone.
MEANS = np.random.default_rng(5).normal(size=(K, D)).astype(np.float32)
CLASSIFIER = np.random.default_rng(6).normal(size=(D, K)).astype(np.float32)
STATS = {
    "alone": collapse_gram(jnp.asarray(MEANS)),
    "classifier": collapse_gram(jnp.asarray(MEANS), classifier=jnp.asarray(CLASSIFIER)),
}
observe = jax.jit(lambda stat, state, *batch: stat.observe(state, *batch), static_argnums=0)


def rows(seed, n):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, n).astype(np.int32)
    features = (MEANS[labels] + rng.normal(size=(n, D))).astype(np.float32)
    return features, labels, rng.integers(0, 4, n).astype(np.float32)


def near(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-4), a, b)


@pytest.mark.parametrize("name", STATS)
@given(seeds, st.sampled_from([0, 1, 5, 12]))
def test_the_second_pass_may_be_cut_and_combined_anywhere(name, seed, cut):
    stat = STATS[name]
    batch = rows(seed, 12)
    a, b = (observe(stat, stat.zero(), *(x[part] for x in batch)) for part in (np.s_[:cut], np.s_[cut:]))
    c = observe(stat, stat.zero(), *rows(seed + 1, 5))
    near(stat.combine(a, b), observe(stat, stat.zero(), *batch))
    near(stat.combine(stat.combine(a, b), c), stat.combine(a, stat.combine(b, c)))
    jax.tree.map(np.testing.assert_array_equal, stat.combine(a, stat.zero()), a)
    jax.tree.map(np.testing.assert_array_equal, stat.combine(a, b), stat.combine(b, a))


@pytest.mark.parametrize("drive", [scan_over, vmap_over])
def test_drivers_agree_with_one_big_batch(drive):
    stat, batch = STATS["classifier"], rows(2, 20)
    batches = jax.tree.map(lambda x: x.reshape(5, 4, *x.shape[1:]), batch)
    near(jax.jit(lambda b: drive(stat, b))(batches), observe(stat, stat.zero(), *batch))


def test_metrics_of_eight_devices_are_those_of_the_whole_set():
    h, y, w, classifier = (np.asarray(x, np.float32) for x in cloud(1, n=64))
    y = y.astype(np.int32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(features, labels, weights, classifier):
        first = class_moments(K, D)
        state = first.observe(first.zero(), features, labels, weights)
        moments = first.result(reduce_over_axis(first, state, "data"))
        second = collapse_gram(moments.mean, classifier=classifier)
        state = second.observe(second.zero(), features, labels, weights)
        gram = second.result(reduce_over_axis(second, state, "data"))
        return collapse_metrics(moments, gram, classifier)

    specs = (P("data"), P("data"), P("data"), P())
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P()))
    close(sharded(h, y, w, classifier), metrics_of(h, y, w, classifier))
    assert "all_gather" not in str(jax.make_jaxpr(sharded)(h, y, w, classifier))


@pytest.mark.parametrize("name", STATS)
def test_rows_of_weight_zero_and_traced_labels_outside_the_classes_are_ignored(name):
    stat = STATS[name]
    features, labels, weights = rows(3, 8)
    keep = weights > 0
    expected = observe(stat, stat.zero(), features[keep], labels[keep], weights[keep])
    padded = np.where(keep[:, None], features, np.nan)
    near(observe(stat, stat.zero(), padded, labels, weights), expected)
    wrong = np.where(keep, labels, np.resize([-1, K, 99], 8)).astype(np.int32)
    near(observe(stat, stat.zero(), features, wrong, np.maximum(weights, 1)), observe(
        stat, stat.zero(), features[keep], labels[keep], np.maximum(weights, 1)[keep]
    ))  # fmt: skip


def test_rows_of_an_absent_class_do_not_count():
    features, labels, weights = rows(4, 12)
    present = np.array([True, False, True, True])
    stat = collapse_gram(jnp.asarray(MEANS), jnp.asarray(present), classifier=jnp.asarray(CLASSIFIER))
    masked = collapse_gram(jnp.where(present[:, None], MEANS, jnp.nan), classifier=jnp.asarray(CLASSIFIER))
    keep = present[labels]
    expected = observe(stat, stat.zero(), features[keep], labels[keep], weights[keep])
    assert float(expected.count[1]) == 0
    for same in (stat, masked):
        near(observe(same, same.zero(), features, labels, weights), expected)


def test_no_array_is_quadratic_in_the_features():
    n, classes, dim = 5, 3, 4099
    args = (jnp.ones((n, dim)), jnp.zeros(n, jnp.int32), jnp.ones(n), jnp.ones((dim, classes)))
    compiled_text = compiled.lower(*args, classes, jnp.float32).compile().as_text()
    assert f"[{n},{dim}]" in compiled_text
    assert f"{dim},{dim}" not in compiled_text
    traced = str(jax.make_jaxpr(two_passes, static_argnums=(4, 5))(*args, classes, jnp.float32))
    assert f"[{n},{dim}]" in traced
    assert f"{dim},{dim}" not in traced


def test_what_does_not_fit_is_named():
    means, x, y = jnp.asarray(MEANS), jnp.ones((5, D)), jnp.zeros(5, jnp.int32)
    cases = [
        (ValueError, r"at least 2 classes, got \(1, 6\)", lambda: collapse_gram(means[:1])),
        (ValueError, r"means must be \[K, d\]", lambda: collapse_gram(means[0])),
        (TypeError, "means must be floating, got int32", lambda: collapse_gram(jnp.ones((K, D), jnp.int32))),
        (TypeError, "present must be bool", lambda: collapse_gram(means, jnp.ones(K))),
        (ValueError, r"present must be \[K\] = \(4,\)", lambda: collapse_gram(means, jnp.ones(3, bool))),
        (ValueError, r"\(6, 4\), got \(4, 6\): use classifier.T", lambda: collapse_gram(means, classifier=means)),
        (ValueError, "bias was given without", lambda: collapse_gram(means, bias=jnp.ones(K))),
        (ValueError, r"bias must be \[K\] = \(4,\), got \(6,\)", lambda: collapse_gram(means, classifier=means.T, bias=jnp.ones(D))),
        (ValueError, r"features must be \[n, 6\]", lambda: STATS["alone"].observe(STATS["alone"].zero(), x[:, :2], y)),
        (ValueError, r"labels must be in \[0, 4\)", lambda: STATS["alone"].observe(STATS["alone"].zero(), x, y - 1)),
        (ValueError, r"4 classes has states with gram \(4, 4\), got one with \(3, 3\)", lambda: STATS["alone"].combine(STATS["alone"].zero(), collapse_gram(means[:3]).zero())),
        (ValueError, "pass classifier= to both", lambda: STATS["alone"].combine(STATS["alone"].zero(), STATS["classifier"].zero())),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_moments_and_gram_of_other_classes_are_named():
    first = class_moments(K, D)
    moments = first.result(first.zero())
    other = collapse_gram(jnp.zeros((K + 1, D)))
    with pytest.raises(ValueError, match=r"gram is of 5 classes, the moments of 4: build it as"):
        collapse_metrics(moments, other.result(other.zero()))
    with pytest.raises(ValueError, match=r"classifier must be \[d, K\] = \(6, 4\), got \(6, 5\)"):
        collapse_metrics(moments, classifier=jnp.ones((D, K + 1)))
    single = class_moments(1, D)
    with pytest.raises(ValueError, match="at least 2 classes"):
        collapse_metrics(single.result(single.zero()))


def test_what_has_no_value_says_so():
    def metrics(means):
        h = jnp.asarray(np.repeat(np.array(means, np.float32), 2, axis=0) + np.float32([[-0.5], [0.5]] * 3))
        return metrics_of(h, np.repeat(np.arange(3), 2), num_classes=3)

    equal = metrics([[1, 0], [1, 0], [-2, 0]])
    assert np.isinf(equal["cdnv"])
    assert np.isfinite([equal[n] for n in ("within_between", "nc2", "cosine_spread", "equinorm")]).all()
    centre = metrics([[1, 0], [-1, 0], [0, 0]])
    assert np.isnan([centre["cosine_spread"], centre["cosine_excess"]]).all()
    assert np.isfinite([centre[n] for n in ("within_between", "cdnv", "nc2", "equinorm")]).all()
