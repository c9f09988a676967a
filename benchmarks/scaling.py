r"""The tables of docs/scaling.md: what decoders will do on pods, by `odjax plan`, without a pod.

    python benchmarks/scaling.py --out runs/scaling                          # all that is not there yet
    python benchmarks/scaling.py --out runs/scaling --only 7b rac v5e-256    # names with all of these words
    python benchmarks/scaling.py --out runs/scaling --write docs/scaling.md  # the page of what is there

It needs libtpu (`pip install 'odjax[aot]'`) and takes some minutes of a core for each function that it
compiles. Every combination is a file of JSON in the folder; what is there is not planned again. The text of
the page outside of its tables is kept.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import shlex
import sys
import time

from odjax_train import config as configs
from odjax_train.errors import UserError
from odjax_train.flags import PlanFlags
from odjax_train.plan.chips import parse_topology
from odjax_train.plan.parts import Part, Plan, from_json, to_json
from odjax_train.plan.planner import ask
from odjax_train.plan.table import verdict

ROOT = pathlib.Path(__file__).resolve().parents[1]
LLAMA = ("--base", "Llama", "--source", "text:*.txt")
METHODS = {
    "full": ("lm_7b", ()),
    "rac": ("llama_rac_lora", (*LLAMA, "--method", "rac")),
    "lora": ("llama_rac_lora", (*LLAMA, "--method", "lora")),
    "chtss": ("llama_60m_chts", ("--method", "chtss", "--length", "2048")),
}
VOCAB = {"1b": 128256, "7b": 32000, "70b": 128256}


@dataclasses.dataclass(frozen=True)
class Case:
    """A combination: mesh, sequences in a step, and what is kept for the backward pass.

    Args:
        preset: size of the decoder.
        method: a key of `METHODS`.
        topology: as it is sold.
        mesh: data,fsdp,tensor.
        batch: sequences of 2048 tokens in a step.
        remat: a key of `odjax.models.REMAT_POLICIES`.
        edits: whether the edit and the evaluation are planned too.
    """

    preset: str
    method: str
    topology: str
    mesh: str
    batch: int
    remat: str
    edits: bool = False

    @property
    def name(self) -> str:
        """Of the file."""
        name = f"{self.preset}-{self.method}-{self.topology}-{self.batch}"
        return name + ("-edits" if self.edits else "")

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the configuration."""
        return (
            *METHODS[self.method][1],
            *("--preset", self.preset, "--tokenizer", f"vocab:{VOCAB[self.preset]}"),
            *("--batch", str(self.batch), "--remat", self.remat, "--attention", "splash"),
        )


CASES = (
    Case("7b", "rac", "v5e-256", "1,-1,1", 256, "projections"),
    Case("7b", "full", "v5e-256", "1,-1,1", 256, "projections"),
    Case("7b", "full", "v5e-256", "1,-1,1", 512, "projections"),
    Case("7b", "rac", "v5e-256", "1,-1,1", 256, "projections", edits=True),
    Case("7b", "chtss", "v5e-256", "1,-1,1", 512, "projections", edits=True),
    Case("7b", "chtss", "v5e-256", "1,-1,1", 512, "projections"),
    Case("7b", "rac", "v6e-256", "1,-1,1", 512, "projections"),
    Case("7b", "rac", "v5p-512", "4,64,1", 512, "projections"),
    Case("7b", "full", "v5p-512", "4,64,1", 512, "projections"),
    Case("70b", "rac", "v5e-256", "1,-1,1", 256, "full"),
    Case("70b", "full", "v5p-512", "4,64,1", 256, "projections"),
    Case("1b", "full", "v5e-256", "4,64,1", 512, "projections"),
    Case("1b", "rac", "v5e-256", "4,64,1", 512, "projections"),
    Case("7b", "full", "v6e-256", "1,-1,1", 512, "projections"),
    Case("7b", "lora", "v5e-256", "1,-1,1", 256, "projections"),
    Case("70b", "full", "v5e-256", "1,128,2", 128, "full"),
    Case("70b", "rac", "v5p-512", "4,64,1", 256, "projections"),
    Case("70b", "rac", "v6e-256", "1,-1,1", 256, "full"),
    Case("70b", "full", "v6e-256", "1,-1,1", 256, "full"),
    Case("1b", "full", "v5p-512", "4,64,1", 512, "projections"),
    Case("1b", "full", "v6e-256", "4,64,1", 512, "projections"),
    Case("1b", "chtss", "v5e-256", "4,64,1", 512, "projections"),
    Case("70b", "chtss", "v5p-512", "4,64,1", 256, "projections"),
)


def run(case: Case, folder: pathlib.Path) -> None:
    """Plans a case and writes its file."""
    config = configs.load(ROOT / "configs" / f"{METHODS[case.method][0]}.py")
    config, _ = configs.parse(config, PlanFlags, case.flags, "benchmarks/scaling.py")
    parts = ("step",)
    if case.edits:
        parts = ("restart" if case.method == "rac" else "topology", "evaluate", "init")
    begin = time.monotonic()
    try:
        plan = ask(config, parse_topology(case.topology), case.mesh, parts=parts, timeout=3600.0)
        record = {"plan": to_json(plan)}
    except UserError as error:
        record = {"error": str(error)}
    record |= {"case": dataclasses.asdict(case), "seconds": round(time.monotonic() - begin)}
    path = folder / f"{case.name}.json"
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(record, indent=1))
    scratch.replace(path)
    if "error" in record:
        said = record["error"]
    elif case.edits:
        said = ", ".join(f"{part.name} {part.error[:200] or gib(part.peak)}" for part in plan.parts)
    else:
        said = verdict(plan)
    print(f"{case.name}: {said} ({record['seconds']} s)", flush=True)


