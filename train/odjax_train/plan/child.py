"""The process of the compiler, `python -m odjax_train.plan.child REQUEST`: a line of JSON for each part.

It is a process of its own because the compiler may end the one it runs in.
"""

import dataclasses
import functools
import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from odjax_kernels import hlo, hlo_flops
from odjax_train import config as configs
from odjax_train.errors import UserError
from odjax_train.experiment import Experiment
from odjax_train.federated.feed import round_examples, step_inputs
from odjax_train.flags import PlanFlags
from odjax_train.mesh import MeshShape, make_mesh
from odjax_train.plan import gpu, measure
from odjax_train.plan.chips import Topology, parse_topology
from odjax_train.plan.collectives import Collective, found
from odjax_train.plan.flops import model_flops
from odjax_train.plan.memory import largest, state_memory
from odjax_train.plan.model import on_mesh, setting
from odjax_train.plan.parts import Part, Traffic
from odjax_train.plan.schedule import play
from odjax_train.program import Program, build


def devices(topology: Topology) -> list[jax.Device]:
    """The devices to compile for; without a GPU compiler virtual CPU devices in the place of GPUs."""
    if topology.kind == "tpu":
        from jax.experimental import topologies

        more = {"num_slices": topology.slices} if topology.slices > 1 else {}
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **more)
        return list(described.devices)
    if topology.kind == "gpu" and gpu.is_available():
        return gpu.devices(topology)
    if topology.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", topology.devices)
    return jax.devices()


def functions(program: Program) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The functions of a program by name, each with the shapes it is called with."""
    state = program.state
    return {
        "init": (program.init, ()),
        "step": (program.step, (state, step_inputs(program))),
        "evaluate": (program.evaluate, (state.params, state.collections, program.batch)),
        **{edit.name: (apply, (state,)) for edit, apply in program.edits},
    }


def report(
    name: str, lower: Callable[[], jax.stages.Lowered], program: Program, topology: Topology, needed: float
) -> Part:
    """Compiles one function and says what it will do, or on the devices that are here what it does.

    Args:
        name: of the part.
        lower: what lowers it.
        program: it belongs to.
        topology: of the mesh's devices.
        needed: the model's operations in it, on one device.
    """
    begin = time.perf_counter()
    with program.context():
        compiled = lower().compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    parsed = hlo.parse(compiled.as_text())
    part = Part(
        name=name,
        compile_seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=hlo_flops.flops(parsed),
        model_flops=needed,
        kernels=dict(Counter(calls(parsed))),
        largest=largest(parsed),
    )
    if topology.kind == "tpu" or (topology.kind == "gpu" and gpu.is_available()):
        played = play(parsed, program.mesh, topology)
        return dataclasses.replace(
            part,
            seconds=played.use.seconds,
            use=played.use._asdict(),
            traffic=summed(played.collectives),
            guessed=played.guessed,
            unknown_loops=played.unknown_loops,
        )
    part = dataclasses.replace(part, traffic=summed(found(parsed, program.mesh, topology)))
    if topology.kind == "here":
        return dataclasses.replace(part, seconds=measure.seconds(program, name, compiled), measured=True)
    use = {
        "compute": part.flops / topology.chip.flops,
        "collectives": sum(each.seconds for each in part.traffic),
    }
    return dataclasses.replace(part, use=use, seconds=sum(use.values()))


def calls(program: hlo.Program) -> list[str]:
    """Pallas kernels of a TPU program and what a GPU program calls of NVIDIA's libraries, by name."""
    every = [i for _, i, _ in hlo.walk(program)]
    kernels = [i.name.split(".")[0] for i in every if i.target == "tpu_custom_call"]
    return kernels + [i.target for i in every if i.target.startswith("__cu")]


def cuda_calls(function: Callable[..., Any], arguments: tuple[Any, ...], program: Program) -> dict[str, int]:
    """What a function calls outside of XLA when it is lowered for CUDA; lowering needs no GPU."""
    with program.context():
        text = jax.export.export(function, platforms=["cuda"])(*arguments).mlir_module()
    return dict(Counter(re.findall(r"custom_call @([\w$.]+)", text)))


def summed(collectives: tuple[tuple[Collective, float], ...]) -> tuple[Traffic, ...]:
    """Collectives added up by kind and axis, the longest first."""
    groups: dict[tuple[str, str], list[tuple[Collective, float]]] = defaultdict(list)
    for each, times in collectives:
        groups[each.kind, each.axis].append((each, times))
    found = [
        Traffic(
            kind,
            axis,
            sum(times for _, times in members),
            int(sum(each.sent * times for each, times in members)),
            max(each.whole for each, _ in members),
            sum(each.seconds * times for each, times in members),
        )
        for (kind, axis), members in groups.items()
    ]
    return tuple(sorted(found, key=lambda traffic: -traffic.seconds))


