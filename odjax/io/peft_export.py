"""Writing adapters for PEFT: the factors of a Flax model, as PEFT names and shapes them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from odjax.core import Where, select
from odjax.core.paths import leaves_with_paths
from odjax.io.path_map import PathMap, Place, places_of_leaf, tensor_of
from odjax.io.peft_config import check_tied, default_value, shortest_names
from odjax.io.places import in_flax
from odjax.io.safetensors import save_safetensors
from odjax.lowrank.adapt import Adapted
from odjax.lowrank.factors import Sizes, both, sizes_of
from odjax.lowrank.merge import map_adapted, spec_of
from odjax.lowrank.methods import ADDED, LowRank

PREFIX = "base_model.model."
CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
BIASES = ("none", "lora_only", "all")


class _Factors(NamedTuple):
    """What belongs to one adapted weight, host arrays in Flax's layout."""

    path: str
    sizes: Sizes
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    places: list[Place]


def save_peft(
    folder: str | Path, model: Adapted | LowRank, params: Any, names: PathMap, **options: Any
) -> None:
    """Writes an adapter as a folder that PEFT's `PeftModel.from_pretrained(base, folder)` reads.

    Args:
      folder: made if there is none; of an existing one only the two files of the adapter are replaced.
      model: the adapted model, or its `spec`.
      params: its parameters.
      names: of the modules in PyTorch, `odjax.io.LLAMA` for example.
      **options: of `export_peft`.

    Raises:
      ValueError: as `export_peft`; nothing is written then.
    """
    tensors, config = export_peft(model, params, names, **options)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(folder / TENSORS_FILE, tensors, {"format": "pt"})
    temporary = folder / f".{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    temporary.replace(folder / CONFIG_FILE)


