"""Edits: structural changes of the parameters every so many updates, outside the hot step.

The order of events, which a training loop and `as_transform` share: updates are numbered 1, 2, 3, ...; update
number `step` runs first, then every edit that is due at `step`, in the order given, each on what the one
before it left. An edit draws its randomness from `fold_step(fold_path(key, edit.name), step)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core.keys import check_key, fold_path, fold_step


@dataclass(frozen=True)
class Edit:
    """A structural change that happens every `every` updates.

    Attributes:
      apply: pure function `(key, step, params, opt_state) -> (params, opt_state)`; keeps structure, shapes
        and dtypes. `step` is an int32 scalar (traced).
      every: the cadence in updates, at least 1.
      name: tells the edits of one run apart; the key of the edit is folded with it.
      start: the first update number after which the edit may run; None for no limit.
      stop: the last update number after which the edit may run; None for no limit.

    Raises:
      ValueError: a cadence below 1, an empty name, or `stop` before `start`.
      TypeError: numbers that are not integers, or an `apply` that cannot be called.

    Example:
      >>> halve = Edit(lambda key, step, p, s: (jax.tree.map(lambda x: x / 2, p), s), every=10, name="halve")
      >>> [step for step in range(31) if halve.due(step)]
      [10, 20, 30]
    """

    apply: Callable[[jax.Array, jax.Array, Any, Any], tuple[Any, Any]]
    every: int
    name: str
    start: int | None = None
    stop: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.apply):
            raise TypeError(
                f"edit {self.name!r}: apply must be (key, step, params, opt_state) -> ..., {self.apply!r}"
            )
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"an edit needs a name such as 'shrink-perturb', got {self.name!r}")
        for field, low in (("every", 1), ("start", 0), ("stop", 0)):
            value = getattr(self, field)
            if value is None and field != "every":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"edit {self.name!r}: {field} must be an int (updates), got {value!r}")
            if value < low:
                raise ValueError(f"edit {self.name!r}: {field} must be at least {low}, got {value}")
        if self.start is not None and self.stop is not None and self.stop < self.start:
            raise ValueError(f"edit {self.name!r}: stop={self.stop} is before start={self.start}")

    def due(self, step: int | jax.Array) -> bool | jax.Array:
        """Whether the edit runs after update number `step`.

        Args:
          step: the number of the update that just ran, 1 for the first; a Python number or a traced int32.

        Returns:
          A bool for a Python number, a bool array otherwise. Never due at step 0, before any update.
        """
        due = (step > 0) & (step % self.every == 0)
        if self.start is not None:
            due &= step >= self.start
        if self.stop is not None:
            due &= step <= self.stop
        return due


def run_edit(
    edit: Edit, key: jax.Array, step: int | jax.Array, params: Any, opt_state: Any
) -> tuple[Any, Any]:
    """Runs an edit at a step, whether it is due or not, with the key that belongs to it.

    A training loop asks `edit.due(step)` on the host and calls a compiled version of this with donated
    buffers, so that steps without an edit pay nothing.

    Args:
      edit: the edit.
      key: the typed key of the run; folded with the edit's name and the step here.
      step: the number of the update that just ran.
      params: the parameters after that update.
      opt_state: the optimizer's state after that update.

    Returns:
      (params, opt_state) with the same structure, shapes and dtypes.

    Raises:
      ValueError: the edit changed the structure, a shape or a dtype.
    """
    own = fold_step(fold_path(key, edit.name), step)
    result = edit.apply(own, jnp.asarray(step).astype(jnp.int32), params, opt_state)
    for what, before, after in (("params", params, result[0]), ("opt_state", opt_state, result[1])):
        if jax.tree.structure(before) != jax.tree.structure(after):
            raise ValueError(f"edit {edit.name!r} changed the structure of {what}: an edit must keep it")
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
        ):
            if jnp.shape(old) != jnp.shape(new) or jnp.result_type(old) != jnp.result_type(new):
                place = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"edit {edit.name!r} changed {what} at {place!r} "
                    f"from {jnp.result_type(old)}{list(jnp.shape(old))}"
                    f" to {jnp.result_type(new)}{list(jnp.shape(new))}: an edit must keep shapes and dtypes"
                )
    return result


def check_edits(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Makes sure that edits can run together.

    Args:
      edits: the edits in the order in which they run.

    Returns:
      The edits as a tuple.

    Raises:
      ValueError: two edits have one name, and would draw the same randomness.
      TypeError: something that is no `Edit`.
    """
    names = set()
    for edit in edits:
        if not isinstance(edit, Edit):
            raise TypeError(f"edits must be Edit objects, got {edit!r}")
        if edit.name in names:
            raise ValueError(
                f"two edits are named {edit.name!r} and would share their randomness: rename one"
            )
        names.add(edit.name)
    return tuple(edits)


