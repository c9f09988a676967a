"""One of four processes dies: the others end at once, say which and why, and the same command goes on."""

import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

_spec = importlib.util.spec_from_file_location("processes", pathlib.Path(__file__).with_name("processes.py"))
processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processes)

STEPS, EVERY = 32, 8
# A process that is stopped holds up the others; what they do without it is over by then.
SETTLED = 1.0


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration whose steps are cheap and take a while."""
    folder = tmp_path_factory.mktemp("config")
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (96, 4, 4, 1), np.uint8), draw.integers(0, 4, 96)
    np.savez(folder / "images.npz", x=images, y=labels)
    (folder / "chaos.py").write_text(
        f'''
import dataclasses
import time

import jax
import optax
from odjax.models import MLP
from odjax_train import Experiment, classification
from odjax_train.data import Examples, Images

@dataclasses.dataclass(frozen=True, kw_only=True)
class Slow(Images):
    broken: int = -1

    def train(self, seed):
        examples = super().train(seed)

        def read(rows, draws):
            time.sleep(0.08)
            if jax.process_index() == self.broken:
                raise RuntimeError("the disk has come off")
            return examples.read(rows, draws)

        return Examples(read, examples.size, seed=seed, fingerprint=examples.fingerprint)

def experiment(broken: int = -1) -> Experiment:
    """A small model."""
    return Experiment(
        model=MLP(features=(16, 16, 4)), task=classification(),
        data=Slow(source="npz:{folder / "images.npz"}", classes=4, shape=(4, 4, 1), broken=broken),
        optimizer=optax.adam(1e-2),
        steps={STEPS}, batch=16, eval_every={STEPS}, eval_batches=1, checkpoint_every={EVERY}, log_every=1,
    )
'''
    )
    return folder / "chaos.py"


def several(config: pathlib.Path, run: pathlib.Path, count: int, *flags: object):
    """The same command in several processes."""
    shared = ("train", config, "--run", run, "--cpu-devices", 1, *flags)
    shared += ("--coordinator", f"localhost:{processes.free_port()}", "--processes", count)
    commands = [(*shared, "--process", process) for process in range(count)]
    return processes.together(run.with_name(f"{run.name}-output"), *commands)


def four(config: pathlib.Path, run: pathlib.Path):
    """Four processes of one device."""
    return several(config, run, 4, "--mesh", "2,2,1")


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """Losses of four processes that nobody killed, and their folder."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with four(config, run) as started:
        for status, output in processes.ends(started):
            assert status == 0, output
    losses = processes.losses(run)
    assert list(losses) == list(range(1, STEPS + 1))
    return losses, run


def unfinished(run: pathlib.Path) -> list[int]:
    """Steps of the checkpoints that are being written."""
    return [int(path.name.partition(".")[0]) for path in (run / "checkpoints").glob("*.orbax*")]


def kill_in_a_step(started, run: pathlib.Path, victim: int) -> None:
    """Stops a process, so that the others are in a step with it, and kills it there."""
    before, seen = processes.checkpoints(run), len(processes.steps(run))
    processes.wait_for(lambda: processes.checkpoints(run) != before, started)
    processes.wait_for(lambda: len(processes.steps(run)) > seen + 1, started)
    os.kill(started.numbers[victim], signal.SIGSTOP)
    time.sleep(SETTLED)
    os.kill(started.numbers[victim], signal.SIGKILL)


def kill_in_a_checkpoint(started, run: pathlib.Path, victim: int) -> None:
    """Kills a process whose part of a checkpoint is still missing."""
    processes.wait_for(lambda: "resuming" in started.outputs[0].read_text(), started)
    while True:
        processes.wait_for(lambda: unfinished(run), started)
        os.kill(started.numbers[victim], signal.SIGSTOP)
        time.sleep(SETTLED)
        if unfinished(run):
            os.kill(started.numbers[victim], signal.SIGKILL)
            return
        os.kill(started.numbers[victim], signal.SIGCONT)  # its part was there already: the next one


