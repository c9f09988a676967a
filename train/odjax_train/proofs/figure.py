"""One way to draw a figure into a file, without a display."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def save_figure(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (6.0, 4.0)) -> str:
    """Draws one axes and writes it.

    Args:
        path: the file; its suffix is the format.
        draw: called with the matplotlib axes.
        size: in inches.

    Returns:
        The name of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    figure.savefig(path, dpi=120)
    return path.name
