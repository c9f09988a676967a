"""Cutting dead neurons out of a trained sparse network. Runs on the host.

A neuron between two layers is dead when no link leaves it, or when none reaches it. The first kind has no
effect. The second kind is a constant, which is folded into the bias of the next layer. Both are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from odjax.core.paths import leaves_with_paths, map_with_path
from odjax.sparse.wiring import (
    Ends,
    Junction,
    check_wiring,
    linked,
    over_leaf,
    over_neurons,
)

Leaves = dict[str, np.ndarray]


class Compressed(NamedTuple):
    """A network without its dead neurons.

    Attributes:
      params: the tree that came, with smaller leaves where neurons were cut.
      masks: path -> bool mask, for the kernels of the wiring and all that came with a mask.
      kept: path of the first input of a junction that is cut -> int[*stacked, kept], which of its units
        (along the axis of the cut) are left, in ascending order.
      sizes: name of a cut's size -> how many are left; `compressed_model` makes a model of them.
    """

    params: Any
    masks: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]
    sizes: dict[str, int]


def compress(params: Any, masks: Any, wiring: Sequence[Junction]) -> Compressed:
    """Cuts out the neurons that no link leaves or no link reaches; the outputs of the network stay.

    Cutting a neuron can make others dead; it goes on until none is left. A constant is added in float64 and
    rounded once to the dtype of the bias. A neuron whose constant is not 0 stays where the next layer has no
    bias to take it.

    | part of a model of `odjax.models`      | what goes                                                    |
    |----------------------------------------|--------------------------------------------------------------|
    | hidden layers of an MLP                | every dead neuron                                            |
    | feed-forward layers, plain and gated   | dead neurons, down to one width for all layers               |
    | key and value heads of a `Decoder`     | whole heads with their queries, to one number for all layers |
    | dimensions of a head; heads elsewhere  | the links of dead ones, and their constants; no width        |

    The layers of a stack (and all junctions with one `Cut.size`) keep as many units as the one that needs
    most; elsewhere dead units fill up, whose links are all 0. At least one unit stays. The dimensions of a
    head cannot go: queries, keys and values of all heads share one `head_dim`. In models other than `Decoder`
    the number of heads is fixed by the width.

    The network is that of inference: dropout between two layers sees other neurons. Nothing else may depend
    on the neurons of a junction: no normalisation over them, no skip connection, no other layer that reads
    them.

    Args:
      params: tree of parameters.
      masks: tree of bool masks by the paths of the parameters (or a dict path -> mask; None where a leaf has
        none). Links outside their mask count as 0. A kernel without a mask has all its links.
      wiring: of the whole model (`wiring_of`), in any order.

    Returns:
      The smaller parameters and masks, and which neurons were kept. Leaves are numpy arrays.

    Raises:
      TypeError: a mask that is not bool, or a wiring that does not hold `Junction`.
      ValueError: a path that is no leaf, shapes that do not fit, a leaf that is an input (or an output) of
        two junctions, a cut that leaves no array.

    Example:
      >>> import jax
      >>> from odjax.models.mlp import MLP
      >>> from odjax.sparse.wiring import compressed_model, wiring_of
      >>> params = {
      ...     "dense_0": {"kernel": jnp.ones((1, 3)), "bias": jnp.array([0.0, 2.0, 0.0])},
      ...     "dense_1": {"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(1)},
      ... }
      >>> masks = {"dense_0/kernel": [[True, False, True]], "dense_1/kernel": [[True], [True], [False]]}
      >>> masks = {path: np.array(mask) for path, mask in masks.items()}
      >>> model = MLP((3, 1))
      >>> small = compress(params, masks, wiring_of(model))
      >>> small.kept["dense_0/kernel"], small.params["dense_1"]["bias"]
      (array([0]), array([2.], dtype=float32))
      >>> compressed_model(model, small.sizes).features
      (1, 1)
    """
    leaves, links = _opened(dict(leaves_with_paths(params)), masks, wiring)
    alive = [np.ones(linked(links[j.inputs[0].path], j.inputs[0]).shape, bool) for j in wiring]
    while any(_drop(j, leaves, links, living) for j, living in zip(wiring, alive, strict=True)):
        pass
    kept, sizes = _kept(wiring, alive)
    cuts: dict[tuple[str, int], tuple[int, np.ndarray]] = {}
    for junction in wiring:
        if junction.cut is not None and junction.inputs[0].path in kept:
            _plan_cut(junction, kept[junction.inputs[0].path], leaves, cuts)
    for (path, axis), (stacked, index) in cuts.items():
        leaves[path] = _taken(leaves[path], axis, stacked, index)
        if path in links:
            links[path] = _taken(links[path], axis, stacked, index)
    new = map_with_path(lambda path, leaf: leaves.get(path, np.asarray(leaf)), params)
    return Compressed(new, links, kept, sizes)


def _opened(dense: dict[str, Any], masks: Any, wiring: Sequence[Junction]) -> tuple[Leaves, Leaves]:
    """Copies of all leaves that are wired or masked, with zeros where there are no links; and their links."""
    links: Leaves = {}
    for path, mask in leaves_with_paths(masks):
        if path not in dense:
            raise ValueError(f"there is a mask for {path!r}, which is no leaf of the parameters")
        mask = np.array(mask)
        if mask.dtype != bool:
            raise TypeError(f"the mask of {path!r} must be bool, got {mask.dtype}: unpack it first")
        if mask.shape != np.shape(dense[path]):
            raise ValueError(
                f"the mask of {path!r} has the shape {mask.shape}, the parameter {np.shape(dense[path])}"
            )
        links[path] = mask
    leaves = {path: np.array(dense[path]) for path in links}
    sides: set[tuple[str, str]] = set()
    for junction in wiring:
        if not isinstance(junction, Junction):
            raise TypeError(f"the wiring must hold Junction(inputs, outputs, ...), got {junction!r}")
        follow = () if junction.cut is None else junction.cut.follow
        for ends in (*junction.inputs, *junction.outputs, *follow):
            if ends.path not in dense:
                some = ", ".join(map(repr, list(dense)[:4]))
                raise ValueError(
                    f"the wiring names {ends.path!r}, which is no leaf of the parameters; there are {some}"
                )
            if ends.path not in leaves:
                leaves[ends.path] = np.array(dense[ends.path])
                links[ends.path] = np.ones(leaves[ends.path].shape, bool)
        for role in ("inputs", "outputs"):
            for ends in getattr(junction, role):
                if (role, ends.path) in sides:
                    raise ValueError(
                        f"{ends.path!r} is among the {role} of two junctions: a layer whose neurons lie in "
                        "two places is no chain of layers"
                    )
                sides.add((role, ends.path))
    check_wiring(tuple(wiring), {path: leaf.shape for path, leaf in leaves.items()})
    for junction in wiring:
        follow = () if junction.cut is None else junction.cut.follow
        for ends in (*junction.inputs, *junction.outputs, *follow):
            if ends.bias is not None:
                leaves[ends.bias] = _bias(dense, ends, leaves[ends.path].shape, ends in junction.outputs)
    for path, mask in links.items():
        np.copyto(leaves[path], np.zeros((), leaves[path].dtype), where=~mask)
    return leaves, links


def _bias(dense: dict[str, Any], ends: Ends, shape: tuple[int, ...], output: bool) -> np.ndarray:
    if ends.bias not in dense:
        raise ValueError(
            f"the wiring names the bias {ends.bias!r}, which is no leaf: None where there is none"
        )
    bias = np.array(dense[ends.bias])
    axes = [axis % len(shape) for axis in ends.axes]
    if output:
        wanted = [size for axis, size in enumerate(shape) if axis not in axes]
    else:
        wanted = [*shape[: ends.stacked], *(shape[axis] for axis in range(axes[0], len(shape)))]
    if list(bias.shape) != wanted:
        raise ValueError(
            f"the bias {ends.bias!r} must be {wanted} like the outputs of its kernel, got {list(bias.shape)}"
        )
    return bias


def _drop(junction: Junction, leaves: Leaves, links: Leaves, alive: np.ndarray) -> bool:
    """Takes the links of dead units away and folds their constants; whether a unit died."""
    reached = [linked(links[ends.path], ends) for ends in junction.inputs]
    constant = ~np.any(reached, axis=0)
    if junction.product:
        for ends, fed in zip(junction.inputs, reached, strict=True):
            constant |= ~fed & _without_bias(ends, leaves)
    constant &= alive
    dead = constant.copy()
    if junction.outputs:
        useless = alive & ~np.any([linked(links[ends.path], ends) for ends in junction.outputs], axis=0)
        constant &= ~useless
        dead = useless | constant
    if junction.outputs and constant.any():
        values = np.where(constant, _values(junction, leaves, alive.shape), 0)
        for ends in junction.outputs:
            if ends.bias is None:  # nowhere to put the constant: the unit stays
                stays = (values != 0) & linked(links[ends.path], ends)
                dead &= ~stays
                values[stays] = 0
        for ends in junction.outputs:
            if ends.bias is not None:
                _fold(ends, values, leaves, links)
    for ends in (*junction.inputs, *junction.outputs):
        leaf = leaves[ends.path]
        gone = np.broadcast_to(over_leaf(dead, ends, leaf.shape), leaf.shape)
        np.copyto(leaf, np.zeros((), leaf.dtype), where=gone)
        links[ends.path] &= ~gone
    alive &= ~dead
    return bool(dead.any())


def _without_bias(ends: Ends, leaves: Leaves) -> np.ndarray | bool:
    """Whether a unit without links gets exactly 0."""
    if ends.bias is None:
        return True
    shape = leaves[ends.path].shape
    split = shape[: ends.stacked] + (ends.split or tuple(shape[axis] for axis in ends.axes))
    shared = tuple(ends.stacked + axis for axis in ends.shared)
    return (leaves[ends.bias] == 0).reshape(split).all(axis=shared)


def _values(junction: Junction, leaves: Leaves, units: tuple[int, ...]) -> np.ndarray:
    """What units give whose inputs have no links: float64[*stacked, *units]."""
    inputs = []
    for ends in junction.inputs:
        if ends.shared:
            raise ValueError(
                f"{ends.path!r} has several neurons in a unit of a junction with outputs: leave shared= empty"
            )
        leaf = leaves[ends.path]
        bias = np.zeros(units, leaf.dtype) if ends.bias is None else leaves[ends.bias].reshape(units)
        inputs.append(jnp.asarray(bias))
    combine: Callable[..., Any] = math.prod if junction.product else sum
    given = junction.activation or (lambda *x: combine(x[1:], start=x[0]))
    values = np.asarray(given(*inputs))
    if values.shape != units:
        paths = " and ".join(repr(ends.path) for ends in junction.inputs)
        raise ValueError(
            f"the activation after {paths} must be elementwise, it made {values.shape} of {units}"
        )
    return values.astype(np.float64)


def _fold(ends: Ends, values: np.ndarray, leaves: Leaves, links: Leaves) -> None:
    """Adds what constant units give to the bias of the next layer."""
    leaf, bias = leaves[ends.path], leaves[ends.bias]
    neurons = over_neurons(values, ends, leaf.shape)
    axes = [axis % leaf.ndim for axis in ends.axes]
    rows = np.moveaxis(leaf, axes, range(ends.stacked, ends.stacked + len(axes)))
    for layer in np.ndindex(leaf.shape[: ends.stacked]):
        value = neurons[layer].ravel()
        some = np.flatnonzero(value)
        own = rows[layer].reshape(value.size, -1)[some].astype(np.float64)
        added = (value[some] @ own).reshape(bias[layer].shape)
        bias[layer] = (bias[layer].astype(np.float64) + added).astype(bias.dtype)
        if ends.bias in links:
            links[ends.bias][layer] |= added != 0


def _kept(
    wiring: Sequence[Junction], alive: Sequence[np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Which indices of every cut axis stay, and how many of every size."""
    lives, counts = {}, {}
    for junction, living in zip(wiring, alive, strict=True):
        if junction.cut is None:
            continue
        path, stacked = junction.inputs[0].path, junction.inputs[0].stacked
        others = tuple(axis for axis in range(stacked, living.ndim) if axis != stacked + junction.cut.axis)
        live = lives[path] = living.any(axis=others)
        name = junction.cut.size or path
        most = int(np.count_nonzero(live, axis=-1).max(initial=min(1, live.shape[-1])))
        counts[name] = max(counts.get(name, 0), most)
    kept = {}
    for junction in wiring:
        path = junction.inputs[0].path
        if path in lives:
            count = counts[junction.cut.size or path]
            # The living first, then as many dead ones as it takes.
            kept[path] = np.sort(np.argsort(~lives[path], axis=-1, kind="stable")[..., :count], axis=-1)
    sizes = {j.cut.size for j in wiring if j.cut is not None and j.cut.size is not None}
    return kept, {name: counts[name] for name in sorted(sizes)}


def _plan_cut(
    junction: Junction, index: np.ndarray, leaves: Leaves, cuts: dict[tuple[str, int], tuple[int, np.ndarray]]
) -> None:
    """Notes for every leaf of a junction, and every bias, which indices of which axis stay."""
    cut, first = junction.cut, junction.inputs[0]
    stacked, units = first.stacked, linked(np.empty(leaves[first.path].shape, bool), first).shape
    stays = np.zeros((*index.shape[:-1], units[stacked + cut.axis]), bool)
    np.put_along_axis(stays, index, True, axis=-1)
    others = tuple(stacked + axis for axis in range(len(units) - stacked) if axis != cut.axis)
    whole = np.broadcast_to(np.expand_dims(stays, others), units)
    sides = [(ends, whole) for ends in (*junction.inputs, *junction.outputs)]
    for ends, living in sides + [(ends, stays) for ends in cut.follow]:
        shape = leaves[ends.path].shape
        neurons = over_neurons(living, ends, shape)
        for axis, along in zip(ends.axes, _each_axis(neurons, ends), strict=True):
            axis, left = axis % len(shape), np.count_nonzero(along, axis=-1).max()
            if left == shape[axis]:
                continue
            places = [(ends.path, axis)]
            if ends.bias is not None and ends not in junction.outputs:
                places.append((ends.bias, leaves[ends.bias].ndim + axis - len(shape)))
            where = np.argsort(~along, axis=-1, kind="stable")[..., :left]
            for place in places:
                if place in cuts:
                    raise ValueError(f"two junctions cut axis {place[1]} of {place[0]!r}: one cut is None")
                cuts[place] = (ends.stacked, where)


def _each_axis(neurons: np.ndarray, ends: Ends) -> list[np.ndarray]:
    """Which indices of each axis of the neurons stay: bool[*stacked, size] an axis."""
    count = len(ends.axes)
    rest = [tuple(ends.stacked + j for j in range(count) if j != i) for i in range(count)]
    along = [neurons.any(axis=axes) for axes in rest]
    block = np.ones_like(neurons)
    for stays, axes in zip(along, rest, strict=True):
        block &= np.expand_dims(stays, axes)
    if (block != neurons).any():
        raise ValueError(f"the neurons that stay of {ends.path!r} are no whole indices of axes {ends.axes}")
    return along


def _taken(x: np.ndarray, axis: int, stacked: int, index: np.ndarray) -> np.ndarray:
    """The indices that stay of one axis, each layer its own."""
    shape = [1] * x.ndim
    shape[:stacked], shape[axis] = index.shape[:-1], index.shape[-1]
    return np.take_along_axis(x, index.reshape(shape), axis=axis)