def read(folder: pathlib.Path) -> list[tuple[Case, Plan | None, str]]:
    """Cases of the folder in the order of `CASES`, with their plans or what was wrong."""
    found = []
    for case in CASES:
        path = folder / f"{case.name}.json"
        if path.is_file():
            record = json.loads(path.read_text())
            plan = from_json(record["plan"]) if "plan" in record else None
            found.append((Case(**record["case"]), plan, record.get("error", "")))
    return found


def gib(size: float) -> str:
    """Bytes in GiB, one digit."""
    return f"{size / 2**30:.1f}"


def memory(part: Part, plan: Plan) -> str:
    """Peak and limit, or how much is missing."""
    limit = plan.chip.memory
    if part.short:
        return f"{gib(part.short)} over {gib(limit)}"
    return f"{gib(part.peak)} of {gib(limit)}"


def steps(found: list[tuple[Case, Plan | None, str]]) -> str:
    """The table of training steps."""
    lines = [
        "| decoder | method | topology | mesh | sequences | kept | memory, GiB | step, s | tokens/s | MFU |",
        "|---|---|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for case, plan, error in found:
        if case.edits:
            continue
        head = f"| {case.preset} | {case.method} | {case.topology} "
        part = plan.part("step") if plan else None
        if part is None or (part.error and not part.short):
            lines.append(
                f"{head}| {case.mesh} | {case.batch} | {case.remat} | {one_line(part, error)} | | | |"
            )
            continue
        mesh = ",".join(map(str, plan.mesh))
        figures = " | | |"
        if not part.error:
            rate = plan.tokens / part.seconds
            figures = f" {part.seconds:.2f} | {rate / 1e6:.2f} M | {part.utilization(plan.chip):.1%} |"
        lines.append(f"{head}| {mesh} | {case.batch} | {case.remat} | {memory(part, plan)} |{figures}")
    return "\n".join(lines)


def one_line(part: Part | None, error: str) -> str:
    """What went wrong, for a cell of a table."""
    text = part.error if part is not None else error
    return "not compiled: " + re.sub(r"\s+", " ", text.replace("|", "/"))[:120]


def shares(found: list[tuple[Case, Plan | None, str]]) -> str:
    """The table of where the time of a step goes, and what moves."""
    lines = [
        "| decoder | method | topology | products | kernels | no estimate | waiting for chips | copies "
        "| largest array moved, MiB |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case, plan, _ in found:
        if case.edits or plan is None or plan.part("step").error:
            continue
        part = plan.part("step")
        cells = (
            part.use[name] / part.seconds
            for name in ("compute", "kernels", "modelled", "collectives", "copies")
        )
        largest = max((each.largest for each in part.traffic), default=0)
        lines.append(
            f"| {case.preset} | {case.method} | {case.topology} | "
            + " | ".join(f"{cell:.0%}" for cell in cells)
            + f" | {largest / 2**20:.0f} |"
        )
    return "\n".join(lines)


def edits(found: list[tuple[Case, Plan | None, str]]) -> str:
    """The table of edits, evaluation and initialization."""
    lines = [
        "| decoder | method | topology | function | memory, GiB | takes, s | largest array moved, MiB |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    for case, plan, error in found:
        if not case.edits:
            continue
        head = f"| {case.preset} | {case.method} | {case.topology} "
        if plan is None:
            lines.append(f"{head}| {one_line(None, error)} | | | |")
            continue
        for part in plan.parts:
            if part.error and not part.short:
                lines.append(f"{head}| {part.name} | {one_line(part, '')} | | |")
                continue
            largest = max((each.largest for each in part.traffic), default=0)
            lines.append(
                f"{head}| {part.name} | {memory(part, plan)} | {part.seconds:.3f} | {largest / 2**20:.0f} |"
            )
    return "\n".join(lines)


def commands(found: list[tuple[Case, Plan | None, str]]) -> str:
    """How each row is asked for."""
    lines = ["```"]
    for case, _, _ in found:
        if not case.edits:
            flags = shlex.join((*case.flags, "--mesh", case.mesh))
            lines.append(
                f"odjax plan configs/{METHODS[case.method][0]}.py --topology {case.topology} {flags}"
            )
    return "\n".join([*lines, "```"])


def write(page: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts the tables between their marks."""
    found = read(folder)
    text = page.read_text()
    for name, made in (("steps", steps), ("shares", shares), ("edits", edits), ("commands", commands)):
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            sys.exit(f"{page} has no marks {begin} and {end}")
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{made(found)}\n{end}{after}"
    page.write_text(text)


def main() -> None:
    """Plans what is missing, or writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/scaling"))
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must hold")
    parser.add_argument(
        "--write", type=pathlib.Path, help="the page to write the tables into; nothing is planned"
    )
    options = parser.parse_args()
    if options.write:
        write(options.write, options.out)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        wanted = all(word in case.name for word in options.only)
        if wanted and not (options.out / f"{case.name}.json").is_file():
            run(case, options.out)


if __name__ == "__main__":
    main()
