"""Fixed heads beside a learnable one: as accurate, without parameters, and with features that collapse.

The paper's own experiment trains ResNet-50 and ResNet-101 on ImageNet and moves to fine-grained sets, which
needs accelerators. Here perceptrons learn scikit-learn's digits and, from `mnist.npz` in the folder of the
environment variable ODJAX_DATA_DIR, MNIST; Omniglot, `omniglot/images_background_small1.zip`, is in that
folder too. The quick proof, and the full one where there is no MNIST, are the digits alone.

Statistics of collapse are of the features that the classifier sees: of length 1 below a fixed head, as they
are below the learnable one. Since that is a choice, the learnable head is judged by the better of both.
"""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from odjax_train.proofs.cifar_features import spread
from odjax_train.proofs.etf_head_figures import METRICS, collapse_figure, feature_figure
from odjax_train.proofs.etf_head_training import (
    CE,
    DR,
    HEADS,
    LEARNABLE,
    Data,
    Recipe,
    Trained,
    accuracy,
    class_vectors,
    collapse,
    train,
)
from odjax_train.proofs.etf_head_transfer import (
    OMNIGLOT,
    Target,
    Transfer,
    digits_transfers,
    omniglot,
    probe,
    shrunk,
)
from odjax_train.proofs.proof import Claim, Proof

DIGITS = Recipe()
MNIST = Recipe(widths=(256, 64), epochs=15, batch=128)
IMAGES, TRANSFERS = 10_000, 5
PILOT = {"new classes": "91.0 / 93.9 / 86.5 %", "another domain": "87.9 / 85.8 / 77.1 %"}


class Row(NamedTuple):
    """One head on one data set: the networks, test accuracy [seeds] in per cent, metric -> [seeds]."""

    trained: Trained
    accuracy: np.ndarray
    metrics: dict[str, np.ndarray]


