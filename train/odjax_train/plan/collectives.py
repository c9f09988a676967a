"""The collectives of a compiled program: between whom, how many bytes, and how long they should take."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from odjax_kernels import hlo
from odjax_kernels.hlo import Instruction
from odjax_train.plan.chips import DATA_CENTRE, SWITCHED, Topology, ring

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
        every = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        targets = {source: target for source, target in every if source != target}
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
    n = len(group)
    whole = operand_bytes * n if kind == "all-gather" else operand_bytes
    sent = whole if kind == "collective-permute" else whole * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    direction = 0
    if kind == "collective-permute":
        direction = 1 if group[1] > group[0] else -1
    seconds = 0.0 if topology.chip is None else _seconds(kind, group, int(sent), mesh, topology)
    return Collective(kind, axis_of(group, mesh), int(sent), whole, seconds, direction, instruction.op_name)


def between_slices(instruction: Instruction, operand_bytes: int) -> tuple[str, Collective] | None:
    """What a TPU program hands to its host to be exchanged with other slices.

    Args:
        instruction: a "send", or the "recv" that belongs to it.
        operand_bytes: bytes of its operands on one device.

    Returns:
        A name that the two have in common, and the transfer; None for any other instruction.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.text)
    if kind is None or name is None:
        return None
    what = f"{kind[1].lower().replace('_', '-')} by the network"
    seconds = operand_bytes / DATA_CENTRE
    return name[1], Collective(what, "slices", operand_bytes, operand_bytes, seconds, 0, instruction.op_name)


def _seconds(kind: str, group: Sequence[int], sent: int, mesh: Mesh, topology: Topology) -> float:
    devices = mesh.devices.flat
    if kind == "collective-permute":
        group = group[:2]
    coordinates = [getattr(devices[i], "coords", (i,)) for i in group]
    if topology.kind == "gpu":
        slices = [devices[i].id // SWITCHED for i in group]
    else:
        slices = [getattr(devices[i], "slice_index", None) or 0 for i in group]
    links = ring(topology, coordinates, slices)
    if kind == "collective-permute":
        seconds = sent * links.hops / links.one_way
    elif kind in ("all-to-all", "ragged-all-to-all"):  # a byte passes a quarter of the ring on average
        seconds = sent * links.members / (4 * links.bandwidth)
    else:
        seconds = sent / links.bandwidth
    return max(seconds, HOP * links.hops)


def found(program: hlo.Program, mesh: Mesh, topology: Topology) -> tuple[tuple[Collective, float], ...]:
    """The collectives of a program, each with how often it runs.

    Args:
        program: as `odjax_kernels.hlo.parse` reads it.
        mesh: the device mesh it was compiled for.
        topology: of the mesh's devices.
    """
    sizes = {
        name: {i.name: i.bytes for i in instructions} for name, instructions in program.computations.items()
    }
    pairs = []
    for name, i, times in hlo.walk(program):
        if kind_of(i.opcode):
            each = collective(i, sum(sizes[name].get(o, 0) for o in i.operands), mesh, topology)
            pairs += [(each, times)] if each is not None else []
    return tuple(pairs)


def axis_of(group: Sequence[int], mesh: Mesh) -> str:
    """The mesh axes along which the members of a group differ, joined by "+"."""
    places = np.stack(np.unravel_index(np.asarray(group), mesh.devices.shape), axis=1)
    names = [
        name for name, column in zip(mesh.axis_names, places.T, strict=True) if len(set(column.tolist())) > 1
    ]
    return "+".join(names)
