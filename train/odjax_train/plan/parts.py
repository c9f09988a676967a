"""What a plan says: the state, and one part for each compiled function; as values and as JSON."""

import dataclasses
from typing import Any, NamedTuple

from odjax_train.plan.chips import Chip


class Buffer(NamedTuple):
    """An array on one device.

    Attributes:
        name: path of a parameter, or the operation of the model that makes it.
        bytes: on one device.
        shape: on one device, such as "bf16[2,2048]".
    """

    name: str
    bytes: int
    shape: str


class Traffic(NamedTuple):
    """The collectives of one kind along the same mesh axes.

    Attributes:
        kind: such as "all-gather".
        axis: such as "fsdp".
        count: how many a step runs.
        sent: bytes that leave a device in all.
        largest: bytes of the largest array that one of them puts together or takes apart, on one device.
        seconds: of all of them, one after the other.
    """

    kind: str
    axis: str
    count: float
    sent: int
    largest: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Part:
    """One compiled function on one device; bytes and seconds are those of a device.

    Attributes:
        name: "step", "evaluate", "init" or an edit's.
        error: why it was not compiled, one line; "" where it was.
        short: bytes that the program needs beyond the memory, where that was the error.
        compile_seconds: tracing included.
        arguments: bytes of the state and the batch.
        outputs: bytes that are not a donated argument's.
        temporaries: bytes.
        flops: of the products in the compiled program, loops as often as they run.
        model_flops: that the model needs (`flops.model_flops`), divided by the devices; 0 for edits.
        seconds: estimated, or measured.
        measured: whether `seconds` was measured.
        use: where the time goes: name -> seconds.
        traffic: collectives.
        guessed: kind of operation without an estimate of the compiler -> seconds by its bytes.
        kernels: Pallas kernels and libraries that the program calls: name -> calls in its text.
        unknown_loops: loops that count once, because the program does not say how often they run.
        largest: the largest arrays that are made.
    """

    name: str
    error: str = ""
    short: int = 0
    compile_seconds: float = 0.0
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    flops: int = 0
    model_flops: float = 0.0
    seconds: float = 0.0
    measured: bool = False
    use: dict[str, float] = dataclasses.field(default_factory=dict)
    traffic: tuple[Traffic, ...] = ()
    guessed: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    largest: tuple[Buffer, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes that the program takes: arguments, results beside them, temporaries."""
        return self.arguments + self.outputs + self.temporaries

    def utilization(self, chip: Chip | None) -> float:
        """Model FLOPs utilization (MFU): what the model needs over what the chip could do in the time."""
        return self.model_flops / (self.seconds * chip.flops) if chip and self.seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan of a configuration on a topology.

    Attributes:
        config: path of the configuration.
        flags: its flags, as typed.
        topology: its name.
        chip: what is known of one device; None for unknown ones.
        devices: how many.
        mesh: devices along data, fsdp, tensor.
        batch: examples in a step.
        tokens: tokens in a step, 0 where examples are none.
        memory: kind of state -> bytes on one device: parameters, frozen parameters, optimizer, masks, ...
        largest: the largest arrays of the state.
        parts: the compiled functions.
        versions: of jax and the compiler.
        notes: what to know about the figures.
    """

    config: str
    flags: tuple[str, ...]
    topology: str
    chip: Chip | None
    devices: int
    mesh: tuple[int, int, int]
    batch: int
    tokens: int
    memory: dict[str, int]
    largest: tuple[Buffer, ...]
    parts: tuple[Part, ...]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def part(self, name: str) -> Part:
        """The part of that name."""
        return next(part for part in self.parts if part.name == name)

    @property
    def fits(self) -> bool:
        """Whether everything was compiled and takes no more than the device's memory."""
        limit = self.chip.memory if self.chip else float("inf")
        return all(not part.error and part.peak <= limit for part in self.parts)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON can hold it, with what is derived."""
    document = dataclasses.asdict(plan)
    document["chip"] = plan.chip._asdict() if plan.chip else None
    document["fits"] = plan.fits
    for part, record in zip(plan.parts, document["parts"], strict=True):
        record |= {
            "peak": part.peak,
            "utilization": part.utilization(plan.chip),
            "tokens_per_second": plan.tokens / part.seconds if part.name == "step" and part.seconds else 0.0,
            "largest": [buffer._asdict() for buffer in part.largest],
            "traffic": [traffic._asdict() for traffic in part.traffic],
        }
    document["largest"] = [buffer._asdict() for buffer in plan.largest]
    return document


def part_from_json(record: dict[str, Any]) -> Part:
    """The inverse of what `to_json` makes of a part."""
    names = {field.name for field in dataclasses.fields(Part)}
    kept = {name: value for name, value in record.items() if name in names}
    kept["traffic"] = tuple(Traffic(**each) for each in record.get("traffic", ()))
    kept["largest"] = tuple(Buffer(**each) for each in record.get("largest", ()))
    return Part(**kept)


def from_json(document: dict[str, Any]) -> Plan:
    """The inverse of `to_json`."""
    names = {field.name for field in dataclasses.fields(Plan)}
    kept = {name: value for name, value in document.items() if name in names}
    tuples = {name: tuple(kept[name]) for name in ("flags", "mesh", "notes")}
    return Plan(
        **{
            **kept,
            **tuples,
            "chip": Chip(**document["chip"]) if document["chip"] else None,
            "largest": tuple(Buffer(**each) for each in document["largest"]),
            "parts": tuple(part_from_json(record) for record in document["parts"]),
        }
    )
