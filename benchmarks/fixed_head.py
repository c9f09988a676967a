"""A training step of a language model whose head is a fixed Hadamard code, beside learned heads.

    python benchmarks/fixed_head.py                             # head, loss, backward pass and Adam
    python benchmarks/fixed_head.py --layers 1                  # the same around a decoder with an embedding
    python benchmarks/fixed_head.py --sweep                     # sizes of chunks and of transforms
    pip install -e '.[aot]' && python benchmarks/fixed_head.py --topology v5e:2x4       # nothing runs

The arms take a step in turn in one process; a ratio is that of two steps of the same round. Memory is that of
the compiled step, arguments and temporaries, without what is updated in place. FLOPs are those of the whole
step: XLA counts the body of a loop once, so that they are counted here from the program's products.

For a topology every arm is compiled ahead of time: for one chip, and with the classes divided over eight.
Cycles are the compiler's static estimates with loops times their trips, good for comparing programs and not
for times; collectives carry none, and are read from the program's text by kind, count and bytes.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.heads.codes import ClassCode
from odjax.heads.hadamard import hadamard_logits
from odjax.heads.vocab import CHUNK, code_cross_entropy
from odjax.models.decoder import Decoder
from odjax_kernels import aot

KEY = jax.random.key(0)
SCALE = 16.0
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}
Loss = Callable[[Any, jax.Array, jax.Array], jax.Array]


class Arm(NamedTuple):
    """A head: mean loss of (kernel or None, features [n, d], labels [n]), and whether it has a kernel."""

    loss: Loss
    learned: bool


def materialised(
    kernel: jax.Array, h: jax.Array, labels: jax.Array, *, dtype: Any, sharding: Any = None
) -> jax.Array:
    logits = jnp.matmul(h.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
    if sharding is not None:
        logits = jax.lax.with_sharding_constraint(logits, sharding)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def in_chunks(kernel: jax.Array, h: jax.Array, labels: jax.Array, *, dtype: Any, chunks: int) -> jax.Array:
    """Logits of a part of the tokens at a time, made anew in the backward pass."""

    @jax.checkpoint
    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + materialised(kernel, *part, dtype=dtype) / chunks, None

    parts = jnp.reshape(h, (chunks, -1, h.shape[-1])), jnp.reshape(labels, (chunks, -1))
    return jax.lax.scan(add, jnp.float32(0), parts)[0]


def fixed(
    _: None, h: jax.Array, labels: jax.Array, *, kind: str, classes: int, dtype: Any, **options: Any
) -> jax.Array:
    code = ClassCode(classes, h.shape[-1], kind)
    return jnp.mean(code_cross_entropy(h.astype(dtype), labels, code, scale=SCALE, **options).loss)


def arms(classes: int, learned: Any, token_chunks: int, chunk: int) -> dict[str, Arm]:
    code = functools.partial(fixed, classes=classes, chunk=chunk)
    return {
        "learned, all logits": Arm(functools.partial(materialised, dtype=learned), True),
        f"learned, tokens in {token_chunks} chunks": Arm(
            functools.partial(in_chunks, dtype=learned, chunks=token_chunks), True
        ),
        "Hadamard, float32": Arm(functools.partial(code, kind="hadamard", dtype=jnp.float32), False),
        "Hadamard, bfloat16": Arm(functools.partial(code, kind="hadamard", dtype=jnp.bfloat16), False),
        "sphere, bfloat16": Arm(functools.partial(code, kind="sphere", dtype=jnp.bfloat16), False),
    }


def chosen(args: argparse.Namespace, learned: Any) -> dict[str, Arm]:
    every = arms(args.classes, learned, args.token_chunks, args.chunk)
    return {n: arm for n, arm in every.items() if not args.only or any(word in n for word in args.only)}


def body(args: argparse.Namespace) -> Decoder | None:
    if not args.layers:
        return None
    return Decoder(
        vocab=args.classes,
        layers=args.layers,
        width=args.width,
        heads=args.width // 64,
        mlp_width=args.width * 11 // 4,
        head=lambda h: h,
    )


def step_of(arm: Arm, model: Decoder | None) -> Callable[..., Any]:
    """The head alone has its features as an input with a gradient, which is part of what it returns."""

    def loss_of(params: dict[str, Any], x: jax.Array, labels: jax.Array) -> jax.Array:
        h = x if model is None else model.apply(params["body"], x, method="features")
        flat = jnp.reshape(h, (-1, h.shape[-1]))
        return arm.loss(params.get("head"), flat, jnp.reshape(labels, (-1,)))

    def step(params: Any, state: Any, x: jax.Array, labels: jax.Array) -> tuple[Any, ...]:
        inputs = (0, 1) if model is None else (0,)
        loss, (gradients, *of_features) = jax.value_and_grad(loss_of, inputs)(params, x, labels)
        updates, state = optax.adam(1e-3).update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, of_features

    return step


def parameters(arm: Arm, args: argparse.Namespace, model: Decoder | None) -> Any:
    params: dict[str, Any] = {}
    if model is not None:
        params["body"] = model.init(KEY, jnp.zeros((1, 8), jnp.int32))
    if arm.learned:
        params["head"] = 0.02 * jax.random.normal(KEY, (args.width, args.classes))
    return params


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Text:
    """A compiled program, by its computations."""

    def __init__(self, hlo: str) -> None:
        self.lines: dict[str, list[str]] = {}
        self.entry = name = ""
        for line in hlo.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                name = head[2]
                self.entry = name if head[1] else self.entry
            self.lines.setdefault(name, []).append(line)

    def total(self, of: Callable[[str], float], name: str = "") -> float:
        """The sum over all operations, those in loops times the trips."""
        found = 0.0
        for line in self.lines[name or self.entry]:
            found += of(line)
            trips = self.trips(line) if " while(" in line else 1
            for role, called in re.findall(
                r"(body|calls|to_apply|branch_computations)=(\{[^}]*\}|[^,\s]+)", line
            ):
                names = [n for n in re.findall(r"[\w.-]+", called) if n in self.lines]
                most = max((self.total(of, n) for n in names), default=0.0)
                found += most * (trips if role == "body" else 1)
        return found

    def trips(self, line: str) -> int:
        """Of a loop from 0 in steps of 1, the number that its condition compares with."""
        condition = self.lines[re.search(r"condition=%?([\w.-]+)", line)[1]]
        (bound,) = (int(n) for line in condition for n in re.findall(r" s32\S* constant\((\d+)\)", line))
        return bound

    def kinds(self) -> list[str]:
        words = r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
        return sorted(
            {kind for lines in self.lines.values() for line in lines for kind in re.findall(words, line)}
        )

    def crossings(self, kind: str) -> str:
        count, moved = (self.total(lambda line: crossing(line, kind)[i]) for i in (0, 1))  # noqa: B023
        return f"{count:.0f} {kind}, {moved / 1e6:,.2f} MB"


def cycles(line: str) -> float:
    return sum(map(float, re.findall(r'"estimated_cycles":"?(\d+)', line)))


def crossing(line: str, kind: str) -> tuple[int, int]:
    """(1, bytes of the results) of a collective, or nothing."""
    found = re.search(rf"= (.*?) {kind}(?:-start)?\(", line)
    if not found:
        return 0, 0
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
    if f"{kind}-start(" in line and kind != "all-reduce":
        shapes = shapes[len(shapes) // 2 :]  # what it begins with stands before what comes out
    return 1, sum(BYTES[t] * math.prod(int(n) for n in s.split(",") if n) for t, s in shapes)


def flops(jaxpr: Any) -> float:
    """Of the products, two a multiply-add, those in loops times the trips."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        branches = [flops(branch.jaxpr) for branch in equation.params.get("branches", ())]
        total += branches[-1] if branches else 0.0
        for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr"):
            inner_jaxpr = equation.params.get(name)
            if inner_jaxpr is not None:
                total += times * flops(getattr(inner_jaxpr, "jaxpr", inner_jaxpr))
    return total


