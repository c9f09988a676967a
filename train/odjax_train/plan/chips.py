"""What is known of accelerators: speeds, memories, links; and the topologies that can be planned for."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from odjax_train.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One device as a program sees it.

    Attributes:
        name: such as "v5e".
        flops: bfloat16 operations a second of the matrix units.
        memory: bytes that a program may take.
        bandwidth: bytes a second to that memory.
        link: bytes a second over one link to a neighbour, one way.
        clock: cycles a second; 0 where no estimate is in cycles.
        dimensions: of the torus; 0 where devices are connected by a switch, over one link each.
        ring: a dimension with a multiple of that many chips has links that close it to a ring.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    clock: float = 0.0
    dimensions: int = 0
    ring: int = 1


# TPU: peak rates and links as Google Cloud documents them for each generation; clocks are what the peak rate
# and the sizes of the matrix units give (v5e: 4 of 128 x 128, 2 operations each); memories are what the
# compiler of libtpu 0.0.42.1 leaves to a program. v4 counts one of the two cores of a chip, as JAX's
# topologies do.
TPUS = {
    chip.name: chip
    for chip in (
        Chip("v4", 137.5e12, int(15.25 * GIB), 0.6e12, 45e9, 1.05e9, 3, 4),
        Chip("v5e", 197e12, int(15.75 * GIB), 0.81e12, 45e9, 1.5e9, 2, 16),
        Chip("v5p", 459e12, int(95.74 * GIB), 2.77e12, 90e9, 1.75e9, 3, 4),
        Chip("v6e", 918e12, int(31.25 * GIB), 1.64e12, 90e9, 1.75e9, 2, 16),
    )
}
# Dense bfloat16 rates, memories and NVLink (one way) of NVIDIA's data sheets, SXM forms.
GPUS = {
    chip.name: chip
    for chip in (
        Chip("a100", 312e12, 80 * 10**9, 2.04e12, 300e9),
        Chip("h100", 989e12, 80 * 10**9, 3.35e12, 450e9),
        Chip("h200", 989e12, 141 * 10**9, 4.8e12, 450e9),
    )
}
SWITCHED = 8  # GPUs of a host; beyond it the network counts
NETWORK = 50e9  # bytes a second of a GPU to other hosts, one way (400 Gbit/s)
DATA_CENTRE = 6.25e9  # bytes a second of a TPU chip between slices, one way (25 GB/s a host of four)

# As Google Cloud sells them: the number counts chips for v5e and v6e, cores (two a chip) for v4 and v5p.
_SOLD = {
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"},
}
_SOLD |= {"v6e": _SOLD["v5e"], "v4": _SOLD["v5p"]}

HERE, CPU = "here", "cpu"
KNOWN = (
    "TPU: "
    + ", ".join(f"{name}:{'2x4' if chip.dimensions == 2 else '2x2x4'}" for name, chip in TPUS.items())
    + " (any sizes) or as they are sold, v5e-256, v5p-512; GPU: "
    + ", ".join(f"{name}:8" for name in GPUS)
    + f" (any number); or {HERE!r}, the devices of this machine, and {CPU}:8, so many virtual ones"
)


class Topology(NamedTuple):
    """Devices to plan for.

    Attributes:
        name: as the compiler knows it, such as "v5e:16x16", or as it was given.
        kind: "tpu" (compiled for), "gpu" (partitioned as for one, not compiled) or "here" (measured).
        chip: what is known of one, None where nothing is.
        devices: how many there are, 0 for all of this machine's.
        sizes: of the torus.
        slices: how many such tori, connected by the network.
    """

    name: str
    kind: str
    chip: Chip | None
    devices: int
    sizes: tuple[int, ...] = ()
    slices: int = 1


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Reads the name of a topology.

    Args:
        text: such as "v5e:16x16", "v5e-256", "h100:8" or "here".
        slices: of a TPU.

    Raises:
        UserError: listing what is known.

    >>> parse_topology("v5p-512").sizes
    (4, 8, 8)
    """
    if slices < 1:
        raise UserError(f"--slices must be at least 1, got {slices}")
    name, _, size = re.sub("-", ":", text, count=1).partition(":")
    if slices > 1 and name not in TPUS:
        raise UserError(f"--slices {slices}: only TPUs have slices, --topology is {text!r}")
    if text == HERE:
        return Topology(text, "here", None, 0)
    if name == CPU and size.isdigit() and int(size) > 0:
        return Topology(text, "here", None, int(size))
    if name in GPUS and size.isdigit() and int(size) > 0:
        return Topology(text, "gpu", GPUS[name], int(size))
    if name not in TPUS:
        raise UserError(f"--topology {text!r} is not known; there are {KNOWN}")
    chip = TPUS[name]
    if size.isdigit():
        if int(size) not in _SOLD[name]:
            raise UserError(
                f"--topology {text!r}: {name} is sold as {', '.join(f'{name}-{n}' for n in _SOLD[name])}; "
                f"other sizes are written {name}:{'x'.join(['4'] * chip.dimensions)}"
            )
        size = _SOLD[name][int(size)]
    if not re.fullmatch(r"\d+(x\d+)*", size):
        raise UserError(f"--topology {text!r} is not known; there are {KNOWN}")
    sizes = tuple(map(int, size.split("x")))
    host = (2,) * 2 + (1,) * (chip.dimensions - 2)
    if len(sizes) != chip.dimensions or any(s < 1 or s % h for s, h in zip(sizes, host, strict=True)):
        raise UserError(
            f"--topology {text!r}: a {name} has {chip.dimensions} dimensions, and its hosts have "
            f"{'x'.join(map(str, host))} chips: give such as {name}:{'x'.join('4' * chip.dimensions)}"
        )
    cores = 2 if name == "v4" else 1
    return Topology(f"{name}:{size}", "tpu", chip, math.prod(sizes) * cores * slices, sizes, slices)


