"""The engine of dynamic sparse training: an optimizer of sparse weights whose links move now and then.

How links move is a matter of scores, see `odjax.sparse.rewiring`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from odjax.core.edits import Edit
from odjax.core.keys import check_key, fold_path, fold_step
from odjax.core.optimizer_state import map_params_state
from odjax.core.paths import Where, leaves_with_paths, map_with_path
from odjax.core.trees import combine, partition
from odjax.sparse.mask_trees import Initial, Masks, apply_masks, check_initial, random_mask
from odjax.sparse.masks import pack, unpack
from odjax.sparse.plans import Plan, check_plan
from odjax.sparse.rewiring import Rewiring, Score
from odjax.sparse.schedules import Schedule


class Cadence(NamedTuple):
    """When links change: at multiples of `interval` from `start` to `end`."""

    interval: int
    start: int
    end: int | None


class DstState(NamedTuple):
    """State of `dst`.

    Attributes:
      count: int32 [], updates so far.
      key: uint32, the data of the key.
      masks: {path: packed mask}, see `odjax.sparse.masks.pack`.
      inner: state of the inner optimizer.
      history: {path: last value of every link while it was there}; () without init_new="history".
      overlap: {path: float32 [*batch]}, the share of the links grown last that had just been dropped.
    """

    count: jax.Array
    key: jax.Array
    masks: Masks
    inner: Any
    history: Any = ()
    overlap: Any = ()


def _wide(x: jax.Array) -> jax.Array:
    return x if x.dtype.itemsize > 4 else x.astype(jnp.float32)


def _whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of updates, at least {low}, got {value!r}")


def _zero(path: str, masks: Masks, x: jax.Array) -> jax.Array:
    return jnp.where(masks[path], x, jnp.zeros_like(x)) if path in masks else x


def dst(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    drop: Score | None,
    grow: Score | None,
    prune: Score | None = None,
    zeta: float | jax.Array | Schedule = 0.3,
    density: float | jax.Array | Schedule | None = None,
    across: bool = False,
    interval: int = 100,
    start: int = 0,
    end: int | None = None,
    skip_step: bool | None = None,
    percolate: Callable[[Masks], Masks] | None = None,
    early_stop: float | None = None,
    init_new: Literal["zero", "history"] = "zero",
    masks: Mapping[str, jax.Array] | Initial | None = None,
    by_edit: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains sparse weights with any optimizer, and moves a share of their links every `interval` updates.

    Updates are numbered 1, 2, 3, ... An ordinary one is that of the inner optimizer, which sees the gradient
    of the links only. Update number `step`, a multiple of `interval` in [start, end], changes links instead
    (or after, with `skip_step=False`), each leaf by itself:

        there = the E links with the largest prune scores, E = min(links now, target)
        keep = the E - floor(zeta E) of them with the largest drop scores
        keep = percolate(keep), for all leaves together
        mask = keep and the target - |keep| absent links with the largest grow scores

    The transform leaves parameters that are masked already, `params + update` is exactly 0 where there is no
    link, so nothing is to be called in the training loop. A new link starts at 0 (or at its last value), with
    the optimizer's state of a parameter at the start; a link that was dropped and grown again in one update
    keeps both. The state of absent links is that of a parameter at the start, 0 for moments.

    The number of links is exactly the target after every update. N:M groups stay full: drops are free, every
    group is filled up. Random numbers depend on the key, the update and the path, not on the devices.

    It must see the gradients of all weights, averaged over devices: put it outermost, and clip inside.
    Numbers that change with time (zeta, density) are traced: nothing is compiled again.

    Args:
      inner: the optimizer.
      plan: which leaves are sparse and how many links each has, see `odjax.sparse.plans`.
      key: a typed key.
      drop: score of links, see `odjax.sparse.rewiring`. None: links never change.
      grow: score of absent links. None: links are only dropped, to follow the density.
      prune: score by which links go where the density falls; None: the drop does both.
      zeta: share of links that an update replaces, between 0 and 1; a number or a schedule.
      density: of all sparse leaves together, a number or a schedule; None stays at the plan's. Leaves follow
        it in proportion (`target_links`), never below the plan. The last update that changes links (the last
        multiple of `interval` up to `end`) goes to the plan whatever the schedule says.
      across: where the density falls, compare the scores of all leaves and slices, so that their shares
        differ from the plan's; the number of all links together is the plan's. It needs a vector of all
        sparse weights.
      interval: updates between two changes.
      start: the first update that may change links.
      end: the last one; None for no limit.
      skip_step: the update that changes links takes no optimizer step (the inner count stays, too). None:
        so it is, unless an `Edit` changes links, which comes after the step.
      percolate: {path: bool mask} -> the same with fewer links; after the drop, before the growth. It must
        leave the groups and blocks of structured leaves whole.
      early_stop: a layer whose grown links had just been dropped in more than this share is left alone from
        then on. None: never. `DstState.overlap` has the share.
      init_new: a new link starts at "zero", or from "history", its last value while it was there (one more
        copy of the sparse leaves).
      masks: the links at the start: {path: bool mask}, or `(key, leaf plan, count) -> mask`, such as
        `odjax.sparse.topology.drawn(...)`; None draws them uniformly.
      by_edit: links change when a `topology_edit` of this optimizer runs, and never in an update: for loops
        that compile edits apart from the step. Scores then see no gradients.

    Returns:
      A transform whose state is `DstState`.

    Raises:
      ValueError: an interval below 1, `end` before `start` or the interval, a zeta or density that is no
        share, masks that do not fit the plan, a plan that does not fit the parameters, a score of another
        shape; `update` was called without parameters.
      TypeError: the key is not a typed one.

    Source: the common form of Mocanu et al., arXiv 1707.04780, Evci et al., arXiv 1911.11134, and Zhang et
      al., arXiv 2501.19107.

    Example:
      >>> from odjax.sparse import LeafPlan, links
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> optimizer = dst(optax.sgd(0.1), {"kernel": LeafPlan((8, 8), 16)}, key=jax.random.key(0),
      ...                 drop=lambda layer: jnp.abs(layer.w), grow=lambda layer: jnp.abs(layer.gradient),
      ...                 interval=2)
      >>> state = optimizer.init(params)
      >>> for _ in range(5):
      ...     gradients = jax.tree.map(lambda p: p - 2, params)
      ...     updates, state = optimizer.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int((params["kernel"] != 0).sum()), int(links(state.masks["kernel"]))
      (16, 16)
    """
    check_key(key)
    if not plan:
        raise ValueError("the plan is empty: make one with uniform(params, sparsity)")
    _whole("interval", interval, 1)
    _whole("start", start, 0)
    last = None
    if end is not None:
        _whole("end", end, 1)
        last = end // interval * interval
        if end < start or last < max(start, 1):
            raise ValueError(
                f"no update from start={start} to end={end} is a multiple of interval={interval}: move end"
            )
    if by_edit and skip_step:
        raise ValueError("skip_step=True with by_edit=True: an Edit comes after the step of its update")
    skip_step = not by_edit if skip_step is None else skip_step
    if interval == 1 and skip_step and drop is not None:
        raise ValueError("interval=1 with skip_step=True never takes a step: pass skip_step=False")
    if drop is None and grow is not None:
        raise ValueError("grow without drop never changes a link: give drop a score, such as the magnitude")
    structured = any(leaf.structure is not None for leaf in plan.values())
    if across and (density is None or structured):
        raise ValueError(
            "across=True is for pruning: it needs a density that falls, and plans without structure"
        )
    if early_stop is not None and (density is not None or not 0 <= early_stop <= 1):
        raise ValueError(
            f"early_stop must be a share between 0 and 1, and density None, got {early_stop!r}, {density!r}"
        )
    if init_new not in ("zero", "history"):
        raise ValueError(f"init_new must be 'zero' or 'history', got {init_new!r}")
    for name, value in (("zeta", zeta), ("density", density)):
        if isinstance(value, int | float) and not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    check_initial(masks, plan, exact=density is None)
    inner = optax.with_extra_args_support(inner)
    impl = jax.random.key_impl(key)
    initial = random_mask if masks is None else masks
    cadence = Cadence(interval, start, end)
    rewiring = Rewiring(plan, drop, grow, prune, zeta, density, last, across, percolate, early_stop)

    def init(params: Any) -> DstState:
        check_plan(plan, params)
        words = {}
        for path, leaf in plan.items():
            if callable(initial):
                own = fold_path(fold_step(key, 0), path)
                with jax.ensure_compile_time_eval():
                    count = rewiring.target(leaf, 0)
                count = count if isinstance(count, jax.core.Tracer) else int(count)
                mask = initial(own, leaf, count)
                if mask.shape != leaf.shape:
                    raise ValueError(f"masks= made {mask.shape} for {path!r}, a leaf of shape {leaf.shape}")
                words[path] = pack(mask)
            else:
                words[path] = pack(initial[path])
        now = apply_masks(params, words)
        shapes = dict(leaves_with_paths(params))
        history = {p: jnp.zeros_like(shapes[p]) for p in plan} if init_new == "history" else ()
        count = jnp.zeros([], jnp.int32)
        overlap = {path: jnp.zeros(leaf.batch_shape, jnp.float32) for path, leaf in plan.items()}
        # A copy: the state may be donated, the key is the caller's.
        data = jnp.array(jax.random.key_data(key), copy=True)
        return DstState(count, data, words, inner.init(now), history, overlap)

    def cleared(inner_state: Any, stays: Masks, params: Any) -> Any:
        """The inner state with that of the start wherever a link does not stay."""
        begin: list[jax.Array] = []
        zeros = apply_masks(params, {path: jnp.zeros(leaf.shape, bool) for path, leaf in plan.items()})
        map_params_state(lambda path, p, leaf: begin.append(leaf) or leaf, inner.init(zeros), params)
        fresh = iter(begin)

        def one(path: str, _: Any, leaf: jax.Array) -> jax.Array:
            start = next(fresh)
            return jnp.where(stays[path], leaf, start.astype(leaf.dtype)) if path in stays else leaf

        return map_params_state(one, inner_state, params)

    def update(
        updates: Any,
        state: DstState,
        params: Any = None,
        *,
        rewire: Cadence | None = None,
        **extra: Any,
    ) -> tuple[Any, DstState]:
        if params is None:
            raise ValueError("dst needs the parameters: call update(gradients, state, params)")
        if rewire is not None:
            _check_cadence(rewire, cadence, by_edit)
        check_plan(plan, params)
        count = state.count if rewire is not None else optax.safe_increment(state.count)
        old = {path: unpack(state.masks[path], leaf.shape) for path, leaf in plan.items()}
        flat = dict(leaves_with_paths(params))
        due = _due(count, cadence, never=drop is None or by_edit) if rewire is None else True
        if early_stop is not None and rewire is None and due is not False:
            # Once every layer has settled, no update is given up for nothing.
            due &= jnp.any(jnp.stack([jnp.any(x <= early_stop) for x in state.overlap.values()]))
        if not isinstance(due, bool):
            # Or else links may change before the gradients are there, at the peak of memory.
            due, updates = jax.lax.optimization_barrier((due, updates))
        gradients = None if rewire is not None else dict(leaves_with_paths(updates))
        if rewire is None:
            own = map_with_path(lambda path, g: _zero(path, old, g), updates)
            changes, inner_state = inner.update(own, state.inner, apply_masks(params, old), **extra)
        else:
            changes, inner_state = jax.tree.map(jnp.zeros_like, params), state.inner
        if skip_step and due is not False:
            # Leaf by leaf: a conditional around the whole step could not update the state in place.
            changes = jax.tree.map(lambda x: jnp.where(due, jnp.zeros_like(x), x), changes)
            inner_state = jax.tree.map(lambda x, y: jnp.where(due, x, y), state.inner, inner_state)
        step = {path: change for path, change in leaves_with_paths(changes) if path in plan}

        def value(path: str) -> jax.Array:
            """The weights after the step of the inner optimizer."""
            p, change = flat[path], step[path]
            if skip_step or rewire is not None:
                return _zero(path, old, p)
            wider = p.dtype if p.dtype.itemsize >= change.dtype.itemsize else change.dtype
            return _zero(path, old, (p.astype(wider) + change.astype(wider)).astype(p.dtype))

        def rewired() -> tuple[Masks, Masks]:
            # Unpacked once more: what the branch alone needs is made in the branch.
            now = {path: unpack(state.masks[path], leaf.shape) for path, leaf in plan.items()}
            w = {path: _wide(value(path)) for path in plan}
            g = None if gradients is None else {path: _wide(gradients[path]) for path in plan}
            own = jax.random.wrap_key_data(state.key, impl=impl)
            new, overlap = rewiring(now, w, g, count, own, state.overlap)
            return {path: pack(mask) for path, mask in new.items()}, overlap

        words, overlap = state.masks, state.overlap
        if due is True:
            words, overlap = rewired()
        elif due is not False:
            words, overlap = jax.lax.cond(due, rewired, lambda: (state.masks, state.overlap))
        stays, history, born = old, state.history, {}
        if due is not False:
            both = {path: words[path] & state.masks[path] for path in plan}
            stays = {path: unpack(both[path], leaf.shape) for path, leaf in plan.items()}
            if init_new == "history":
                history = {path: jnp.where(old[path] & due, value(path), history[path]) for path in plan}
                born = {path: unpack(words[path], leaf.shape) & ~old[path] for path, leaf in plan.items()}

        def settled(path: str, change: jax.Array, p: jax.Array) -> jax.Array:
            if path not in stays:
                return change
            # A difference of parameters needs their precision, whatever that of the gradients.
            dtype = p.dtype if p.dtype.itemsize >= change.dtype.itemsize else change.dtype
            p = p.astype(dtype)
            away = -p
            if path in born:
                away = jnp.where(born[path], history[path].astype(dtype) - p, away)
            return jnp.where(stays[path], change.astype(dtype), away)

        changes = map_with_path(settled, changes, params)
        inner_state = cleared(inner_state, stays, params)
        return changes, DstState(count, state.key, words, inner_state, history, overlap)

    return optax.GradientTransformationExtraArgs(init, update)