def run_edits(
    edits: Sequence[Edit], key: jax.Array, step: int | jax.Array, params: Any, opt_state: Any
) -> tuple[Any, Any]:
    """Runs those of several edits that are due at a step, one after the other.

    Args:
      edits: the edits in the order in which they run; their names differ.
      key: the typed key of the run.
      step: the number of the update that just ran. For a traced one, every edit becomes a `lax.cond`.
      params: the parameters after that update.
      opt_state: the optimizer's state after that update.

    Returns:
      (params, opt_state).

    Raises:
      ValueError: two edits have one name, or an edit changed a structure, a shape or a dtype.
    """
    carry = (params, opt_state)
    for edit in check_edits(edits):
        if isinstance(step, int | np.integer):
            carry = run_edit(edit, key, step, *carry) if edit.due(step) else carry
        else:

            def run(carry: tuple[Any, Any], edit: Edit = edit) -> tuple[Any, Any]:
                return run_edit(edit, key, step, *carry)

            carry = jax.lax.cond(edit.due(step), run, lambda carry: carry, carry)
    return carry


class EditState(NamedTuple):
    """State of `as_transform`: how many updates there were, and the inner optimizer's state."""

    count: jax.Array
    inner: Any


def as_transform(
    edit: Edit | Sequence[Edit], inner: optax.GradientTransformation, *, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that also runs edits, for training loops that know only `optax`.

    After the inner update number `count`, the edits that are due are run on `params + updates` and the inner
    state, exactly as in a loop that calls `run_edit` (same order, same keys). What is returned is the update
    that leads to the edited parameters, `p' - p`. Adding it again may round in the last place, `p + (p' - p)
    != p'`; where the edit writes a zero the result is exactly zero. A loop that calls edits itself has
    neither the rounding nor the `lax.cond` over the weights.

    It must be the last transform of a chain (what comes after would rescale the edit). In `optax.MultiSteps`
    and `optax.apply_if_finite` put it inside: `count` then counts the updates that were really made.

    Args:
      edit: one edit, or several that run in this order.
      inner: the optimizer.
      key: the typed key of the run.

    Returns:
      A transform whose state is `EditState(count, inner)`.

    Raises:
      TypeError: the key is not a typed one, or something is no `Edit`.
      ValueError: two edits have one name; `update` was called without parameters.

    Example:
      >>> zero = Edit(lambda key, step, p, s: (jax.tree.map(jnp.zeros_like, p), s), every=2, name="zero")
      >>> optimizer = as_transform(zero, optax.sgd(0.5), key=jax.random.key(0))
      >>> params = {"w": jnp.ones(2)}
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update({"w": jnp.ones(2)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"])
      [0.5 0.5]
      [0. 0.]
    """
    edits = check_edits([edit] if isinstance(edit, Edit) else list(edit))
    check_key(key)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> EditState:
        return EditState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(updates: Any, state: EditState, params: Any = None, **extra: Any) -> tuple[Any, EditState]:
        if params is None:
            raise ValueError("as_transform needs the parameters: call update(updates, state, params)")
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        count = optax.safe_increment(state.count)
        # A difference of parameters needs their precision, whatever that of the gradients.
        updates = jax.tree.map(
            lambda u, p: u.astype(p.dtype) if p.dtype.itemsize >= u.dtype.itemsize else u, updates, params
        )

        def boundary(updates: Any, inner_state: Any) -> tuple[Any, Any]:
            moved = jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), params, updates)
            edited, inner_state = run_edits(edits, key, count, moved, inner_state)
            change = jax.tree.map(
                lambda e, p, u: e.astype(u.dtype) - p.astype(u.dtype), edited, params, updates
            )
            return change, inner_state

        due = jnp.zeros([], bool)
        for one in edits:
            due |= one.due(count)
        updates, inner_state = jax.lax.cond(due, boundary, lambda *same: same, updates, inner_state)
        return updates, EditState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
