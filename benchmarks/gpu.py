r"""Everything that matters on one GPU, checked and timed: odjax beside PyTorch and PEFT, in one short table.

    python benchmarks/gpu.py                    # a decoder of 1B, 4 x 2048 tokens, bfloat16; about 5 minutes
    python benchmarks/gpu.py --only checks      # the checks alone
    python benchmarks/gpu.py --only full lora --repeat 2 --seconds 900 --json gpu.json
    python benchmarks/gpu.py --markdown         # the table for docs/performance.md
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --preset tiny --batch 2 --length 64 --steps 3 --rounds 2

It runs from a checkout and needs jax with CUDA, flax and optax. PyTorch, peft and transformers are used where
they are; rows that need what is missing are left out and say so. Every row is a process of its own: its peak
of memory is its own, and a failure costs one row. The checks go first, several at a time. Rows follow in the
order of `gpu_row.ROWS` until `--seconds` are spent (those left out are named); `--repeat` runs all of them
again, compiled programs kept, and takes the rounds of all repeats together.

| row                | a training step of                                                        |
|--------------------|---------------------------------------------------------------------------|
| full               | the decoder, AdamW, parameters and moments in float32                     |
| lora, rac          | factors of all linear layers; frozen weights in bfloat16                  |
| rac: restart       | (an edit) update merged into the weights, new sketches, moments cleared   |
| chtss              | the decoder with half of its links, on the way to `--sparsity`            |
| chtss: topology    | (an edit) links pruned, dropped and regrown by Cannistraci-Hebb scores    |
| ...-cudnn, -plain  | attention by cuDNN, or by XLA's products (layers rematerialized as        |
|                    | `--remat` says: the probabilities of all layers would not fit)            |
| torch-full, -peft  | the same decoder in PyTorch, fused attention and AdamW, autocast          |
| torch-llama-peft   | the Llama of transformers with PEFT                                       |
| ...-compiled       | with `torch.compile`                                                      |

Times are medians of rounds (quartiles), each of `--steps` steps and one wait. Peak memory is what was ever in
use, without what the allocators hold back. MFU counts the products of the model as
`odjax.models.decoder.flops_per_token` does, attention in full, though kernels skip the causal half; of frozen
weights the forward product and the gradient of the activations; nothing for factors, rematerialization and
absent links. It is a share of the dense bfloat16 rate of the data sheet.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_row import ROWS, Setting, first_line
from gpu_table import brief, headline, lines_of, merged, remarks, table

ROOT = Path(__file__).resolve().parents[1]

RESULT = "RESULT "


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="1b", help="of odjax.models.decoder")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--vocab", type=int, help="instead of the preset's")
    parser.add_argument("--untied", action="store_true", help="a head of its own, in bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--remat", default="dots_no_batch", help="of the rows with plain attention")
    parser.add_argument("--steps", type=int, default=4, help="timed steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="how often all rows run")
    parser.add_argument("--only", nargs="+", default=[""], metavar="ROW", help="rows whose name holds one")
    parser.add_argument("--seconds", type=float, default=280, help="after which no more rows begin")
    parser.add_argument("--row-seconds", type=float, default=200, help="after which a row is given up")
    parser.add_argument("--json", help="file for all figures, written after every row")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for part in args.only:
        if not any(part in name for name in ROWS):
            parser.error(f"--only {part}: no row has it in its name; there are {', '.join(ROWS)}")
    return args


def setting_of(args: argparse.Namespace, cache: str = "") -> Setting:
    """Sizes of the preset with what the arguments replace."""
    from odjax.models import decoder

    replaced = {name: getattr(args, name) for name in ("layers", "vocab") if getattr(args, name)}
    if args.untied:
        replaced["tied"] = False
    model = decoder(args.preset, **replaced)
    names = ("vocab", "layers", "width", "heads", "mlp_width", "tied", "rope_theta", "norm_eps")
    sizes = {name: getattr(model, name) for name in names}
    sizes["kv_heads"] = model.kv_heads or model.heads
    return Setting(
        args.preset,
        sizes,
        args.batch,
        args.length,
        args.rank,
        args.sparsity,
        args.steps,
        args.rounds,
        args.remat,
        cache,
    )


def run_row(name: str, setting: Setting, on_gpu: bool | None) -> dict[str, Any]:
    """Runs a row in this process.

    Args:
        name: a key of `ROWS`, or "device".
        setting: of the table.
        on_gpu: whether JAX has a GPU; None where that is not known.

    Returns:
        The row's figures, or `left_out` with the reason.
    """
    if name == "device":
        from gpu_jax import device

        return device(setting)
    if name == "checks-torch" or name.startswith("torch"):
        try:
            import torch
        except ImportError as error:
            return {"left_out": first_line(error)}
        on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
        from gpu_torch import left_out
        from gpu_torch import measured as torch_measured

        _, *rest = name.split("-")
        if name == "checks-torch":
            from gpu_checks import checked, same_as_torch

            if reason := left_out("full", on_gpu=on_gpu):
                return {"left_out": reason}
            kind = "cuda" if on_gpu else "cpu"
            return {"checks": checked({"PyTorch's losses": lambda: same_as_torch(kind)})}
        return torch_measured(rest[0], setting, compiled=rest[-1] == "compiled", on_gpu=on_gpu)
    if name.startswith("checks"):
        from gpu_checks import CHECKS, checked

        return {"checks": checked(CHECKS[name])}
    from gpu_jax import measured

    method, attention = name.split("-")
    if attention == "cudnn" and not on_gpu:
        return {"left_out": "needs a GPU"}
    return measured(method, "cudnn" if attention == "cudnn" else None, setting)


def child(text: str) -> None:
    """Runs a row and prints its figures on the last line."""
    asked = json.loads(text)
    try:
        found = run_row(asked["name"], Setting(**asked["setting"]), asked["on_gpu"])
    except Exception as error:
        import traceback

        traceback.print_exc()
        found = {"error": first_line(error)}
    print(f"\n{RESULT}{json.dumps(found)}", flush=True)


def environment(name: str, before: dict[str, str]) -> dict[str, str]:
    """Of a row's process: memory is taken as it is needed, and the CPU is there for references."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | before
    platforms = own.get("JAX_PLATFORMS", "")
    if name == "checks-torch":
        own["JAX_PLATFORMS"] = "cpu"  # the GPU is PyTorch's
    elif platforms and "cpu" not in platforms.split(","):
        own["JAX_PLATFORMS"] = f"{platforms},cpu"
    return own


