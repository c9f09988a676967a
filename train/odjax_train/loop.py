"""The training loop: steps, edits, evaluations, checkpoints, and every way in which it can end."""

import dataclasses
import itertools
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from odjax_train.checkpoints import Checkpoints
from odjax_train.data import Feed, evaluation_batches, feed
from odjax_train.distributed import Agreement
from odjax_train.federated.costs import costs
from odjax_train.measures import take
from odjax_train.mesh import batch_sharding
from odjax_train.metrics import Recorder
from odjax_train.program import Program, TrainState
from odjax_train.tasks import Sums, add, mean
from odjax_train.topology import Topology


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: the last state; None when it diverged.
        step: steps done.
        status: `"finished"`, `"interrupted"` or `"diverged"`.
        message: what to tell the person.
        evaluation: the last evaluation's metrics.
    """

    state: TrainState | None
    step: int
    status: str
    message: str
    evaluation: dict[str, float] | None = None


class StopRequest:
    """Whether the run was asked to stop, by SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Takes the signals; the second Ctrl-C is an ordinary one."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number).name

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Pending:
    """Metrics of the latest steps, still on the devices."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._values: list[dict[str, jax.Array]] = []

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.steps.append(step)
        self._values.append(metrics)

    def take(self) -> tuple[list[int], dict[str, np.ndarray]]:
        """Fetches and forgets them."""
        steps, values = self.steps, jax.device_get(self._values)
        self.steps, self._values = [], []
        return steps, {name: np.array([v[name] for v in values]) for name in (values[0] if values else ())}


def train(
    program: Program,
    state: TrainState,
    batches: Feed,
    checkpoints: Checkpoints,
    recorder: Recorder,
    stop: StopRequest,
    *,
    profile: tuple[Path, int] | None = None,
) -> Outcome:
    """Runs the steps that are left.

    The hot path never waits for a device: metrics are read a step after they were asked for, checkpoints are
    written behind, batches arrive ahead.

    Args:
        program: the compiled functions.
        state: where to start; donated.
        batches: standing at the state's step.
        checkpoints: where to save.
        recorder: where to log.
        stop: turns true when the run should checkpoint and end.
        profile: folder for a profiler trace, and the number of steps in it.

    Returns:
        how it ended; nothing good is overwritten when it diverged.
    """
    run = _Run(program, batches, checkpoints, recorder)
    experiment = program.experiment
    start = step = int(state.step)
    agreement = Agreement(program.mesh)
    trace = _Trace(profile, start)
    saved = start if start in checkpoints.steps() else None
    run.topology.look(state, step)
    if start == 0 and experiment.start_from is not None:
        run.evaluate(state, step, stop)  # what is improved on
    try:
        while step < experiment.last_step:
            if agreement.vote(bool(stop)):
                return run.interrupted(state, step, saved, stop.signal)
            batch = run.next_batch()
            trace.before(step)
            state, metrics = program.step(state, batch)
            step += 1
            for edit, apply in program.edits:
                if edit.due(step):
                    state = apply(state)
                    recorder.event("edit", step, edit=edit.name)
            trace.after(step, state)
            if step > 1 and (step - 1) % experiment.log_every == 0:
                # The steps before this one: they are done, or nearly, while this one has just begun.
                run.log()
            run.pending.push(step, metrics)

            last = step == experiment.last_step
            judge = last or step % experiment.eval_every == 0
            save = last or step % experiment.checkpoint_every == 0
            if judge or save:
                run.log()
            evaluation = run.evaluate(state, step, stop) if judge else None
            if save:
                run.save(state, evaluation)
                saved = step
    except _DivergedError as diverged:
        return run.diverged(diverged, saved)
    finally:
        trace.stop()
    if saved != step:
        run.save(state, run.evaluate(state, step))
    text = f"finished after step {step}"
    if step < experiment.steps:
        budget, spent = experiment.federated.budget, experiment.federated.epsilon(step)
        text += f": epsilon {spent:.4g} of {budget:g} is spent, and another round would exceed it"
    return Outcome(state, step, "finished", text, run.evaluation)


class _DivergedError(Exception):
    """A loss or a gradient was not finite."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(what)
        self.step = step


