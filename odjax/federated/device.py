"""The rows of a plan on one device: states of lanes, their steps, and what becomes of a client that ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from odjax.core import Statistic, fold_path
from odjax.federated.aggregate import Aggregator, Mask
from odjax.federated.clients import RoundPlan
from odjax.federated.local import Figures, LocalStep, Shared

Data = Mapping[str, jax.Array]


class Carry(NamedTuple):
    """What goes from row to row: states of the clients that run, sums, what clients keep."""

    state: Any
    total: Any
    private: Any
    figures: Figures


class _Row(NamedTuple):
    """One row of a plan, on one device."""

    slot: jax.Array
    step: jax.Array
    first: jax.Array
    last: jax.Array
    active: jax.Array
    index: jax.Array
    mask: jax.Array


class Device(NamedTuple):
    """The part of one device in a cohort's training.

    Attributes:
      local: what a client does.
      aggregator: how deltas are summed.
      axes: mesh axes that are mapped by hand.
    """

    local: LocalStep
    aggregator: Aggregator
    axes: tuple[str, ...]

    def varying(self, tree: Any) -> Any:
        """The tree, marked as different on every device, whatever of it is so already.

        What a loop carries must be marked alike before and after, and gradients of what is marked are not
        summed over devices.
        """
        if not self.axes:
            return tree
        own = jax.lax.pcast(jnp.asarray(True), self.axes, to="varying")
        return jax.tree.map(lambda x: jnp.where(own, x, x), tree)

    def begin(
        self, shared: Shared, private: Any, data: Data, plan: RoundPlan, key: jax.Array, mask: Mask
    ) -> tuple[Shared, Data, jax.Array, Mask, Carry]:
        """Inputs as the rows need them, and the first carry."""
        shared, data, key, mask, private = self.varying((shared, data, key, mask, private))
        lanes = plan.client.shape[0]
        row = self._read(0, plan)
        state = self._began(shared, private, row, lanes)
        _, figures = jax.eval_shape(lambda: self._stepped(state, shared, data, plan, key, row))
        delta, _, lifted = jax.eval_shape(lambda: self._finished(state, shared, mask, lanes))
        _check_delta(delta)
        if set(figures) & set(lifted):
            raise ValueError(
                f"figures of the loss and of the aggregator have the same names: {sorted(lifted)}"
            )
        total = self._statistic(delta, plan).zero()
        zero = jnp.zeros((), jnp.float32)
        sums = {} if self.aggregator.private else dict.fromkeys((*figures, *lifted), (zero, zero))
        carry = self.varying(Carry(state, total, private, sums))
        return shared, data, key, mask, carry

    def row(
        self,
        at: jax.Array,
        carry: Carry,
        shared: Shared,
        data: Data,
        plan: RoundPlan,
        key: jax.Array,
        mask: Mask,
    ) -> Carry:
        """One step of every lane."""
        lanes = plan.client.shape[0]
        row = self._read(at, plan)
        lane = jnp.arange(lanes, dtype=jnp.int32)

        def started(state: Any) -> Any:
            new = self._began(shared, carry.private, row, lanes)
            return self.varying(new) if lanes == 1 else _where(row.first, new, state)

        state = jax.lax.cond(jnp.any(row.first), started, lambda state: state, carry.state)
        # A lane without a step takes one, too: nothing of it is kept, and its next client begins anew.
        state, figures = self._stepped(state, shared, data, plan, key, row)
        state = self.varying(state)
        sums = carry.figures
        if not self.aggregator.private:
            sums = _added(sums, figures, row.active)

        def accumulated(parts: tuple[Any, Any, Figures]) -> tuple[Any, Any, Figures]:
            total, private, sums = parts
            delta, kept, lifted = self._finished(state, shared, mask, lanes)
            total = self._observed(total, delta, plan, row, key)
            place = jnp.where(row.last, row.slot, plan.client.shape[1])
            by_lane = add_axis(kept) if lanes == 1 else kept
            private = jax.tree.map(
                lambda x, new: x.at[lane, place].set(new.astype(x.dtype), mode="drop"), private, by_lane
            )
            if not self.aggregator.private:
                sums = _added(sums, lifted, row.last)
            return total, private, sums

        total, private, sums = jax.lax.cond(
            jnp.any(row.last), accumulated, lambda parts: parts, (carry.total, carry.private, sums)
        )
        return Carry(state, total, private, sums)

    def end(self, carry: Carry) -> tuple[Any, Any, Figures]:
        """The sums over all devices, and what the clients of this one keep."""
        sums = (carry.total, carry.figures)
        if self.axes:
            sums = jax.lax.psum(sums, self.axes)
        return sums[0], carry.private, sums[1]

    # With more than one lane a state and all that comes of it have a leading axis of lanes. A single lane has
    # none: the compiler would copy the parameters in every row to add it.

    def _lanes(self, function: Callable[..., Any], lanes: int) -> Callable[..., Any]:
        """The function on each lane."""
        return function if lanes == 1 else jax.vmap(function, axis_size=lanes)

    def _began(self, shared: Shared, private: Any, row: _Row, lanes: int) -> Any:
        """States of the clients of a row at their first step."""
        kept = jax.tree.map(lambda x: x[jnp.arange(lanes, dtype=jnp.int32), row.slot], private)
        kept = drop_axis(kept) if lanes == 1 else kept
        return self._lanes(lambda own: self.local.init(shared, own), lanes)(kept)

    def _read(self, at: int | jax.Array, plan: RoundPlan) -> _Row:
        lanes = plan.lanes
        taken = (lanes.slot, lanes.step, lanes.first, lanes.last, lanes.active, plan.index, plan.mask)
        return _Row(*_at(jax.tree.map(jnp.asarray, taken), at))

    def _stepped(
        self, state: Any, shared: Shared, data: Data, plan: RoundPlan, key: jax.Array, row: _Row
    ) -> tuple[Any, Figures]:
        lanes = plan.client.shape[0]
        batch = jax.tree.map(lambda x: jnp.take(x, row.index, axis=0), dict(data))
        keys = self._keys(key, plan, row)

        def step(state: Any, batch: Data, mask: jax.Array, key: jax.Array) -> tuple[Any, Figures]:
            return self.local.step(state, shared, batch, mask, key)

        inputs = (batch, row.mask, keys)
        return self._lanes(step, lanes)(state, *(drop_axis(inputs) if lanes == 1 else inputs))

    def _keys(self, key: jax.Array, plan: RoundPlan, row: _Row) -> jax.Array:
        client = jnp.asarray(plan.client)[jnp.arange(plan.client.shape[0], dtype=jnp.int32), row.slot]
        own = jax.random.fold_in(key, plan.round)
        return jax.vmap(lambda client, step: jax.random.fold_in(jax.random.fold_in(own, client), step))(
            client, row.step
        )

    def _finished(self, state: Any, shared: Shared, mask: Mask, lanes: int) -> tuple[Any, Any, Figures]:
        def final(state: Any) -> tuple[Any, Any, Figures]:
            delta, private = self.local.final(state, shared)
            lifted, figures = self.aggregator.lift(delta, mask)
            return lifted, private, figures

        return self._lanes(final, lanes)(state)

    def _statistic(self, deltas: Any, plan: RoundPlan) -> Statistic:
        lead = 0 if plan.client.shape[0] == 1 else 1
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[lead:], x.dtype), deltas)
        return self.aggregator.statistic(one, plan.cohort.size)

    def _observed(self, total: Any, deltas: Any, plan: RoundPlan, row: _Row, key: jax.Array) -> Any:
        """The sum with the clients that have just ended."""
        statistic = self._statistic(deltas, plan)
        lanes = jnp.arange(plan.client.shape[0], dtype=jnp.int32)
        weight = jnp.where(row.last, jnp.asarray(plan.weight)[lanes, row.slot], 0.0)
        if self.aggregator.uniform:
            weight = (weight != 0).astype(jnp.float32)
        position = jnp.asarray(plan.lanes.member)[lanes, row.slot]
        # Not the keys of the steps, from which a loss draws.
        keys = self._keys(fold_path(key, "observe"), plan, row)

        def observed(total: Any, delta: Any, weight: jax.Array, position: jax.Array, key: jax.Array) -> Any:
            # Without weight a delta may be anything (a client in the middle of its steps), also no number.
            delta = jax.tree.map(lambda x: jnp.where(weight != 0, x, jnp.zeros_like(x)), delta)
            return statistic.observe(total, delta, weight, position, key)

        if len(lanes) == 1:
            return observed(total, deltas, *drop_axis((weight, position, keys)))
        clients = (deltas, weight, position, keys)
        if self.aggregator.one_by_one:
            return jax.lax.fori_loop(
                0, len(lanes), lambda at, total: observed(total, *_at(clients, at)), total
            )
        zero = self.varying(statistic.zero())
        found = jax.vmap(lambda *own: observed(zero, *own))(*clients)
        return statistic.combine(total, jax.tree.map(_over_lanes, found))


def _where(which: jax.Array, new: Any, old: Any) -> Any:
    """By lane: new where `which`, old elsewhere."""

    def chosen(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(which, tuple(range(1, a.ndim))), a, b)

    return jax.tree.map(chosen, new, old)


def _added(sums: Figures, figures: Figures, which: jax.Array) -> Figures:
    """The sums with the figures [lanes] of those lanes."""
    new = {
        name: tuple(jnp.sum(jnp.where(which, part.astype(jnp.float32), 0.0)) for part in pair)
        for name, pair in figures.items()
    }
    return {
        name: (total + new[name][0], count + new[name][1]) if name in new else (total, count)
        for name, (total, count) in sums.items()
    }


def _check_delta(delta: Any) -> None:
    for leaf in jax.tree.leaves(delta):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"a delta must be of floating numbers, one of its leaves is {leaf.dtype}")


def add_axis(tree: Any) -> Any:
    """A leading axis of one.

    Args:
      tree: of arrays.

    Returns:
      The tree of [1, ...].
    """
    return jax.tree.map(lambda x: x[None], tree)


def drop_axis(tree: Any) -> Any:
    """Without the leading axis of one.

    Args:
      tree: of [1, ...].

    Returns:
      The tree of arrays.
    """
    return jax.tree.map(lambda x: x[0], tree)


def _at(tree: Any, at: int | jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), tree)


def _over_lanes(x: jax.Array) -> jax.Array:
    """The sum over the leading axis. XLA's own takes four times a whole step on CPUs; a product does not."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.sum(x, axis=0, dtype=x.dtype)
    return jnp.tensordot(jnp.ones(x.shape[:1], x.dtype), x, 1, precision=jax.lax.Precision.HIGHEST)
