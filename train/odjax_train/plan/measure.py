"""Functions of a program run on the devices that are here, and timed."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from odjax_train.federated.feed import opened
from odjax_train.program import Program

WARM_UP = 2
LEAST, LONGEST = 3, 5.0  # runs, seconds


def made_up(program: Program) -> dict[str, jax.Array]:
    """A batch of the right shapes: zeros, and ones where numbers are floating (weights)."""

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = 1 if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
        return jax.device_put(jnp.full(leaf.shape, value, leaf.dtype), leaf.sharding)

    return {name: filled(leaf) for name, leaf in program.batch.items()}


def first(program: Program) -> Any:
    """What the first step takes besides the state: a batch that is made up, or the first round."""
    if program.experiment.federated is None:
        return made_up(program)
    with opened(program) as rounds:
        return next(rounds)


def seconds(program: Program, name: str, compiled: Callable[..., Any]) -> float:
    """Seconds of one run of a compiled part, the median after warming up.

    Args:
        program: it belongs to.
        name: "init", "step", "evaluate" or an edit's.
        compiled: the function.
    """
    if name == "init":
        return _median(lambda: compiled())
    with program.context():
        state = program.init()
    if name == "evaluate":
        batch = made_up(program)
        return _median(lambda: compiled(state.params, state.collections, batch))
    rest = (first(program),) if name == "step" else ()

    def advance() -> Any:
        nonlocal state
        result = compiled(state, *rest)
        state = result[0] if name == "step" else result
        return result

    return _median(advance)


def _median(run: Callable[[], Any]) -> float:
    for _ in range(WARM_UP):
        jax.block_until_ready(run())
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < LEAST or (time.perf_counter() - begin < LONGEST and len(taken) < 10 * LEAST):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]
