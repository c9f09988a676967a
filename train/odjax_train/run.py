"""From a configuration to a run: opens what it needs, resumes what is there, trains, and says how it
ended."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from odjax.core import tree_report
from odjax_train import run_folder
from odjax_train.checkpoints import Checkpoints, Restored
from odjax_train.config import Config, load, parse
from odjax_train.data import Feed, feed
from odjax_train.distributed import advise, as_main, is_main, same_everywhere, together
from odjax_train.errors import UserError
from odjax_train.experiment import Experiment
from odjax_train.federated import secret as secrets
from odjax_train.federated.costs import describe
from odjax_train.federated.feed import RoundFeed, opened
from odjax_train.flags import TrainFlags
from odjax_train.loop import Outcome, StopRequest, evaluate, measure, train
from odjax_train.mesh import MeshShape, batch_sharding, bytes_per_device, make_mesh
from odjax_train.metrics import Recorder
from odjax_train.pretrained import require, start_from
from odjax_train.program import Program, build
from odjax_train.sampling import continue_text
from odjax_train.stored import groups_of

# What is left of the disk when all kept checkpoints and the one being written are there.
_ROOM = 1.1


def start(
    config: Config,
    folder: Path | None,
    *,
    mesh: MeshShape | None,
    profile: int,
    stop: StopRequest,
) -> Outcome:
    """Trains the configuration's experiment in its folder, from where the folder stands.

    Args:
        config: the configuration with its arguments.
        folder: the run's folder, None for the default one.
        mesh: instead of the experiment's own.
        profile: steps to trace.
        stop: turns true when the run should end.
    """
    console = Console(stderr=False, soft_wrap=True)
    folder = run_folder.default_folder(config) if folder is None else folder
    experiment = config.experiment()
    program = _built(experiment, mesh)
    data = together(lambda: _described(experiment))
    same_everywhere(np.frombuffer(str(data).encode().ljust(4096)[:4096], np.uint8), "data")
    details = {
        "data": data,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(program.mesh.shape),
        "unit": experiment.unit,
        "steps": experiment.steps,
        "best": list(experiment.task.best),
        **({} if experiment.federated is None else {"federated": describe(program)}),
        "parameters": tree_report(program.state.params, trainable=experiment.trainable),
    }
    found = together(lambda: run_folder.claim(folder, config, details) if is_main() else False)
    resuming = bool(as_main(found))
    together(lambda: run_folder.read(folder))  # all processes must see the same storage
    needed = int(_ROOM * _checkpoint_bytes(program))
    together(lambda: run_folder.require_space(folder, needed) if is_main() else None)
    advise(lambda: _advice(folder))
    secret = _secret(experiment, folder)

    try:
        return _train(program, folder, secret, data, details["parameters"], resuming, profile, stop, console)
    except OSError as error:
        kept = Checkpoints.finished(folder / "checkpoints")
        last = f"the last good checkpoint is of step {max(kept)}" if kept else "there is no checkpoint yet"
        raise UserError(f"{folder}: {error.strerror or error}; {last}") from error


def _described(experiment: Experiment) -> dict[str, Any]:
    """The data, as a report may tell of it."""
    federated = experiment.federated
    if federated is None:
        return experiment.data.describe()
    federated.require(experiment.data.clients().count)
    return experiment.data.describe_publicly() if federated.is_private else experiment.data.describe()


def _secret(experiment: Experiment, folder: Path) -> int | None:
    """What cohorts and noise of a private run follow from, drawn when it begins."""
    if experiment.federated is None or not experiment.federated.is_private:
        return None

    def made() -> None:
        if not (folder / secrets.FILE).exists() and not Checkpoints.finished(folder / "checkpoints"):
            secrets.create(folder)

    together(lambda: made() if is_main() else None)
    return together(lambda: secrets.read(folder))


def _advice(folder: Path) -> str:
    """How to go on when the run ends now."""
    kept = Checkpoints.finished(folder / "checkpoints")
    if not kept:
        return "there is no checkpoint yet, the same command begins again"
    return f"the last checkpoint is of step {max(kept)}, the same command goes on from there"


def _train(
    program: Program,
    folder: Path,
    secret: int | None,
    data: dict[str, Any],
    parameters: str,
    resuming: bool,
    profile: int,
    stop: StopRequest,
    console: Console,
) -> Outcome:
    """Opens logs, checkpoints and data, trains, and closes them however it ends."""
    experiment = program.experiment
    with contextlib.ExitStack() as opened:
        recorder = together(
            lambda: Recorder(folder, experiment.last_step, experiment.unit, console, active=is_main())
        )
        opened.callback(recorder.close)
        checkpoints = _checkpoints(folder, experiment)
        opened.callback(checkpoints.close)
        recorder.say(_heading(program, folder, data, parameters))
        for step in checkpoints.unfinished:
            recorder.say(f"passing over the checkpoint of step {step}: it was not finished")
        restored = checkpoints.restore(program.state, warn=recorder.say) if resuming else None
        if restored is None:
            if experiment.start_from is not None:
                together(lambda: require(experiment.start_from))
            with program.context():
                state = program.init()
            if experiment.start_from is not None:
                params, text = start_from(experiment.start_from, state.params, experiment.model)
                state = program.started(state, params)
                recorder.say(text)
        else:
            state = restored.state
            _settle(restored, checkpoints, recorder)
            if restored.step >= experiment.last_step:
                text = f"{folder} has finished already, at step {restored.step}"
                text += "; give --run another folder to start again"
                return Outcome(state, restored.step, "finished", text)
            recorder.say(f"resuming from the checkpoint of step {restored.step}")
            recorder.event("resume", restored.step, skipped=[newer for newer, _ in restored.skipped])
        program, seconds = program.compile()
        ahead = ["step"] if experiment.federated is None else []
        what = " and ".join([*ahead, *(edit.name for edit in experiment.edits)])
        if what:
            recorder.say(f"{what} compiled in {seconds:.1f} s")
        batches = _batches(program, secret)
        opened.callback(batches.close)
        if restored is not None:
            batches.set_state(restored.data)
        trace = (folder / "profile", profile) if profile else None
        with program.context():
            outcome = train(program, state, batches, checkpoints, recorder, stop, profile=trace)
        if outcome.status == "finished" and experiment.sample is not None:
            _sample(program, outcome, recorder)
        return outcome


def _batches(program: Program, secret: int | None) -> Feed | RoundFeed:
    experiment = program.experiment
    if experiment.federated is None:
        return feed(experiment.data.train(experiment.seed), experiment.batch, batch_sharding(program.mesh))
    return opened(program, secret)


def _built(experiment: Experiment, mesh: MeshShape | None) -> Program:
    """The program; what the model or a pattern refuses is the person's to correct."""
    try:
        return build(experiment, make_mesh(mesh or experiment.mesh))
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error


