"""Percolation: links that end in a dead neuron, or start from one, go too.

Between two sparse layers a neuron without outgoing links has no effect, and one without incoming links is a
constant. Which leaves meet in which neurons is data, see `odjax.sparse.wiring`.

Source: Zhang et al. 2024, "Epitopological learning and Cannistraci-Hebb network shape intelligence
brain-inspired theory for ultra-sparse advantage in deep learning" (chain removal, percolation); Zhang et al.
2025, arXiv 2501.19107, appendix (attention and gated layers).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from odjax.core.paths import leaves_with_paths, map_with_path
from odjax.sparse.wiring import Junction, Wiring, check_wiring, linked, over_leaf


def percolate(masks: Any, wiring: Wiring) -> Any:
    """Drops the links of dead neurons until there are none left.

    One sweep from the last junction to the first and one back reach the fixed point of a chain of layers. A
    wiring in which a leaf is on several junctions' same side, or in which the inputs of one that has several
    are outputs of others, is swept until nothing changes.

    Args:
      masks: a tree of bool, as the parameters or {path: mask}, with a leaf for every end of the wiring.
        Stacked layers are leading axes.
      wiring: which leaves meet where, see `wiring_of`.

    Returns:
      The masks, with fewer links. Idempotent.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: a path without a mask, axes that the leaf does not have, or ends that do not fit together.

    Source: Zhang et al. 2024, chain removal.

    Example:
      >>> from odjax.sparse.wiring import Ends
      >>> masks = {"a": jnp.array([[True, True]]), "b": jnp.array([[True], [False]])}
      >>> percolate(masks, (Junction((Ends("a", (1,)),), (Ends("b", (0,)),)),))["a"]
      Array([[ True, False]], dtype=bool)
    """
    named = _checked(masks, wiring)

    def sweep(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
        for junction in (*reversed(wiring), *wiring):
            units = _live(named, junction)
            for ends in (*junction.inputs, *junction.outputs):
                named = {
                    **named,
                    ends.path: named[ends.path] & over_leaf(units, ends, named[ends.path].shape),
                }
        return named

    new = sweep(named)
    if not _one_sweep_is_enough(wiring):

        def changed(state: tuple[dict[str, jax.Array], dict[str, jax.Array]]) -> jax.Array:
            return jnp.any(jnp.stack([jnp.any(state[0][path] != state[1][path]) for path in state[0]]))

        new = jax.lax.while_loop(changed, lambda state: (state[1], sweep(state[1])), (named, new))[1]
    return map_with_path(lambda path, mask: new.get(path, mask), masks)


def live_units(masks: Any, wiring: Wiring) -> tuple[jax.Array, ...]:
    """Which units of each junction live: their inputs and their outputs have links.

    The mean of one is its active neuron percolation rate (ANP).

    Args:
      masks: as for `percolate`.
      wiring: as for `percolate`.

    Returns:
      For each junction bool [*stacked, *units].

    Raises:
      TypeError: a mask that is not bool.
      ValueError: as `percolate`.

    Source: Zhang et al. 2024, active neuron post-percolation rate.

    Example:
      >>> from odjax.sparse.wiring import Ends
      >>> masks = {"a": jnp.array([[True, True]]), "b": jnp.array([[True], [False]])}
      >>> live_units(masks, (Junction((Ends("a", (1,)),), (Ends("b", (0,)),)),))
      (Array([ True, False], dtype=bool),)
    """
    named = _checked(masks, wiring)
    return tuple(_live(named, junction) for junction in wiring)


def _live(named: dict[str, jax.Array], junction: Junction) -> jax.Array:
    inputs = jnp.stack([linked(named[ends.path], ends) for ends in junction.inputs])
    alive = jnp.all(inputs, axis=0) if junction.product else jnp.any(inputs, axis=0)
    if junction.outputs:
        alive &= jnp.any(jnp.stack([linked(named[ends.path], ends) for ends in junction.outputs]), axis=0)
    return alive


def _one_sweep_is_enough(wiring: Wiring) -> bool:
    first: dict[str, int] = {}
    for i, junction in enumerate(wiring):
        for ends in junction.outputs:
            if ends.path in first:
                return False
            first[ends.path] = i
    seen: set[str] = set()
    for i, junction in enumerate(wiring):
        for ends in junction.inputs:
            joins = ends.path in first and (len(junction.inputs) > 1 or first[ends.path] >= i)
            if ends.path in seen or joins:
                return False
            seen.add(ends.path)
    return True


def _checked(masks: Any, wiring: Wiring) -> dict[str, jax.Array]:
    """The masks that the wiring names, or an error that says what does not fit."""
    there = dict(leaves_with_paths(masks))
    named: dict[str, jax.Array] = {}
    for junction in wiring:
        for ends in (*junction.inputs, *junction.outputs):
            if ends.path not in there:
                some = ", ".join(map(repr, list(there)[:4])) or "no masks at all"
                raise ValueError(
                    f"the wiring names {ends.path!r}, which has no mask (there are {some}); "
                    "restrict_wiring leaves dense leaves out"
                )
            mask = jnp.asarray(there[ends.path])
            if mask.dtype != jnp.bool_:
                raise TypeError(f"the mask of {ends.path!r} must be bool, got {mask.dtype}: type mask != 0")
            named[ends.path] = mask
    check_wiring(wiring, {path: mask.shape for path, mask in named.items()})
    return named
