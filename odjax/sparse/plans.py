"""Which leaves are sparse, and how many links each has: integers, worked out on the host.

Counts are exact: a sparsity is taken as the decimal number that was typed (0.9 is nine tenths), a leaf of N
weights has floor(0.9 N) zeros whatever N is. Plans of several parts are joined as dicts,
`{**erk(params, 0.9, where="body/.*"), **uniform(params, where="head/kernel", structure=NM(2, 4))}`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from odjax.core.matrices import (
    DimensionNumbers,
    MatrixView,
    check_patterns,
    from_matrices,
    to_matrices,
    view_of,
)
from odjax.core.paths import NOT_KERNELS, STACKED, Where, is_stacked, leaves_with_paths, select
from odjax.sparse.masks import NM, Structure, unit

PER_HEAD = r"(?:.*/)?(?:q|k|v|query|key|value)/kernel"
"""Kernels into attention heads, for `per_head=`."""


@dataclass(frozen=True)
class LeafPlan:
    """What is planned for one leaf.

    Attributes:
      shape: of the leaf.
      links: of each slice of the batch axes.
      batch_dims: how many axes count separate layers (or heads); the leading ones without a view.
      structure: N:M, blocks, channels or None; on the matrices of the view.
      view: how the leaf is a stack of matrices [inputs, outputs]; None: as it is, which for two axes after
        the batch axes means the same.

    Raises:
      ValueError: a view with another number of batch axes.
    """

    shape: tuple[int, ...]
    links: int
    batch_dims: int = 0
    structure: Structure = None
    view: MatrixView | None = None

    def __post_init__(self) -> None:
        if self.view is not None and len(self.view.batch) != self.batch_dims:
            raise ValueError(f"batch_dims={self.batch_dims} does not count the batch axes of {self.view}")

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of one slice: [inputs, outputs] with a view."""
        if self.view is None:
            return self.shape[self.batch_dims :]
        return tuple(math.prod(self.shape[a] for a in axes) for axes in (self.view.inputs, self.view.outputs))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        axes = range(self.batch_dims) if self.view is None else self.view.batch
        return tuple(self.shape[axis] for axis in axes)

    @property
    def size(self) -> int:
        """Weights of one slice."""
        return math.prod(self.slice_shape)

    @property
    def slices(self) -> int:
        """Separate layers in the leaf."""
        return math.prod(self.batch_shape)

    @property
    def unit(self) -> int:
        """By how many links the number of links of a slice can change."""
        return unit(self.structure, self.slice_shape)

    def graphs(self, x: jax.Array) -> jax.Array:
        """An array of the leaf's shape as [*batch, *slice]."""
        return x if self.view is None else to_matrices(x, self.view)

    def leaf(self, graphs: jax.Array) -> jax.Array:
        """The inverse of `graphs`."""
        return graphs if self.view is None else from_matrices(graphs, self.view, self.shape)


Plan = Mapping[str, LeafPlan]
"""path -> what is planned for the leaf. Leaves that are not named stay dense."""


def _fraction(sparsity: float, name: str = "sparsity") -> Fraction:
    if isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {sparsity!r}: 0.9 keeps a tenth")
    return Fraction(repr(float(sparsity)))


def _view(
    path: str,
    shape: tuple[int, ...],
    numbers: DimensionNumbers,
    per_head: str | None,
    stacked: str | None,
) -> MatrixView | None:
    heads = per_head is not None and re.fullmatch(per_head, path) is not None
    given = callable(numbers) or any(re.fullmatch(pattern, path) for pattern in numbers or {})
    if len(shape) - int(is_stacked(path, stacked)) < 2:
        return None
    try:
        view = view_of(path, shape, numbers, stacked=stacked)
    except ValueError:
        # Without a view a leaf can be sparse all the same; what needs a matrix says so.
        if given or heads:
            raise
        return None
    if not heads:
        return view
    if len(view.outputs) < 2:
        raise ValueError(
            f"per_head={per_head!r} selects {path!r} of shape {shape}, which has no axis of heads: "
            "kernels into heads are [width, heads, head_dim]"
        )
    return MatrixView((*view.batch, view.outputs[0]), view.inputs, view.outputs[1:])


