"""Plans: the compiler's process started, and its answers put together."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from odjax.version import __version__
from odjax_kernels import aot
from odjax_train.config import Config
from odjax_train.errors import UserError
from odjax_train.plan import gpu
from odjax_train.plan.chips import Topology, gpu_of_kind
from odjax_train.plan.parts import Buffer, Part, Plan, part_from_json

_PRODUCTS = "FLOPs are those of the products; MFU counts what the model needs once, attention in full"
NOTES = {
    "tpu": (
        "times are estimates: the compiler's cycles of each fusion, in the order of its schedule, loops as "
        "often as they run; what has no estimate counts by the bytes it touches",
        "kernels of splash attention count the instruction words of their schedule, v4's and v5p's by v5e's",
        "the compiler gives no time for collectives: theirs is bytes over the bandwidth of their axis' "
        "links, beside the computation where the schedule starts them early; contention is not seen",
        _PRODUCTS,
    ),
    "gpu": (
        "there is no GPU compiler (pip install 'odjax[gpu-aot]'): the program is partitioned as for GPUs and "
        "compiled for CPUs, whose temporaries are not a GPU's",
        "times are products at the peak rate and collectives at the links' full bandwidth, one after the "
        "other, and nothing else; run odjax plan on the machine itself to measure",
        _PRODUCTS,
    ),
    "gpu compiled": (
        "times are the roofline of each operation in the order of the schedule: products at the peak rate or "
        "their bytes at the memory's bandwidth, loops as often as they run; attention of cuDNN by its bytes",
        "collectives take bytes over the links' bandwidth, beside the computation where the schedule starts "
        "them early; real steps take longer by what kernels miss of the peak",
        _PRODUCTS,
    ),
    "here": ("times are measured, with made-up batches", _PRODUCTS),
}


def check_compiler() -> None:
    """Raises when there is no TPU compiler, or one that this jaxlib does not go with.

    Raises:
        UserError: saying what to install.
    """
    given = os.environ.get("TPU_LIBRARY_PATH")
    if given and not os.path.isfile(given):
        raise UserError(
            f"TPU_LIBRARY_PATH is {given}, which is no file: libtpu.so, the TPU compiler, or unset it"
        )
    if not aot.is_available():
        raise UserError("libtpu, the TPU compiler, is not installed: pip install 'odjax[aot]'")
    wanted = next(
        (
            found[1]
            for line in importlib.metadata.requires("jax") or ()
            if (found := re.match(r"libtpu\s*==\s*(\d+(?:\.\d+)*)(?:\.\*)?\s*;", line))
        ),
        None,
    )
    have = aot.libtpu_version()
    if wanted and have and not f"{have}.".startswith(f"{wanted}."):
        raise UserError(
            f"libtpu {have} does not go with jax {jax.__version__}, which wants libtpu {wanted}.*: "
            f"pip install 'libtpu=={wanted}.*'"
        )


def ask(
    config: Config,
    topology: Topology,
    mesh: str | None,
    *,
    flags: Sequence[str] = (),
    parts: Sequence[str] | None = None,
    timeout: float = 1800.0,
) -> Plan:
    """A configuration compiled for a topology, in a process of its own.

    A part that takes the compiler down, or does not fit into the memory, is one with an error.

    Args:
        config: with the flags that were typed for it.
        topology: of devices.
        mesh: data,fsdp,tensor; None for the configuration's own.
        flags: more flags of the configuration, which win over its own.
        parts: what to compile; None for everything.
        timeout: seconds for the compiler's process.

    Raises:
        UserError: what is wrong with the configuration or the mesh.
    """
    request = {**_request(config, topology, flags), "mesh": mesh}
    with _asked(topology, timeout) as said:
        head = said(request, ["head"])["head"]
        if isinstance(head, str):
            raise UserError(f"the configuration could not be built for {topology.name}: {head}")
        names = list(parts or head["parts"])
        found = said(request, names)
    return Plan(
        config=str(config.path),
        flags=(*config.flags, *flags),
        topology=topology.name,
        chip=topology.chip or gpu_of_kind(head["kind"]),
        devices=head["devices"],
        mesh=tuple(head["mesh"]),
        batch=head["batch"],
        tokens=head["tokens"],
        memory=head["memory"],
        largest=tuple(Buffer(**each) for each in head["largest"]),
        parts=tuple(_part(name, found[name]) for name in names),
        versions=versions(topology),
        notes=NOTES["gpu compiled" if topology.kind == "gpu" and gpu.is_available() else topology.kind],
    )


def ask_facts(
    config: Config,
    topology: Topology,
    meshes: Sequence[str],
    settings: Sequence[Sequence[str]],
    *,
    timeout: float,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What decides over memory and time of candidates (`plan.model`), traced in a process of its own.

    Args:
        config: with the flags that were typed for it.
        topology: of devices.
        meshes: each data,fsdp,tensor.
        settings: more flags of the configuration.
        timeout: seconds.

    Returns:
        a record for each mesh and each setting, or {"error": why there is none}.

    Raises:
        UserError: what is wrong with the configuration.
    """
    names = [f"mesh {i}" for i in range(len(meshes))] + [f"setting {i}" for i in range(len(settings))]
    with _asked(topology, timeout) as said:
        request = _request(config, topology, ())
        found = said({**request, "meshes": list(meshes), "settings": list(map(list, settings))}, names)
    records = [{"error": each} if isinstance(each, str) else each for each in map(found.get, names)]
    return records[: len(meshes)], records[len(meshes) :]


