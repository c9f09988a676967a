"""RAC-LoRA as a gradient transform: a chain of random low-rank updates of ordinary parameters.

Malinovsky, Michieli, Hammoud, Ceritli, Elesedy, Ozay, Richtárik 2024, "Randomized Asymmetric Chain of LoRA",
arXiv 2410.08305; Bernoulli sides from arXiv 2508.03820, cyclic windows from arXiv 2606.13767, rotated moments
from FLORA, arXiv 2402.03293.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from odjax.core.keys import check_key
from odjax.core.matrices import DimensionNumbers, check_patterns, matrix_shape, view_of
from odjax.core.paths import NOT_KERNELS, STACKED, Where, is_stacked, leaves_with_paths, select
from odjax.lowrank import boundary
from odjax.lowrank.sketches import Bernoulli, Law, Scale, Side, check_law, check_scale, check_side, fixed_side
from odjax.lowrank.subspace import Leaf, from_factor, prepare, to_factor, turn


class RacLoraState(NamedTuple):
    """State of `rac_lora`.

    Attributes:
      count: int32 [], updates so far; the block is `count // block_steps`.
      key: uint32, the data of the key that the sketches are drawn from.
      factors: state of the inner transform for {path: factor} of the adapted leaves.
      rest: state of the inner transform for the other leaves, full-shaped.
      sketches: {path: sketch of this block [*batch, dim, rank], or its coordinates [*batch, rank]} with
        `cache_sketch`; empty without.
    """

    count: jax.Array
    key: jax.Array
    factors: Any
    rest: Any
    sketches: Any = ()


def _whole(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_inner(inner: optax.GradientTransformation, factors: Any) -> None:
    """Raises where the inner transform works with parameters and not without."""

    def attempt(given: bool) -> Exception | None:
        try:
            jax.eval_shape(lambda z: inner.update(z, inner.init(z), z if given else None)[0], factors)
        except Exception as error:  # whatever an unknown transform raises
            return error
        return None

    if attempt(False) is not None and attempt(True) is None:
        raise ValueError(
            "the inner transform of rac_lora needs params, but what it sees are factors: use the scale_by_* "
            "transform inside and put decay outside, optax.chain(rac_lora(optax.scale_by_adam(), ...), "
            "optax.add_decayed_weights(...), optax.scale_by_learning_rate(...))"
        )


def rac_lora(
    inner: optax.GradientTransformation,
    rank: int,
    block_steps: int,
    *,
    key: jax.Array,
    side: Side = "auto",
    law: Law = "orthonormal",
    scale: Scale = "unit_rms",
    on_boundary: Literal["reset", "keep", "rotate"] = "reset",
    where: Where | None = None,
    dimension_numbers: DimensionNumbers = None,
    stacked: str | None = STACKED,
    precondition: bool = False,
    alpha: float | None = None,
    clip_rank: bool = False,
    cache_sketch: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an optimizer in a random low-rank subspace that is drawn anew every `block_steps` updates.

    For a kernel with gradient G [inputs, outputs], sketch Q of the block and scale s = alpha / rank,

        z = inner(s G Q),    update = s z Q^T      (left, the output side)
        z = inner(s Q^T G),  update = s Q z        (right, the input side)

    which gives the weights that training a LoRA with frozen factor Q from zero, and merging it at the end of
    the block, gives. Moments are factor-sized: inputs x rank or rank x outputs numbers each. Sketches are
    drawn from the key and never stored.

    Leaves that are not adapted get the inner transform's update, from a state of its own (an inner transform
    that mixes leaves, such as a global norm, sees the two groups apart: put it outside).

    At a boundary "reset" clears the moments and their bias-correction count (schedules go on); "keep" leaves
    the moments as they are (the authors' code); "rotate" carries them over, M <- R M and V <- (R * R) V with
    R = Q_new^T Q_old of normalised columns, which is O(sqrt(rank / dim)) for random sketches. Tuned, the
    three come out alike; at one rate "rotate" takes larger steps and "keep" smaller ones.

    Data parallelism with the collective on the factors: under `jax.shard_map`, with per-device gradients,
    `rac_lora(optax.chain(average_over("data"), optax.scale_by_adam()), ...)`.

    Args:
      inner: what is run on the factors, such as `optax.scale_by_adam()`; must not need params.
      rank: of every update; at most the smaller side of each adapted matrix.
      block_steps: updates between two sketches.
      key: a typed key.
      side: "left", "right", "auto" (the smaller side of each matrix: the largest rank / dim, and the larger
        factor), or `Bernoulli(p)`: left with probability p in each block (factors are padded to the larger
        of both shapes).
      law: "orthonormal", "gaussian", "rademacher", "coordinate", "cyclic" or a function, see `draw`.
      scale: "unit_rms" (columns of norm sqrt(dim)), "orthonormal" (norm 1), or the entries' RMS.
      on_boundary: what happens to the moments, see above.
      where: the leaves to adapt; None takes every floating leaf that is a matrix, except those named
        bias, scale, embedding, pos_embedding, positions and cls.
      dimension_numbers: which axes are inputs and outputs, see `view_of`.
      stacked: paths of leaves whose first axis counts layers.
      precondition: multiply the factor's gradient by s^-2 (Q^T Q)^+; SGD with rate gamma is then projected
        gradient descent with rate gamma for every law, and every scale.
      alpha: s = alpha / rank; None is alpha = rank, s = 1.
      clip_rank: lower the rank of a leaf to its smaller side instead of an error.
      cache_sketch: keep the sketches of the block in the state, dim x rank numbers a matrix (rank ones for
        "coordinate" and "cyclic"), and draw in the first update of a block only, in a branch; otherwise
        they are drawn in every update and take no memory between updates. The numbers are the same.

    Returns:
      A transform with state `RacLoraState`. Updates have the dtype of the gradients; factors are float32
      (float64 for float64 leaves).

    Raises:
      ValueError: rank, block_steps, side, law, scale, on_boundary or alpha is wrong; at `init`: `where`
        selects nothing or a leaf that is no real matrix, the rank is too large, the inner transform needs
        params, or its state cannot be reset or rotated.
      TypeError: the key is not a typed one, or `inner` is no transform.

    Source: arXiv 2410.08305, algorithm 1.

    Example:
      >>> optimizer = optax.chain(
      ...     rac_lora(optax.scale_by_adam(), rank=2, block_steps=5, key=jax.random.key(0)),
      ...     optax.scale_by_learning_rate(0.1),
      ... )
      >>> params = {"kernel": jnp.ones((8, 6))}
      >>> state = optimizer.init(params)
      >>> state[0].factors.mu["kernel"].shape
      (8, 2)
      >>> loss = lambda p: jnp.sum(p["kernel"] ** 2)
      >>> for _ in range(40):
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 4)
      True
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be an optax transform such as optax.scale_by_adam(), got {inner!r}")
    _whole("rank", rank)
    _whole("block_steps", block_steps)
    check_key(key)
    check_side(side)
    check_law(law)
    check_scale(scale)
    boundary.check_boundary(on_boundary)
    if on_boundary == "rotate" and isinstance(side, Bernoulli):
        raise ValueError("on_boundary='rotate' needs one side: use side='auto' or on_boundary='reset'")
    if cache_sketch and isinstance(side, Bernoulli):
        raise ValueError("cache_sketch=True needs one side: use side='auto' or cache_sketch=False")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be a positive number or None, got {alpha!r}")
    inner = optax.with_extra_args_support(inner)
    impl = jax.random.key_impl(key)

    def chosen(tree: Any, leaves: list[tuple[str, Any]]) -> list[bool]:
        if where is not None:
            return jax.tree.leaves(select(tree, where))
        hits = [
            leaf.ndim - is_stacked(path, stacked) >= 2
            and jnp.issubdtype(leaf.dtype, jnp.floating)
            and path.rpartition("/")[2] not in NOT_KERNELS
            for path, leaf in leaves
        ]
        if not any(hits):
            raise ValueError(
                "rac_lora found no matrix among the parameters "
                f"({', '.join(repr(p) for p, _ in leaves[:3])}): name the leaves with where="
            )
        return hits

    def leaf_of(path: str, leaf: Any) -> Leaf:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"rac_lora cannot adapt {path!r}, which is {leaf.dtype}: narrow where= to real floats"
            )
        view = view_of(path, leaf.shape, dimension_numbers, stacked=stacked)
        _, inputs, outputs = matrix_shape(leaf.shape, view)
        if rank > min(inputs, outputs) and not clip_rank:
            raise ValueError(
                f"rank {rank} is more than the smaller side of {path!r} ({inputs} inputs, {outputs} outputs)"
                ": lower it, narrow where=, or pass clip_rank=True"
            )
        at = side if isinstance(side, Bernoulli) else fixed_side(side, inputs, outputs)
        dtype = leaf.dtype if leaf.dtype.itemsize > 4 else jnp.float32
        return Leaf(path, tuple(leaf.shape), view, min(rank, inputs, outputs), at, law, scale, dtype)

    def plan(tree: Any) -> list[Leaf | None]:
        leaves = leaves_with_paths(tree)
        check_patterns(dimension_numbers, [path for path, _ in leaves])
        hits = chosen(tree, leaves)
        return [leaf_of(*item) if hit else None for item, hit in zip(leaves, hits, strict=True)]

    def strength(leaf: Leaf) -> float:
        return 1.0 if alpha is None else alpha / leaf.rank

    def rest_of(tree: Any, leaves: list[Leaf | None]) -> Any:
        flat, structure = jax.tree.flatten(tree)
        return structure.unflatten(
            [optax.MaskedNode() if leaf else x for x, leaf in zip(flat, leaves, strict=True)]
        )

    def init(params: Any) -> RacLoraState:
        # A copy: a loop that donates the state must not take the caller's key with it.
        count, data = jnp.zeros([], jnp.int32), jnp.array(jax.random.key_data(key), copy=True)
        if not jax.tree.leaves(params):  # a placeholder of optax.tree.map_params
            held = params if cache_sketch else ()
            return RacLoraState(count, data, inner.init(params), inner.init(params), held)
        leaves = plan(params)
        factors = {leaf.path: jnp.zeros(leaf.factor_shape(), leaf.dtype) for leaf in leaves if leaf}
        shapes = {path: jax.ShapeDtypeStruct(z.shape, z.dtype) for path, z in factors.items()}
        _check_inner(inner, shapes)
        state = inner.init(factors)
        boundary.check_state(state, factors, on_boundary)
        held = {}
        if cache_sketch:  # the first update draws them
            for leaf in filter(None, leaves):
                made = jax.eval_shape(lambda leaf=leaf: leaf.stored(key, 0))
                held[leaf.path] = jnp.zeros(made.shape, made.dtype)
        return RacLoraState(count, data, state, inner.init(rest_of(params, leaves)), held or ())

    def sketches_of(state: RacLoraState, adapted: dict[str, Leaf], key: jax.Array) -> tuple[Any, Any]:
        """The sketches of this block, and what is kept of them."""
        block = state.count // block_steps
        if not cache_sketch:
            return {path: prepare(leaf, key, block) for path, leaf in adapted.items()}, ()
        held = jax.lax.cond(
            state.count % block_steps == 0,
            lambda _: {path: leaf.stored(key, block) for path, leaf in adapted.items()},
            lambda old: old,
            state.sketches,
        )
        return {path: leaf.loaded(held[path]) for path, leaf in adapted.items()}, held

    def renewed(
        state: RacLoraState, factors: dict[str, jax.Array], adapted: dict[str, Leaf], key: jax.Array
    ) -> Any:
        """The factors' state, in the coordinates of this block where it begins."""
        begins = (state.count > 0) & (state.count % block_steps == 0)
        if on_boundary == "keep":
            return state.factors
        if on_boundary == "reset":
            fresh = boundary.reset(
                inner, state.factors, {path: jnp.zeros(z.shape, z.dtype) for path, z in factors.items()}
            )
            return jax.tree.map(lambda new, old: jnp.where(begins, new, old), fresh, state.factors)

        def turned(path: str, moment: jax.Array, squared: bool) -> jax.Array:
            return turn(adapted[path], key, state.count // block_steps, moment, squared)

        held = state.factors
        return jax.lax.cond(begins, lambda s: boundary.rotate(s, factors, turned), lambda s: s, held)

    def update(
        updates: Any, state: RacLoraState, params: Any = None, **extra: Any
    ) -> tuple[Any, RacLoraState]:
        leaves = plan(updates)
        flat, structure = jax.tree.flatten(updates)
        adapted = {leaf.path: leaf for leaf in leaves if leaf}
        run_key = jax.random.wrap_key_data(state.key, impl=impl)
        sketches, kept = sketches_of(state, adapted, run_key)
        factors = {
            leaf.path: to_factor(leaf, sketches[leaf.path], g, strength(leaf), precondition)
            for g, leaf in zip(flat, leaves, strict=True)
            if leaf
        }
        held = renewed(state, factors, adapted, run_key)
        moved, held = inner.update(factors, held, None, **extra)
        rest, rest_state = rest_of(updates, leaves), state.rest
        if None in leaves:
            rest_params = None if params is None else rest_of(params, leaves)
            rest, rest_state = inner.update(rest, rest_state, rest_params, **extra)
        others = iter(jax.tree.leaves(rest))
        result = [
            from_factor(leaf, sketches[leaf.path], moved[leaf.path], strength(leaf)).astype(g.dtype)
            if leaf
            else next(others)
            for g, leaf in zip(flat, leaves, strict=True)
        ]
        count = optax.safe_increment(state.count)
        return structure.unflatten(result), RacLoraState(count, state.key, held, rest_state, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def average_over(axis_name: str | tuple[str, ...]) -> optax.GradientTransformation:
    """The mean of the updates over a mesh axis, for use under `jax.shard_map`.

    First inside `rac_lora` it makes the gradient all-reduce carry factors: inputs x rank numbers a kernel
    instead of inputs x outputs, exact because projecting is linear.

    Args:
      axis_name: of the mesh, or several.

    Returns:
      A stateless transform.

    Example:
      >>> mean = lambda u: average_over("data").update(u, optax.EmptyState())[0]
      >>> jax.vmap(mean, axis_name="data")(jnp.array([1.0, 3.0]))
      Array([2., 2.], dtype=float32)
    """
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: jax.lax.pmean(u, axis_name), updates))
