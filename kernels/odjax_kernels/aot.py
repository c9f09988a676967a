"""Ahead-of-time compiles for TPU chips without having one, each in a process of its own.

Interpret mode accepts kernels that the TPU compiler refuses, so that every kernel is compiled here too. The
compiler (libtpu, in the extra `aot`) may end the process it runs in and takes a lock per machine; it is
therefore started apart, one at a time, and what it makes of one case never reaches the caller but as a
`Compiled`.

The figures are the compiler's own static estimates, good for comparing programs and not for times. `cycles`
sums what XLA writes beside its fusions: the body of a loop counts once, of two branches the longer one, and
sorts, collectives and Pallas kernels carry no estimate. A `Schedule` counts instruction words of a kernel;
waiting for memory is not in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from odjax_kernels import hlo

TOPOLOGIES = ("v5e:2x4", "v5p:2x2x1", "v6e:2x4")
UNESTIMATED = {
    "sort",
    "while",
    "conditional",
    "all-gather",
    "all-reduce",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
}

Case = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""(name, function, arguments as a tuple of trees of `jax.ShapeDtypeStruct`)."""


class Schedule(NamedTuple):
    """Instruction words of a Pallas kernel, of which one is issued in a cycle.

    Attributes:
      bundles: in the whole kernel, one step of its grid with every branch.
      branches: in the conditional parts (`pl.when`) that hold no other one, in order.
      loops: in one trip of each loop inside a step of the grid, in order.
    """

    bundles: int
    branches: tuple[int, ...] = ()
    loops: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the TPU compiler says of one program on one chip.

    Attributes:
      name: of the case.
      topology: such as "v5e:2x4".
      error: why it did not compile, one line; "" where it did.
      cycles: estimated, summed over the fusions of XLA.
      loops: estimated cycles of one trip of each loop, in the order of the program's text.
      unestimated: kinds of operations without an estimate, such as "sort".
      kernels: name of a Pallas kernel -> its schedule.
      temporaries: bytes in the memory of the chip, beside arguments and outputs.
      arguments: bytes.
      outputs: bytes.
    """

    name: str
    topology: str
    error: str = ""
    cycles: int = 0
    loops: tuple[int, ...] = ()
    unestimated: tuple[str, ...] = ()
    kernels: dict[str, Schedule] = dataclasses.field(default_factory=dict)
    temporaries: int = 0
    arguments: int = 0
    outputs: int = 0


def libtpu() -> pathlib.Path | None:
    """The library of the TPU compiler: of the variable TPU_LIBRARY_PATH, or of the installed package.

    Returns:
      The file, None where there is none.

    Example:
      >>> libtpu() is None or libtpu().name == "libtpu.so"
      True
    """
    given = os.environ.get("TPU_LIBRARY_PATH")
    if given:
        return pathlib.Path(given) if pathlib.Path(given).is_file() else None
    spec = importlib.util.find_spec("libtpu")
    return pathlib.Path(spec.submodule_search_locations[0]) / "libtpu.so" if spec else None


def libtpu_version() -> str | None:
    """The version of the package that `libtpu()` belongs to, None where that is not known."""
    file = libtpu()
    if file is None:
        return None
    beside = importlib.metadata.distributions(name="libtpu", path=[str(file.absolute().parent.parent)])
    return next((found.version for found in beside), None)


def is_available() -> bool:
    """Whether there is a TPU compiler: `pip install 'odjax[aot]'`.

    Returns:
      True where `compile_cases` can compile.

    Example:
      >>> is_available() in (True, False)
      True
    """
    return libtpu() is not None


def compiler_environment(dumps: pathlib.Path | None = None) -> dict[str, str]:
    """The environment of a process that compiles for TPUs which are not there.

    Args:
      dumps: a folder for the schedules of kernels.

    Returns:
      This process's own with what the compiler needs.
    """
    more = (
        {} if dumps is None else {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true"}
    )
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run: compilers of other programs do not matter
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LIBRARY_PATH": str(libtpu()),
        **more,
    }


def _cycles(text: str) -> tuple[int, tuple[int, ...], tuple[str, ...]]:
    """Sum of the estimates in a program's text, that of each loop's body, and operations without one."""
    program = hlo.parse(text)
    own: dict[str, int] = {}
    bodies, without = [], set()
    for name, instructions in program.computations.items():
        own[name] = sum(i.cycles or 0 for i in instructions)
        bodies += [body for i in instructions if i.opcode == "while" for body in i.called("body")]
        without |= {i.opcode.removesuffix("-start") for i in instructions} & UNESTIMATED

    def total(name: str) -> int:
        inner = [
            [total(child) for child, _ in hlo.children(program, name, i)] for i in program.computations[name]
        ]
        return own[name] + sum(max(parts, default=0) for parts in inner)

    return total(program.entry), tuple(map(total, bodies)), tuple(sorted(without))


def _regions(listing: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of a schedule's conditional parts that hold no other, and of its loops' bodies inside the grid's.

    A jump on a condition names the region behind the part that it passes over; one on its negation closes the
    loop that began last, with the mark LB. Both come in the order of their starts.
    """
    ends, jumps, starts, back, here = {}, [], [], [], 0
    for line in listing.splitlines():
        if head := re.match(r"\s*(?:0x)?([0-9a-f]+)\s+([A-Z]{2})?\s*: ", line):
            here = int(head[1], 16)
            starts += [here] if head[2] == "LB" else []
            jumps += [(here, int(n)) for n in re.findall(r"sbr\.rel \(%\w+\) target = \$region(\d+)", line)]
            back += [here] if "sbr.rel (!%" in line else []
        ends |= {int(n): here for n in re.findall(r"End region (\d+)", line)}
    parts = [(start, ends[n - 1]) for start, n in jumps if ends.get(n - 1, 0) > start]
    branches = [
        end - start
        for start, end in parts
        if not any(start < other and last <= end for other, last in parts if (other, last) != (start, end))
    ]
    loops = {}
    for end in back:
        begun = [start for start in starts if start < end and start not in loops]
        if begun:
            loops[begun[-1]] = end - begun[-1]
    return tuple(branches), tuple(loops[start] for start in sorted(loops) if start != starts[0])