def planned(
    make: Callable[[Plan], optax.GradientTransformation], plan: Callable[[Any], Plan]
) -> optax.GradientTransformationExtraArgs:
    """A sparse optimizer whose plan is made from the parameters that it is given.

    For places where the parameters are not known yet, such as a configuration.

    Args:
      make: plan -> optimizer, such as `lambda plan: chts(optax.adam(1e-3), plan, key=key, end=750)`.
      plan: parameters -> plan, such as `functools.partial(uniform, sparsity=0.9)`; called at every trace.

    Returns:
      A transform with the state of what `make` makes.

    Example:
      >>> from odjax.sparse import links, static, uniform
      >>> optimizer = planned(lambda plan: static(optax.sgd(0.1), plan, key=jax.random.key(0)),
      ...                     lambda params: uniform(params, 0.75))
      >>> int(links(optimizer.init({"kernel": jnp.ones((8, 8))}).masks["kernel"]))
      16
    """

    def init(params: Any) -> Any:
        return make(plan(params)).init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "a planned optimizer needs the parameters: call update(gradients, state, params)"
            )
        return make(plan(params)).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _due(count: jax.Array, cadence: Cadence, *, never: bool) -> bool | jax.Array:
    """Whether an update changes links; a bool where that is known beforehand."""
    interval, start, end = cadence
    if never:
        return False
    if interval == 1 and start <= 1 and end is None:
        return True
    due = (count % interval == 0) & (count >= start)
    return due if end is None else due & (count <= end)


