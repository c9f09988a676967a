"""A plan as tables for people."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from odjax.core import format_bytes
from odjax_train.mesh import AXES
from odjax_train.plan.parts import Buffer, Part, Plan


def show(plan: Plan, console: Console | None = None) -> None:
    """Prints a plan."""
    (console or Console()).print(render(plan))


def render(plan: Plan) -> Group:
    """A plan for rich."""
    mesh = " x ".join(
        f"{name} {size}" for name, size in zip(("data", "fsdp", "tensor"), plan.mesh, strict=True)
    )
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    head = Text(f"{plan.config} on {plan.topology}: {plan.devices} devices, {mesh}; {versions}")
    pieces = [head, _memory(plan), _parts(plan)]
    if any(part.traffic for part in plan.parts):
        pieces.append(_traffic(plan))
    for part in plan.parts:
        if part.error:
            pieces.append(Text(f"{part.name}: {problem(part)}", style="bold red"))
    pieces.append(_buffers(plan))
    pieces += [Text(f"- {note}", style="dim") for note in plan.notes]
    pieces.append(Text(verdict(plan), style="bold green" if plan.fits else "bold red"))
    return Group(*pieces)


def verdict(plan: Plan) -> str:
    """One line: whether it fits, and what a step takes."""
    short = max((part.short for part in plan.parts), default=0)
    over = [part for part in plan.parts if plan.chip and part.peak > plan.chip.memory]
    if short or over:
        missing = max([short, *(part.peak - plan.chip.memory for part in over)])
        return f"does not fit: {format_bytes(missing)} a device too much"
    failed = [part.name for part in plan.parts if part.error]
    if failed:
        return f"not compiled: {', '.join(failed)}"
    step = plan.part("step")
    peak = max(part.peak for part in plan.parts)
    limit = f" of {format_bytes(plan.chip.memory)}" if plan.chip else ""
    kind = "measured" if step.measured else "estimated"
    rate = f", {plan.tokens / step.seconds:,.0f} tokens/s" if plan.tokens and step.seconds else ""
    use = f", MFU {step.utilization(plan.chip):.1%}" if plan.chip and step.seconds else ""
    timed = f"; a step takes {duration(step.seconds)} ({kind}){rate}{use}" if step.seconds else ""
    return f"fits: {format_bytes(peak)}{limit} a device{timed}"


def problem(part: Part) -> str:
    """What went wrong with a part, in a line."""
    return part.error + (f": {format_bytes(part.short)} too much" if part.short else "")


def duration(seconds: float) -> str:
    """Seconds with a unit.

    >>> duration(0.0123), duration(4e-6), duration(75.0)
    ('12.3 ms', '4.0 us', '75.0 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 1e-6:.1f} us"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("state of a device", [*plan.memory, "in all"])
    total = sum(plan.memory.values())
    table.add_row(*(format_bytes(size) for size in [*plan.memory.values(), total]))
    return table


def _parts(plan: Plan) -> Table:
    columns = [
        "compiled",
        "arguments",
        "results",
        "temporaries",
        "peak",
        "of memory",
        "FLOPs",
        "time",
        "of it: ",
    ]
    columns[-1] = "compute / kernels / modelled / collectives / copies"
    table = _table("functions, a device", [*columns, "MFU", "compiled in"])
    for part in plan.parts:
        if part.error:
            table.add_row(part.name, *(["-"] * 9), "failed")
            continue
        of = f"{part.peak / plan.chip.memory:.1%}" if plan.chip else "-"
        use = part.utilization(plan.chip)
        table.add_row(
            part.name,
            *(format_bytes(size) for size in (part.arguments, part.outputs, part.temporaries, part.peak)),
            of,
            f"{part.flops / 1e12:.3g} T",
            duration(part.seconds) if part.seconds else "-",
            " / ".join(f"{seconds / part.seconds:.0%}" for seconds in part.use.values()) if part.use else "-",
            f"{use:.1%}" if use else "-",
            f"{part.compile_seconds:.1f} s",
        )
    return table


def _traffic(plan: Plan) -> Table:
    table = _table(
        "collectives, a device",
        ["function", "kind", "axis", "count", "bytes sent", "largest array", "alone they take"],
    )
    for part in plan.parts:
        for each in part.traffic:
            table.add_row(
                part.name,
                each.kind,
                each.axis,
                f"{each.count:.0f}",
                format_bytes(each.sent),
                format_bytes(each.largest),
                duration(each.seconds),
            )
    return table


def _buffers(plan: Plan) -> Table:
    table = _table("largest arrays, a device", ["array", "bytes", "shape", "in"])
    rows: list[tuple[Buffer, str]] = [(buffer, "state") for buffer in plan.largest[:6]]
    for part in plan.parts:
        if part.name != "init":
            rows += [(buffer, part.name) for buffer in part.largest[:4]]
    for buffer, where in rows:
        table.add_row(buffer.name, format_bytes(buffer.bytes), buffer.shape, where)
    return table
