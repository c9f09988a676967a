"""What is made of an adapted run: its weights with the factors merged, as one file."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from odjax.core import leaves_with_paths
from odjax.io.safetensors import save_safetensors
from odjax.lowrank import merge
from odjax.lowrank.adapt import Adapted
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
    model = loaded.program.experiment.model
    if not isinstance(model, Adapted):
        raise UserError(
            f"the run's model, a {type(model).__name__}, is not adapted: there is nothing to merge"
        )

    def run(params: Any) -> Any:
        weights = merge(model, params, rank=rank)
        return jax.tree.map(partial(_cast, dtype=dtype), weights)

    with loaded.program.context():
        try:
            return jax.jit(run)(loaded.program.evaluated(loaded.state))
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from error


def _cast(leaf: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    return leaf if dtype is None or not jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(dtype)


def write(path: Path, params: Any, metadata: dict[str, str]) -> int:
    """Writes parameters by path into one file, whole or not at all; one process does.

    Args:
        path: of the file.
        params: arrays of any layout.
        metadata: strings in the file's header.

    Returns:
        bytes written.

    Raises:
        UserError: when it cannot be written.
    """
    tensors = {name: _whole(leaf) for name, leaf in leaves_with_paths(params)}

    def save() -> None:
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