def _check_cadence(asked: Cadence, own: Cadence, by_edit: bool) -> None:
    if not by_edit:
        raise ValueError("a topology_edit needs an optimizer made with by_edit=True: it changes links twice")
    if asked != own:
        raise ValueError(
            f"a topology_edit every {asked.interval} updates from {asked.start} to {asked.end} is not its "
            f"optimizer's, every {own.interval} from {own.start} to {own.end}: give both the same numbers"
        )


def topology_edit(
    optimizer: optax.GradientTransformation,
    *,
    every: int,
    start: int = 0,
    end: int | None = None,
    trainable: Where = ".*",
    name: str = "topology",
) -> Edit:
    """The change of links of a sparse optimizer as an `Edit`, for loops that compile edits apart.

    Links change as by the optimizer itself with `skip_step=False` (up to the rounding of a fused step). It
    uses the optimizer's key, not the loop's.

    Args:
      optimizer: of `dst` or a method on it, made with `by_edit=True`; its state is what the loop carries.
      every: the optimizer's `interval`.
      start: the optimizer's `start`.
      end: the optimizer's `end`.
      trainable: the parameters that the optimizer was initialised with.
      name: of the edit.

    Returns:
      An `Edit`.

    Raises:
      ValueError: when it runs: an optimizer made without `by_edit`, or with other numbers; a state that is
        not that of a sparse method (one inside of a chain, for example).

    Example:
      >>> from odjax.sparse import links, set_, uniform
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> optimizer = set_(optax.sgd(0.1), uniform(params, 0.5), key=jax.random.key(0), by_edit=True)
      >>> edit = topology_edit(optimizer, every=100)
      >>> params, state = edit.apply(jax.random.key(0), jnp.int32(100), params, optimizer.init(params))
      >>> int(links(state.masks["kernel"]))
      32
    """
    cadence = Cadence(every, start, end)

    def apply(key: jax.Array, step: jax.Array, params: Any, opt_state: Any) -> tuple[Any, Any]:
        if not isinstance(opt_state, DstState):
            raise ValueError(
                f"edit {name!r} changes the links of an optimizer whose state is a DstState, got "
                f"{type(opt_state).__name__}: put the sparse method outermost, and chains inside of it"
            )
        free, frozen = partition(params, trainable)
        changes, opt_state = optimizer.update(free, opt_state, free, rewire=cadence)
        return combine(optax.apply_updates(free, changes), frozen), opt_state

    return Edit(apply, every, name, start, end)
