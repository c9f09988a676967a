"""Schedules of sparse training: sparsity over time, the share of links that is replaced, re-warming.

All are functions of the number of the update (a Python number or a traced integer) to a float32 scalar.
Sparsity s and density 1 - s: the schedules give either, as their end points do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[int | jax.Array], jax.Array]
"""From the number of the update to a float32 scalar."""


def _whole(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of updates, at least {low}, got {value!r}")


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")


def _progress(step: int | jax.Array, start: int, end: int) -> jax.Array:
    # The difference is taken in integers: float32 does not tell updates above 2^24 apart.
    passed = jnp.clip(jnp.asarray(step) - start, 0, end - start)
    # Not every compiler divides a number by itself to exactly 1.
    return jnp.where(passed == end - start, 1, passed.astype(jnp.float32) / jnp.float32(end - start))


def _between(first: float, last: float, progress: jax.Array, share: jax.Array) -> jax.Array:
    """first + (last - first) share, never beyond either, and exactly they where the progress is 0 and 1."""
    low, high = jnp.float32(min(first, last)), jnp.float32(max(first, last))
    value = jnp.clip(jnp.float32(first) + jnp.float32(last - first) * share, low, high)
    return jnp.where(progress <= 0, jnp.float32(first), jnp.where(progress >= 1, jnp.float32(last), value))


def constant(value: float) -> Schedule:
    """The same value at every update.

    Args:
      value: a share between 0 and 1.

    Returns:
      step -> float32 [].

    Raises:
      ValueError: the value is not between 0 and 1.

    Example:
      >>> constant(0.5)(7)
      Array(0.5, dtype=float32)
    """
    _share("value", value)
    return lambda step: jnp.float32(value)


def _checked(first: float, last: float, start: int, end: int) -> None:
    _share("the first value", first)
    _share("the last value", last)
    _whole("start", start, 0)
    _whole("end", end, 1)
    if end <= start:
        raise ValueError(f"end must come after start, got start={start} and end={end}")


def cubic(first: float, last: float, start: int, end: int) -> Schedule:
    """Fast at first, slow near the end: first + (last - first) (1 - (1 - p)^3).

    p = (step - start) / (end - start), kept between 0 and 1. The same curve serves sparsities and densities.

    Args:
      first: value up to `start`, between 0 and 1.
      last: value from `end` on, between 0 and 1.
      start: the last update with the first value.
      end: the first update with the last value.

    Returns:
      step -> float32 [].

    Raises:
      ValueError: a value outside [0, 1], or `end` not after `start`.

    Source: Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878, equation 1.

    Example:
      >>> [float(cubic(1.0, 0.5, 0, 10)(step)) for step in (0, 5, 10)]
      [1.0, 0.5625, 0.5]
    """
    _checked(first, last, start, end)

    def schedule(step: int | jax.Array) -> jax.Array:
        progress = _progress(step, start, end)
        return _between(first, last, progress, 1 - (1 - progress) ** 3)

    return schedule


def sigmoid(first: float, last: float, start: int, end: int, k: float = 6.0) -> Schedule:
    """Slow, fast, slow: a logistic curve of p - 1/2, stretched so that it meets both ends.

    Its mean excess over `last` is half of `first - last`, that of `cubic` a quarter: for equal cost it decays
    over half as many updates.

    Args:
      first: value up to `start`, between 0 and 1.
      last: value from `end` on, between 0 and 1.
      start: the last update with the first value.
      end: the first update with the last value.
      k: steepness, above 0.

    Returns:
      step -> float32 [].

    Raises:
      ValueError: a value outside [0, 1], `end` not after `start`, or k not positive.

    Source: Zhang et al. 2025, arXiv 2501.19107, density decay of CHTss.

    Example:
      >>> [float(sigmoid(0.5, 0.25, 0, 10)(step)) for step in (0, 5, 10)]
      [0.5, 0.375, 0.25]
    """
    _checked(first, last, start, end)
    if not 0 < k <= 50:
        raise ValueError(f"k must be above 0 and at most 50, got {k!r}")

    def schedule(step: int | jax.Array) -> jax.Array:
        # (sig(2 k x) - sig(-k)) / (sig(k) - sig(-k)) with sig(2 y) = (1 + tanh y) / 2.
        progress = _progress(step, start, end)
        x = progress - jnp.float32(0.5)
        share = (1 + jnp.tanh(jnp.float32(k) * x) / jnp.float32(math.tanh(k / 2))) / 2
        return _between(first, last, progress, share)

    return schedule


def cosine(value: float, end: int, *, floor: float = 0.0) -> Schedule:
    """Half a cosine from `value` at update 0 to 0 at `end`, cut off below at `floor`.

    max(floor, value / 2 (1 + cos(pi step / end))); the share of links that an update replaces.

    Args:
      value: at update 0, between 0 and 1.
      end: the update at which it is down.
      floor: the least value, also after `end`; GraNet has 0.005.

    Returns:
      step -> float32 [].

    Raises:
      ValueError: a value outside [0, 1], a floor above the value, or `end` below 1.

    Source: Evci et al., Rigging the lottery, arXiv 1911.11134, section 3.

    Example:
      >>> [round(float(cosine(0.3, 10)(step)), 3) for step in (0, 5, 10)]
      [0.3, 0.15, 0.0]
    """
    _share("value", value)
    _share("floor", floor)
    _whole("end", end, 1)
    if floor > value:
        raise ValueError(f"floor must not be above the value, got floor={floor!r} and value={value!r}")

    def schedule(step: int | jax.Array) -> jax.Array:
        progress = _progress(step, 0, end)
        share = (1 - jnp.cos(jnp.float32(math.pi) * progress)) / 2
        return jnp.maximum(_between(value, 0.0, progress, share), jnp.float32(floor))

    return schedule


def staged(values: tuple[float, ...], boundaries: tuple[int, ...]) -> Schedule:
    """One value after the other: `values[i]` before update `boundaries[i]`, the last one from there on.

    The "EM&S" rule reaches its density from above in such stages: for a target of 10 %, 12 %, then 11 %, then
    10 % of the links are grown, and fewer are kept (see `odjax.sparse.methods.mest`).

    Args:
      values: shares between 0 and 1, one more than boundaries.
      boundaries: increasing numbers of updates.

    Returns:
      step -> float32 [].

    Raises:
      ValueError: the numbers of values and boundaries do not fit, or boundaries do not increase.

    Source: Yuan et al., MEST, arXiv 2110.14032, section 3.2.

    Example:
      >>> [round(float(staged((0.12, 0.11, 0.1), (90, 120))(step)), 2) for step in (89, 90, 120)]
      [0.12, 0.11, 0.1]
    """
    for value in values:
        _share("a value", value)
    for boundary in boundaries:
        _whole("a boundary", boundary, 0)
    if len(values) != len(boundaries) + 1:
        raise ValueError(
            f"{len(boundaries)} boundaries need {len(boundaries) + 1} values, got {len(values)}: "
            "the last value holds from the last boundary on"
        )
    if any(a >= b for a, b in itertools.pairwise(boundaries)):
        raise ValueError(f"boundaries must increase, got {boundaries}")

    def schedule(step: int | jax.Array) -> jax.Array:
        value = jnp.float32(values[0])
        for boundary, later in zip(boundaries, values[1:], strict=True):
            value = jnp.where(jnp.asarray(step) >= boundary, jnp.float32(later), value)
        return value

    return schedule


def ems(density: float, end: int, *, above: tuple[float, ...] = (0.05, 0.025), turn: float = 0.6) -> Schedule:
    """Density that reaches its target from above: `above[0]` more at first, `above[1]` after `turn * end`.

    Args:
      density: the target, from `end` on.
      end: the last update that changes links.
      above: what is added in the stages before it; the last stage begins at `turn * end`, the ones before
        it divide the time up to there evenly.
      turn: share of the time at which the last stage begins, in (0, 1).

    Returns:
      step -> float32 [].

    Raises:
      ValueError: a density outside [0, 1] in any stage, or too few updates for the stages.

    Source: Yuan et al., arXiv 2110.14032 (EM&S), with the stages of arXiv 2501.19107.

    Example:
      >>> [round(float(ems(0.1, 100)(step)), 3) for step in (0, 59, 60, 99, 100)]
      [0.15, 0.15, 0.125, 0.125, 0.1]
    """
    _whole("end", end, 1)
    if not above or not 0 < turn < 1:
        raise ValueError(f"ems needs stages above the target and 0 < turn < 1, got {above} and {turn!r}")
    last = len(above) - 1
    boundaries = tuple(round(turn * end * (i + 1) / max(last, 1)) for i in range(last))
    return staged((*(density + more for more in above), density), (*boundaries, end))


def rewarm(
    schedule: Callable[[int | jax.Array], jax.Array] | float,
    interval: int,
    steps: int,
    *,
    skip_step: bool = False,
    end: int | None = None,
) -> Schedule:
    """Warms a learning rate up again after every change of the links.

    rate(t) = schedule(t) min(1, (t mod interval) / steps), where t counts all updates. An optimizer inside
    `dst` with `skip_step` counts only the updates that are its own, c = 0, 1, ...; for that count pass
    `skip_step=True`: rate(c) = schedule(c) min(1, (c mod (interval - 1) + 1) / steps).

    Args:
      schedule: the learning rate without it, step -> scalar; a number is one too.
      interval: updates between two changes.
      steps: updates until the full rate, at most `interval`.
      skip_step: the count leaves out the updates that change links (`interval` is then 2 or more).
      end: the last update that may change links; None: they change to the end.

    Returns:
      step -> float32 [].

    Raises:
      ValueError: an interval below 1, or steps not in [1, interval].

    Source: Zhang et al. 2025, arXiv 2501.19107, iterative warm-up.

    Example:
      >>> [float(rewarm(lambda step: 1.0, 100, 20)(step)) for step in (0, 5, 20, 99, 100, 110)]
      [0.0, 0.25, 1.0, 1.0, 0.0, 0.5]
    """
    _whole("interval", interval, 2 if skip_step else 1)
    _whole("steps", steps, 1)
    if steps > interval:
        raise ValueError(f"steps must be at most the interval, got steps={steps} and interval={interval}")

    def warmed(step: int | jax.Array) -> jax.Array:
        rate = schedule(step) if callable(schedule) else schedule
        step = jnp.asarray(step)
        period = interval - 1 if skip_step else interval
        changes = step // period
        if end is not None:
            changes = jnp.minimum(changes, end // interval)
        since = step - changes * period + int(skip_step)
        share = jnp.minimum(jnp.float32(1), since.astype(jnp.float32) / jnp.float32(steps))
        return jnp.asarray(rate, jnp.float32) * share

    return warmed
