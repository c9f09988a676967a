"""The verbs of the command line, each from its flags to its exit status."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from odjax_train import config as configs
from odjax_train.errors import UserError
from odjax_train.flags import (
    DeviceFlags,
    EvalFlags,
    ExportFlags,
    GenerateFlags,
    MergeFlags,
    NoFlags,
    PlanFlags,
    ReportFlags,
    ReproduceFlags,
    TrainFlags,
    TranslateFlags,
)


def _first(arguments: list[str], verb: str, what: str) -> tuple[str | None, list[str]]:
    """The positional argument of a verb, and the flags after it."""
    if arguments and arguments[0] not in ("-h", "--help"):
        if arguments[0].startswith("-"):
            raise UserError(f"odjax {verb} takes {what} first, got {arguments[0]}")
        return arguments[0], arguments[1:]
    if arguments:
        return None, arguments
    raise UserError(f"odjax {verb} needs {what} (odjax {verb} --help)")


def _prepare(flags: DeviceFlags) -> None:
    """Devices and processes, and the compilation cache; before anything is computed."""
    import jax

    from odjax_train import distributed
    from odjax_train.cpu import keep_freed_memory

    processes = distributed.Processes(flags.coordinator, flags.processes, flags.process)
    distributed.join(processes, flags.cpu_devices)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(_cache() / "compiled"))


def _cache() -> Path:
    """The folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "odjax"


def train(arguments: list[str]) -> int:
    """`odjax train CONFIG [flags]`."""
    path, flags = _first(arguments, "train", "a configuration file")
    if path is None:
        print(
            "usage: odjax train CONFIG [flags]\n\nodjax train CONFIG --help lists the configuration's flags."
        )
        return 0
    config = configs.load(Path(path))
    config, options = configs.parse(config, TrainFlags, flags, f"odjax train {path}")

    from odjax_train.cli import DIVERGED, INTERRUPTED
    from odjax_train.distributed import is_main
    from odjax_train.loop import StopRequest
    from odjax_train.mesh import MeshShape
    from odjax_train.run import start
    from odjax_train.run_folder import default_folder

    _prepare(options)
    if options.profile < 0:
        raise UserError(f"--profile {options.profile}: give a number of steps")
    # After joining the other processes, which installs a handler of its own for SIGTERM.
    with StopRequest().listening() as stop:
        mesh = None if options.mesh is None else MeshShape.parse(options.mesh)
        outcome = start(config, options.run, mesh=mesh, profile=options.profile, stop=stop)
    if is_main():
        print(outcome.message, flush=True)
        if outcome.status == "finished":
            folder = options.run or default_folder(config)
            print(f"report: {_write_report([folder], None)}")
    return {"finished": 0, "interrupted": INTERRUPTED, "diverged": DIVERGED}[outcome.status]


