"""Bytes that a client sends and gets in a round, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from odjax.core import Where, leaves_with_paths, partition

if TYPE_CHECKING:
    from odjax.lowrank import Adapted

DELTA = 4  # deltas are float32
SEED = 12  # two words of a key and the number of the block


class Traffic(NamedTuple):
    """Bytes of one client in one round.

    Attributes:
      up: what it sends, its delta in float32.
      down: what it gets before it starts.
    """

    up: int
    down: int


def traffic(
    params: Any,
    trainable: Where | None = None,
    *,
    model: Adapted | None = None,
    rank: int | None = None,
    sketches: str = "seed",
    missed: int = 1,
) -> Traffic:
    """What a round moves for each client.

    Up go the deltas of what is trained. Down come its values; in a chain, where they are merged after every
    round, the mean factors of all rounds since the client was last there, and what the sketches are drawn
    from, but never more than the adapted weights themselves. What is sent once in a run (the other weights, a
    half that stays frozen as in FFA-LoRA) is not counted.

    Args:
      params: the parameters, arrays or `jax.ShapeDtypeStruct`.
      trainable: what is trained; None for `odjax.lowrank.FACTORS` with a model, for all without.
      model: the adapted model, whose method says whether it is a chain; None where nothing is adapted.
      rank: of this round, for `fed_dylora`; None for the full one.
      sketches: of a chain, "seed" for 12 bytes a matrix, "array" for the drawn halves themselves.
      missed: rounds since the client was last there; 1 for one that comes every round. With a cohort of C out
        of N clients it is N / C on average.

    Returns:
      `Traffic`.

    Raises:
      ValueError: `sketches` is neither, `missed` below 1, or a rank that the factors do not have.

    Source: Malinovsky et al. 2024, "RAC-LoRA", appendix (Fed-RAC-LoRA: seeds); Xu et al. 2024, "DP-DyLoRA",
    section 4 (b_t of R ranks).

    Example:
      >>> import flax.linen as nn
      >>> from odjax.lowrank import adapt
      >>> x = jnp.ones((1, 100))
      >>> traffic(nn.Dense(10).init(jax.random.key(0), x)["params"])
      Traffic(up=4040, down=4040)
      >>> model = adapt(nn.Dense(10), rank=2, method="rac", side="right")
      >>> traffic(model.init(jax.random.key(0), x)["params"], model=model)
      Traffic(up=80, down=92)
    """
    if sketches not in ("seed", "array"):
        raise ValueError(f"sketches must be 'seed' or 'array', got {sketches!r}")
    if missed < 1:
        raise ValueError(f"missed must be at least 1 round, got {missed}")
    if model is None:
        if rank is not None:
            raise ValueError("rank= is of factors: pass model=, what odjax.lowrank.adapt returned")
        trained = params if trainable is None else partition(params, trainable)[0]
        leaves = [leaf for _, leaf in leaves_with_paths(trained)]
        return Traffic(DELTA * _numbers(leaves), _bytes(leaves))
    from odjax.lowrank import FACTORS
    from odjax.lowrank.methods import CHAINS

    trained = partition(params, FACTORS if trainable is None else trainable)[0]
    shapes = dict(leaves_with_paths(trained))
    if rank is not None:
        shapes = _at_rank(params, shapes, rank)
    leaves = list(shapes.values())
    up = DELTA * _numbers(leaves)
    if model.spec.method not in CHAINS:
        return Traffic(up, _bytes(leaves))
    names = ("lora_a", "lora_b")
    factors = [leaf for path, leaf in shapes.items() if path.rpartition("/")[2] in names]
    rest = [leaf for path, leaf in shapes.items() if path.rpartition("/")[2] not in names]
    weights, drawn, matrices = _matrices(params)
    new = SEED * matrices if sketches == "seed" else missed * drawn
    return Traffic(up, _bytes(rest) + min(missed * _bytes(factors) + new, weights + new))


def _numbers(leaves: list[Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _bytes(leaves: list[Any]) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def _at_rank(params: Any, shapes: Mapping[str, Any], rank: int) -> dict[str, Any]:
    from odjax.lowrank.nested import slice_rank

    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    cut = dict(leaves_with_paths(jax.eval_shape(lambda tree: slice_rank(tree, rank), whole)))
    return {path: cut[path] for path in shapes}


def _matrices(params: Any) -> tuple[int, int, int]:
    """Of all adapted weights: their bytes, the bytes of the drawn halves, how many matrices there are."""
    from odjax.lowrank.factors import sizes_of
    from odjax.lowrank.merge import map_adapted
    from odjax.lowrank.sizes import dims

    weights = drawn = matrices = 0

    def seen(path: str, kernel: Any, leaves: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        nonlocal weights, drawn, matrices
        sizes = sizes_of(kernel.shape, leaves)
        inputs, outputs = dims(sizes)
        count = math.prod(sizes.batch)
        # Where both halves are trained, A is drawn anew at a restart.
        trained = leaves["lora_b"] if "lora_b" in leaves else leaves["lora_a"]
        rank = trained.shape[len(sizes.batch)] if "lora_b" in leaves else trained.shape[-1]
        dim = inputs if "lora_b" in leaves else outputs
        weights += _bytes([kernel])
        drawn += count * dim * rank * jnp.dtype(trained.dtype).itemsize
        matrices += count
        return kernel, leaves

    map_adapted(seen, params)
    return weights, drawn, matrices