def export_peft(
    model: Adapted | LowRank,
    params: Any,
    names: PathMap,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    save: Where | None = None,
    bias: str = "none",
    tables: bool = False,
    initial: Any = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An adapter in the names, shapes and settings of PEFT; `import_peft` is the inverse.

    Every method becomes plain LoRA (`rslora` and `dora` with their flags). The half that `rac`, `asym` and
    `lora_fa` draw is written out. `dylora` is written with all its ranks. After a restart of `rac`, `cola` or
    `relora` the factors belong to the merged weights, not to the weights the chain began with: export those
    too, `to_tensors(base, names)`, and name them in `base_model`. `pissa` is converted to LoRA of twice the
    rank on the original weights, which takes the parameters it started from.

    Args:
      model: the adapted model, or its `spec`.
      params: its parameters, with axis names or without.
      names: of the modules in PyTorch.
      base_model: name or folder of the base model's weights, for the config.
      task_type: for the config: "CAUSAL_LM", "SEQ_CLS" and so on.
      save: further leaves to write in full (a trained head), a pattern of paths or a predicate; their modules
        become `modules_to_save`, and all leaves of these must be selected.
      bias: which biases of the base are written: "none", "lora_only" (those of adapted layers) or "all".
      tables: whether the whole table of an adapted embedding is written too, as PEFT does.
      initial: `pissa` only: the adapted model's parameters before training.

    Returns:
      (name -> host array, config).

    Raises:
      ValueError: adapted weights that `names` does not know (all are listed), `pissa` without `initial`, a
        `rac` chain past its first block without `base_model`, the table of a tied head, or `save` of what
        cannot be saved.

    Source: `peft` 0.21, format of checkpoints; Meng et al. 2024, "PiSSA", appendix on conversion to LoRA.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from odjax.io import Pair
      >>> from odjax.lowrank import adapt
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return nn.Dense(4, name="fc")(x)
      >>> model = adapt(Net(), rank=2, alpha=4.0)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> tensors, config = export_peft(model, params, PathMap((Pair("fc", "fc"),)))
      >>> {name: tensor.shape for name, tensor in tensors.items()}
      {'base_model.model.fc.lora_A.weight': (2, 8), 'base_model.model.fc.lora_B.weight': (4, 2)}
      >>> config["r"], config["lora_alpha"], config["target_modules"]
      (2, 4, ['fc'])
    """
    spec = spec_of(model)
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {bias!r}")
    found = _factors(spec, params, names, base_model)
    kinds = {place.pair.kind for factors in found for place in factors.places}
    check_tied(model.inner if isinstance(model, Adapted) else None, kinds)
    if spec.method == "pissa":
        if initial is None:
            raise ValueError(
                "pissa changed the weights: pass initial=, the parameters of the adapted model before "
                "training, to convert it to LoRA on the original weights, or merge and export the weights"
            )
        found = _converted(found, _factors(spec, initial, names, base_model))
    elif initial is not None:
        raise ValueError(f"initial= is for the conversion of 'pissa', the method is {spec.method!r}")

    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    times = 2 if spec.method == "pissa" else 1
    for factors in found:
        for place in factors.places:
            module = _module(place)
            tensors |= {PREFIX + module + end: value for end, value in _written(place, factors).items()}
            ranks[module] = factors.a.shape[-1]
            alphas[module] = _alpha(spec, factors.path, ranks[module] // times) * times
    known = _known(params, names)
    saved = _saved(params, names, save, set(ranks))
    whole = {name: PREFIX + name for name in saved}
    for name, (place, _) in known.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and name not in saved and (bias == "all" or (module in ranks and bias != "none")):
            whole[name] = f"{PREFIX}{module}.base_layer.bias" if module in ranks else PREFIX + name
        if tables and leaf == "weight" and module in ranks and place.pair.kind == "embedding":
            whole[name] = f"{PREFIX}{module}.base_layer.weight"
    tensors |= {key: tensor_of(*known[name]) for name, key in whole.items()}

    rank = default_value(ranks, spec.rank * times)
    alpha = default_value(alphas, None if spec.alpha is None else spec.alpha * times)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": shortest_names(list(ranks), _others(names, known, ranks)),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": spec.method == "rslora",
        "use_dora": spec.method == "dora",
        "fan_in_fan_out": "conv1d" in kinds,
        "bias": bias,
        "lora_bias": False,
        "lora_dropout": spec.dropout,
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
    }
    return tensors, config


def _factors(spec: LowRank, params: Any, names: PathMap, base_model: str | None) -> list[_Factors]:
    """What is beside the adapted weights, with the places of these in PyTorch."""
    found: list[_Factors] = []
    faults: list[str] = []

    def collect(path: str, weight: Any, leaves: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        sizes = sizes_of(weight.shape, leaves)
        places = places_of_leaf(names, path, weight.shape)
        stacked = any(place.index is not None for place in places)
        if not places:
            faults.append(f"{path} {list(weight.shape)} has no name")
        elif len(sizes.batch) != stacked:
            faults.append(f"{path} is a batch of matrices, PEFT adapts single ones")
        elif places[0].pair.kind in ("linear", "conv1d") and len(sizes.inputs) != places[0].pair.inputs:
            faults.append(
                f"{path} has {len(sizes.inputs)} axes of inputs, the map says {places[0].pair.inputs}"
            )
        elif (
            "lora_sketch" in leaves
            and base_model is None
            and np.any(np.asarray(leaves["lora_sketch"])[..., 2])
        ):
            faults.append(
                f"{path} is past the first block of its chain, so its factors belong to merged weights: "
                "export these (odjax.io.to_tensors) and name their folder in base_model="
            )
        else:
            a, b = (np.asarray(leaf) for leaf in both(spec, leaves, sizes))
            magnitude = leaves.get("lora_magnitude")
            magnitude = None if magnitude is None else np.asarray(magnitude)
            found.append(_Factors(path, sizes, a, b, magnitude, places))
        return weight, leaves

    map_adapted(collect, params)
    if faults:
        raise ValueError("the adapter cannot be written: " + "; ".join(faults))
    return found


def _written(place: Place, factors: _Factors) -> dict[str, np.ndarray]:
    """The factors of one module in PyTorch's layout, by the ends of their names."""
    at = ... if place.index is None else place.index
    a, b = factors.a[at], factors.b[at]
    if place.pair.kind == "embedding":
        return {".lora_embedding_A": a.T, ".lora_embedding_B": b.T}
    rank = a.shape[-1]
    if place.pair.kind == "conv":
        down, up = np.moveaxis(a, (-1, -2), (0, 1)), b.T.reshape(*b.T.shape, *(1,) * (a.ndim - 2))
    else:
        down, up = a.reshape(-1, rank).T, b.reshape(rank, -1).T
    ends = {".lora_A.weight": down, ".lora_B.weight": up}
    if factors.magnitude is not None:
        spread = (1, -1, *(1,) * (a.ndim - 2)) if place.pair.kind == "conv" else (-1,)
        ends[".lora_magnitude_vector"] = factors.magnitude[at].reshape(spread)
    return ends


def _converted(found: list[_Factors], initial: list[_Factors]) -> list[_Factors]:
    """PiSSA's factors as LoRA on the original weights: what was added to the principal part."""
    if [(f.path, f.a.shape, f.b.shape) for f in found] != [(f.path, f.a.shape, f.b.shape) for f in initial]:
        raise ValueError("initial= has other factors than params: pass those of the same adapted model")
    return [
        now._replace(
            a=np.concatenate([now.a, start.a], axis=-1),
            b=np.concatenate([now.b, -start.b], axis=len(now.sizes.batch)),
        )
        for now, start in zip(found, initial, strict=True)
    ]


def _alpha(spec: LowRank, path: str, rank: int) -> float:
    """The alpha that gives the scale of a weight's update."""
    pairs = (value for pattern, value in spec.alpha_pattern if re.fullmatch(pattern, path))
    given = next(pairs, spec.alpha)
    if given is None:  # a scale of 1
        given = math.sqrt(rank) if spec.method == "rslora" else rank
    return int(given) if float(given).is_integer() else float(given)


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A pattern for the modules that differ from the default: last parts of names, or whole names.

    PEFT matches the end of a name: "fc" also where "block.fc" is asked for.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        groups.setdefault(name.rpartition(".")[2], {})[name] = value
    pattern: dict[str, Any] = {}
    for last, group in groups.items():
        different = {name: value for name, value in group.items() if value != default}
        if different and len(set(group.values())) == 1:
            pattern[re.escape(last)] = next(iter(group.values()))
            continue
        for name, value in different.items():
            start = "^" if any(other.endswith(f".{name}") for other in group) else ""
            pattern[start + re.escape(name)] = value
    return pattern


def _module(place: Place) -> str:
    return place.torch.removesuffix(".weight")


def _known(params: Any, names: PathMap) -> dict[str, tuple[Place, Any]]:
    """Names of PyTorch's tensors -> where they are, for the parameters of the base that have one."""
    return {
        place.torch: (place, leaf)
        for path, leaf in leaves_with_paths(params)
        if not re.fullmatch(ADDED, path)
        for place in places_of_leaf(names, path, leaf.shape)
    }


def _others(names: PathMap, known: Mapping[str, Any], adapted: Mapping[str, Any]) -> list[str]:
    """The modules of the PyTorch model that are not adapted, also those that only the map knows."""
    modules = {name.rpartition(".")[0] for name in known}
    absent = [pair.torch for pair in names.pairs if not any(in_flax(pair, module) for module in modules)]
    return sorted(modules - set(adapted)) + absent


def _saved(params: Any, names: PathMap, save: Where | None, adapted: set[str]) -> list[str]:
    """The names of the tensors that are written in full."""
    if save is None:
        return []
    chosen = {path for path, hit in leaves_with_paths(select(params, save)) if hit}
    added = sorted(path for path in chosen if re.fullmatch(ADDED, path))
    if added:
        raise ValueError(f"save= selects factors, which are written anyway: {added}")
    known = _known(params, names)
    saved = [name for name, (place, _) in known.items() if place.flax in chosen]
    modules = {name.rpartition(".")[0] for name in saved}
    nameless = sorted(chosen - {known[name][0].flax for name in saved})
    partly = sorted(
        known[name][0].flax for name in known if name not in saved and name.rpartition(".")[0] in modules
    )
    for paths, what in (
        (nameless, "have no name in the map"),
        (partly, "are left out of modules that save= selects in part"),
        (sorted(modules & adapted), "have an adapter: PEFT does not save both"),
        (["parameters outside modules"] if "" in modules else [], "cannot be saved"),
    ):
        if paths:
            raise ValueError(f"{', '.join(paths)} {what}")
    return saved
