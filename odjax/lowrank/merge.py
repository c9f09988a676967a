"""Factors into weights and out of them again: merging in float32 with one rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.meta import AxisMetadata
from jax.typing import DTypeLike

from odjax.core import fold_path
from odjax.core.paths import is_box
from odjax.lowrank.adapt import Adapted
from odjax.lowrank.factors import (
    LEAVES,
    column_norms,
    principal_split,
    sizes_of,
    truncated,
    with_scaled_update,
    with_update,
)
from odjax.lowrank.methods import LowRank

Leaves = Mapping[str, Any]


def merge(
    model: Adapted | LowRank, params: Any, *, key: jax.Array | None = None, rank: int | None = None
) -> dict[str, Any]:
    """The parameters of the bare model, with the updates in the weights.

    A weight is W + s A B (`dora`: its columns rescaled), summed in float32 and rounded once to its dtype. In
    bfloat16 an update below half a unit in the last place is lost by rounding to nearest; with a `key` it is
    rounded up or down at random, right on average.

    Args:
      model: the adapted model, or its `spec`.
      params: the parameters of the adapted model.
      key: for stochastic rounding of weights narrower than float32; None rounds to nearest.
      rank: `dylora` only: serve the first so many ranks, scaled by alpha / rank.

    Returns:
      The parameters without the leaves of the method, same structure otherwise (axis names are kept).

    Raises:
      ValueError: nothing in `params` is adapted, leaves do not fit their weight, or a rank for another method
        than `dylora`.

    Source: Hu et al. 2021, "LoRA", section 4.1.

    Example:
      >>> from odjax.lowrank.adapt import adapt
      >>> model = adapt(nn.Dense(4), rank=2)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> sorted(merge(model, params))
      ['bias', 'kernel']
    """
    spec = spec_of(model)
    if rank is not None and spec.method != "dylora":
        raise ValueError(f"rank= serves a part of the ranks of 'dylora', the method is {spec.method!r}")

    def merged(path: str, kernel: jax.Array, leaves: Leaves) -> tuple[jax.Array, Leaves]:
        used, serve = leaves, spec
        if rank is not None:
            used, serve = _served(spec, path, kernel, leaves, rank)
        total = with_update(serve, path, kernel, used)
        return rounded(total, kernel.dtype, None if key is None else fold_path(key, path)), {}

    return map_adapted(merged, params)


def _served(spec: LowRank, path: str, kernel: jax.Array, leaves: Leaves, rank: int) -> tuple[Leaves, LowRank]:
    full = leaves["lora_a"].shape[-1]
    if not 1 <= rank <= full:
        raise ValueError(f"rank must be 1 to {full} for {path!r}, got {rank}")
    batch = len(sizes_of(kernel.shape, leaves).batch)
    a, b = truncated(leaves["lora_a"], leaves["lora_b"], rank, batch)
    # alpha / full becomes alpha / rank.
    return {"lora_a": a * (full / rank), "lora_b": b}, spec


def unmerge(model: Adapted | LowRank, merged: Any, params: Any) -> Any:
    """Takes the updates out of merged weights again: W - s A B in float32, rounded once.

    Keeping the base is better: what merging rounded away does not come back.

    Args:
      model: the adapted model, or its `spec`.
      merged: what `merge` returned.
      params: the parameters of the adapted model; only the factors are read.

    Returns:
      The parameters of the adapted model, with the weights that `merged` stands for.

    Raises:
      ValueError: the method is `dora`, whose rescaling has no inverse in the factors.

    Example:
      >>> from odjax.lowrank.adapt import adapt
      >>> model = adapt(nn.Dense(4), rank=2)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> again = unmerge(model, merge(model, params), params)
      >>> bool(jnp.all(again["kernel"] == params["kernel"]))
      True
    """
    spec = spec_of(model)
    if spec.method == "dora":
        raise ValueError("method 'dora' rescales the merged columns: keep the base parameters to go back")

    def taken(path: str, kernel: jax.Array, leaves: Leaves) -> tuple[jax.Array, Leaves]:
        return with_scaled_update(spec, path, kernel, leaves, -1.0).astype(kernel.dtype), leaves

    return map_adapted(taken, _with_factors(merged, params))


def _with_factors(base: Any, params: Any) -> Any:
    """The base parameters with the leaves of the method that `params` has beside them."""
    if not isinstance(params, Mapping):
        return base
    return {
        name: child if name in LEAVES else _with_factors(base[name], child) for name, child in params.items()
    }


def init_factors(model: Adapted, params: Any, key: jax.Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Parameters of an adapted model from those of the bare one, pretrained ones for example.

    For `pissa` the factors take over the principal part of the weights and the weights become the rest; for
    `dora` the lengths are those of the given weights.

    Args:
      model: the adapted model.
      params: parameters of the bare model.
      key: for the random factors.
      *args: example inputs of the model; only their shapes matter.
      **kwargs: further arguments of the call.

    Returns:
      The parameters with the leaves of the method added; these have axis names if the given ones do.

    Raises:
      ValueError: `where` selects nothing, a rank is too large, or a layer cannot be adapted.

    Example:
      >>> from odjax.lowrank.adapt import adapt
      >>> base = nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> sorted(init_factors(adapt(nn.Dense(4), rank=2), base, jax.random.key(1), jnp.ones((1, 8))))
      ['bias', 'kernel', 'lora_a', 'lora_b']
    """

    def grown(params: Any, key: jax.Array) -> Any:
        variables = {"params": params}
        _, new = model.apply(variables, *args, rngs={"params": key}, mutable=True, **kwargs)
        return new["params"]

    new = jax.jit(grown)(params, key)
    boxed = any(is_box(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_box))
    return start_from(model, new if boxed else nn.unbox(new))


