"""What the training loop and the input pipeline cost, beside a bare loop of the same compiled step.

    python benchmarks/loop.py

Three ways to run the same steps of the main job's decoder, in turn, in one process:

    bare    the compiled step on one batch that never changes
    fed     the compiled step on the real data
    loop    the whole training loop: data, logging, agreement to stop, edits and checkpoints not due

Ratios of wall time and of processor time; other work on the machine disturbs the second much less.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from rich.console import Console

from odjax_train.config import load
from odjax_train.data import Feed, feed
from odjax_train.loop import StopRequest, train
from odjax_train.mesh import batch_sharding, make_mesh
from odjax_train.metrics import Recorder
from odjax_train.program import Program, build

ROOT = Path(__file__).parents[1]


Seconds = np.ndarray


def now() -> Seconds:
    """Wall time and processor time of all threads, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


class _Clock(Recorder):
    """A recorder that notes when it was called."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.marks: list[tuple[int, Seconds]] = []

    def train(self, step: int, *arguments: object) -> None:
        self.marks.append((step, now()))
        super().train(step, *arguments)

    def seconds_per_step(self) -> Seconds:
        # The last mark waits for the last step; those before it are read while the next one runs.
        (first, start), (last, end) = self.marks[0], self.marks[-2]
        return (end - start) / (last - first)


class _NoCheckpoints:
    """Checkpoints that are never due."""

    folder = Path()

    def steps(self) -> list[int]:
        return []

    def save(self, *_: object) -> int:
        return 0


def _batches(program: Program) -> Feed:
    experiment = program.experiment
    return feed(experiment.data.train(0), experiment.batch, batch_sharding(program.mesh))


def bare(program: Program, steps: int, *, constant: bool) -> Seconds:
    """Seconds a step of a loop that does nothing else."""
    with program.context(), _batches(program) as batches:
        state = program.init()
        batch = next(batches)
        state, _ = program.step(state, batch)
        jax.block_until_ready(state)
        start = now()
        for _ in range(steps):
            state, _ = program.step(state, batch if constant else next(batches))
        jax.block_until_ready(state)
        return (now() - start) / steps


def whole(program: Program, steps: int) -> Seconds:
    """Seconds a step of the training loop."""
    with (
        tempfile.TemporaryDirectory() as folder,
        program.context(),
        _batches(program) as batches,
    ):
        console = Console(file=open(Path(folder) / "console", "w"))  # noqa: SIM115
        clock = _Clock(Path(folder), steps, "tokens", console, active=True)
        train(program, program.init(), batches, _NoCheckpoints(), clock, StopRequest())
        clock.close()
        console.file.close()
        return clock.seconds_per_step()


def main(
    steps: Annotated[int, tyro.conf.arg(help="steps of each way in a round")] = 60,
    rounds: Annotated[int, tyro.conf.arg(help="rounds")] = 7,
    batch: Annotated[int, tyro.conf.arg(help="sequences in a step")] = 4,
    length: Annotated[int, tyro.conf.arg(help="bytes in a sequence")] = 128,
) -> None:
    """Prints the cost of the loop and of the input pipeline as ratios."""
    if steps < 30:
        raise SystemExit(f"--steps {steps}: at least 30, so that the loop logs three times")
    config = load(ROOT / "configs" / "lm_stdlib.py", {"batch": batch, "length": length, "steps": steps})
    never = 10**9
    experiment = dataclasses.replace(
        config.experiment(), eval_every=never, checkpoint_every=never, eval_batches=1
    )
    program, _ = build(experiment, make_mesh(experiment.mesh)).compile()
    found: dict[str, list[Seconds]] = {"bare": [], "fed": [], "loop": []}
    for _ in range(rounds):
        found["bare"].append(bare(program, steps, constant=True))
        found["fed"].append(bare(program, steps, constant=False))
        found["loop"].append(whole(program, steps))
    print(f"batch {batch} x {length}, {steps} steps a round, {rounds} rounds, {jax.devices()[0].device_kind}")
    wall, processor = 1e3 * np.median(found["bare"], axis=0)
    print(f"bare         {wall:.1f} ms a step, {processor:.1f} ms of processor time (medians)")
    for name, target in (("fed", 1.03), ("loop", 1.02)):
        ratios = np.array(found[name]) / np.array(found["bare"])
        wall, processor = np.median(ratios, axis=0)
        low, high = ratios[:, 0].min(), ratios[:, 0].max()
        spread = f"from {low:.4f} to {high:.4f}"
        print(f"{name} / bare  {wall:.4f} wall ({spread}), {processor:.4f} processor; <= {target}")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
