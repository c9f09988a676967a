"""Regrowth of links beside an independent PyTorch version of the same formulas.

    python benchmarks/sparse_regrowth.py

Node-based scores (CH2-L3n) of all absent links of a layer, and a draw of links without replacement with
probabilities proportional to them. Run it where both libraries are; without PyTorch only ours are timed. All
cases take turns in one process and the figures are medians. The PyTorch version does what the published code
is said to do: four float32 products, a sort of all scores to see whether the last one wanted is 0, and
`torch.multinomial`. "products" is the time of the four float32 products by themselves in JAX.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from odjax.core.selection import perturbed, top_k_mask
from odjax.sparse import ch_scores
from odjax.sparse.masks import links

SHAPES = ((1024, 1024, 0.05), (2048, 5461, 0.3))
SHARE = 0.3  # of the links, drawn anew
BFLOAT16 = jax.lax.DotAlgorithmPreset.BF16_BF16_F32


def products(a: jax.Array) -> jax.Array:
    """The four products of the scores, and nothing else."""
    inputs, outputs = a @ a.T, a.T @ a
    return inputs @ a + a @ outputs


def draw(key: jax.Array, mask: jax.Array, scores: jax.Array, k: jax.Array) -> jax.Array:
    """k absent links, as `odjax.sparse.cannistraci_hebb.regrowth` and the engine draw them."""
    few = links(scores > 0) < k
    scores = jnp.where(few & ~mask, scores + jnp.float32(1e-5), scores)
    return mask | top_k_mask(perturbed(key, jnp.log(scores)), k, eligible=~mask)


def torch_cases(mask: np.ndarray, k: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Scores and draw in PyTorch; nothing where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed here: no ratios to it")
        return {}
    import torch

    a = torch.tensor(mask).float()

    def weights(common: Any, degrees: Any) -> Any:
        external = (degrees - common - 1).clamp(min=0)
        return torch.where(common > 0, (1 + common) / (1 + external), torch.zeros(()))

    def scores() -> Any:
        left = weights(a @ a.T, a.sum(1)) @ a
        right = a @ weights(a.T @ a, a.sum(0)).T
        return torch.where(a > 0, torch.zeros(()), left + right)

    def select(scores: Any) -> Any:
        flat = scores.flatten()
        if flat.sort(descending=True).values[k - 1] == 0:
            flat = torch.where(a.flatten() > 0, flat, flat + 1e-5)
        new = a.flatten().clone()
        new[torch.multinomial(flat, k, replacement=False)] = 1
        return new

    return {"PyTorch": (scores, select)}


def timed(fn: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(fn(*arguments))
    return time.perf_counter() - start, result


def compare(n: int, m: int, density: float, rounds: int, row_block: int) -> None:
    mask = jax.random.uniform(jax.random.key(0), (n, m)) < density
    k = int(SHARE * links(mask))
    select = jax.jit(lambda scores, key: draw(key, mask, scores, jnp.int32(k)))
    cases = torch_cases(np.asarray(mask), k)
    kinds = {
        "float32": {"exact": False, "row_block": row_block},
        "bfloat16": {"exact": False, "precision": BFLOAT16, "row_block": row_block},
        "exact": {"row_block": row_block},
        "exact, all rows at once": {},
    }
    for name, options in kinds.items():
        score = functools.partial(jax.jit(functools.partial(ch_scores, **options)), mask)
        cases[name] = (score, lambda scores: select(scores, jax.random.key(1)))
    pure = functools.partial(jax.jit(products), mask.astype(jnp.float32))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    alone = []
    for turn in range(rounds + 1):  # the first one compiles
        seconds, _ = timed(pure)
        alone += [seconds] * (turn > 0)
        for name, (score, choose) in cases.items():
            first, scores = timed(score)
            second, new = timed(choose, scores)
            assert abs(int(new.sum()) - int(links(mask)) - k) == 0, "another number of links"
            if turn:
                times[name].append((first, second))
    matmul = statistics.median(alone)
    print(f"\n{n} x {m}, {density:.0%} of the links, {k:,} drawn; products {matmul * 1e3:,.0f} ms")
    print("| | scores, ms | draw, ms | total, ms | scores / products | PyTorch / it: scores | draw | total |")
    print("|---|---|---|---|---|---|---|---|")
    medians = {
        name: [statistics.median(part) for part in zip(*found, strict=True)] for name, found in times.items()
    }
    theirs = medians.get("PyTorch")
    for name, (first, second) in medians.items():
        ratios = [first / matmul]
        if theirs:
            ratios += [theirs[0] / first, theirs[1] / second, sum(theirs) / (first + second)]
        figures = [f"{1e3 * x:,.0f}" for x in (first, second, first + second)] + [f"{x:.2f}" for x in ratios]
        print(f"| {name} | " + " | ".join(figures) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="in each of which every case runs once")
    parser.add_argument("--row-block", type=int, default=512, help="of ch_scores")
    parser.add_argument("--small", action="store_true", help="the smaller layer only")
    options = parser.parse_args()
    print(f"{jax.default_backend()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    for shape in SHAPES[: 1 if options.small else None]:
        compare(*shape, rounds=options.rounds, row_block=options.row_block)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
