"""Reading adapters of PEFT: their factors as leaves beside the weights of an adapted Flax model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import AxisMetadata

from odjax.core.paths import leaves_with_paths
from odjax.io.path_map import PathMap, Place, places_of_leaf, places_of_module, places_of_tensor
from odjax.io.peft_config import alpha_and_rank, check_tied, default_value, is_target, read_config
from odjax.io.peft_export import CONFIG_FILE, PREFIX, TENSORS_FILE
from odjax.io.places import from_torch
from odjax.io.safetensors import load_safetensors
from odjax.lowrank.adapt import Adapted, adapt

A, B = "lora_A.weight", "lora_B.weight"
TABLE_A, TABLE_B = "lora_embedding_A", "lora_embedding_B"
MAGNITUDE, LORA_BIAS = "lora_magnitude_vector", "lora_B.bias"
_ENDS = (A, B, TABLE_A, TABLE_B, MAGNITUDE, LORA_BIAS)


class _Adapter(NamedTuple):
    """The adapter of one PyTorch module, in Flax's layout."""

    place: Place
    alpha: float
    rank: int
    leaves: dict[str, np.ndarray]
    bias: np.ndarray | None


def load_peft(
    folder: str | Path, model: nn.Module, params: Any, names: PathMap
) -> tuple[Adapted, dict[str, Any]]:
    """Opens an adapter that PEFT's `save_pretrained`, or `save_peft`, wrote.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      model: the bare model.
      params: its parameters, the weights that the adapter was trained on.
      names: of its modules in PyTorch, `odjax.io.LLAMA` for example.

    Returns:
      (adapted model, its parameters).

    Raises:
      FileNotFoundError: a file is missing; adapters in `adapter_model.bin` must be saved again by PEFT.
      ValueError: as `import_peft`.
    """
    folder = Path(folder)
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / file).is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            hint = ", only adapter_model.bin, which is not read: save it again with PEFT" if pickled else ""
            raise FileNotFoundError(f"{folder} has no {file}{hint}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG_FILE} must be an object of settings, got {type(config).__name__}")
    return import_peft(model, params, load_safetensors(folder / TENSORS_FILE), config, names)


