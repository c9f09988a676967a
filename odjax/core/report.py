"""A tree of parameters as a readable table: path, shape, dtype, what is trained, bytes, sharding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from odjax.core.paths import Where, leaves_with_paths, select
from odjax.core.trees import dtype_of, shape_of


def format_bytes(count: int) -> str:
    """A number of bytes in binary units.

    Args:
      count: bytes.

    Returns:
      Text such as '1.5 MiB'.

    Example:
      >>> format_bytes(1536)
      '1.5 KiB'
    """
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def _itemsize(leaf: Any) -> int:
    return int(dtype_of(leaf).itemsize)


def _spec(leaf: Any) -> str:
    sharding = getattr(leaf, "sharding", None)
    spec = getattr(sharding, "spec", None)
    if spec is None:
        return ""
    return "(" + ", ".join("-" if entry is None else str(entry) for entry in spec) + ")"


def tree_report(
    tree: Any,
    rules: Mapping[str, Where] | None = None,
    trainable: Where | None = None,
    max_rows: int | None = None,
) -> str:
    """A table of the leaves of a tree as aligned plain text, with a line of totals.

    Args:
      tree: a tree of arrays or `jax.ShapeDtypeStruct`; nothing is computed or fetched from a device.
      rules: label -> `where`; the labels that select a leaf are shown beside it (two labels are shown as
        two).
      trainable: which leaves are trained; None counts every leaf as trained.
      max_rows: how many leaves are shown at most; the rest is summed up in one line.

    Returns:
      The table. The column of rules is there when rules are given, that of shardings when a leaf has a named
      one.

    Raises:
      ValueError: a rule or `trainable` selects nothing.

    Example:
      >>> shapes = {"w": jax.ShapeDtypeStruct((4, 8), "float32"), "b": jax.ShapeDtypeStruct((8,), "float32")}
      >>> print(tree_report(shapes, trainable="b"))
      path  shape   dtype    trained  bytes
      b     (8)     float32        8  32 B
      w     (4, 8)  float32        0  128 B
      total: 2 leaves, 8 of 40 numbers trained (20.00 %), 160 B
    """
    leaves = leaves_with_paths(tree)
    labels = {name: jax.tree.leaves(select(tree, where)) for name, where in (rules or {}).items()}
    trained = [True] * len(leaves) if trainable is None else jax.tree.leaves(select(tree, trainable))
    specs = [_spec(leaf) for _, leaf in leaves]

    header = (
        ["path", "shape", "dtype"] + ["rule"] * bool(rules) + ["trained", "bytes"] + ["sharding"] * any(specs)
    )
    rows, numbers, moving, total_bytes = [], 0, 0, 0
    for i, (path, leaf) in enumerate(leaves):
        size = math.prod(shape_of(leaf))
        numbers += size
        moving += size if trained[i] else 0
        total_bytes += size * _itemsize(leaf)
        row = [path, "(" + ", ".join(map(str, shape_of(leaf))) + ")", str(dtype_of(leaf))]
        if rules:
            row.append(" ".join(name for name, hits in labels.items() if hits[i]) or "-")
        row += [f"{size if trained[i] else 0:,}", format_bytes(size * _itemsize(leaf))]
        if any(specs):
            row.append(specs[i])
        rows.append(row)
    hidden = [] if max_rows is None else rows[max_rows:]
    rows = rows if max_rows is None else rows[:max_rows]

    share = f"{100 * moving / numbers:.2f} %" if numbers else "-"
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = header.index("trained")

    def line(cells: list[str]) -> str:
        parts = [
            c.rjust(w) if j == right else c.ljust(w)
            for j, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    text = [line(header), *map(line, rows)]
    if hidden:
        text.append(f"... {len(hidden)} more leaves, {hidden[0][0]} to {hidden[-1][0]}")
    count = f"{len(leaves)} {'leaf' if len(leaves) == 1 else 'leaves'}"
    text.append(
        f"total: {count}, {moving:,} of {numbers:,} numbers trained ({share}), {format_bytes(total_bytes)}"
    )
    return "\n".join(text)
