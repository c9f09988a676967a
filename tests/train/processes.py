"""Runs of the `odjax` command in processes of their own, for tests that kill them."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

RESUMABLE = 75


def environment() -> dict[str, str]:
    """A clean one, in which all processes share what they compile."""
    cache = pathlib.Path(tempfile.gettempdir()) / "odjax-test-processes"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST_"))}
    return {**kept, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}


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


def free_port() -> int:
    """A port on the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
