"""How far every class vector is from the convex hull of the others: the geometry of more classes than d + 1.

J. Jiang et al., Generalized neural collapse for a large number of classes, 2023, arXiv 2310.05351.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from odjax.core import statistics_dtype

_HIGHEST = jax.lax.Precision.HIGHEST


class HullDistances(NamedTuple):
    """The distances [K] that were reached, and what they cannot be below [K]; the true ones lie between."""

    distance: jax.Array
    lower: jax.Array


def project_simplex(y: jax.Array) -> jax.Array:
    """The nearest point of the probability simplex, {a : a >= 0, sum a = 1}; entries of -inf become 0.

    With u the entries from large to small, it is max(y - tau_r, 0) with tau_r = (sum_{i<=r} u_i - 1) / r, for
    the last r with u_r > tau_r.

    Args:
      y: [n], float32 or float64, not all -inf.

    Returns:
      The projection [n].

    References:
      J. Duchi, S. Shalev-Shwartz, Y. Singer and T. Chandra, Efficient projections onto the l1-ball for
      learning in high dimensions, ICML 2008, figure 1.

    Example:
      >>> project_simplex(jnp.array([1.0, 0.5, -1.0]))
      Array([0.75, 0.25, 0.  ], dtype=float32)
    """
    y = y - jnp.max(y)
    u = -jnp.sort(-y)
    ranks = jnp.arange(1, y.shape[0] + 1, dtype=y.dtype)
    tau = (jnp.cumsum(u) - 1) / ranks
    last = jnp.sum(u > tau) - 1  # where u is -inf, so is tau
    return jnp.maximum(y - tau[last], jnp.zeros_like(y))


def _check(code: jax.Array) -> jax.Array:
    if code.ndim != 2 or code.shape[0] < 1 or code.shape[1] < 2:
        raise ValueError(
            f"code must be [d, K] with at least 2 classes, got {code.shape}: class vectors are its columns"
        )
    if not jnp.issubdtype(code.dtype, jnp.floating):
        raise TypeError(f"code must be floating, got {code.dtype}: use code.astype(jnp.float32)")
    return code.astype(statistics_dtype(code))


def hull_distances(code: jax.Array, *, iterations: int = 500, batch_size: int = 256) -> HullDistances:
    """The distance of every class vector to the convex hull of the others, with a proof of how good it is.

    For class k it minimises f(a) = ||W a - w_k||^2 / 2 over the probability simplex with a_k = 0, by
    accelerated projected gradient steps of size 1 / ||W||_2^2, whose momentum is dropped where it points
    uphill. With the residual r = w_k - W a, the hyperplane across r separates, so that

      min_{l != k} <r, w_k - w_l> / ||r||  <=  dist(w_k, conv{w_l, l != k})  <=  ||r||

    at every iterate (the gap is the Frank-Wolfe duality gap of f, divided by ||r||). Classes are independent;
    `batch_size` of them are solved at a time, which costs 4 d K batch_size operations and a sort of their
    coefficients an iteration.

    Args:
      code: W [d, K]; float64 is solved in float64, everything else in float32.
      iterations: the number of steps, at least 1.
      batch_size: the classes solved at a time; memory is of batch_size * K floats.

    Returns:
      `HullDistances(distance [K], lower [K])`; `lower` is 0 where a vector may lie inside the hull.

    Raises:
      ValueError: a code that is not [d, K >= 2], numbers below 1.
      TypeError: a code that is not floating, numbers that are no integers.

    References:
      A. Beck and M. Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse problems,
      SIAM Journal on Imaging Sciences 2(1), 2009, equations (4.1) to (4.3); B. O'Donoghue and E. Candès,
      Adaptive restart for accelerated gradient schemes, Foundations of Computational Mathematics 15, 2015,
      section 3.2 (gradient scheme).

    Example:
      >>> hull_distances(jnp.array([[0.0, 2.0, 1.0], [0.0, 0.0, 3.0]])).distance[2]
      Array(3., dtype=float32)
    """
    w = _check(code)
    for name, value in (("iterations", iterations), ("batch_size", batch_size)):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an int, got {value!r}: type {name}=int(...)") from None
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: type {name}=100")
    num_classes = w.shape[1]
    w = w - jnp.mean(w, axis=1, keepdims=True)  # neither the distances nor the solution change
    narrow = w if w.shape[0] < num_classes else w.T
    largest = jnp.linalg.eigvalsh(jnp.matmul(narrow, narrow.T, precision=_HIGHEST))[-1]
    step = jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, jnp.ones_like(largest)), 0)

    def solve(k: jax.Array) -> HullDistances:
        others = jnp.arange(num_classes) != k
        wk = w[:, k]

        def residual(a: jax.Array) -> jax.Array:
            return wk - jnp.matmul(w, a, precision=_HIGHEST)

        def project(y: jax.Array) -> jax.Array:
            return project_simplex(jnp.where(others, y, jnp.full_like(y, -jnp.inf)))

        def iterate(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            a, y, t = carry
            following = project(y + step * jnp.matmul(residual(y), w, precision=_HIGHEST))
            t_next = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
            moved = following - a
            ahead = following + (t - 1) / t_next * moved
            uphill = jnp.sum((y - following) * moved) > 0
            return (
                following,
                jnp.where(uphill, following, ahead),
                jnp.where(uphill, jnp.ones_like(t), t_next),
            )

        start = others.astype(w.dtype) / (num_classes - 1)
        a, _, _ = jax.lax.fori_loop(0, iterations, iterate, (start, start, jnp.ones((), w.dtype)))
        r = residual(a)
        distance = jnp.sqrt(jnp.sum(r * r))
        separation = jnp.matmul(r, wk[:, None] - w, precision=_HIGHEST)
        separation = jnp.min(jnp.where(others, separation, jnp.full_like(separation, jnp.inf)))
        positive = distance > 0
        lower = jnp.where(positive, separation / jnp.where(positive, distance, jnp.ones_like(distance)), 0)
        return HullDistances(distance, jnp.clip(lower, jnp.zeros_like(distance), distance))

    return jax.lax.map(solve, jnp.arange(num_classes), batch_size=min(batch_size, num_classes))


def one_vs_rest_margins(code: jax.Array, *, iterations: int = 500, batch_size: int = 256) -> jax.Array:
    """The one-vs-rest margin of every class vector, dist(w_k, conv{w_l, l != k}).

    For unit vectors it is K/(K-1) for every vertex of a simplex (the nearest point is the centroid
    -w_k/(K-1) of the others), 1 for any d+2 to 2d of the vectors +-e_i (0 is in every such hull, and nothing
    nearer), and 1 - cos(2 pi / K) for the corners of a regular K-gon, K > 3.

    Args:
      code: W [d, K].
      iterations: like `hull_distances`, which also says how exact they are.
      batch_size: like `hull_distances`.

    Returns:
      The margins [K], float32 (float64 for a float64 code), from above: at least the true ones, to rounding.

    Raises:
      ValueError: a code that is not [d, K >= 2], numbers below 1.
      TypeError: a code that is not floating, numbers that are no integers.

    References:
      J. Jiang et al., Generalized neural collapse for a large number of classes, 2023, arXiv 2310.05351
      (one-vs-rest distance).

    Example:
      >>> one_vs_rest_margins(jnp.array([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]))
      Array([1., 1., 1., 1.], dtype=float32)
    """
    return hull_distances(code, iterations=iterations, batch_size=batch_size).distance


def margin_metrics(code: jax.Array, *, iterations: int = 500, batch_size: int = 256) -> dict[str, jax.Array]:
    """How well class vectors are spread when there are more of them than d + 1, in three scalars.

    Lengths count: for directions alone, divide the columns by their norms first.

    Args:
      code: W [d, K], a fixed code, the weights of a classifier, or class means (transposed).
      iterations: like `hull_distances`.
      batch_size: like `hull_distances`.

    Returns:
      `min_margin` and `mean_margin`, of the one-vs-rest margins; `log_distance_variance`, the variance of
      log ||w_k - w_l|| over the pairs k < l, which is 0 when all pairs are equally far (NaN when two vectors
      are equal).

    Raises:
      ValueError: a code that is not [d, K >= 2], numbers below 1.
      TypeError: a code that is not floating, numbers that are no integers.

    References:
      J. Jiang et al., Generalized neural collapse for a large number of classes, 2023, arXiv 2310.05351.

    Example:
      >>> metrics = margin_metrics(jnp.eye(2))
      >>> {name: round(float(value), 4) for name, value in metrics.items()}
      {'min_margin': 1.4142, 'mean_margin': 1.4142, 'log_distance_variance': 0.0}
    """
    margins = one_vs_rest_margins(code, iterations=iterations, batch_size=batch_size)
    w = _check(code)
    num_classes = w.shape[1]
    # Differences, not the Gram matrix: near vectors must not lose their distance to rounding.
    distances = jax.lax.map(lambda x: jnp.sqrt(jnp.sum((w - x[:, None]) ** 2, axis=0)), w.T)
    pairs = jnp.triu(jnp.ones((num_classes, num_classes), bool), 1)
    logs = jnp.log(jnp.where(pairs, distances, jnp.ones_like(distances)))
    number = num_classes * (num_classes - 1) / 2
    deviations = jnp.where(pairs, logs - jnp.sum(logs) / number, jnp.zeros_like(logs))
    return {
        "min_margin": jnp.min(margins),
        "mean_margin": jnp.mean(margins),
        "log_distance_variance": jnp.sum(deviations**2) / number,
    }