def start_from(model: Adapted | LowRank, params: Any) -> Any:
    """Sets what starts from the weights (`pissa`, lengths of `dora`) after the weights have been replaced.

    Args:
      model: the adapted model, or its `spec`.
      params: the parameters of the adapted model with untrained factors.

    Returns:
      The parameters; unchanged for the other methods.

    Example:
      >>> from odjax.lowrank.adapt import adapt
      >>> model = adapt(nn.Dense(4), rank=2, method="pissa")
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> new = start_from(model, params)
      >>> bool(jnp.allclose(merge(model, new)["kernel"], params["kernel"], atol=1e-6))
      True
    """
    spec = spec_of(model)

    def started(path: str, kernel: jax.Array, leaves: Leaves) -> tuple[jax.Array, Leaves]:
        if spec.method == "pissa":
            return principal_split(spec, path, kernel, leaves)
        lengths = column_norms(kernel, sizes_of(kernel.shape, leaves))
        return kernel, {**leaves, "lora_magnitude": lengths.astype(leaves["lora_magnitude"].dtype)}

    return map_adapted(started, params) if spec.method in ("pissa", "dora") else params


def rounded(x: jax.Array, dtype: DTypeLike, key: jax.Array | None = None) -> jax.Array:
    """One rounding of a sum to the dtype of a weight: to nearest, or at random in proportion.

    Args:
      x: float32 (any float for rounding to nearest).
      dtype: of the result.
      key: for stochastic rounding to bfloat16; a float32 result needs no rounding and ignores it.

    Returns:
      Of dtype `dtype`. Infinities and NaN stay.

    Raises:
      ValueError: stochastic rounding to another narrow dtype than bfloat16.

    Example:
      >>> x = jnp.full((1000,), 1 + 2.0**-9)  # a quarter of the way from 1 to its bfloat16 neighbour
      >>> up = rounded(x, jnp.bfloat16, jax.random.key(0)) > 1
      >>> bool(abs(up.mean() - 0.25) < 0.05)
      True
    """
    dtype = jnp.dtype(dtype)
    if key is None or dtype.itemsize >= 4:
        return x.astype(dtype)
    if dtype != jnp.bfloat16:
        raise ValueError(f"stochastic rounding is to bfloat16, the weight is {dtype}: pass no key")
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # bfloat16 is the upper half of a float32: a carry out of the lower half is the step to the neighbour.
    moved = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), moved, x.astype(jnp.float32)).astype(dtype)


def spec_of(model: Adapted | LowRank) -> LowRank:
    """The method of an adapted model.

    Args:
      model: what `adapt` returned, or a `LowRank`.

    Returns:
      The `LowRank`.

    Raises:
      TypeError: it is neither.
    """
    if isinstance(model, LowRank):
        return model
    if isinstance(model, Adapted):
        return model.spec
    raise TypeError(f"expected the model that odjax.lowrank.adapt returned, got {type(model).__name__}")


def map_adapted(
    fn: Callable[[str, jax.Array, Leaves], tuple[jax.Array, Leaves]], params: Any
) -> dict[str, Any]:
    """Maps a function over the adapted weights of a tree.

    Args:
      fn: `(path of the weight, weight, {name: leaf beside it}) -> (weight, {name: leaf})`; the leaves that it
        does not return are dropped.
      params: nested dictionaries of arrays, with axis names or without.

    Returns:
      New dictionaries; what is not adapted stays.

    Raises:
      ValueError: nothing is adapted.
      TypeError: `params` is no dictionary.
    """
    found = 0

    def walk(tree: Any, path: tuple[str, ...]) -> Any:
        nonlocal found
        if not isinstance(tree, Mapping):
            return tree
        if not any(name in tree for name in LEAVES):
            return {name: walk(child, (*path, name)) for name, child in tree.items()}
        found += 1
        weight = "embedding" if "embedding" in tree else "kernel"
        if weight not in tree:
            raise ValueError(f"{'/'.join(path)!r} has factors but no kernel or embedding beside them")
        leaves = {name: _open(leaf) for name, leaf in tree.items() if name in LEAVES}
        kernel, new = fn("/".join((*path, weight)), _open(tree[weight]), leaves)
        kept = {name: leaf for name, leaf in tree.items() if name not in LEAVES}
        changed = {weight: kernel, **new}
        return {**kept, **{name: _boxed(tree[name], leaf) for name, leaf in changed.items()}}

    if not isinstance(params, Mapping):
        raise TypeError(f"params must be nested dictionaries, got {type(params).__name__}")
    result = walk(params, ())
    if not found:
        raise ValueError(
            "nothing in params is adapted (there is no lora_a or lora_b): pass the parameters of the "
            "adapted model"
        )
    return result


def _open(leaf: Any) -> Any:
    return leaf.unbox(apply_constraint=False) if isinstance(leaf, nn.LogicallyPartitioned) else nn.unbox(leaf)


def _boxed(like: Any, value: Any) -> Any:
    return like.replace_boxed(value) if isinstance(like, AxisMetadata) else value
