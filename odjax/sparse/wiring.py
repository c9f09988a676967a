"""The neurons between the layers of a network, as data: which leaves meet in them, and what they compute.

Two readers: `percolate` drops the links of dead neurons, `compress` cuts dead neurons out. `wiring_of` writes
the wiring of the models here.

Source: Zhang et al. 2025, arXiv 2501.19107, appendix (attention and gated layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from odjax.core.paths import leaves_with_paths
from odjax.models.bert import Bert
from odjax.models.decoder import Decoder, head_dim
from odjax.models.encoder_decoder import EncoderDecoder
from odjax.models.feedforward import activation_named
from odjax.models.mlp import MLP
from odjax.models.vit import ViT

Array = np.ndarray | jax.Array
Model = MLP | Decoder | EncoderDecoder | ViT | Bert


class Ends(NamedTuple):
    """One side of the links of a leaf: the neurons that they end in, or start from.

    Attributes:
      path: of the leaf.
      axes: its axes that count the neurons, increasing; the other axes count what they are linked to.
      stacked: its first axes that count layers, each with neurons of its own.
      split: shape in which the neurons are seen, where several make one unit; None: as `axes` have it.
      shared: axes of `split` along which neurons live and die together (query heads that share a key head).
      bias: path of what is added to the products of the leaf, of the shape of its outputs; None: nothing.
    """

    path: str
    axes: tuple[int, ...]
    stacked: int = 0
    split: tuple[int, ...] | None = None
    shared: tuple[int, ...] = ()
    bias: str | None = None


class Cut(NamedTuple):
    """How the units of a junction can be cut out of the model.

    Attributes:
      axis: of the units, after the stacked axes: an index goes where all of its units are dead.
      follow: ends of further leaves that count along the same axis and lose the same indices.
      size: junctions with the same name here keep equally many, as a model with one width for all needs it;
        `compressed_model` reads it. None: each for itself.
    """

    axis: int = 0
    follow: tuple[Ends, ...] = ()
    size: str | None = None


class Junction(NamedTuple):
    """Neurons in which leaves meet. The units of all ends have the same shape.

    A unit lives if its inputs have links (all of them in a product, else one of them) and if one of its
    outputs has; without outputs the inputs decide. The links of a dead unit are dropped on every side.

    Attributes:
      inputs: ends of the links that come in.
      outputs: ends of the links that go out.
      product: whether a neuron is 0 as soon as one of its inputs is, so that it needs them all.
      activation: value of a neuron, elementwise of what the inputs give it; None: their product or sum.
      cut: how `compress` cuts dead units out; None: their links go, their width stays.
    """

    inputs: tuple[Ends, ...]
    outputs: tuple[Ends, ...] = ()
    product: bool = True
    activation: Callable[..., jax.Array] | None = None
    cut: Cut | None = None


Wiring = tuple[Junction, ...]
"""Junctions in the order in which a network computes them."""


def _seen(ends: Ends, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of the neurons, their shape with the layers', and the same as it is split into units."""
    axes = tuple(axis % len(shape) for axis in ends.axes)
    layers, neurons = shape[: ends.stacked], tuple(shape[axis] for axis in axes)
    return axes, layers + neurons, layers + (neurons if ends.split is None else tuple(ends.split))


def linked(mask: Array, ends: Ends) -> Array:
    """Which units have links.

    Args:
      mask: bool, of the leaf.
      ends: of the leaf.

    Returns:
      bool [*stacked, *units].

    Example:
      >>> linked(np.eye(2, 3, dtype=bool), Ends("kernel", (1,)))
      array([ True,  True, False])
    """
    axes, _, split = _seen(ends, mask.shape)
    others = tuple(axis for axis in range(ends.stacked, mask.ndim) if axis not in axes)
    return mask.any(axis=others).reshape(split).any(axis=tuple(ends.stacked + axis for axis in ends.shared))


def over_neurons(units: Array, ends: Ends, shape: tuple[int, ...]) -> Array:
    """The value of each neuron's unit.

    Args:
      units: [*stacked, *units].
      ends: of the leaf.
      shape: of the leaf.

    Returns:
      [*stacked, *neurons].

    Example:
      >>> over_neurons(np.array([1, 2]), Ends("o", (0,), 0, (2, 2), (1,)), (4, 8))
      array([1, 1, 2, 2])
    """
    _, neurons, split = _seen(ends, shape)
    xp = units.__array_namespace__()
    wide = xp.expand_dims(units, axis=tuple(ends.stacked + axis for axis in ends.shared))
    return xp.broadcast_to(wide, split).reshape(neurons)


