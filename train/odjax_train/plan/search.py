"""A search for the fastest way to run a configuration on a topology, and for what less memory costs.

Candidates are meshes, and those of the configuration's own flags that change how it runs and not what it
computes: `remat`, `accumulate`, `attention`. A model of memory and time that compiles nothing (`estimates`)
orders them; the promising ones are compiled, each in a process of its own, and what the compiler says is kept
by content, so that a search that was stopped goes on where it was.
"""

import hashlib
import inspect
import itertools
import json
import platform
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import odjax
import odjax_kernels
import odjax_train
from odjax.models.stack import REMAT_POLICIES
from odjax_train.config import Config
from odjax_train.errors import UserError
from odjax_train.plan.chips import Topology
from odjax_train.plan.model import OnMesh, Setting, expected
from odjax_train.plan.parts import Plan, from_json, to_json
from odjax_train.plan.planner import ask, ask_facts, versions

TENSOR = 16  # parts of the tensor axis that are tried at most
MICROBATCHES = (1, 2, 4, 8, 16)
TRACING = 3600.0  # seconds for all estimates at least, however little a compilation may take
SLACK = 1.5  # an estimate of memory above the chip's by more than that is not compiled
KERNELS = {"tpu": ("splash",), "gpu": (), "here": ("cudnn",)}  # cuDNN is looked for when it is traced


class Candidate(NamedTuple):
    """One way to run a configuration.

    Attributes:
        mesh: "data,fsdp,tensor".
        flags: of the configuration, name and value.
    """

    mesh: str
    flags: tuple[tuple[str, str], ...] = ()

    @property
    def typed(self) -> list[str]:
        """The configuration's flags as they are typed."""
        return [word for name, value in self.flags for word in (f"--{name}", value)]

    def accumulate(self, otherwise: int = 1) -> int:
        """Microbatches of a step; what is given where they are none of its flags."""
        return int(dict(self.flags).get("accumulate", otherwise))

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """The flags that decide what is traced: all but the number of microbatches."""
        return tuple((name, value) for name, value in self.flags if name != "accumulate")

    @property
    def line(self) -> str:
        """All of it, to be pasted."""
        return " ".join(["--mesh", self.mesh, *self.typed])


class Estimate(NamedTuple):
    """What is expected of a candidate before it is compiled, on one device.

    Attributes:
        bytes: of the memory.
        seconds: of a step; its operations instead, where nothing is known of the devices' speed.
    """

    bytes: float
    seconds: float


class Tried(NamedTuple):
    """A candidate with what the compiler said.

    Attributes:
        candidate: what was compiled.
        estimate: what was expected.
        plan: of the step alone; None where nothing could be built.
        error: why there is no plan, or no step in it.
    """

    candidate: Candidate
    estimate: Estimate
    plan: Plan | None
    error: str = ""

    @property
    def seconds(self) -> float:
        """Of a step; infinite where it does not run."""
        return self.plan.part("step").seconds if self.plan and self.plan.fits else float("inf")

    @property
    def bytes(self) -> int:
        """Peak of a device."""
        return self.plan.part("step").peak if self.plan else 0


def meshes(devices: int) -> list[str]:
    """All ways to divide devices over data, fsdp and tensor, the tensor axis up to 16 parts.

    >>> meshes(4)
    ['1,4,1', '2,2,1', '4,1,1', '1,2,2', '2,1,2', '1,1,4']
    """
    found = []
    for tensor in range(1, min(TENSOR, devices) + 1):
        if devices % tensor == 0:
            rest = devices // tensor
            found += [f"{data},{rest // data},{tensor}" for data in range(1, rest + 1) if rest % data == 0]
    return found