def import_peft(
    model: nn.Module,
    params: Any,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any],
    names: PathMap,
) -> tuple[Adapted, dict[str, Any]]:
    """An adapted model, and its parameters, from an adapter of PEFT; the inverse of `export_peft`.

    Factors keep their numbers and dtype. Modules that the adapter saved in full, biases and tables replace
    those of the base. In a scanned stack every layer must have an adapter of the same rank and scale;
    otherwise use the unrolled model (`scan=False`, `odjax.models.unstack_layers`). Other methods than LoRA,
    rsLoRA and DoRA come back as what they were exported as, LoRA.

    Args:
      model: the bare model.
      params: its parameters, the weights that the adapter was trained on; they are not changed.
      tensors: content of `adapter_model.safetensors`.
      config: content of `adapter_config.json`.
      names: of the modules in PyTorch.

    Returns:
      (adapted model, its parameters).

    Raises:
      ValueError: another kind of adapter, tensors without a place (all are listed), one factor without the
        other, a rank other than the config's, shapes that do not fit the weights, no magnitudes for DoRA, the
        table of a tied head, or modules that the config names and the tensors lack, or the other way round.

    Warns:
      UserWarning: the adapter belongs to changed base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).

    Source: `peft` 0.21, format of checkpoints.

    Example:
      >>> import jax
      >>> from odjax.io import Pair, export_peft
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return nn.Dense(4, name="fc")(x)
      >>> names = PathMap((Pair("fc", "fc"),))
      >>> base = Net().init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> tensors = {
      ...     "base_model.model.fc.lora_A.weight": np.ones((2, 8), np.float32),
      ...     "base_model.model.fc.lora_B.weight": np.ones((4, 2), np.float32),
      ... }
      >>> config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
      >>> model, params = import_peft(Net(), base, tensors, config, names)
      >>> model.spec.alpha, sorted(params["fc"])
      (4.0, ['bias', 'kernel', 'lora_a', 'lora_b'])
    """
    if isinstance(model, Adapted):
        raise ValueError("the model is adapted already: pass the bare one, model.inner, and its parameters")
    settings = read_config(config)
    bare = dict(leaves_with_paths(params))
    modules, whole = _sorted_out(tensors)
    faults: list[str] = []
    adapters: dict[str, dict[int | None, _Adapter]] = {}
    for module, parts in modules.items():
        places = [place for place in places_of_module(names, module) if _weight(place) in bare]
        if len(places) != 1:
            faults.append(f"{module} ({', '.join(sorted(parts))}) has no place")
            continue
        adapter = _adapter(settings, module, places[0], parts, bare, faults)
        if adapter is not None:
            adapters.setdefault(_weight(places[0]), {})[places[0].index] = adapter
    faults += _selection_faults(settings, set(modules), bare, names)
    replaced = _replacements(settings, whole, bare, names, faults)
    faults += [] if faults else _stack_faults(adapters, bare)
    if not adapters and not faults:
        faults.append("there is no lora_A or lora_embedding_A")
    if faults:
        raise ValueError("the adapter does not fit the model: " + "; ".join(faults))
    check_tied(
        model, {adapter.place.pair.kind for layers in adapters.values() for adapter in layers.values()}
    )
    for path, layers in adapters.items():
        _with_bias(layers, bare, settings, replaced)
        first = next(iter(layers.values()))
        for name, leaf in first.leaves.items():
            value = leaf if None in layers else np.stack([layers[i].leaves[name] for i in range(len(layers))])
            replaced[f"{first.place.flax}/{name}"] = _on_device(path, value)
    return _model(model, settings, adapters), _with(params, replaced)


def _weight(place: Place) -> str:
    return place.flax + ("/embedding" if place.pair.kind == "embedding" else "/kernel")


def _sorted_out(tensors: Mapping[str, Any]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The tensors of adapters, by module and end of the name, and those that replace others, by name."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    foreign = sorted(name for name in tensors if not name.startswith(PREFIX))
    if foreign:
        raise ValueError(f"names of PEFT's tensors start with {PREFIX!r}, these do not: {', '.join(foreign)}")
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in _ENDS if name.endswith(f".{end}")), None)
        if end is None:
            module, layer, leaf = name.rpartition(".base_layer.")
            whole[f"{module}.{leaf}" if layer else name] = np.asarray(tensor)
        else:
            modules.setdefault(name.removesuffix(f".{end}"), {})[end] = np.asarray(tensor)
    return modules, whole


