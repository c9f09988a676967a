"""What the links of a sparse model are like while it trains: looked at when a run is judged, never in a step.

topology.json   figures of every sparse leaf and the degrees of its neurons, at the first look and the newest
topology.npz    packed masks, one bit a weight: the links of the newest look, and all that were ever seen

A look fetches one bit a weight (0.9 GB of a model with 7 billion sparse weights) and writes twice that. Links
that come and go between two looks are not seen, so the share of places that were ever tried is a lower bound.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from odjax.core import leaves_with_paths
from odjax.core.matrices import MatrixView, view_of
from odjax.core.paths import is_stacked
from odjax.sparse.masks import unpack
from odjax.sparse.report import Degrees, degrees, leaf_report, observe_links
from odjax_train.distributed import as_main, is_main
from odjax_train.mesh import replicated
from odjax_train.metrics import Recorder
from odjax_train.program import Program, TrainState, packed_masks
from odjax_train.run_folder import write_text
from odjax_train.topology_page import FILE, read

Words = dict[str, np.ndarray]
NPZ = "topology.npz"


class Topology:
    """The looks of one run; without sparse leaves they do nothing.

    Args:
        folder: the run's folder, in which a resumed run finds what was seen before.
        program: the run's functions.
        recorder: where the figures go.
    """

    def __init__(self, folder: Path, program: Program, recorder: Recorder) -> None:
        masks = packed_masks(program.state.opt_state)
        leaves = leaves_with_paths(program.state.params)
        self._leaves = {path: leaf for path, leaf in leaves if path in masks and len(leaf.shape) > 1}
        self._folder, self._recorder = folder, recorder
        if not self._leaves:
            return
        views = {path: _view(path, leaf.shape) for path, leaf in self._leaves.items()}
        self._degrees = jax.jit(
            lambda words: {
                path: degrees(unpack(words[path], leaf.shape), views[path])
                for path, leaf in self._leaves.items()
            },
            out_shardings=replicated(program.mesh),
        )
        stored = _read(folder, self._leaves) if is_main() else None
        self._ever, self._last, seen = stored or ({}, {}, -1)
        self._seen = as_main(seen)

    def look(self, state: TrainState, step: int) -> None:
        """Looks at the links; every process must call it.

        A step that was looked at before the run was interrupted is passed over: the run repeats itself.

        Args:
            state: of the run.
            step: steps done.
        """
        if not self._leaves or step <= self._seen:
            return
        found = packed_masks(state.opt_state)
        masks = {path: found[path] for path in self._leaves}
        counts = jax.device_get(self._degrees(masks))
        words = {path: _fetched(mask) for path, mask in masks.items()}
        self._seen = step
        if is_main():
            self._write(step, words, counts)

    def _write(self, step: int, words: Words, counts: Mapping[str, Degrees]) -> None:
        self._ever = observe_links(self._ever, words) if self._ever else words
        rows, seen = {}, {}
        for path, leaf in self._leaves.items():
            rows[path] = leaf_report(path, leaf, counts[path])
            seen[path] = _ones(self._ever[path])
        links, places = (sum(getattr(row, name) for row in rows.values()) for name in ("links", "size"))
        figures = {
            "density": links / places,
            "active_in": sum(r.active_in for r in rows.values()) / sum(r.n_in for r in rows.values()),
            "active_out": sum(r.active_out for r in rows.values()) / sum(r.n_out for r in rows.values()),
            "explored": sum(seen.values()) / places,
        }
        if self._last:
            new = sum(_ones(words[path] & ~self._last[path]) for path in words)
            figures["moved"] = new / max(links, 1)
        self._last = words
        each = {path: {"in": row.active_in_rate, "out": row.active_out_rate} for path, row in rows.items()}
        self._recorder.topology(step, figures, each)
        look = {
            "step": step,
            "leaves": [
                {**row._asdict(), "seen": seen[path], "degrees": _counted(counts[path])}
                for path, row in rows.items()
            ],
        }
        pictures = {"first": look, **read(self._folder), "newest": look}
        write_text(self._folder / FILE, json.dumps(pictures))
        self._save(step)

    def _save(self, step: int) -> None:
        # Last: a look that was cut short is repeated whole.
        temporary = self._folder / f".{NPZ}.{os.getpid()}"
        arrays = {f"{kind}/{path}": mask for kind, path, mask in self._stored()}
        with temporary.open("wb") as file:
            np.savez(file, step=np.int64(step), **arrays)
        temporary.replace(self._folder / NPZ)

    def _stored(self) -> list[tuple[str, str, np.ndarray]]:
        kinds = (("ever", self._ever), ("last", self._last))
        return [(kind, path, mask) for kind, words in kinds for path, mask in words.items()]


def _read(folder: Path, leaves: Mapping[str, Any]) -> tuple[Words, Words, int] | None:
    """All links seen, the newest ones, and the step of the last look; None where a file does not serve."""
    try:
        with np.load(folder / NPZ) as stored:
            ever, last = ({path: stored[f"{kind}/{path}"] for path in leaves} for kind in ("ever", "last"))
            return ever, last, int(stored["step"])
    except (FileNotFoundError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _view(path: str, shape: tuple[int, ...]) -> MatrixView:
    try:
        return view_of(path, shape)
    except ValueError:  # a leaf of somebody else's model: its last axis is what it gives
        batch = tuple(range(int(is_stacked(path) and len(shape) > 2)))
        return MatrixView(batch, tuple(range(len(batch), len(shape) - 1)), (len(shape) - 1,))


def _fetched(words: jax.Array) -> np.ndarray:
    """The whole of an array whose parts may be on other machines."""
    if words.is_fully_addressable:
        return np.asarray(jax.device_get(words))
    return np.asarray(multihost_utils.process_allgather(words, tiled=True))


def _ones(words: np.ndarray) -> int:
    return int(np.bitwise_count(words).sum(dtype=np.int64))


def _counted(found: Degrees) -> dict[str, list[list[int]]]:
    """For each side the degrees that occur, and how many neurons have each."""
    sides = zip(("in", "out"), found, strict=True)
    return {side: [x.tolist() for x in np.unique(np.ravel(each), return_counts=True)] for side, each in sides}
