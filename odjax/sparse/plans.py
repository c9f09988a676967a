"""Which leaves are sparse, and how many links each has: integers, worked out on the host.

Counts are exact: a sparsity is taken as the decimal number that was typed (0.9 is nine tenths), a leaf of N
weights has floor(0.9 N) zeros whatever N is. Plans of several parts are joined as dicts,
`{**erk(params, 0.9, where="body/.*"), **uniform(params, where="head/kernel", structure=NM(2, 4))}`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from odjax.core.paths import NOT_KERNELS, STACKED, Where, is_stacked, leaves_with_paths, select
from odjax.sparse.masks import NM, Structure, unit


@dataclass(frozen=True)
class LeafPlan:
    """What is planned for one leaf.

    Attributes:
      shape: of the leaf.
      links: of each slice of the batch axes.
      batch_dims: how many leading axes count separate layers.
      structure: N:M, blocks, channels or None.
    """

    shape: tuple[int, ...]
    links: int
    batch_dims: int = 0
    structure: Structure = None

    @property
    def size(self) -> int:
        """Weights of one slice."""
        return math.prod(self.shape[self.batch_dims :])

    @property
    def slices(self) -> int:
        """Separate layers in the leaf."""
        return math.prod(self.shape[: self.batch_dims])


Plan = Mapping[str, LeafPlan]
"""path -> what is planned for the leaf. Leaves that are not named stay dense."""


def _fraction(sparsity: float, name: str = "sparsity") -> Fraction:
    if isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {sparsity!r}: 0.9 keeps a tenth")
    return Fraction(repr(float(sparsity)))


def _chosen(params: Any, where: Where | None, stacked: str | None, allow_vectors: bool) -> dict[str, Any]:
    """path -> (shape, batch_dims) of the leaves to make sparse."""
    leaves = leaves_with_paths(params)
    batch = {path: int(is_stacked(path, stacked)) for path, _ in leaves}
    found = {}
    hits = None if where is None else dict(leaves_with_paths(select(params, where)))
    for path, leaf in leaves:
        rank, floating = len(leaf.shape) - batch[path], jnp.issubdtype(leaf.dtype, jnp.floating)
        if hits is None:
            chosen = rank >= 2 and floating and path.rpartition("/")[2] not in NOT_KERNELS
        else:
            chosen = hits[path]
        if not chosen:
            continue
        if not floating:
            raise ValueError(f"{path!r} is {leaf.dtype} and cannot be sparse: narrow where= to floats")
        if rank < (1 if allow_vectors else 2):
            raise ValueError(
                f"where={where!r} selects {path!r} of shape {tuple(leaf.shape)}, which is no matrix: narrow "
                "where=, or pass allow_vectors=True to make biases and norms sparse too"
            )
        found[path] = (tuple(leaf.shape), batch[path])
    if not found:
        shown = ", ".join(repr(path) for path, _ in leaves[:3]) or "none"
        raise ValueError(f"the plan finds no matrix among the parameters ({shown}): name leaves with where=")
    return found


def _whole_units(links: int, structure: Structure, shape: tuple[int, ...]) -> int:
    step = unit(structure, shape)
    return max(step, links // step * step)


def _links(sparsity: Fraction, structure: Structure, shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    return _whole_units(size - math.floor(sparsity * size), structure, shape)


def _fixed(leaves: Mapping[str, Any], fixed: Mapping[str, float]) -> dict[str, Fraction]:
    settled: dict[str, Fraction] = {}
    for pattern, sparsity in fixed.items():
        value = _fraction(sparsity, f"the sparsity of {pattern!r}")
        for path, hit in leaves_with_paths(select(dict.fromkeys(leaves, 0), pattern)):
            if hit and path in settled:
                raise ValueError(f"{path!r} is given a sparsity by two patterns, the second is {pattern!r}")
            if hit:
                settled[path] = value
    return settled


def uniform(
    params: Any,
    sparsity: float | None = None,
    *,
    where: Where | None = None,
    structure: Structure = None,
    fixed: Mapping[str, float] | None = None,
    stacked: str | None = STACKED,
    allow_vectors: bool = False,
) -> dict[str, LeafPlan]:
    """The same sparsity for every sparse leaf.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`.
      sparsity: share of zeros, in [0, 1); left out for N:M, which sets it.
      where: the leaves; None takes every floating matrix, except those named bias, scale, embedding,
        pos_embedding, positions and cls.
      structure: N:M, blocks, channels or None. The number of links is rounded down to whole blocks.
      fixed: pattern -> sparsity of leaves that get another one.
      stacked: paths of leaves whose first axis counts layers; links are per layer.
      allow_vectors: let `where` select leaves of rank 1 too.

    Returns:
      path -> `LeafPlan`.

    Raises:
      ValueError: a sparsity outside [0, 1), no leaf, a leaf that is no matrix, a shape that groups or blocks
        do not divide, a sparsity beside N:M.

    Example:
      >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}
      >>> {path: leaf.links for path, leaf in uniform(params, 0.9).items()}
      {'kernel': 820}
    """
    leaves = _chosen(params, where, stacked, allow_vectors)
    if isinstance(structure, NM):
        if sparsity is not None or fixed:
            raise ValueError(
                f"{structure.n}:{structure.m} sets the sparsity, "
                f"{1 - structure.n / structure.m:g}: leave out sparsity and fixed"
            )
        share = 1 - Fraction(structure.n, structure.m)
    elif sparsity is None:
        raise ValueError("uniform needs a sparsity, such as 0.9")
    else:
        share = _fraction(sparsity)
    settled = _fixed(leaves, fixed or {})
    return {
        path: LeafPlan(shape, _links(settled.get(path, share), structure, shape[b:]), b, structure)
        for path, (shape, b) in leaves.items()
    }


def erk(
    params: Any,
    sparsity: float,
    *,
    power: float = 1.0,
    kernel_sizes: bool = True,
    where: Where | None = None,
    structure: Structure = None,
    fixed: Mapping[str, float] | None = None,
    stacked: str | None = STACKED,
) -> dict[str, LeafPlan]:
    """Erdős-Rényi-Kernel: density of a leaf proportional to (sum(shape) / prod(shape))^power.

    Small leaves become denser than large ones. A leaf that would have more than all its links is dense, and
    its excess is shared by the others.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`.
      sparsity: overall, of all sparse leaves that are not fixed, above 0 and below 1.
      power: 0 makes all equal, 1 is the paper's.
      kernel_sizes: False looks at the last two axes only (Erdős-Rényi, "ER").
      where: the leaves, as in `uniform`.
      structure: blocks, channels or None. The number of links is rounded down to whole blocks.
      fixed: pattern -> sparsity of leaves outside the budget.
      stacked: paths of leaves whose first axis counts layers, each of which is a leaf of its own here.

    Returns:
      path -> `LeafPlan`. All links together are (1 - sparsity) of all weights, up to one link a leaf.

    Raises:
      ValueError: a sparsity outside (0, 1), which would leave all dense; nothing left to share the budget;
        and as `uniform`.

    Source: Evci et al., Rigging the lottery, arXiv 1911.11134, section 3 (sparsity distribution); ER from
      Mocanu et al., arXiv 1707.04780.

    Example:
      >>> params = {"a": jnp.ones((10, 10)), "b": jnp.ones((100, 100))}
      >>> {path: leaf.links for path, leaf in erk(params, 0.9).items()}
      {'a': 92, 'b': 919}
    """
    share = _fraction(sparsity)
    if isinstance(structure, NM):
        raise ValueError(
            f"{structure.n}:{structure.m} has the same density everywhere: use uniform(params, structure=...)"
        )
    if not share:
        raise ValueError("erk with sparsity 0 leaves every leaf dense: pass a sparsity above 0, such as 0.9")
    if not 0 <= power < math.inf:
        raise ValueError(f"power must be 0 or more, got {power!r}")
    leaves = _chosen(params, where, stacked, allow_vectors=False)
    densities = {path: 1 - value for path, value in _fixed(leaves, fixed or {}).items()}
    ratios, weights = {}, {}
    for path, (shape, batch_dims) in leaves.items():
        if path in densities:
            continue
        own = shape[batch_dims:]
        seen = own if kernel_sizes else own[-2:]
        ratio = Fraction(sum(seen), max(1, math.prod(seen)))
        ratios[path] = ratio if power == 1 else Fraction(float(ratio) ** power)
        weights[path] = math.prod(shape)
    if not ratios:
        raise ValueError("fixed= names every sparse leaf and erk has none left to plan: use uniform")
    budget = (1 - share) * sum(weights.values())
    free = dict(ratios)
    while free:
        epsilon = budget / sum(ratio * weights[path] for path, ratio in free.items())
        largest = max(free.values())
        if epsilon * largest <= 1:
            densities.update({path: epsilon * ratio for path, ratio in free.items()})
            break
        for path in [p for p, ratio in free.items() if ratio == largest]:
            densities[path] = Fraction(1)
            budget -= weights[path]
            del free[path]
    return {
        path: LeafPlan(shape, _links(1 - densities[path], structure, shape[b:]), b, structure)
        for path, (shape, b) in leaves.items()
    }


def custom(
    params: Any,
    sparsities: Mapping[str, float],
    *,
    structure: Structure = None,
    stacked: str | None = STACKED,
    allow_vectors: bool = False,
) -> dict[str, LeafPlan]:
    """A sparsity of its own for every pattern.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`.
      sparsities: regular expression for whole paths -> share of zeros in [0, 1).
      structure: blocks, channels or None.
      stacked: paths of leaves whose first axis counts layers.
      allow_vectors: let the patterns select leaves of rank 1 too.

    Returns:
      path -> `LeafPlan` of the selected leaves.

    Raises:
      ValueError: two patterns select one leaf, one selects none, and as `uniform`.

    Example:
      >>> params = {"a": jnp.ones((10, 10)), "b": jnp.ones((10, 10)), "c": jnp.ones((10, 10))}
      >>> {path: leaf.links for path, leaf in custom(params, {"a": 0.5, "b": 0.95}).items()}
      {'a': 50, 'b': 5}
    """
    plan: dict[str, LeafPlan] = {}
    for pattern, sparsity in sparsities.items():
        part = uniform(
            params,
            sparsity,
            where=pattern,
            structure=structure,
            stacked=stacked,
            allow_vectors=allow_vectors,
        )
        for path in part:
            if path in plan:
                raise ValueError(f"{path!r} is given a sparsity by two patterns, the second is {pattern!r}")
        plan.update(part)
    if not plan:
        raise ValueError("custom needs at least one pattern, such as {'body/.*/kernel': 0.9}")
    return plan


def check_plan(plan: Plan, params: Any) -> None:
    """Makes sure that a plan belongs to a tree of parameters.

    Args:
      plan: path -> `LeafPlan`.
      params: arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: an empty plan, a path that the parameters do not have, another shape, or a number of links
        that the leaf cannot have.
    """
    if not plan:
        raise ValueError("the plan is empty: make one with uniform(params, sparsity)")
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves_with_paths(params)}
    for path, leaf in plan.items():
        if path not in shapes:
            near = difflib.get_close_matches(path, list(shapes), n=3, cutoff=0.0)
            raise ValueError(
                f"the plan names {path!r}, which the parameters do not have: the closest paths are "
                + ", ".join(repr(p) for p in near)
            )
        if shapes[path] != leaf.shape:
            raise ValueError(
                f"the plan has {path!r} with shape {leaf.shape}, the parameters with {shapes[path]}: "
                "make the plan from these parameters"
            )
        step = unit(leaf.structure, leaf.shape[leaf.batch_dims :])
        if not 0 < leaf.links <= leaf.size or leaf.links % step:
            raise ValueError(
                f"{path!r} cannot have {leaf.links} links: between 1 and {leaf.size} and a multiple of {step}"
            )


def overall_density(plan: Plan) -> float:
    """All links over all weights of the sparse leaves.

    Args:
      plan: path -> `LeafPlan`.

    Returns:
      A number in (0, 1].

    Example:
      >>> overall_density({"w": LeafPlan((10, 10), 25)})
      0.25
    """
    return sum(p.links * p.slices for p in plan.values()) / sum(p.size * p.slices for p in plan.values())


def target_links(leaf: LeafPlan, density: jax.Array, planned: float) -> jax.Array:
    """Links of a leaf while the whole plan is at a higher density than it will be.

    n + (N - n) (d - D) / (1 - D), with D the density of the plan: all leaves together then have density d,
    each is at its own target when d = D and full when d = 1. A d below D is D.

    Args:
      leaf: what is planned, n of N links.
      density: float32 [], d.
      planned: D.

    Returns:
      int32 [], a multiple of the leaf's unit.
    """
    step = unit(leaf.structure, leaf.shape[leaf.batch_dims :])
    room = leaf.size - leaf.links
    if room == 0 or planned >= 1:
        return jnp.int32(leaf.links)
    low = jnp.float32(planned)
    excess = (jnp.asarray(density, jnp.float32) - low) / (jnp.float32(1) - low)
    more = jnp.floor(jnp.clip(excess, 0, 1) * jnp.float32(room) + jnp.float32(0.5)).astype(jnp.int32)
    more = jnp.where(excess >= 1, jnp.int32(room), jnp.minimum(more, jnp.int32(room)))
    return jnp.int32(leaf.links) + more // jnp.int32(step) * jnp.int32(step)
