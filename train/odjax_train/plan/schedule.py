"""A compiled TPU program played through: estimates in the order of the schedule, transfers beside them.

The TPU compiler writes the cycles that it expects next to its fusions, and puts the start and the end of each
transfer between chips, or between memories, where it wants them. Time passes with the estimates; a transfer
runs from its start for as long as its bytes take (`collectives.collective`), after the transfers on the same
links that started before it; where its end is reached too early, the program waits. A loop's body is played
once and counts as often as it runs; its transfers do not reach over to the next trip.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from odjax_kernels import hlo, hlo_flops
from odjax_kernels.hlo import HBM, Instruction, Program
from odjax_train.plan.chips import Topology
from odjax_train.plan.collectives import Collective, between_slices, collective, kind_of
from odjax_train.plan.kernels import attention_seconds

HOST = 5  # the memory space of the host
HOST_LINK = 8e9  # bytes a second of a chip to its host and back: PCIe, shared by the chips of a host
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "partition-id",
    "replica-id",
    "after-all",
    "opt-barrier",
    "recv",
    "send-done",
    "iota",
    "",
}
FREE_CALLS = {
    "AllocateBuffer",
    "ConcatBitcast",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
}


class Use(NamedTuple):
    """Where the time of a program goes, seconds of one device.

    Attributes:
        compute: what the compiler estimates.
        kernels: Pallas kernels.
        modelled: operations without an estimate, by the bytes they touch.
        collectives: waiting for other chips.
        copies: waiting for copies between memories.
    """

    compute: float = 0.0
    kernels: float = 0.0
    modelled: float = 0.0
    collectives: float = 0.0
    copies: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self)

    def plus(self, other: "Use", times: float = 1.0) -> "Use":
        """The sum with a multiple of another one."""
        return Use(*(a + times * b for a, b in zip(self, other, strict=True)))


class Played(NamedTuple):
    """What playing a program gave.

    Attributes:
        use: where the time goes.
        collectives: each with how often it runs.
        guessed: kind of operation without an estimate -> seconds modelled.
        unknown_loops: loops that counted once, because the text does not say how often they run.
    """

    use: Use
    collectives: tuple[tuple[Collective, float], ...]
    guessed: dict[str, float]
    unknown_loops: int


def play(program: Program, mesh: Mesh, topology: Topology) -> Played:
    """Plays a program compiled for a TPU.

    Args:
        program: as `odjax_kernels.hlo.parse` reads it.
        mesh: the device mesh it was compiled for.
        topology: of the mesh's devices.

    Returns:
        Where its time goes, and its collectives.
    """
    player = _Player(program, mesh, topology)
    use = player.played(program.entry)
    return Played(use, tuple(player.found(program.entry)), player.guesses(program.entry), player.unknown)


class _Player:
    def __init__(self, program: Program, mesh: Mesh, topology: Topology) -> None:
        self.program, self.mesh, self.topology = program, mesh, topology
        self.chip = topology.chip
        self.known: dict[str, Use] = {}
        self.own: dict[str, list[Collective]] = {}
        self.guessed: dict[str, dict[str, float]] = {}
        self.runs: dict[str, list[tuple[str, float]]] = {}
        self.unknown = 0

    def played(self, name: str) -> Use:
        """The time of a computation, from idle links."""
        if name in self.known:
            return self.known[name]
        self.own[name], self.guessed[name], self.runs[name] = [], {}, []
        shapes = {i.name: i for i in self.program.computations[name]}
        use, clock = Use(), 0.0
        ends: dict[str, tuple[float, str]] = {}
        busy: dict[object, float] = {}

        def begin(key: str, resource: object, seconds: float, waits_as: str) -> None:
            ends[key] = (max(clock, busy.get(resource, 0.0)) + seconds, waits_as)
            busy[resource] = ends[key][0]

        def spend(part: str, seconds: float) -> None:
            nonlocal use, clock
            clock += seconds
            use = use._replace(**{part: getattr(use, part) + seconds})

        def wait(key: str) -> None:
            end, part = ends.pop(key, (clock, "copies"))
            spend(part, max(0.0, end - clock))

        for i in self.program.computations[name]:
            if i.opcode in FREE or i.target in FREE_CALLS:
                continue
            other = (
                i if i.opcode == "send" else shapes.get(i.operands[0]) if i.opcode == "recv-done" else None
            )
            exchange = between_slices(other, sum(shapes[o].bytes for o in i.operands)) if other else None
            if exchange is not None:
                key, found = exchange
                if i.opcode == "send":
                    self.own[name].append(found)
                    begin(key, "network", found.seconds, "collectives")
                else:
                    wait(key)
                continue
            found = self._collective(i, shapes)
            if found is not None:
                self.own[name].append(found)
                begin(i.name, (found.axis, found.direction), found.seconds, "collectives")
                if not i.opcode.endswith("-start"):
                    wait(i.name)
            elif i.opcode.endswith("-start"):
                begin(i.name, "copies", self._copy(i), "copies")
            elif i.opcode.endswith(("-done", "-update")):
                if i.opcode.endswith("-done") and i.operands:
                    wait(i.operands[0])
            elif i.opcode in ("while", "call", "conditional"):
                parts = hlo.children(self.program, name, i)
                if i.opcode == "while" and hlo.trips(self.program, name, i) is None:
                    self.unknown += 1
                times = [self.played(child) for child, _ in parts]
                if i.opcode == "conditional":  # the longest branch
                    best = max(range(len(parts)), key=lambda k: times[k].seconds)
                    parts, times = [parts[best]], [times[best]]
                for (child, count), part in zip(parts, times, strict=True):
                    self.runs[name].append((child, count))
                    use = use.plus(part, count)
                    clock += part.seconds * count
            else:
                inside = self._inside(i)
                for channel, inner, begins, _ in inside:
                    found = self._collective(inner, {o.name: o for o in self._body(i)})
                    if begins and found is not None:
                        self.own[name].append(found)
                        begin(channel, (found.axis, found.direction), found.seconds, "collectives")
                spend(*self._seconds(i, shapes, name))
                for channel, _, _, ends_here in inside:
                    if ends_here:
                        wait(channel)
        self.known[name] = use
        return use

    def _body(self, i: Instruction) -> tuple[Instruction, ...]:
        names = i.called("calls") if i.opcode == "fusion" else ()
        return self.program.computations[names[0]] if names else ()

    def _inside(self, i: Instruction) -> list[tuple[str, Instruction, bool, bool]]:
        """Collectives in a fusion: channel, instruction, whether it begins there, whether it ends there.

        The compiler carries some along through several fusions, also into loops, a piece at a time.
        """
        body = self._body(i)
        targets = {o.target for o in body}
        starts, stops = "AsyncCollectiveStart" in targets, "AsyncCollectiveDone" in targets
        found = []
        for o in body:
            if kind_of(o.opcode):
                if i.called("calls")[0].startswith("all-reduce-scatter"):  # each device keeps its part alone
                    o = o._replace(opcode="reduce-scatter")
                piece = re.search(r'"flag_start":"(-?\d+)"', o.text)
                whole = not (starts or stops) and (piece is None or piece[1] == "-1")
                found.append((o.channel, o, starts or whole, stops or whole))
        return found

    def _collective(self, i: Instruction, shapes: Mapping[str, Instruction]) -> Collective | None:
        if kind_of(i.opcode) is None:
            return None
        size = sum(shapes[name].bytes for name in i.operands if name in shapes)
        return collective(i, size, self.mesh, self.topology)

    def _copy(self, i: Instruction) -> float:
        """Seconds of an asynchronous copy between memories: by the slower of the two."""
        size = max((shape.bytes for shape in i.shapes), default=0)
        host = any(shape.space == HOST for shape in i.shapes)
        return size / (HOST_LINK if host else self.chip.bandwidth)

    def _seconds(self, i: Instruction, shapes: Mapping[str, Instruction], name: str) -> tuple[str, float]:
        if i.cycles is not None:
            return "compute", i.cycles / self.chip.clock
        inner = [o.cycles for o in self._body(i) if o.cycles is not None]
        if inner:
            return "compute", sum(inner) / self.chip.clock
        kind = i.target or i.opcode
        attention = attention_seconds(i, shapes, self.chip) if i.target == "tpu_custom_call" else None
        if attention is not None:
            return "kernels", attention
        seconds = self._touched(i, shapes) / self.chip.bandwidth
        if not self.chip.clock:  # no compiler's estimate at all: the roofline
            needed = hlo_flops.instruction_flops(self.program, name, i) / self.chip.flops
            if needed:
                return "compute", max(needed, seconds)
        if (
            i.opcode == "sort"
        ):  # a network of comparisons: a pass for each of log2(n) (log2(n) + 1) / 2 rounds
            rounds = math.log2(max(2, max(shape.dims[-1] for shape in i.shapes)))
            seconds *= rounds * (rounds + 1) / 2
        if seconds:
            self.guessed[name][kind] = self.guessed[name].get(kind, 0.0) + seconds
        return "modelled", seconds

    def _touched(self, i: Instruction, shapes: Mapping[str, Instruction]) -> int:
        """Bytes of the main memory that an instruction reads and writes.

        A fusion that starts or ends a transfer, or renames an array, touches none; of an array that a fusion
        slices it reads the slice.
        """
        body = self._body(i)
        if body and all(o.opcode in FREE or o.target in FREE_CALLS or kind_of(o.opcode) for o in body):
            return 0
        sizes = [
            sum(s.bytes for s in shapes[o].shapes if s.space == HBM) if o in shapes else 0 for o in i.operands
        ]
        for o in body:
            if o.opcode == "parameter":
                users = [user for user in body if o.name in user.operands]
                number = int(re.match(r"value=(\d+)", o.text)[1])
                if users and all(user.opcode in ("dynamic-slice", "slice") for user in users):
                    sizes[number] = min(sizes[number], sum(user.bytes for user in users))
        written = sum(shape.bytes for shape in i.shapes if shape.space == HBM)
        for o in [*body, *([] if body else [i])]:
            if o.opcode == "dynamic-update-slice":  # in place: the part alone is read and written
                whole = sum(shape.bytes for shape in o.shapes)
                part = next((other.bytes for other in body if other.name == o.operands[1]), None)
                if part is None and o.operands[1] in shapes:
                    part = shapes[o.operands[1]].bytes
                if part is not None and written >= whole:
                    written += part - whole
                    largest = max(range(len(sizes)), key=sizes.__getitem__)
                    sizes[largest] -= min(sizes[largest], whole)
        return sum(sizes) + written

    def found(self, name: str, times: float = 1.0) -> list[tuple[Collective, float]]:
        """The collectives that a computation runs, with how often."""
        all_ = [(each, times) for each in self.own.get(name, [])]
        for child, count in self.runs.get(name, []):
            all_ += self.found(child, times * count)
        return all_

    def guesses(self, name: str, times: float = 1.0) -> dict[str, float]:
        """Seconds by kind of operation that no estimate was given for."""
        total = {kind: times * seconds for kind, seconds in self.guessed.get(name, {}).items()}
        for child, count in self.runs.get(name, []):
            for kind, seconds in self.guesses(child, times * count).items():
                total[kind] = total.get(kind, 0.0) + seconds
        return total
