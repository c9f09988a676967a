"""The methods that others are compared with: SET, RigL, MEST, GraNet, GMP, a static mask.

Each is a choice of what to drop, what to grow and how much of it, on the engine of `odjax.sparse.engine`.
Compare them at the same plan, the same number of gradient evaluations and the same dense leaves; GMP and
GraNet start denser and cost more. `end` should be about three quarters of the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import optax

from odjax.sparse.engine import dst
from odjax.sparse.mask_trees import Initial
from odjax.sparse.plans import Plan, overall_density
from odjax.sparse.rewiring import Layer
from odjax.sparse.schedules import Schedule, cosine, cubic


def magnitude(layer: Layer) -> jax.Array:
    """Score |w|: small weights go. See `odjax.sparse.rewiring`."""
    return jnp.abs(layer.w)


def gradient_magnitude(layer: Layer) -> jax.Array:
    """Score |g|: where the loss is steepest, links grow. See `odjax.sparse.rewiring`."""
    return jnp.abs(_gradient(layer))


def uniform_random(layer: Layer) -> jax.Array:
    """Score of 32 random bits: every absent link is as likely as any other. See `odjax.sparse.rewiring`."""
    return jax.random.bits(layer.key, layer.w.shape)


def _gradient(layer: Layer) -> jax.Array:
    if layer.gradient is None:
        raise ValueError(
            "this method looks at gradients, which an Edit does not have: leave out by_edit=True, so that "
            "links change in the update"
        )
    return layer.gradient


def set_(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    zeta: float | Schedule = 0.3,
    interval: int = 100,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Sparse evolutionary training: the smallest weights go, random links come.

    The paper drops a share of the smallest positive and of the largest negative weights apart; here it is the
    smallest by size.

    Args:
      inner: the optimizer.
      plan: which leaves are sparse and how many links each has.
      key: a typed key.
      zeta: share of links that is replaced.
      interval: updates between two changes; an epoch in the paper.
      **options: of `dst`, such as `end` or `masks`.

    Returns:
      A transform with state `DstState`.

    Raises:
      ValueError: as `dst`.

    Source: Mocanu et al., Nature Communications 2018, arXiv 1707.04780.

    Example:
      >>> from odjax.sparse.plans import uniform
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> optimizer = set_(optax.sgd(0.1), uniform(params, 0.75), key=jax.random.key(0), end=750)
      >>> jax.eval_shape(optimizer.init, params).masks["kernel"].shape
      (1, 8)
    """
    return dst(
        inner,
        plan,
        key=key,
        drop=magnitude,
        grow=uniform_random,
        zeta=zeta,
        interval=interval,
        **options,
    )


