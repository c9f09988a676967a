"""Runs of the `odjax` command in processes of their own, for tests that kill them."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

RESUMABLE = 75

# Imports everything once, with no thread but its own, and becomes one process for each list of arguments.
_FORK = """
import json, os, sys, warnings
import odjax_train.run, odjax_train.commands
from odjax_train.cli import main

warnings.filterwarnings("ignore", message=r"os\\.fork")
for output, arguments in json.loads(sys.argv[1]):
    process = os.fork()
    if not process:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        main(arguments)
    print(process, flush=True)
ended = dict(os.wait() for _ in json.loads(sys.argv[1]))
print(json.dumps({process: os.waitstatus_to_exitcode(status) for process, status in ended.items()}))
"""


def environment() -> dict[str, str]:
    """A clean one, in which all processes share what they compile."""
    cache = pathlib.Path(tempfile.gettempdir()) / "odjax-test-processes"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST_"))}
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(*arguments: object) -> subprocess.Popen:
    """Starts `odjax ARGUMENTS`."""
    command = [sys.executable, "-m", "odjax_train", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    """Waits for the end; exit status and output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"did not end in {timeout} s:\n{output}") from None
    return process.returncode, output


class Together(NamedTuple):
    """Processes that were started together.

    Attributes:
        parent: of all of them.
        numbers: of the processes, for `os.kill`.
        outputs: files of what they print.
    """

    parent: subprocess.Popen
    numbers: tuple[int, ...]
    outputs: tuple[pathlib.Path, ...]


@contextlib.contextmanager
def together(folder: pathlib.Path, *commands: Sequence[object]) -> Iterator[Together]:
    """Starts `odjax COMMAND` for every command; they share the time of imports, and compile without effort."""
    folder.mkdir(exist_ok=True)
    outputs = tuple(folder / f"output-{i}.txt" for i in range(len(commands)))
    given = [(str(path), [*map(str, command)]) for path, command in zip(outputs, commands, strict=True)]
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    single |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    parent = subprocess.Popen(
        [sys.executable, "-c", _FORK, json.dumps(given)],
        env={**environment(), **single}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    numbers = tuple(int(parent.stdout.readline()) for _ in commands)
    try:
        yield Together(parent, numbers, outputs)
    finally:
        if parent.poll() is None:
            for number in numbers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        parent.communicate()


def ends(started: Together, timeout: float = 240) -> list[tuple[int, str]]:
    """Waits for the end of all of them; exit status and output of each."""
    try:
        last, _ = started.parent.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"did not end in {timeout} s:\n{_outputs(started)}") from None
    statuses = json.loads(last)
    return [
        (statuses[str(number)], path.read_text())
        for number, path in zip(started.numbers, started.outputs, strict=True)
    ]


def wait_for(condition: Callable[[], bool], started: Together, timeout: float = 240) -> None:
    """Waits until something is true of processes that go on meanwhile."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert started.parent.poll() is None, f"ended before their time:\n{_outputs(started)}"
        assert time.monotonic() < deadline, f"nothing in {timeout} s:\n{_outputs(started)}"
        time.sleep(0.005)


def _outputs(started: Together) -> str:
    return "\n".join(path.read_text() for path in started.outputs)


def run(*arguments: object) -> tuple[int, str]:
    """Runs `odjax ARGUMENTS` to its end."""
    return finish(start(*arguments))


def steps(folder: pathlib.Path) -> list[dict]:
    """Training lines of a run, as they came."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().split("\n")[:-1] if line]
    return [record for record in map(json.loads, lines) if record.get("kind") == "train"]


def losses(folder: pathlib.Path) -> dict[int, float]:
    """The newest loss of each step."""
    return {record["step"]: record["loss"] for record in steps(folder)}


def stop_after(
    process: subprocess.Popen, folder: pathlib.Path, step: int, number: signal.Signals
) -> tuple[int, str]:
    """Sends a signal as soon as the run has logged a step, and waits for the end.

    A kill waits for the first finished checkpoint too: one that is being written is lost.
    """
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        seen = steps(folder)
        written = number != signal.SIGKILL or any(
            path.name.isdigit() for path in (folder / "checkpoints").glob("*")
        )
        if written and seen and seen[-1]["step"] >= step:
            process.send_signal(number)
            break
        time.sleep(0.02)
    return finish(process)


def checkpoints(folder: pathlib.Path) -> list[int]:
    """Steps of a run's finished checkpoints, oldest first."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def free_port() -> int:
    """A port on the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
