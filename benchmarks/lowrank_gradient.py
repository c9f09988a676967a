"""The gradient view of RAC-LoRA beside GaLore of optax and full Adam, at equal rank.

    python benchmarks/lowrank_gradient.py

One update of several square kernels; the methods take turns in one process, and the ratios are those of the
medians. GaLore keeps its projector and runs an SVD of every gradient each `update_proj_gap` steps; `rac_lora`
draws its sketch from a key in every step, or keeps it for a block where it is cached. The floats of the
states are printed beside: at equal rank both keep moments of the same size, and GaLore its projector on top.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console
from rich.table import Table

from odjax.lowrank import rac_lora
from odjax.lowrank.sketches import LAWS

GALORE, SVD = "GaLore, no SVD steps", "GaLore, SVD in every step"


def stepper(transform: Any, grads: Any) -> tuple[Callable[[], float], int]:
    """A function that runs one update and gives its seconds, and the floats of the state."""
    held = [transform.init(grads)]
    size = sum(leaf.size for leaf in jax.tree.leaves(held[0]) if jnp.issubdtype(leaf.dtype, jnp.floating))
    update = jax.jit(transform.update, donate_argnums=1)

    def once() -> float:
        start = time.perf_counter()
        updates, held[0] = update(grads, held[0])
        jax.block_until_ready((updates, held[0]))
        return time.perf_counter() - start

    return once, size


def main(width: int = 512, layers: int = 4, rank: int = 8, rounds: int = 40, side: str = "auto") -> None:
    """Prints floats of state and ratios of time to GaLore.

    Args:
        width: of the square kernels.
        layers: how many kernels.
        rank: of the updates.
        rounds: in each of which every method runs one update.
        side: of the sketches of `rac_lora`.
    """
    keys = jax.random.split(jax.random.key(0), layers)
    grads = {f"w{i}": jax.random.normal(k, (width, width)) for i, k in enumerate(keys)}
    adam, galore = optax.scale_by_adam(), optax.contrib.scale_by_galore
    options = {"key": jax.random.key(1), "side": side}
    cases = {
        "Adam, full": adam,
        GALORE: galore(rank, 10**9, base_optimizer=adam),
        SVD: galore(rank, 1, base_optimizer=adam),
        **{f"rac_lora, {law}": rac_lora(adam, rank, 200, law=law, **options) for law in LAWS},
        **{
            f"rac_lora, {law}, cached": rac_lora(adam, rank, 200, law=law, cache_sketch=True, **options)
            for law in ("orthonormal", "coordinate")
        },
        "rac_lora, orthonormal, keep": rac_lora(adam, rank, 200, on_boundary="keep", **options),
        "rac_lora, orthonormal, a block a step": rac_lora(adam, rank, 1, **options),
    }
    steps = {name: stepper(transform, grads) for name, transform in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for once, _ in steps.values():
        once(), once()
    for i in range(rounds):
        for name, (once, _) in steps.items():
            if name != SVD or i < 3:
                times[name].append(once())
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    table = Table("", "floats of state", "time / GaLore without SVD", "with SVD")
    for name, median in medians.items():
        table.add_row(
            name, f"{steps[name][1]:,}", f"{median / medians[GALORE]:.2f}", f"{median / medians[SVD]:.4f}"
        )
    Console().print(f"{layers} kernels of {width} x {width}, rank {rank}, {jax.default_backend()}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
