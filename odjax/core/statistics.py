"""Statistics over batches as commutative monoids: `zero`, `observe`, `combine`, `result`.

Because `combine` is associative and commutative with `zero()` as its identity, a statistic gives the same
answer (to rounding) under `lax.scan`, under `vmap` and a tree of combinations, over a mesh axis, and across
hosts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Statistic:
    """A commutative monoid over batches, as four functions.

    Attributes:
      zero: `zero() -> state`, the identity of `combine`.
      observe: `observe(state, *batch) -> state`, equal to `combine(state, observe(zero(), *batch))`.
      combine: `combine(a, b) -> state`, associative and commutative up to rounding.
      result: `result(state) -> value`.
      additive: `combine` is the sum of every leaf, so that a mesh axis is reduced by one `psum`.

    Example:
      >>> total = Statistic(lambda: jnp.float32(0), lambda s, x: s + x.sum(), jnp.add, lambda s: s)
      >>> scan_over(total, (jnp.arange(6.0).reshape(3, 2),))
      Array(15., dtype=float32)
    """

    zero: Callable[[], Any]
    observe: Callable[..., Any]
    combine: Callable[[Any, Any], Any]
    result: Callable[[Any], Any]
    additive: bool = False


def _count(batches: Any) -> int:
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(batches)}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"batches must share one leading axis (the batches), their leading sizes are {lengths}"
        )
    return lengths.pop()


def scan_over(statistic: Statistic, batches: tuple[Any, ...]) -> Any:
    """Observes batches one after the other.

    Args:
      statistic: the statistic.
      batches: the arguments of `observe`, as trees whose leaves have a leading axis of batches.

    Returns:
      The state after all batches (pass it to `statistic.result`).

    Raises:
      ValueError: the leaves have no common leading axis.
    """
    _count(batches)
    return jax.lax.scan(lambda s, batch: (statistic.observe(s, *batch), None), statistic.zero(), batches)[0]


def vmap_over(statistic: Statistic, batches: tuple[Any, ...]) -> Any:
    """Observes batches side by side and combines the states in a balanced tree.

    Args:
      statistic: the statistic.
      batches: the arguments of `observe`, as trees whose leaves have a leading axis of batches (any number of
        them).

    Returns:
      The combined state; `zero()` for no batch.

    Raises:
      ValueError: the leaves have no common leading axis.
    """
    count = _count(batches)
    if count == 0:
        return statistic.zero()
    states = jax.vmap(lambda *batch: statistic.observe(statistic.zero(), *batch))(*batches)
    while count > 1:
        pairs = count // 2
        left = jax.tree.map(lambda x, n=pairs: x[: 2 * n : 2], states)
        right = jax.tree.map(lambda x, n=pairs: x[1 : 2 * n : 2], states)
        odd = jax.tree.map(lambda x, n=pairs: x[2 * n :], states)
        merged = jax.vmap(statistic.combine)(left, right)
        states = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), merged, odd)
        count -= pairs
    return jax.tree.map(lambda x: x[0], states)


def reduce_over_axis(statistic: Statistic, state: Any, axis_name: str | tuple[str, ...]) -> Any:
    """Combines the states that the devices of a mesh axis hold, inside `jax.shard_map`.

    Args:
      statistic: the statistic.
      state: this device's state.
      axis_name: the mesh axis, or several of them.

    Returns:
      The combined state, the same on every device: one `psum` for an additive statistic, otherwise an
      `all_gather` of the states and a fold in the order of the devices.
    """
    if statistic.additive:
        return jax.lax.psum(state, axis_name)
    gathered = jax.lax.all_gather(state, axis_name)
    size = jax.tree.leaves(gathered)[0].shape[0]
    combined = jax.tree.map(lambda x: x[0], gathered)
    for i in range(1, size):
        combined = statistic.combine(combined, jax.tree.map(lambda x, i=i: x[i], gathered))
    return combined


def product(**statistics: Statistic) -> Statistic:
    """Several statistics of the same batches as one.

    Args:
      **statistics: name -> statistic; all of them observe the same arguments.

    Returns:
      A statistic whose state and result are dicts by name.

    Raises:
      ValueError: no statistic was given.

    Example:
      >>> both = product(loss=weighted_mean(), spread=moments())
      >>> state = both.observe(both.zero(), jnp.array([1.0, 3.0]))
      >>> both.result(state)["loss"], both.result(state)["spread"].variance
      (Array(2., dtype=float32), Array(1., dtype=float32))
    """
    if not statistics:
        raise ValueError("product needs at least one statistic: product(loss=weighted_mean())")
    return Statistic(
        zero=lambda: {name: s.zero() for name, s in statistics.items()},
        observe=lambda state, *batch: {
            name: s.observe(state[name], *batch) for name, s in statistics.items()
        },
        combine=lambda a, b: {name: s.combine(a[name], b[name]) for name, s in statistics.items()},
        result=lambda state: {name: s.result(state[name]) for name, s in statistics.items()},
        additive=all(s.additive for s in statistics.values()),
    )


class Sums(NamedTuple):
    """State of `weighted_mean`: sum of weight times value, and sum of weights, both float32."""

    total: jax.Array
    weight: jax.Array


def _rows(
    values: jax.Array, weights: jax.Array | None, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Values as float32, zero where the weight is, and the weights, broadcastable against them."""
    if values.shape[1:] != shape:
        raise ValueError(
            f"the statistic is of observations of shape {shape}, got a batch {values.shape}, not [n, *shape]"
        )
    weights = jnp.ones(values.shape[:1], jnp.float32) if weights is None else weights.astype(jnp.float32)
    if weights.shape != values.shape[:1]:
        raise ValueError(f"weights must have one number a row, shape {values.shape[:1]}, got {weights.shape}")
    weights = weights.reshape((-1,) + (1,) * len(shape))
    return jnp.where(weights != 0, values.astype(jnp.float32), jnp.float32(0)), weights


