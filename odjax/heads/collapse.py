"""Neural collapse in numbers: how far features and classifier are from the vertices of a simplex.

V. Papyan, X. Y. Han and D. L. Donoho, Prevalence of neural collapse during the terminal phase of deep
learning training, PNAS 117(40), 2020, arXiv 2008.08186.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from odjax.core import statistics_dtype
from odjax.core.class_moments import ClassMomentsResult, labelled_rows
from odjax.core.statistics import Statistic

_HIGHEST = jax.lax.Precision.HIGHEST


class CollapseGram(NamedTuple):
    """State of `collapse_gram`: sums of weights [K], of w ||h - mu_y||^2 [K], of w P P^T [K, K], agreements.

    `agree` is the weight of the rows on which the classifier and the nearest class mean agree; None without a
    classifier.
    """

    count: jax.Array
    within: jax.Array
    gram: jax.Array
    agree: jax.Array | None


class CollapseGramResult(NamedTuple):
    """Result of `collapse_gram`: weight [K], within-class variance [K], mean of P P^T [K, K], agreement.

    `agreement` is a share in [0, 1]; None without a classifier.
    """

    count: jax.Array
    variance: jax.Array
    gram: jax.Array
    agreement: jax.Array | None


def _centred(means: jax.Array, present: jax.Array) -> jax.Array:
    """C [K, d]: the class means without the unweighted mean of them; zero rows for absent classes."""
    means = jnp.where(present[:, None], means, jnp.zeros_like(means))
    number = jnp.sum(present, dtype=means.dtype)
    centre = jnp.sum(means, axis=0, keepdims=True) / jnp.maximum(number, jnp.ones_like(number))
    return jnp.where(present[:, None], means - centre, jnp.zeros_like(means))


def _check_means(name: str, means: jax.Array) -> None:
    if means.ndim != 2 or means.shape[0] < 2:
        raise ValueError(
            f"{name} must be [K, d] with at least 2 classes, got {means.shape}: "
            "pass the mean that class_moments(K, d) gives"
        )
    if not jnp.issubdtype(means.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating, got {means.dtype}: use {name}.astype(jnp.float32)")


def _check_classifier(classifier: jax.Array, bias: jax.Array | None, shape: tuple[int, int]) -> None:
    num_classes, dim = shape
    if classifier.shape != (dim, num_classes):
        hint = ": use classifier.T" if classifier.shape == shape else ": logits are features @ classifier"
        raise ValueError(f"classifier must be [d, K] = {(dim, num_classes)}, got {classifier.shape}{hint}")
    if bias is not None and bias.shape != (num_classes,):
        raise ValueError(f"bias must be [K] = {(num_classes,)}, got {bias.shape}")


def collapse_gram(
    means: jax.Array,
    present: jax.Array | None = None,
    *,
    classifier: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> Statistic:
    """The second pass over the features: what neural collapse needs beyond the class moments.

    With mu_k the class means of the first pass, mu_G their unweighted mean and C = [mu_k - mu_G], it sums

      P_i P_i^T,  P_i = C (h_i - mu_{y_i})  [K],      and      ||h_i - mu_{y_i}||^2  per class,

    from which NC1 follows without a matrix of d x d, and the within-class variance without cancellation. With
    a classifier it also counts the rows on which argmax_k (h W + b)_k and argmin_k ||h - mu_k|| are the same
    class (NC4).

    `observe(state, features, labels, weights=None)` takes features [n, d], labels [n] and weights [n], with
    the rules of `class_moments` for weights of 0 and labels outside [0, K); a row of an absent class does not
    count. States add up; a batch needs [n, K] floats beside its features. The sums are fourth powers of the
    features' scale: in float32 norms between 1e-6 and 1e8 are safe.

    Args:
      means: class means [K, d]; float64 is accumulated in float64, everything else in float32.
      present: which classes are there, [K] bool; None: those whose mean is finite.
      classifier: W [d, K], or None.
      bias: b [K], or None for 0.

    Returns:
      An additive statistic with states `CollapseGram` and results `CollapseGramResult`.

    Raises:
      ValueError: fewer than 2 classes, shapes that do not fit, a bias without a classifier; later, a state of
        another K, or another batch shape, or concrete labels outside [0, K).
      TypeError: means that are no floats; a `present` that is not bool.

    References:
      V. Papyan, X. Y. Han and D. L. Donoho, PNAS 117(40), 2020, arXiv 2008.08186.

    Example:
      >>> h, y = jnp.array([[1.0, 0.0], [3.0, 0.0], [-2.0, 0.0]]), jnp.array([0, 0, 1])
      >>> stat = collapse_gram(jnp.array([[2.0, 0.0], [-2.0, 0.0]]))
      >>> stat.result(stat.observe(stat.zero(), h, y)).variance
      Array([1., 0.], dtype=float32)
    """
    _check_means("means", means)
    num_classes, dim = means.shape
    if present is None:
        present = jnp.all(jnp.isfinite(means), axis=1)
    elif present.dtype != jnp.bool_:
        raise TypeError(f"present must be bool, got {present.dtype}: type present=moments.count > 0")
    if present.shape != (num_classes,):
        raise ValueError(f"present must be [K] = {(num_classes,)}, got {present.shape}")
    dtype = statistics_dtype(means)
    means = jnp.where(present[:, None], means.astype(dtype), jnp.zeros(means.shape, dtype))
    centred = _centred(means, present)
    between = jnp.matmul(centred, centred.T, precision=_HIGHEST)
    if classifier is not None:
        _check_classifier(classifier, bias, means.shape)
        classifier = classifier.astype(dtype)
        bias = jnp.zeros(num_classes, dtype) if bias is None else bias.astype(dtype)
    elif bias is not None:
        raise ValueError("bias was given without a classifier: pass classifier= too")

    def check(state: CollapseGram) -> None:
        if state.gram.shape != (num_classes, num_classes):
            raise ValueError(
                f"collapse_gram of {num_classes} classes has states with gram {between.shape}, got one with "
                f"{state.gram.shape}: build it from means [{state.gram.shape[0]}, d]"
            )
        if (state.agree is None) != (classifier is None):
            raise ValueError(
                "a state with agreements and one without cannot be combined: pass classifier= to both"
            )

    def combine(a: CollapseGram, b: CollapseGram) -> CollapseGram:
        check(a)
        check(b)
        return jax.tree.map(jnp.add, a, b)

    def zero() -> CollapseGram:
        empty = jnp.zeros(num_classes, dtype)
        agree = None if classifier is None else jnp.zeros((), dtype)
        return CollapseGram(empty, empty, jnp.zeros((num_classes, num_classes), dtype), agree)

    def agreement(projected: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jnp.matmul(features, classifier, precision=_HIGHEST) + bias[None]
        # ||h - mu_k||^2 = ||h - mu_G||^2 - 2 (h - mu_G) . c_k + ||c_k||^2, and h - mu_G = (h - mu_y) + c_y.
        nearness = projected + between[labels] - (jnp.diagonal(between) / 2)[None]
        rules = [jnp.where(present[None], x, jnp.full_like(x, -jnp.inf)) for x in (logits, nearness)]
        return jnp.argmax(rules[0], axis=1) == jnp.argmax(rules[1], axis=1)

    def observe(
        state: CollapseGram, features: jax.Array, labels: jax.Array, weights: jax.Array | None = None
    ) -> CollapseGram:
        check(state)
        features, labels, weights = labelled_rows(features, labels, weights, num_classes, dim, dtype)
        weights = jnp.where(present[labels], weights, jnp.zeros_like(weights))
        away = jnp.where(weights[:, None] != 0, features - means[labels], jnp.zeros_like(features))
        projected = jnp.matmul(away, centred.T, precision=_HIGHEST)
        count, within = (
            jax.ops.segment_sum(row, labels, num_classes)
            for row in (weights, weights * jnp.sum(away * away, axis=1))
        )
        gram = jnp.matmul(projected.T, weights[:, None] * projected, precision=_HIGHEST)
        agree = None
        if classifier is not None:
            agree = jnp.sum(weights * agreement(projected, features, labels).astype(dtype))
        return jax.tree.map(jnp.add, state, CollapseGram(count, within, gram, agree))

    def result(state: CollapseGram) -> CollapseGramResult:
        check(state)
        total = jnp.sum(state.count)
        agree = None if state.agree is None else state.agree / total
        return CollapseGramResult(state.count, state.within / state.count, state.gram / total, agree)

    return Statistic(zero, observe, combine, result, additive=True)


def _nc1(between: jax.Array, gram: jax.Array, classes: jax.Array, dim: int) -> jax.Array:
    """tr(A^+ G A^+), A = C C^T, with the pseudo-inverse of rank min(K' - 1, d)."""
    values, vectors = jnp.linalg.eigh(between)
    rank = jnp.minimum(classes.astype(jnp.int32) - 1, dim)
    # By number, not by size: a tolerance would invert the rounding of eigenvalues that are exactly 0.
    kept = jnp.arange(values.shape[0], dtype=jnp.int32) >= values.shape[0] - rank
    spread = jnp.sum(vectors * jnp.matmul(gram, vectors, precision=_HIGHEST), axis=0)
    values = jnp.where(kept, jnp.maximum(values, jnp.zeros_like(values)), jnp.ones_like(values))
    return jnp.sum(jnp.where(kept, jnp.maximum(spread, jnp.zeros_like(spread)) / values / values, 0))


def collapse_metrics(
    moments: ClassMomentsResult,
    gram: CollapseGramResult | None = None,
    classifier: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """NC1 to NC4 and their cheaper relatives, all scalars, from the class moments and the second pass.

    With mu_k and v_k the mean and variance of class k, mu_G the unweighted mean of the mu_k,
    C = [mu_k - mu_G] in R^{K x d}, Sigma_W the covariance within classes (over all rows),
    Sigma_B = C^T C / K, W the classifier and T = (I - 11^T / K) / sqrt(K - 1):

    | name             | what it is                                                        | needs         |
    |------------------|-------------------------------------------------------------------|---------------|
    | `nc1`            | tr(Sigma_B^+ Sigma_W) / K                                         | `gram`        |
    | `within_between` | tr Sigma_W / tr Sigma_B                                           |               |
    | `cdnv`           | mean over pairs of (v_k + v_l) / (2 ||mu_k - mu_l||^2)            |               |
    | `nc2`            | ||C C^T / ||C C^T||_F - T||_F                                     |               |
    | `equinorm`       | standard deviation / mean of the ||mu_k - mu_G||                  |               |
    | `cosine_spread`  | standard deviation of the pairwise cosines of the mu_k - mu_G     |               |
    | `cosine_excess`  | mean of |cosine + 1/(K-1)|                                        |               |
    | `nc3`            | ||W^T C^T / ||W^T C^T||_F - T||_F                                 | `classifier`  |
    | `self_duality`   | ||W^T / ||W||_F - C / ||C||_F||_F^2                               | `classifier`  |
    | `nc4`            | share of rows on which classifier and nearest class mean agree    | `gram` with W |

    All are 0 at collapse but `nc4`, which is 1. They depend on neither a rotation nor the scale of the
    features. A name is in the result when what it needs was given. K counts the classes that were seen; the
    others are left out of every metric. NC1 is tr(A^+ (1/N sum P_i P_i^T) A^+) with A = C C^T, so nothing is
    d x d.

    | input                                              | result                                         |
    |----------------------------------------------------|------------------------------------------------|
    | fewer than 2 classes seen                          | NaN                                            |
    | two classes with one mean                          | `cdnv` inf (or NaN), or large from rounding    |
    | means in fewer than min(K-1, d) dimensions         | `nc1` has no meaning: large, inf or NaN        |
    | a class mean at mu_G                               | the cosines are NaN                            |
    | K > d + 1                                          | `nc2`, `nc3` cannot be 0: use `margin_metrics` |

    mu_G is the mean of the class means, not of the rows: with imbalanced classes the two differ, and with
    them every metric.

    Args:
      moments: what `class_moments(K, d)` gives for the features; float32 or float64.
      gram: what `collapse_gram(moments.mean)` gives for the same features; its exact variances then take the
        place of those of the first pass.
      classifier: W [d, K].

    Returns:
      name -> scalar, of the moments' dtype.

    Raises:
      ValueError: fewer than 2 classes, a classifier or a Gram matrix of another shape.

    References:
      V. Papyan, X. Y. Han and D. L. Donoho, PNAS 117(40), 2020, arXiv 2008.08186 (NC1 to NC4); Z. Zhu et al.,
      A geometric analysis of neural collapse with unconstrained features, NeurIPS 2021, arXiv 2105.02375 (the
      forms with T); T. Galanti, A. György and M. Hutter, On the role of neural collapse in transfer learning,
      ICLR 2022, arXiv 2112.15121 (CDNV).

    Example:
      >>> from odjax.core.class_moments import class_moments
      >>> h, y = jnp.array([[1.0, 0.0], [3.0, 0.0], [-2.0, 0.0], [-2.0, 0.0]]), jnp.array([0, 0, 1, 1])
      >>> first = class_moments(2, 2)
      >>> moments = first.result(first.observe(first.zero(), h, y))
      >>> second = collapse_gram(moments.mean)
      >>> metrics = collapse_metrics(moments, second.result(second.observe(second.zero(), h, y)))
      >>> {name: round(float(metrics[name]), 4) for name in ("nc1", "within_between", "cdnv")}
      {'nc1': 0.0625, 'within_between': 0.125, 'cdnv': 0.0312}
    """
    _check_means("moments.mean", moments.mean)
    num_classes, dim = moments.mean.shape
    if gram is not None and gram.gram.shape != (num_classes, num_classes):
        raise ValueError(
            f"gram is of {gram.gram.shape[0]} classes, the moments of {num_classes}: "
            "build it as collapse_gram(moments.mean)"
        )
    dtype = moments.mean.dtype
    present = moments.count > 0
    pairs = jnp.triu(present[:, None] & present[None, :], 1)
    classes = jnp.sum(present, dtype=dtype)

    def over_pairs(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(pairs, x, jnp.zeros_like(x))) / (classes * (classes - 1) / 2)

    def over_classes(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(present, x, jnp.zeros_like(x))) / classes

    centred = _centred(moments.mean, present)
    between = jnp.matmul(centred, centred.T, precision=_HIGHEST)
    squares = jnp.diagonal(between)
    within = moments if gram is None else gram
    rows = jnp.where(within.count > 0, within.count * within.variance, jnp.zeros_like(within.count))
    metrics = {
        "within_between": jnp.sum(rows) / jnp.sum(within.count) / over_classes(squares),
    }

    distances = jnp.maximum(squares[:, None] + squares[None, :] - 2 * between, jnp.zeros_like(between))
    variance = within.variance
    metrics["cdnv"] = over_pairs((variance[:, None] + variance[None, :]) / 2 / distances)

    eye = jnp.diag(present.astype(dtype))
    both = (present[:, None] & present[None, :]).astype(dtype)
    simplex = (eye - both / classes) / jnp.sqrt(classes - 1)
    metrics["nc2"] = jnp.linalg.norm(between / jnp.linalg.norm(between) - simplex)

    norms = jnp.sqrt(squares)
    mean_norm = over_classes(norms)
    metrics["equinorm"] = jnp.sqrt(over_classes((norms - mean_norm) ** 2)) / mean_norm
    cosines = between / norms[:, None] / norms[None, :]
    mean_cosine = over_pairs(cosines)
    metrics["cosine_spread"] = jnp.sqrt(over_pairs((cosines - mean_cosine) ** 2))
    metrics["cosine_excess"] = over_pairs(jnp.abs(cosines + 1 / (classes - 1)))

    if classifier is not None:
        _check_classifier(classifier, None, moments.mean.shape)
        weights = classifier.T.astype(dtype)
        weights = jnp.where(present[:, None], weights, jnp.zeros_like(weights))
        duality = jnp.matmul(weights, centred.T, precision=_HIGHEST)
        metrics["nc3"] = jnp.linalg.norm(duality / jnp.linalg.norm(duality) - simplex)
        unit = weights / jnp.linalg.norm(weights) - centred / jnp.linalg.norm(centred)
        metrics["self_duality"] = jnp.sum(unit * unit)
    if gram is not None:
        metrics["nc1"] = _nc1(between, gram.gram.astype(dtype), classes, dim)
        if gram.agreement is not None:
            metrics["nc4"] = gram.agreement.astype(dtype)
    nothing = jnp.asarray(jnp.nan, dtype)
    return {name: jnp.where(classes >= 2, value, nothing) for name, value in metrics.items()}
