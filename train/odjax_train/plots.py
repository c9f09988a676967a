"""Plots of runs, as inline SVG."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]

_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#4b5563")


def lines(
    title: str,
    series: Series,
    *,
    dots: Series | None = None,
    marks: Mapping[float, str] | None = None,
    x: str = "step",
    log: bool = False,
    share: bool = False,
) -> str:
    """A line plot.

    Args:
        title: above it.
        series: name -> (x, y), drawn as lines.
        dots: name -> (x, y), drawn as dots joined by a thin line, in the colour of the series with the same
            name.
        marks: x -> what happened there.
        x: label of the x axis.
        log: whether y is logarithmic.
        share: whether y is a part of a whole, shown from 0 on.

    Returns:
        an `<svg>` element.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys([*series, *(dots or {})]))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    for name, (xs, ys) in series.items():
        axes.plot(xs, ys, color=colours[name], linewidth=1.5, label=name)
    for name, (xs, ys) in (dots or {}).items():
        label = f"{name}, held out" if name in series else name
        axes.plot(xs, ys, "o--", color=colours[name], markersize=4.5, linewidth=0.8, label=label)
    for at, what in (marks or {}).items():
        axes.axvline(at, color="#9ca3af", linewidth=0.8, linestyle=":")
        axes.annotate(
            what,
            (at, 1),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            color="#6b7280",
            rotation=90,
            va="top",
        )
    if log:
        axes.set_yscale("log")
    if share:
        axes.set_ylim(0, max(1.05 * axes.dataLim.y1, 1e-3))
    return _finished(figure, title, x, legend=len(series) + len(dots or {}) > 1)


def distributions(
    title: str, counts: Series, *, before: Series | None = None, x: str, y: str, bins: int = 80
) -> str:
    """Shares of whole numbers, as outlines of histograms.

    Args:
        title: above it.
        counts: name -> (values, how often each occurs).
        before: name -> the same at another time, dotted, in the colour of the name.
        x: label of the x axis.
        y: label of the y axis.
        bins: at most as many, all of one width.

    Returns:
        an `<svg>` element.
    """
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    axes = figure.subplots()
    largest = max((int(max(v)) for v, _ in [*counts.values(), *(before or {}).values()] if len(v)), default=0)
    edges = np.arange(0, largest + 1 + (width := -(-(largest + 1) // bins)), width) - 0.5
    for i, name in enumerate(counts):
        colour = _COLOURS[i % len(_COLOURS)]
        for series, style, label in ((before or {}, ":", None), (counts, "-", name)):
            if name in series:
                values, often = (np.asarray(each, float) for each in series[name])
                shares = np.histogram(values, edges, weights=often)[0] / max(often.sum(), 1)
                axes.stairs(shares, edges, color=colour, linestyle=style, linewidth=1.3, label=label)
    axes.set_ylabel(y, fontsize=9)
    return _finished(figure, title, x, legend=len(counts) > 1)


def _finished(figure: Any, title: str, x: str, *, legend: bool) -> str:
    (axes,) = figure.axes
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.StringIO()
    # The same data give the same file, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "odjax", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    return text[text.index("<svg") :]
