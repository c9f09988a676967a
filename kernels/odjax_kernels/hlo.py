"""Compiled programs read from their text: instructions in the order of the schedule, and how often each runs.

XLA counts the body of a loop once, in `cost_analysis` and in its estimates. Here a loop counts as often as it
runs, where its condition says so: an integer that grows by a constant and is compared with one. A start that
is computed counts as 0, so that the number of trips is then an upper bound.

Source: the text format of XLA's HLO.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {
    "pred": 8,
    **{f"{kind}{bits}": bits for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
# Arrays of HBM have no memory space in their layout; 1 is the vector memory of a TPU, others are scalars' and
# flags'.
HBM = 0


class Shape(NamedTuple):
    """One array of an instruction.

    Attributes:
      dtype: such as "bf16".
      dims: sizes.
      space: number of the memory space, 0 for the main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding; what is no array of numbers has none."""
        bits = (
            8
            if self.dtype.startswith("f8")
            else 4
            if self.dtype.startswith("f4")
            else BITS.get(self.dtype, 0)
        )
        return self.size * bits // 8


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: unique in the program.
      opcode: such as "fusion".
      shapes: of what it makes, a tuple flattened.
      operands: names.
      text: what follows the operands: attributes, metadata, the backend's configuration.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def bytes(self) -> int:
        """Bytes of what it makes."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """Where it comes from, as JAX named it; "" when nothing is known."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's estimate, None without one."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.text)
        return int(found[1]) if found else None

    @property
    def channel(self) -> str:
        """Number of the channel that a collective communicates on; "" without one."""
        found = re.search(r"channel_id=(\d+)", self.text)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls; "" for others."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found[1] if found else ""

    def called(self, role: str) -> tuple[str, ...]:
        """Names of the computations in a role: "calls", "body", "condition", "branch_computations", ..."""
        found = re.search(rf"\b{role}=(\{{[^}}]*\}}|[^,\s]+)", self.text)
        return tuple(re.findall(r"[\w.-]+", found[1])) if found else ()


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      entry: name of the computation that runs first.
      computations: name -> instructions, in the order of the schedule.
      roots: name -> name of the instruction whose value the computation has, where it is marked.
    """

    entry: str
    computations: dict[str, tuple[Instruction, ...]]
    roots: dict[str, str]

    def find(self, computation: str, name: str) -> Instruction | None:
        """The instruction of that name in a computation, or None."""
        return next((i for i in self.computations[computation] if i.name == name), None)


_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")


def parse(text: str) -> Program:
    """Reads a program.

    Args:
      text: of `jax.stages.Compiled.as_text()`.

    Returns:
      The program.

    Raises:
      ValueError: there is no entry computation in it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> program = parse(jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text())
      >>> program.computations[program.entry][-1].shapes[0].dims
      (4, 4)
    """
    computations: dict[str, list[list[str]]] = {}
    roots: dict[str, str] = {}
    entry, name, current = "", "", None
    for line in text.splitlines():
        if line.endswith("{") and (head := _HEAD.match(line)):
            name = head[2]
            current = computations.setdefault(name, [])
            entry = name if head[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (match := _LINE.match(line)):
            current.append([match[2], match[3]])
            if match[1]:
                roots[name] = match[2]
        elif current:  # the metadata of a kernel may hold line breaks
            current[-1][1] += "\n" + line
    if not entry:
        raise ValueError("the text holds no ENTRY computation: it is no compiled program")
    return Program(
        entry,
        {
            name: tuple(_instruction(name, rest) for name, rest in instructions)
            for name, instructions in computations.items()
        },
        roots,
    )


def _closing(text: str, start: int) -> int:
    """Position of the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[(){}]").finditer(text, start):
        depth += 1 if match[0] in "({" else -1
        if depth == 0:
            return match.start()
    return len(text) - 1


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return Instruction(name, "", (), (), rest)
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    text = rest[close + 1 :]
    if opcode[1] in ("constant", "parameter"):
        text = f"value={inside}{text}"
    return Instruction(name, opcode[1], _shapes(rest[:end]), operands, text)


