"""Reaching the parameter-shaped pieces (moments) of any optax state.

The pieces are found by structure: a subtree of the state with the structure of the parameters, in which
`optax.MaskedNode`, None or a whole masked subtree may stand for leaves that another optimizer has. That
covers chains, masked and labelled optimizers, `MultiSteps` and `inject_hyperparams`, without the optimizer
itself at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from odjax.core.paths import Where, is_box, map_with_path, select

# Their parameter-shaped pieces do not start at zero.
_NOT_ZERO_AT_INIT = (
    optax.ScaleByRpropState,
    optax.ScaleByRssState,
    optax.SnapshotState,
    contrib.ScheduleFreeState,
    contrib.DAdaptAdamWState,
    contrib.ProdigyState,
)


def _children(node: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(node, is_leaf=lambda x: x is not node)


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _is_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node])


def _resembles(node: Any, params: Any) -> int:
    """How many leaves of `params` are in `node`; -1 where the structures differ."""
    if _is_hole(node):
        return 0
    if _is_leaf(params) or _is_leaf(node):
        return 1 if _is_leaf(params) and _is_leaf(node) else -1
    children, structure = _children(node)
    wanted, expected = _children(params)
    if structure != expected and not (is_box(node) and is_box(params)):
        return -1
    total = 0
    for child, want in zip(children, wanted, strict=True):
        found = _resembles(child, want)
        if found < 0:
            return -1
        total += found
    return total


def _is_piece(node: Any, params: Any) -> bool:
    if not _is_leaf(params):
        return _resembles(node, params) > 0
    return _is_leaf(node) and np.shape(node) == np.shape(params) and _inexact(node) == _inexact(params)


def _inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _spread(fn: Callable[[Any, Any, Any], Any], node: Any, params: Any, tags: Any) -> Any:
    """Maps fn(tag, param, leaf) over the leaves that `node` shares with `params`."""
    if _is_hole(node):
        return node
    if _is_leaf(params):
        return fn(tags, params, node)
    children, structure = _children(node)
    triples = zip(children, _children(params)[0], _children(tags)[0], strict=True)
    return structure.unflatten([_spread(fn, child, want, tag) for child, want, tag in triples])


def _check_params(params: Any) -> None:
    if not jax.tree.leaves(params):
        raise ValueError("params has no leaves")
    if _is_leaf(params) and np.shape(params) == ():
        raise ValueError(
            "params is a single scalar, which cannot be told from a count or a learning rate: "
            'put it into a dict, {"w": scalar}'
        )


def map_params_state(fn: Callable[[str, Any, Any], Any], opt_state: Any, params: Any) -> Any:
    """Maps a function over every parameter-shaped leaf of an optimizer's state.

    Leaves of a parameter-like piece that have another shape than their parameter (the factored moments of
    adafactor) and everything else (counts, hyperparameters, schedules) are left alone.

    Args:
      fn: `fn(path, param, leaf) -> leaf` with the path of the parameter; must keep shape and dtype.
      opt_state: any optax state: of `chain`, `masked`, `multi_transform`, `MultiSteps`, `inject_hyperparams`,
        of Adam, momentum, Lion, Muon, adafactor, `odjax.core.edits.as_transform`, ...
      params: the parameters that the optimizer was initialised with (arrays or `jax.ShapeDtypeStruct`).

    Returns:
      The state, with the same structure.

    Raises:
      ValueError: `params` is empty or a lone scalar, or `fn` changed a shape or a dtype (the path is named).

    Example:
      >>> params = {"w": jnp.ones(2), "b": jnp.ones(1)}
      >>> state = optax.adam(1e-3).init(params)
      >>> fill = lambda path, param, leaf: jnp.full_like(leaf, 7) if path == "w" else leaf
      >>> state = map_params_state(fill, state, params)
      >>> state[0].mu["w"], state[0].mu["b"], state[0].count
      (Array([7., 7.], dtype=float32), Array([0.], dtype=float32), Array(0, dtype=int32))
    """
    _check_params(params)

    def checked(path: str, param: Any, leaf: Any) -> Any:
        if np.shape(param) != np.shape(leaf):
            return leaf
        new = fn(path, param, leaf)
        if np.shape(new) != np.shape(leaf) or jnp.result_type(new) != jnp.result_type(leaf):
            raise ValueError(
                f"the state of {path!r} was {jnp.result_type(leaf)}{list(np.shape(leaf))} and became "
                f"{jnp.result_type(new)}{list(np.shape(new))}: the function must keep shape and dtype"
            )
        return new

    tags = map_with_path(lambda path, _: path, params)

    def walk(node: Any) -> Any:
        if _is_hole(node):
            return node
        if _is_piece(node, params):
            return _spread(checked, node, params, tags)
        if _is_leaf(node):
            return node
        children, structure = _children(node)
        return structure.unflatten([walk(child) for child in children])

    return walk(opt_state)


def _held(node: Any, params: Any, selected: Any) -> list[bool]:
    hits: list[bool] = []
    _spread(lambda hit, _, leaf: hits.append(hit) or leaf, node, params, selected)
    return hits


def reset_moments(
    opt_state: Any,
    params: Any,
    where: Where = ".*",
    *,
    counts: bool = True,
    init: Callable[[Any], Any] | None = None,
) -> Any:
    """Sets the moments of the selected parameters to what they were at the start.

    The count of steps for the bias correction of a moment goes back to 0 with it when every leaf that this
    optimizer holds is selected (a zero second moment with a large count would make the next Adam step about
    (1 - b1) / sqrt(1 - b2) = 3.2 learning rates long). Schedules keep their own counts and go on.

    Args:
      opt_state: any optax state, see `map_params_state`.
      params: the parameters that the optimizer was initialised with.
      where: which parameters, as in `odjax.core.paths.select`.
      counts: reset the counts beside the moments too, where all moments of that state are reset.
      init: `optimizer.init`; needed where the state at the start is not zero (Adagrad, Rprop, schedule-free,
        ...). Without it the moments become zero.

    Returns:
      The state, with the same structure, shapes and dtypes.

    Raises:
      ValueError: nothing is selected, or the state does not start at zero and `init` was not given.

    Example:
      >>> params = {"w": jnp.ones(2)}
      >>> optimizer = optax.sgd(0.1, momentum=0.9)
      >>> _, state = optimizer.update({"w": jnp.ones(2)}, optimizer.init(params), params)
      >>> reset_moments(state, params)[0].trace["w"]
      Array([0., 0.], dtype=float32)
    """
    _check_params(params)
    selected = select(params, where)
    fresh = None if init is None else init(params)

    def walk(node: Any, start: Any) -> Any:
        if _is_hole(node) or _is_leaf(node):
            return node
        if init is None and isinstance(node, _NOT_ZERO_AT_INIT):
            raise ValueError(
                f"{type(node).__name__} does not start at zero: pass init=optimizer.init to reset it rightly"
            )
        children, structure = _children(node)
        starts = children if start is None else _children(start)[0]
        names = getattr(node, "_fields", ()) if isinstance(node, tuple) else ()
        results: list[Any] = []
        held: list[bool] = []
        for child, begin in zip(children, starts, strict=True):
            if _is_piece(child, params):
                held += _held(child, params, selected)
                results.append(_reset_piece(child, None if start is None else begin, params, selected))
            else:
                results.append(walk(child, None if start is None else begin))
        if counts and held and all(held) and "count" in names:
            at = names.index("count")
            # An empty field takes no place among the children, so look the count up by identity.
            place = next((i for i, child in enumerate(children) if child is node[at]), None)
            if place is not None:
                results[place] = jnp.zeros_like(children[place])
        return structure.unflatten(results)

    if _is_piece(opt_state, params):
        return _reset_piece(opt_state, fresh, params, selected)
    return walk(opt_state, fresh)


def _reset_piece(piece: Any, start: Any, params: Any, selected: Any) -> Any:
    starts = piece if start is None else start
    flat = iter(jax.tree.leaves(starts))

    def reset(hit: bool, param: Any, leaf: Any) -> Any:
        begin = next(flat)
        if not hit or np.shape(leaf) != np.shape(param):
            return leaf
        return jnp.zeros_like(leaf) if start is None else jnp.asarray(begin, leaf.dtype)

    return _spread(reset, piece, params, selected)