def _chosen(
    params: Any,
    where: Where | None,
    stacked: str | None,
    allow_vectors: bool,
    structure: Structure,
    numbers: DimensionNumbers,
    per_head: str | None,
) -> dict[str, LeafPlan]:
    """The leaves to make sparse, full for now."""
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
        shape = tuple(leaf.shape)
        view = _view(path, shape, numbers, per_head, stacked)
        full = LeafPlan(shape, 0, batch[path] if view is None else len(view.batch), structure, view)
        found[path] = replace(full, links=full.size)
    if per_head is not None and not any(re.fullmatch(per_head, path) for path in found):
        raise ValueError(f"per_head={per_head!r} matches none of the sparse leaves")
    check_patterns(numbers, [path for path, _ in leaves])
    if not found:
        shown = ", ".join(repr(path) for path, _ in leaves[:3]) or "none"
        raise ValueError(f"the plan finds no matrix among the parameters ({shown}): name leaves with where=")
    return found


def _planned(full: LeafPlan, sparsity: Fraction) -> LeafPlan:
    links = full.size - math.floor(sparsity * full.size)
    return replace(full, links=max(full.unit, links // full.unit * full.unit))


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
    dimension_numbers: DimensionNumbers = None,
    per_head: str | None = None,
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
      dimension_numbers: which axes of a leaf are inputs and outputs, as for `odjax.core.view_of`, which knows
        dense, attention and convolution kernels.
      per_head: pattern of kernels into attention heads whose heads are graphs of their own, such as
        `PER_HEAD`: links are then per head.
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
    leaves = _chosen(params, where, stacked, allow_vectors, structure, dimension_numbers, per_head)
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
    return {path: _planned(leaf, settled.get(path, share)) for path, leaf in leaves.items()}


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
    dimension_numbers: DimensionNumbers = None,
    per_head: str | None = None,
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
      dimension_numbers: as in `uniform`.
      per_head: as in `uniform`.

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
    leaves = _chosen(params, where, stacked, False, structure, dimension_numbers, per_head)
    densities = {path: 1 - value for path, value in _fixed(leaves, fixed or {}).items()}
    ratios, weights = {}, {}
    for path, leaf in leaves.items():
        if path in densities:
            continue
        apart = set(range(leaf.batch_dims) if leaf.view is None else leaf.view.batch)
        own = [size for axis, size in enumerate(leaf.shape) if axis not in apart]
        seen = own if kernel_sizes else own[-2:]
        ratio = Fraction(sum(seen), max(1, math.prod(seen)))
        ratios[path] = ratio if power == 1 else Fraction(float(ratio) ** power)
        weights[path] = math.prod(leaf.shape)
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
    return {path: _planned(leaf, 1 - densities[path]) for path, leaf in leaves.items()}


def custom(
    params: Any,
    sparsities: Mapping[str, float],
    *,
    structure: Structure = None,
    stacked: str | None = STACKED,
    dimension_numbers: DimensionNumbers = None,
    per_head: str | None = None,
    allow_vectors: bool = False,
) -> dict[str, LeafPlan]:
    """A sparsity of its own for every pattern.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`.
      sparsities: regular expression for whole paths -> share of zeros in [0, 1).
      structure: blocks, channels or None.
      stacked: paths of leaves whose first axis counts layers.
      dimension_numbers: as in `uniform`.
      per_head: as in `uniform`; every pattern must select such a kernel then.
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
            dimension_numbers=dimension_numbers,
            per_head=per_head,
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
        if not 0 < leaf.links <= leaf.size or leaf.links % leaf.unit:
            raise ValueError(
                f"{path!r} cannot have {leaf.links} links: "
                f"between 1 and {leaf.size} and a multiple of {leaf.unit}"
            )


def matrix_of(leaf: LeafPlan) -> tuple[int, int]:
    """Inputs and outputs of a slice.

    Args:
      leaf: what is planned.

    Returns:
      (inputs, outputs).

    Raises:
      ValueError: it is not known which axes are which.

    Example:
      >>> matrix_of(LeafPlan((3, 4, 5), 6, batch_dims=1))
      (4, 5)
    """
    if len(leaf.slice_shape) != 2:
        raise ValueError(
            f"which axes of a leaf of shape {leaf.shape} are inputs is not known: make the plan with "
            "dimension_numbers={path: MatrixView(batch, inputs, outputs)}"
        )
    n_in, n_out = leaf.slice_shape
    return n_in, n_out


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
    room = leaf.size - leaf.links
    if room == 0 or planned >= 1:
        return jnp.int32(leaf.links)
    low = jnp.float32(planned)
    excess = (jnp.asarray(density, jnp.float32) - low) / (jnp.float32(1) - low)
    more = jnp.floor(jnp.clip(excess, 0, 1) * jnp.float32(room) + jnp.float32(0.5)).astype(jnp.int32)
    more = jnp.where(excess >= 1, jnp.int32(room), jnp.minimum(more, jnp.int32(room)))
    return jnp.int32(leaf.links) + more // jnp.int32(leaf.unit) * jnp.int32(leaf.unit)