def digits() -> tuple[Data, Data]:
    """scikit-learn's digits: 1200 to train on, 597 to test, after a fixed shuffle."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    x = jnp.asarray(raw.data[order] / 16, jnp.float32)
    y = jnp.asarray(raw.target[order], jnp.int32)
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def mnist(path: Path, images: int = IMAGES) -> tuple[Data, Data]:
    """MNIST: images [n, 784] in 0..1 and labels, some for training and all for testing."""
    with np.load(path) as file:
        train, test = (
            (
                jnp.asarray(file[f"x_{part}"][:count].reshape(-1, 784), jnp.float32) / 255,
                jnp.asarray(file[f"y_{part}"][:count], jnp.int32),
            )
            for part, count in (("train", images), ("test", None))
        )
    return train, test


def table(data: tuple[Data, Data], recipe: Recipe, seeds: int, seed: int) -> dict[str, Row]:
    """Trains the three heads and measures them.

    Args:
        data: to train on and to test on.
        recipe: of all trainings.
        seeds: networks a head.
        seed: of them.

    Returns:
        Head -> what was measured. A metric of the learnable head is the smaller one of that of its features
        as they are and that of length 1.
    """
    rows = {}
    for head in HEADS:
        trained = train(head, data[0], 10, recipe, seeds, seed)
        metrics = collapse(trained, data[0], normalized=True)
        if head == LEARNABLE:
            raw = collapse(trained, data[0], normalized=False)
            metrics = {name: min(raw[name], value, key=np.mean) for name, value in metrics.items()}
        rows[head] = Row(trained, accuracy(trained, data[1]), metrics)
    return rows


def _means(rows: dict[str, Row]) -> dict[str, dict[str, float]]:
    return {head: {name: float(row.metrics[name].mean()) for name in METRICS} for head, row in rows.items()}


def experiment_claims(name: str, rows: dict[str, Row], points: float) -> list[Claim]:
    """Equal accuracy and collapse on one data set.

    Args:
        name: of the data set.
        rows: what was measured.
        points: the largest difference in accuracy that counts as equal.

    Returns:
        The claims.
    """
    score = {head: float(row.accuracy.mean()) for head, row in rows.items()}
    gaps = {head: score[head] - score[LEARNABLE] for head in (CE, DR)}
    seeds = len(rows[DR].accuracy)
    means = _means(rows)
    times = {metric: means[LEARNABLE][metric] / means[DR][metric] for metric in METRICS}
    shown = {metric: " / ".join(f"{means[head][metric]:.3f}" for head in HEADS) for metric in METRICS}
    return [
        Claim(
            f"Heads without weights are as accurate as a learnable one ({name}).",
            f"differences of at most {points} points, means of {seeds} seeds",
            f"{gaps[CE]:+.2f} (CE) and {gaps[DR]:+.2f} points (DR); test accuracy "
            + ", ".join(f"{head} {spread(row.accuracy)} %" for head, row in rows.items()),
            max(abs(gap) for gap in gaps.values()) <= points,
        ),
        Claim(
            f"Dot regression leaves less spread within the classes of the training images ({name}).",
            "spread within / between at least 2.5 times smaller than with a learnable head",
            f"{times['within_between']:.1f} times ({' / '.join(HEADS)}: {shown['within_between']})",
            times["within_between"] >= 2.5,
        ),
        Claim(
            f"With it the class means form a simplex and match the class vectors ({name}).",
            "NC2 and NC3 at least 5 times smaller than with a learnable head",
            f"{times['nc2']:.1f} and {times['nc3']:.1f} times (NC2 {shown['nc2']}, NC3 {shown['nc3']})",
            min(times["nc2"], times["nc3"]) >= 5,
        ),
    ]


def constancy_claims(rows: dict[str, Row]) -> list[Claim]:
    """What a fixed head keeps, and that it stays what it was.

    Args:
        rows: what was measured.

    Returns:
        The claims.
    """
    kept = {head: (row.trained.head_bytes, row.trained.optimizer_bytes) for head, row in rows.items()}
    shown = ", ".join(f"{head} {a:,} + {b:,}" for head, (a, b) in kept.items())
    d, classes = class_vectors(rows[LEARNABLE].trained.model, rows[LEARNABLE].trained.variables).shape[1:]
    learnable = 4 * (d + 1) * classes
    changed, numbers = 0, 0
    for head in (CE, DR):
        trained = rows[head].trained
        for before, after in zip(
            jax.tree.leaves(trained.before["constants"]),
            jax.tree.leaves(trained.variables["constants"]),
            strict=True,
        ):
            bits = (np.asarray(leaf).view(np.uint32) for leaf in (before, after))
            changed += int(np.sum(np.not_equal(*bits)))
            numbers += before.size
    return [
        Claim(
            "A fixed head has no parameters and no optimizer state.",
            "0 + 0 bytes; 4 (d + 1) K and twice that for a learnable head with AdamW",
            f"{shown} bytes",
            kept[CE] == kept[DR] == (0, 0) and kept[LEARNABLE] == (learnable, 2 * learnable),
        ),
        Claim(
            "Its vectors are the same bits after training with weight decay.",
            "0 numbers that differ",
            f"{changed} of {numbers:,}",
            changed == 0 and numbers > 0,
        ),
    ]


def transfer_claim(name: str, how: str, found: dict[str, np.ndarray]) -> Claim:
    """What a transfer measured; no head is claimed to win, so it holds when there is a number for each.

    Args:
        name: of the transfer.
        how: from what to what.
        found: head -> accuracy [seeds] in per cent.

    Returns:
        The claim.
    """
    gains = [spread(found[head] - found[LEARNABLE]) for head in (CE, DR) if head in found]
    pilot = f"an earlier pilot had {PILOT[name]}" if name in PILOT else "no pilot"
    return Claim(
        f"Transfer to {name} is measured, and no head is claimed to win: {how}.",
        f"a number for each head ({pilot}); the paper's gain, from ImageNet, needs accelerators",
        ", ".join(f"{head} {spread(values)} %" for head, values in found.items())
        + f"; fixed less learnable {' and '.join(gains)} points (linear probe, "
        + f"{len(found[LEARNABLE])} seeds)",
        set(found) == set(HEADS) and all(np.isfinite(values).all() for values in found.values()),
    )


def _transfers(data: tuple[Data, Data], folder: Path, rows: dict[str, Row], seed: int) -> list[Claim]:
    """The probes of digits, of digits after MNIST, and of characters after MNIST."""
    small = Transfer(
        "MNIST as 8x8 images, then digits with 50 labels",
        *(shrunk(mnist(folder / "mnist.npz")[0]), 10, Target(*data, 5)),
    )
    claims = []
    for name, transfer in {**digits_transfers(*data), "another set": small}.items():
        # MNIST has eight times as many images.
        recipe = DIGITS._replace(epochs=10) if transfer is small else DIGITS
        found = {}
        for head in HEADS:
            trained = train(head, transfer.images, transfer.classes, recipe, TRANSFERS, seed)
            found[head] = probe(trained, transfer.target, seed)
        claims.append(transfer_claim(name, transfer.how, found))
    if (folder / OMNIGLOT).is_file():
        target = Target(*omniglot(folder / OMNIGLOT), 5, 20)
        found = {head: probe(row.trained, target, seed) for head, row in rows.items()}
        how = "MNIST, then 20 characters of Omniglot with 100 labels"
        claims.append(transfer_claim("another task", how, found))
    return claims


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures accuracy, collapse and cost of fixed heads, and how their features transfer.

    Args:
        folder: where the plots are written.
        quick: few networks, and the digits alone.
        seed: of everything.

    Returns:
        The claims, as they come out.
    """
    data = digits()
    rows = table(data, DIGITS, 4 if quick else 16, seed)
    # Four seeds scatter too much to tell half a point.
    claims = experiment_claims("digits", rows, 1.0 if quick else 0.5) + constancy_claims(rows)
    means = {"digits": _means(rows)}
    spreads = {head: values["within_between"] for head, values in means["digits"].items()}
    drawn = {head: row.trained for head, row in rows.items()}
    plots = [feature_figure(folder / "etf_head_features.svg", drawn, data[0], spreads)]
    source = Path(os.environ.get("ODJAX_DATA_DIR", "."))
    if not quick and (source / "mnist.npz").is_file():
        large = table(mnist(source / "mnist.npz"), MNIST, TRANSFERS, seed)
        means["MNIST"] = _means(large)
        claims += experiment_claims("MNIST", large, 0.5)
        claims += _transfers(data, source, large, seed)
    plots.append(collapse_figure(folder / "etf_head_collapse.svg", means))
    return Proof("etf-head", tuple(claims), quick, tuple(plots))