def candidates(config: Config, topology: Topology) -> list[Candidate]:
    """Every way to run the configuration that its flags allow; those that were typed stay as they are.

    Args:
        config: with the flags that were typed.
        topology: of devices.
    """
    typed = {
        word.split("=")[0].lstrip("-").replace("-", "_") for word in config.flags if word.startswith("--")
    }
    parameters = inspect.signature(config.function).parameters
    kinds = {"remat": str, "attention": str | None, "accumulate": int}
    free = [
        name
        for name, kind in kinds.items()
        if name in config.arguments
        and name not in typed
        and isinstance(config.arguments[name], kind)
        and not isinstance(config.arguments[name], bool)
    ]
    more = {
        "remat": [name for name in REMAT_POLICIES if name != "offload"],
        "attention": KERNELS[topology.kind],
    }
    values: dict[str, list[str]] = {}
    for name in free:
        if name in more:
            annotation = parameters[name].annotation
            allowed = _choices(annotation)
            others = [value for value in more[name] if allowed is None or value in allowed]
            none = ["None"] if type(None) in typing.get_args(annotation) else []
            values[name] = list(dict.fromkeys([str(config.arguments[name]), *none, *others]))
    if "accumulate" in free:
        batch = config.arguments.get("batch")
        values["accumulate"] = [str(n) for n in MICROBATCHES if batch is None or batch % n == 0]
    settings = [tuple(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    return [Candidate(mesh, flags) for mesh in meshes(topology.devices) for flags in settings]


def _choices(annotation: Any) -> set[Any] | None:
    """The values that a `Literal` or an optional one allows, None for other types."""
    parts = [annotation, *typing.get_args(annotation)]
    found = [part for part in parts if typing.get_origin(part) is typing.Literal]
    return {value for part in found for value in typing.get_args(part)} or None


def search(
    config: Config,
    topology: Topology,
    *,
    compiles: int,
    timeout: float,
    cache: Path,
    progress: Callable[[int, int, str], None] = lambda done, all_, what: None,
) -> list[Tried]:
    """Compiles the promising candidates.

    Args:
        config: with the flags that were typed.
        topology: of devices; not "here" without a number.
        compiles: how many candidates to compile at most.
        timeout: seconds for one compilation.
        cache: folder for what the compiler said.
        progress: called with the number done, that of all, and what comes next.

    Returns:
        What was tried, the fastest first, what failed last.

    Raises:
        UserError: no candidate can be built, with the reason.
    """
    progress(0, compiles, "estimating")
    known, reasons = estimates(config, topology, candidates(config, topology), cache, timeout)
    if not known:
        raise UserError(f"no mesh fits: {reasons}")
    tried = []
    chosen = list(itertools.islice(promising(known, topology), compiles))
    for candidate, estimate in chosen:
        progress(len(tried), len(chosen), candidate.line)
        tried.append(_compiled(config, topology, candidate, estimate, cache, timeout))
    progress(len(tried), len(chosen), "done")
    return sorted(tried, key=lambda each: (each.seconds, each.bytes))


def promising(known: dict[Candidate, Estimate], topology: Topology) -> Iterator[tuple[Candidate, Estimate]]:
    """Candidates that may fit, the fastest by estimate first; when none may, those that need least memory.

    Args:
        known: candidate -> estimate.
        topology: of devices.
    """
    limit = topology.chip.memory * SLACK if topology.chip else float("inf")
    fitting = {candidate: each for candidate, each in known.items() if each.bytes <= limit}
    if fitting:
        yield from sorted(
            fitting.items(), key=lambda pair: (pair[1].seconds, pair[0].accumulate(), pair[1].bytes)
        )
    else:
        yield from sorted(known.items(), key=lambda pair: pair[1].bytes)


def pareto(tried: Sequence[Tried]) -> list[Tried]:
    """Those that nothing else beats in both time and memory, the fastest first."""
    front: list[Tried] = []
    for each in sorted(tried, key=lambda each: (each.seconds, each.bytes)):
        if each.seconds < float("inf") and (not front or each.bytes < front[-1].bytes):
            front.append(each)
    return front


def _compiled(
    config: Config, topology: Topology, candidate: Candidate, estimate: Estimate, cache: Path, timeout: float
) -> Tried:
    file = cache / f"{_digest(config, topology, candidate.line)}.json"
    if file.is_file():
        known = json.loads(file.read_text())
        if not known["error"] or timeout <= known["timeout"]:  # what failed may do with more time
            plan = from_json(known["plan"]) if known["plan"] else None
            return Tried(candidate, estimate, plan, known["error"])
    plan, error = None, ""
    try:
        plan = ask(config, topology, candidate.mesh, flags=candidate.typed, parts=("step",), timeout=timeout)
        error = plan.part("step").error
    except (UserError, RuntimeError) as said:
        error = str(said).splitlines()[0]
    _keep(file, {"plan": to_json(plan) if plan else None, "error": error, "timeout": timeout})
    return Tried(candidate, estimate, plan, error)


def estimates(
    config: Config, topology: Topology, every: Sequence[Candidate], cache: Path, timeout: float
) -> tuple[dict[Candidate, Estimate], str]:
    """Memory and time of candidates by a model that compiles nothing.

    Args:
        config: with the flags that were typed.
        topology: of devices.
        every: the candidates.
        cache: folder for the answers.
        timeout: seconds for a process, an hour at least.

    Returns:
        candidate -> estimate, for those that can be built; and a reason why others cannot.
    """
    places = list(dict.fromkeys(each.mesh for each in every))
    settings = list(dict.fromkeys(each.setting for each in every))
    file = cache / f"{_digest(config, topology, repr((places, settings)))}.json"
    if file.is_file():
        on_mesh, by_flags = json.loads(file.read_text())
    else:
        typed = [[word for name, value in each for word in (f"--{name}", value)] for each in settings]
        on_mesh, by_flags = ask_facts(config, topology, places, typed, timeout=max(timeout, TRACING))
        _keep(file, [on_mesh, by_flags])
    on_mesh, by_flags = dict(zip(places, on_mesh, strict=True)), dict(zip(settings, by_flags, strict=True))
    found, reasons = {}, []
    for each in every:
        place, flags = on_mesh[each.mesh], by_flags[each.setting]
        mesh = tuple(map(int, each.mesh.split(",")))
        if broken := place.get("error") or flags.get("error"):
            reasons.append(broken)
            continue
        known = Setting(**flags)
        accumulate, rows = each.accumulate(known.accumulate), mesh[0] * mesh[1]
        if known.batch % accumulate or known.batch // accumulate % rows:
            reasons.append(f"batch {known.batch} in {accumulate} microbatches does not divide by {rows}")
            continue
        found[each] = Estimate(*expected(OnMesh(**place), known, mesh, accumulate, topology))
    return found, reasons[0] if reasons else ""


def _keep(file: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(value))
    partial.replace(file)


def _digest(config: Config, topology: Topology, what: str) -> str:
    """Names an answer by all it depends on: configuration, devices, versions, the packages' own code."""
    code = hashlib.blake2b(digest_size=16)
    for package in (odjax, odjax_kernels, odjax_train):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            code.update(file.read_bytes())
    arguments = {name: repr(value) for name, value in config.arguments.items()}
    parts = [
        config.text,
        arguments,
        topology.name,
        topology.slices,
        versions(topology),
        what,
        code.hexdigest(),
    ]
    if topology.kind == "here":  # measured: of this machine alone
        parts.append(platform.node())
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