def quartiles(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def load() -> str:
    return f"{jax.default_backend()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def compare(args: argparse.Namespace) -> None:
    model = body(args)
    labels = jax.random.randint(KEY, (args.tokens,), 0, args.classes)
    if model is None:
        x = jax.random.normal(KEY, (args.tokens, args.width))
    else:
        length = min(args.tokens, 256)
        labels = jnp.reshape(labels, (-1, length))
        x = jnp.roll(labels, 1, axis=1)
    found = chosen(args, jnp.float32)
    programs, held, facts = {}, {}, {}
    for name, arm in found.items():
        params = jax.jit(functools.partial(parameters, arm, args, model))()
        state = jax.jit(optax.adam(1e-3).init)(params)
        traced = jax.jit(step_of(arm, model), donate_argnums=(0, 1)).trace(params, state, x, labels)
        programs[name] = traced.lower().compile()
        memory = programs[name].memory_analysis()
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        facts[name] = (
            flops(traced.jaxpr.jaxpr),
            memory.temp_size_in_bytes,
            peak - memory.alias_size_in_bytes,
            params["head"].size if arm.learned else 0,
            size(state),
        )
        held[name] = (params, state)
    walls: dict[str, list[float]] = {name: [] for name in programs}
    processor: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(args.rounds + 1):
        for name in list(programs)[:: 1 if turn % 2 else -1]:
            wall, own = time.perf_counter(), time.process_time()
            *held[name], loss, _ = jax.block_until_ready(programs[name](*held[name], x, labels))
            if turn:
                walls[name].append(time.perf_counter() - wall)
                processor[name].append(time.process_time() - own)
            assert np.isfinite(loss), name
    what = f"{args.layers} layers, embedding and head" if args.layers else "the head alone"
    print(f"{what}: {args.classes:,} classes, width {args.width}, {args.tokens} tokens,")
    print(f"chunks of {args.chunk} classes, {args.rounds} rounds; {load()}\n")
    print(
        "| head | ms a step | wall / first (quartiles) | processor / first (quartiles) | GFLOP | "
        "temporaries, MB | peak, MB | head's parameters, M | optimizer's state, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    first = next(iter(programs))
    for name in programs:
        work, temporary, peak, kernel, state = facts[name]
        ratios = [
            quartiles([a / b for a, b in zip(times[name], times[first], strict=True)])
            for times in (walls, processor)
        ]
        print(
            f"| {name} | {1e3 * statistics.median(walls[name]):,.0f} | {ratios[0]} | {ratios[1]} | "
            f"{work / 1e9:,.0f} | {temporary / 1e6:,.0f} | {peak / 1e6:,.0f} | {kernel / 1e6:.1f} | "
            f"{state / 1e6:,.0f} |"
        )


def in_turn(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each, of the clock and of the processor."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name in list(programs)[:: 1 if turn % 2 else -1]:
            wall, own = time.perf_counter(), time.process_time()
            jax.block_until_ready(programs[name]())
            if turn:
                taken[name].append((time.perf_counter() - wall, time.process_time() - own))
    return {
        name: tuple(1e3 * statistics.median(part) for part in zip(*times, strict=True))
        for name, times in taken.items()
    }


def sweep(args: argparse.Namespace) -> None:
    h = jax.random.normal(KEY, (args.tokens, args.width))
    labels = jax.random.randint(KEY, (args.tokens,), 0, args.classes)
    programs, memory = {}, {}
    for chunk in (512, 1024, 2048, 4096, 8192, 16384, 32768):
        for dtype in (jnp.float32, jnp.bfloat16):
            loss = functools.partial(
                fixed, None, kind="hadamard", classes=args.classes, dtype=dtype, chunk=chunk
            )
            program = jax.jit(jax.value_and_grad(loss)).lower(h, labels).compile()
            name = f"{chunk} | {dtype.__name__}"
            programs[name] = functools.partial(program, h, labels)
            memory[name] = program.memory_analysis().temp_size_in_bytes
    print(f"{args.classes:,} classes, width {args.width}, {args.tokens} tokens; {load()}\n")
    print("| chunk | features | ms | processor, ms | temporaries, MB |\n|---|---|---|---|---|")
    for name, (wall, own) in in_turn(programs, args.rounds).items():
        print(f"| {name} | {wall:.0f} | {own:.0f} | {memory[name] / 1e6:.0f} |")

    programs, counts = {}, {}
    share = jax.random.normal(KEY, (args.tokens, CHUNK))
    forms = [(w, r) for w in (16, 32, 64, 128, 256, args.width) for r in (2, 16, w) if r <= w]
    for width, radix in dict.fromkeys(forms):

        def both(h: jax.Array, share: jax.Array, width: int = width, radix: int = radix) -> Any:
            logits = functools.partial(hadamard_logits, KEY, num_classes=CHUNK, width=width, radix=radix)
            out, back = jax.vjp(logits, h)
            return out, back(share)

        program = jax.jit(both).lower(h, share).compile()
        name = f"{width} | {radix}"
        programs[name] = functools.partial(program, h, share)
        counts[name] = program.cost_analysis()["flops"]
    print(f"\nlogits of {CHUNK} classes and the transpose, float32; {load()}\n")
    print("| width | radix | ms | processor, ms | GFLOP |\n|---|---|---|---|---|")
    for name, (wall, own) in in_turn(programs, args.rounds).items():
        print(f"| {name} | {wall:.1f} | {own:.1f} | {counts[name] / 1e9:.2f} |")


def ahead_of_time(args: argparse.Namespace) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    chips = {"one chip": devices[:1], "classes over 8 chips": devices[:8]}
    print(
        f"{args.topology}: {args.classes:,} classes, width {args.width}, {args.tokens} tokens, head alone\n"
    )
    print(
        "| arm | chips | million cycles | temporaries, MB | arguments, MB | collectives of one chip |\n"
        "|---|---|---|---|---|---|"
    )
    for where, some in chips.items():
        mesh = Mesh(np.array(some), ("tensor",), axis_types=(AxisType.Auto,))
        for name, arm in chosen(args, jnp.bfloat16).items():
            loss = arm.loss
            if len(some) > 1 and not arm.learned:
                loss = functools.partial(loss, mesh=mesh, axis="tensor")
            elif len(some) > 1 and "all" in name:
                loss = functools.partial(loss, sharding=NamedSharding(mesh, P(None, "tensor")))
            program = compiled_for(Arm(loss, arm.learned), args, mesh, "float32" in name)
            text, memory = Text(program.as_text()), program.memory_analysis()
            crossings = "; ".join(text.crossings(kind) for kind in text.kinds())
            print(
                f"| {name} | {where} | {text.total(cycles) / 1e6:,.0f} | "
                f"{memory.temp_size_in_bytes / 1e6:,.0f} | {memory.argument_size_in_bytes / 1e6:,.0f} | "
                f"{crossings} |",
                flush=True,
            )


def compiled_for(arm: Arm, args: argparse.Namespace, mesh: Mesh, wide: bool) -> jax.stages.Compiled:
    def placed(shape: tuple[int, ...], dtype: Any, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    params = {}
    if arm.learned:
        params["head"] = placed((args.width, args.classes), jnp.float32, None, "tensor")
    state = jax.tree.map(
        lambda leaf: placed(leaf.shape, leaf.dtype, *((None, "tensor") if leaf.ndim == 2 else ())),
        jax.eval_shape(optax.adam(1e-3).init, params),
    )
    h = placed((args.tokens, args.width), jnp.float32 if wide else jnp.bfloat16)
    labels = placed((args.tokens,), jnp.int32)
    return jax.jit(step_of(arm, None), donate_argnums=(0, 1)).lower(params, state, h, labels).compile()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=128256, help="of Llama 3")
    parser.add_argument("--width", type=int, help="1024; for a topology 2048")
    parser.add_argument("--tokens", type=int, help="512; for a topology 8 x 2048")
    parser.add_argument("--layers", type=int, default=0, help="of a decoder in front of the head; 0: none")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="classes at a time")
    parser.add_argument("--token-chunks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="in each of which every arm takes a step")
    parser.add_argument("--only", nargs="*", help="arms whose names hold one of these")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--topology", help="such as v5e:2x4: compile for it and run nothing")
    args = parser.parse_args()
    args.width = args.width or (2048 if args.topology else 1024)
    args.tokens = args.tokens or (8 * 2048 if args.topology else 512)
    if args.topology:
        if not aot.is_available():
            parser.error("libtpu is not installed: pip install 'odjax[aot]'")
        setting = aot.compiler_environment()
        if not setting.items() <= os.environ.items():  # jax reads them when it is imported
            os.execve(sys.executable, [sys.executable, *sys.argv], setting)
        ahead_of_time(args)
    elif args.sweep:
        sweep(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