def _schedules(folder: pathlib.Path, before: set[str]) -> dict[str, Schedule]:
    """The schedules of the Pallas kernels in the files written since."""
    found = {}
    for file in folder.glob("*schedule-analysis_final_bundles.txt"):
        if file.name in before:
            continue
        text = file.read_text(errors="replace")
        total = re.search(r"total scheduled bundles:\s+(\d+)", text)
        if total and re.search(r'= .*? custom-call\(.*custom_call_target="tpu_custom_call"', text):
            stamp, kernel = re.fullmatch(
                r"(\d+)-(.*)-\d+-schedule-analysis_final_bundles.txt", file.name
            ).groups()
            if kernel == "TLP":  # the program around the kernels
                continue
            files = [
                f for f in folder.glob(f"{stamp}-*-final_bundles.txt") if "schedule-analysis" not in f.name
            ]
            listing = files[0].read_text(errors="replace") if files else ""
            found[kernel] = Schedule(int(total[1]), *_regions(listing))
    return found


def _from_json(report: dict[str, Any]) -> Compiled:
    tuples = {name: tuple(report[name]) for name in ("loops", "unestimated")}
    kernels = {
        kernel: Schedule(bundles, tuple(branches), tuple(loops))
        for kernel, (bundles, branches, loops) in report["kernels"].items()
    }
    return Compiled(**{**report, **tuples, "kernels": kernels})


