"""A module in PyTorch and in Flax: the templates of its names, and the layouts of its tensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

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


def holes(template: str) -> list[str]:
    """The names of the placeholders of a template.

    Args:
      template: a name of PyTorch or a path of Flax.

    Returns:
      The names.

    Example:
      >>> holes("layers[i]/attn/{p:q|k}")
      ['p', 'i']
    """
    return [hole[0] for hole in re.findall(_HOLE, template)] + re.findall(r"\[(\w+)\]", template)


def in_flax(pair: Pair, module: str) -> list[Place]:
    """Where a PyTorch module may be in the Flax model.

    Args:
      pair: to look in.
      module: name of the PyTorch module.

    Returns:
      One place; two, scanned and unrolled, for a layer of a stack; none where the name does not fit the pair.

    Example:
      >>> [place.flax for place in in_flax(Pair("encoder.{i}.proj", "layers[i]/proj"), "encoder.3.proj")]
      ['layers/proj', 'layers_3/proj']
    """
    match = _torch_pattern(pair).fullmatch(module)
    if match is None:
        return []
    stack = re.search(r"\[(\w+)\]", pair.flax)
    path = re.sub(_HOLE, lambda hole: match[hole[1]], pair.flax)
    if stack is None:
        return [Place(pair, module, path, None)]
    index = match[stack[1]]
    return [
        Place(pair, module, path.replace(stack[0], ""), int(index)),
        Place(pair, module, path.replace(stack[0], f"_{index}"), None),
    ]


def in_torch(pair: Pair, module: str, layers: int) -> list[Place]:
    """Where a Flax module is in the PyTorch model.

    Args:
      pair: to look in.
      module: path of the Flax module.
      layers: how many layers there are, if the path is that of a scanned stack.

    Returns:
      One place, one a layer for a scanned stack, none where the path does not fit the pair.

    Example:
      >>> [place.torch for place in in_torch(Pair("encoder.{i}.proj", "layers[i]/proj"), "layers/proj", 2)]
      ['encoder.0.proj', 'encoder.1.proj']
    """
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


def from_torch(place: Place, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A tensor in Flax's layout.

    Args:
      place: of the tensor.
      tensor: in PyTorch's layout.
      shape: of the leaf, of one layer in a scanned stack.

    Returns:
      The array, or None where the tensor does not fit the shape.
    """
    expected = torch_shape(place, shape)
    if tensor.shape != expected:
        return None
    if place.flax.endswith("/kernel"):
        if place.pair.kind == "linear":
            tensor = tensor.T
        elif place.pair.kind == "conv":
            tensor = np.moveaxis(tensor, (1, 0), (-2, -1))
    return tensor.reshape(shape)


def to_torch(place: Place, value: np.ndarray) -> np.ndarray:
    """A leaf in PyTorch's layout.

    Args:
      place: of the leaf.
      value: the leaf, one layer of it in a scanned stack.

    Returns:
      The array.
    """
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
      >>> place = Place(Pair("o_proj", "o", inputs=2), "o_proj.weight", "o/kernel", None)
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
