"""A plan as tables for people."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from odjax.core import format_bytes
from odjax_train.mesh import AXES
from odjax_train.plan.parts import Buffer, Part, Plan
from odjax_train.plan.search import Tried


def show(plan: Plan, console: Console | None = None) -> None:
    """Prints a plan."""
    (console or Console()).print(render(plan))


def render(plan: Plan) -> Group:
    """A plan for rich."""
    mesh = " x ".join(f"{name} {size}" for name, size in zip(AXES, plan.mesh, strict=True))
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    head = Text(f"{plan.config} on {plan.topology}: {plan.devices} devices, {mesh}; {versions}")
    pieces = [head, _memory(plan), _parts(plan)]
    if any(part.traffic for part in plan.parts):
        pieces.append(_traffic(plan))
    kernels = [f"{name} x {n} in {part.name}" for part in plan.parts for name, n in part.kernels.items()]
    if kernels:
        pieces.append(Text(f"kernels: {', '.join(kernels)}"))
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
    """Seconds with a unit, "0" for none.

    >>> duration(0.0123), duration(4e-6), duration(75.0)
    ('12.3 ms', '4.0 us', '75.0 s')
    """
    if not seconds:
        return "0"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 1e-6:.1f} us"


def operations(number: float) -> str:
    """A number of operations with a prefix, "-" for none.

    >>> operations(2.5e13), operations(0)
    ('25.0 T', '-')
    """
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {prefix}"
    return f"{number:.0f}" if number else "-"


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


def _parts(plan: Plan) -> Group:
    memory = _table(
        "memory of a device", ["function", "arguments", "results", "temporaries", "peak", "of all"]
    )
    time = _table("time of a device", ["function", "FLOPs", "time", "of it", "MFU", "compiled in"])
    for part in plan.parts:
        if part.error:
            memory.add_row(part.name, *["-"] * 5)
            time.add_row(part.name, *["-"] * 4, "failed")
            continue
        sizes = (part.arguments, part.outputs, part.temporaries, part.peak)
        of = f"{part.peak / plan.chip.memory:.1%}" if plan.chip else "-"
        memory.add_row(part.name, *(format_bytes(size) for size in sizes), of)
        use = part.utilization(plan.chip)
        time.add_row(
            part.name,
            operations(part.flops),
            duration(part.seconds) if part.seconds else "-",
            shares(part),
            f"{use:.1%}" if use else "-",
            f"{part.compile_seconds:.1f} s",
        )
    return Group(memory, time)


def shares(part: Part) -> str:
    """What the time of a part consists of, without what is under half a percent."""
    if not part.use or not part.seconds:
        return "-"
    parts = {name: seconds / part.seconds for name, seconds in part.use.items()}
    shown = sorted(parts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in shown if share >= 0.005)


TRAFFIC = ("function", "kind", "axis", "count", "bytes sent", "largest array", "alone they take")


def traffic(parts: Sequence[Part]) -> list[tuple[str, ...]]:
    """The collectives of some functions, a row each, in the columns of `TRAFFIC`."""
    return [
        (
            part.name,
            each.kind,
            each.axis,
            f"{each.count:.0f}",
            format_bytes(each.sent),
            format_bytes(each.largest),
            duration(each.seconds),
        )
        for part in parts
        for each in part.traffic
    ]


def _traffic(plan: Plan) -> Table:
    table = _table("collectives, a device", TRAFFIC)
    for row in traffic(plan.parts):
        table.add_row(*row)
    return table


def _buffers(plan: Plan) -> Table:
    table = _table("largest arrays, a device", ["array", "bytes", "shape", "in"])
    rows: list[tuple[Buffer, str]] = [(buffer, "state") for buffer in plan.largest[:6]]
    for part in plan.parts:
        if part.name != "init":
            rows += [(buffer, part.name) for buffer in part.largest[:4]]
    for buffer, where in rows:
        table.add_row(escape(buffer.name), format_bytes(buffer.bytes), buffer.shape, where)
    return table


def search_table(tried: Sequence[Tried], front: Sequence[Tried]) -> Group:
    """What a search tried, and what of it is worth having."""
    columns = ["flags", "time", "MFU", "peak of a device", "expected", "said"]
    table = _table("tried, the fastest first", columns)
    known = any(each.plan and each.plan.chip for each in tried)  # else the estimates are no seconds
    for each in tried:
        step = each.plan.part("step") if each.plan else None
        ran = step is not None and not step.error
        use = step.utilization(each.plan.chip) if ran else 0.0
        table.add_row(
            escape(("* " if each in front else "  ") + each.candidate.line),
            duration(step.seconds) if ran else "-",
            f"{use:.1%}" if use else "-",
            format_bytes(step.peak) if ran else "-",
            (f"{duration(each.estimate.seconds)}, " if known else "")
            + format_bytes(int(each.estimate.bytes)),
            "" if ran else escape((problem(step) if step is not None else each.error)[:60]),
        )
    best = front[0].candidate.line if front else "nothing that was compiled fits"
    legend = Text("* nothing else is better in both time and memory", style="dim")
    return Group(table, legend, Text(best, style="bold", no_wrap=True, overflow="ignore"))
