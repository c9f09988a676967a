"""Checkpoints: asynchronous, verified when they are read, restorable onto another mesh.

A checkpoint holds groups of arrays, as nested dictionaries whose keys are the parts of the paths, and two
JSON files:

    model       trained parameters, other collections, average of the parameters, step and key
    frozen      parameters that are not trained
    optimizer   the optimizer's state
    data        position of the data iterator
    record      shapes and dtypes, a checksum of every array, and which checkpoint holds "frozen"

What is not trained is written when it has changed and not again: the checkpoints of an adapter are small, and
refer to one that holds the weights, which is kept as long as one of them is. The checksums are taken on the
devices and do not depend on the layout, so a damaged file is found whatever reads it.
"""

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import checkpoint_managers as managers

from odjax.core import Where, differences, leaves_with_paths
from odjax_train.distributed import as_main, barrier, everywhere, is_main, pause
from odjax_train.errors import UserError
from odjax_train.program import TrainState
from odjax_train.stored import (
    fingerprints,
    groups_of,
    inspect,
    nested,
    rebuilt,
    signature,
    state_of,
    stored,
    stored_shapes,
)

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


class _WithHolders:
    """Keeps what one of the policies keeps, and the checkpoints that those refer to.

    Args:
        policies: of Orbax.
        holders: step -> step of the checkpoint that holds its frozen parameters.
    """

    def __init__(self, policies: Sequence[Any], holders: Mapping[int, int]) -> None:
        self._policies, self._holders = policies, holders

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of the checkpoints are kept."""
        votes = [policy.should_preserve(checkpoints, context=context) for policy in self._policies]
        kept = [any(each) for each in zip(*votes, strict=True)]
        steps = [checkpoint.step for checkpoint in checkpoints]
        needed = {self._holders.get(step) for step, keep in zip(steps, kept, strict=True) if keep}
        return [keep or step in needed for step, keep in zip(steps, kept, strict=True)]


def _unfinished(folder: Path) -> list[int]:
    names = (path.name.partition(ocp.utils.TMP_DIR_SUFFIX) for path in folder.glob("*"))
    return sorted(int(step) for step, suffix, _ in names if suffix and step.isdigit())


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: where they are; made when missing unless `read_only`.
        trainable: which parameters are trained.
        keep_last: newest ones to keep.
        keep_best: best ones to keep beside them.
        best: the metric that decides, and `"min"` or `"max"`.
        read_only: nothing is written or tidied up.
    """

    def __init__(
        self,
        folder: Path,
        *,
        trainable: Where = ".*",
        keep_last: int = 2,
        keep_best: int = 1,
        best: tuple[str, str] = ("loss", "min"),
        read_only: bool = False,
    ) -> None:
        self.folder = folder.resolve()
        self._trainable = trainable
        self._metric, mode = best
        # Checksums of frozen parameters that a checkpoint holds, and that checkpoint's step.
        self._held: tuple[tuple[int, ...], int] | None = None
        self._holders: dict[int, int] = {}
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
        # Steps of checkpoints that were being written when the run was killed; Orbax deletes them now.
        self.unfinished = _unfinished(self.folder)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_WithHolders(policies, self._holders),
                best_fn=self._score,
                best_mode=mode,
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                enable_async_checkpointing=not read_only,
            ),
        )
        if not read_only:
            for step in self.steps():
                self._refer(step)

    def _refer(self, step: int) -> None:
        """Learns which checkpoint another one refers to; a record that cannot be read refers to none."""
        try:
            holder = self._record(step).get("frozen")
        except Exception:
            holder = None
        if holder is not None:
            self._holders[step] = holder

    def _record(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record

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
        groups = stored(groups_of(state, self._trainable))
        if metrics is not None and not math.isfinite(metrics[self._metric]):
            metrics = None  # not a number is not the best of all
        prints, finite = jax.device_get(inspect(groups))
        step = int(state.step)
        if not finite:
            raise FloatingPointError(f"parameters after step {step} are not finite")
        record = {
            "step": step,
            "time": time.time(),
            "signature": {name: signature(tree) for name, tree in groups.items()},
            "fingerprints": {name: [int(p) for p in values] for name, values in prints.items()},
        }
        if "frozen" in groups:
            record["frozen"] = self._holder(step, record["fingerprints"]["frozen"])
            if record["frozen"] != step:
                del groups["frozen"]
        with self._explained(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(nested(tree)) for name, tree in groups.items()},
                    data=ocp.args.JsonSave(data),
                    record=ocp.args.JsonSave(record),
                ),
                metrics=None if metrics is None else dict(metrics),
                force=True,
            )
        return step

    def _holder(self, step: int, prints: Sequence[int]) -> int:
        """The checkpoint that holds frozen parameters with these checksums: an earlier one, or this one."""
        if self._held is None or self._held[0] != tuple(prints) or self._held[1] not in self.steps():
            self._held = tuple(prints), step
        self._holders[step] = self._held[1]
        return self._held[1]

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
        return self._newest(lambda s: self._read(s, like, optimizer=False), warn, step)

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

    def _read(self, step: int, like: TrainState, *, optimizer: bool = True) -> Restored:
        notes = self._manager.restore(
            step, args=ocp.args.Composite(data=ocp.args.JsonRestore(), record=ocp.args.JsonRestore())
        )
        record = notes.record
        wanted = groups_of(like, self._trainable)
        if not optimizer:
            del wanted["optimizer"]
        groups = {}
        for name, tree in wanted.items():
            shapes = stored_shapes(tree)
            self._check_signature(step, name, shapes, record["signature"].get(name, {}))
            holder = record["frozen"] if name == "frozen" else step
            arrays = self._manager.restore(
                holder, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(nested(shapes))})
            )[name]
            self._check_fingerprints(name, rebuilt(arrays, shapes), record["fingerprints"][name])
            groups[name] = rebuilt(arrays, tree)
        if "frozen" in groups:
            self._held = tuple(record["fingerprints"]["frozen"]), record["frozen"]
        return Restored(state=state_of(groups), step=step, data=notes.data, skipped=())

    def _check_signature(self, step: int, name: str, tree: Any, signature: Mapping[str, Any]) -> None:
        saved = {
            tuple(path.split("/")): jax.ShapeDtypeStruct(tuple(shape), dtype)
            for path, (shape, dtype) in signature.items()
        }
        found = differences(nested(tree), unflatten_dict(saved))
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            what = "optimizer" if name == "optimizer" else "model"
            raise UserError(
                f"checkpoint of step {step} in {self.folder} is of another {what}: {found[0]}{more}"
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
        pause()
        steps = [s for s in self._checkpoints.steps() if s != self._step]
        last = f"the last good one is of step {max(steps)}" if steps else "there is none before it"
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"a checkpoint could not be written to {self._checkpoints.folder}: {reason}; {last}"
        ) from error
