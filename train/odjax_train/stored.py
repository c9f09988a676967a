"""A training state as named arrays: what a checkpoint's groups hold, their shapes and their checksums."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from odjax.core import Where, combine, leaves_with_paths, partition
from odjax_train.program import TrainState


def groups_of(state: TrainState, trainable: Where) -> dict[str, dict[str, Any]]:
    """The state in groups that are written apart.

    Args:
        state: arrays or their shapes.
        trainable: which parameters are trained.

    Returns:
        "model", "optimizer" and, where not everything is trained, "frozen": trees with the containers of the
        state.
    """
    free, frozen = partition(state.params, trainable)
    groups = {
        "model": {
            "step": state.step,
            "key": state.key,
            "params": free,
            "collections": state.collections,
            "ema": state.ema,
        },
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }
    return {**groups, "frozen": {"params": frozen}} if jax.tree.leaves(frozen) else groups


def state_of(groups: Mapping[str, Any]) -> TrainState:
    """The inverse of `groups_of`; without the group "optimizer" its state is None."""
    model = groups["model"]
    params = model["params"]
    if "frozen" in groups:
        params = combine(params, groups["frozen"]["params"])
    opt_state = groups["optimizer"]["opt_state"] if "optimizer" in groups else None
    return TrainState(**{**model, "params": params}, opt_state=opt_state)


def stored(tree: Any) -> Any:
    """Random keys as the numbers they are made of."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _implementation(leaf: Any) -> str:
    names = ("threefry2x32", "rbg", "unsafe_rbg")
    return next(name for name in names if jax.random.key(0, impl=name).dtype == leaf.dtype)


def stored_shapes(tree: Any) -> Any:
    """The shapes that `stored` arrays have, in their layout."""

    def stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not _is_key(leaf):
            return leaf
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

    return jax.tree.map(stored, tree)


def nested(tree: Any) -> dict[str, Any]:
    """The tree as nested dictionaries of strings, whatever containers it is made of."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves_with_paths(tree)})


def rebuilt(nested: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `nested`, with the containers of `like`."""
    found = dict(leaves_with_paths(nested))
    leaves = [
        jax.random.wrap_key_data(found[path], impl=_implementation(leaf)) if _is_key(leaf) else found[path]
        for path, leaf in leaves_with_paths(like)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def fingerprints(tree: Any) -> jax.Array:
    """A 32-bit checksum of the bits of every leaf, with their positions; `[leaves]` uint32.

    Every element is mixed with its position before the sum. Sums of integers wrap and commute, so the value
    does not depend on how the leaves are sharded; a change goes unnoticed with a chance of 2^-32.
    """
    return jnp.stack([_fingerprint(leaf) for leaf in jax.tree.leaves(tree)])


def _fingerprint(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_ or leaf.dtype.name in ("int4", "uint4", "int2", "uint2"):
        leaf = leaf.astype(jnp.int8)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(leaf.dtype.itemsize, 4)}").astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size) + index
    mixed = bits ^ (position * jnp.uint32(0x9E3779B1) + jnp.uint32(0x85EBCA6B))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats])) if floats else jnp.array(True)


@jax.jit
def inspect(groups: Mapping[str, Any]) -> tuple[dict[str, jax.Array], jax.Array]:
    """Checksums of every group, and whether all parameters are finite."""
    params = {name: tree for name, tree in groups.items() if name != "optimizer"}
    return {name: fingerprints(tree) for name, tree in groups.items()}, _all_finite(params)


def signature(tree: Any) -> dict[str, list[Any]]:
    """path -> [shape, dtype]."""
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves_with_paths(tree)}