def _settle(restored: Restored, checkpoints: Checkpoints, recorder: Recorder) -> None:
    """Moves the checkpoints that could not be read out of the way."""
    for step, _ in restored.skipped:
        target = checkpoints.set_aside(step)
        recorder.say(f"moved the checkpoint of step {step} to {target}")


def _checkpoints(folder: Path, experiment: Experiment, *, read_only: bool = False) -> Checkpoints:
    return Checkpoints(
        folder / "checkpoints",
        trainable=experiment.trainable,
        keep_last=experiment.keep_last,
        keep_best=experiment.keep_best,
        best=experiment.task.best,
        read_only=read_only,
    )


def _checkpoint_bytes(program: Program) -> int:
    """Of all kept checkpoints and the one being written; what only edits change may be written once."""
    experiment = program.experiment
    copies = experiment.keep_last + experiment.keep_best + 1
    groups = groups_of(program.state, experiment.trainable)
    return sum(
        (1 if name == "frozen" and not experiment.edits else copies)
        * leaf.size
        * np.dtype(leaf.dtype).itemsize
        for name, tree in groups.items()
        for leaf in jax.tree.leaves(tree)
    )


def _heading(program: Program, folder: Path, data: dict[str, Any], parameters: str) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    device = jax.devices()[0].device_kind
    held = bytes_per_device(program.state, program.shardings) / 2**20
    found = ", ".join(f"{name} {value}" for name, value in data.items())
    federated = program.experiment.federated
    private = federated is not None and federated.privacy is not None
    promise = f"\n{_promise(program.experiment)}" if private else ""
    return (
        f"{parameters}\n"
        f"run {folder}: {jax.device_count()} x {device}, mesh {mesh}, {held:.1f} MiB of state a device\n"
        f"data: {found}{promise}"
    )


def _promise(experiment: Experiment) -> str:
    """What a private run promises, and what that rests on."""
    text = f"privacy: {experiment.federated.privacy}"
    if experiment.federated.is_forecast:
        return text
    text += (
        "; cohorts and noise follow from the file `secret` of the run's folder, of which only the parameters "
        "and epsilon may be shown"
    )
    before = _promise_before(experiment.start_from)
    if before is not None:
        text += (
            f"; it starts from a private run ({before}): who has data in both has spent both epsilons, and "
            "only those of this run are counted"
        )
    return text


def _promise_before(start_from: Path | None) -> str | None:
    """The promise of the run that this one starts from."""
    if start_from is None or not (start_from / "run.json").exists():
        return None
    described = run_folder.read(start_from).get("federated", {})
    return described["privacy"] if "to be shown" in described else None


def _sample(program: Program, outcome: Outcome, recorder: Recorder) -> None:
    sample = program.experiment.sample
    text = continue_text(program, outcome.state, sample)
    if is_main():
        recorder.event("sample", outcome.step, prompt=sample.prompt, text=text)
        recorder.say(f"a sample after {sample.prompt!r}:\n{sample.prompt}{text}")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A run's experiment with one of its checkpoints, without the optimizer.

    Attributes:
        program: its functions.
        state: `opt_state` is None.
        step: steps done.
    """

    program: Program
    state: Any
    step: int


def reopen(folder: Path, *, step: int | None, best: bool, mesh: MeshShape | None) -> Loaded:
    """Loads a run for evaluation or generation.

    Args:
        folder: the run's folder.
        step: which checkpoint; the newest readable one when None.
        best: the best one that was evaluated.
        mesh: instead of the experiment's own.

    Raises:
        UserError: when the folder is not a run's or holds no such checkpoint.
    """
    record = run_folder.read(folder)
    config, _ = parse(load(folder / "config.py"), TrainFlags, record["flags"], f"the flags of {folder}")
    experiment = config.experiment()
    program = _built(experiment, mesh)
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} holds no checkpoint yet")
    checkpoints = _checkpoints(folder, experiment, read_only=True)
    if best:
        step = checkpoints.best()
        if step is None:
            raise UserError(f"{folder} holds no checkpoint that was evaluated")
    restored = checkpoints.restore_model(program.state, warn=_warn, step=step)
    if restored is None:
        raise UserError(f"{folder} holds no checkpoint yet")
    return Loaded(program, restored.state, restored.step)


def _warn(text: str) -> None:
    if is_main():
        print(text, file=sys.stderr)


def judge(loaded: Loaded) -> dict[str, float]:
    """Metrics of a loaded run on the held-out examples, and the figures of its measures."""
    return evaluate(loaded.program, loaded.state) | measure(loaded.program, loaded.state)