class _Run:
    """The parts of the loop that are not the hot path."""

    def __init__(self, program: Program, batches: Feed, checkpoints: Checkpoints, recorder: Recorder) -> None:
        self.program = program
        self.experiment = program.experiment
        self.batches = batches
        self.checkpoints = checkpoints
        self.recorder = recorder
        self.topology = Topology(recorder.folder, program, recorder)
        self.pending = _Pending()
        self.evaluation: dict[str, float] | None = None
        federated = self.experiment.federated
        task = self.experiment.task
        self._units = task.units(program.batch) if federated is None else federated.expected_cohort
        self._waited = 0.0
        self._clock: float | None = None
        self._aside = 0.0

    def next_batch(self) -> Any:
        start = time.perf_counter()
        batch = next(self.batches)
        self._waited += time.perf_counter() - start
        return batch

    def log(self) -> None:
        """Writes what has come in; raises when it is not finite."""
        if not self.pending.steps:
            return
        steps, values = self.pending.take()
        now = time.perf_counter()
        judged = [name for name in ("loss", "grad_norm", "update_norm") if name in values]
        finite = np.all([np.isfinite(values[name]) for name in judged], axis=0)
        good = len(steps) if finite.all() else int(np.argmin(finite))
        if good:
            self._write(steps[:good], {name: v[:good] for name, v in values.items()}, now)
        if good < len(steps):
            name = next(name for name in judged if not math.isfinite(values[name][good]))
            raise _DivergedError(steps[good], f"{name} is {values[name][good]}")

    def _write(self, steps: list[int], values: dict[str, np.ndarray], now: float) -> None:
        rate, wait = None, 0.0
        if self._clock is not None:
            seconds = max(now - self._clock - self._aside, 1e-9)
            rate, wait = self._units * len(steps) / seconds, self._waited / seconds
        self._clock, self._waited, self._aside = now, 0.0, 0.0
        metrics = {name: float(np.mean(v, dtype=np.float64)) for name, v in values.items()}
        if self.experiment.schedule is not None:
            metrics["learning_rate"] = float(self.experiment.schedule(steps[-1] - 1))
        self.recorder.train(steps[-1], metrics, rate, wait)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is not the steps'."""
        start = time.perf_counter()
        yield
        self._aside += time.perf_counter() - start

    def evaluate(
        self, state: TrainState, step: int, stop: StopRequest | None = None
    ) -> dict[str, float] | None:
        """Judges the state on the held-out examples; None when asked to stop before it was done."""
        with self.aside():
            jax.block_until_ready(state.step)
            found = evaluate(self.program, state, stop)
            if found is not None:
                self.evaluation = found
                self.recorder.evaluation(step, found)
                figures = (measure(self.program, state, stop) or {}) | costs(self.program, step)
                if figures:
                    self.recorder.measures(step, figures)
                self.topology.look(state, step)
        return found

    def save(self, state: TrainState, evaluation: dict[str, float] | None) -> None:
        with self.aside():
            try:
                step = self.checkpoints.save(state, self.batches.get_state(), evaluation)
            except FloatingPointError as error:
                raise _DivergedError(int(state.step), str(error)) from error
            self.recorder.event("checkpoint", step)

    def interrupted(self, state: TrainState, step: int, saved: int | None, name: str | None) -> Outcome:
        self.log()
        if saved != step:
            self.save(state, None)
        self.checkpoints.wait()
        self.recorder.event("interrupted", step, signal=name)
        who = name or "another process"
        message = f"stopped by {who}: checkpoint of step {step} written; the same command goes on from there"
        return Outcome(state, step, "interrupted", message)

    def diverged(self, error: _DivergedError, saved: int | None) -> Outcome:
        self.checkpoints.wait()
        position = f"batch {error.step - 1} of the data order (seed {self.experiment.seed}, counted from 0)"
        if self.experiment.federated is not None:
            position = f"round {error.step - 1} (counted from 0)"
        last = (
            "there is no checkpoint before it"
            if saved is None
            else f"the last good checkpoint is of step {saved}"
        )
        self.recorder.event("diverged", error.step, reason=str(error), checkpoint=saved)
        message = (
            f"diverged at step {error.step}: {error}, on {position}; {last}, in {self.checkpoints.folder}"
        )
        return Outcome(None, error.step, "diverged", message)


def evaluate(program: Program, state: TrainState, stop: StopRequest | None = None) -> dict[str, float] | None:
    """Means of the task's metrics over the held-out examples.

    Args:
        program: the compiled functions.
        state: what is judged.
        stop: when it turns true a process that is alone gives up, since it may be killed soon; several
            processes go on to the end together.

    Returns:
        the means, or None.
    """
    experiment = program.experiment
    params = program.evaluated(state)
    sums: Sums | None = None
    batches = feed(
        experiment.data.evaluation(),
        experiment.batch,
        batch_sharding(program.mesh),
        make_batches=evaluation_batches,
    )
    with program.context(), batches:
        for batch in itertools.islice(batches, experiment.eval_batches):
            if stop and jax.process_count() == 1:
                return None
            new = program.evaluate(params, state.collections, batch)
            sums = new if sums is None else add(sums, new)
    return {name: float(value) for name, value in jax.device_get(mean(sums)).items()}


def measure(program: Program, state: TrainState, stop: StopRequest | None = None) -> dict[str, float] | None:
    """Figures of the experiment's measures.

    Args:
        program: the compiled functions.
        state: what is judged.
        stop: as in `evaluate`.

    Returns:
        Figures by "measure/name", empty without measures; None when asked to stop before it was done.
    """
    experiment, params = program.experiment, program.evaluated(state)
    figures: dict[str, float] = {}
    for compiled in program.measures:
        held_out = compiled.measure.on == "held-out"

        def examples(held_out: bool = held_out) -> Feed:
            data = experiment.data.evaluation() if held_out else experiment.data.train(experiment.seed)
            how = {"make_batches": evaluation_batches} if held_out else {}
            return feed(data, experiment.batch, batch_sharding(program.mesh), **how)

        def stopped() -> bool:
            return bool(stop) and jax.process_count() == 1

        with program.context():
            found = take(compiled, params, state.collections, examples, stopped)
        if found is None:
            return None
        figures |= found
    return figures


class _Trace:
    """A profiler trace of a few steps, after the first ones."""

    def __init__(self, profile: tuple[Path, int] | None, start: int) -> None:
        self._folder, self._steps = profile or (None, 0)
        self._first = start + 3
        self._on = False

    def before(self, step: int) -> None:
        if self._folder is not None and step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it slows the steps down that are looked at
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._on = True

    def after(self, step: int, state: TrainState) -> None:
        if self._on and step >= self._first + self._steps:
            jax.block_until_ready(state.step)
            self.stop()

    def stop(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
