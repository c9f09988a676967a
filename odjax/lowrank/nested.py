"""Nested ranks: one pair of factors that is a low-rank update at every rank up to its own.

At rank b the update is (alpha / b) A[:, :b] B[:b], whatever the rank R of the arrays. There are two routes to
the same numbers. `at_rank` masks columns and rows and takes a traced rank: one program for all of them.
`slice_rank` cuts them off: one program a rank, with less to compute, to keep and to send.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from odjax.core import Where, leaves_with_paths, map_with_path, partition
from odjax.lowrank.adapt import Adapted
from odjax.lowrank.factors import sizes_of, truncated
from odjax.lowrank.merge import map_adapted, spec_of
from odjax.lowrank.methods import FACTORS, LowRank

NESTED = ("lora", "dylora")
"""Methods whose factors can be read at any rank."""


class RankAxis(NamedTuple):
    """The axis of a factor that counts its ranks, and how many there are."""

    axis: int
    rank: int


def rank_axes(params: Any) -> dict[str, RankAxis]:
    """Where the ranks of the factors are.

    Args:
      params: the parameters of an adapted model, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      path of a factor -> `RankAxis`.

    Raises:
      ValueError: nothing is adapted, or a weight has no two factors.

    Example:
      >>> tree = {"kernel": jnp.ones((6, 4)), "lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}
      >>> rank_axes(tree)
      {'lora_a': RankAxis(axis=1, rank=2), 'lora_b': RankAxis(axis=0, rank=2)}
    """
    found: dict[str, RankAxis] = {}

    def seen(path: str, kernel: Any, leaves: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        if not {"lora_a", "lora_b"} <= set(leaves):
            raise ValueError(
                f"{path!r} has {sorted(leaves)} beside it: nested ranks need lora_a and lora_b, as "
                "adapt(method='lora') makes them"
            )
        batch = len(sizes_of(kernel.shape, leaves).batch)
        folder = path[: len(path) - len(path.rpartition("/")[2])]
        rank = leaves["lora_a"].shape[-1]
        found[f"{folder}lora_a"] = RankAxis(len(leaves["lora_a"].shape) - 1, rank)
        found[f"{folder}lora_b"] = RankAxis(batch, rank)
        return kernel, leaves

    map_adapted(seen, params)
    return found


def rank_mask(params: Any, rank: int | jax.Array, where: Where = FACTORS, *, last: bool = False) -> Any:
    """Which numbers take part at a rank.

    Args:
      params: the parameters of an adapted model, arrays or `jax.ShapeDtypeStruct`.
      rank: b, 1 to the largest rank R; may be traced. Factors of a smaller rank take part as a whole.
      where: what is trained.
      last: only column and row b of the factors take part (DyLoRA's frozen mode), not all up to b.

    Returns:
      The tree of what `where` selects, float32 zeros and ones in the shape of each leaf; leaves that are no
      factors take part as a whole.

    Raises:
      ValueError: a rank outside 1 to R.

    Source: Xu et al. 2024, "DP-DyLoRA", section 4; Valipour et al. 2022, "DyLoRA", section 3.

    Example:
      >>> tree = {"kernel": jnp.ones((1, 1)), "lora_a": jnp.ones((1, 3)), "lora_b": jnp.ones((3, 1))}
      >>> rank_mask(tree, 2)["lora_a"]
      Array([[1., 1., 0.]], dtype=float32)
    """
    axes = rank_axes(params)
    _check_rank(rank, axes)
    return masks_of(axes, partition(params, where)[0], rank, last=last)


def masks_of(axes: Mapping[str, RankAxis], trained: Any, rank: int | jax.Array, *, last: bool = False) -> Any:
    """`rank_mask` from the places of the ranks, for a tree without the weights.

    Args:
      axes: of `rank_axes`.
      trained: what is trained, with holes or without.
      rank: b; may be traced.
      last: see `rank_mask`.

    Returns:
      A tree like `trained`, float32.
    """

    def mask(path: str, leaf: Any) -> jax.Array:
        ones = jnp.ones(leaf.shape, jnp.float32)
        if path not in axes:
            return ones
        axis, full = axes[path]
        at = jnp.arange(full)
        # A factor of a smaller rank has its own last row.
        own = jnp.minimum(rank, full)
        taken = (at == own - 1) if last else (at < own)
        taken = jnp.expand_dims(taken, [i for i in range(len(leaf.shape)) if i != axis])
        return jnp.where(taken, ones, jnp.zeros_like(ones))

    return map_with_path(mask, trained)


def at_rank(model: Adapted | LowRank, params: Any, rank: int | jax.Array) -> Any:
    """The parameters whose update is that of a lower rank: (alpha / b) A[:, :b] B[:b].

    Columns of A and rows of B above the rank are zero and A is multiplied by R / b; the shapes stay, so that
    one program serves all ranks. Gradients of what is above are exactly zero.
    `merge(model, at_rank(model, params, b))` gives the weights to serve.

    Args:
      model: the adapted model, or its `spec`; its method is "lora" or "dylora".
      params: its parameters.
      rank: b, 1 to R; may be traced. Factors of a smaller rank stay as they are.

    Returns:
      The parameters, same structure, shapes and dtypes.

    Raises:
      ValueError: another method, or a rank outside 1 to R.

    Source: Valipour et al. 2022, "DyLoRA", section 3.

    Example:
      >>> tree = {"kernel": jnp.zeros((1, 1)), "lora_a": jnp.ones((1, 4)), "lora_b": jnp.ones((4, 1))}
      >>> at_rank(LowRank(rank=4), tree, 2)["lora_a"]
      Array([[2., 2., 0., 0.]], dtype=float32)
    """
    check_nested(model)
    _check_rank(rank, rank_axes(params))

    def cut(path: str, kernel: Any, leaves: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        full = leaves["lora_a"].shape[-1]
        batch = len(sizes_of(kernel.shape, leaves).batch)
        keep = jnp.minimum(rank, full)
        a, b = truncated(leaves["lora_a"], leaves["lora_b"], keep, batch)
        # alpha / R becomes alpha / b.
        return kernel, {**leaves, "lora_a": a * (full / keep).astype(a.dtype), "lora_b": b}

    return map_adapted(cut, params)


def slice_rank(params: Any, rank: int) -> Any:
    """The parameters cut to a lower rank, for `model_at(model, rank)`.

    Args:
      params: the parameters of an adapted model.
      rank: b, 1 to R, static. Factors of a smaller rank stay as they are.

    Returns:
      The parameters with `lora_a` [..., b] and `lora_b` [batch..., b, ...].

    Raises:
      ValueError: a rank outside 1 to R.

    Example:
      >>> tree = {"kernel": jnp.ones((6, 4)), "lora_a": jnp.ones((6, 8)), "lora_b": jnp.ones((8, 4))}
      >>> small = slice_rank(tree, 3)
      >>> small["lora_a"].shape, small["lora_b"].shape
      ((6, 3), (3, 4))
    """
    _check_rank(rank, rank_axes(params))

    def cut(path: str, kernel: Any, leaves: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        keep = min(rank, leaves["lora_a"].shape[-1])
        batch = len(sizes_of(kernel.shape, leaves).batch)
        return kernel, {
            **leaves,
            "lora_a": leaves["lora_a"][..., :keep],
            "lora_b": jax.lax.slice_in_dim(leaves["lora_b"], 0, keep, axis=batch),
        }

    return map_adapted(cut, params)


def unslice(sliced: Any, params: Any) -> Any:
    """Writes parameters of a lower rank back into those of the full one.

    Args:
      sliced: of `slice_rank`, trained since.
      params: of the full rank.

    Returns:
      `params` with the first columns and rows of the factors, and all other leaves, those of `sliced`; what
      is above the rank stays bit for bit.

    Example:
      >>> tree = {"kernel": jnp.ones((1, 1)), "lora_a": jnp.ones((1, 3)), "lora_b": jnp.ones((3, 1))}
      >>> small = jax.tree.map(lambda x: 0 * x, slice_rank(tree, 2))
      >>> unslice(small, tree)["lora_a"]
      Array([[0., 0., 1.]], dtype=float32)
    """
    axes, new = rank_axes(params), dict(leaves_with_paths(sliced))

    def written(path: str, leaf: jax.Array) -> jax.Array:
        if path not in axes:
            return new[path]
        return jax.lax.dynamic_update_slice_in_dim(leaf, new[path].astype(leaf.dtype), 0, axes[path].axis)

    return map_with_path(written, params)


def padded(sliced: Any, axes: Mapping[str, RankAxis]) -> Any:
    """Factors of a lower rank with zeros up to the full one.

    Args:
      sliced: what is trained of a sliced tree, or a delta of it, with holes or without.
      axes: of the full tree, of `rank_axes`.

    Returns:
      The tree in full shapes.
    """

    def wide(path: str, leaf: jax.Array) -> jax.Array:
        if path not in axes:
            return leaf
        axis, full = axes[path]
        after = [(0, full - leaf.shape[axis] if i == axis else 0) for i in range(leaf.ndim)]
        return jnp.pad(leaf, after)

    return map_with_path(wide, sliced)


def model_at(model: Adapted, rank: int) -> Adapted:
    """The model for parameters that `slice_rank` has cut to a rank, with the scale alpha / b.

    Args:
      model: the adapted model; its method is "lora" or "dylora".
      rank: b, at least 1.

    Returns:
      The model of method "lora". Without an alpha the scale is 1 at rank R, which is alpha = R.

    Raises:
      ValueError: another method, a rank below 1, or `clip_rank` without an alpha, where R is not known.

    Example:
      >>> import flax.linen as nn
      >>> from odjax.lowrank.adapt import adapt
      >>> model_at(adapt(nn.Dense(4), rank=8), 2).spec.alpha
      8.0
    """
    spec = check_nested(model)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    if spec.clip_rank and spec.alpha is None:
        raise ValueError("clip_rank=True without an alpha has no scale at a lower rank: pass adapt(alpha=)")
    alpha, alphas = spec.alpha, spec.alpha_pattern
    if alpha is None:
        alpha = float(spec.rank)
        alphas = (*alphas, *((pattern, float(full)) for pattern, full in spec.rank_pattern))
    return model.clone(
        spec=dataclasses.replace(
            spec,
            method="lora",
            rank=min(rank, spec.rank),
            rank_pattern=tuple((pattern, min(rank, full)) for pattern, full in spec.rank_pattern),
            alpha=alpha,
            alpha_pattern=alphas,
        )
    )


def check_nested(model: Adapted | LowRank) -> LowRank:
    """Makes sure that the factors of a method can be read at any rank.

    Args:
      model: the adapted model, or its `spec`.

    Returns:
      Its `spec`.

    Raises:
      ValueError: they cannot.
    """
    spec = spec_of(model)
    if spec.method not in NESTED:
        raise ValueError(
            f"method {spec.method!r} is of one rank: nested ranks need adapt(method='lora'), with both "
            "factors trained"
        )
    return spec


def _check_rank(rank: int | jax.Array, axes: Mapping[str, RankAxis]) -> None:
    most = max(place.rank for place in axes.values())
    if isinstance(rank, bool) or (isinstance(rank, int) and not 1 <= rank <= most):
        raise ValueError(f"rank must be 1 to {most}, the largest of the factors, got {rank}")
