"""Merged moments keep the variance where the one-pass textbook formula loses it."""

from pathlib import Path

import jax
import numpy as np

from odjax.core.statistics import moments, scan_over, vmap_over
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures the error of the variance in float32 against float64, as the mean grows against the spread.

    Args:
        folder: where the plot is written.
        quick: fewer numbers.
        seed: of the numbers.

    Returns:
        The claims.
    """
    batches, rows = (64, 64) if quick else (1024, 256)
    noise = np.random.default_rng(seed).normal(size=batches * rows)
    ratios = 10.0 ** np.arange(0, 7)
    stat = moments()
    drivers = {
        drive.__name__: jax.jit(lambda x, drive=drive: stat.result(drive(stat, (x,))).variance)
        for drive in (scan_over, vmap_over)
    }
    errors: dict[str, list[float]] = {name: [] for name in (*drivers, "textbook")}
    for ratio in ratios:
        x = (ratio + noise).astype(np.float32)
        truth = x.astype(np.float64).var()
        for name, drive in drivers.items():
            errors[name].append(abs(float(drive(x.reshape(batches, rows))) - truth) / truth)
        textbook = np.mean(x * x, dtype=np.float32) - np.mean(x, dtype=np.float32) ** 2
        errors["textbook"].append(abs(float(textbook) - truth) / truth)

    def plot(axes: object) -> None:
        for name, error in errors.items():
            axes.loglog(ratios, np.maximum(error, 1e-9), marker="o", label=name)
        axes.set(xlabel="mean / standard deviation", ylabel="relative error of the variance (float32)")
        axes.legend()

    name = save_figure(folder / "chan_moments.svg", plot)
    worst = max(max(errors[driver]) for driver in drivers)
    claims = (
        Claim(
            "The variance of float32 data is right to 1e-4 for a mean up to a million standard deviations.",
            "relative error at most 1e-4",
            f"{worst:.1e}",
            worst <= 1e-4,
        ),
        Claim(
            "The one-pass textbook formula E[x^2] - E[x]^2 loses all digits there.",
            "relative error above 0.1 at 1e6: not one right digit",
            f"{errors['textbook'][-1]:.1e}",
            errors["textbook"][-1] > 0.1,
        ),
    )
    return Proof("chan-moments", claims, quick, (name,))