@functools.lru_cache(maxsize=4096)
def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Shape(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(found)


def trips(program: Program, computation: str, loop: Instruction) -> int | None:
    """How often a loop's body runs.

    Args:
      program: it is in.
      computation: it is in.
      loop: a "while".

    Returns:
      The number; None where the text does not say.
    """
    known = re.search(r'known_trip_count"?[=:]\s*\{"?n"?:"?(\d+)', loop.text)
    if known:
        return int(known[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    if not {condition, body} <= program.computations.keys():
        return None
    root = _root(program, condition)
    where, compare = condition, root
    outer: dict[int, str] = {}
    if root.opcode == "fusion":  # the comparison is inside: its parameters are the fusion's operands
        where = root.called("calls")[0]
        compare = _root(program, where)
        outer = dict(enumerate(root.operands))
    direction = re.search(r"direction=(\w+)", compare.text)
    if compare.opcode != "compare" or direction is None or len(compare.operands) != 2:
        return None

    def resolved(name: str) -> tuple[str, int] | None:
        """("constant", value) or ("index", position in the loop's tuple)."""
        place, here = where, name
        while True:
            found = program.find(place, here)
            if found is None:
                return None
            if found.opcode == "constant":
                return _constant(found)
            if found.opcode == "get-tuple-element":
                return "index", int(re.search(r"index=(\d+)", found.text)[1])
            if found.opcode == "parameter" and place != condition:
                place, here = condition, outer[int(re.match(r"value=(\d+)", found.text)[1])]
            elif found.opcode in ("bitcast", "copy", "convert") and found.operands:
                here = found.operands[0]
            else:
                return None

    sides = [resolved(name) for name in compare.operands]
    if None in sides or sorted(side[0] for side in sides) != ["constant", "index"]:
        return None
    index = next(side[1] for side in sides if side[0] == "index")
    bound = next(side[1] for side in sides if side[0] == "constant")
    turned = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
    order = direction[1] if sides[0][0] == "index" else turned.get(direction[1], direction[1])
    start = _start(program, computation, loop, index)
    step = _step(program, body, index)
    if start is None or step is None or step == 0:
        return None
    span = {"LT": bound - start, "LE": bound - start + 1, "GT": bound - start, "GE": bound - start - 1}.get(
        order
    )
    if order == "NE":
        span = bound - start
    return None if span is None else max(0, math.ceil(span / step))


def _root(program: Program, computation: str) -> Instruction:
    marked = program.roots.get(computation, "")
    return program.find(computation, marked) or program.computations[computation][-1]


def _constant(found: Instruction) -> tuple[str, int] | None:
    """("constant", value) of an integer, None for any other constant."""
    value = re.match(r"value=\s*(-?\d+)", found.text)
    is_integer = any(shape.dtype[0] in "su" for shape in found.shapes)
    return ("constant", int(value[1])) if value and is_integer else None


def _start(program: Program, computation: str, loop: Instruction, index: int) -> int | None:
    """The value of the loop's counter before the first trip; 0 when it is computed."""
    initial = program.find(computation, loop.operands[0])
    if initial is None or initial.opcode != "tuple" or index >= len(initial.operands):
        return 0
    name = initial.operands[index]
    while (found := program.find(computation, name)) is not None:
        if found.opcode == "constant":
            value = _constant(found)
            return value[1] if value else None
        if found.opcode not in ("copy", "bitcast", "convert") or not found.operands:
            break
        name = found.operands[0]
    return 0


def _step(program: Program, body: str, index: int) -> int | None:
    """What the counter grows by in a trip; 1 where that is inside a fusion, None where it is multiplied."""
    root = _root(program, body)
    if root.opcode != "tuple":
        return 1
    found = program.find(body, root.operands[index])
    while found is not None and found.opcode in ("copy", "bitcast", "convert") and found.operands:
        found = program.find(body, found.operands[0])
    if found is not None and found.opcode in ("multiply", "divide", "shift-left", "shift-right-logical"):
        return None
    if found is None or found.opcode not in ("add", "subtract"):
        return 1
    sign = 1 if found.opcode == "add" else -1
    for name in found.operands:
        operand = program.find(body, name)
        if operand is not None and operand.opcode == "constant" and (value := _constant(operand)):
            return sign * value[1]
    return 1


def children(program: Program, computation: str, instruction: Instruction) -> list[tuple[str, float]]:
    """The computations that an instruction runs, and how often.

    Args:
      program: it is in.
      computation: it is in.
      instruction: any.

    Returns:
      Pairs of a name and a number. Of a conditional every branch is one, once: whoever sums takes the largest
      instead. A loop whose number of trips the text does not say counts once. Computations that the text does
      not hold are left out.
    """
    times, names = 1, ()
    if instruction.opcode == "while":
        count = trips(program, computation, instruction)
        times, names = 1 if count is None else count, instruction.called("body")
    elif instruction.opcode == "conditional":
        names = instruction.called("branch_computations") or (
            *instruction.called("true_computation"),
            *instruction.called("false_computation"),
        )
    elif instruction.opcode.removesuffix("-start") in ("fusion", "call", "async"):
        names = instruction.called("calls") or instruction.called("to_apply")
    return [(name, times) for name in names if name in program.computations]


def walk(program: Program) -> Iterator[tuple[str, Instruction, float]]:
    """Every instruction that runs, with its computation and how often it does.

    Of a conditional all branches come, each as often as the conditional.

    Args:
      program: any.

    Yields:
      computation, instruction, number of runs.
    """
    stack: list[tuple[str, float]] = [(program.entry, 1)]
    while stack:
        name, times = stack.pop()
        for instruction in program.computations[name]:
            yield name, instruction, times
            stack += [(child, times * n) for child, n in children(program, name, instruction)]
