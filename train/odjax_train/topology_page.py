"""The part of a report that shows a sparse model's links: how they moved, and what they are like now."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from odjax.core.report import format_bytes
from odjax_train.plots import distributions, lines

Looks = Mapping[int, Mapping[str, Any]]
FILE = "topology.json"

_OVERALL = {
    "density": "density: links of all places",
    "explored": "places that had a link at some look",
    "moved": "links that were not there at the last look",
}
_SIDES = {"in": "input neurons with a link", "out": "output neurons with a link"}
_MOST_LEAVES = 8


def curves(runs: Mapping[str, Looks]) -> str:
    """How the links of runs moved, as plots over the steps.

    Args:
        runs: name -> step -> figures, as `odjax_train.topology` logs them.

    Returns:
        HTML; nothing where no run is sparse.
    """
    runs = {name: looks for name, looks in runs.items() if looks}
    if not runs:
        return ""
    plots = []
    for key, title in _OVERALL.items():
        found = {
            name: _over_steps({step: look.get(key) for step, look in looks.items()})
            for name, looks in runs.items()
        }
        plots.append(lines(title, {}, dots={name: xy for name, xy in found.items() if xy[0]}, share=True))
    for side, title in _SIDES.items():
        plots.append(lines(title, {}, dots=_active(runs, side), share=True))
    return f'<h2>Links over time</h2><div class="plots">{"".join(plots)}</div>'


def _active(runs: Mapping[str, Looks], side: str) -> dict[str, tuple[list[int], list[float]]]:
    """Shares of the neurons: of every leaf where there is one run with a few, else of all leaves together."""
    (_, looks), *others = runs.items()
    leaves = list(looks[max(looks)]["leaves"])
    if not others and len(leaves) <= _MOST_LEAVES:
        return {
            path: _over_steps({step: look["leaves"][path][side] for step, look in looks.items()})
            for path in leaves
        }
    return {
        name: _over_steps({step: look[f"active_{side}"] for step, look in looks.items()})
        for name, looks in runs.items()
    }


def _over_steps(values: Mapping[int, float | None]) -> tuple[list[int], list[float]]:
    pairs = [(step, value) for step, value in values.items() if value is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def read(folder: Path) -> dict[str, Any]:
    """What the looks of a run left for its report.

    Args:
        folder: the run's folder.

    Returns:
        "first" and "newest": `{"step", "leaves": [figures]}`; empty when nothing was looked at.
    """
    try:
        return json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return {}


def links(folder: Path) -> str:
    """The newest links of a run: a table of its leaves, and how many links their neurons have.

    Args:
        folder: the run's folder.

    Returns:
        HTML; nothing where the run is not sparse.
    """
    looks = read(folder)
    if not looks:
        return ""
    step, leaves = looks["newest"]["step"], looks["newest"]["leaves"]
    before = {leaf["path"]: leaf["degrees"] for leaf in looks["first"]["leaves"]}
    start_step = looks["first"]["step"]
    moved = start_step != step
    plots = []
    for leaf in leaves[:_MOST_LEAVES]:
        sides = {"inputs": "in", "outputs": "out"}
        now, start = (
            {name: degrees[side] for name, side in sides.items()}
            for degrees in (leaf["degrees"], before[leaf["path"]])
        )
        title = f"{leaf['path']} at step {step}" + (f", dotted: step {start_step}" if moved else "")
        plots.append(
            distributions(
                title, now, before=start if moved else None, x="links of a neuron", y="share of neurons"
            )
        )
    rest = len(leaves) - len(plots)
    more = f"<p>{rest} further leaves are not drawn.</p>" if rest > 0 else ""
    return (
        f"<h2>Links at step {step}</h2>{_table(leaves)}"
        f'<h2>Links of a neuron</h2><div class="plots">{"".join(plots)}</div>{more}'
    )


def _table(leaves: list[dict[str, Any]]) -> str:
    head = (
        "",
        "shape",
        "links",
        "density",
        "ever linked",
        "active inputs",
        "active outputs",
        "packed",
        "dense",
        "FLOPs a row",
        "of",
    )
    names = (
        "links",
        "size",
        "seen",
        "active_in",
        "n_in",
        "active_out",
        "n_out",
        "packed_bytes",
        "dense_bytes",
        "flops",
        "dense_flops",
    )
    total = {"path": "all", "shape": (), **{name: sum(leaf[name] for leaf in leaves) for name in names}}
    rows = "".join(_row(leaf) for leaf in (*leaves, total))
    return f'<table class="numbers"><tr>{"".join(f"<th>{name}</th>" for name in head)}</tr>{rows}</table>'


def _row(leaf: Mapping[str, Any]) -> str:
    cells = (
        " × ".join(map(str, leaf["shape"])),
        f"{leaf['links']:,}",
        _percent(leaf["links"], leaf["size"]),
        _percent(leaf["seen"], leaf["size"]),
        f"{leaf['active_in']:,} of {leaf['n_in']:,}",
        f"{leaf['active_out']:,} of {leaf['n_out']:,}",
        format_bytes(leaf["packed_bytes"]),
        format_bytes(leaf["dense_bytes"]),
        f"{leaf['flops']:,}",
        f"{leaf['dense_flops']:,}",
    )
    return f"<tr><th>{html.escape(leaf['path'])}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "–"
