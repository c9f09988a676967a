"""What is made of an adapted run: its weights with the factors merged, as one file; its adapter, for PEFT."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from odjax.core import leaves_with_paths, map_with_path, select
from odjax.io import PathMap, names_of, save_peft, save_safetensors, to_tensors
from odjax.lowrank import merge
from odjax.lowrank.adapt import Adapted
from odjax.lowrank.factors import LEAVES
from odjax.lowrank.methods import CHAINS
from odjax.models import Decoder
from odjax_train.distributed import is_main, together
from odjax_train.errors import UserError
from odjax_train.run import Loaded


def merged(loaded: Loaded, *, rank: int | None = None, dtype: DTypeLike | None = None) -> Any:
    """Parameters of the bare model, with the factors in the weights.

    Args:
        loaded: a run of an adapted model.
        rank: `dylora` only: serve the first so many ranks.
        dtype: of the floating parameters; None keeps theirs.

    Raises:
        UserError: the run's model is not adapted, or that rank cannot be served.
    """
    model = _adapted(loaded, "merge")

    def run(params: Any) -> Any:
        weights = merge(model, params, rank=rank)
        return jax.tree.map(partial(_cast, dtype=dtype), weights)

    with loaded.program.context():
        try:
            return jax.jit(run)(loaded.program.evaluated(loaded.state))
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from error


def _adapted(loaded: Loaded, verb: str) -> Adapted:
    model = loaded.program.experiment.model
    if not isinstance(model, Adapted):
        raise UserError(
            f"the run's model, a {type(model).__name__}, is not adapted: there is nothing to {verb}"
        )
    return model


def torch_names(loaded: Loaded) -> PathMap:
    """The names that `transformers` gives to the arrays of a run's model.

    Raises:
        UserError: it has no such model.
    """
    try:
        return names_of(loaded.program.experiment.model)
    except ValueError as error:
        raise UserError(str(error)) from error


def export(loaded: Loaded, folder: Path, *, base: str | None = None) -> None:
    """Writes the factors as an adapter that PEFT loads, and whole what was trained beside them.

    One process does.

    Args:
        loaded: a run of an adapted model.
        folder: for `adapter_config.json` and `adapter_model.safetensors`.
        base: name or folder of the weights it belongs to, for its configuration.

    Raises:
        UserError: the run's model is not adapted or has no names there, the weights have changed too (by a
            restart, or `pissa`), or it cannot be written.
    """
    model = _adapted(loaded, "export")
    edits = loaded.program.experiment.edits
    if model.spec.method in CHAINS and any(
        edit.due(step) for edit in edits for step in range(1, loaded.step + 1)
    ):
        raise UserError(
            f"the run has merged blocks into its weights by step {loaded.step}: the factors of the last "
            "block alone are not what it learned; odjax merge writes the weights"
        )
    names = torch_names(loaded)
    if model.spec.method == "pissa":
        raise UserError("pissa has changed the weights beside its factors; odjax merge writes the weights")
    task = "CAUSAL_LM" if isinstance(model.inner, Decoder) else None
    if getattr(model.inner, "classes", None) is not None:
        task = "SEQ_CLS"
    params = loaded.program.evaluated(loaded.state)
    trained = select(params, loaded.program.experiment.trainable)
    factors = {path for path, _ in leaves_with_paths(params) if path.rpartition("/")[2] in LEAVES}
    beside = {path for path, hit in leaves_with_paths(trained) if hit} - factors
    # Of the weights that stay, only the shapes are looked at.
    params = map_with_path(lambda path, leaf: _whole(leaf) if path in factors | beside else leaf, params)

    def save() -> None:
        try:
            whole = (lambda path, _: path in beside) if beside else None
            save_peft(folder, model, params, names, base_model=base, task_type=task, save=whole)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from error

    together(lambda: save() if is_main() else None)


def _cast(leaf: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    return leaf if dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(dtype)


def write(path: Path, params: Any, metadata: dict[str, str], names: PathMap | None = None) -> int:
    """Writes parameters by path into one file, whole or not at all; one process does.

    Args:
        path: of the file.
        params: arrays of any layout.
        metadata: strings in the file's header.
        names: in PyTorch; None writes ours.

    Returns:
        bytes written.

    Raises:
        UserError: when it cannot be written.
    """
    if jax.process_count() > 1:  # one process alone copies an array at a time
        params = jax.tree.map(_whole, params)

    def save() -> None:
        tensors = dict(leaves_with_paths(params)) if names is None else to_tensors(params, names)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_safetensors(path, tensors, metadata)
        except OSError as error:
            raise UserError(f"--out {path}: cannot be written: {error.strerror or error}") from error

    together(lambda: save() if is_main() else None)
    return os.path.getsize(path) if is_main() else 0


def _whole(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
