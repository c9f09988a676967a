"""The flags of the verbs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class DeviceFlags:
    """Which devices to run on."""

    mesh: str | None = None
    """data,fsdp,tensor: devices along each axis, one of them may be -1; the configuration's own when not
    given."""
    cpu_devices: int | None = None
    """Run on that many virtual CPU devices a process."""
    coordinator: str | None = None
    """host:port of process 0, when there are several and no cluster is detected."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0."""


@dataclasses.dataclass(frozen=True)
class TrainFlags(DeviceFlags):
    """How to run."""

    run: Path | None = None
    """The run's folder; runs/CONFIG when not given, with a code added when flags differ from the defaults."""
    profile: int = 0
    """Write a JAX profiler trace of that many steps into the run's folder."""


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """What to plan for."""

    topology: str = "here"
    """Devices to plan for, such as v5e:16x16, v5p-512, h100:8, or here: those of this machine."""
    mesh: str | None = None
    """data,fsdp,tensor: devices along each axis, one of them may be -1; the configuration's own when not
    given."""
    slices: int = 1
    """How many such TPU slices, connected by the network."""
    json: bool = False
    """Print one JSON object."""
    out: Path | None = None
    """Write it into that file too, as JSON; odjax report shows RUN/plan.json beside the run's curves."""
    search: bool = False
    """Try meshes, rematerialization, microbatches and attention, and print what is worth having."""
    compiles: int = 12
    """Of a search: how many of the promising candidates to compile."""
    timeout: int = 1800
    """Seconds after which a compilation is given up."""


@dataclasses.dataclass(frozen=True)
class EvalFlags(DeviceFlags):
    """What to judge."""

    step: int | None = None
    """Which checkpoint; the newest one when not given."""
    best: bool = False
    """The best checkpoint instead."""
    json: bool = False
    """Print one JSON object."""


@dataclasses.dataclass(frozen=True)
class GenerateFlags(DeviceFlags):
    """What to write."""

    prompt: str = ""
    """The text to continue."""
    length: int = 200
    """Tokens to add."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_p: float = 0.95
    """The smallest set of tokens with that much probability to draw from."""
    seed: int = 0
    """Of the draw."""
    step: int | None = None
    """Which checkpoint; the newest one when not given."""
    best: bool = False
    """The best checkpoint instead."""


@dataclasses.dataclass(frozen=True)
class TranslateFlags(DeviceFlags):
    """What to translate."""

    source: str = ""
    """The text, such as text:test.de.gz, a sentence a line."""
    target: str = ""
    """Its translation by people, to compute BLEU."""
    out: Path | None = None
    """The file of the translations; translations.txt in the run's folder when not given."""
    beam: int = 2
    """Hypotheses of a line; 1 is greedy."""
    length_penalty: float = 0.6
    """Exponent of the length that scores are divided by."""
    step: int | None = None
    """Which checkpoint; the newest one when not given."""
    best: bool = False
    """The best checkpoint instead."""


@dataclasses.dataclass(frozen=True)
class MergeFlags(DeviceFlags):
    """What to merge."""

    out: Path | None = None
    """The file; merged.safetensors in the run's folder when not given."""
    step: int | None = None
    """Which checkpoint; the newest one when not given."""
    best: bool = False
    """The best checkpoint instead."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the file's numbers; that of the parameters when not given."""
    rank: int | None = None
    """dylora: serve the first so many ranks."""
    names: Literal["flax", "torch"] = "flax"
    """Of the file's arrays: paths in our model, or the names that transformers gives them."""


@dataclasses.dataclass(frozen=True)
class ExportFlags(DeviceFlags):
    """What to export."""

    out: Path | None = None
    """The folder; adapter in the run's folder when not given."""
    base: str | None = None
    """Name or folder of the weights that the adapter belongs to, written into its configuration."""
    step: int | None = None
    """Which checkpoint; the newest one when not given."""
    best: bool = False
    """The best checkpoint instead."""


@dataclasses.dataclass(frozen=True)
class ReportFlags:
    """What to show."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs; several are drawn into the same plots."""
    out: Path | None = None
    """The page; report.html in the first run's folder when not given."""


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """Nothing to set."""


@dataclasses.dataclass(frozen=True)
class ReproduceFlags:
    """How to prove it."""

    out: Path | None = None
    """Folder for the result and the plots; runs/proofs/METHOD when not given."""
    quick: bool = False
    """Smaller, in seconds."""
    seed: int = 0
    """Of everything random."""
