"""A training step of an adapted decoder: RAC-LoRA against LoRA on a frozen base, qwix, and PyTorch + PEFT.

One step is the forward and the backward pass and Adam on the factors of all linear layers. The methods take
turns in one process, several steps a turn of which the first is not counted; printed are the ratios of the
medians to those of `odjax` LoRA, of wall time and of processor time, and the quartiles of the ratio of a
round.

    python benchmarks/lowrank_adapter.py                    # rac and its laws, on their own
    python benchmarks/lowrank_adapter.py --qwix --peft --attention blocked --no-scan
                                                            # needs qwix; torch, transformers and peft

Expected: rac at most 1.02; qwix and PEFT above 1.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

Step = Callable[[], None]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("layers", 4),
        ("width", 192),
        ("heads", 6),
        ("mlp-width", 512),
        ("vocab", 256),
        ("batch", 8),
        ("length", 256),
        ("rank", 8),
        ("rounds", 10),
        ("steps", 3),
        ("seconds", 120),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peft", action="store_true", help="time PyTorch + PEFT too")
    parser.add_argument("--qwix", action="store_true", help="time qwix on the same Flax model too")
    parser.add_argument("--no-scan", dest="scan", action="store_false", help="unroll the layers in JAX")
    parser.add_argument("--attention", default=None, help="JAX's attention: xla or blocked")
    parser.add_argument("--plain-malloc", action="store_true", help="give freed memory back to the system")
    return parser.parse_args()


def decoder(args: argparse.Namespace) -> Any:
    from odjax.models import Decoder

    return Decoder(
        vocab=args.vocab,
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        mlp_width=args.mlp_width,
        max_length=args.length,
        scan=args.scan,
        attention=args.attention,
    )


def jax_step(args: argparse.Namespace, model: Any, factors: str) -> Step:
    """One step of Adam on the leaves that `factors` selects; the frozen rest never moves."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    from odjax.core import combine, partition

    tokens = jax.random.randint(jax.random.key(1), (args.batch, args.length), 0, args.vocab)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens)["params"])
    free, frozen = partition(params, factors)
    optimizer = optax.adam(1e-3)
    state = optimizer.init(free)

    @jax.jit
    def step(free: Any, state: Any, frozen: Any) -> tuple[Any, Any]:
        def loss(free: Any) -> jax.Array:
            logits = model.apply({"params": combine(free, frozen)}, tokens)[:, :-1]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        updates, state = optimizer.update(jax.grad(loss)(free), state, free)
        return optax.apply_updates(free, updates), state

    carry = [(free, state)]

    def once() -> None:
        carry[0] = jax.block_until_ready(step(*carry[0], frozen))

    return once


def adapted_step(args: argparse.Namespace, method: str, **settings: Any) -> Step:
    """A step of the model adapted here."""
    from odjax.lowrank import FACTORS, adapt

    model = adapt(decoder(args), rank=args.rank, method=method, where="layers.*kernel", **settings)
    return jax_step(args, model, FACTORS)


def qwix_step(args: argparse.Namespace) -> Step:
    """The same step of the same model, adapted by qwix."""
    import qwix

    provider = qwix.LoraProvider(module_path=".*layers.*", rank=args.rank, alpha=float(args.rank))
    model = qwix.apply_lora_to_model(decoder(args), provider)
    return jax_step(args, model, r"(.*/)?kernel_lora_(a|b)")


def peft_step(args: argparse.Namespace) -> Step:
    """The same step of a Llama of the same size in PyTorch, adapted by PEFT."""
    import torch
    from torch_decoder import Sizes, llama, with_lora

    sizes = Sizes(args.vocab, args.layers, args.width, args.heads, args.heads, args.mlp_width)
    model = with_lora(llama(sizes, args.length), args.rank)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.randint(0, args.vocab, (args.batch, args.length))

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return once


def timed(steps: dict[str, Step], args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds of a step, one pair a round: the median of the steps of its turn."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    began = time.perf_counter()
    for _ in range(args.rounds):
        for name, step in steps.items():
            step()  # what the other library's threads left behind is not counted
            own = []
            for _ in range(args.steps):
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                own.append((time.perf_counter() - wall, time.process_time() - cpu))
            rounds[name].append(tuple(statistics.median(column) for column in zip(*own, strict=True)))
        if time.perf_counter() - began > args.seconds:
            break
    return rounds


def main() -> None:
    args = arguments()
    if not args.plain_malloc:
        from odjax_train.cpu import keep_freed_memory

        keep_freed_memory()
    steps = {"lora": adapted_step(args, "lora"), "rac": adapted_step(args, "rac")}
    steps["rac, cached sketches"] = adapted_step(args, "rac", cache_sketch=True)
    steps["rac, coordinates"] = adapted_step(args, "rac", law="coordinate")
    if args.qwix:
        steps["qwix lora"] = qwix_step(args)
    if args.peft:
        steps["PyTorch + PEFT lora"] = peft_step(args)
    for step in steps.values():
        step()
    times = timed(steps, args)
    print(f"rounds: {len(times['lora'])}; ratios of a step to lora")
    print(f"{'':22s}{'wall':>8s}{'processor':>11s}   quartiles of the rounds' wall ratio")
    base = [statistics.median(column) for column in zip(*times["lora"], strict=True)]
    for name, rows in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*rows, strict=True))
        each = [own[0] / lora[0] for own, lora in zip(rows, times["lora"], strict=True)]
        low, _, high = statistics.quantiles(each) if len(each) > 1 else each * 3
        print(f"{name:22s}{wall / base[0]:8.3f}{cpu / base[1]:11.3f}   {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