def rigl(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    end: int,
    zeta: float | Schedule = 0.3,
    interval: int = 100,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Rigging the lottery: the smallest weights go, links with the largest gradients come.

    The share that is replaced falls from zeta to 0 at `end`, as half a cosine. A link that is dropped and has
    the largest gradient comes back with its weight and moments.

    Args:
      inner: the optimizer.
      plan: which leaves are sparse and how many links each has; `erk` is the paper's choice.
      key: a typed key (for the links at the start).
      end: the last update that may change links.
      zeta: share of links that is replaced at the start.
      interval: updates between two changes.
      **options: of `dst`.

    Returns:
      A transform with state `DstState`.

    Raises:
      ValueError: as `dst` and `cosine`.

    Source: Evci et al., ICML 2020, arXiv 1911.11134, algorithm 1.

    Example:
      >>> from odjax.sparse.plans import erk
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> optimizer = rigl(optax.adam(1e-3), erk(params, 0.75), key=jax.random.key(0), end=750)
      >>> optimizer.init(params).masks["kernel"].shape
      (1, 8)
    """
    share = zeta if callable(zeta) else cosine(zeta, end)
    return dst(
        inner,
        plan,
        key=key,
        drop=magnitude,
        grow=gradient_magnitude,
        zeta=share,
        interval=interval,
        end=end,
        **options,
    )


def mest(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    end: int,
    lower: float | Schedule,
    upper: float | Schedule | None = None,
    weight: float = 0.01,
    interval: int = 100,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Memory-economic sparse training: down to one density by |w| + weight |g|, up to another at random.

    "EM": a `lower` that climbs to the density of the plan in stages, such as
    `staged((0.08, 0.09, 0.10), (3000, 4000))` for a plan of 10 %. "EM&S": `lower` at the density of the plan
    and an `upper` that comes down to it, such as `ems(0.10, end)`.

    Args:
      inner: the optimizer.
      plan: which leaves are sparse and how many links each has at the end.
      key: a typed key.
      end: the last update that may change links.
      lower: density that is kept, of all sparse leaves together.
      upper: density after the growth; None is the plan's.
      weight: of the gradient in the drop score (the paper's lambda).
      interval: updates between two changes.
      **options: of `dst`.

    Returns:
      A transform with state `DstState`.

    Raises:
      ValueError: as `dst`; a density that is no share.

    Source: Yuan et al., NeurIPS 2021, arXiv 2110.14032.

    Example:
      >>> from odjax.sparse.plans import uniform
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> optimizer = mest(optax.sgd(0.1), uniform(params, 0.75), key=jax.random.key(0), end=750, lower=0.2)
      >>> jax.eval_shape(optimizer.init, params).masks["kernel"].shape
      (1, 8)
    """
    for name, value in (("lower", lower), ("upper", upper)):
        if isinstance(value, int | float) and not 0 < value <= 1:
            raise ValueError(f"{name} must be a density above 0 and at most 1, got {value!r}")
    planned = jnp.float32(overall_density(plan))
    last = end // interval * interval if interval > 0 else end

    def at(density: float | Schedule | None, step: int | jax.Array) -> jax.Array:
        value = density(step) if callable(density) else density
        return planned if value is None else jnp.asarray(value, jnp.float32)

    def approximate(step: int | jax.Array) -> jax.Array:
        high = jnp.where(jnp.asarray(step) >= last, planned, jnp.maximum(at(upper, step), planned))
        # Rounded up: 1 - 0.2 / 0.25 is below a fifth in float32, and would drop one link too few.
        return jnp.clip(1 - at(lower, step) / high + jnp.float32(1e-6), 0, 1)

    share: Any = approximate
    if upper is None and isinstance(lower, int | float):
        # The floor of E (1 - lower / planned), exactly.
        links = sum(leaf.links * leaf.slices for leaf in plan.values())
        size = sum(leaf.size * leaf.slices for leaf in plan.values())
        share = max(Fraction(0), 1 - Fraction(str(lower)) * size / links)

    def drop(layer: Layer) -> jax.Array:
        return jnp.abs(layer.w) + jnp.asarray(weight, layer.w.dtype) * jnp.abs(_gradient(layer))

    return dst(
        inner,
        plan,
        key=key,
        drop=drop,
        grow=uniform_random,
        zeta=share,
        density=upper,
        interval=interval,
        end=end,
        **options,
    )


def gmp(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    end: int,
    start: int = 0,
    density: float | Schedule = 1.0,
    interval: int = 100,
    skip_step: bool = False,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Gradual magnitude pruning: from dense to the plan, the smallest weights first, and none comes back.

    Args:
      inner: the optimizer.
      plan: which leaves are sparse and how many links each has at the end.
      key: a typed key (used where the start is not dense).
      end: the update at which the plan is reached.
      start: the update up to which nothing is pruned.
      density: at the start, or a schedule of its own.
      interval: updates between two prunings.
      skip_step: leave the optimizer step out where links go.
      **options: of `dst`.

    Returns:
      A transform with state `DstState`.

    Raises:
      ValueError: as `dst` and `cubic`.

    Source: Zhu and Gupta 2017, arXiv 1710.01878.

    Example:
      >>> from odjax.sparse.plans import uniform
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> optimizer = gmp(optax.adam(1e-3), uniform(params, 0.75), key=jax.random.key(0), end=750)
      >>> jax.eval_shape(optimizer.init, params).masks["kernel"].shape
      (1, 8)
    """
    return dst(
        inner,
        plan,
        key=key,
        drop=magnitude,
        grow=None,
        density=_falling(density, plan, start, end),
        interval=interval,
        start=start,
        end=end,
        skip_step=skip_step,
        **options,
    )


def granet(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    end: int,
    start: int = 0,
    density: float | Schedule = 0.5,
    zeta: float | Schedule = 0.5,
    floor: float = 0.005,
    interval: int = 100,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Gradual pruning with neuroregeneration: as `gmp`, and a share of the links is replaced as in `rigl`.

    Magnitudes are compared within a leaf (the paper also compares them over all leaves).

    Args:
      inner: the optimizer.
      plan: which leaves are sparse and how many links each has at the end.
      key: a typed key (for the links at the start).
      end: the update at which the plan is reached; the last that may change links.
      start: the update up to which the density stays.
      density: at the start; 1 starts dense.
      zeta: share of links that is replaced at the start; falls as half a cosine.
      floor: the least share.
      interval: updates between two changes.
      **options: of `dst`.

    Returns:
      A transform with state `DstState`.

    Raises:
      ValueError: as `dst`, `cubic` and `cosine`.

    Source: Liu et al., NeurIPS 2021, arXiv 2106.10404.

    Example:
      >>> from odjax.sparse.plans import uniform
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> optimizer = granet(optax.adam(1e-3), uniform(params, 0.75), key=jax.random.key(0), end=750)
      >>> jax.eval_shape(optimizer.init, params).masks["kernel"].shape
      (1, 8)
    """
    return dst(
        inner,
        plan,
        key=key,
        drop=magnitude,
        grow=gradient_magnitude,
        zeta=zeta if callable(zeta) else cosine(zeta, end, floor=floor),
        density=_falling(density, plan, start, end),
        interval=interval,
        start=start,
        end=end,
        **options,
    )


def _falling(density: float | Schedule, plan: Plan, start: int, end: int) -> Schedule:
    if callable(density):
        return density
    planned = overall_density(plan)
    if density < planned:
        raise ValueError(f"density={density!r} at the start is below the plan's {planned:g}")
    return cubic(density, planned, start, end)


def static(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    masks: Mapping[str, jax.Array] | Initial | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Links that stay where they are: random ones, or those given as `masks` (of `snip_masks`, for example).

    Args:
      inner: the optimizer.
      plan: which leaves are sparse and how many links each has.
      key: a typed key.
      masks: the links, as in `dst`; None draws them uniformly.

    Returns:
      A transform with state `DstState`.

    Raises:
      ValueError: as `dst`.
    """
    return dst(inner, plan, key=key, drop=None, grow=None, masks=masks)
