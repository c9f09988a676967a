"""Names of PyTorch's tensors and of Flax's parameters, as data, both ways.

A `PathMap` is a list of pairs of module names, "model.layers.{i}.self_attn.{p:q|k|v}_proj" and
"layers[i]/attn/{p}", each with the layout of its tensors. A name in braces stands for the same text on both
sides, without a dot or slash or one of the choices given. `layers[i]` is layer i of a stack: a slice of
`layers/...` where the layers are scanned, `layers_3/...` where they are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from odjax.core import Where
from odjax.core.paths import leaves_with_paths
from odjax.io.places import KINDS, Pair, Place, from_torch, holes, in_flax, in_torch, to_torch, torch_shape

__all__ = [
    "LLAMA",
    "Pair",
    "PathMap",
    "Place",
    "places_of_leaf",
    "places_of_module",
    "places_of_tensor",
    "tensor_of",
    "to_params",
    "to_tensors",
    "under",
]


@dataclass(frozen=True)
class PathMap:
    """Pairs of PyTorch and Flax modules.

    Attributes:
      pairs: see `Pair`; every name must fit one of them alone.
      ignore: regular expressions of the PyTorch tensors that have no place in Flax, buffers for example.

    Raises:
      ValueError: a kind that does not exist, placeholders that differ between the two names, or more than one
        stack in a path.

    Example:
      >>> names = PathMap((Pair("encoder.{i}.proj", "layers[i]/proj"),))
      >>> names.pairs[0].kind
      'linear'
    """

    pairs: tuple[Pair, ...]
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pair in self.pairs:
            if pair.kind not in KINDS:
                raise ValueError(
                    f"kind of {pair.torch!r} must be one of {', '.join(KINDS)}, got {pair.kind!r}"
                )
            torch, flax = holes(pair.torch), holes(pair.flax)
            if sorted(torch) != sorted(flax) or len(set(torch)) < len(torch):
                raise ValueError(
                    f"{pair.torch!r} and {pair.flax!r} must have the same placeholders, each once: "
                    f"{sorted(torch)} and {sorted(flax)}"
                )
            if len(re.findall(r"\[", pair.flax)) > 1:
                raise ValueError(f"{pair.flax!r} has more than one stack, write {{i}} for the outer one")


LLAMA = PathMap(
    (
        Pair("model.embed_tokens", "embed", "embedding"),
        Pair("model.layers.{i}.input_layernorm", "layers[i]/attn_norm", "norm"),
        Pair("model.layers.{i}.self_attn.{p:q|k|v}_proj", "layers[i]/attn/{p}"),
        Pair("model.layers.{i}.self_attn.o_proj", "layers[i]/attn/o", inputs=2),
        Pair("model.layers.{i}.self_attn.{p:q|k}_norm", "layers[i]/attn/{p}_norm", "norm"),
        Pair("model.layers.{i}.post_attention_layernorm", "layers[i]/mlp_norm", "norm"),
        Pair("model.layers.{i}.mlp.{p:gate|up|down}_proj", "layers[i]/mlp/{p}"),
        Pair("model.norm", "norm", "norm"),
        Pair("lm_head", "lm_head"),
    ),
    ignore=(r".*\.rotary_emb\.inv_freq",),
)
"""Names of LlamaForCausalLM (so of Mistral and Qwen3 too) and of `odjax.models.Decoder`."""


def under(names: PathMap, prefix: str) -> PathMap:
    """The same map for a model that is a part of a larger PyTorch model.

    Args:
      names: the map.
      prefix: what the larger model's names start with, "bert." for example.

    Returns:
      The map for the longer names.

    Example:
      >>> under(PathMap((Pair("pooler.dense", "pooler"),)), "bert.").pairs[0].torch
      'bert.pooler.dense'
    """
    return PathMap(
        tuple(pair._replace(torch=prefix + pair.torch) for pair in names.pairs),
        tuple(re.escape(prefix) + pattern for pattern in names.ignore),
    )


def to_params(tensors: Mapping[str, Any], names: PathMap, like: Any, *, keep: Where | None = None) -> Any:
    """Parameters of a Flax model from the tensors of a PyTorch model; the inverse of `to_tensors`.

    Values and dtypes stay as they are; only axes move.

    Args:
      tensors: name -> array.
      names: the map.
      like: the parameters, or `jax.ShapeDtypeStruct` of them, with axis names or without.
      keep: which leaves of `like` may have no tensor and stay as they are; a pattern of a path or a
        predicate `(path, leaf) -> bool`.

    Returns:
      The structure of `like` with numpy arrays as leaves; views of the given ones where the layout allows it.

    Raises:
      ValueError: tensors without a place, places without a tensor, two tensors for a place, or shapes that do
        not fit; all of them are listed.

    Example:
      >>> names = PathMap((Pair("fc", "dense"),))
      >>> like = {"dense": {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}}
      >>> to_params({"fc.weight": np.ones((2, 3))}, names, like)["dense"]["kernel"].shape
      (3, 2)
    """
    leaves = leaves_with_paths(like)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    faults: list[str] = []
    found: dict[str, dict[int | None, tuple[str, np.ndarray]]] = {}
    for name, tensor in tensors.items():
        places = [place for place in places_of_tensor(names, name) if place.flax in shapes]
        if not places:
            if not any(re.fullmatch(pattern, name) for pattern in names.ignore):
                faults.append(f"{name} {list(tensor.shape)} has no place")
            continue
        if len(places) > 1:
            faults.append(f"{name} has the places {', '.join(place.flax for place in places)}")
            continue
        place = places[0]
        shape = shapes[place.flax] if place.index is None else shapes[place.flax][1:]
        value = from_torch(place, np.asarray(tensor), shape)
        if value is None:
            layer = "" if place.index is None else f" layer {place.index}"
            faults.append(
                f"{name} {list(tensor.shape)} does not fit {place.flax}{layer} {list(shape)}, that is "
                f"{list(torch_shape(place, shape))} in PyTorch"
            )
            continue
        if place.index in found.setdefault(place.flax, {}):
            faults.append(f"{name} and {found[place.flax][place.index][0]} are both for {place.flax}")
        found[place.flax][place.index] = name, value
    if faults:
        raise ValueError("the tensors do not fit the parameters: " + "; ".join(faults))
    result = []
    for path, leaf in leaves:
        parts = found.get(path, {})
        if not parts:
            if not _kept(keep, path, leaf):
                faults.append(path)
            result.append(leaf)
        elif None in parts:
            result.append(parts[None][1])
        elif sorted(parts, key=int) != list(range(shapes[path][0])):
            missing = sorted(set(range(shapes[path][0])) - set(parts), key=int)
            extra = sorted(set(parts) - set(range(shapes[path][0])), key=int)
            faults.append(f"{path} (layers {missing} missing, {extra} too many)")
            result.append(leaf)
        else:
            result.append(np.stack([parts[i][1] for i in range(shapes[path][0])]))
    if faults:
        raise ValueError("no tensor for: " + "; ".join(faults))
    return jax.tree.structure(like).unflatten(result)


def _kept(keep: Where | None, path: str, leaf: Any) -> bool:
    if keep is None:
        return False
    return bool(keep(path, leaf)) if callable(keep) else re.fullmatch(keep, path) is not None


def to_tensors(params: Any, names: PathMap) -> dict[str, np.ndarray]:
    """Tensors of a PyTorch model from the parameters of a Flax model; the inverse of `to_params`.

    Args:
      params: the parameters, with axis names or without.
      names: the map.

    Returns:
      name -> array in PyTorch's layout, dtypes as they are; views where the layout allows it.

    Raises:
      ValueError: leaves that the map does not know; all of them are listed.

    Example:
      >>> names = PathMap((Pair("fc", "dense"),))
      >>> to_tensors({"dense": {"kernel": np.ones((3, 2))}}, names)["fc.weight"].shape
      (2, 3)
    """
    tensors: dict[str, np.ndarray] = {}
    faults = []
    for path, leaf in leaves_with_paths(params):
        value = np.asarray(leaf)
        places = places_of_leaf(names, path, value.shape)
        if not places:
            faults.append(f"{path} {list(value.shape)} has no name")
        for place in places:
            if place.torch in tensors:
                faults.append(f"{path} has a name that is taken, {place.torch}")
            tensors[place.torch] = to_torch(place, value if place.index is None else value[place.index])
    if faults:
        raise ValueError("the map does not know the parameters: " + "; ".join(faults))
    return tensors


def places_of_leaf(names: PathMap, path: str, shape: tuple[int, ...]) -> list[Place]:
    """Where the tensors of a leaf are in the PyTorch model.

    Args:
      names: the map.
      path: of the leaf.
      shape: of the leaf; its first size is the number of layers where the path is that of a scanned stack.

    Returns:
      One place a layer for a scanned stack, one otherwise; none where the map does not know the path.

    Raises:
      ValueError: two pairs fit the path.

    Example:
      >>> [place.torch for place in places_of_leaf(LLAMA, "layers/attn/q/kernel", (2, 8, 2, 4))]
      ['model.layers.0.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight']
    """
    found: list[Place] = []
    for pair in names.pairs:
        for torch_end, flax_end in KINDS[pair.kind]:
            if not path.endswith(flax_end):
                continue
            module = path[: len(path) - len(flax_end)]
            hits = [
                place._replace(torch=place.torch + torch_end, flax=path)
                for place in in_torch(pair, module, shape[0] if shape else 0)
            ]
            if hits and found:
                raise ValueError(f"{path!r} fits two pairs of the map, {found[0].pair} and {pair}")
            found = found or hits
    return found


def places_of_module(names: PathMap, module: str) -> list[Place]:
    """Where a module of the PyTorch model may be in the Flax model.

    Args:
      names: the map.
      module: name of the PyTorch module.

    Returns:
      Its places: in a scanned stack and unrolled, where it is in a stack.

    Example:
      >>> [place.flax for place in places_of_module(LLAMA, "model.layers.1.self_attn.q_proj")]
      ['layers/attn/q', 'layers_1/attn/q']
    """
    return [place for pair in names.pairs for place in in_flax(pair, module)]


def places_of_tensor(names: PathMap, name: str) -> list[Place]:
    """Where a tensor of the PyTorch model may be in the Flax model.

    Args:
      names: the map.
      name: of the tensor.

    Returns:
      Its places: in a scanned stack and unrolled, where it is in a stack.

    Example:
      >>> [place.flax for place in places_of_tensor(LLAMA, "model.norm.weight")]
      ['norm/scale']
    """
    return [
        place._replace(torch=name, flax=place.flax + flax_end)
        for pair in names.pairs
        for torch_end, flax_end in KINDS[pair.kind]
        if name.endswith(torch_end)
        for place in in_flax(pair, name[: len(name) - len(torch_end)])
    ]


def tensor_of(place: Place, leaf: Any) -> np.ndarray:
    """A tensor of the PyTorch model from the leaf that it is in.

    Args:
      place: of the tensor.
      leaf: all of it, every layer of a scanned stack.

    Returns:
      A host array.
    """
    return to_torch(place, np.asarray(leaf if place.index is None else leaf[place.index]))
