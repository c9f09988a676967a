"""Names of PyTorch's tensors and of Flax's parameters, as data, both ways.

A `PathMap` is a list of pairs of module names, "model.layers.{i}.self_attn.{p:q|k|v}_proj" and
"layers[i]/attn/{p}", each with the layout of its tensors. A name in braces stands for the same text on both
sides, without a dot or slash or one of the choices given. `layers[i]` is layer i of a stack: a slice of
`layers/...` where the layers are scanned, `layers_3/...` where they are not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from odjax.core import Where
from odjax.core.paths import leaves_with_paths

KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "linear": ((".weight", "/kernel"), (".bias", "/bias")),
    "conv1d": ((".weight", "/kernel"), (".bias", "/bias")),
    "conv": ((".weight", "/kernel"), (".bias", "/bias")),
    "embedding": ((".weight", "/embedding"),),
    "norm": ((".weight", "/scale"), (".bias", "/bias")),
    "parameter": (("", ""),),
}
"""Kind of a module -> the ends of its tensors' names, PyTorch's and Flax's."""

_HOLE = r"\{(\w+)(?::([^}]*))?\}"


def _holes(template: str) -> list[str]:
    return [hole[0] for hole in re.findall(_HOLE, template)] + re.findall(r"\[(\w+)\]", template)


class Pair(NamedTuple):
    """A module of a PyTorch model and the same one of a Flax model.

    Kinds and layouts (PyTorch <-> Flax): "linear" (out, in) <-> (in..., out...); "conv1d" of GPT-2 (in, out)
    <-> (in..., out...); "conv" (out, in, window...) <-> (window..., in, out); "embedding" and "norm" as they
    are; "parameter" for a tensor that belongs to no such module.

    Attributes:
      torch: name, dots between parts; placeholders as in the module's docstring.
      flax: path, slashes between parts; the same placeholders.
      kind: a key of `KINDS`.
      inputs: of a linear layer's kernel: the number of its first axes that are inputs.
      ones: of a "parameter": the number of first axes of length 1 that PyTorch's tensor has more.
    """

    torch: str
    flax: str
    kind: str = "linear"
    inputs: int = 1
    ones: int = 0


