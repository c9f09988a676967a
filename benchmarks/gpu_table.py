"""The table of `gpu.py`: times as medians and ratios, MFU, and what failed or was left out."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from gpu_row import ROWS, Setting, quartiles

# Dense bfloat16, from the data sheets: pattern of a whole device kind -> FLOP/s.
PEAKS = {
    r".*\bH100 (80GB HBM3|SXM5?.*)": 989e12,
    r".*\bH200": 989e12,
    r".*\bA100\b.*": 312e12,
    r".*\bL4": 121e12,
    r".*\bRTX 4090": 165e12,
}


def merged(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """A row's figures of all repeats: rounds together, compile times of the first."""
    if before is None or "steps" not in before or "steps" not in now:
        return now if before is None or "steps" in now else before
    together = {name: before[name] + now[name] for name in ("steps", "edits")}
    highest = {
        name: max(filter(None, (before[name], now[name])), default=None) for name in ("peak", "edit_peak")
    }
    problems = list(dict.fromkeys(before["problems"] + now["problems"]))
    return {**before, **together, **highest, "problems": problems}


def peak_of(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device kind; None if it is not known."""
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, kind)), None)


def flops_of(name: str, setting: Setting) -> int:
    """FLOPs of the model for a token of a row's step, see the top."""
    from odjax.models import Decoder
    from odjax.models.decoder import flops_per_token

    model = Decoder(**setting.sizes)
    forward = flops_per_token(model, setting.length, training=False)
    weights = flops_per_token(model, 0, training=False)
    adapted = name.startswith(("lora", "rac")) or "peft" in name
    return 3 * forward - (weights if adapted else 0)


def table(device: dict[str, Any], found: dict[str, dict[str, Any]], setting: Setting) -> list[list[str]]:
    """Header and rows of what was timed."""
    head = [
        "row", "ms a step (quartiles)", "PyTorch / it", "compiled / it", "tokens/s", "MFU", "peak GiB",
        "compile s",
    ]  # fmt: skip
    peak, tokens = peak_of(device.get("kind", "")), setting.batch * setting.length
    rows = [head]

    def times(seconds: Sequence[float]) -> str:
        low, middle, high = (1e3 * number for number in quartiles(seconds))
        digits = 1 if middle >= 10 else 2
        return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    def gibibytes(number: int | None) -> str:
        return "" if number is None else f"{number / 2**30:.1f}"

    def whole(number: float | None) -> str:
        return "" if number is None else f"{number:.1f}"

    for name, row in found.items():
        if "steps" not in row:
            continue
        middle = quartiles(row["steps"])[1]
        ratios = [
            f"{quartiles(found[other]['steps'])[1] / middle:.2f}" if "steps" in found.get(other, {}) else ""
            for other in ROWS[name] or ("", "")
        ]
        rate = tokens / middle
        share = f"{100 * rate * flops_of(name, setting) / peak:.1f} %" if peak else ""
        memory = [gibibytes(row["peak"]), whole(row["compile_seconds"])]
        rows.append([name, times(row["steps"]), *ratios, f"{rate:,.0f}", share, *memory])
        if row["edits"]:
            compiled = whole(row["edit_compile_seconds"])
            edit = [f"  its {row['edit_name']}", times(row["edits"])]
            rows.append([*edit, "", "", "", "", gibibytes(row["edit_peak"]), compiled])
    return rows


def lines_of(rows: list[list[str]], *, markdown: bool) -> list[str]:
    """A table as text."""
    if markdown:
        body = [f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows]
        return [body[0], "|" + "---|" * len(rows[0]), *body[1:]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def remarks(found: dict[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Lines on what failed, and on what was left out or is worth knowing."""
    failed, noted = [], []
    for name, row in found.items():
        if "error" in row:
            failed.append(f"{name}: {row['error']}")
        if "left_out" in row:
            noted.append(f"{name}: left out, {row['left_out']}")
        failed += [f"{name}: {problem}" for problem in row.get("problems", [])]
        for check in row.get("checks", []):
            line = f"{check['name']}: {check['figures']}"
            (noted if check["holds"] else failed).append(f"check: {line}" if check["holds"] else line)
        if "density" in row:
            noted.append(f"{name}: density {row['density']:.4f} after the edits")
    return failed, noted


def versions_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What the rows were run with, each once."""
    each = [version for row in rows for version in row.get("versions", "").split(", ") if version]
    return list(dict.fromkeys(each))


def headline(device: dict[str, Any], found: dict[str, dict[str, Any]], setting: Setting) -> list[str]:
    """Lines on the device, the libraries and the model."""
    from odjax.models import Decoder
    from odjax.models.decoder import parameter_count

    lines = []
    if "kind" in device:
        peak = peak_of(device["kind"])
        limit = f", {device['memory'] / 2**30:.0f} GiB for JAX" if device.get("memory") else ""
        rates = (
            f"{device['product_flops'] / 1e12:.3g} TFLOP/s in a bfloat16 product, "
            f"{device['copy_bytes'] / 1e9:.3g} GB/s in a copy"
        )
        known = f" (data sheet: {peak / 1e12:.0f} TFLOP/s)" if peak else " (no data sheet: no MFU)"
        lines.append(f"{device['kind']}{limit}: {rates}{known}")
    lines.append(", ".join(versions_of([device, *found.values()])))
    size = parameter_count(Decoder(**setting.sizes))
    lines.append(
        f"decoder {setting.preset}, {size / 1e6:,.1f} M parameters, {setting.batch} x {setting.length} "
        f"tokens, bfloat16, rank {setting.rank}, sparsity {setting.sparsity:g}, plain attention with remat "
        f"{setting.remat}"
    )
    return lines


def brief(row: dict[str, Any]) -> str:
    """A row in a few words, when it is done."""
    if "steps" in row:
        return f"{1e3 * quartiles(row['steps'])[1]:.1f} ms ({row['wall']:.0f} s in all)"
    if "checks" in row:
        return f"{sum(check['holds'] for check in row['checks'])} of {len(row['checks'])} hold"
    return row.get("error") or f"left out, {row.get('left_out')}"
