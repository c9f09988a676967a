"""`odjax report`: one self-contained HTML page about one run or several."""

import datetime
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from odjax_train import metrics, run_folder, topology_page
from odjax_train.errors import UserError
from odjax_train.plan import page as plan_page
from odjax_train.plots import lines

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 1320px; margin: 2rem auto; padding: 0 1.5rem; }}
 h1 {{ font-size: 1.6rem; margin: 0 0 .2rem; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .6rem; }}
 .lead {{ color: #6b7280; margin: 0 0 1rem; }}
 .tiles {{ display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }}
 .tile {{ border: 1px solid #e5e7eb; border-radius: 8px; padding: .6rem 1rem; min-width: 8rem; }}
 .tile b {{ display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }} .tile span {{ color: #6b7280; font-size: .85rem; }}
 .plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem; }}
 .plots svg {{ width: 100%; height: auto; border: 1px solid #e5e7eb; border-radius: 8px; }}
 .tables {{ display: flex; flex-wrap: wrap; gap: 0 3.5rem; }}
 table {{ border-collapse: collapse; font-size: .9rem; }} td, th {{ text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #f0f1f3; vertical-align: top; }}
 table.numbers :not(:first-child) {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
 pre {{ background: #f8f9fb; border: 1px solid #e5e7eb; border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.35; }}
 details {{ margin: .6rem 0; }} summary {{ cursor: pointer; }}
</style></head><body>
{body}
</body></html>
"""


class Run(NamedTuple):
    """What a report needs of a run."""

    folder: Path
    record: Mapping[str, Any]
    train: Mapping[int, Mapping[str, Any]]
    eval: Mapping[int, Mapping[str, Any]]
    topology: Mapping[int, Mapping[str, Any]]
    measures: Mapping[int, Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]


def read(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        UserError: when it is not a run's, or nothing was logged in it.
    """
    record = run_folder.read(folder)
    series, events = metrics.read(folder)
    if not series["train"] and not series["eval"]:
        raise UserError(f"{folder} has no metrics yet")
    return Run(folder, record, **series, events=events)


def write(folders: Sequence[Path], out: Path) -> Path:
    """Writes the report of some runs.

    Args:
        folders: their folders.
        out: the page.

    Returns:
        the page's path.
    """
    runs = [read(folder) for folder in folders]
    names = [run.folder.name for run in runs]
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}"
    parts = [f"<h1>{_e(title)}</h1>", _lead(runs), _tiles(runs), _plots(runs), _measures(runs)]
    parts.append(topology_page.curves({run.folder.name: run.topology for run in runs}))
    if len(runs) > 1:
        parts.append(_comparison(runs))
    for run in runs:
        parts.append(_details(run, heading=len(runs) > 1))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        run_folder.write_text(out, _PAGE.format(title=_e(f"odjax: {title}"), body="\n".join(parts)))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    return out


def _e(value: Any) -> str:
    return html.escape(str(value))


def _lead(runs: Sequence[Run]) -> str:
    first = runs[0].record
    when = datetime.datetime.fromisoformat(first["started"]).strftime("%Y-%m-%d %H:%M UTC")
    mesh = " × ".join(f"{axis} {size}" for axis, size in first["mesh"].items())
    return (
        f'<p class="lead">{_e(first["config"])}, started {when}, {_e(first["devices"])}, mesh {_e(mesh)}</p>'
    )


def _tiles(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return ""
    run = runs[0]
    last = max([*run.train, *run.eval])
    tiles = [(f"{last} / {run.record['steps']}", "steps")]
    if run.train:
        newest = _newest(run.train)
        if "loss" in newest:
            tiles.append((_number(newest["loss"]), "training loss"))
    if run.eval:
        newest = _newest(run.eval)
        tiles += [(_number(value), f"held-out {name}") for name, value in _values(newest)]
        metric, mode = run.record["best"]
        scored = [(record[metric], step) for step, record in run.eval.items() if _is_number(record[metric])]
        if scored:
            value, step = (min if mode == "min" else max)(scored)
            tiles.append((_number(value), f"best held-out {metric}, at step {step}"))
    if "federated" in run.record:
        tiles += _federated_tiles(run)
    unit = run.record["unit"]
    rates = sorted(r[f"{unit}_per_second"] for r in run.train.values() if f"{unit}_per_second" in r)
    if rates:
        tiles.append((f"{rates[len(rates) // 2]:,.0f}", f"{unit} per second (median)"))
    shown = "".join(
        f'<div class="tile"><b>{_e(value)}</b><span>{_e(name)}</span></div>' for value, name in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _newest(records: Mapping[int, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record of the last step."""
    return records[max(records)]


def _federated_tiles(run: Run) -> list[tuple[str, str]]:
    names = {
        "federated/epsilon": "epsilon spent",
        "federated/uploaded_mb": "MB from clients",
        "federated/downloaded_mb": "MB to clients",
    }
    newest = _newest(run.measures) if run.measures else {}
    tiles = [(run.record["federated"]["cohort"], "clients of a round")]
    return tiles + [(_number(newest[name]), text) for name, text in names.items() if name in newest]


def _plots(runs: Sequence[Run]) -> str:
    found: dict[str, None] = {}
    for run in runs:
        for record in [*run.train.values(), *run.eval.values()]:
            found.update(dict.fromkeys(name for name, _ in _values(record)))
    order = sorted(found, key=lambda name: (name != "loss", name != "accuracy", name))
    marks = _marks(runs[0]) if len(runs) == 1 else {}
    plots = []
    for name in order:
        title = name.replace("_", " ")
        single = len(runs) == 1
        drawn = {title if single else run.folder.name: _series(run.train, name) for run in runs}
        dots = {title if single else run.folder.name: _series(run.eval, name) for run in runs}
        drawn = {label: xy for label, xy in drawn.items() if xy[0]}
        dots = {label: xy for label, xy in dots.items() if xy[0]}
        plots.append(lines(title, drawn, dots=dots, marks=marks))
    return f'<h2>Curves</h2><div class="plots">{"".join(plots)}</div>'


def _measures(runs: Sequence[Run]) -> str:
    """A section a measure, with a plot a figure."""
    names = dict.fromkeys(n for run in runs for record in run.measures.values() for n, _ in _values(record))
    sections: dict[str, list[str]] = {}
    for name in names:
        measure, _, figure = name.partition("/")
        dots = {run.folder.name: _series(run.measures, name) for run in runs}
        dots = {label: xy for label, xy in dots.items() if xy[0]}
        values = [value for _, ys in dots.values() for value in ys]
        log = min(values) > 0 and max(values) > 3 * min(values)
        sections.setdefault(measure, []).append(lines(figure.replace("_", " "), {}, dots=dots, log=log))
    return "".join(
        f'<h2>{_e(measure.capitalize())}</h2><div class="plots">{"".join(plots)}</div>'
        for measure, plots in sections.items()
    )


def _marks(run: Run) -> dict[float, str]:
    shown = {"resume": "resumed", "interrupted": "stopped", "diverged": "diverged"}
    return {event["step"]: shown[event["event"]] for event in run.events if event["event"] in shown}


def _values(record: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    return ((k, v) for k, v in record.items() if k not in ("kind", "step", "time") and _is_number(v))


def _series(records: Mapping[int, Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    pairs = [(step, record[name]) for step, record in records.items() if _is_number(record.get(name))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else str(value)


def _comparison(runs: Sequence[Run]) -> str:
    """Arguments and final results side by side; arguments that agree are left out."""
    arguments = sorted({name for run in runs for name in run.record["arguments"]})
    differ = [n for n in arguments if len({str(run.record["arguments"].get(n)) for run in runs}) > 1]
    rows = [("configuration", [run.record["config"] for run in runs])]
    rows += [(name, [run.record["arguments"].get(name, "–") for run in runs]) for name in differ]
    results = sorted({name for run in runs if run.eval for name, _ in _values(_newest(run.eval))})
    for name in results:
        values = [_number(_newest(run.eval).get(name)) if run.eval else "–" for run in runs]
        rows.append((f"held-out {name}", values))
    head = "".join(f"<th>{_e(run.folder.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><th>{_e(name)}</th>{''.join(f'<td>{_e(value)}</td>' for value in values)}</tr>"
        for name, values in rows
    )
    return f"<h2>Side by side</h2><table><tr><th></th>{head}</tr>{body}</table>"


def _details(run: Run, *, heading: bool) -> str:
    record = run.record
    parts = [f"<h2>{_e(run.folder.name)}</h2>"] if heading else []
    parts.append(topology_page.links(run.folder))
    parts.append(plan_page.section(run.folder))
    samples = [event for event in run.events if event["event"] == "sample"]
    if samples:
        text = samples[-1]["prompt"] + samples[-1]["text"]
        parts.append(f"<h2>A sample</h2><pre>{_e(text)}</pre>")
    machine = {
        "devices": record["devices"],
        "processes": record["processes"],
        "commit": record["commit"] or "–",
        **record["versions"],
    }
    tables = {"What was run": record["arguments"], "Data": record["data"], "Where": machine}
    if "federated" in record:
        tables = {"Federated": record["federated"], **tables}
    shown = (f"<div><h2>{title}</h2>{_table(values)}</div>" for title, values in tables.items())
    parts.append(f'<div class="tables">{"".join(shown)}</div>')
    parts.append(_folded("Parameters", record["parameters"]))
    notable = [event for event in run.events if event["event"] not in ("sample", "checkpoint", "edit")]
    if notable:
        rows = "\n".join(
            f"step {event['step']}: {event['event']}"
            + "".join(f"  {k}={v}" for k, v in event.items() if k not in ("event", "step", "time") and v)
            for event in notable
        )
        parts.append(_folded("Events", rows))
    parts.append(_folded("Configuration", record["text"]))
    return "\n".join(parts)


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_e(name)}</th><td>{_e(value)}</td></tr>" for name, value in values.items())
    return f"<table>{rows}</table>"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{_e(title)}</summary><pre>{_e(text)}</pre></details>"
