"""What a run says while it goes: `metrics.jsonl`, TensorBoard events, and a progress bar or lines."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class _Pace:
    """Seconds a step, smoothed; evaluations and checkpoints are part of it."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._mark: tuple[float, int] | None = None

    def observe(self, step: int) -> None:
        now = time.perf_counter()
        if self._mark is not None and step > self._mark[1]:
            new = (now - self._mark[0]) / (step - self._mark[1])
            self.seconds = new if self.seconds is None else 0.8 * self.seconds + 0.2 * new
        self._mark = (now, step)


class _Events:
    """TensorBoard's event file. No thread writes it: a full disk is noticed where it is written to."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()

    def scalar(self, tag: str, value: float, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))
        if time.monotonic() - self._flushed > 10:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class Recorder:
    """Appends to a run's logs. A process that is not the main one gets one that does nothing.

    Args:
        folder: the run's folder.
        steps: steps of the whole run, for the bar.
        unit: what the throughput counts.
        console: where people read.
        active: whether to write at all.
    """

    def __init__(self, folder: Path, steps: int, unit: str, console: Console, *, active: bool) -> None:
        self.folder = folder
        self._active = active
        self._console = console
        self._steps = steps
        self._unit = unit
        self._pace = _Pace()
        if not active:
            return
        path = folder / "metrics.jsonl"
        cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a", buffering=1)
        if cut:
            self._file.write("\n")  # a kill came in the middle of a line
        self._events = _Events(folder / "events")
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("train", total=steps, status="")
        self._bar.start()

    def train(self, step: int, metrics: Mapping[str, float], rate: float | None, data: float) -> None:
        """A line about the steps since the last one.

        Args:
            step: steps done.
            metrics: means over those steps.
            rate: units a second; None when not measured yet.
            data: share of the time spent waiting for data.
        """
        if not self._active:
            return
        extra = {} if rate is None else {f"{self._unit}_per_second": rate, "data_wait": data}
        self._write("train", step, {**metrics, **extra})
        name = "loss" if "loss" in metrics else "update_norm"  # the loss of clients may be private
        status = f"{name.replace('_', ' ')} {metrics[name]:.4f}"
        if rate is not None:
            status += f"  {_short(rate)} {self._unit}/s"
        self._pace.observe(step)
        if self._pace.seconds is not None:
            status += f"  ETA {_clock(self._pace.seconds * (self._steps - step))}"
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._steps}  {status}", highlight=False)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The result of an evaluation."""
        if not self._active:
            return
        self._write("eval", step, metrics)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._console.print(f"step {step}/{self._steps}  held out: {shown}", highlight=False)

    def measures(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of the measures, by "measure/name"."""
        if not self._active:
            return
        self._write("measures", step, figures)
        for measure in dict.fromkeys(name.split("/")[0] for name in figures):
            own = {n.partition("/")[2]: v for n, v in figures.items() if n.startswith(f"{measure}/")}
            shown = "  ".join(f"{name} {value:.4g}" for name, value in own.items())
            self._console.print(f"step {step}/{self._steps}  {measure}: {shown}", highlight=False)

    def topology(self, step: int, figures: Mapping[str, float], leaves: Mapping[str, Any]) -> None:
        """What the links of a sparse model are like.

        Args:
            step: steps done.
            figures: of all sparse leaves together.
            leaves: path -> figures of one leaf.
        """
        if self._active:
            self._write("topology", step, figures, leaves=leaves)

    def event(self, name: str, step: int, **details: Any) -> None:
        """Something that happened: a resume, an edit, a checkpoint, the end."""
        if self._active:
            self._line({"event": name, "step": step, "time": time.time(), **details})

    def say(self, text: str) -> None:
        """A line for people."""
        if self._active:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Flushes everything and takes the bar down."""
        if self._active:
            self._bar.stop()
            try:
                self._events.close()
            finally:
                self._file.close()

    def _write(self, kind: str, step: int, metrics: Mapping[str, float], **details: Any) -> None:
        self._line({"kind": kind, "step": step, "time": time.time(), **metrics, **details})
        for name, value in metrics.items():
            if math.isfinite(value):
                self._events.scalar(f"{kind}/{name}", value, step)

    def _line(self, record: Mapping[str, Any]) -> None:
        safe = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in record.items()}
        self._file.write(json.dumps(safe) + "\n")


def read(folder: Path) -> tuple[dict[str, dict[int, dict[str, Any]]], list[dict[str, Any]]]:
    """Reads a run's `metrics.jsonl`.

    A resumed run repeats the steps after its checkpoint; the newest line of a step counts.

    Returns:
        `{"train": {step: metrics}, "eval": ..., "topology": ..., "measures": ...}` in the order of the steps,
        and the events as they came.
    """
    kinds = ("train", "eval", "topology", "measures")
    series: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in kinds}
    events = []
    for record in _lines(folder / "metrics.jsonl"):
        if "event" in record:
            events.append(record)
        else:
            series[record["kind"]][record["step"]] = record
    return {kind: dict(sorted(values.items())) for kind, values in series.items()}, events


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
