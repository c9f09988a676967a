"""How deltas become one update: commutative monoids, whose sum is the same for any packing on any devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from odjax.core import Statistic, fold_path, map_with_path, statistics_dtype
from odjax.federated.local import Figures

Mask = Any


@dataclass(frozen=True)
class Aggregator:
    """An aggregation rule.

    Attributes:
      statistic: `(delta, cohort) -> Statistic`, from the shapes of a delta and the size of the cohort. It is
        additive, and `observe(state, delta, weight, position, key)` takes one client.
      finish: `(state, key, mask) -> update`, once, after the sum over devices; `mask` (0 or 1 for every
        entry, or None) says which entries take part.
      lift: `(delta, mask) -> (delta, figures)` of each client before it is observed, clipping for example.
      uniform: whether only weights of 0 and 1 are allowed. Where a compiled program cannot look at them,
        every weight but 0 counts as 1.
      sensitivity: `relation -> float`, by how much one client moves the sum; None where it is not bounded.
      private: whether figures of clients may not be shown, since only the update is covered by the noise.
      plan: of a private sum, the plan or forecast whose clip and noise it applies.
      one_by_one: whether the clients that end together are observed one after another, each in place. For
        states that are much larger than a delta; others are observed side by side and summed.
    """

    statistic: Callable[[Any, int], Statistic]
    finish: Callable[[Any, jax.Array, Mask], Any]
    lift: Callable[[Any, Mask], tuple[Any, Figures]] = lambda delta, mask: (masked(delta, mask), {})
    uniform: bool = False
    sensitivity: Callable[[str], float] | None = None
    private: bool = False
    one_by_one: bool = False
    plan: Any = None


class WeightedSum(NamedTuple):
    """Sum of weight times delta, float32 (float64 for float64), and sum of weights."""

    total: Any
    weight: jax.Array


def masked(tree: Any, mask: Mask) -> Any:
    """The tree with zeros where the mask is 0; the tree itself without a mask."""
    if mask is None:
        return tree
    return jax.tree.map(lambda x, m: jnp.where(m != 0, x, jnp.zeros_like(x)), tree, mask)


def _sums(delta: Any, cohort: int) -> Statistic:
    del cohort

    def observe(
        state: WeightedSum, delta: Any, weight: jax.Array, position: jax.Array, key: jax.Array
    ) -> WeightedSum:
        del position, key
        total = jax.tree.map(lambda s, d: s + weight.astype(s.dtype) * d.astype(s.dtype), state.total, delta)
        return WeightedSum(total, state.weight + weight)

    return Statistic(
        zero=lambda: WeightedSum(_zeros(delta), jnp.zeros((), jnp.float32)),
        observe=observe,
        combine=lambda a, b: jax.tree.map(jnp.add, a, b),
        result=lambda state: _over(state.total, state.weight),
        additive=True,
    )


def _zeros(tree: Any, leading: tuple[int, ...] = ()) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), statistics_dtype(leaf)), tree)


def _over(total: Any, weight: jax.Array) -> Any:
    """total / weight; zero where nobody weighs anything."""
    some = weight > 0

    def divided(leaf: jax.Array) -> jax.Array:
        share = 1 / jnp.where(some, weight, 1.0).astype(leaf.dtype)
        return leaf * jnp.where(some, share, jnp.zeros_like(share))

    return jax.tree.map(divided, total)


def weighted_mean() -> Aggregator:
    """The mean of deltas, weighted by examples (FedAvg).

    Returns:
      An aggregator; with no weight at all the update is 0.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    algorithm 1.

    Example:
      >>> sums = weighted_mean().statistic(jnp.zeros(2), 2)
      >>> key = jax.random.key(0)
      >>> state = sums.observe(sums.zero(), jnp.array([1.0, 0.0]), jnp.float32(3), 0, key)
      >>> state = sums.observe(state, jnp.array([0.0, 4.0]), jnp.float32(1), 1, key)
      >>> sums.result(state)
      Array([0.75, 1.  ], dtype=float32)
    """
    return Aggregator(_sums, lambda state, key, mask: masked(_over(state.total, state.weight), mask))


def norm_bounded_mean(bound: float) -> Aggregator:
    """The weighted mean of deltas, each scaled down to a global norm of at most `bound`; no privacy.

    Args:
      bound: positive.

    Returns:
      An aggregator with the figures "norm" and "clipped" of the clients.

    Raises:
      ValueError: a bound that is not positive.

    Source: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 3.2.
    """
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")
    return Aggregator(
        _sums,
        lambda state, key, mask: masked(_over(state.total, state.weight), mask),
        lift=lambda delta, mask: _clipped(_clip(bound), masked(delta, mask)),
    )


def _clip(norm: float) -> Callable[[Any], tuple[Any, jax.Array]]:
    from odjax.privacy import Clip

    return Clip(norm)


def _clipped(clip: Any, delta: Any) -> tuple[Any, Figures]:
    clipped, norm = clip(delta)
    one = jnp.ones((), jnp.float32)
    finite = jnp.isfinite(norm)
    return clipped, {
        "norm": (jnp.where(finite, norm, 0.0), jnp.where(finite, one, 0.0)),
        "clipped": ((norm > getattr(clip, "norm", math.inf)).astype(jnp.float32), one),
    }


def private_sum(plan: Any) -> Aggregator:
    """The differentially private mean: clip, sum, noise once, divide by the expected size of the cohort.

    Every delta is clipped to the plan's norm over all leaves together, all weigh 1, the noise is added to the
    sum after the reduction over devices, and the divisor is fixed. Entries where the mask is 0 get no noise
    and no update.

    Args:
      plan: `odjax.privacy.PrivacyPlan`, or its forecast.

    Returns:
      An aggregator that carries the plan's sensitivity.

    Raises:
      TypeError: a clip without a sensitivity.
      ValueError: a plan for records.

    Source: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", algorithm 1.

    Example:
      >>> from odjax.privacy import privacy_plan
      >>> plan = privacy_plan(
      ...     population=10**6, cohort=1000, clip=1.0, rounds=10, delta=1e-7, noise_multiplier=1.0
      ... )
      >>> private_sum(plan).sensitivity("add_or_remove_one")
      1.0
    """
    from odjax.privacy import PrivacyForecast

    clip = plan.clip
    if getattr(clip, "sensitivity", None) is None:
        raise TypeError(
            f"the plan's clip, {clip!r}, declares no sensitivity: make it with odjax.privacy.Clip(norm)"
        )
    if plan.unit == "record":
        raise ValueError(
            "the plan is for records, and here the data of a client are one unit: make it with unit='user'; "
            "for records there is odjax.privacy.private_gradient"
        )
    return Aggregator(
        _sums,
        lambda state, key, mask: plan.privatize(state.total, key, mask),
        lift=lambda delta, mask: _clipped(clip, masked(delta, mask)),
        uniform=True,
        sensitivity=clip.sensitivity,
        private=not isinstance(plan, PrivacyForecast),
        plan=plan,
    )


def sign_majority() -> Aggregator:
    """Each client votes with the sign of its delta; the update is the sign of the weighted vote.

    Returns:
      An aggregator whose updates are -1, 0 or 1.

    Source: Bernstein et al. 2019, "signSGD with Majority Vote is Communication Efficient and Fault Tolerant",
    algorithm 1.
    """
    return Aggregator(
        _sums,
        lambda state, key, mask: masked(jax.tree.map(jnp.sign, state.total), mask),
        lift=lambda delta, mask: (jax.tree.map(jnp.sign, masked(delta, mask)), {}),
    )


class Stacked(NamedTuple):
    """Deltas of the whole cohort: float32 [K, ...] a leaf, and weights [K]."""

    deltas: Any
    weights: jax.Array


def stacked(finish: Callable[[Stacked], Any]) -> Aggregator:
    """For rules that need all deltas at once, at the price of K times the memory of one.

    Args:
      finish: `(Stacked) -> update`; a client that took no step has weight 0 and a delta of 0.

    Returns:
      An aggregator. Each client writes its own place, so the stack too is a sum over devices.
    """

    def statistic(delta: Any, cohort: int) -> Statistic:
        def observe(
            state: Stacked, delta: Any, weight: jax.Array, position: jax.Array, key: jax.Array
        ) -> Stacked:
            del key
            # Without weight there may be no position either: zero is then added to some place.
            at = jnp.maximum(position, 0)

            def placed(buffer: jax.Array, leaf: jax.Array) -> jax.Array:
                own = jnp.where(weight != 0, leaf, jnp.zeros_like(leaf)).astype(buffer.dtype)
                own += jax.lax.dynamic_index_in_dim(buffer, at, keepdims=False)
                return jax.lax.dynamic_update_index_in_dim(buffer, own, at, 0)

            return jax.tree.map(placed, state, Stacked(delta, weight))

        return Statistic(
            zero=lambda: Stacked(_zeros(delta, (cohort,)), jnp.zeros((cohort,), jnp.float32)),
            observe=observe,
            combine=lambda a, b: jax.tree.map(jnp.add, a, b),
            result=lambda state: state,
            additive=True,
        )

    return Aggregator(statistic, lambda state, key, mask: masked(finish(state), mask), one_by_one=True)


def trimmed_mean(trim: float) -> Aggregator:
    """Coordinate by coordinate: the mean without the smallest and the largest values; `trim` 0.5: the median.

    Args:
      trim: part of the clients that is cut off at each end, in [0, 0.5].

    Returns:
      An aggregator; weights count as present or absent.

    Raises:
      ValueError: a part outside [0, 0.5].

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
    definitions 1 and 2.
    """
    if not 0 <= trim <= 0.5:
        raise ValueError(f"trim must be in [0, 0.5], got {trim}")

    def finish(stack: Stacked) -> Any:
        there = stack.weights > 0
        count = jnp.sum(there.astype(jnp.float32))
        # As many at each end, and at least one or two are left in the middle.
        cut = jnp.maximum(jnp.minimum(jnp.floor(trim * count), jnp.floor((count - 1) / 2)), 0.0)

        def middle(leaf: jax.Array) -> jax.Array:
            at = jnp.expand_dims(there, tuple(range(1, leaf.ndim)))
            ordered = jnp.sort(jnp.where(at, leaf, jnp.inf), axis=0)
            rank = jnp.expand_dims(jnp.arange(leaf.shape[0], dtype=jnp.float32), tuple(range(1, leaf.ndim)))
            kept = (rank >= cut) & (rank < count - cut)
            total = jnp.sum(jnp.where(kept, ordered, jnp.zeros_like(ordered)), axis=0)
            return total / jnp.maximum(count - 2 * cut, 1.0).astype(leaf.dtype)

        return jax.tree.map(middle, stack.deltas)

    return stacked(finish)


def mixed(matrix: Any) -> Aggregator:
    """Personal updates: client i gets sum_j W_ij delta_j.

    Rows of 1 / K give every client the plain mean, the identity its own delta, blocks the means of clusters.

    Args:
      matrix: W [K, K] over the positions of the cohort.

    Returns:
      An aggregator whose update has a leading axis of clients.

    Raises:
      ValueError: W is not square.
    """
    weights = jnp.asarray(matrix, jnp.float32)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise ValueError(f"the mixing matrix must be [clients, clients], got {weights.shape}")

    def finish(stack: Stacked) -> Any:
        exact = jax.lax.Precision.HIGHEST
        return jax.tree.map(
            lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, 1, precision=exact), stack.deltas
        )

    return stacked(finish)


class SecureSum(NamedTuple):
    """Sum modulo 2^32 of quantized deltas, int32, and sum of weights."""

    total: Any
    weight: jax.Array


def secure_sum(bound: float, bits: int = 16) -> Aggregator:
    """What secure aggregation computes: deltas in fixed point, summed modulo 2^32; then their mean.

    Each entry is cut to [-bound, bound] and rounded at random, up or down in proportion, to a multiple of
    bound / 2^(bits - 1); what is no number counts as 0. All clients weigh 1. The masking that hides single
    clients cancels in the sum and is left out.

    Args:
      bound: largest magnitude of an entry.
      bits: of an entry; 2^(31 - bits) clients fit into the sum.

    Returns:
      An aggregator.

    Raises:
      ValueError: a bound that is not positive, bits outside 2 to 30; when it is built for a cohort whose sum
        may wrap around.

    Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    section 4.
    """
    if not bound > 0 or not 2 <= bits <= 30:
        raise ValueError(f"need a positive bound and 2 to 30 bits, got {bound} and {bits}")
    scale = float(2 ** (bits - 1)) / bound

    def statistic(delta: Any, cohort: int) -> Statistic:
        if cohort > 2 ** (31 - bits):
            raise ValueError(
                f"{cohort} clients of {bits} bits do not fit into 32: use at most "
                f"{31 - math.ceil(math.log2(cohort))} bits"
            )

        def observe(
            state: SecureSum, delta: Any, weight: jax.Array, position: jax.Array, key: jax.Array
        ) -> SecureSum:
            del position

            def quantized(path: str, leaf: jax.Array) -> jax.Array:
                value = leaf.astype(jnp.float32)
                steps = jnp.clip(jnp.where(jnp.isnan(value), 0.0, value), -bound, bound) * scale
                low = jnp.floor(steps)
                up = jax.random.uniform(fold_path(key, path), leaf.shape) < steps - low
                return jnp.where(weight != 0, low + up.astype(jnp.float32), 0.0).astype(jnp.int32)

            total = jax.tree.map(jnp.add, state.total, map_with_path(quantized, delta))
            return SecureSum(total, state.weight + (weight != 0).astype(jnp.float32))

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int32), delta)
        return Statistic(
            zero=lambda: SecureSum(zeros, jnp.zeros((), jnp.float32)),
            observe=observe,
            combine=lambda a, b: jax.tree.map(jnp.add, a, b),
            result=lambda state: state,
            additive=True,
        )

    def finish(state: SecureSum, key: jax.Array, mask: Mask) -> Any:
        del key
        mean = _over(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.total), state.weight)
        return masked(jax.tree.map(lambda leaf: leaf / scale, mean), mask)

    return Aggregator(statistic, finish, uniform=True)
