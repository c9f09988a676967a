"""Plots of runs, as inline SVG."""

import io
from collections.abc import Mapping, Sequence

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
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) + len(dots or {}) > 1:
        axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _svg(figure: object) -> str:
    import matplotlib

    out = io.StringIO()
    # The same data give the same file, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "odjax", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    return text[text.index("<svg") :]
