"""A plan in a report: beside the runs that it was made for."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from odjax.core import format_bytes
from odjax_train.errors import UserError
from odjax_train.plan.parts import Part, Plan, from_json
from odjax_train.plan.table import TRAFFIC, duration, operations, problem, shares, traffic, verdict

NAME = "plan.json"


def section(folder: Path) -> str:
    """The section of the plan in a run's folder, "" where there is none.

    Args:
        folder: of a run; its `plan.json` is what `odjax plan --out` wrote.

    Raises:
        UserError: the file is no plan.
    """
    file = folder / NAME
    if not file.is_file():
        return ""
    try:
        plan = from_json(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no plan of odjax plan --out: {error}") from error
    mesh = " × ".join(map(str, plan.mesh))
    kinds = "".join(f"<th>{_e(kind)}</th>" for kind in plan.memory)
    sizes = "".join(f"<td>{format_bytes(size)}</td>" for size in plan.memory.values())
    return "".join(
        [
            f"<h2>Plan for {_e(plan.topology)}</h2>",
            f'<p class="lead">{plan.devices} devices, {mesh}. {_e(verdict(plan))}</p>',
            f'<table class="numbers"><tr><th>a device holds</th>{kinds}</tr>',
            f"<tr><td></td>{sizes}</tr></table><br>",
            _functions(plan),
            _collectives(plan.parts),
            "".join(f'<p class="lead">{_e(note)}</p>' for note in plan.notes),
        ]
    )


def _functions(plan: Plan) -> str:
    names = ("function", "arguments", "temporaries", "peak", "FLOPs", "time", "MFU", "of the time")
    rows = []
    for part in plan.parts:
        if part.error:
            rows.append([part.name, problem(part), *[""] * 6])
            continue
        use = part.utilization(plan.chip)
        rows.append(
            [
                part.name,
                format_bytes(part.arguments),
                format_bytes(part.temporaries),
                format_bytes(part.peak),
                operations(part.flops),
                duration(part.seconds),
                f"{use:.1%}" if use else "",
                shares(part),
            ]
        )
    return _table(names, rows)


def _collectives(parts: Sequence[Part]) -> str:
    rows = traffic(parts)
    return f"<details><summary>Collectives</summary>{_table(TRAFFIC, rows)}</details>" if rows else ""


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_e(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{_e(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="numbers"><tr>{head}</tr>{body}</table>'


def _e(value: str) -> str:
    return html.escape(str(value))
