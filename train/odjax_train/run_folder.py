"""A run's folder: what it is a run of, and everything it leaves behind.

run.json            the configuration, its resolved arguments, versions, devices, data; written once
config.py           the configuration's text as it was
metrics.jsonl       one JSON object a line
events/             TensorBoard
checkpoints/        Orbax
topology.json, .npz  links of a sparse model
secret              what cohorts and noise of a private run follow from; for its owner alone
report.html         plots
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from odjax.core import format_bytes
from odjax_train.config import Config
from odjax_train.errors import UserError

_PACKAGES = ("odjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def default_folder(config: Config) -> Path:
    """`runs/<config>`, with a short code when the arguments are not the defaults."""
    changed = {name: value for name, value in config.arguments.items() if value != config.defaults.get(name)}
    code = hashlib.blake2s(_json(changed).encode()).hexdigest()[:6] if changed else ""
    return Path("runs") / "-".join(filter(None, [config.path.stem, code]))


def identity(config: Config) -> dict[str, Any]:
    """What makes two runs the same experiment."""
    return {"config": config.path.name, "text": config.text, "arguments": config.arguments}


def claim(folder: Path, config: Config, details: Mapping[str, Any]) -> bool:
    """Takes the folder for a run of this configuration.

    Args:
        folder: the run's folder; made when missing.
        config: the configuration, with its arguments.
        details: anything else worth recording.

    Returns:
        whether the folder held this very run already.

    Raises:
        UserError: when it belongs to another experiment (what differs is said), or cannot be written.
    """
    path = folder / "run.json"
    if path.exists():
        _check_same(folder, read(folder), identity(config))
        return True
    if folder.is_dir() and any(folder.iterdir()) and (folder / "checkpoints").exists():
        raise UserError(f"--run {folder}: holds checkpoints but no run.json; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.py", config.text)
        record = {
            **identity(config),
            "flags": config.flags,
            "path": os.path.relpath(config.path),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "commit": _commit(config.path.parent),
            **details,
        }
        write_text(path, _json(record, indent=2))
    except OSError as error:
        raise UserError(f"--run {folder}: cannot be written: {error.strerror or error}") from error
    return False


def _check_same(folder: Path, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = recorded["arguments"], json.loads(_json(now["arguments"]))
    missing = object()
    changed = [
        f"{name}: {before.get(name)!r} there, {after.get(name)!r} now"
        for name in sorted({*before, *after})
        if before.get(name, missing) != after.get(name, missing)
    ]
    if recorded["config"] != now["config"]:
        changed.insert(0, f"configuration: {recorded['config']} there, {now['config']} now")
    elif recorded["text"] != now["text"]:
        pairs = zip(recorded["text"].splitlines(), now["text"].splitlines(), strict=False)
        line = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), "the last one on")
        changed.append(f"the text of {now['config']} has changed from line {line}")
    if changed:
        raise UserError(
            f"--run {folder} belongs to a different experiment ({'; '.join(changed)}); give another folder"
        )


def read(folder: Path) -> dict[str, Any]:
    """The run's record.

    Raises:
        UserError: when the folder is not a run's.
    """
    path = folder / "run.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run: there is no {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def require_space(folder: Path, needed: int) -> None:
    """Fails now rather than at the first checkpoint.

    Args:
        folder: where it will be written.
        needed: bytes of all checkpoints; what those that are there take up is part of it.

    Raises:
        UserError: when the folder cannot be written or its disk has less room.
    """
    probe = folder / ".writable"
    held = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    try:
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"--run {folder}: cannot be written: {error.strerror or error}") from error
    needed -= held
    if free < needed:
        raise UserError(
            f"--run {folder}: {format_bytes(free)} free, the checkpoints need {format_bytes(needed)}"
        )


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, sort_keys=True, default=str)


def _commit(folder: Path) -> str | None:
    """The git commit of the configuration's repository, with a `+` when the tree has changes."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
