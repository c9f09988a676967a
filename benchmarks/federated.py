"""What packing, privacy, a large population and convolutions cost a federated round.

    python benchmarks/federated.py

Four tables, each of one process on one machine; variants take turns, and ratios are those of the medians.

1. Fifty clients of log-normal sizes, an MLP 784-100-10: lanes, a Python loop of jitted steps, chunks of
   sorted clients that begin together, and every client padded to the longest, some of them side by side.
2. The same round with clipping and noise.
3. A million clients whose state lies on the host: memory, time to sample and to plan, time of the round.
4. A small network with convolutions, once with XLA's and once with patches times a matrix.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.federated import (
    efficiency,
    fastest_lanes,
    fed_avg,
    group_by_client,
    init,
    localize,
    make_round,
    pack_chunks,
    pack_lanes,
    plan_round,
    private_sum,
    scaffold,
)
from odjax.models.patch_conv import patch_conv
from odjax.privacy import poisson_capacity, poisson_sample, privacy_plan

KEY = jax.random.key(0)
BATCH = 10


def figures_of(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, Any]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"loss": (jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(mask.astype(jnp.float32)))}


def mlp_loss(params: Any, shared: Any, batch: Any, mask: jax.Array, key: jax.Array) -> dict[str, Any]:
    hidden = jax.nn.relu(batch["x"] @ params["w1"] + params["b1"][None])
    return figures_of(hidden @ params["w2"] + params["b2"][None], batch["y"], mask)


def mlp(*sizes: int) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    params = {}
    for layer, (a, b) in enumerate(itertools.pairwise(sizes), start=1):
        params[f"w{layer}"] = jnp.asarray(random.normal(size=(a, b)) / np.sqrt(a), jnp.float32)
        params[f"b{layer}"] = jnp.zeros(b)
    return params


def in_turn(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds of each variant; the first turn, which compiles, does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            begin = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            if turn:
                times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return times


def show(
    times: dict[str, list[tuple[float, float]]], column: str = "", cells: dict[str, str] | None = None
) -> None:
    walls, processor = ({name: [pair[i] for pair in own] for name, own in times.items()} for i in (0, 1))
    first = next(iter(times))
    print(f"\n| | {column} | wall / first (quartiles) | processor / first |\n|---|---|---|---|")
    for name, own in walls.items():
        low, middle, high = (x / statistics.median(walls[first]) for x in statistics.quantiles(own, n=4))
        work = statistics.median(processor[name]) / statistics.median(processor[first])
        cell = (cells or {}).get(name, "")
        print(f"| {name} | {cell} | {middle:.2f} ({low:.2f} to {high:.2f}) | {work:.2f} |")


def packing(rounds: int) -> None:
    steps = np.maximum(1, np.rint(np.random.default_rng(0).lognormal(np.log(40), 1.0, 50) / 10)).astype(int)
    random, sizes = np.random.default_rng(1), steps * BATCH
    store = group_by_client(
        {
            "x": random.normal(size=(sizes.sum(), 784)).astype(np.float32),
            "y": random.integers(0, 10, sizes.sum()).astype(np.int32),
        },
        np.repeat(np.arange(50), sizes),
    )
    data, ids = jax.device_put(store.examples), np.arange(50)
    algorithm = fed_avg(mlp_loss, optax.sgd(0.1))
    state = init(algorithm, mlp(784, 100, 10), 50)
    run, called = jax.jit(make_round(algorithm)), make_round(algorithm, rows="called")

    def planned(**options: Any) -> Any:
        return jax.device_put(plan_round(store, ids, 0, batch=BATCH, seed=0, bucket=1, **options))

    plans = {f"lanes: {n}": planned(lanes=n) for n in (1, 2, 5, 10)}
    blocks = {f"sorted clients in chunks of {n}": planned(lanes=n, strategy="chunks") for n in (5, 10, 50)}
    variants = {name: (lambda p=plan: run(state, data, p, KEY)) for name, plan in {**plans, **blocks}.items()}
    variants["rows called from Python"] = lambda: called(state, data, plans["lanes: 1"], KEY)

    # What one writes without an engine: a jitted step in two loops.
    one = plans["lanes: 1"]
    rows = [np.asarray(one.index)[at, 0] for at in range(steps.sum())]
    ends = np.flatnonzero(np.asarray(one.lanes.last)[:, 0])
    weights = np.asarray(one.weight)[0]

    def mean_loss(params: Any, index: jax.Array) -> jax.Array:
        batch = jax.tree.map(lambda x: x[index], data)
        total, count = mlp_loss(params, None, batch, jnp.ones(BATCH, bool), KEY)["loss"]
        return total / count

    @jax.jit
    def step(params: Any, index: jax.Array) -> Any:
        gradient = jax.grad(mean_loss)(params, index)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    @jax.jit
    def added(total: Any, new: Any, weight: jax.Array) -> Any:
        return jax.tree.map(lambda t, a, b: t + weight * (a - b), total, new, state.params)

    def loop() -> Any:
        total, own, client = jax.tree.map(jnp.zeros_like, state.params), state.params, 0
        for at, index in enumerate(rows):
            own = step(own, index)
            if at == ends[client]:
                total, own, client = added(total, own, weights[client]), state.params, client + 1
        return jax.tree.map(lambda p, t: p + t / weights.sum(), state.params, total)

    variants["Python loop of jitted steps"] = loop

    # Every client padded to the longest: `side` of them at a time.
    longest = int(steps.max())
    index = np.zeros((50, longest, BATCH), np.int32)
    counts = np.zeros((50, longest), bool)
    for client, (begin, count) in enumerate(zip(store.offsets[:-1], steps, strict=True)):
        index[client, :count] = begin + np.arange(count * BATCH).reshape(count, BATCH)
        counts[client, :count] = True

    def padded(side: int) -> Callable[[], Any]:
        shape = (50 // side, side, longest)
        arrays = (
            index.reshape(*shape, BATCH),
            counts.reshape(shape),
            sizes.reshape(shape[:2]).astype(np.float32),
        )

        def client(params: Any, index: jax.Array, counts: jax.Array) -> Any:
            def body(own: Any, row: Any) -> tuple[Any, None]:
                new = step(own, row[0])
                return jax.tree.map(lambda a, b: jnp.where(row[1], a, b), new, own), None

            return jax.lax.scan(body, params, (index, counts))[0]

        @jax.jit
        def whole(params: Any, arrays: Any) -> Any:
            def chunk(total: Any, part: Any) -> tuple[Any, None]:
                ends = jax.vmap(client, (None, 0, 0))(params, part[0], part[1])
                return jax.tree.map(
                    lambda t, e, p: t + jnp.tensordot(part[2], e - p[None], 1), total, ends, params
                ), None

            total, _ = jax.lax.scan(chunk, jax.tree.map(jnp.zeros_like, params), arrays)
            return jax.tree.map(lambda p, t: p + t / sizes.sum(), params, total)

        arrays = jax.device_put(arrays)
        return lambda: whole(state.params, arrays)

    for side in (10, 5, 1, 50):
        variants[f"all padded, {side} side by side"] = padded(side)

    # They are the same mean of clients but for the order of examples, which the first step of each shows.
    agree = run(state, data, plans["lanes: 10"], KEY)[0].params, loop()
    far = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, agree), strict=True))
    parts = {
        name: f"{efficiency(pack_lanes(steps, n)):.3f}" for n, name in zip((1, 2, 5, 10), plans, strict=True)
    }
    parts |= {
        name: f"{efficiency(pack_chunks(steps, n)):.3f}" for n, name in zip((5, 10, 50), blocks, strict=True)
    }
    parts |= {
        name: f"{steps.sum() / (50 * longest):.3f}" for name in variants if name.startswith("all padded")
    }
    print(
        f"\nPacking: 50 clients, {steps.sum()} steps, longest {longest}; lanes and loop differ by {far:.1e}"
    )
    show(in_turn(variants, rounds), "steps that are some client's", parts)
    best = fastest_lanes(lambda plan: run(state, data, plan, KEY), store, ids, batch=BATCH, seed=0)
    print(f"\nfastest_lanes: {best}")

    plan = privacy_plan(population=500, cohort=50, clip=0.5, rounds=100, delta=1e-3, noise_multiplier=1.0)
    private = fed_avg(mlp_loss, optax.sgd(0.1), aggregator=private_sum(plan))
    uniform, private_round = planned(uniform=True), jax.jit(make_round(private))
    show(
        in_turn(
            {
                "mean": lambda: run(state, data, uniform, KEY),
                "clip, sum, noise": lambda: private_round(state, data, uniform, KEY),
            },
            rounds,
        )
    )


def resident() -> float:
    """Resident memory of this process, MB (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def population(rounds: int, clients: int = 1_000_000) -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(1, 40, clients)
    total = int(sizes.sum())
    # Zeros that nobody writes take no memory: what is measured is the engine, not the examples.
    examples = {"x": np.zeros((total, 16), np.float32), "y": np.zeros(total, np.int32)}
    store = group_by_client({"y": np.zeros(1, np.int32)}, [0])._replace(
        examples=examples, offsets=np.concatenate([[0], np.cumsum(sizes)])
    )
    algorithm = scaffold(mlp_loss, 0.1)
    before = resident()
    state = init(algorithm, mlp(16, 64, 10), clients, host=True)
    row = sum(leaf[0].nbytes for leaf in jax.tree.leaves(state.population))
    print(
        f"\nPopulation: {clients:,} clients, {total:,} examples; {row:,} bytes of state a client on the host,"
    )
    print(
        f"{row * clients / 1e9:.1f} GB if all were written; {before:.0f} MB resident before the population,"
    )
    print(f"{resident() - before:.0f} MB more with it")
    for units in (10**4, clients, 10**9):
        tracemalloc.start()
        poisson_sample(0, 0, units, 1000 / units, poisson_capacity(units, 1000 / units))
        print(f"1,000 of {units:,} sampled: {tracemalloc.get_traced_memory()[1] / 1e3:.0f} kB at most")
        tracemalloc.stop()
    run = make_round(algorithm, local_data=True)
    written: set[int] = set()
    print("\n| expected cohort | sample, ms | plan, ms | local data, ms | round, ms |", end="")
    print(" rows written, MB | resident, MB more |\n|---|---|---|---|---|---|---|")
    for cohort in (100, 1000, 10_000):
        rate = cohort / clients
        capacity = poisson_capacity(clients, rate)
        spent: dict[str, list[float]] = {"sample": [], "plan": [], "local": [], "round": []}
        for number in range(rounds + 1):
            at = [time.perf_counter()]
            sample = poisson_sample(0, number, clients, rate, capacity)
            at.append(time.perf_counter())
            plan = plan_round(
                store, sample.ids, number, batch=BATCH, seed=0, mask=sample.mask, uniform=True, bucket=256
            )
            at.append(time.perf_counter())
            data, plan = localize(store, plan, 1, bucket=4096)
            at.append(time.perf_counter())
            state, _ = run(state, data, plan, KEY)
            jax.block_until_ready(state.params)
            at.append(time.perf_counter())
            written.update(sample.ids[sample.mask].tolist())
            if number:
                for name, begin, end in zip(spent, at[:-1], at[1:], strict=True):
                    spent[name].append(1000 * (end - begin))
        cells = " | ".join(f"{statistics.median(own):.2f}" for own in spent.values())
        print(f"| {cohort:,} | {cells} | {len(written) * row / 1e6:.0f} | {resident() - before:.0f} |")


class Small(nn.Module):
    """Two convolutions and a classifier, on 28 x 28 images."""

    conv: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [batch, 10]."""
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2, conv_general_dilated=self.conv)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def convolutions(rounds: int) -> None:
    random = np.random.default_rng(0)
    store = group_by_client(
        {
            "x": random.normal(size=(200, 28, 28, 1)).astype(np.float32),
            "y": random.integers(0, 10, 200).astype(np.int32),
        },
        np.repeat(np.arange(5), 40),
    )
    data = jax.device_put(store.examples)
    params = Small().init(KEY, data["x"][:1])["params"]

    def variant(conv: Any, rows: str, lanes: int) -> Callable[[], Any]:
        def loss(params: Any, shared: Any, batch: Any, mask: jax.Array, key: jax.Array) -> dict[str, Any]:
            return figures_of(Small(conv).apply({"params": params}, batch["x"]), batch["y"], mask)

        algorithm = fed_avg(loss, optax.sgd(0.1))
        run, state = make_round(algorithm, rows=rows), init(algorithm, params, 5)
        run = jax.jit(run) if rows == "compiled" else run
        plan = jax.device_put(plan_round(store, range(5), 0, batch=BATCH, seed=0, lanes=lanes, bucket=1))
        return lambda: run(state, data, plan, KEY)

    variants = {
        "XLA's, rows called from Python": variant(None, "called", 1),
        "XLA's, compiled loop": variant(None, "compiled", 1),
        "XLA's, compiled loop, 5 lanes": variant(None, "compiled", 5),
        "patches, rows called from Python": variant(patch_conv, "called", 1),
        "patches, compiled loop": variant(patch_conv, "compiled", 1),
        "patches, compiled loop, 5 lanes": variant(patch_conv, "compiled", 5),
    }
    print("\nConvolutions: 5 clients of 4 steps of 10 images, 28 x 28, kernels of 3 x 3, widths 16 and 32")
    show(in_turn(variants, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11, help="turns of every variant")
    parser.add_argument("--only", choices=("packing", "population", "convolutions"), default=None)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for part in (packing, population, convolutions):
        if args.only in (None, part.__name__):
            part(args.rounds)
    print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