def started(
    name: str, setting: Setting, on_gpu: bool | None, seconds: float, before: dict[str, str]
) -> dict[str, Any]:
    """Runs a row in a process of its own, whatever becomes of it."""
    asked = json.dumps({"name": name, "setting": setting._asdict(), "on_gpu": on_gpu})
    command = [sys.executable, str(Path(__file__).resolve()), "--child", asked]
    begin = time.perf_counter()
    # Files, not pipes: what a row has started and left behind may hold them open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, env=environment(name, before), stdout=out, stderr=err, process_group=0
        )
        try:
            code, found = process.wait(seconds), None
        except subprocess.TimeoutExpired:
            found = {"error": f"not done after {seconds:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said, told = ("".join(file.seek(0) or file.readlines()) for file in (out, err))
    lines = [line for line in said.splitlines() if line.startswith(RESULT)]
    if found is None and lines:
        found = json.loads(lines[-1].removeprefix(RESULT))
    elif found is None:
        last = [line for line in told.splitlines() if line.strip()][-1:]
        found = {"error": f"the process ended with {code}: {''.join(last)}"[:240]}
    if "error" in found:
        found["stderr"] = told[-4000:]
    return {**found, "wall": time.perf_counter() - begin}


def main() -> int:
    args = arguments()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    if args.child:
        child(args.child)
        return 0
    before = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process must not take the GPU
    begin, lock = time.perf_counter(), threading.Lock()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - begin:4.0f} s] {line}", flush=True)

    try:
        import odjax.models  # noqa: F401
    except ImportError as error:
        print(f"{error}: pip install 'jax[cuda13]' flax optax", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as cache:
        try:
            setting = setting_of(args, cache if args.repeat > 1 else "")
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        device = started("device", setting, None, args.row_seconds, before)
        say(f"device: {device.get('kind') or device.get('error')}")
        on_gpu = device["platform"] == "gpu" if "platform" in device else None
        found: dict[str, dict[str, Any]] = {}
        names = [name for name in ROWS if any(part in name for part in args.only)]

        def run(name: str) -> None:
            left = args.seconds - (time.perf_counter() - begin)
            if left < 5:
                found.setdefault(name, {"left_out": f"--seconds {args.seconds:g} are spent"})
                return
            now = started(name, setting, on_gpu, min(args.row_seconds, max(left, 30)), before)
            with lock:
                found[name] = merged(found.get(name), now)
                say(f"{name}: {brief(now)}")
                if args.json:
                    result = {"device": device, "setting": setting._asdict(), "rows": found}
                    Path(args.json).write_text(json.dumps(result, indent=1))

        checks = [name for name in names if name.startswith("checks")]
        with ThreadPoolExecutor(4 if (os.cpu_count() or 1) >= 8 else 1) as pool:
            list(pool.map(run, checks))
        for repeat in range(args.repeat):
            for name in [name for name in names if name not in checks][:: -1 if repeat % 2 else 1]:
                if not repeat or "steps" in found[name]:
                    run(name)
    found = {name: found[name] for name in names}
    failed, noted = remarks(found)
    if "error" in device:
        failed.insert(0, f"device: {device['error']}")
    print()
    rows = table(device, found, setting)
    shown = [*headline(device, found, setting), ""]
    shown += [*lines_of(rows, markdown=args.markdown), ""] if len(rows) > 1 else []
    shown += noted + [f"FAILED {line}" for line in failed]
    print("\n".join(shown))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