def weighted_mean(shape: tuple[int, ...] = ()) -> Statistic:
    """The mean of a metric as a sum and a count, so that batches of different sizes (and padding) count
    rightly.

    `observe(state, values, weights=None)` takes values [n, *shape] and weights [n] (0 for padding: whatever
    is in such a row is ignored, NaN included). Sums are float32; the total weight loses ones beyond 2^24 when
    they come singly.

    Args:
      shape: the shape of one observation.

    Returns:
      An additive statistic; `result` is the mean float32 [*shape], NaN when the weights sum to 0.

    Example:
      >>> loss = weighted_mean()
      >>> state = loss.observe(loss.zero(), jnp.array([1.0, 2.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0]))
      >>> loss.result(state)
      Array(1.5, dtype=float32)
    """
    shape = tuple(shape)

    def observe(state: Sums, values: jax.Array, weights: jax.Array | None = None) -> Sums:
        values, weights = _rows(values, weights, shape)
        return Sums(state.total + jnp.sum(weights * values, axis=0), state.weight + jnp.sum(weights))

    return Statistic(
        zero=lambda: Sums(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.float32)),
        observe=observe,
        combine=lambda a, b: jax.tree.map(jnp.add, a, b),
        result=lambda state: state.total / state.weight,
        additive=True,
    )


class Moments(NamedTuple):
    """State of `moments`: total weight, mean as the sum of two float32, sum of squared deviations from it."""

    count: jax.Array
    mean: jax.Array
    mean_low: jax.Array
    m2: jax.Array


