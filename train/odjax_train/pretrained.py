"""Starting from the parameters of another run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from odjax.core import leaves_with_paths
from odjax_train import run_folder
from odjax_train.checkpoints import Checkpoints, fingerprints
from odjax_train.errors import UserError


def start_from(folder: Path, params: Any) -> tuple[Any, str]:
    """Takes over what another run has learned; the parameters that it did not have stay as they are.

    Where that run kept an average of its parameters, the average is taken.

    Args:
        folder: the other run's folder; its newest checkpoint is read.
        params: the new model's parameters, already laid out.

    Returns:
        the parameters, in the same structure and layout, and a line about what came from where.

    Raises:
        UserError: when the folder is not a run's, holds no readable checkpoint, or has a parameter that the
            model does not have with that shape.
    """
    run_folder.read(folder)
    steps = Checkpoints.finished(folder / "checkpoints")
    if not steps:
        raise UserError(f"{folder} holds no checkpoint to start from")
    step = max(steps)
    at = (folder / "checkpoints" / str(step)).resolve()
    record = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(at / "record")
    saved = record["signature"]["model"]
    prints = dict(zip(saved, record["fingerprints"]["model"], strict=True))
    mine = dict(leaves_with_paths(params))
    sources = _sources(folder, saved, mine)
    arrays = _read(at / "model", {source: (mine[path], saved[source]) for path, source in sources.items()})
    for source, array in arrays.items():
        if int(jax.jit(fingerprints)([array])[0]) != prints[source]:
            raise UserError(
                f"checkpoint of step {step} in {folder}: {source} is not what was written (checksum)"
            )
    taken = {path: arrays[source].astype(mine[path].dtype) for path, source in sources.items()}
    new = [path for path in mine if path not in taken]
    text = f"starting from {folder} (step {step}): {len(taken)} parameters taken over"
    text += f", {len(new)} new ones" if new else ""
    leaves = [taken.get(path, leaf) for path, leaf in mine.items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves), text


def _sources(folder: Path, saved: Mapping[str, Any], mine: Mapping[str, jax.Array]) -> dict[str, str]:
    """Path in the model -> path in the checkpoint."""
    names = [name.removeprefix("params/") for name in saved if name.startswith("params/")]
    for name in names:
        shape = tuple(saved[f"params/{name}"][0])
        if name not in mine:
            raise UserError(f"{folder} has a parameter {name} {shape} that this model does not have")
        if mine[name].shape != shape:
            raise UserError(f"{folder} has {name} with shape {shape}, this model with {mine[name].shape}")
    return {name: f"ema/{name}" if f"ema/{name}" in saved else f"params/{name}" for name in names}


def _read(path: Path, wanted: Mapping[str, tuple[jax.Array, Any]]) -> dict[str, jax.Array]:
    """Reads those arrays and no others, each laid out like its parameter."""
    shapes = {
        tuple(source.split("/")): jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)
        for source, (leaf, (_, dtype)) in wanted.items()
    }
    item = unflatten_dict(shapes)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    found = reader.restore(
        path, args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
    )
    return {"/".join(parts): array for parts, array in flatten_dict(found).items()}
