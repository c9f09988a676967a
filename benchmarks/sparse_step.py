"""What a sparse optimizer costs in an ordinary training step, beside plain Adam on the same model.

    python benchmarks/sparse_step.py

A decoder whose kernels have a tenth of their links, between two changes of links. `chts` is compiled as it is
(both branches in the program, the other one taken every `interval` steps) and with `by_edit=True`, where the
step holds no change of links. The optimizers take turns in one process; the ratios are those of the medians.
Beside them are floating-point operations and temporary memory of the compiled steps, and bytes of the states.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from odjax.models.decoder import Decoder
from odjax.sparse import chts, static, uniform

KEY = jax.random.key(0)


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def compiled(model: Decoder, optimizer: Any, params: Any, state: Any, tokens: jax.Array) -> Any:
    def loss_of(params: Any) -> jax.Array:
        logits = model.apply(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--mlp-width", type=int, default=704)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument(
        "--rounds", type=int, default=20, help="in each of which every optimizer takes a step"
    )
    args = parser.parse_args()
    model = Decoder(
        vocab=256,
        width=args.width,
        layers=args.layers,
        heads=4,
        mlp_width=args.mlp_width,
        max_length=args.length,
    )
    tokens = jax.random.randint(KEY, (args.batch, args.length + 1), 0, 256)
    params = jax.jit(model.init)(KEY, tokens[:, :-1])
    plan = uniform(params, args.sparsity)
    options = {"key": jax.random.key(1), "end": 10**6, "interval": 10**4}
    optimizers = {
        "Adam": optax.adam(1e-3),
        "static mask": static(optax.adam(1e-3), plan, key=KEY),
        "chts, by_edit=True": chts(optax.adam(1e-3), plan, by_edit=True, **options),
        "chts": chts(optax.adam(1e-3), plan, **options),
    }
    steps, held, facts = {}, {}, {}
    for name, optimizer in optimizers.items():
        own = jax.tree.map(jnp.copy, params)
        state = jax.jit(optimizer.init)(own)
        steps[name] = compiled(model, optimizer, own, state, tokens)
        cost, memory = steps[name].cost_analysis(), steps[name].memory_analysis()
        facts[name] = (cost["flops"], memory.temp_size_in_bytes, size(state))
        held[name] = (own, state)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in optimizers}
    for turn in range(args.rounds + 2):
        for name in list(optimizers)[:: 1 if turn % 2 else -1]:
            wall, processor = time.perf_counter(), time.process_time()
            *held[name], _ = jax.block_until_ready(steps[name](*held[name]))
            if turn > 1:
                times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    planned = sum(leaf.size * leaf.slices for leaf in plan.values())
    print(f"{weights:,} parameters, {planned:,} of them sparse, {args.batch * args.length} tokens a step,")
    print(f"{jax.default_backend()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| optimizer | ms a step | / Adam | processor time / Adam | MFLOP | temporaries, MB | state, MB |")
    print("|---|---|---|---|---|---|---|")
    base = None
    for name, found in times.items():
        wall, processor = (statistics.median(part) for part in zip(*found, strict=True))
        base = base or (wall, processor)
        flops, temporary, state = facts[name]
        print(
            f"| {name} | {1e3 * wall:.1f} | {wall / base[0]:.3f} | {processor / base[1]:.3f} | "
            f"{flops / 1e6:,.0f} | {temporary / 1e6:.1f} | {state / 1e6:.2f} |"
        )


if __name__ == "__main__":
    main()
