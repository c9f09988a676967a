"""The Pallas kernels for TPU beside what XLA makes of the plain forms, by the compiler's static estimates.

    pip install -e '.[aot]' && python benchmarks/kernels.py

No TPU is needed and none is timed. Instructions are the cycles in which they are issued: those of XLA's
fusions as the compiler estimates them, of a kernel its bundles times the trips of its grid and loops. Waiting
for memory is in neither; what must be moved at least, and what a kernel moves, stand beside in cycles of the
bandwidth. The largest figure of a row is the bound.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from odjax.core.selection import gumbel_top_k_mask
from odjax.sparse.link_prediction import ch_scores
from odjax.sparse.masks import pack, unpack
from odjax_kernels import aot
from odjax_kernels.block_sparse import BlockLists, block_gradient, block_matmul
from odjax_kernels.link_scores import link_scores
from odjax_kernels.masked_gradient import masked_weight_gradient, masked_weight_gradient_pallas
from odjax_kernels.packing import words_shape
from odjax_kernels.threshold import gumbel_threshold_mask

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
SAMPLES, INPUTS, OUTPUTS, PADDED = 4096, 2048, 5461, 5504
shape = jax.ShapeDtypeStruct


class Chip(NamedTuple):
    """Multiply-adds in bfloat16 and bytes of HBM a cycle, from the published rates at the clock in GHz."""

    macs: float
    memory: float


# 4 units of 128 x 128 give 197 TFLOP/s at 1.5 GHz beside 819 GB/s; 918 TFLOP/s and 1,640 GB/s at 1.75 GHz.
CHIPS = {"v5e:2x4": Chip(4 * 128**2, 819 / 1.5), "v6e:2x4": Chip(4 * 256**2, 1640 / 1.75)}


class Row(NamedTuple):
    """One program.

    Attributes:
      title: of the group of programs that do the same.
      name: of the program.
      function: to compile.
      arguments: its shapes.
      macs: multiply-adds that the task needs.
      floor: bytes that the task must move.
      cycles: what was compiled -> cycles.
      moved: bytes that a kernel moves, None where unknown.
      is_default: whether the library takes it unless told otherwise.
    """

    title: str
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    macs: float
    floor: float
    cycles: Callable[[aot.Compiled], float]
    moved: float | None = None
    is_default: bool = False


def by_xla(report: aot.Compiled) -> float:
    return report.cycles


def only(report: aot.Compiled, name: str) -> aot.Schedule:
    return next(schedule for kernel, schedule in report.kernels.items() if kernel.startswith(name))


def around(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """The three largest parts in their order: those of `pl.when` in the kernels here; copies are smaller."""
    first, second, third = sorted(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:3])
    return sizes[first], sizes[second], sizes[third]


def scores(n: int, m: int) -> list[Row]:
    title, words = f"CH2-L3n scores, {n} x {m}", (shape(words_shape((n, m)), jnp.uint32),)
    macs, floor = 2 * n * m * (n + m), n * m / 8 + 4 * n * m
    lanes = min(512, -(-m // 128) * 128)
    row_blocks, column_blocks = -(-n // 512), -(-m // lanes)

    def half(schedule: aot.Schedule, own: int, other: int) -> float:
        # Each block of the own side is unpacked, compared with all of its side, multiplied by the other.
        trips = (other, other, own)
        unpacked, compared, multiplied = (
            part + (times - 1) * loop
            for part, loop, times in zip(
                around(schedule.branches), around(schedule.loops), trips, strict=True
            )
        )
        always = schedule.bundles - sum(around(schedule.branches))
        return own * ((own + other) * always + unpacked + own * compared + other * multiplied)

    def by_kernel(report: aot.Compiled) -> float:
        rows, columns = (only(report, f"link_scores_{side}") for side in ("rows", "columns"))
        own = half(rows, row_blocks, column_blocks) + half(columns, column_blocks, row_blocks)
        return report.cycles + own

    found = []
    for exact in (True, False):
        kind = "exact" if exact else "bfloat16 node weights"

        def plain(words: jax.Array, exact: bool = exact) -> jax.Array:
            return ch_scores(unpack(words, (n, m)), exact=exact)

        kernel = functools.partial(link_scores, shape=(n, m), exact=exact)
        found += [
            Row(title, f"XLA, {kind}", plain, words, macs, floor, by_xla, is_default=exact),
            Row(title, f"kernel, {kind}", kernel, words, macs, floor, by_kernel),
        ]
    return found


def selection(n: int, m: int) -> list[Row]:
    title, small = f"draw of k of {n} x {m} by weight", (1024, 1024)

    def arguments(n: int, m: int) -> tuple[Any, ...]:
        return shape((), jax.random.key(0).dtype), shape((n, m), F32), shape((), I32)

    def plain(key: jax.Array, log_weights: jax.Array, k: jax.Array) -> jax.Array:
        return pack(gumbel_top_k_mask(key, log_weights, k, bits_per_pass=4))

    def without_ties(report: aot.Compiled) -> float:
        # The first loop of the text breaks ties, in a branch of its own; eight trips find the threshold.
        ties, search = report.loops
        return report.cycles - ties + 7 * search

    def by_kernel(report: aot.Compiled) -> float:
        # Compiled at 1024 x 1024, a piece of 8 x 1024 a trip: nine passes make keys, eight count.
        make, count = only(report, "gumbel_threshold").loops[:2]
        return n / 8 * m / 1024 * (9 * make + 8 * count)

    floor = 4 * n * m + n * m / 8
    return [
        Row(title, "XLA, 4 bits a pass", plain, arguments(n, m), 0, floor, without_ties, is_default=True),
        Row(title, "kernel", gumbel_threshold_mask, arguments(*small), 0, floor, by_kernel, 36.125 * n * m),
    ]


def weight_gradient(k: int, n: int) -> list[Row]:
    title, m = f"masked weight gradient, {SAMPLES} samples, {k} x {n}", SAMPLES
    x, dy = shape((m, k), BF16), shape((m, n), BF16)
    words, mask = shape(words_shape((k, n)), jnp.uint32), shape((k, n), jnp.bool_)
    macs, floor = m * k * n, 2 * m * (k + n) + 4 * k * n + k * n / 8
    bm, bk, bn = block = 2048, 1024, 512
    sums, steps = math.ceil(k / bk) * math.ceil(n / bn), math.ceil(m / bm)

    def dense(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), preferred_element_type=F32)

    def with_bool(x: jax.Array, dy: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask, dense(x, dy), 0.0)

    def by_kernel(report: aot.Compiled) -> float:
        schedule = only(report, "masked_weight_gradient")
        begin, add, write = around(schedule.branches)
        always = schedule.bundles - begin - add - write
        return report.cycles + sums * (steps * always + begin + (steps - 1) * add + write)

    moved = sums * (m * (bk + bn) * 2 + bk * bn * (4 + 1 / 8))
    kernel = functools.partial(masked_weight_gradient_pallas, block=block)
    return [
        Row(title, "XLA, no mask", dense, (x, dy), macs, floor, by_xla),
        Row(title, "XLA, bool mask", with_bool, (x, dy, mask), macs, floor, by_xla),
        Row(
            title, "XLA, packed mask", masked_weight_gradient, (x, dy, words), macs, floor, by_xla, None, True
        ),
        Row(title, "kernel, packed mask", kernel, (x, dy, words), macs, floor, by_kernel, moved),
    ]


def block_products(m: int, k: int, n: int, block: int, density: float) -> list[Row]:
    rows, columns = k // block, n // block
    per_column = max(1, round(density * rows))
    slots = per_column * columns
    per_row = slots // rows
    title = f"blocks of {block}, {per_column} of {rows} of each column, {m} samples, {k} x {n}"
    x, dy, w = shape((m, k), BF16), shape((m, n), BF16), shape((slots, block, block), BF16)
    places = (shape((slots,), I32), shape((slots,), I32), shape((), I32))
    macs, stored = m * slots * block**2, slots * block**2
    panel = 1024

    def lists(count: int, longest: int) -> BlockLists:
        return BlockLists(shape((count,), I32), shape((count, longest), I32), shape((count, longest), I32))

    def by_panels(report: aot.Compiled, outer: int) -> float:
        schedule = only(report, "block_matmul")
        begin, add, write = around(schedule.branches)
        always = schedule.bundles - begin - add - write
        return report.cycles + math.ceil(m / panel) * (slots * (always + add) + outer * (begin + write))

    def by_slots(report: aot.Compiled) -> float:
        return report.cycles + slots * only(report, "block_gradient").bundles

    transposed = functools.partial(block_matmul, transposed=True)
    gradient = functools.partial(block_gradient, block=(block, block), dtype=BF16)

    def row(name: str, *rest: Any) -> Row:
        return Row(title, name, *rest)

    size = 2 * (m * (k + n) + stored)
    streamed = 2 * (m * (k + n) + math.ceil(m / panel) * stored)
    sampled = 2 * (slots * m * block + m * n + stored)
    return [
        row("y, XLA, dense", lambda x, w: x @ w, (x, shape((k, n), BF16)), macs, size, by_xla),
        row(
            "y, kernel",
            block_matmul,
            (x, w, lists(columns, per_column)),
            macs,
            size,
            functools.partial(by_panels, outer=columns),
            streamed,
            True,
        ),
        row("dx, XLA, dense", lambda dy, w: dy @ w.T, (dy, shape((k, n), BF16)), macs, size, by_xla),
        row(
            "dx, kernel",
            transposed,
            (dy, w, lists(rows, per_row)),
            macs,
            size,
            functools.partial(by_panels, outer=rows),
            streamed,
            True,
        ),
        row("dW, XLA, dense", lambda x, dy: x.T @ dy, (x, dy), macs, size, by_xla),
        row("dW, kernel", gradient, (x, dy, *places), macs, size, by_slots, sampled, True),
    ]


def all_rows() -> list[Row]:
    return [
        *scores(1024, 1024),
        *scores(INPUTS, OUTPUTS),
        *selection(INPUTS, OUTPUTS),
        *weight_gradient(INPUTS, PADDED),
        *weight_gradient(INPUTS, OUTPUTS),
        *(
            row
            for block in (128, 256)
            for density in (0.25, 0.5)
            for row in block_products(SAMPLES, INPUTS, 5632, block, density)
        ),
    ]


def case(row: Row) -> str:
    return f"{row.title}: {row.name}"


def AOT_CASES() -> list[aot.Case]:
    return [(case(row), row.function, row.arguments) for row in all_rows()]


def main(topology: Literal["v5e:2x4", "v6e:2x4"] = "v5e:2x4", only: str = "") -> None:
    """Prints thousands of cycles, and temporaries, of every program on one chip.

    Args:
        topology: whose chip.
        only: programs whose title or name holds this text.
    """
    chip, console = CHIPS[topology], Console(width=150)
    rows = [row for row in all_rows() if only in case(row)]
    reports = aot.compile_cases(__file__, topology, [case(row) for row in rows], timeout=3600)
    columns = ("matrix unit, least", "memory, least", "memory, moved", "instructions", "temporaries")
    for title in dict.fromkeys(row.title for row in rows):
        table = Table(
            "thousands of cycles", *columns, title=f"{title} ({topology[:3]})", title_justify="left"
        )
        for row in rows:
            if row.title != title:
                continue
            report = reports[case(row)]
            if report.error:
                table.add_row(row.name, report.error)
                continue
            figures = [
                row.macs / chip.macs,
                row.floor / chip.memory,
                None if row.moved is None else row.moved / chip.memory,
                row.cycles(report),
            ]
            shown = ["" if figure is None else f"{figure / 1e3:,.0f}" for figure in figures]
            name = f"{row.name} (default)" if row.is_default else row.name
            table.add_row(name, *shown, f"{report.temporaries / 1e6:,.1f} MB")
        console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