def _adapter(
    settings: Mapping[str, Any],
    module: str,
    place: Place,
    parts: dict[str, np.ndarray],
    bare: Mapping[str, Any],
    faults: list[str],
) -> _Adapter | None:
    """The adapter of one module, or None and what is wrong with it."""
    kind, weight = place.pair.kind, _weight(place)
    alpha, rank = alpha_and_rank(settings, module)
    shape = tuple(bare[weight].shape)
    if place.index is not None:
        if place.index >= shape[0]:
            faults.append(f"{module} is beyond the {shape[0]} layers of {weight}")
            return None
        shape = shape[1:]
    down, up = (TABLE_A, TABLE_B) if kind == "embedding" else (A, B)
    needed = {down, up} | ({MAGNITUDE} if settings["use_dora"] else set())
    needed |= {LORA_BIAS} if settings["lora_bias"] else set()
    if set(parts) != needed:
        missing, extra = sorted(needed - set(parts)), sorted(set(parts) - needed)
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing)
        wrong += [f"has {', '.join(extra)} that the config does not announce"] * bool(extra)
        faults.append(f"{module} {' and '.join(wrong)}")
        return None
    if settings["use_dora"] and kind == "embedding":
        faults.append(f"{module} is an embedding, DoRA adapts linear layers and convolutions")
        return None
    cut = {"embedding": 1, "conv": len(shape) - 1}.get(kind, place.pair.inputs)
    ins, outs = shape[:cut], shape[cut:]
    inputs, outputs = math.prod(ins), math.prod(outs)
    expected = {down: (rank, inputs), up: (outputs, rank), MAGNITUDE: (outputs,), LORA_BIAS: (outputs,)}
    if kind == "conv":
        expected[down] = (rank, ins[-1], *ins[:-1])
        expected[up] = (outputs, rank, *(1,) * (len(ins) - 1))
        expected[MAGNITUDE] = (1, outputs, *(1,) * (len(ins) - 1))
    for end, tensor in parts.items():
        if end == down and tensor.ndim and tensor.shape[0] != rank:
            faults.append(f"{module}.{end} has rank {tensor.shape[0]}, the config says {rank}")
            return None
        if tensor.shape != expected[end]:
            faults.append(
                f"{module}.{end} {list(tensor.shape)} does not fit {weight} {list(shape)}, which needs "
                f"{list(expected[end])}"
            )
            return None
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            faults.append(f"{module}.{end} is {tensor.dtype}, factors are real floating numbers")
            return None
    a = np.moveaxis(parts[down], (0, 1), (-1, -2)) if kind == "conv" else parts[down].T
    b = parts[up].reshape(outputs, rank).T
    leaves = {"lora_a": a.reshape(*ins, rank), "lora_b": b.reshape(rank, *outs)}
    if MAGNITUDE in parts:
        leaves["lora_magnitude"] = parts[MAGNITUDE].reshape(outs)
    bias = parts.get(LORA_BIAS)
    if bias is not None and f"{place.flax}/bias" not in bare:
        faults.append(f"{module} has lora_bias, but {place.flax} has no bias that it could be added to")
        return None
    return _Adapter(place, alpha, rank, leaves, None if bias is None else bias.reshape(outs))


def _selection_faults(
    settings: Mapping[str, Any], adapted: set[str], bare: Mapping[str, Any], names: PathMap
) -> list[str]:
    """Where the modules that the config names and those with tensors differ."""
    faults = [
        f"{module} has an adapter, but is no target of the config"
        for module in sorted(adapted)
        if is_target(settings, module) is False
    ]
    for path, leaf in bare.items():
        for place in places_of_leaf(names, path, leaf.shape):
            module = place.torch.removesuffix(".weight")
            matrix = place.pair.kind in ("linear", "conv1d", "conv", "embedding") and module != place.torch
            if matrix and module not in adapted and is_target(settings, module):
                faults.append(f"{module} is a target of the config, but has no adapter")
    return faults


def _replacements(
    settings: Mapping[str, Any],
    whole: Mapping[str, np.ndarray],
    bare: Mapping[str, Any],
    names: PathMap,
    faults: list[str],
) -> dict[str, Any]:
    """The leaves of the base that the adapter has new values of."""
    new: dict[str, Any] = {}
    for name, tensor in whole.items():
        places = [place for place in places_of_tensor(names, name) if place.flax in bare]
        if len(places) != 1:
            if settings["bias"] != "all" or not name.endswith(".bias"):
                faults.append(f"{name} {list(tensor.shape)} has no place")
            continue
        place = places[0]
        leaf = bare[place.flax]
        shape = tuple(leaf.shape) if place.index is None else tuple(leaf.shape[1:])
        value = from_torch(place, tensor, shape)
        if value is None or (place.index is not None and place.index >= leaf.shape[0]):
            faults.append(f"{name} {list(tensor.shape)} does not fit {place.flax} {list(leaf.shape)}")
        elif place.index is None:
            new[place.flax] = value
        else:
            held = np.asarray(new.get(place.flax, leaf))
            held = held.astype(np.promote_types(held.dtype, value.dtype))  # neither side loses digits
            held[place.index] = value
            new[place.flax] = held
    return {path: _on_device(path, value) for path, value in new.items()}