def answers(request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Builds the experiment on the topology's mesh and compiles the parts asked for.

    Args:
        request: config, flags, topology, slices, mesh (or None), parts.

    Yields:
        name of a part and what `Part` holds; of "head" the state's memory and the names of all parts.
    """
    _begin(request["parts"][0])  # the compiler may end the process before there is anything to compile
    topology = parse_topology(request["topology"], request["slices"])
    config = configs.load(Path(request["config"]))
    config, _ = configs.parse(config, PlanFlags, request["flags"], "odjax plan")
    experiment = config.experiment()
    shape = experiment.mesh if request["mesh"] is None else MeshShape.parse(request["mesh"])
    mesh = make_mesh(shape, devices(topology))
    program = build(experiment, mesh)
    step, evaluation = model_flops(experiment, program.state, program.batch)
    if experiment.federated is not None:
        step *= round_examples(program) / experiment.batch
    needed = {"step": step / mesh.size, "evaluate": evaluation / mesh.size}
    compiled = functions(program)
    for name in request["parts"]:
        _begin(name)
        if name == "head":
            memory, biggest = state_memory(program)
            head = {
                "mesh": list(mesh.devices.shape),
                "devices": mesh.size,
                "batch": experiment.batch,
                "tokens": tokens(program),
                "memory": memory,
                "largest": [buffer._asdict() for buffer in biggest],
                "parts": list(compiled),
                "kind": mesh.devices.flat[0].device_kind,
            }
            yield name, head
            continue
        function, arguments = compiled[name]
        lower = functools.partial(function.lower, *arguments)
        try:
            part = report(name, lower, program, topology, needed.get(name, 0.0))
            if topology.kind == "gpu" and not gpu.is_available():
                part = dataclasses.replace(part, kernels=cuda_calls(function, arguments, program))
        except Exception as error:  # what the compiler says, whatever it raises
            part = Part(name=name, error=" ".join(f"{type(error).__name__}: {error}".split())[:4000])
        yield name, part_record(part)


def facts(request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What decides over memory and time of candidates, nothing compiled.

    Args:
        request: config, flags, topology, slices, meshes, settings (lists of more flags), parts ("mesh i" and
            "setting i", those that are asked for).

    Yields:
        each part with what `plan.model` makes of it, or an error.
    """
    _begin(request["parts"][0])
    topology = parse_topology(request["topology"], request["slices"])
    every = devices(topology)
    loaded = configs.load(Path(request["config"]))

    def experiment(more: list[str]) -> Experiment:
        return configs.parse(loaded, PlanFlags, [*request["flags"], *more], "odjax plan")[0].experiment()

    # Whether the microbatches of a candidate divide by its mesh is seen where both are known.
    first = dataclasses.replace(experiment([]), accumulate=1)
    for name in request["parts"]:
        _begin(name)
        kind, _, index = name.partition(" ")
        try:
            if kind == "mesh":
                program = build(first, make_mesh(MeshShape.parse(request["meshes"][int(index)]), every))
                yield name, on_mesh(first, program)._asdict()
            else:
                each = experiment(request["settings"][int(index)])
                program = build(each, make_mesh(MeshShape(1, 1, 1), every[:1]))
                yield name, setting(each, program)._asdict()
        except Exception as error:  # a kernel that refuses the shapes may raise anything
            yield name, {"error": _said(error)}


def _begin(name: str) -> None:
    print(f"begin {name}", file=sys.stderr, flush=True)


def _said(error: Exception) -> str:
    """An error in a line, with its type where it is not for people."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: {text}"


def tokens(program: Program) -> int:
    """Tokens in a step, 0 where examples are none."""
    leaf = program.batch.get("targets", program.batch.get("tokens"))
    return leaf.size if leaf is not None and len(leaf.shape) == 2 else 0


def part_record(part: Part) -> dict[str, Any]:
    """A part as JSON can hold it."""
    return {
        **dataclasses.asdict(part),
        "largest": [buffer._asdict() for buffer in part.largest],
        "traffic": [traffic._asdict() for traffic in part.traffic],
    }


def main(text: str) -> None:
    """Answers a request, a line of JSON an answer; a mistake found is one too."""
    request = json.loads(text)
    try:
        for name, record in facts(request) if "meshes" in request else answers(request):
            print(json.dumps({"name": name, "record": record}), flush=True)
    except Exception as error:  # whatever the configuration raises
        print(json.dumps({"name": "mistake", "record": {"error": _said(error)}}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
