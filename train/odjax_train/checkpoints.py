"""Checkpoints: asynchronous, verified when they are read, restorable onto another mesh.

A checkpoint holds two groups of arrays, as nested dictionaries whose keys are the parts of the paths, and two
JSON files:

    model       parameters, other collections, average of the parameters, step and key: enough to evaluate
    optimizer   the optimizer's state
    data        position of the data iterator
    record      shapes and dtypes, and a checksum of every array

The checksums are taken on the devices and do not depend on the layout, so a damaged file is found whatever
reads it.
"""

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import checkpoint_managers as managers

from odjax.core import differences, leaves_with_paths
from odjax_train.distributed import as_main, barrier, everywhere, is_main
from odjax_train.errors import UserError
from odjax_train.program import TrainState

# Orbax logs every directory it makes, and forgets the reads that were under way when one fails.
logging.getLogger("absl").setLevel(logging.ERROR)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class CorruptCheckpointError(Exception):
    """A checkpoint's arrays are not those that were written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored state, with what a run needs to go on.

    Attributes:
        state: laid out as asked.
        step: steps done.
        data: position of the data iterator.
        skipped: step and reason of every newer checkpoint that could not be read.
    """

    state: TrainState
    step: int
    data: dict[str, Any]
    skipped: tuple[tuple[int, str], ...]


def _groups(state: TrainState) -> dict[str, dict[str, Any]]:
    return {
        "model": {
            "step": state.step,
            "key": state.key,
            "params": state.params,
            "collections": state.collections,
            "ema": state.ema,
        },
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }


def _stored(tree: Any) -> Any:
    """Random keys as the numbers they are made of."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _implementation(leaf: Any) -> str:
    names = ("threefry2x32", "rbg", "unsafe_rbg")
    return next(name for name in names if jax.random.key(0, impl=name).dtype == leaf.dtype)


def _stored_shapes(tree: Any) -> Any:
    """The shapes that `_stored` arrays have, in their layout."""

    def stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not _is_key(leaf):
            return leaf
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

    return jax.tree.map(stored, tree)


def _nested(tree: Any) -> dict[str, Any]:
    """The tree as nested dictionaries of strings, whatever containers it is made of."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves_with_paths(tree)})


