"""Chains of low-rank updates: at the end of a block the update is merged and a new one begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from odjax.core import (
    Edit,
    Where,
    fold_path,
    leaves_with_paths,
    map_params_state,
    partition,
    reset_moments,
    select,
)
from odjax.lowrank.adapt import Adapted
from odjax.lowrank.factors import redrawn, sizes_of, with_update
from odjax.lowrank.merge import map_adapted, rounded, spec_of
from odjax.lowrank.methods import CHAINS, FACTORS, LowRank

BOUNDARIES = ("reset", "keep", "prune_random", "prune_magnitude")


def restart(
    model: Adapted | LowRank,
    *,
    every: int,
    on_boundary: str | None = None,
    pruned: float | None = None,
    trainable: Where | None = FACTORS,
    stochastic: bool = False,
    init: Callable[[Any], Any] | None = None,
    name: str = "restart",
    start: int | None = None,
    stop: int | None = None,
) -> Edit:
    """The restart of a chain as an edit: merge, zero the trained factors, draw the others anew.

    For `rac` the block number goes up and the frozen half follows from its key; for `cola` and `relora` A is
    drawn again. The function that the model computes does not change but for one rounding of the weights.

    What becomes of the optimizer's state of the factors (`on_boundary`):

    | value             | moments                                       | count of the bias correction     |
    |-------------------|-----------------------------------------------|----------------------------------|
    | `reset`           | zero                                          | zero, if all leaves are factors  |
    | `keep`            | kept, though they are of other coordinates    | kept                             |
    | `prune_random`    | a random part `pruned` of them zero (0.99)    | kept                             |
    | `prune_magnitude` | the smallest part `pruned` of each leaf (0.9) | kept                             |

    Where other leaves share the optimizer's state, its count goes on and the first steps of a block are
    several learning rates long: give the factors an optimizer of their own (`optax.multi_transform`).

    `reset` is the least sensitive to the learning rate; tuned, the choices differ little.

    Args:
      model: the adapted model, or its `spec`.
      every: length of a block in updates.
      on_boundary: see above; None is "prune_random" for `relora` and "reset" otherwise.
      pruned: the part of the moments that is pruned.
      trainable: which parameters the optimizer's state is about, as the training loop selected them; None
        when it is about all of them.
      stochastic: round bfloat16 weights at random in proportion instead of to nearest, so that small updates
        are not lost block after block.
      init: `optimizer.init`, where the state does not start at zero.
      name: of the edit.
      start: first update after which it may run.
      stop: last update after which it may run.

    Returns:
      An edit that keeps structure, shapes and dtypes.

    Raises:
      ValueError: a method that is no chain, an unknown `on_boundary`, or a part outside (0, 1].

    Source: Malinovsky et al. 2024, "RAC-LoRA", algorithm 1; Lialin et al. 2023, "ReLoRA", section 3.

    Example:
      >>> import flax.linen as nn
      >>> from odjax.lowrank.adapt import adapt
      >>> edit = restart(adapt(nn.Dense(4), rank=2, method="rac"), every=100)
      >>> edit.due(100), edit.due(101)
      (True, False)
    """
    spec = spec_of(model)
    if spec.method not in CHAINS:
        instead = {"lora": "cola", "rslora": "cola", "asym": "rac", "lora_fa": "rac"}.get(spec.method)
        remedy = f"use method={instead!r}" if instead else f"use one of {', '.join(CHAINS)}"
        raise ValueError(f"method {spec.method!r} is no chain and has nothing to restart: {remedy}")
    if on_boundary is None:
        on_boundary = "prune_random" if spec.method == "relora" else "reset"
    if on_boundary not in BOUNDARIES:
        raise ValueError(
            f"on_boundary must be one of {', '.join(BOUNDARIES)}, got {on_boundary!r}"
            + (": rotating moments is done by odjax.rac_lora" if on_boundary == "rotate" else "")
        )
    if pruned is not None and not on_boundary.startswith("prune"):
        raise ValueError(
            f"pruned= goes with on_boundary='prune_random' or 'prune_magnitude', not {on_boundary!r}"
        )
    part = (0.99 if on_boundary == "prune_random" else 0.9) if pruned is None else pruned
    if not 0 < part <= 1:
        raise ValueError(f"pruned must be in (0, 1], got {part}")

    def apply(key: jax.Array, step: jax.Array, params: Any, opt_state: Any) -> tuple[Any, Any]:
        del step
        held = params if trainable is None else partition(params, trainable)[0]
        params = next_block(spec, params, key, stochastic=stochastic)
        if on_boundary != "keep":
            _check_moments(opt_state, held)
        if on_boundary == "reset":
            opt_state = reset_moments(opt_state, held, FACTORS, init=init)
        elif on_boundary != "keep":
            opt_state = prune_moments(
                opt_state, held, part, key=fold_path(key, "prune") if on_boundary == "prune_random" else None
            )
        return params, opt_state

    return Edit(apply, every, name, start, stop)


def next_block(model: Adapted | LowRank, params: Any, key: jax.Array, *, stochastic: bool = False) -> Any:
    """Parameters at the start of the next block: merged weights, new factors.

    Factors of zero change no weight.

    Args:
      model: the adapted model, or its `spec`.
      params: the parameters of the adapted model at the end of a block.
      key: for new random factors and for stochastic rounding.
      stochastic: see `restart`.

    Returns:
      The parameters, same structure, shapes and dtypes.

    Source: Xia et al. 2024, "COLA", algorithm 1.

    Example:
      >>> import flax.linen as nn
      >>> from odjax.lowrank.adapt import adapt
      >>> model = adapt(nn.Dense(4), rank=2, method="rac")
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> next_block(model, params, jax.random.key(1))["lora_sketch"][2]
      Array(1, dtype=uint32)
    """
    spec = spec_of(model)

    def advanced(path: str, kernel: jax.Array, leaves: Any) -> tuple[jax.Array, Any]:
        own = fold_path(key, path)
        total = with_update(spec, path, kernel, leaves)
        merged = rounded(total, kernel.dtype, fold_path(own, "round") if stochastic else None)
        table = path.rpartition("/")[2] == "embedding"
        new = redrawn(spec, fold_path(own, "draw"), leaves, sizes_of(kernel.shape, leaves), table=table)
        return merged, {**leaves, **new}

    return map_adapted(advanced, params)


def prune_moments(opt_state: Any, params: Any, part: float, *, key: jax.Array | None = None) -> Any:
    """Zeroes a part of the moments of the factors, at random or the smallest ones.

    Args:
      opt_state: any optax state.
      params: the parameters it is about.
      part: how much of each leaf, in (0, 1].
      key: for a random choice, each entry on its own; None takes the smallest magnitudes of each leaf.

    Returns:
      The state.

    Source: Lialin et al. 2023, "ReLoRA", section 3 (optimizer resets).

    Example:
      >>> params = {"lora_a": jnp.ones((2, 2))}
      >>> moments = {"lora_a": jnp.array([[1.0, 4.0], [3.0, 2.0]])}
      >>> state = optax.trace(0.9).init(params)._replace(trace=moments)
      >>> prune_moments(state, params, 0.5).trace["lora_a"]
      Array([[0., 4.],
             [3., 0.]], dtype=float32)
    """
    factors = {path for path, hit in _selected(params) if hit}
    seen: dict[str, int] = {}

    def cut(path: str, param: Any, leaf: jax.Array) -> jax.Array:
        if path not in factors:
            return leaf
        # The first and the second moment of a leaf are two draws.
        seen[path] = seen.get(path, 0) + 1
        if key is not None:
            keep = jax.random.bernoulli(fold_path(key, f"{path}:{seen[path]}"), 1 - part, leaf.shape)
        else:
            size = jnp.abs(leaf.astype(jnp.float32))
            keep = size > jnp.quantile(size, part)
        return jnp.where(keep, leaf, jnp.zeros_like(leaf))

    return map_params_state(cut, opt_state, params)


def _check_moments(opt_state: Any, params: Any) -> None:
    """Raises where the optimizer has arrays and none of them is a moment of a factor."""
    factors = {path for path, hit in _selected(params) if hit}
    found = set()

    def seen(path: str, param: Any, leaf: jax.Array) -> jax.Array:
        found.add(path)
        return leaf

    map_params_state(seen, opt_state, params)
    arrays = [leaf for leaf in jax.tree.leaves(opt_state) if leaf.ndim and leaf.size > 1]
    if arrays and not factors & found:
        raise ValueError(
            "the optimizer's state has no moments shaped like the factors: pass restart(trainable=) the "
            "where of all that the optimizer trains, or on_boundary='keep'"
        )


def _selected(params: Any) -> list[tuple[str, bool]]:
    paths = [path for path, _ in leaves_with_paths(params)]
    return list(zip(paths, jax.tree.leaves(select(params, FACTORS)), strict=True))


def jagged_cosine(
    peak: float,
    steps: int,
    every: int,
    *,
    warmup: int = 0,
    rewarm: int = 50,
    floor: float = 0.1,
) -> optax.Schedule:
    """A cosine that falls to zero at every restart and climbs back to itself within a few steps.

    With c(t) the cosine from `peak` at the end of the warm-up to `floor * peak` at `steps`, and w(t) = min(1,
    (t + 1) / warmup), the rate at step t is c(t) w(t) in the first block, and in later ones c(t) min(w(t),
    (t mod every + 1) / rewarm).

    Args:
      peak: the largest rate.
      steps: of the run.
      every: length of a block, as of `restart`.
      warmup: steps of the first warm-up.
      rewarm: steps of the warm-up after a restart.
      floor: the last rate as a part of the largest.

    Returns:
      A schedule, step -> rate.

    Raises:
      ValueError: numbers of steps that do not fit together.

    Source: Lialin et al. 2023, "ReLoRA", section 3 (jagged cosine).

    Example:
      >>> rate = jagged_cosine(1.0, 100, 20, rewarm=4, floor=1.0)
      >>> [float(rate(t)) for t in (19, 20, 21, 23, 24)]
      [1.0, 0.25, 0.5, 1.0, 1.0]
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be 0 to {steps - 1}, fewer than steps, got {warmup}")
    if not 1 <= rewarm <= every:
        raise ValueError(f"rewarm must be 1 to every={every}, got {rewarm}")

    def schedule(step: Any) -> jax.Array:
        t = jnp.asarray(step).astype(jnp.float32)
        along = jnp.clip((t - warmup) / (steps - warmup), 0.0, 1.0)
        cosine = peak * (floor + (1 - floor) * 0.5 * (1 + jnp.cos(math.pi * along)))
        first = jnp.minimum(1.0, (t + 1) / max(warmup, 1)) if warmup else 1.0
        again = jnp.minimum(1.0, (jnp.mod(t, every) + 1) / rewarm)
        return cosine * jnp.where(t < every, first, jnp.minimum(first, again))

    return schedule
