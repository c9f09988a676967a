"""What a row of `gpu.py` is given, and how its steps are timed. Imports neither JAX nor PyTorch."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

CHECKED_STEPS = 8
LEARNING_RATE, B1, B2, EPS, DECAY = 1e-4, 0.9, 0.95, 1e-8, 0.1
FACTOR_RATE = 1e-3

# Row -> the rows of PyTorch that do the same.
ROWS: dict[str, tuple[str, ...]] = {
    "checks-methods": (),
    "checks-sparse": (),
    "checks-kernels": (),
    "checks-torch": (),
    "full-cudnn": ("torch-full", "torch-full-compiled"),
    "torch-full": (),
    "lora-cudnn": ("torch-peft", "torch-peft-compiled"),
    "torch-peft": (),
    "rac-cudnn": ("torch-peft", "torch-peft-compiled"),
    "chtss-cudnn": ("torch-full", "torch-full-compiled"),
    "full-plain": ("torch-full", "torch-full-compiled"),
    "torch-full-compiled": (),
    "torch-peft-compiled": (),
    "lora-plain": ("torch-peft", "torch-peft-compiled"),
    "torch-llama-peft": (),
    "rac-plain": ("torch-peft", "torch-peft-compiled"),
    "chtss-plain": ("torch-full", "torch-full-compiled"),
}


class Setting(NamedTuple):
    """Of all rows of a table.

    Attributes:
        preset: of `odjax.models.decoder`.
        sizes: of the decoder: vocab, layers, width, heads, kv_heads, mlp_width, tied, rope_theta, norm_eps.
        batch: sequences in a step.
        length: tokens in a sequence.
        rank: of the factors.
        sparsity: share of absent links at the end.
        steps: timed steps in a round.
        rounds: in each of which the steps and the edit take turns.
        remat: what is kept for the backward pass, where attention is not a fused kernel.
        cache: folder of compiled programs, "" for none.
    """

    preset: str
    sizes: dict[str, Any]
    batch: int
    length: int
    rank: int
    sparsity: float
    steps: int
    rounds: int
    remat: str
    cache: str = ""


class Edit(NamedTuple):
    """A change between two steps: its name, and what makes it."""

    name: str
    run: Callable[[], None]


class Times(NamedTuple):
    """What `timed` found.

    Attributes:
        losses: of the first steps, on one batch.
        first: seconds of the very first step.
        steps: seconds of a step, one number a round.
        edits: seconds of an edit, one number a round.
        peak: bytes of the device that were ever in use, before the first edit; None where unknown.
        edit_peak: the same after the edits.
    """

    losses: list[float]
    first: float
    steps: list[float]
    edits: list[float]
    peak: int | None
    edit_peak: int | None


def timed(
    step: Callable[[], Any],
    wait: Callable[[], None],
    peak: Callable[[], int | None],
    setting: Setting,
    edit: Edit | None = None,
) -> Times:
    """Warms up on the steps whose losses are checked, then times rounds of steps, each with one edit.

    Args:
        step: makes a step and returns its loss, without waiting for the device.
        wait: waits until the device has done everything.
        peak: bytes of the device that were ever in use.
        setting: how many steps and rounds.
        edit: what takes turns with the steps.
    """

    def seconds(run: Callable[[], Any], times: int = 1) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(times):
            run()
        wait()
        return (time.perf_counter() - begin) / times

    losses: list[Any] = []
    first = seconds(lambda: losses.append(step()))
    for _ in range(CHECKED_STEPS - 1):
        losses.append(step())
    values = [float(loss) for loss in losses]
    highest = peak()
    if edit is not None:
        edit.run()
    steps, edits = [], []
    for _ in range(setting.rounds):
        steps.append(seconds(step, setting.steps))
        if edit is not None:
            edits.append(seconds(edit.run))
    return Times(values, first, steps, edits, highest, peak())


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(numbers) == 1:
        return (numbers[0],) * 3
    low, middle, high = statistics.quantiles(numbers, method="inclusive")
    return low, middle, high


def loss_problems(losses: Sequence[float], classes: int) -> list[str]:
    """What is wrong with the losses of a new model on one batch: nothing, or one line."""
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    if not all(map(math.isfinite, losses)):
        return [f"losses are not finite: {shown}"]
    if abs(losses[0] - math.log(classes)) > 2:
        return [f"the first loss is not that of a guess, {math.log(classes):.2f}: {shown}"]
    return [] if losses[-1] < losses[0] else [f"losses do not fall: {shown}"]


def first_line(error: BaseException) -> str:
    """An error in a line: its kind, but for a failed check, and where its text begins."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0] if lines else ''}"[:240]
