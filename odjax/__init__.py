"""odjax: on-device and parameter-efficient learning as small, pure, composable JAX pieces.

The public API in one screen; names are loaded when they are first used. The families are submodules:
`odjax.lowrank`, `odjax.sparse`, `odjax.heads`, `odjax.federated`, ...; `odjax.io` exchanges weights and
adapters.
"""

import importlib
from typing import TYPE_CHECKING, Any

from odjax.version import __version__ as __version__

if TYPE_CHECKING:
    from odjax import continual as continual
    from odjax import core as core
    from odjax import federated as federated
    from odjax import heads as heads
    from odjax import io as io
    from odjax import lowrank as lowrank
    from odjax import models as models
    from odjax import privacy as privacy
    from odjax import sparse as sparse
    from odjax.continual.shrink_perturb import shrink_perturb as shrink_perturb
    from odjax.core.class_moments import class_moments as class_moments
    from odjax.core.edits import Edit as Edit
    from odjax.core.edits import as_transform as as_transform
    from odjax.core.edits import run_edit as run_edit
    from odjax.core.edits import run_edits as run_edits
    from odjax.core.keys import fold_path as fold_path
    from odjax.core.keys import fold_step as fold_step
    from odjax.core.keys import keys_like as keys_like
    from odjax.core.optimizer_state import map_params_state as map_params_state
    from odjax.core.optimizer_state import reset_moments as reset_moments
    from odjax.core.paths import Where as Where
    from odjax.core.paths import label as label
    from odjax.core.paths import leaves_with_paths as leaves_with_paths
    from odjax.core.paths import map_with_path as map_with_path
    from odjax.core.paths import select as select
    from odjax.core.report import tree_report as tree_report
    from odjax.core.selection import gumbel_top_k_mask as gumbel_top_k_mask
    from odjax.core.selection import kth_value as kth_value
    from odjax.core.selection import top_k_mask as top_k_mask
    from odjax.core.statistics import Statistic as Statistic
    from odjax.core.statistics import moments as moments
    from odjax.core.statistics import product as product
    from odjax.core.statistics import reduce_over_axis as reduce_over_axis
    from odjax.core.statistics import scan_over as scan_over
    from odjax.core.statistics import vmap_over as vmap_over
    from odjax.core.statistics import weighted_mean as weighted_mean
    from odjax.core.trees import combine as combine
    from odjax.core.trees import differences as differences
    from odjax.core.trees import partition as partition
    from odjax.heads.fixed import FixedHead as FixedHead
    from odjax.lowrank.gradient import rac_lora as rac_lora
    from odjax.registry import METHODS as METHODS
    from odjax.sparse.cannistraci_hebb import chts as chts
    from odjax.sparse.cannistraci_hebb import chtss as chtss

_FAMILIES = (
    *("continual", "core", "federated", "heads", "io", "lowrank", "models", "privacy"),
    *("registry", "sparse"),
)
_HOME = {
    "odjax.continual.shrink_perturb": ("shrink_perturb",),
    "odjax.core.class_moments": ("class_moments",),
    "odjax.core.edits": ("Edit", "as_transform", "run_edit", "run_edits"),
    "odjax.core.keys": ("fold_path", "fold_step", "keys_like"),
    "odjax.core.optimizer_state": ("map_params_state", "reset_moments"),
    "odjax.core.paths": ("Where", "label", "leaves_with_paths", "map_with_path", "select"),
    "odjax.core.report": ("tree_report",),
    "odjax.core.selection": ("gumbel_top_k_mask", "kth_value", "top_k_mask"),
    "odjax.core.statistics": (
        *("Statistic", "moments", "product", "reduce_over_axis"),
        *("scan_over", "vmap_over", "weighted_mean"),
    ),
    "odjax.core.trees": ("combine", "differences", "partition"),
    "odjax.heads.fixed": ("FixedHead",),
    "odjax.lowrank.gradient": ("rac_lora",),
    "odjax.registry": ("METHODS",),
    "odjax.sparse.cannistraci_hebb": ("chts", "chtss"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_FAMILIES, *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in _FAMILIES:
        value = importlib.import_module(f"odjax.{name}")
    else:
        raise AttributeError(f"module 'odjax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