def _stack_faults(adapters: Mapping[str, dict[int | None, _Adapter]], bare: Mapping[str, Any]) -> list[str]:
    """Scanned stacks whose layers have adapters that differ."""
    faults = []
    for path, layers in adapters.items():
        if None in layers:
            continue
        without = sorted(set(range(bare[path].shape[0])) - set(layers), key=int)
        kinds = {
            (adapter.rank, adapter.alpha, *(leaf.dtype for leaf in adapter.leaves.values()))
            for adapter in layers.values()
        }
        what = [f"no adapter in layers {without}"] * bool(without)
        what += [f"ranks, alphas and dtypes {sorted(map(str, kinds))}"] * (len(kinds) > 1)
        if what:
            faults.append(
                f"{path} is a scanned stack with {' and '.join(what)}: use the unrolled model (scan=False) "
                "with odjax.models.unstack_layers(params)"
            )
    return faults


def _with_bias(
    layers: Mapping[int | None, _Adapter],
    bare: Mapping[str, Any],
    settings: Mapping[str, Any],
    new: dict[str, Any],
) -> None:
    """Adds what PEFT's `lora_bias` trained to the bias of the base."""
    for index, adapter in layers.items():
        if adapter.bias is not None:
            at = ... if index is None else index
            name = f"{adapter.place.flax}/bias"
            held = np.array(new.get(name, bare[name]))
            scale = adapter.alpha / (math.sqrt(adapter.rank) if settings["use_rslora"] else adapter.rank)
            total = held[at].astype(np.float32) + np.float32(scale) * adapter.bias.astype(np.float32)
            held[at] = total.astype(held.dtype)
            new[name] = _on_device(name, held)


def _on_device(path: str, value: Any) -> jax.Array:
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError(f"the numbers for {path} are {value.dtype}: enable them with jax.enable_x64(True)")
    return jnp.asarray(value)


def _model(
    model: nn.Module, settings: Mapping[str, Any], adapters: Mapping[str, dict[int | None, _Adapter]]
) -> Adapted:
    """The model with the adapters' ranks and scales."""
    first = {path: next(iter(layers.values())) for path, layers in adapters.items()}
    dora = settings["use_dora"]
    root = dora and settings["use_rslora"]  # `dora` divides by the rank
    ranks = {path: adapter.rank for path, adapter in first.items()}
    alphas = {path: float(a.alpha * (math.sqrt(a.rank) if root else 1)) for path, a in first.items()}
    rank = default_value(ranks, settings["r"])
    alpha = default_value(alphas, settings["lora_alpha"])
    dtypes = {leaf.dtype for adapter in first.values() for leaf in adapter.leaves.values()}
    return adapt(
        model,
        rank=rank,
        where="|".join(re.escape(path) for path in first),
        method="dora" if dora else "rslora" if settings["use_rslora"] else "lora",
        alpha=alpha,
        init="gaussian" if settings["init_lora_weights"] == "gaussian" else "kaiming",
        dropout=settings["lora_dropout"],
        rank_pattern={re.escape(path): value for path, value in ranks.items() if value != rank},
        alpha_pattern={re.escape(path): value for path, value in alphas.items() if value != alpha},
        dtype=dtypes.pop() if len(dtypes) == 1 else jnp.float32,
    )


def _with(params: Any, new: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries with leaves replaced or added, by path; the given ones stay as they are."""
    result = dict(params)
    inside: dict[str, dict[str, Any]] = {}
    for path, value in new.items():
        name, _, rest = path.partition("/")
        if rest:
            inside.setdefault(name, {})[rest] = value
        else:
            box = result.get(name)
            result[name] = box.replace_boxed(value) if isinstance(box, AxisMetadata) else value
    return result | {name: _with(result[name], leaves) for name, leaves in inside.items()}
