"""The figures of the proof of fixed heads: where features go, and their statistics of collapse."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from odjax_train.proofs.etf_head_training import (
    CE,
    DR,
    HEADS,
    LEARNABLE,
    Data,
    Trained,
    class_vectors,
    features,
)
from odjax_train.proofs.figure import save_figure

METRICS = {"within_between": "within / between", "nc2": "NC2", "nc3": "NC3"}
COLOURS = {LEARNABLE: "#94a3b8", CE: "#60a5fa", DR: "#ea580c"}
PER_CLASS = 30


def _plane(vectors: np.ndarray) -> np.ndarray:
    """Two directions [d, 2] in which the K vertices of a simplex are a regular polygon."""
    angles = 2 * np.pi * np.arange(vectors.shape[1]) / vectors.shape[1] + np.pi / 2
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    left, _, right = np.linalg.svd((vectors - vectors.mean(1, keepdims=True)) @ circle, full_matrices=False)
    return left @ right


def _shown(trained: Trained, variables: Any, data: Data, normalized: bool) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, 2] and class vectors [K, 2] of the first seed, each of mean length 1 before projection."""
    x, y = data
    h = np.asarray(features(trained.model, variables, x)[0], np.float64)
    h = h / np.linalg.norm(h, axis=1, keepdims=True) if normalized else h
    vectors = np.asarray(class_vectors(trained.model, variables)[0], np.float64)
    means = np.stack([h[np.asarray(y) == k].mean(0) for k in range(vectors.shape[1])])
    size = np.linalg.norm(means - means.mean(0), axis=1).mean()
    vectors = vectors - vectors.mean(1, keepdims=True)
    plane = _plane(vectors)
    length = np.linalg.norm(vectors, axis=0).mean()
    return (h - means.mean(0)) @ plane / size, (vectors.T @ plane) / length


def feature_figure(path: Path, runs: dict[str, Trained], data: Data, spreads: dict[str, float]) -> str:
    """Features before training, and after it below each head, with the class vectors as spokes.

    Args:
        path: of the file.
        runs: head -> networks; the first seed is drawn.
        data: the images of training.
        spreads: head -> spread within over between classes, for the titles.

    Returns:
        The name of the file.
    """
    from matplotlib import colormaps

    y = np.asarray(data[1])
    rows = np.concatenate([np.flatnonzero(y == k)[:PER_CLASS] for k in range(y.max() + 1)])
    few = (data[0][rows], jnp.asarray(y[rows]))
    panels = {"before training": (runs[DR], runs[DR].before, True)}
    for head in HEADS:
        title = f"{head}: spread within / between {spreads[head]:.2f}"
        panels[title] = (runs[head], runs[head].variables, head != LEARNABLE)

    def draw(axes: Any) -> None:
        figure = axes.figure
        axes.remove()
        grid = figure.subplots(2, 2)
        for ax, (title, (trained, variables, normalized)) in zip(grid.ravel(), panels.items(), strict=True):
            points, spokes = _shown(trained, variables, few, normalized)
            for k, (right, up) in enumerate(spokes):
                colour = colormaps["tab10"](k)
                own = points[y[rows] == k]
                ax.plot([0, right], [0, up], color=colour, linewidth=0.8, alpha=0.5, zorder=1)
                ax.plot(*own.T, "o", color=colour, markersize=3, markeredgewidth=0, alpha=0.55, zorder=2)
                ax.plot(right, up, "o", color=colour, mec="black", mew=0.8, markersize=13, zorder=3)
                ax.annotate(
                    str(k),
                    (right, up),
                    ha="center",
                    va="center_baseline",
                    fontsize=9,
                    color="white",
                    weight="bold",
                    zorder=4,
                )
            ax.set(xlim=(-0.95, 0.95), ylim=(-0.95, 0.95), aspect="equal", xticks=[], yticks=[])
            ax.set_title(title, fontsize=10)
            for side in ax.spines.values():
                side.set_color("#cbd5e1")

    return save_figure(path, draw, (7.5, 7.8))


def collapse_figure(path: Path, metrics: dict[str, dict[str, dict[str, float]]]) -> str:
    """Bars of the statistics of collapse.

    Args:
        path: of the file.
        metrics: data set -> head -> name of a metric -> value.

    Returns:
        The name of the file.
    """

    def draw(axes: Any) -> None:
        figure = axes.figure
        axes.remove()
        grid = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
        for ax, (name, of_heads) in zip(grid, metrics.items(), strict=True):
            for i, (head, values) in enumerate(of_heads.items()):
                at = np.arange(len(METRICS)) + 0.27 * (i - 1)
                bars = ax.bar(at, [values[m] for m in METRICS], 0.25, color=COLOURS[head], label=head)
                ax.bar_label(bars, fmt="%.2f", fontsize=8, padding=2, color="#475569")
            ax.set_xticks(np.arange(len(METRICS)), list(METRICS.values()))
            ax.set_title(f"{name}, training images", fontsize=11)
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(axis="x", length=0)
        grid[0].set_ylabel("distance from collapse (0: complete)")
        grid[0].legend(frameon=False)

    return save_figure(path, draw, (5.2 * len(metrics), 3.8))
