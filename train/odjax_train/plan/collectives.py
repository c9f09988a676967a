"""The collectives of a compiled program: between whom, how many bytes, and how long they should take."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from odjax_kernels.hlo import Instruction
from odjax_train.plan.chips import Topology, ring

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
HOP = 1e-6  # seconds until the first byte has passed a link


class Collective(NamedTuple):
    """One collective, once.

    Attributes:
        kind: one of `KINDS`.
        axis: mesh axes that it runs along, such as "fsdp" or "data+fsdp".
        sent: bytes that leave a device.
        whole: bytes of the array that it puts together, takes apart or sums, on one device.
        seconds: by its bytes and the links it uses.
        direction: which way around a ring a permutation goes, +1 or -1; 0 for what uses both.
        where: the operation of the model it belongs to.
    """

    kind: str
    axis: str
    sent: int
    whole: int
    seconds: float
    direction: int
    where: str


def kind_of(opcode: str) -> str | None:
    """The kind of collective that an opcode is or starts, None for anything else.

    >>> kind_of("all-gather-start"), kind_of("add")
    ('all-gather', None)
    """
    base = opcode.removesuffix("-start")
    return base if base in KINDS else None


def first_group(text: str, devices: int) -> tuple[int, ...]:
    """The first group of positions in the mesh that a collective runs between.

    Args:
        text: of the instruction's attributes.
        devices: in all.

    >>> first_group("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", 8)
    (0, 2, 4, 6)
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        targets = dict(tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
        if not targets:
            return (0,)
        start = here = next(iter(targets))
        chain = [start]
        while (here := targets.get(here)) is not None and here not in chain:
            chain.append(here)
        return tuple(chain)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if named:
        axes = re.findall(r"'([^']+)'=(\d+)", named[1])
        used = re.findall(r"'([^']+)'", named[2])
        grid = np.arange(math.prod(int(size) for _, size in axes)).reshape([int(size) for _, size in axes])
        index = tuple(slice(None) if name in used else 0 for name, _ in axes)
        return tuple(np.ravel(grid[index]).tolist())
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        sizes = [int(size) for size in iota[3].split(",")]
        grid = np.arange(math.prod(sizes)).reshape(sizes)
        if iota[4]:
            grid = grid.transpose([int(axis) for axis in iota[4].split(",")])
        return tuple(grid.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return tuple(int(member) for member in listed[1].split(","))
    return tuple(range(devices))


def collective(
    instruction: Instruction, operand_bytes: int, mesh: Mesh, topology: Topology
) -> Collective | None:
    """What a collective moves, and how long that should take.

    The time is the larger of bytes over bandwidth and of the hops that the first byte takes. The bandwidth is
    that of the links of the group (`chips.ring`), all of which a collective uses; a permutation uses one.

    Args:
        instruction: a collective or the start of one.
        operand_bytes: bytes of its operands on one device.
        mesh: the device mesh.
        topology: of the mesh's devices.

    Returns:
        None for any other instruction, and for a group of one.

    Source: J. Austin et al. 2025, "How to Scale Your Model", chapter 3 (the cost of each kind on a torus).
    """
    kind = kind_of(instruction.opcode)
    if kind is None:
        return None
    group = first_group(instruction.text, mesh.size)
    if len(group) < 2:
        return None
    devices = mesh.devices.flat
    coordinates = [getattr(devices[i], "coords", (i,)) for i in group]
    slices = [getattr(devices[i], "slice_index", None) or 0 for i in group]
    links = ring(topology, coordinates, slices)
    n = links.members
    part = (n - 1) / n
    direction = 0
    if kind == "all-gather":
        whole = operand_bytes * n
        sent, seconds = whole * part, whole * part / links.bandwidth
    elif kind == "reduce-scatter":
        whole = operand_bytes
        sent, seconds = whole * part, whole * part / links.bandwidth
    elif kind == "all-reduce":
        whole = operand_bytes
        sent, seconds = 2 * whole * part, 2 * whole * part / links.bandwidth
    elif kind == "collective-permute":
        whole = operand_bytes
        hops = ring(topology, coordinates[:2], slices[:2]).hops
        sent, seconds = whole, whole * hops / links.one_way
        direction = 1 if group[1] > group[0] else -1
        links = links._replace(hops=hops)
    else:
        whole = operand_bytes
        sent, seconds = whole * part, whole * n / (4 * links.bandwidth)
    seconds = max(seconds, HOP * links.hops)
    axis = axis_of(group, mesh)
    return Collective(kind, axis, int(sent), int(whole), seconds, direction, instruction.op_name)


def axis_of(group: Sequence[int], mesh: Mesh) -> str:
    """The mesh axes along which the members of a group differ, joined by "+"."""
    places = np.stack(np.unravel_index(np.asarray(group), mesh.devices.shape), axis=1)
    names = [
        name for name, column in zip(mesh.axis_names, places.T, strict=True) if len(set(column.tolist())) > 1
    ]
    return "+".join(names)
