"""The engine of dynamic sparse training: an optimizer of sparse weights whose links move now and then.

What differs between methods is plugged in: `drop` scores the links that are there, `grow` those that are not.
A score is a function `(key, w, mask, g, step) -> scores` of the shape of the leaf, where w are the weights
(0 where there is no link), mask the links (for `grow`: those that stay), g the gradient of the loss for all
weights, the absent ones too, and step the number of the update. w and g are float32 (float64 for float64
leaves). The largest scores stay, and grow. A random rule draws within the score: the k largest of log-weights
plus Gumbel noise are a draw without replacement. A leaf of stacked layers comes whole, with its leading axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core.keys import check_key, fold_path, fold_step
from odjax.core.optimizer_state import map_params_state
from odjax.core.paths import leaves_with_paths, map_with_path
from odjax.sparse.masks import NM, add_links, links, pack, packed_shape, top_links, unit, unpack
from odjax.sparse.plans import LeafPlan, Plan, check_plan, overall_density, target_links
from odjax.sparse.removal import keep_count
from odjax.sparse.schedules import Schedule

Score = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Masks = dict[str, jax.Array]
Initial = Callable[[jax.Array, LeafPlan, int | jax.Array], jax.Array]


class DstState(NamedTuple):
    """State of `dst`.

    Attributes:
      count: int32 [], updates so far.
      key: uint32, the data of the key.
      masks: {path: packed mask}, see `odjax.sparse.masks.pack`.
      inner: state of the inner optimizer.
      history: {path: last value of every link while it was there}; () without init_new="history".
    """

    count: jax.Array
    key: jax.Array
    masks: Masks
    inner: Any
    history: Any = ()


def random_mask(key: jax.Array, leaf: LeafPlan, count: int | jax.Array) -> jax.Array:
    """Links drawn uniformly, as the structure allows.

    Args:
      key: a typed key.
      leaf: what is planned.
      count: links of each slice.

    Returns:
      bool mask of the leaf's shape.
    """
    return top_links(jax.random.bits(key, leaf.shape), count, leaf.structure, batch_dims=leaf.batch_dims)


def apply_masks(params: Any, masks: Masks) -> Any:
    """Parameters with zeros where there is no link, as `dst` has them after its first update.

    Call it once on fresh parameters, so that the first gradient too is that of the sparse model.

    Args:
      params: the parameters.
      masks: {path: packed mask}, `DstState.masks`, or {path: bool mask}.

    Returns:
      The parameters.

    Example:
      >>> apply_masks({"w": jnp.ones(3)}, {"w": jnp.array([True, False, True])})
      {'w': Array([1., 0., 1.], dtype=float32)}
    """

    def one(path: str, x: jax.Array) -> jax.Array:
        if path not in masks:
            return x
        mask = masks[path] if masks[path].dtype == jnp.bool_ else unpack(masks[path], x.shape)
        return jnp.where(mask, x, jnp.zeros_like(x))

    return map_with_path(one, params)


def check_masks(masks: Masks, plan: Plan, *, exact: bool = True) -> None:
    """Makes sure that masks, such as restored ones, are those of a plan.

    Args:
      masks: {path: packed mask}.
      plan: path -> `LeafPlan`.
      exact: also compare the numbers of links (not where a density schedule has not come to its end).

    Raises:
      ValueError: other paths, shapes or numbers of links.
    """
    for path in sorted({*masks, *plan}):
        if path not in plan or path not in masks:
            has, lacks = ("masks", "plan") if path in masks else ("plan", "masks")
            raise ValueError(f"the {has} have {path!r} and the {lacks} do not: restore with the same plan")
        leaf = plan[path]
        if masks[path].shape != packed_shape(leaf.shape):
            raise ValueError(
                f"the mask of {path!r} has words of shape {masks[path].shape}, a leaf of shape {leaf.shape} "
                f"needs {packed_shape(leaf.shape)}"
            )
        found = np.asarray(links(unpack(masks[path], leaf.shape), batch_dims=leaf.batch_dims))
        if exact and (found != leaf.links).any():
            raise ValueError(
                f"the mask of {path!r} has {found.tolist()} links, the plan {leaf.links}: it was made with "
                "another plan"
            )


def _check_initial(masks: Any, plan: Plan, exact: bool) -> None:
    if masks is None or callable(masks):
        return
    for path in sorted({*masks, *plan}):
        if path not in plan or path not in masks:
            where = "which are not in the plan" if path in masks else "which masks= lacks"
            raise ValueError(f"masks= must have the paths of the plan; look at {path!r}, {where}")
        mask, leaf = masks[path], plan[path]
        if mask.dtype != jnp.bool_ or mask.shape != leaf.shape:
            raise ValueError(
                f"the mask of {path!r} must be bool{list(leaf.shape)}, got {mask.dtype}{list(mask.shape)}"
            )
        if exact and not isinstance(mask, jax.core.Tracer):
            found = np.asarray(mask).sum(axis=tuple(range(leaf.batch_dims, mask.ndim)))
            if (found != leaf.links).any():
                raise ValueError(
                    f"the mask of {path!r} has {found.tolist()} links, the plan {leaf.links}: "
                    "give every slice the number that was planned"
                )


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
    zeta: float | jax.Array | Schedule = 0.3,
    density: float | jax.Array | Schedule | None = None,
    interval: int = 100,
    start: int = 0,
    end: int | None = None,
    skip_step: bool = True,
    percolate: Callable[[Masks], Masks] | None = None,
    init_new: Literal["zero", "history"] = "zero",
    masks: Mapping[str, jax.Array] | Initial | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains sparse weights with any optimizer, and moves a share of their links every `interval` updates.

    Updates are numbered 1, 2, 3, ... An ordinary one is that of the inner optimizer, which sees the gradient
    of the links only. Update number `step`, a multiple of `interval` in [start, end], changes links instead
    (or after, with `skip_step=False`), each leaf by itself:

        keep = the E - floor(zeta E) links with the largest drop scores, E = min(links now, target)
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
      drop: score of links, see the module. None: links never change.
      grow: score of absent links. None: links are only dropped, to follow the density.
      zeta: share of links that an update replaces, between 0 and 1; a number or a schedule.
      density: of all sparse leaves together, a number or a schedule; None stays at the plan's. Leaves follow
        it in proportion (`target_links`), never below the plan. The last update that changes links (the last
        multiple of `interval` up to `end`) goes to the plan whatever the schedule says.
      interval: updates between two changes.
      start: the first update that may change links.
      end: the last one; None for no limit.
      skip_step: the update that changes links takes no optimizer step (the inner count stays, too).
      percolate: {path: bool mask} -> the same with fewer links; after the drop, before the growth.
      init_new: a new link starts at "zero", or from "history", its last value while it was there (one more
        copy of the sparse leaves).
      masks: the links at the start: {path: bool mask}, or `(key, leaf plan, count) -> mask`; None draws them
        uniformly.

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
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> size = lambda key, w, mask, g, step: jnp.abs(w)
      >>> slope = lambda key, w, mask, g, step: jnp.abs(g)
      >>> optimizer = dst(optax.sgd(0.1), {"kernel": LeafPlan((8, 8), 16)}, key=jax.random.key(0),
      ...                 drop=size, grow=slope, interval=2)
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
    if interval == 1 and skip_step and drop is not None:
        raise ValueError("interval=1 with skip_step=True never takes a step: pass skip_step=False")
    if drop is None and grow is not None:
        raise ValueError("grow without drop never changes a link: give drop a score, such as the magnitude")
    if percolate is not None and any(leaf.structure is not None for leaf in plan.values()):
        raise ValueError("percolate breaks groups and blocks: use it with unstructured plans only")
    if init_new not in ("zero", "history"):
        raise ValueError(f"init_new must be 'zero' or 'history', got {init_new!r}")
    for name, value in (("zeta", zeta), ("density", density)):
        if isinstance(value, int | float) and not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    _check_initial(masks, plan, exact=density is None)
    inner = optax.with_extra_args_support(inner)
    impl = jax.random.key_impl(key)
    planned = overall_density(plan)
    initial = random_mask if masks is None else masks

    def target(leaf: LeafPlan, step: int | jax.Array) -> int | jax.Array:
        if density is None:
            return leaf.links
        wanted = density(step) if callable(density) else density
        count = target_links(leaf, wanted, planned)
        return count if last is None else jnp.where(step >= last, jnp.int32(leaf.links), count)

    def init(params: Any) -> DstState:
        check_plan(plan, params)
        words = {}
        for path, leaf in plan.items():
            if callable(initial):
                own = fold_path(fold_step(key, 0), path)
                words[path] = pack(initial(own, leaf, target(leaf, 0)))
            else:
                words[path] = pack(initial[path])
        now = apply_masks(params, words)
        shapes = dict(leaves_with_paths(params))
        history = {p: jnp.zeros_like(shapes[p]) for p in plan} if init_new == "history" else ()
        count = jnp.zeros([], jnp.int32)
        return DstState(count, jax.random.key_data(key), words, inner.init(now), history)

    def score(
        fn: Score, path: str, key: jax.Array, w: jax.Array, mask: jax.Array, g: jax.Array, step: jax.Array
    ) -> jax.Array:
        scores = fn(key, w, mask, g, step)
        if scores.shape != mask.shape:
            raise ValueError(f"a score of {path!r} has shape {scores.shape}, the leaf {mask.shape}")
        return scores

    def rewire(old: Masks, w: Masks, g: Masks, step: jax.Array, key: jax.Array) -> Masks:
        own = {path: fold_path(fold_step(key, step), path) for path in plan}
        kept, goal = {}, {}
        for path, leaf in plan.items():
            options = {"batch_dims": leaf.batch_dims}
            mask, goal[path] = old[path], target(leaf, step)
            scores = score(drop, path, jax.random.fold_in(own[path], 0), w[path], mask, g[path], step)
            now = goal[path]
            if density is not None:
                now = jnp.minimum(links(mask, **options), now)
            if isinstance(leaf.structure, NM) and density is not None:
                mask = top_links(scores, now, leaf.structure, eligible=mask, **options)
            share = zeta(step) if callable(zeta) else zeta
            dropped = 0 if grow is None else now - keep_count(now, share)
            drops = None if isinstance(leaf.structure, NM) else leaf.structure
            size = unit(drops, leaf.shape[leaf.batch_dims :])
            keep = now - dropped // size * size
            kept[path] = top_links(scores, keep, drops, eligible=mask, **options)
        if percolate is not None:
            kept = percolate(kept)
        if grow is None:
            return kept
        new = {}
        for path, leaf in plan.items():
            key = jax.random.fold_in(own[path], 1)
            live = jnp.where(kept[path], w[path], jnp.zeros_like(w[path]))
            scores = score(grow, path, key, live, kept[path], g[path], step)
            new[path] = add_links(kept[path], scores, goal[path], leaf.structure, batch_dims=leaf.batch_dims)
        return new

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

    def update(updates: Any, state: DstState, params: Any = None, **extra: Any) -> tuple[Any, DstState]:
        if params is None:
            raise ValueError("dst needs the parameters: call update(gradients, state, params)")
        check_plan(plan, params)
        count = optax.safe_increment(state.count)
        old = {path: unpack(state.masks[path], leaf.shape) for path, leaf in plan.items()}
        flat, gradients = dict(leaves_with_paths(params)), dict(leaves_with_paths(updates))

        def inner_step() -> tuple[Any, Any]:
            own = map_with_path(lambda path, g: _zero(path, old, g), updates)
            return inner.update(own, state.inner, apply_masks(params, old), **extra)

        def settled(changes: Any, stays: Masks, born: Masks, history: Any) -> Any:
            def one(path: str, change: jax.Array, p: jax.Array) -> jax.Array:
                if path not in stays:
                    return change
                # A difference of parameters needs their precision, whatever that of the gradients.
                dtype = p.dtype if p.dtype.itemsize >= change.dtype.itemsize else change.dtype
                p = p.astype(dtype)
                away = -p
                if path in born:
                    away = jnp.where(born[path], history[path].astype(dtype) - p, away)
                return jnp.where(stays[path], change.astype(dtype), away)

            return map_with_path(one, changes, params)

        def ordinary() -> tuple[Any, Masks, Any, Any]:
            changes, inner_state = inner_step()
            changes = settled(changes, old, {}, ())
            return changes, state.masks, cleared(inner_state, old, params), state.history

        def topology() -> tuple[Any, Masks, Any, Any]:
            if skip_step:
                like = jax.eval_shape(ordinary)[0]
                changes, inner_state = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), like), state.inner
            else:
                changes, inner_state = inner_step()
            moved = {}
            for path, change in leaves_with_paths(changes):
                if path in plan:
                    p = flat[path]
                    wider = p.dtype if p.dtype.itemsize >= change.dtype.itemsize else change.dtype
                    value = (p.astype(wider) + change.astype(wider)).astype(p.dtype)
                    moved[path] = _zero(path, old, value)
            w = {path: _wide(moved[path]) for path in plan}
            g = {path: _wide(gradients[path]) for path in plan}
            new = rewire(old, w, g, count, jax.random.wrap_key_data(state.key, impl=impl))
            stays = {path: new[path] & old[path] for path in plan}
            history, born = state.history, {}
            if init_new == "history":
                history = {path: jnp.where(old[path], moved[path], history[path]) for path in plan}
                born = {path: new[path] & ~old[path] for path in plan}
            changes = settled(changes, stays, born, history)
            words = {path: pack(mask) for path, mask in new.items()}
            return changes, words, cleared(inner_state, stays, params), history

        if drop is None:
            result = ordinary()
        elif interval == 1 and start <= 1 and end is None:
            result = topology()
        else:
            due = (count % interval == 0) & (count >= start)
            if end is not None:
                due &= count <= end
            result = jax.lax.cond(due, topology, ordinary)
        changes, words, inner_state, history = result
        return changes, DstState(count, state.key, words, inner_state, history)

    return optax.GradientTransformationExtraArgs(init, update)