def _rebuilt(nested: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `_nested`, with the containers of `like`."""
    found = dict(leaves_with_paths(nested))
    leaves = [
        jax.random.wrap_key_data(found[path], impl=_implementation(leaf)) if _is_key(leaf) else found[path]
        for path, leaf in leaves_with_paths(like)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def fingerprints(tree: Any) -> jax.Array:
    """A 32-bit checksum of the bits of every leaf, with their positions; `[leaves]` uint32.

    Every element is mixed with its position before the sum. Sums of integers wrap and commute, so the value
    does not depend on how the leaves are sharded; a change goes unnoticed with a chance of 2^-32.
    """
    return jnp.stack([_fingerprint(leaf) for leaf in jax.tree.leaves(tree)])


def _fingerprint(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_ or leaf.dtype.name in ("int4", "uint4", "int2", "uint2"):
        leaf = leaf.astype(jnp.int8)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(leaf.dtype.itemsize, 4)}").astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size) + index
    mixed = bits ^ (position * jnp.uint32(0x9E3779B1) + jnp.uint32(0x85EBCA6B))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats])) if floats else jnp.array(True)


@jax.jit
def _inspect(groups: Any) -> tuple[Any, jax.Array]:
    return {name: fingerprints(tree) for name, tree in groups.items()}, _all_finite(groups["model"])


def _signature(tree: Any) -> dict[str, list[Any]]:
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves_with_paths(tree)}


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: where they are; made when missing unless `read_only`.
        keep_last: newest ones to keep.
        keep_best: best ones to keep beside them.
        best: the metric that decides, and `"min"` or `"max"`.
        read_only: nothing is written or tidied up.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        best: tuple[str, str] = ("loss", "min"),
        read_only: bool = False,
    ) -> None:
        self.folder = folder.resolve()
        self._metric, mode = best
        policies = [managers.LatestN(keep_last)]
        if keep_best:
            policies.append(
                managers.BestN(
                    get_metric_fn=self._score,
                    reverse=mode == "min",
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._better = min if mode == "min" else max
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy(policies),
                best_fn=self._score,
                best_mode=mode,
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=not read_only,
            ),
        )

    @staticmethod
    def finished(folder: Path) -> list[int]:
        """Steps of the finished checkpoints in a folder, without opening it."""
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())

    def _score(self, metrics: Mapping[str, float]) -> float:
        return metrics[self._metric]

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Step of the best checkpoint that was evaluated, None when there is none."""
        scored = [(self._manager.metrics(step), step) for step in self.steps()]
        scored = [(metrics[self._metric], step) for metrics, step in scored if metrics]
        return self._better(scored)[1] if scored else None

    def save(
        self, state: TrainState, data: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> int:
        """Starts to write a checkpoint; the arrays are copied before this returns, the rest goes on behind.

        Returns:
            the step it is of.

        Raises:
            FloatingPointError: when a parameter is not finite; nothing is written.
            UserError: when this one, or the one before it, could not be written.
        """
        groups = _stored(_groups(state))
        if metrics is not None and not math.isfinite(metrics[self._metric]):
            metrics = None  # not a number is not the best of all
        prints, finite = jax.device_get(_inspect(groups))
        step = int(state.step)
        if not finite:
            raise FloatingPointError(f"parameters after step {step} are not finite")
        record = {
            "step": step,
            "time": time.time(),
            "signature": {name: _signature(tree) for name, tree in groups.items()},
            "fingerprints": {name: [int(p) for p in values] for name, values in prints.items()},
        }
        with self._explained(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(_nested(tree)) for name, tree in groups.items()},
                    data=ocp.args.JsonSave(data),
                    record=ocp.args.JsonSave(record),
                ),
                metrics=None if metrics is None else dict(metrics),
                force=True,
            )
        return step

    def wait(self) -> None:
        """Returns when everything is on the disk."""
        with self._explained(None):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes writing and lets go of the folder."""
        with self._explained(None):
            self._manager.close()

    def _explained(self, step: int | None) -> "_Explained":
        return _Explained(self, step)

    def restore(
        self,
        like: TrainState,
        *,
        warn: Callable[[str], None],
        step: int | None = None,
    ) -> Restored | None:
        """Reads the newest readable checkpoint, or the one of `step`.

        Args:
            like: `TrainState` of `ShapeDtypeStruct`s with the shardings wanted.
            warn: told about every checkpoint that is passed over, in one line.
            step: that one and no other.

        Returns:
            None when there is no checkpoint at all.

        Raises:
            UserError: when a checkpoint is of another model (its first differing path and shapes are named),
                when the one asked for does not exist, or when none can be read.
        """
        return self._newest(lambda s: self._read(s, like), warn, step)

    def restore_model(
        self, like: TrainState, *, warn: Callable[[str], None], step: int | None = None
    ) -> Restored | None:
        """As `restore`, without reading the optimizer's state (`opt_state` is None)."""
        return self._newest(lambda s: self._read(s, like, ("model",)), warn, step)

    def _newest(
        self, read: Callable[[int], Restored], warn: Callable[[str], None], step: int | None
    ) -> Restored | None:
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.folder}; there are {steps}")
        skipped = []
        for candidate in reversed(steps) if step is None else [step]:
            restored, reason = None, "another process cannot read it"
            try:
                restored = read(candidate)
            except (UserError, MemoryError):
                raise
            except Exception as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                reason = " ".join(str(error).split()) or type(error).__name__
            # What one process cannot read is passed over by all of them.
            if everywhere(restored is not None):
                return dataclasses.replace(restored, skipped=tuple(skipped))
            skipped.append((candidate, reason))
            warn(f"checkpoint of step {candidate} in {self.folder} cannot be read: {reason[:300]}")
        if skipped:
            raise UserError(f"no checkpoint in {self.folder} can be read (tried {[s for s, _ in skipped]})")
        return None

    def _read(self, step: int, like: TrainState, names: tuple[str, ...] = ("model", "optimizer")) -> Restored:
        notes = self._manager.restore(
            step, args=ocp.args.Composite(data=ocp.args.JsonRestore(), record=ocp.args.JsonRestore())
        )
        wanted = {name: tree for name, tree in _groups(like).items() if name in names}
        groups = _stored_shapes(wanted)
        for name, tree in groups.items():
            self._check_signature(step, name, tree, notes.record["signature"][name])
        arrays = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(_nested(tree)) for name, tree in groups.items()}
            ),
        )
        for name, tree in groups.items():
            found = _rebuilt(arrays[name], tree)
            self._check_fingerprints(name, found, notes.record["fingerprints"][name])
        groups = {name: _rebuilt(arrays[name], tree) for name, tree in wanted.items()}
        model = groups["model"]
        state = TrainState(
            **model, opt_state=groups["optimizer"]["opt_state"] if "optimizer" in groups else None
        )
        return Restored(state=state, step=step, data=notes.data, skipped=())

    def _check_signature(self, step: int, name: str, tree: Any, signature: Mapping[str, Any]) -> None:
        saved = {
            tuple(path.split("/")): jax.ShapeDtypeStruct(tuple(shape), dtype)
            for path, (shape, dtype) in signature.items()
        }
        found = differences(_nested(tree), unflatten_dict(saved))
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UserError(
                f"checkpoint of step {step} in {self.folder} is of another {name}: {found[0]}{more}"
            )

    @staticmethod
    def _check_fingerprints(name: str, tree: Any, expected: list[int]) -> None:
        prints = jax.device_get(jax.jit(fingerprints)(tree))
        for (path, _), got, wanted in zip(leaves_with_paths(tree), prints, expected, strict=True):
            if int(got) != wanted:
                raise CorruptCheckpointError(f"{name}/{path} is not what was written (checksum)")

    def set_aside(self, step: int) -> Path:
        """Renames an unreadable checkpoint so that its step can be written again; it is never deleted."""
        source = self.folder / str(step)
        target = self.folder.parent / f"unreadable-checkpoint-{step}-{as_main(int(time.time()))}"
        if is_main() and source.exists():
            shutil.move(source, target)
        barrier(f"set aside {step}")
        self._manager.reload()
        return target


class _Explained:
    """Turns what the file system says into one line that names the checkpoint and the last good one."""

    def __init__(self, checkpoints: Checkpoints, step: int | None) -> None:
        self._checkpoints, self._step = checkpoints, step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception):
            return
        steps = [s for s in self._checkpoints.steps() if s != self._step]
        last = f"the last good one is of step {max(steps)}" if steps else "there is none before it"
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"a checkpoint could not be written to {self._checkpoints.folder}: {reason}; {last}"
        ) from error
