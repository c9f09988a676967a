"""The rules of an `adapter_config.json`: which modules have an adapter, of which rank and scale.

Source: `peft` 0.21, `tuners/tuners_utils.py` and `utils/other.py`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

DEFAULTS: dict[str, Any] = {
    "peft_type": None,
    "task_type": None,
    "base_model_name_or_path": None,
    "inference_mode": False,
    "r": 8,
    "lora_alpha": 8,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "modules_to_save": None,
}
"""The settings that are read, with the values of those that a file leaves out."""

# Where a file comes from, how its factors started, details of what is off: no part of the function.
_NO_EFFECT = (
    "auto_mapping",
    "corda_config",
    "eva_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an adapter, checked, with the defaults of what is left out.

    Args:
      config: content of `adapter_config.json`.

    Returns:
      The settings of `DEFAULTS`.

    Raises:
      ValueError: another kind of adapter than LoRA, a setting with a value that has no counterpart here, or a
        rank or alpha that is no such number.

    Warns:
      UserWarning: the adapter belongs to a base whose weights were changed when it was made (PiSSA, OLoRA,
        CorDA, LoftQ, LoRA-GA) and was not converted.

    Example:
      >>> read_config({"peft_type": "LORA", "r": 4})["lora_alpha"]
      8
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"peft_type must be 'LORA', got {config.get('peft_type')!r}: other adapters have no counterpart"
        )
    unknown = {
        name: value
        for name, value in config.items()
        if value and name not in DEFAULTS and name not in (*_NO_EFFECT, "loftq_config")
    }
    if unknown:
        raise ValueError(
            f"these settings of the adapter have no counterpart: {unknown}; remove those that do not change "
            "what it computes"
        )
    settings = {**DEFAULTS, **{name: value for name, value in config.items() if name in DEFAULTS}}
    for name in ("rank_pattern", "alpha_pattern"):
        settings[name] = dict(settings[name] or {})
    ranks = {"r": settings["r"]} | {f"rank_pattern[{k!r}]": v for k, v in settings["rank_pattern"].items()}
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{name} must be a whole number from 1, got {rank!r}")
    alphas = {"lora_alpha": settings["lora_alpha"]}
    alphas |= {f"alpha_pattern[{k!r}]": v for k, v in settings["alpha_pattern"].items()}
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"{name} must be a finite number, got {alpha!r}")
    if settings["bias"] not in ("none", "all", "lora_only"):
        raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {settings['bias']!r}")
    if settings["use_dora"] and settings["lora_bias"]:
        raise ValueError("use_dora and lora_bias exclude each other")
    start = str(settings["init_lora_weights"]).lower()
    if start.startswith(_CHANGED_BASE) or config.get("loftq_config"):
        warnings.warn(
            f"init_lora_weights={settings['init_lora_weights']!r} changed the weights of the base when this "
            "adapter was made: on the original ones its numbers are wrong. Save it from PEFT with "
            "path_initial_model_for_weight_conversion=, or load the changed base",
            stacklevel=3,
        )
    return settings


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of a module in `rank_pattern` or `alpha_pattern`: that of the first key that matches.

    Args:
      pattern: regular expression of the end of a module's name -> value.
      module: name.
      default: where none matches.

    Returns:
      The value.

    Example:
      >>> pattern_value({"q_proj": 4}, "model.layers.0.self_attn.q_proj", 8)
      4
      >>> pattern_value({"q": 4}, "model.layers.0.self_attn.q_proj", 8)
      8
    """
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def alpha_and_rank(settings: Mapping[str, Any], module: str) -> tuple[float, int]:
    """The alpha and the rank of a module's update, whose scale is alpha / rank, or alpha / sqrt(rank).

    Args:
      settings: from `read_config`.
      module: name.

    Returns:
      (alpha, rank).

    Example:
      >>> alpha_and_rank(read_config({"peft_type": "LORA", "r": 4, "rank_pattern": {"fc": 2}}), "fc")
      (8, 2)
    """
    rank = pattern_value(settings["rank_pattern"], module, settings["r"])
    return pattern_value(settings["alpha_pattern"], module, settings["lora_alpha"]), rank


def is_target(settings: Mapping[str, Any], module: str) -> bool | None:
    """Whether a module has an adapter.

    Args:
      settings: from `read_config`.
      module: name in the base model.

    Returns:
      Whether; None where the settings do not say it by name ("all-linear", or the default of a model).

    Example:
      >>> config = {"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": 1}
      >>> settings = read_config(config)
      >>> [is_target(settings, f"model.layers.{i}.self_attn.q_proj") for i in range(3)]
      [False, True, False]
    """
    exclude = settings["exclude_modules"]
    if exclude and _named(exclude, module):
        return False
    for kept in settings["modules_to_save"] or ():
        if re.match(rf"(^|.*\.){kept}($|\..*)", module):
            return False
    targets = settings["target_modules"]
    if targets is None or targets == "all-linear":
        return None
    if not _named(targets, module):
        return False
    layers = settings["layers_to_transform"]
    if isinstance(targets, str) or module in targets or layers is None or layers == []:
        return True
    patterns = settings["layers_pattern"] or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        first = r".*?\." if not settings["layers_pattern"] else r"(?:^|.*?\.)"
        match = re.match(rf"{first}{pattern}\.(\d+)\.", module)
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _named(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def check_tied(model: Any, kinds: set[str]) -> None:
    """Refuses an adapter of a table that is the output head as well.

    PEFT adapts the lookup alone, our models both uses of the table.

    Args:
      model: with an attribute `tied` if it can share its table.
      kinds: of the adapted modules, see `odjax.io.places.KINDS`.

    Raises:
      ValueError: it is such an adapter.

    Example:
      >>> check_tied(None, {"linear", "embedding"})
    """
    if "embedding" in kinds and getattr(model, "tied", False):
        raise ValueError(
            "the adapted table is also the output head (tied=True): PEFT adapts its lookup alone, this model "
            "both, so the outputs would differ; adapt other layers, or merge and exchange the weights"
        )


def default_value(values: Mapping[str, Any], preferred: Any) -> Any:
    """The value that is left out of a pattern: the preferred one if there is any of it, else the commonest.

    Args:
      values: module -> value.
      preferred: a value.

    Returns:
      One of the values.

    Example:
      >>> default_value({"q": 2, "k": 4, "v": 4}, 8)
      4
    """
    commonest = Counter(values.values()).most_common(1)[0][0]
    return next((value for value in values.values() if value == preferred), commonest)


def shortest_names(targets: list[str], others: list[str]) -> list[str]:
    """The ends of modules' names that select them and no other module.

    Args:
      targets: names of the modules with an adapter.
      others: names of the other modules.

    Returns:
      Sorted last parts of the names where these are enough, else the sorted names.

    Example:
      >>> shortest_names(["layers.0.q_proj", "layers.1.q_proj"], ["layers.0.k_proj"])
      ['q_proj']
      >>> shortest_names(["layers.0.q_proj"], ["layers.1.q_proj"])
      ['layers.0.q_proj']
    """
    ends = sorted({name.split(".")[-1] for name in targets})
    numbered = any(end.isdigit() for end in ends)
    return sorted(targets) if numbered or any(_named(ends, name) for name in others) else ends
