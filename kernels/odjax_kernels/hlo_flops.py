"""Floating-point operations of compiled programs: their products, loops as often as they run.

Source: the conventions of XLA's `HloCostAnalysis` for products and convolutions.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence

from odjax_kernels.hlo import Instruction, Program, Shape, children


def flops(program: Program) -> int:
    """Floating-point operations of the products in a program, loops as often as they run.

    A multiplication and an addition are two. Of a conditional the branch with the most counts. Products of
    cuBLAS count; what is elementwise does not, nor do kernels.

    Args:
      program: any.

    Returns:
      The number, for one device.
    """
    return int(_flops(program, program.entry, {}))


def instruction_flops(program: Program, computation: str, instruction: Instruction) -> int:
    """Floating-point operations of the products that one instruction runs, in what it calls too.

    Args:
      program: it is in.
      computation: it is in.
      instruction: any.

    Returns:
      The number, for one device.
    """
    shapes = {i.name: i.shapes for i in program.computations[computation]}
    return int(_own_flops(program, computation, instruction, shapes, {}))


def _flops(program: Program, computation: str, known: dict[str, float]) -> float:
    """Operations of a computation."""
    if computation not in known:
        instructions = program.computations[computation]
        shapes = {i.name: i.shapes for i in instructions}
        known[computation] = sum(_own_flops(program, computation, i, shapes, known) for i in instructions)
    return known[computation]


def _own_flops(
    program: Program,
    computation: str,
    instruction: Instruction,
    shapes: Mapping[str, tuple[Shape, ...]],
    known: dict[str, float],
) -> float:
    """Operations of an instruction and of what it calls; shapes of its computation by name."""
    inside = [
        times * _flops(program, child, known) for child, times in children(program, computation, instruction)
    ]
    together = max(inside, default=0) if instruction.opcode == "conditional" else sum(inside)
    return together + product_flops(instruction, [shapes.get(name, ()) for name in instruction.operands])


def product_flops(instruction: Instruction, operands: Sequence[Sequence[Shape]]) -> int:
    """Floating-point operations of one dot, product of cuBLAS or convolution; 0 for everything else.

    Args:
      instruction: any.
      operands: shapes of its operands.

    Returns:
      The number.
    """
    cublas = instruction.opcode == "custom-call" and instruction.target.startswith("__cublas$")
    if instruction.opcode == "dot" or cublas:
        contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.text)
        axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])] if contracted else []
        return 2 * instruction.shapes[0].size * math.prod(operands[0][0].dims[axis] for axis in axes)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, operands[0][0], operands[1][0])
    return 0


def _convolution_flops(instruction: Instruction, lhs: Shape, rhs: Shape) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    window = window[1] if window else ""
    out = instruction.shapes[0]
    spatial = [label for label in labels[3] if label.isdigit()]

    def numbers(key: str, default: str) -> list[str]:
        found = re.search(rf"\b{key}=([\w-]+)", window)
        return found[1].split("x") if found else [default] * len(spatial)

    size, stride, pad = numbers("size", "1"), numbers("stride", "1"), numbers("pad", "0_0")
    base, dilate = numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1")
    pairs = 1
    for label in spatial:
        d = int(label)
        pairs *= _pairs(
            out.dims[labels[3].index(label)],
            lhs.dims[labels[1].index(label)],
            int(size[d]),
            int(stride[d]),
            int(pad[d].split("_")[0]),
            int(base[d]),
            int(dilate[d]),
        )
    rows = out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")]
    return 2 * pairs * rows * rhs.dims[labels[2].index("i")]


@functools.lru_cache(maxsize=4096)
def _pairs(out: int, lhs: int, window: int, stride: int, pad: int, base: int, dilate: int) -> int:
    """How many pairs of an output and a window position meet an input, not padding or a gap."""
    total = 0
    for k in range(window):
        # Position of output o in the dilated input: o * stride + k * dilate - pad.
        offset = k * dilate - pad
        period = base // math.gcd(stride, base)
        first = next((o for o in range(min(period, out)) if (o * stride + offset) % base == 0), None)
        if first is None:
            continue
        low = max(0, math.ceil(-offset / stride))
        high = min(out - 1, (base * (lhs - 1) - offset) // stride)
        first += max(0, math.ceil((low - first) / period)) * period
        if first <= high:
            total += (high - first) // period + 1
    return total
