"""Low-rank adapters at the parameters: for models that are no Linen modules, and for tests.

`materialize(free, frozen)` gives ordinary parameters for any `apply`. The price is memory: differentiating
through it forms the gradient of every adapted weight in full and only then projects it onto the factors, and
under a scan over layers these gradients are stacked. With m x n weights in L layers that is L m n numbers on
top of the weights, as much as training them; only the optimizer's state is small. For Linen models use
`odjax.lowrank.adapt`, which never forms them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from odjax.core import Where, check_key, fold_path, leaves_with_paths, map_with_path, select
from odjax.core.matrices import DimensionNumbers, from_matrices, to_matrices, view_of
from odjax.lowrank.factors import Sizes, recipes, redrawn, with_update
from odjax.lowrank.methods import CHAINS, LowRank


class Frozen(NamedTuple):
    """What is not trained: the parameters, and by path the random halves' state."""

    params: Any
    sketches: dict[str, dict[str, jax.Array]]


Free = dict[str, dict[str, jax.Array]]


class ParameterAdapter(NamedTuple):
    """A low-rank method on ordinary parameters.

    Attributes:
      init: `(key, params) -> (free, frozen)`; free is {path: {name: factor}}.
      materialize: `(free, frozen) -> params`.
      advance: `(key, free, frozen) -> (free, frozen)`, the start of the next block with merged weights.
    """

    init: Callable[[jax.Array, Any], tuple[Free, Frozen]]
    materialize: Callable[[Free, Frozen], Any]
    advance: Callable[[jax.Array, Free, Frozen], tuple[Free, Frozen]]


def parameter_adapter(
    method: str = "lora",
    *,
    where: Where = r"(.*/)?kernel",
    dimension_numbers: DimensionNumbers = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **settings: Any,
) -> ParameterAdapter:
    """A low-rank method on any tree of parameters; see the module for what it costs.

    Args:
      method: one of `odjax.lowrank.methods.METHODS` but `pissa` and `dylora`, which change more than weights.
      where: which leaves are adapted.
      dimension_numbers: which axes of a leaf are batch, inputs and outputs, see `odjax.lowrank.view_of`.
      rank_pattern: pattern of a path -> rank.
      alpha_pattern: pattern of a path -> alpha.
      **settings: further fields of `odjax.lowrank.methods.LowRank`, but `dropout` and `cache_sketch`.

    Returns:
      The adapter.

    Raises:
      ValueError: a setting that is not possible; at `init`, when `where` selects nothing or a leaf is no
        matrix; in `materialize` and `advance`, when the factors are not those of the parameters; in
        `advance`, when the method is no chain.

    Source: Malinovsky et al. 2024, "RAC-LoRA", algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> adapter = parameter_adapter("rac", rank=2, where="w")
      >>> params = {"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}
      >>> free, frozen = adapter.init(jax.random.key(0), params)
      >>> free["w"]["lora_a"].shape
      (8, 2)
      >>> bool(jnp.all(adapter.materialize(free, frozen)["w"] == 1))
      True
    """
    if method in ("pissa", "dylora"):
        raise ValueError(f"method {method!r} needs the module route: use odjax.lowrank.adapt")
    for name, why in (
        ("dropout", "there is no input of a layer to drop from"),
        ("cache_sketch", "the frozen half is drawn where the parameters are materialized"),
    ):
        if settings.get(name):
            raise ValueError(f"{name}= is for the module route, odjax.lowrank.adapt: here {why}")
    spec = LowRank(
        method=method,
        where=where,
        rank_pattern=tuple((rank_pattern or {}).items()),
        alpha_pattern=tuple((alpha_pattern or {}).items()),
        **settings,
    )

    def stacked(path: str, leaf: jax.Array) -> tuple[jax.Array, Any]:
        view = view_of(path, leaf.shape, dimension_numbers)
        return to_matrices(leaf, view), view

    def init(key: jax.Array, params: Any) -> tuple[Free, Frozen]:
        check_key(key)
        chosen = jax.tree.leaves(select(params, where))
        free: Free = {}
        sketches: dict[str, dict[str, jax.Array]] = {}
        for hit, (path, leaf) in zip(chosen, leaves_with_paths(params), strict=True):
            if not hit:
                continue
            matrices, _ = stacked(path, leaf)
            made = recipes(spec, path, _sizes(matrices), matrices, table=_is_table(path))
            own = fold_path(key, path)
            leaves = {name: recipe.init(fold_path(own, name)) for name, recipe in made.items()}
            sketches[path] = {name: leaf for name, leaf in leaves.items() if name == "lora_sketch"}
            free[path] = {name: leaf for name, leaf in leaves.items() if name != "lora_sketch"}
        return free, Frozen(params, sketches)

    def materialize(free: Free, frozen: Frozen) -> Any:
        _check(free, frozen)

        def sum_of(path: str, leaf: jax.Array) -> jax.Array:
            if path not in free:
                return leaf
            matrices, view = stacked(path, leaf)
            total = with_update(spec, path, matrices, {**free[path], **frozen.sketches[path]})
            return from_matrices(total, view, leaf.shape).astype(leaf.dtype)

        return map_with_path(sum_of, frozen.params)

    def advance(key: jax.Array, free: Free, frozen: Frozen) -> tuple[Free, Frozen]:
        if method not in CHAINS:
            raise ValueError(f"method {method!r} is no chain: advance is for {', '.join(CHAINS)}")
        params = materialize(free, frozen)
        sizes = {
            path: _sizes(stacked(path, leaf)[0]) for path, leaf in leaves_with_paths(params) if path in free
        }
        new = {
            path: {
                **free[path],
                **redrawn(
                    *(spec, fold_path(key, path), {**free[path], **frozen.sketches[path]}, sizes[path]),
                    table=_is_table(path),
                ),
            }
            for path in free
        }
        sketches = {
            path: {name: new[path].pop(name) for name in held} for path, held in frozen.sketches.items()
        }
        return new, Frozen(params, sketches)

    return ParameterAdapter(init, materialize, advance)


def _is_table(path: str) -> bool:
    return path.rpartition("/")[2] == "embedding"


def _sizes(matrices: jax.Array) -> Sizes:
    *batch, inputs, outputs = matrices.shape
    return Sizes(tuple(batch), (inputs,), (outputs,))


def _check(free: Free, frozen: Frozen) -> None:
    if set(free) != set(frozen.sketches):
        odd = sorted(set(free) ^ set(frozen.sketches))
        raise ValueError(f"the factors are not those of this adapter's parameters: they differ at {odd}")
