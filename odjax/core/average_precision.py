"""Average precision: how well scores put the positives first, the step-wise area under precision and recall.

With positives sorted in by falling score, and examples of equal score taken together,

    AP = sum over thresholds of (recall there - recall before) precision there.

It is no mean over examples, so that batches cannot be averaged: the statistic keeps scores and labels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from odjax.core.dtypes import statistics_dtype
from odjax.core.statistics import Statistic


def average_precision(scores: jax.Array, labels: jax.Array, observed: jax.Array | None = None) -> jax.Array:
    """The average precision of scores.

    | input                    | result |
    |--------------------------|--------|
    | no observed positive     | NaN    |
    | a score is NaN           | NaN    |
    | all scores equal         | the share of positives |

    Args:
      scores: [..., N] floating point, higher for positives.
      labels: [..., N], 0 or 1 of any dtype.
      observed: bool [..., N], False for what does not count; None: everything counts.

    Returns:
      [...] float32, or float64 for float64 scores.

    Raises:
      ValueError: shapes that differ, or no example.
      TypeError: scores that are not floating point, or `observed` that is not bool.

    Source: the step-wise definition of `sklearn.metrics.average_precision_score`; Buckley and Voorhees 2000,
    "Evaluating evaluation measure stability".

    Example:
      >>> average_precision(jnp.array([0.9, 0.8, 0.1, 0.0]), jnp.array([1, 0, 0, 1]))  # (1 + 2/4) / 2
      Array(0.75, dtype=float32)
    """
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores must be floating point, got {scores.dtype}: scores.astype(jnp.float32)")
    if labels.shape != scores.shape or not scores.ndim or not scores.shape[-1]:
        raise ValueError(
            f"scores and labels must be [..., N], N at least 1, got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if observed is None:
        observed = jnp.ones(scores.shape, bool)
    if observed.dtype != jnp.bool_:
        raise TypeError(f"observed must be bool, got {observed.dtype}: compare first, such as m != 0")
    if observed.shape != scores.shape:
        raise ValueError(
            f"observed must have the shape of scores {tuple(scores.shape)}, got {tuple(observed.shape)}"
        )
    wide = statistics_dtype(scores)
    undefined = jnp.any(observed & jnp.isnan(scores), axis=-1)
    # What does not count lies anywhere in the order: it adds to neither count.
    order = jnp.argsort(jnp.where(observed, scores, -jnp.inf), axis=-1, descending=True)
    scores, observed, positive = (
        jnp.take_along_axis(x, order, axis=-1) for x in (scores, observed, observed & labels.astype(bool))
    )
    scores = jnp.where(observed, scores, -jnp.inf)
    found = jnp.cumsum(positive, axis=-1, dtype=jnp.int32).astype(wide)
    seen = jnp.cumsum(observed, axis=-1, dtype=jnp.int32).astype(wide)
    precision = found / jnp.maximum(seen, 1)
    # Every positive has the precision at the end of those of its score.
    size = scores.shape[-1]
    ends = jnp.concatenate([scores[..., 1:] != scores[..., :-1], jnp.ones((*scores.shape[:-1], 1), bool)], -1)
    place = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), scores.shape)
    end = jax.lax.cummin(jnp.where(ends, place, size - 1), axis=scores.ndim - 1, reverse=True)
    there = jnp.take_along_axis(precision, end, axis=-1)
    total = found[..., -1]
    value = jnp.sum(jnp.where(positive, there, 0), axis=-1) / jnp.maximum(total, 1)
    return jnp.where(undefined | (total == 0), jnp.asarray(jnp.nan, wide), value)


class Ranked(NamedTuple):
    """State of `average_precision_over`: `scores` and `labels` [capacity, K], `count` [] rows filled."""

    scores: jax.Array
    labels: jax.Array
    count: jax.Array


def average_precision_over(capacity: int, columns: int) -> Statistic:
    """The average precision of each column of a table of scores that comes in batches.

    `observe(state, scores, labels, weights=None)` takes scores [n, K], labels [n, K] (1, 0, or -1 where
    it is not known) and weights [n] (0 for padding: the row is left out; every other row counts once). The
    state holds all scores: capacity x K numbers twice.

    Args:
      capacity: the most rows there may be; with more of them the result is NaN.
      columns: K.

    Returns:
      A statistic; `result` is the average precision float32 [K], NaN for a column without a positive.

    Raises:
      ValueError: a capacity or a number of columns below 1; when called, a batch of another width.

    Source: like `average_precision`.

    Example:
      >>> stat = average_precision_over(capacity=4, columns=1)
      >>> state = stat.observe(stat.zero(), jnp.array([[0.9], [0.8]]), jnp.array([[1], [0]]))
      >>> stat.result(stat.observe(state, jnp.array([[0.1], [0.0]]), jnp.array([[0], [1]])))
      Array([0.75], dtype=float32)
    """
    if capacity < 1 or columns < 1:
        raise ValueError(f"capacity and columns must be at least 1, got {capacity} and {columns}")

    def zero() -> Ranked:
        empty = jnp.zeros((capacity, columns), jnp.float32)
        return Ranked(empty, empty, jnp.zeros((), jnp.float32))

    def observe(
        state: Ranked, scores: jax.Array, labels: jax.Array, weights: jax.Array | None = None
    ) -> Ranked:
        if scores.shape[1:] != (columns,) or labels.shape != scores.shape:
            raise ValueError(
                f"scores and labels must be [n, {columns}], got {tuple(scores.shape)} and "
                f"{tuple(labels.shape)}"
            )
        kept = jnp.ones(scores.shape[0], bool) if weights is None else weights.astype(bool)
        place = state.count.astype(jnp.int32) + jnp.cumsum(kept, dtype=jnp.int32) - 1
        place = jnp.where(kept, place, capacity)  # out of the table: left out
        return Ranked(
            state.scores.at[place].set(scores.astype(jnp.float32), mode="drop"),
            state.labels.at[place].set(labels.astype(jnp.float32), mode="drop"),
            state.count + jnp.sum(kept, dtype=jnp.float32),
        )

    def combine(a: Ranked, b: Ranked) -> Ranked:
        filled = jnp.arange(capacity, dtype=jnp.float32) < b.count
        both = observe(a, b.scores, b.labels, filled)
        # Rows that were lost on the way are counted all the same.
        return both._replace(count=a.count + b.count)

    def result(state: Ranked) -> jax.Array:
        filled = jnp.arange(capacity, dtype=jnp.float32) < state.count
        known = filled[:, None] & (state.labels >= 0)
        value = average_precision(state.scores.T, (state.labels > 0).T, known.T)
        return jnp.where(state.count > capacity, jnp.float32(jnp.nan), value)

    return Statistic(zero, observe, combine, result)
