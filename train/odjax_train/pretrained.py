"""Starting from the parameters of another run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from odjax import lowrank
from odjax.core import leaves_with_paths
from odjax.io.huggingface import load_bert, load_llama, load_vit
from odjax.io.safetensors import load_safetensors
from odjax.lowrank import Adapted, Guard
from odjax.lowrank.factors import LEAVES
from odjax.models import Bert, Decoder, ViT
from odjax_train import run_folder
from odjax_train.checkpoints import Checkpoints
from odjax_train.errors import UserError
from odjax_train.stored import fingerprints

# Model -> how it is loaded, and which of its attributes the folder need not decide.
_LOADERS = {
    Decoder: (load_llama, ("max_length",)),
    Bert: (load_bert, ("max_length", "classes", "pooling")),
    ViT: (load_vit, ("classes",)),
}
_NOT_ARCHITECTURE = {
    *("max_length", "classes", "pool", "pooling", "interpolation", "dropout", "drop_path"),
    *("attention", "remat", "scan", "dtype", "param_dtype", "head", "parent", "name"),
}


def start_from(source: Path, params: Any, model: nn.Module) -> tuple[Any, str]:
    """Takes over what another run has learned; the parameters that it did not have stay as they are.

    Where that run kept an average of its parameters, the average is taken. Factors of an adapted model that
    start from the weights (PiSSA, DoRA) are set from those taken over.

    Args:
        source: the other run's folder, whose newest checkpoint is read; a `.safetensors` file of parameters
            by path, such as `odjax merge` writes; or a folder of Hugging Face (`config.json` and safetensors)
            of a decoder, a BERT or a ViT, which every process reads whole.
        params: the new model's parameters, already laid out.
        model: the new model.

    Returns:
        the parameters, in the same structure and layout, and a line about what came from where.

    Raises:
        UserError: when there is no such run or file, it cannot be read, or it has a parameter that the model
            does not have with that shape.
    """
    if isinstance(model, Guard):  # its parameters are those of its backbone, and a new head
        model = model.backbone
    mine = dict(leaves_with_paths(params))
    if source.suffix == ".safetensors":
        taken, name = _from_file(source, mine)
    elif _is_huggingface(source):
        taken, name = _from_huggingface(source, mine, model)
    else:
        taken, name = _from_run(source, mine)
    taken = {path: array.astype(mine[path].dtype) for path, array in taken.items()}
    new = [path for path in mine if path not in taken]
    text = f"starting from {name}: {len(taken)} parameters taken over"
    text += f", {len(new)} new ones" if new else ""
    leaves = [taken.get(path, leaf) for path, leaf in mine.items()]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    if isinstance(model, Adapted) and not any(path.rpartition("/")[2] in LEAVES for path in taken):
        layout = jax.tree.map(lambda leaf: leaf.sharding, params)
        params = jax.jit(lambda tree: lowrank.start_from(model, tree), out_shardings=layout)(params)
    return params, text


def require(source: Path) -> None:
    """Raises where there is nothing to start from, before anything is computed.

    Args:
        source: as of `start_from`.

    Raises:
        UserError: there is no such run, file or folder, or it cannot be read.
    """
    if source.suffix == ".safetensors":
        _opened(source)
    elif not _is_huggingface(source):
        run_folder.read(source)
        if not Checkpoints.finished(source / "checkpoints"):
            raise UserError(f"{source} holds no checkpoint to start from")


def _is_huggingface(source: Path) -> bool:
    return (source / "config.json").is_file() and not (source / "run.json").exists()


def _opened(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_safetensors(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _from_run(folder: Path, mine: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], str]:
    require(folder)
    step = max(Checkpoints.finished(folder / "checkpoints"))
    at = (folder / "checkpoints" / str(step)).resolve()
    record = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(at / "record")
    parts = [group for group in ("model", "frozen") if group in record["signature"]]
    saved = {name: shape for part in parts for name, shape in record["signature"][part].items()}
    sources = _sources(folder, saved, mine)
    taken = {}
    for part in parts:
        names = record["signature"][part]
        prints = dict(zip(names, record["fingerprints"][part], strict=True))
        held = at if part == "model" else at.parent / str(record["frozen"])
        wanted = {path: source for path, source in sources.items() if source in names}
        arrays = _read(held / part, {source: (mine[path], saved[source]) for path, source in wanted.items()})
        for path, source in wanted.items():
            if int(jax.jit(fingerprints)([arrays[source]])[0]) != prints[source]:
                raise UserError(
                    f"checkpoint of step {step} in {folder}: {source} is not what was written (checksum)"
                )
            taken[path] = arrays[source]
    return taken, f"{folder} (step {step})"


def _from_file(path: Path, mine: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], str]:
    return _placed(path, _opened(path), mine), str(path)


def _from_huggingface(
    folder: Path, mine: Mapping[str, jax.Array], model: nn.Module
) -> tuple[dict[str, jax.Array], str]:
    bare = model.inner if isinstance(model, Adapted) else model
    if type(bare) not in _LOADERS:
        known = ", ".join(kind.__name__ for kind in _LOADERS)
        raise UserError(f"{folder}: a {type(bare).__name__} cannot be loaded from there, only {known}")
    load, kept = _LOADERS[type(bare)]
    try:
        loaded, params = load(folder, **{name: getattr(bare, name) for name in ("scan", *kept)})
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
    wrong = [
        f"{field.name} {_resolved(bare, field.name)!r} here, {_resolved(loaded, field.name)!r} there"
        for field in dataclasses.fields(bare)
        if field.name not in _NOT_ARCHITECTURE
        and _resolved(bare, field.name) != _resolved(loaded, field.name)
    ]
    if wrong:
        raise UserError(f"{folder} is of another model: {'; '.join(wrong)}")
    return _placed(folder, dict(leaves_with_paths(params)), mine), str(folder)


def _resolved(model: nn.Module, name: str) -> Any:
    """An attribute, or what stands for it where it is None."""
    value = getattr(model, name)
    if value is None and name == "mlp_width":
        return 4 * model.width
    if value is None and name in ("kv_heads", "head_dim"):
        return model.heads if name == "kv_heads" else model.width // model.heads
    return value


def _placed(
    source: Path, tensors: Mapping[str, np.ndarray], mine: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Each tensor laid out like its parameter; a process reads what its devices hold."""
    for name, tensor in tensors.items():
        _check(source, name, tensor.shape, mine)
    return {
        name: jax.make_array_from_callback(tensor.shape, mine[name].sharding, tensor.__getitem__)
        for name, tensor in tensors.items()
    }


def _check(source: Path, name: str, shape: tuple[int, ...], mine: Mapping[str, jax.Array]) -> None:
    """Raises unless the model has that parameter with that shape."""
    if name not in mine:
        hint = "; odjax merge puts factors into the weights" if name.rpartition("/")[2] in LEAVES else ""
        raise UserError(f"{source} has a parameter {name} {shape} that this model does not have{hint}")
    if mine[name].shape != shape:
        raise UserError(f"{source} has {name} with shape {shape}, this model with {mine[name].shape}")


def _sources(folder: Path, saved: Mapping[str, Any], mine: Mapping[str, jax.Array]) -> dict[str, str]:
    """Path in the model -> path in the checkpoint."""
    names = [name.removeprefix("params/") for name in saved if name.startswith("params/")]
    for name in names:
        _check(folder, name, tuple(saved[f"params/{name}"][0]), mine)
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