def evaluate(arguments: list[str]) -> int:
    """`odjax eval RUN`."""
    from odjax_train.mesh import MeshShape

    folder, flags = _first(arguments, "eval", "a run's folder")
    options = configs.cli(EvalFlags, flags, "odjax eval RUN", "Judge a checkpoint on the held-out data.")
    _prepare(options)
    from odjax_train.distributed import is_main
    from odjax_train.run import judge, reopen

    mesh = None if options.mesh is None else MeshShape.parse(options.mesh)
    loaded = reopen(Path(folder), step=options.step, best=options.best, mesh=mesh)
    metrics = judge(loaded)
    if not is_main():
        return 0
    if options.json:
        print(json.dumps({"step": loaded.step, **metrics}))
    else:
        print(f"step {loaded.step}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    return 0


def plan(arguments: list[str]) -> int:
    """`odjax plan CONFIG [flags]`."""
    path, flags = _first(arguments, "plan", "a configuration file")
    if path is None:
        print("usage: odjax plan CONFIG [flags]\n\nodjax plan CONFIG --help lists the configuration's flags.")
        return 0
    import jax

    from odjax_train.plan.chips import parse_topology
    from odjax_train.plan.parts import to_json
    from odjax_train.plan.planner import ask
    from odjax_train.plan.table import show

    config = configs.load(Path(path))
    config, options = configs.parse(config, PlanFlags, flags, f"odjax plan {path}")
    jax.config.update(
        "jax_platforms", "cpu"
    )  # the devices are left to the processes that compile and measure
    topology = parse_topology(options.topology, options.slices)
    if options.timeout < 1:
        raise UserError(f"--timeout must be at least 1, got {options.timeout}")
    if options.out is not None and options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder; give a file, such as {options.out / 'plan.json'}")
    # What is wrong with the flags is said before anything is started.
    config.experiment()
    if options.out is not None:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {options.out}: cannot be written: {error.strerror or error}") from error
    if options.search:
        return _search(config, topology, options)
    found = ask(config, topology, options.mesh, timeout=options.timeout)
    if not options.json:
        show(found)
    _write_plan(to_json(found), options)
    return 0 if found.fits else 1


def _search(config: configs.Config, topology: Any, options: PlanFlags) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from odjax_train.plan.parts import to_json
    from odjax_train.plan.planner import device_count
    from odjax_train.plan.search import pareto, search
    from odjax_train.plan.table import search_table

    if options.mesh is not None:
        raise UserError("--search tries meshes: leave --mesh out")
    if options.compiles < 1:
        raise UserError(f"--compiles must be at least 1, got {options.compiles}")
    if not topology.devices:
        topology = topology._replace(devices=device_count())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("", total=options.compiles)
        tried = search(
            config,
            topology,
            compiles=options.compiles,
            timeout=options.timeout,
            cache=_cache() / "plans",
            progress=lambda done, all_, what: bar.update(task, completed=done, total=all_, description=what),
        )
    front = pareto(tried)
    records = [
        {
            "flags": each.candidate.line,
            "expected": each.estimate._asdict(),
            "error": each.error,
            "plan": to_json(each.plan) if each.plan else None,
        }
        for each in tried
    ]
    if not options.json:
        Console().print(search_table(tried, front))
    _write_plan({"tried": records, "pareto": [each.candidate.line for each in front]}, options)
    return 0 if front else 1


def _write_plan(document: dict[str, Any], options: PlanFlags) -> None:
    from odjax_train.run_folder import write_text

    text = json.dumps(document)
    if options.json:
        print(text)
    if options.out is not None:
        try:
            write_text(options.out, text + "\n")
        except OSError as error:
            raise UserError(f"--out {options.out}: cannot be written: {error.strerror or error}") from error


def generate(arguments: list[str]) -> int:
    """`odjax generate RUN`."""
    from odjax_train.mesh import MeshShape

    folder, flags = _first(arguments, "generate", "a run's folder")
    options = configs.cli(GenerateFlags, flags, "odjax generate RUN", "Continue a text.")
    _prepare(options)
    from odjax_train.distributed import is_main
    from odjax_train.experiment import Sample
    from odjax_train.run import reopen
    from odjax_train.sampling import continue_text

    sample = Sample(options.prompt, options.length, options.temperature, options.top_p)
    mesh = None if options.mesh is None else MeshShape.parse(options.mesh)
    loaded = reopen(Path(folder), step=options.step, best=options.best, mesh=mesh)
    text = continue_text(loaded.program, loaded.state, sample, seed=options.seed)
    if is_main():
        print(options.prompt + text)
    return 0


def translate(arguments: list[str]) -> int:
    """`odjax translate RUN`."""
    folder, flags = _first(arguments, "translate", "a run's folder")
    description = "Translate a text and compare it with people's translation by BLEU."
    options = configs.cli(TranslateFlags, flags, "odjax translate RUN", description)
    for name in ("source", "target"):
        if not getattr(options, name):
            raise UserError(f"odjax translate needs --{name}, such as --{name} text:test.de.gz")
    _prepare(options)
    from odjax_train.distributed import is_main
    from odjax_train.mesh import MeshShape
    from odjax_train.run import reopen
    from odjax_train.run_folder import write_text
    from odjax_train.translations import judge_translations

    mesh = None if options.mesh is None else MeshShape.parse(options.mesh)
    loaded = reopen(Path(folder), step=options.step, best=options.best, mesh=mesh)
    search = {"beam": options.beam, "length_penalty": options.length_penalty}
    judged = judge_translations(loaded, options.source, options.target, **search)
    if is_main():
        out = options.out or Path(folder) / "translations.txt"
        write_text(out, "".join(f"{line}\n" for line in judged.lines))
        print(f"step {loaded.step}: BLEU {judged.bleu.score:.2f}  {judged.bleu.signature}  {out}")
    return 0


def merge(arguments: list[str]) -> int:
    """`odjax merge RUN`."""
    folder, flags = _first(arguments, "merge", "a run's folder")
    description = "Put the factors of an adapted run into its weights: one file."
    options = configs.cli(MergeFlags, flags, "odjax merge RUN", description)
    _prepare(options)
    from odjax.core import format_bytes
    from odjax_train.adapters import merged, torch_names, write
    from odjax_train.distributed import is_main
    from odjax_train.mesh import MeshShape
    from odjax_train.run import reopen

    mesh = None if options.mesh is None else MeshShape.parse(options.mesh)
    loaded = reopen(Path(folder), step=options.step, best=options.best, mesh=mesh)
    out = options.out or Path(folder) / "merged.safetensors"
    names = torch_names(loaded) if options.names == "torch" else None
    params = merged(loaded, rank=options.rank, dtype=options.dtype)
    metadata = {"run": str(folder), "step": str(loaded.step)}
    size = write(out, params, {"format": "pt" if names else "flax", **metadata}, names)
    if is_main():
        print(f"step {loaded.step} merged: {out} ({format_bytes(size)})")
    return 0


def export(arguments: list[str]) -> int:
    """`odjax export RUN`."""
    folder, flags = _first(arguments, "export", "a run's folder")
    description = "Write the factors of an adapted run as an adapter that PEFT loads."
    options = configs.cli(ExportFlags, flags, "odjax export RUN", description)
    _prepare(options)
    from odjax_train import adapters
    from odjax_train.distributed import is_main
    from odjax_train.mesh import MeshShape
    from odjax_train.run import reopen

    mesh = None if options.mesh is None else MeshShape.parse(options.mesh)
    loaded = reopen(Path(folder), step=options.step, best=options.best, mesh=mesh)
    out = options.out or Path(folder) / "adapter"
    adapters.export(loaded, out, base=options.base)
    if is_main():
        print(f"step {loaded.step} exported: {out}")
    return 0


def report(arguments: list[str]) -> int:
    """`odjax report RUN [RUN ...]`."""
    description = "Write one self-contained HTML page with the plots."
    options = configs.cli(ReportFlags, arguments, "odjax report", description)
    if not options.runs:
        raise UserError("odjax report needs at least one run's folder")
    print(_write_report(list(options.runs), options.out))
    return 0


def _write_report(folders: list[Path], out: Path | None) -> Path:
    from odjax_train.report import write

    return write(folders, out or folders[0] / "report.html")


def methods(arguments: list[str]) -> int:
    """`odjax methods`."""
    from odjax_train.catalogue import table

    configs.cli(NoFlags, arguments, "odjax methods", "Every method, from its paper to its proof.")
    print(table())
    return 0


def reproduce(arguments: list[str]) -> int:
    """`odjax reproduce METHOD`."""
    slug, flags = _first(arguments, "reproduce", "a method (odjax methods lists them)")
    options = configs.cli(ReproduceFlags, flags, "odjax reproduce METHOD", "Run a method's proof.")
    from odjax_train.catalogue import prove

    holds, text = prove(slug, options.out, quick=options.quick, seed=options.seed)
    print(text)
    if not holds:
        print("not every claim holds here", file=sys.stderr)
    return 0 if holds else 1
