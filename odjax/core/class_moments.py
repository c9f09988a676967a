"""Counts, means and variances of the features of every class, as one additive statistic."""

from __future__ import annotations

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from odjax.core.statistics import Statistic


class ClassMoments(NamedTuple):
    """State of `class_moments`: weight [K], sum of h - origin [K, d] and of its squared length [K]."""

    count: jax.Array
    sum: jax.Array
    sumsq: jax.Array


class ClassMomentsResult(NamedTuple):
    """Result of `class_moments`: weight [K], mean [K, d], mean squared distance to the mean [K].

    Mean and variance are NaN for a class that was never seen.
    """

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


def _is_concrete(x: object) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def labelled_rows(
    features: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None,
    num_classes: int,
    dim: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checks a batch of labelled features and makes the rows that do not count harmless.

    Args:
      features: [n, dim], any float.
      labels: [n], any integer.
      weights: [n] >= 0, or None for ones.
      num_classes: K.
      dim: d.
      dtype: the dtype of what is returned.

    Returns:
      Features [n, dim] with zeros where the weight is 0, labels [n] int32 in [0, K), weights [n]. A row whose
      traced label is outside [0, K) has weight 0.

    Raises:
      ValueError: a shape that does not fit; a concrete label outside [0, K) in a row whose weight is not 0.
      TypeError: labels that are no integers.
    """
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(
            f"features must be [n, {dim}], got {features.shape}: flatten them to rows of {dim} numbers"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers in [0, {num_classes}), got {labels.dtype}: use labels.astype(jnp.int32)"
        )
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must have one class a row, shape {features.shape[:1]}, got {labels.shape}: "
            "use labels.argmax(-1) on one-hot rows"
        )
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(
            f"weights must have one number a row, shape {labels.shape}, got {weights.shape}: "
            "use weights.reshape(-1), or None for ones"
        )
    if _is_concrete(labels) and (weights is None or _is_concrete(weights)):
        counted = np.asarray(labels)
        if weights is not None:
            counted = counted[np.asarray(weights) != 0]
        if counted.size and not 0 <= counted.min() <= counted.max() < num_classes:
            raise ValueError(
                f"labels must be in [0, {num_classes}), got values from {counted.min()} to {counted.max()}: "
                "give rows that do not count the weight 0"
            )
    # Narrow types cannot hold K, and unsigned ones have no negative labels.
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    valid = (labels >= 0) & (labels < num_classes)
    labels = jnp.where(valid, labels, jnp.zeros_like(labels)).astype(jnp.int32)
    weights = jnp.ones(labels.shape, dtype) if weights is None else weights.astype(dtype)
    weights = jnp.where(valid, weights, jnp.zeros_like(weights))
    features = features.astype(dtype)
    return jnp.where(weights[:, None] != 0, features, jnp.zeros_like(features)), labels, weights


def _size(name: str, value: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}: type {name}=int(...)") from None
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}: type the size of the data")
    return value


def class_moments(
    num_classes: int, dim: int, *, origin: jax.Array | None = None, dtype: DTypeLike = jnp.float32
) -> Statistic:
    """Count, mean and within-class variance of every class in one pass over the features.

    With y_i the class of row i, w_i its weight and o_k the origin of class k, the state is

      n_k = sum w_i,   s_k = sum w_i (h_i - o_k),   q_k = sum w_i ||h_i - o_k||^2   over the i with y_i = k,

    and the result is mu_k = o_k + s_k / n_k and v_k = q_k / n_k - ||s_k / n_k||^2, the mean squared distance
    to mu_k, never below 0. States add up, so a mesh axis is reduced by one `psum`.

    The difference in v_k cancels when a class is small against its distance from the origin. An origin near
    the means (those of an earlier epoch, the vertices of a fixed head, one row of each class) removes that.
    The relative error of v_k stays below this for 64 features of mean 10 and standard deviation sigma, 1,024
    rows a class in 16 batches, float32 (`pytest tests/core/test_class_moments.py -k tight` asserts it, and
    that without an origin it is not a hundredth of that):

    | sigma | origin 0           | origin: the first row of each class |
    |-------|--------------------|-------------------------------------|
    | 1     | 1e-4               | 5e-6                                |
    | 0.1   | 1e-2               | 5e-6                                |
    | 0.01  | 1 (no digit right) | 5e-6                                |

    `observe(state, features, labels, weights=None)` takes features [n, d], labels [n] of any integer type and
    weights [n] >= 0.

    | input                                        | what happens                                    |
    |----------------------------------------------|-------------------------------------------------|
    | weight 0                                     | the row is ignored, NaN and any label included  |
    | label outside [0, K), concrete               | `ValueError`                                    |
    | label outside [0, K), traced (inside `jit`)  | the row is ignored; -1 is not the last class    |
    | class never seen                             | count 0, mean and variance NaN                  |
    | NaN or inf in a row                          | NaN in that class's variance, no other class's  |

    Args:
      num_classes: K.
      dim: d.
      origin: o, [K, d], or [d] for all classes; None for 0. What is not finite in it (the mean of a class
        that was never seen) is 0. States of different origins must not be combined, which cannot be checked.
      dtype: float32, or float64 where JAX has it enabled.

    Returns:
      An additive statistic with states `ClassMoments` and results `ClassMomentsResult`.

    Raises:
      TypeError: sizes that are no integers; a dtype that is neither float32 nor float64.
      ValueError: a size below 1 or an origin of another shape; later, a state of another K or d, a batch of
        another shape, concrete labels outside [0, K).

    References:
      T. F. Chan, G. H. Golub and R. J. LeVeque, Algorithms for computing the sample variance: analysis and
      recommendations, The American Statistician 37(3), 1983 (shifted data).

    Example:
      >>> stat = class_moments(2, 1)
      >>> state = stat.observe(stat.zero(), jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 0, 1]))
      >>> stat.result(state).mean.ravel(), stat.result(state).variance
      (Array([2., 5.], dtype=float32), Array([1., 0.], dtype=float32))
    """
    num_classes, dim = _size("num_classes", num_classes), _size("dim", dim)
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise TypeError(f"dtype must be float32 or float64, got {jnp.dtype(dtype)}: type dtype=jnp.float32")
    shape = (num_classes, dim)
    if origin is not None:
        if origin.shape not in (shape, (dim,)):
            raise ValueError(f"origin must be {shape} or {(dim,)}, got {origin.shape}")
        origin = jnp.broadcast_to(origin.astype(dtype), shape)
        origin = jnp.where(jnp.isfinite(origin), origin, jnp.zeros_like(origin))

    def check(state: ClassMoments) -> None:
        if state.sum.shape != shape:
            raise ValueError(
                f"class_moments{shape} has states with sums {shape}, got one with {state.sum.shape}: "
                f"build it as class_moments{state.sum.shape}"
            )

    def combine(a: ClassMoments, b: ClassMoments) -> ClassMoments:
        check(a)
        check(b)
        return jax.tree.map(jnp.add, a, b)

    def observe(
        state: ClassMoments, features: jax.Array, labels: jax.Array, weights: jax.Array | None = None
    ) -> ClassMoments:
        check(state)
        features, labels, weights = labelled_rows(features, labels, weights, num_classes, dim, dtype)
        if origin is not None:
            features = features - origin[labels]
        rows = (weights, weights[:, None] * features, weights * jnp.sum(features * features, axis=1))
        batch = ClassMoments(*(jax.ops.segment_sum(row, labels, num_classes) for row in rows))
        return jax.tree.map(jnp.add, state, batch)

    def result(state: ClassMoments) -> ClassMomentsResult:
        check(state)
        seen = state.count > 0
        count = jnp.where(seen, state.count, jnp.ones_like(state.count))
        shift = state.sum / count[:, None]
        mean = shift if origin is None else origin + shift
        variance = jnp.maximum(state.sumsq / count - jnp.sum(shift * shift, axis=1), jnp.zeros_like(count))
        nothing = jnp.asarray(jnp.nan, dtype)
        return ClassMomentsResult(
            state.count, jnp.where(seen[:, None], mean, nothing), jnp.where(seen, variance, nothing)
        )

    return Statistic(
        zero=lambda: ClassMoments(
            jnp.zeros(num_classes, dtype), jnp.zeros(shape, dtype), jnp.zeros(num_classes, dtype)
        ),
        observe=observe,
        combine=combine,
        result=result,
        additive=True,
    )