def _request(config: Config, topology: Topology, flags: Sequence[str]) -> dict[str, Any]:
    return {
        "config": str(config.path),
        "flags": [*config.flags, *flags],
        "topology": topology.name,
        "slices": topology.slices,
    }


@contextlib.contextmanager
def _asked(topology: Topology, timeout: float) -> Iterator[Callable[..., dict[str, Any]]]:
    """A function that has requests answered; while it is in use, nobody else compiles for TPUs."""
    compiles = topology.kind == "tpu"
    if compiles:
        check_compiler()
    environment = dict(os.environ)
    if compiles:
        environment = aot.compiler_environment()
    elif topology.kind == "gpu":
        environment = gpu.compiler_environment()

    def said(request: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        def command(missing: Sequence[str]) -> list[str]:
            asked = json.dumps({**request, "parts": list(missing)})
            return [sys.executable, "-m", "odjax_train.plan.child", asked]

        found = aot.run_apart(command, names, environment=environment, timeout=timeout)
        if "mistake" in found:
            raise UserError(found["mistake"]["error"])
        return found

    with aot.one_at_a_time() if compiles else contextlib.nullcontext():
        yield said


def device_count() -> int:
    """How many devices this machine has, found by a process of its own, so that they stay free."""
    counted = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.device_count())"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(counted.stdout)


def versions(topology: Topology) -> dict[str, str]:
    """Versions of what a plan depends on."""
    compiler = {}
    if topology.kind == "tpu":
        compiler = {"libtpu": aot.libtpu_version() or "unknown"}
    elif topology.kind == "gpu" and gpu.is_available():
        compiler = {"CUDA plugin": gpu.version()}
    return {"odjax": __version__, "jax": jax.__version__, **compiler}


def _part(name: str, said: dict | str) -> Part:
    if isinstance(said, str):
        return Part(name=name, error=said)
    part = part_from_json(said)
    return _explained(part) if part.error else part


_SIZE = r"([\d.]+)([KMGT]?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _explained(part: Part) -> Part:
    """A part whose error, when it is about memory, says how much is missing and what is large."""
    text = part.error
    if "RESOURCE_EXHAUSTED" not in text:
        return dataclasses.replace(part, error=text[:600])
    over = re.search(rf"Exceeded hbm capacity by {_SIZE}", text)
    total = re.search(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", text)
    short = 0
    if over:
        short = int(float(over[1]) * _UNITS[over[2]])
    elif total:
        short = int(float(total[1]) * _UNITS[total[2]] - float(total[3]) * _UNITS[total[4]])
    buffers = re.findall(
        rf"Size: {_SIZE} Operator: op_(?:type=\S+ )?name=\"([^\"]*)\".*?Shape: (\w+\[[\d,]*\])", text
    )
    largest = tuple(
        Buffer("/".join(name.split("/")[1:]), int(float(size) * _UNITS[unit]), shape)
        for size, unit, name, shape in buffers
    )
    return dataclasses.replace(
        part, error="does not fit into the memory", short=short, largest=largest or part.largest
    )
