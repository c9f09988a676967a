"""Percolation: links that end in a dead neuron, or start from one, go too.

Between two sparse layers a neuron without outgoing links has no effect, and one without incoming links is a
constant. Which leaves meet in which neurons is data, a `Wiring`; `wiring_of` writes it for the models here.

Source: Zhang et al. 2024, "Epitopological learning and Cannistraci-Hebb network shape intelligence
brain-inspired theory for ultra-sparse advantage in deep learning" (chain removal, percolation); Zhang et al.
2025, arXiv 2501.19107, appendix (attention and gated layers).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from odjax.core.paths import leaves_with_paths, map_with_path
from odjax.models.bert import Bert
from odjax.models.decoder import Decoder, head_dim
from odjax.models.encoder_decoder import EncoderDecoder
from odjax.models.mlp import MLP
from odjax.models.vit import ViT


class Ends(NamedTuple):
    """One side of the links of a leaf: the neurons that they end in, or start from.

    Attributes:
      path: of the leaf.
      axes: its axes that count the neurons, increasing; the other axes count what they are linked to.
      stacked: its first axes that count layers, each with neurons of its own.
      split: shape in which the neurons are seen, where several make one unit; None: as `axes` have it.
      shared: axes of `split` along which neurons live and die together (query heads that share a key head).
    """

    path: str
    axes: tuple[int, ...]
    stacked: int = 0
    split: tuple[int, ...] | None = None
    shared: tuple[int, ...] = ()


class Junction(NamedTuple):
    """Neurons in which leaves meet. The units of all ends have the same shape.

    A unit lives if its inputs have links (all of them in a product, else one of them) and if one of its
    outputs has; without outputs the inputs decide. The links of a dead unit are dropped on every side.

    Attributes:
      inputs: ends of the links that come in.
      outputs: ends of the links that go out.
      product: whether a neuron is the product of its inputs, so that it needs them all.
    """

    inputs: tuple[Ends, ...]
    outputs: tuple[Ends, ...] = ()
    product: bool = True


Wiring = tuple[Junction, ...]
"""Junctions in the order in which a network computes them."""


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
      >>> masks = {"a": jnp.array([[True, True]]), "b": jnp.array([[True], [False]])}
      >>> percolate(masks, (Junction((Ends("a", (1,)),), (Ends("b", (0,)),)),))["a"]
      Array([[ True, False]], dtype=bool)
    """
    named = _checked(masks, wiring)

    def sweep(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
        for junction in (*reversed(wiring), *wiring):
            units = _live(named, junction)
            for ends in (*junction.inputs, *junction.outputs):
                named = {**named, ends.path: named[ends.path] & _of_leaf(units, ends, named[ends.path].shape)}
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
      >>> masks = {"a": jnp.array([[True, True]]), "b": jnp.array([[True], [False]])}
      >>> live_units(masks, (Junction((Ends("a", (1,)),), (Ends("b", (0,)),)),))
      (Array([ True, False], dtype=bool),)
    """
    named = _checked(masks, wiring)
    return tuple(_live(named, junction) for junction in wiring)


def restrict_wiring(wiring: Wiring, masks: Any) -> Wiring:
    """Leaves out the ends of leaves that have no mask: those are dense, all their neurons have links.

    Args:
      wiring: of the whole model.
      masks: a tree of masks, None or nothing where a leaf is dense.

    Returns:
      The junctions in which something is left to do.

    Example:
      >>> whole = wiring_of(MLP((8, 8, 2)))
      >>> len(whole), len(restrict_wiring(whole, {"dense_0/kernel": 1, "dense_1/kernel": 1}))
      (2, 1)
    """
    there = {path for path, _ in leaves_with_paths(masks)}
    kept = []
    for junction in wiring:
        inputs = tuple(ends for ends in junction.inputs if ends.path in there)
        outputs = tuple(ends for ends in junction.outputs if ends.path in there)
        # In a sum one dense input keeps every neuron fed.
        if not junction.product and len(inputs) < len(junction.inputs):
            inputs = ()
        dense_output = len(outputs) < len(junction.outputs)
        if dense_output:
            outputs = ()
        if len(inputs) + len(outputs) > 1 and inputs:
            kept.append(Junction(inputs, outputs, junction.product))
    return tuple(kept)


def wiring_of(model: MLP | Decoder | EncoderDecoder | ViT | Bert, *, exact: bool = True) -> Wiring:
    """The wiring of a model of `odjax.models`, with a junction wherever neurons lie between two layers.

    | layer      | junction                                                                            |
    |------------|-------------------------------------------------------------------------------------|
    | MLP        | each hidden layer, between its two kernels                                          |
    | mlp        | `up` with `down`; a gated layer as a product: `gate`, `up` and `down`               |
    | attention  | `v` with `o`; the query heads that share a value head are one unit                  |
    | attention  | `q` with `k` as a product, for each dimension of a head                             |

    Never across a residual stream. Without its links a dead unit leaves the model's output as it was, once
    constants of dead neurons are folded into the next bias.

    Args:
      model: the model.
      exact: keep to that. With biases a product without links on one side is not a constant: `q` and `k` are
        then left out and gated layers are no products. Rotary positions mix the two halves of a head, which
        makes a unit of two dimensions, and `q` and `k` that are normalized are left out. False is the rule as
        published: every product, each dimension of a head by itself.

    Returns:
      The wiring, for parameters as the model makes them (scanned or not).

    Raises:
      TypeError: another kind of model.

    Source: Zhang et al. 2025, arXiv 2501.19107, appendix (percolation in Transformers).

    Example:
      >>> from odjax.models.decoder import decoder
      >>> [[ends.path for ends in j.inputs + j.outputs] for j in wiring_of(decoder("tiny"))][-1]
      ['layers/mlp/gate/kernel', 'layers/mlp/up/kernel', 'layers/mlp/down/kernel']
    """
    if isinstance(model, MLP):
        return tuple(
            Junction((Ends(f"dense_{i}/kernel", (1,)),), (Ends(f"dense_{i + 1}/kernel", (0,)),))
            for i in range(len(model.features) - 1)
        )
    if isinstance(model, Decoder):
        stacks = {"": ("attn",)}
        sizes = (model.heads, model.kv_heads or model.heads, head_dim(model))
        gated, bias, rotary, normalized = True, False, True, model.qk_norm
    elif isinstance(model, EncoderDecoder | ViT | Bert):
        stacks = {"": ("attn",)}
        if isinstance(model, EncoderDecoder):
            stacks = {"encoder/": ("attn",), "decoder/": ("attn", "cross")}
        sizes = (model.heads, model.heads, model.width // model.heads)
        gated, bias, rotary, normalized = model.activation == "swiglu", True, False, False
    else:
        raise TypeError(
            "wiring_of knows MLP, Decoder, EncoderDecoder, ViT and Bert, "
            f"got {type(model).__name__}: write its junctions as a tuple of Junction"
        )
    wiring: list[Junction] = []
    for stack, attentions in stacks.items():
        for layer, stacked in _layers(f"{stack}layers", model.layers, model.scan):
            for attention in attentions:
                name = f"{layer}/{attention}"
                if not exact or not (bias or normalized):
                    wiring.append(_queries_and_keys(name, stacked, sizes, pairs=rotary and exact))
                wiring.append(_values(name, stacked, sizes))
            wiring.append(_hidden(f"{layer}/mlp", stacked, gated, product=not (bias and exact)))
    return tuple(wiring)


def _layers(name: str, layers: int, scan: bool) -> list[tuple[str, int]]:
    return [(name, 1)] if scan else [(f"{name}_{i}", 0) for i in range(layers)]


def _queries_and_keys(name: str, stacked: int, sizes: tuple[int, int, int], *, pairs: bool) -> Junction:
    heads, kv_heads, width = sizes
    # Half-split rotary positions turn dimension j of a head together with dimension j + width / 2.
    inner = (2, width // 2) if pairs else (1, width)
    query = Ends(f"{name}/q/kernel", (-2, -1), stacked, (kv_heads, heads // kv_heads, *inner), (1, 2))
    key = Ends(f"{name}/k/kernel", (-2, -1), stacked, (kv_heads, *inner), (1,))
    return Junction((query, key))


def _values(name: str, stacked: int, sizes: tuple[int, int, int]) -> Junction:
    heads, kv_heads, width = sizes
    value = Ends(f"{name}/v/kernel", (-2, -1), stacked)
    out = Ends(f"{name}/o/kernel", (-3, -2), stacked, (kv_heads, heads // kv_heads, width), (1,))
    return Junction((value,), (out,))


def _hidden(name: str, stacked: int, gated: bool, *, product: bool) -> Junction:
    inputs = tuple(
        Ends(f"{name}/{kernel}/kernel", (-1,), stacked) for kernel in (("gate", "up") if gated else ("up",))
    )
    return Junction(inputs, (Ends(f"{name}/down/kernel", (-2,), stacked),), product or not gated)


def _live(named: dict[str, jax.Array], junction: Junction) -> jax.Array:
    inputs = jnp.stack([_linked(named[ends.path], ends) for ends in junction.inputs])
    alive = jnp.all(inputs, axis=0) if junction.product else jnp.any(inputs, axis=0)
    if junction.outputs:
        alive &= jnp.any(jnp.stack([_linked(named[ends.path], ends) for ends in junction.outputs]), axis=0)
    return alive


def _seen(ends: Ends, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the neurons, their shape with the layers', and the same as it is split into units."""
    axes = tuple(axis % len(shape) for axis in ends.axes)
    layers, neurons = shape[: ends.stacked], tuple(shape[axis] for axis in axes)
    return axes, layers + neurons, layers + (neurons if ends.split is None else tuple(ends.split))


def _linked(mask: jax.Array, ends: Ends) -> jax.Array:
    """Which units have links: bool [*layers, *units]."""
    axes, _, split = _seen(ends, mask.shape)
    others = [axis for axis in range(ends.stacked, mask.ndim) if axis not in axes]
    linked = jnp.reshape(jnp.any(mask, axis=others), split)
    return jnp.any(linked, axis=[ends.stacked + axis for axis in ends.shared])


def _of_leaf(units: jax.Array, ends: Ends, shape: tuple[int, ...]) -> jax.Array:
    """Units, bool [*layers, *units], as a mask that broadcasts against the leaf."""
    axes, neurons, split = _seen(ends, shape)
    wide = jnp.expand_dims(units, [ends.stacked + axis for axis in ends.shared])
    flat = jnp.reshape(jnp.broadcast_to(wide, split), neurons)
    others = [axis for axis in range(ends.stacked, len(shape)) if axis not in axes]
    return jnp.expand_dims(flat, others)


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
    for i, junction in enumerate(wiring):
        if not junction.inputs:
            raise ValueError(f"junction {i} of the wiring has no inputs: leave it out")
        sizes: dict[str, tuple[int, ...]] = {}
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
            sizes[ends.path] = _units(ends, mask.shape)
        if len(set(sizes.values())) > 1:
            came = ", ".join(f"{path!r} has {list(size)}" for path, size in sizes.items())
            raise ValueError(f"junction {i} of the wiring joins layers whose units differ: {came}")
    return named


def _units(ends: Ends, shape: tuple[int, ...]) -> tuple[int, ...]:
    n = len(shape)
    inside = all(-n <= axis < n for axis in ends.axes)
    axes = [axis % n for axis in ends.axes] if inside else []
    if not axes or axes != sorted(set(axes)) or axes[0] < ends.stacked or len(axes) + ends.stacked == n:
        raise ValueError(
            f"axes {ends.axes} after {ends.stacked} stacked ones are not the neurons of {ends.path!r} "
            f"{list(shape)}: name them in increasing order and leave one for the links"
        )
    _, neurons, split = _seen(ends, shape)
    if math.prod(neurons) != math.prod(split) or not all(
        0 <= axis < len(split) - ends.stacked for axis in ends.shared
    ):
        raise ValueError(
            f"split {ends.split} with shared axes {ends.shared} is not a view of the "
            f"{list(neurons[ends.stacked :])} neurons of {ends.path!r} {list(shape)}"
        )
    kept = [size for axis, size in enumerate(split[ends.stacked :]) if axis not in ends.shared]
    return (*shape[: ends.stacked], *kept)