def load_cases(file: str | pathlib.Path) -> list[Case]:
    """The cases of a Python file.

    Args:
      file: with `AOT_CASES`, a list of `(name, function, shapes)` or a function that gives it.

    Returns:
      The list.

    Raises:
      ValueError: no Python file, or one without such a list.

    Example:
      >>> load_cases("cases.txt")
      Traceback (most recent call last):
      ValueError: cases.txt is no Python file with a list AOT_CASES
    """
    spec = importlib.util.spec_from_file_location("odjax_kernels_aot_cases", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file with a list AOT_CASES")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "AOT_CASES"):
        raise ValueError(f"{file} has no list AOT_CASES of (name, function, shapes)")
    cases = module.AOT_CASES
    return list(cases() if callable(cases) else cases)


def _compile_here(file: str, topology: str, names: Sequence[str], dumps: pathlib.Path) -> Iterator[Compiled]:
    """In the process of the compiler: cases one after the other."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = NamedSharding(Mesh(np.array(chips[:1]), ("x",)), PartitionSpec())
    cases = {name: (function, shapes) for name, function, shapes in load_cases(file)}
    for name in names:
        function, shapes = cases[name]
        print(f"begin {name}", flush=True, file=sys.stderr)
        before = {path.name for path in dumps.iterdir()} if dumps.exists() else set()
        try:
            jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
            program = jitted.lower(*shapes).compile()
            memory = program.memory_analysis()
            cycles, loops, unestimated = _cycles(program.as_text())
            yield Compiled(
                name,
                topology,
                cycles=cycles,
                loops=loops,
                unestimated=unestimated,
                kernels=_schedules(dumps, before),
                temporaries=memory.temp_size_in_bytes,
                arguments=memory.argument_size_in_bytes,
                outputs=memory.output_size_in_bytes,
            )
        except Exception as error:  # a report of what the compiler said, whatever it raised
            lines = [line for line in str(error).splitlines() if line.strip()]
            yield Compiled(name, topology, error=f"{type(error).__name__}: {' '.join(lines[:3])}"[:600])


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Waits until no other process of this user compiles for TPUs."""
    import fcntl

    # A file of one's own: another user's in the same folder could not be opened.
    with open(pathlib.Path(tempfile.gettempdir()) / f"odjax-libtpu-{os.getuid()}.lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_cases(
    file: str | pathlib.Path, topology: str, names: Sequence[str], *, timeout: float = 600.0
) -> dict[str, Compiled]:
    """Compiles the cases of a Python file for one chip of a TPU topology.

    A case that takes the compiler's process down is reported as such, and the rest goes on in another one.

    Args:
      file: a Python file with cases, as for `load_cases`.
      topology: such as "v5e:2x4", "v5p:2x2x1" or "v6e:2x4".
      names: of the cases to compile.
      timeout: seconds for all of them.

    Returns:
      name -> `Compiled`.

    Raises:
      RuntimeError: libtpu is not installed, or no case could be started.

    Example:
      >>> if is_available():
      ...     compile_cases("cases.py", "v5e:2x4", ["matmul"])  # doctest: +SKIP
    """
    if not is_available():
        raise RuntimeError("libtpu is not installed: pip install 'odjax[aot]'")
    names = list(dict.fromkeys(names))
    with one_at_a_time(), tempfile.TemporaryDirectory() as folder:
        dumps = pathlib.Path(folder) / "dumps"

        def command(missing: Sequence[str]) -> list[str]:
            return [sys.executable, "-m", "odjax_kernels.aot", str(file), topology, str(dumps), *missing]

        found = run_apart(command, names, environment=compiler_environment(dumps), timeout=timeout)
    return {
        name: Compiled(name, topology, error=said) if isinstance(said, str) else _from_json(said)
        for name, said in ((name, found[name]) for name in names)
    }


def run_script(text: str, *, timeout: float = 600.0) -> str:
    """Runs a program that compiles for TPUs, in a process of its own.

    Args:
      text: of a Python program.
      timeout: seconds.

    Returns:
      What it prints.

    Raises:
      RuntimeError: it failed, with the end of what it said.

    Example:
      >>> run_script("print(6 * 7)") if is_available() else "42"
      '42'
    """
    with one_at_a_time():
        run = subprocess.run(
            [sys.executable, "-c", text],
            env=compiler_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    return run.stdout.strip()


def run_apart(
    command: Callable[[Sequence[str]], Sequence[str]],
    names: Sequence[str],
    *,
    environment: Mapping[str, str],
    timeout: float,
) -> dict[str, dict[str, Any] | str]:
    """Has named things done by a process that one of them may take down; the rest goes on in another.

    The process prints "begin NAME" to its standard error before each, and {"name": ..., "record": ...} on a
    line of its standard output after it.

    Args:
      command: names that are missing -> what to run.
      names: of what is to be done.
      environment: of the process.
      timeout: seconds for one process.

    Returns:
      name -> its record, or the reason why there is none. Records under other names are there too.

    Raises:
      RuntimeError: the process began nothing.
    """
    found: dict[str, dict[str, Any] | str] = {}
    while missing := [name for name in names if name not in found]:
        line = list(command(missing))
        try:
            run = subprocess.run(
                line, env=dict(environment), capture_output=True, timeout=timeout, check=False
            )
            said, told = (output.decode(errors="replace") for output in (run.stdout, run.stderr))
            why = f"the compiler's process ended with {run.returncode}"
            why += "".join(
                f": {fatal}" for fatal in re.findall(r"^F\d{4} .*?\] (.*)$", told, re.MULTILINE)[:1]
            )
        except subprocess.TimeoutExpired as late:
            said, told = ((s or b"").decode(errors="replace") for s in (late.stdout, late.stderr))
            why = f"not compiled within {timeout:.0f} s"
        for text in said.splitlines():
            if text.startswith('{"name"'):
                answer = json.loads(text)
                found[answer["name"]] = answer["record"]
        left = [name for name in missing if name not in found]
        if not left or "mistake" in found:
            break
        begun = [name for name in re.findall(r"^begin (.*)$", told, re.MULTILINE) if name in left]
        if not begun:
            raise RuntimeError(f"{why}\n{told[-2000:]}\n{' '.join(line)}")
        found[begun[-1]] = why
    return found


if __name__ == "__main__":
    _file, _topology, _dumps, *_names = sys.argv[1:]
    for _report in _compile_here(_file, _topology, _names, pathlib.Path(_dumps)):
        print(json.dumps({"name": _report.name, "record": dataclasses.asdict(_report)}), flush=True)