class Place(NamedTuple):
    """A tensor or module in both worlds.

    Attributes:
      pair: that says so.
      torch: name.
      flax: path; in a scanned stack that of all layers.
      index: of the layer in a scanned stack, else None.
    """

    pair: Pair
    torch: str
    flax: str
    index: int | None


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
            torch, flax = _holes(pair.torch), _holes(pair.flax)
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
"""Names of `transformers`' LlamaForCausalLM and of `odjax.models.Decoder`; those of Mistral and Qwen3 are equal."""


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
        places = [place for place in _places_of_tensor(names, name) if place.flax in shapes]
        if not places:
            if not any(re.fullmatch(pattern, name) for pattern in names.ignore):
                faults.append(f"{name} {list(tensor.shape)} has no place")
            continue
        if len(places) > 1:
            faults.append(f"{name} has the places {', '.join(place.flax for place in places)}")
            continue
        place = places[0]
        shape = shapes[place.flax] if place.index is None else shapes[place.flax][1:]
        value = _from_torch(place, np.asarray(tensor), shape)
        if value is None:
            layer = "" if place.index is None else f" layer {place.index}"
            faults.append(
                f"{name} {list(tensor.shape)} does not fit {place.flax}{layer} {list(shape)}: its tensor is "
                f"{list(torch_shape(place, shape))}"
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
            tensors[place.torch] = _to_torch(place, value if place.index is None else value[place.index])
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
                for place in _of_module(pair, module, shape[0] if shape else 0)
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
    found = []
    for pair in names.pairs:
        match = _torch_pattern(pair).fullmatch(module)
        if match:
            found += _filled(pair, module, match.groupdict())
    return found


def _places_of_tensor(names: PathMap, name: str) -> list[Place]:
    found = []
    for pair in names.pairs:
        for torch_end, flax_end in KINDS[pair.kind]:
            if not name.endswith(torch_end):
                continue
            match = _torch_pattern(pair).fullmatch(name[: len(name) - len(torch_end)])
            if match:
                found += [
                    place._replace(flax=place.flax + flax_end)
                    for place in _filled(pair, name, match.groupdict())
                ]
    return found


def _filled(pair: Pair, name: str, values: Mapping[str, str]) -> Iterable[Place]:
    stack = re.search(r"\[(\w+)\]", pair.flax)
    path = re.sub(_HOLE, lambda hole: values[hole[1]], pair.flax)
    if stack is None:
        return [Place(pair, name, path, None)]
    index = values[stack[1]]
    return [
        Place(pair, name, path.replace(stack[0], ""), int(index)),
        Place(pair, name, path.replace(stack[0], f"_{index}"), None),
    ]


def _of_module(pair: Pair, module: str, layers: int) -> list[Place]:
    """The places of a Flax module, its layers in a scanned stack."""
    stack = re.search(r"\[(\w+)\]", pair.flax)
    for scanned in (False, True) if stack else (False,):
        match = _flax_pattern(pair, scanned).fullmatch(module)
        if match is None:
            continue
        values = match.groupdict()

        def named(values: Mapping[str, str]) -> str:
            return re.sub(_HOLE, lambda hole: values[hole[1]], pair.torch)

        if not scanned:
            return [Place(pair, named(values), module, None)]
        return [Place(pair, named({**values, stack[1]: str(i)}), module, i) for i in range(layers)]
    return []


def _pattern(template: str, numbers: Iterable[str], choices: Mapping[str, str]) -> re.Pattern[str]:
    parts, at = [], 0
    for hole in re.finditer(_HOLE, template):
        parts.append(re.escape(template[at : hole.start()]))
        inside = r"\d+" if hole[1] in numbers else choices.get(hole[1]) or r"[^./]+"
        parts.append(f"(?P<{hole[1]}>{inside})")
        at = hole.end()
    return re.compile("".join(parts) + re.escape(template[at:]))


def _choices(pair: Pair) -> dict[str, str]:
    holes = re.findall(_HOLE, pair.torch) + re.findall(_HOLE, pair.flax)
    return {name: choices for name, choices in holes if choices}


@functools.cache
def _torch_pattern(pair: Pair) -> re.Pattern[str]:
    return _pattern(pair.torch, re.findall(r"\[(\w+)\]", pair.flax), _choices(pair))


@functools.cache
def _flax_pattern(pair: Pair, scanned: bool) -> re.Pattern[str]:
    stack = re.findall(r"\[(\w+)\]", pair.flax)
    template = re.sub(r"\[(\w+)\]", "" if scanned else r"_{\1}", pair.flax)
    return _pattern(template, stack, _choices(pair))


def _from_torch(place: Place, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A tensor in Flax's layout, or None where it does not fit the shape."""
    expected = torch_shape(place, shape)
    if tensor.shape != expected:
        return None
    if place.flax.endswith("/kernel"):
        if place.pair.kind == "linear":
            tensor = tensor.T
        elif place.pair.kind == "conv":
            tensor = np.moveaxis(tensor, (1, 0), (-2, -1))
    return tensor.reshape(shape)


def _to_torch(place: Place, value: np.ndarray) -> np.ndarray:
    """A leaf, or one layer of it, in PyTorch's layout."""
    shape = torch_shape(place, value.shape)
    if place.flax.endswith("/kernel"):
        if place.pair.kind == "linear":
            return value.reshape(shape[::-1]).T
        if place.pair.kind == "conv":
            return np.moveaxis(value, (-2, -1), (1, 0))
    return value.reshape(shape)


def torch_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor in PyTorch.

    Args:
      place: of the leaf.
      shape: of the leaf, of one layer in a scanned stack.

    Returns:
      The shape.

    Example:
      >>> place = places_of_leaf(LLAMA, "layers/attn/o/kernel", (1, 2, 4, 6))[0]
      >>> torch_shape(place, (2, 4, 6))
      (6, 8)
    """
    kind, cut = place.pair.kind, place.pair.inputs
    if kind == "parameter":
        return (*(1,) * place.pair.ones, *shape)
    if place.flax.endswith("/bias"):
        return (int(np.prod(shape, dtype=int)),)
    if place.flax.endswith("/kernel") and kind == "conv":
        return (shape[-1], shape[-2], *shape[:-2])
    if place.flax.endswith("/kernel"):
        rows, columns = (int(np.prod(part, dtype=int)) for part in (shape[:cut], shape[cut:]))
        return (rows, columns) if kind == "conv1d" else (columns, rows)
    return shape