def over_leaf(units: Array, ends: Ends, shape: tuple[int, ...]) -> Array:
    """The value of each neuron's unit, so that it broadcasts against the leaf.

    Args:
      units: [*stacked, *units].
      ends: of the leaf.
      shape: of the leaf.

    Returns:
      [*stacked, ...], with 1 on the axes that do not count neurons.

    Example:
      >>> over_leaf(np.array([1, 2]), Ends("o", (0,), 0, (2, 2), (1,)), (4, 8)).shape
      (4, 1)
    """
    axes = _seen(ends, shape)[0]
    others = tuple(axis for axis in range(ends.stacked, len(shape)) if axis not in axes)
    flat = over_neurons(units, ends, shape)
    return flat.__array_namespace__().expand_dims(flat, axis=others)


def check_wiring(wiring: Wiring, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Makes sure that a wiring fits its leaves.

    Args:
      wiring: the junctions.
      shapes: of every leaf that it names.

    Raises:
      ValueError: a junction without inputs, axes that a leaf does not have, ends that do not fit together.
    """
    for i, junction in enumerate(wiring):
        if not junction.inputs:
            raise ValueError(f"junction {i} of the wiring has no inputs: leave it out")
        sizes = {e.path: _units(e, shapes[e.path]) for e in (*junction.inputs, *junction.outputs)}
        if len(set(sizes.values())) > 1:
            came = ", ".join(f"{path!r} has {list(size)}" for path, size in sizes.items())
            raise ValueError(f"junction {i} of the wiring joins layers whose units differ: {came}")
        if junction.cut is None:
            continue
        units, stacked = next(iter(sizes.values())), junction.inputs[0].stacked
        if not 0 <= junction.cut.axis < len(units) - stacked:
            raise ValueError(f"junction {i} cuts axis {junction.cut.axis} of units {list(units[stacked:])}")
        wanted = (*units[:stacked], units[stacked + junction.cut.axis])
        for ends in junction.cut.follow:
            if ends.path in shapes and (came := _units(ends, shapes[ends.path])) != wanted:
                raise ValueError(
                    f"junction {i} cuts {list(wanted)} units, {ends.path!r} cannot follow with {list(came)}"
                )


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


def restrict_wiring(wiring: Wiring, masks: Any) -> Wiring:
    """Leaves out the ends of leaves that have no mask: those are dense, all their neurons have links.

    For `percolate`. `compress` takes the whole wiring, and nothing is cut by a part of it.

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
            kept.append(junction._replace(inputs=inputs, outputs=outputs, cut=None))
    return tuple(kept)


def wiring_of(model: Model, *, exact: bool = True) -> Wiring:
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
        return tuple(_dense(i, model.activation) for i in range(len(model.features) - 1))
    if isinstance(model, Decoder):
        stacks = {"": ("attn",)}
        sizes = (model.heads, model.kv_heads or model.heads, head_dim(model))
        gated, activation, bias, normalized = True, "silu", False, model.qk_norm
    elif isinstance(model, EncoderDecoder | ViT | Bert):
        stacks = {"": ("attn",)}
        if isinstance(model, EncoderDecoder):
            stacks = {"encoder/": ("attn",), "decoder/": ("attn", "cross")}
        sizes = (model.heads, model.heads, model.width // model.heads)
        gated, activation, bias, normalized = model.activation == "swiglu", model.activation, True, False
    else:
        raise TypeError(
            "wiring_of knows MLP, Decoder, EncoderDecoder, ViT and Bert, "
            f"got {type(model).__name__}: write its junctions as a tuple of Junction"
        )
    # Only it has rotary positions, and heads whose number is not tied to their width.
    decoder = isinstance(model, Decoder)
    wiring: list[Junction] = []
    for stack, attentions in stacks.items():
        for layer, stacked in _layers(f"{stack}layers", model.layers, model.scan):
            for attention in attentions:
                name = f"{layer}/{attention}"
                if not exact or not (bias or normalized):
                    wiring.append(_queries_and_keys(name, stacked, sizes, bias, pairs=decoder and exact))
                wiring.append(_values(name, stacked, sizes, bias, cut=decoder))
            product = not (bias and exact)
            wiring.append(_hidden(f"{layer}/mlp", stacked, gated, activation, bias, product=product))
    return tuple(wiring)


def compressed_model(model: Model, sizes: Mapping[str, int]) -> Model:
    """The model that takes the parameters of `compress`.

    Args:
      model: the model whose parameters were compressed.
      sizes: `Compressed.sizes`.

    Returns:
      The model with narrower hidden layers, and fewer heads where whole heads went.

    Raises:
      ValueError: a size that `wiring_of` does not give to this kind of model.

    Example:
      >>> compressed_model(MLP((8, 8, 2)), {"features/0": 3}).features
      (3, 8, 2)
    """
    if isinstance(model, MLP):
        known = {f"features/{i}" for i in range(len(model.features) - 1)}
    else:
        known = {"mlp_width", "kv_heads"} if isinstance(model, Decoder) else {"mlp_width"}
    if set(sizes) - known:
        raise ValueError(
            f"a {type(model).__name__} has the sizes {', '.join(sorted(known))}, got "
            f"{', '.join(sorted(sizes))}: compress with the wiring of this model"
        )
    if isinstance(model, MLP):
        widths = tuple(sizes.get(f"features/{i}", width) for i, width in enumerate(model.features))
        return model.clone(features=widths)
    changes = dict(sizes)
    if "kv_heads" in sizes:
        group = model.heads // (model.kv_heads or model.heads)
        changes |= {"heads": group * sizes["kv_heads"], "head_dim": head_dim(model)}
    return model.clone(**changes)


def _layers(name: str, layers: int, scan: bool) -> list[tuple[str, int]]:
    return [(name, 1)] if scan else [(f"{name}_{i}", 0) for i in range(layers)]


def _ends(
    layer: str,
    bias: bool,
    axes: tuple[int, ...],
    stacked: int = 0,
    split: tuple[int, ...] | None = None,
    shared: tuple[int, ...] = (),
) -> Ends:
    return Ends(f"{layer}/kernel", axes, stacked, split, shared, f"{layer}/bias" if bias else None)


def _dense(i: int, activation: str) -> Junction:
    return Junction(
        (_ends(f"dense_{i}", True, (1,)),),
        (_ends(f"dense_{i + 1}", True, (0,)),),
        activation=activation_named(activation),
        cut=Cut(size=f"features/{i}"),
    )


def _queries_and_keys(
    name: str, stacked: int, sizes: tuple[int, int, int], bias: bool, *, pairs: bool
) -> Junction:
    heads, kv_heads, width = sizes
    # Half-split rotary positions turn dimension j of a head together with dimension j + width / 2.
    inner = (2, width // 2) if pairs else (1, width)
    split = (kv_heads, heads // kv_heads, *inner)
    query = _ends(f"{name}/q", bias, (-2, -1), stacked, split, (1, 2))
    return Junction((query, _ends(f"{name}/k", bias, (-2, -1), stacked, (kv_heads, *inner), (1,))))


def _values(name: str, stacked: int, sizes: tuple[int, int, int], bias: bool, *, cut: bool) -> Junction:
    heads, kv_heads, width = sizes
    group = heads // kv_heads
    value = _ends(f"{name}/v", bias, (-2, -1), stacked)
    out = _ends(f"{name}/o", bias, (-3, -2), stacked, (kv_heads, group, width), (1,))
    query = _ends(f"{name}/q", bias, (-2,), stacked, (kv_heads, group), (1,))
    follow = (query, _ends(f"{name}/k", bias, (-2,), stacked))
    # The weights of attention sum to one: a constant value comes out as it went in.
    return Junction((value,), (out,), cut=Cut(follow=follow, size="kv_heads") if cut else None)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _hidden(name: str, stacked: int, gated: bool, activation: str, bias: bool, *, product: bool) -> Junction:
    kernels = ("gate", "up") if gated else ("up",)
    return Junction(
        tuple(_ends(f"{name}/{kernel}", bias, (-1,), stacked) for kernel in kernels),
        (_ends(f"{name}/down", bias, (-2,), stacked),),
        product or not gated,
        _swiglu if gated else activation_named(activation),
        Cut(size="mlp_width"),
    )
