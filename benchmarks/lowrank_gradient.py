"""The gradient view of RAC-LoRA beside GaLore of optax and full Adam, at equal rank.

    python benchmarks/lowrank_gradient.py

One update of several square kernels, in turn, in one process. GaLore keeps its projector and runs an SVD of
every gradient each `update_proj_gap` steps; `rac_lora` draws its sketch from a key in every step. The floats
of the states are printed beside: at equal rank both keep moments of the same size, and GaLore its
projector on top.
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


def seconds(update: Callable[..., Any], grads: Any, state: Any, repeats: int, skip: int) -> float:
    """Median seconds of an update, after some that are not counted."""
    times = []
    for i in range(repeats + skip):
        start = time.perf_counter()
        updates, state = update(grads, state)
        jax.block_until_ready((updates, state))
        if i >= skip:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(width: int = 512, layers: int = 4, rank: int = 8, repeats: int = 20) -> None:
    """Prints milliseconds, floats of state and ratios to GaLore.

    Args:
        width: of the square kernels.
        layers: how many kernels.
        rank: of the updates.
        repeats: updates that are timed.
    """
    keys = jax.random.split(jax.random.key(0), layers)
    grads = {f"w{i}": jax.random.normal(k, (width, width)) for i, k in enumerate(keys)}
    never = 10**9
    adam, key = optax.scale_by_adam(), jax.random.key(1)
    galore = optax.contrib.scale_by_galore
    cases = {
        "Adam, full": (adam, 2),
        "GaLore, no SVD steps": (galore(rank, never, base_optimizer=adam), 2),
        "GaLore, SVD in every step": (galore(rank, 1, base_optimizer=adam), 2),
        **{
            f"rac_lora, {law}, {mode}": (
                rac_lora(adam, rank, 200, key=key, law=law, on_boundary=mode),
                2,
            )
            for law, mode in (
                ("orthonormal", "reset"),
                ("gaussian", "reset"),
                ("rademacher", "reset"),
                ("coordinate", "reset"),
                ("cyclic", "reset"),
                ("orthonormal", "keep"),
            )
        },
        "rac_lora, orthonormal, reset in every step": (rac_lora(adam, rank, 1, key=key), 2),
    }
    found = {}
    for name, (transform, skip) in cases.items():
        state = transform.init(grads)
        size = sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
        slow = "SVD in" in name
        found[name] = (
            1e3
            * seconds(
                jax.jit(transform.update, donate_argnums=1), grads, state, 3 if slow else repeats, skip
            ),
            size,
        )
    table = Table("", "ms an update", "floats of state", "time / GaLore without SVD", "with SVD")
    plain, svd = found["GaLore, no SVD steps"][0], found["GaLore, SVD in every step"][0]
    for name, (time_ms, size) in found.items():
        table.add_row(name, f"{time_ms:.2f}", f"{size:,}", f"{time_ms / plain:.2f}", f"{time_ms / svd:.4f}")
    Console().print(f"{layers} kernels of {width} x {width}, rank {rank}, {jax.default_backend()}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