class MomentsResult(NamedTuple):
    """Result of `moments`: total weight, mean and variance, float32; NaN where they are not defined."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


def _combine_moments(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    share = jnp.where(count > 0, b.count / jnp.where(count > 0, count, jnp.float32(1)), jnp.float32(0))
    # An empty side must not bring in its meaningless mean.
    delta = (b.mean - a.mean) + (b.mean_low - a.mean_low)
    delta = jnp.where((a.count > 0) & (b.count > 0), delta, jnp.float32(0))
    base, low = jax.tree.map(
        lambda x, y: jnp.where(a.count > 0, x, y), (a.mean, a.mean_low), (b.mean, b.mean_low)
    )
    step = low + delta * share
    mean = base + step
    shifted = mean - base  # the rounding error of the sum (Knuth's two-sum)
    mean_low = (base - (mean - shifted)) + (step - shifted)
    return Moments(count, mean, mean_low, a.m2 + b.m2 + delta * delta * (a.count * share))


def moments(shape: tuple[int, ...] = (), *, ddof: float = 0.0) -> Statistic:
    """Count, mean and variance over the leading axis, in one pass and without cancellation.

    Two states are merged by the pairwise update (the pairwise formula of the source, with weights for
    counts),

      delta = mean_b - mean_a,  mean = mean_a + delta n_b / n,  M2 = M2_a + M2_b + delta^2 n_a n_b / n,

    and a batch is a state of its own: deviations are taken from its first row, then from their mean. The mean
    is kept as an unevaluated sum of two float32, so that variances far below the rounding of the mean survive
    merging.

    `observe(state, x, weights=None)` takes x [n, *shape] and weights [n] >= 0 (0 for padding: the row is
    ignored).

    | input                | result                                           |
    |----------------------|--------------------------------------------------|
    | nothing, weights 0   | count 0, mean and variance NaN                   |
    | one row              | its value, variance 0 (NaN for ddof=1)           |
    | inf or NaN in a row  | NaN in that coordinate                           |

    Args:
      shape: the shape of one observation.
      ddof: the variance is M2 / (count - ddof).

    Returns:
      A statistic; `result` is `MomentsResult(count [], mean [*shape], variance [*shape])`, float32.

    References:
      T. F. Chan, G. H. Golub and R. J. LeVeque, Algorithms for computing the sample variance: analysis and
      recommendations, The American Statistician 37(3), 1983.

    Example:
      >>> stat = moments((2,))
      >>> state = stat.observe(stat.zero(), jnp.array([[1.0, 10.0], [3.0, 10.0]]))
      >>> stat.result(state).mean, stat.result(state).variance
      (Array([ 2., 10.], dtype=float32), Array([1., 0.], dtype=float32))
    """
    shape = tuple(shape)

    def zero() -> Moments:
        empty = jnp.zeros(shape, jnp.float32)
        return Moments(jnp.zeros((), jnp.float32), empty, empty, empty)

    def observe(state: Moments, x: jax.Array, weights: jax.Array | None = None) -> Moments:
        if x.shape[:1] == (0,):
            return state
        x, weights = _rows(x, weights, shape)
        count = jnp.sum(weights)
        divisor = jnp.where(count > 0, count, jnp.float32(1))
        first = jax.lax.dynamic_index_in_dim(x, jnp.argmax(weights.reshape(-1) != 0), keepdims=True)
        away = x - first
        mean = jnp.sum(weights * away, axis=0, keepdims=True) / divisor
        centred = away - mean
        drift = jnp.sum(weights * centred, axis=0)
        m2 = jnp.sum(weights * centred * centred, axis=0) - drift * drift / divisor
        step = mean[0] + drift / divisor
        batch = Moments(
            jnp.float32(1), first[0], jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        )
        high = batch.mean + step
        shifted = high - batch.mean
        low = (batch.mean - (high - shifted)) + (step - shifted)
        return _combine_moments(state, Moments(count, high, low, jnp.maximum(m2, jnp.float32(0))))

    def result(state: Moments) -> MomentsResult:
        nothing = jnp.float32(jnp.nan)
        mean = jnp.where(state.count > 0, state.mean + state.mean_low, nothing)
        freedom = state.count - jnp.float32(ddof)
        variance = jnp.where(freedom > 0, state.m2 / jnp.where(freedom > 0, freedom, jnp.float32(1)), nothing)
        return MomentsResult(state.count, mean, variance)

    return Statistic(zero, observe, _combine_moments, result)
