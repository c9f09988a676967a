"""A run that was stopped or killed goes on as if nothing had happened."""

import importlib.util
import json
import pathlib
import signal

import pytest

_spec = importlib.util.spec_from_file_location("processes", pathlib.Path(__file__).with_name("processes.py"))
processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processes)

STEPS = ("--steps", 24, "--every", 4)


@pytest.fixture(scope="module")
def config(tmp_path_factory, text_file):
    """A configuration whose steps take long enough to be killed between them."""
    path = tmp_path_factory.mktemp("config") / "resumed.py"
    path.write_text(
        f'''
import optax
from odjax.models import decoder
from odjax_train import Experiment, language_model
from odjax_train.data import Text

def experiment(steps: int = 24, every: int = 4, rate: float = 1e-3) -> Experiment:
    """A small model."""
    return Experiment(
        model=decoder("tiny", max_length=64), task=language_model(), data=Text(source="text:{text_file}", length=64),
        optimizer=optax.adam(rate), steps=steps, batch=16, ema=0.9, eval_every=every, eval_batches=1,
        checkpoint_every=every, log_every=1,
    )
'''
    )
    return path


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """Losses of a run that nobody stopped, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    status, output = processes.run("train", config, "--run", folder, *STEPS)
    assert status == 0, output
    losses = processes.losses(folder)
    assert list(losses) == list(range(1, 25))
    return losses, folder


def test_a_kill_and_two_signals_leave_the_losses_bit_identical(config, uninterrupted, tmp_path):
    folder = tmp_path / "stopped"
    resumed_at = []
    for number, step in ((signal.SIGKILL, 5), (signal.SIGTERM, 11), (signal.SIGINT, 18)):
        process = processes.start("train", config, "--run", folder, *STEPS)
        status, output = processes.stop_after(process, folder, step, number)
        if number == signal.SIGKILL:
            assert status == -signal.SIGKILL, output
            continue
        assert status == processes.RESUMABLE, output
        assert "Traceback" not in output
        last = max(processes.losses(folder))
        assert f"stopped by {number.name}: checkpoint of step {last} written" in output
        resumed_at.append(last)
    status, output = processes.run("train", config, "--run", folder, *STEPS)
    assert status == 0, output
    assert f"resuming from the checkpoint of step {resumed_at[-1]}" in output
    assert processes.losses(folder) == uninterrupted[0]
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    resumes = [event["step"] for event in events if event.get("event") == "resume"]
    assert resumes[1:] == resumed_at
    assert resumes[0] in range(4, resumed_at[0], 4)


def test_a_finished_run_says_so_and_changes_nothing(config, uninterrupted):
    _, folder = uninterrupted
    before = (folder / "metrics.jsonl").read_bytes()
    status, output = processes.run("train", config, "--run", folder, *STEPS)
    assert status == 0
    assert "has finished already, at step 24" in output
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_corrupt_newest_checkpoint_is_reported_and_the_run_goes_on_from_the_one_before(
    config, uninterrupted, tmp_path
):
    folder = tmp_path / "corrupt"
    process = processes.start("train", config, "--run", folder, *STEPS)
    status, output = processes.stop_after(process, folder, 10, signal.SIGTERM)
    assert status == processes.RESUMABLE, output
    newest = max(int(p.name) for p in (folder / "checkpoints").iterdir())
    victim = max(
        (folder / "checkpoints" / str(newest)).rglob("*"), key=lambda p: p.stat().st_size * p.is_file()
    )
    victim.write_bytes(b"\0" * victim.stat().st_size)
    status, output = processes.run("train", config, "--run", folder, *STEPS)
    assert status == 0, output
    assert f"checkpoint of step {newest} in" in output
    assert "cannot be read" in output
    assert "resuming from the checkpoint of step 8" in output
    assert len(list(folder.glob(f"unreadable-checkpoint-{newest}-*"))) == 1
    assert processes.losses(folder) == uninterrupted[0]


def test_two_processes_lose_the_same_as_one_and_restore_each_others_checkpoints(config, tmp_path):
    mesh = ("--mesh", "2,2,2")

    def two(folder):
        address = f"localhost:{processes.free_port()}"
        return [
            processes.start(
                "train", config, "--run", folder, "--cpu-devices", 4, *mesh, *STEPS,
                "--coordinator", address, "--processes", 2, "--process", i,
            )
            for i in (0, 1)
        ]  # fmt: skip

    def one(folder):
        return processes.start("train", config, "--run", folder, "--cpu-devices", 8, *mesh, *STEPS)

    # Two processes begin, one of them is asked to stop and both do; one process goes on.
    first = tmp_path / "two-then-one"
    both = two(first)
    asked = processes.stop_after(both[1], first, 10, signal.SIGTERM)
    other = processes.finish(both[0])
    assert asked[0] == other[0] == processes.RESUMABLE, asked[1] + other[1]
    assert "another process" in other[1]
    assert "step" not in asked[1], "only process 0 speaks"
    status, output = processes.finish(one(first))
    assert status == 0, output

    # One process begins, two go on.
    second = tmp_path / "one-then-two"
    process = one(second)
    assert processes.stop_after(process, second, 8, signal.SIGTERM)[0] == processes.RESUMABLE
    for process in two(second):
        status, output = processes.finish(process)
        assert status == 0, output

    # Whoever made a step, its loss is the same.
    losses = processes.losses(first), processes.losses(second)
    assert list(losses[0]) == list(losses[1]) == list(range(1, 25))
    assert losses[0][24] < losses[0][1]
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=1e-4)


def test_what_one_process_finds_wrong_ends_all_of_them_with_the_same_line(config, tmp_path):
    (tmp_path / "file").write_text("")
    address = f"localhost:{processes.free_port()}"
    both = [
        processes.start(
            "train", config, "--run", tmp_path / "file" / "run", "--cpu-devices", 4, *STEPS,
            "--coordinator", address, "--processes", 2, "--process", i,
        )
        for i in (0, 1)
    ]  # fmt: skip
    for status, output in [processes.finish(process, timeout=90) for process in both]:
        assert status == 2, output
        assert "cannot be written: Not a directory" in output