def gpu_of_kind(kind: str) -> Chip | None:
    """What is known of a GPU by the name that JAX gives its kind, None for others.

    >>> gpu_of_kind("NVIDIA H100 80GB HBM3").name
    'h100'
    """
    return next((chip for name, chip in GPUS.items() if name.upper() in kind), None)


class Ring(NamedTuple):
    """The links along which a group of devices communicates.

    Attributes:
        members: devices in the group.
        bandwidth: bytes a second that leave a device towards the others, all its links together.
        one_way: of a single link.
        hops: links between the two devices of the group that are farthest apart.
    """

    members: int
    bandwidth: float
    one_way: float
    hops: int


def ring(topology: Topology, coordinates: Sequence[Sequence[int]], slices: Sequence[int]) -> Ring:
    """The links of a group of devices.

    A group that spans several dimensions of the torus is taken to use all of them, in both directions where
    links close them to a ring, as the compiler's own algorithms do.

    Args:
        topology: it lies in.
        coordinates: of each device.
        slices: index of the slice of each device, of GPUs that of the host.
    """
    chip = topology.chip
    members = len(coordinates)
    if chip.dimensions == 0:
        speed = chip.link if len(set(slices)) == 1 else NETWORK
        return Ring(members, speed, speed, 1)
    if len(set(slices)) > 1:
        return Ring(members, DATA_CENTRE, DATA_CENTRE, 1)
    places = np.asarray(coordinates)[:, : chip.dimensions]
    ways = hops = 0
    for axis, size in enumerate(topology.sizes):
        span = len(set(places[:, axis].tolist()))
        if span > 1:
            closed = span == size and size % chip.ring == 0
            ways += 2 if closed else 1
            hops += span // 2 if closed else span - 1
    return Ring(members, max(ways, 1) * chip.link, chip.link, max(hops, 1))