def test_whoever_of_four_dies_the_others_say_so_and_the_same_command_goes_on(config, uninterrupted, tmp_path):
    run = tmp_path / "run"
    left, last = [], 0
    for kill, victim in ((kill_in_a_step, 2), (kill_in_a_checkpoint, 1), (kill_in_a_step, 0), (None, None)):
        with four(config, run) as started:
            if kill is not None:
                kill(started, run, victim)
            ended = processes.ends(started, timeout=30 if kill else 240)
        heading = ended[0][1]
        assert (f"resuming from the checkpoint of step {last}" in heading) == (last > 0), heading
        for step in left:
            assert f"passing over the checkpoint of step {step}: it was not finished" in heading
        if kill is None:
            break
        kept, left = processes.checkpoints(run), unfinished(run)
        assert left or kill is not kill_in_a_checkpoint
        assert kept[-1] > last or kill is kill_in_a_checkpoint
        last = kept[-1]
        line = f"odjax: process {victim} of 4 is gone (killed, crashed, or its machine cannot be reached); "
        line += f"the last checkpoint is of step {last}, the same command goes on from there\n"
        for process, (status, output) in enumerate(ended):
            if process == victim:
                assert status == -signal.SIGKILL
                continue
            assert status == processes.RESUMABLE, output
            assert output.count("odjax:") == 1, output
            assert line in output
    assert [status for status, _ in ended] == [0] * 4, ended
    assert processes.losses(run) == uninterrupted[0]


def test_a_checkpoint_of_four_devices_goes_on_on_two_and_on_eight(config, uninterrupted, tmp_path):
    losses, whole = uninterrupted
    middle, end = processes.checkpoints(whole)[-2:]
    assert 0 < middle < end == STEPS
    runs = {2: "1,2,1", 8: "2,2,2"}
    for devices in runs:
        shutil.copytree(whole, tmp_path / str(devices))
        shutil.rmtree(tmp_path / str(devices) / "checkpoints" / str(end))
    commands = [
        ("train", config, "--run", tmp_path / str(devices), "--cpu-devices", devices, "--mesh", mesh)
        for devices, mesh in runs.items()
    ]
    with processes.together(tmp_path / "output", *commands) as started:
        ended = processes.ends(started)
    for devices, (status, output) in zip(runs, ended, strict=True):
        assert status == 0, output
        assert f"{devices} x cpu" in output
        assert f"resuming from the checkpoint of step {middle}" in output
        again = [record["step"] for record in processes.steps(tmp_path / str(devices))][STEPS:]
        assert again == list(range(middle + 1, STEPS + 1))
        assert processes.losses(tmp_path / str(devices)) == pytest.approx(losses, rel=1e-4)


def test_what_breaks_one_process_alone_ends_the_others_with_its_status_and_its_words(config, tmp_path):
    with several(config, tmp_path / "run", 2, "--mesh", "2,1,1", "--broken", 1) as started:
        ended = processes.ends(started, timeout=120)
    own = "RuntimeError: the disk has come off (--debug shows where)"
    for (status, output), line in zip(ended, (f"process 1 of 2 failed: {own}", own), strict=True):
        assert status == 1, output
        assert output.count("odjax:") == 1, output
        assert f"odjax: {line}\n" in output


_WATCH = """
import os, signal, socket, sys, time
from odjax_train import watch

watch._GRACE = float(sys.argv[1])
for scene in sys.argv[2:]:
    here, there = socket.socketpair()
    process = os.fork()
    if not process:
        os.dup2(1, 2)
        watched = watch.Watch(1, 2, {0: here})
        watched.advice = lambda: "and so on"
        exec(scene)
        time.sleep(60)
    print(scene, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


def test_an_abort_in_native_code_is_explained_by_the_death_that_caused_it():
    """JAX aborts a process when process 0 is gone; the line must be there whichever comes first."""
    dead, bare = "there.shutdown(socket.SHUT_WR); os.abort()", "os.abort()"
    asked = "os.kill(os.getpid(), signal.SIGABRT)"
    command = [sys.executable, "-W", "ignore", "-c", _WATCH, "0.5", dead, bare, asked]
    lines = subprocess.check_output(command, env=processes.environment(), text=True).splitlines()
    gone = "odjax: process 0 of 2 is gone (killed, crashed, or its machine cannot be reached); and so on"
    aborted = "odjax: process 1 of 2 was aborted, the lines above say why; and so on"
    assert lines[:2] == [gone, f"{dead} {processes.RESUMABLE}"]
    assert lines[2:4] == [aborted, f"{bare} {-signal.SIGABRT}"]
    assert lines[4:] == [aborted, f"{asked} {-signal.SIGABRT}"]
