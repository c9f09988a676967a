"""The cohort's local training in one program: a loop over rows of lanes, then one sum over devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from odjax.core import Statistic, check_key, fold_path
from odjax.federated.aggregate import Aggregator, Mask
from odjax.federated.clients import RoundPlan
from odjax.federated.local import Figures, LocalStep, Shared
from odjax.federated.packing import LanePlan

Data = Mapping[str, jax.Array]


class CohortResult(NamedTuple):
    """What a cohort's training comes to.

    Attributes:
      total: the aggregator's state, summed over all clients and devices.
      private: [lanes, slots, ...], what each client keeps, in the places of `RoundPlan.client`.
      figures: name -> (sum, count) over all local steps and clients; empty where they are private.
    """

    total: Any
    private: Any
    figures: Figures


class _Carry(NamedTuple):
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


def simulate_cohort(
    local: LocalStep,
    aggregator: Aggregator,
    *,
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = "clients",
    rows: str = "compiled",
    local_data: bool = False,
) -> Callable[..., CohortResult]:
    """A function that trains a cohort and sums up its deltas.

    The plan decides how clients are packed (`odjax.federated.plan_round`); the result does not depend on it
    but for the order of a sum. The key of a client's step is folded from the round, the client's id and the
    number of the step.

    Args:
      local: what a client does.
      aggregator: how deltas are summed.
      mesh: its `axis` holds the lanes; None for one device. Other axes of the mesh stay automatic, so that a
        model may be sharded over them.
      axis: mesh axis, or axes, of the lanes.
      rows: "compiled" for a loop inside the program; "called" for a loop in Python that calls a compiled row,
        which is faster where a compiled loop is slow (convolutions on CPUs) and cannot be inside `jax.jit`.
      local_data: every device has examples of its own, in the order of the lanes: `data` has the leading axis
        of devices times examples, and the plan's indices count from the device's first one. Otherwise every
        device holds all examples.

    Returns:
      `(shared, private, data, plan, key, mask=None) -> CohortResult`, compiled, also where it is called
      outside `jax.jit`. `private` has leading axes [lanes, slots] and may be None; `mask` is a tree of zeros
      and ones like the delta. In the compiled program devices exchange one sum, whatever the number of rows.

    Raises:
      ValueError: `rows` is neither; lanes that the mesh axis does not divide; weights that are not 0 or 1 for
        an aggregator that allows no others; a plan of more examples than `data` has; a delta with leaves that
        are not floating.

    Source: Granqvist et al. 2024, "pfl-research", section 3 (the parts of a round).
    """
    if rows not in ("compiled", "called"):
        raise ValueError(f"rows must be 'compiled' or 'called', got {rows!r}")
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if mesh is not None and (missing := set(axes) - set(mesh.axis_names)):
        raise ValueError(f"the mesh has no axis {sorted(missing)}, it has {', '.join(mesh.axis_names)}")
    if mesh is not None and all(mesh.shape[name] == 1 for name in axes):
        mesh = None  # there is nothing to map by hand, and the partitioner refuses a sum over one part
    device = _Device(local, aggregator, axes if mesh is not None else ())

    def check(private: Any, data: Data, plan: RoundPlan, key: jax.Array) -> None:
        check_key(key)
        lanes = plan.lanes.member.shape[0]
        parts = 1
        for name in axes if mesh is not None else ():
            parts *= mesh.shape[name]
        if lanes % parts:
            raise ValueError(f"{lanes} lanes do not divide by the {parts} devices of the mesh axes {axes}")
        for leaf in jax.tree.leaves(private):
            if leaf.shape[:2] != plan.client.shape:
                raise ValueError(
                    f"private state has leading axes {leaf.shape[:2]}, the plan has [lanes, slots] "
                    f"{plan.client.shape}"
                )
        if isinstance(plan.index, np.ndarray):
            last = int(plan.index.max(initial=0))
            for name, array in data.items():
                have = array.shape[0] // (parts if local_data else 1)
                if last >= have:
                    raise ValueError(
                        f"the plan takes example {last}, data[{name!r}] has {have} for a device: "
                        f"it is a plan of other clients"
                    )
        check_weights(aggregator, plan)

    def placed(function: Callable[..., Any], inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
        if mesh is None:
            return function
        return jax.shard_map(
            function, mesh=mesh, in_specs=inputs, out_specs=outputs, axis_names=frozenset(axes)
        )

    whole, lanes = PartitionSpec(), PartitionSpec(axes)
    where_data = lanes if local_data else whole
    where_plan = plan_specs(axes)

    def run(shared: Shared, private: Any, data: Data, plan: RoundPlan, key: jax.Array, mask: Mask) -> Any:
        shared, data, key, mask, carry = device.begin(shared, private, data, plan, key, mask)
        carry = jax.lax.fori_loop(
            0,
            jnp.max(plan.lanes.length),
            lambda at, carry: device.row(at, carry, shared, data, plan, key, mask),
            carry,
        )
        return device.end(carry)

    run_all = jax.jit(
        placed(run, (whole, lanes, where_data, where_plan, whole, whole), (whole, lanes, whole))
    )

    def compiled(
        shared: Shared, private: Any, data: Data, plan: RoundPlan, key: jax.Array, mask: Mask = None
    ) -> CohortResult:
        check(private, data, plan, key)
        return CohortResult(*run_all(shared, private, data, plan, key, mask))

    if rows == "compiled":
        return compiled

    def on_devices(tree: Any, specs: Any) -> Any:
        if mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        each = jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
        return jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)) if isinstance(x, np.ndarray) else x,
            tree,
            each,
        )

    # Between calls the carry of every device lies side by side, along a leading axis of devices.
    def begin(shared: Shared, private: Any, data: Data, plan: RoundPlan, key: jax.Array, mask: Mask) -> Any:
        return _stacked(device.begin(shared, private, data, plan, key, mask)[-1])

    def row(
        at: jax.Array,
        carry: _Carry,
        shared: Shared,
        data: Data,
        plan: RoundPlan,
        key: jax.Array,
        mask: Mask,
    ) -> Any:
        shared, data, key, mask = device.varying((shared, data, key, mask))
        # Beyond the last step of its lanes a device keeps nothing of a row. So no branch is needed, in which
        # XLA's convolutions would be as slow as in a loop.
        return _stacked(device.row(at, _only(carry), shared, data, plan, key, mask))

    def end(carry: _Carry) -> Any:
        return device.end(_only(carry))

    inputs = (whole, where_data, where_plan, whole, whole)
    begin_all = jax.jit(placed(begin, (whole, lanes, *inputs[1:]), lanes))
    row_all = jax.jit(placed(row, (whole, lanes, *inputs), lanes), donate_argnums=1)
    end_all = jax.jit(placed(end, (lanes,), (whole, lanes, whole)))

    def called(
        shared: Shared, private: Any, data: Data, plan: RoundPlan, key: jax.Array, mask: Mask = None
    ) -> CohortResult:
        check(private, data, plan, key)
        length = int(jax.device_get(plan.lanes.length).max())
        # What the host holds goes to the devices once, and not with every row.
        data, plan = on_devices(data, where_data), on_devices(plan, where_plan)
        carry = begin_all(shared, private, data, plan, key, mask)
        for at in range(length):
            carry = row_all(jnp.int32(at), carry, shared, data, plan, key, mask)
        return CohortResult(*end_all(carry))

    return called


def plan_specs(axes: str | tuple[str, ...]) -> RoundPlan:
    """How a round's plan is laid out over a mesh: by lane.

    Args:
      axes: mesh axis, or axes, of the lanes.

    Returns:
      A `RoundPlan` of `PartitionSpec`.
    """
    whole, lanes, by_row = PartitionSpec(), PartitionSpec(axes), PartitionSpec(None, axes)
    return RoundPlan(
        lanes=LanePlan(lanes, by_row, by_row, by_row, by_row, by_row, lanes),
        index=by_row,
        mask=by_row,
        client=lanes,
        cohort=whole,
        weight=lanes,
        round=whole,
    )


def check_weights(aggregator: Aggregator, plan: RoundPlan) -> None:
    """Makes sure that the weights of a plan are not negative, and 0 or 1 where nothing else is allowed.

    Args:
      aggregator: whose weights they are.
      plan: of a round; nothing is looked at where it is traced.

    Raises:
      ValueError: they are not.
    """
    if isinstance(plan.weight, jax.core.Tracer):
        return
    weights = jax.device_get(plan.weight)
    if (weights < 0).any():
        raise ValueError(f"weights of clients must not be negative, the smallest is {weights.min()}")
    if aggregator.uniform and not ((weights == 0) | (weights == 1)).all():
        raise ValueError(
            "the aggregator bounds what one client moves, and needs weights of 0 or 1: "
            "plan the round with uniform=True"
        )


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _only(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _at(tree: Any, at: int | jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), tree)


def _over_lanes(x: jax.Array) -> jax.Array:
    """The sum over the leading axis. XLA's own takes four times a whole step on CPUs; a product does not."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.sum(x, axis=0, dtype=x.dtype)
    return jnp.tensordot(jnp.ones(x.shape[:1], x.dtype), x, 1, precision=jax.lax.Precision.HIGHEST)


class _Device(NamedTuple):
    """The part of one device; `axes` are the mesh axes that are mapped by hand."""

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
    ) -> tuple[Shared, Data, jax.Array, Mask, _Carry]:
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
        carry = self.varying(_Carry(state, total, private, sums))
        return shared, data, key, mask, carry

    def row(
        self,
        at: jax.Array,
        carry: _Carry,
        shared: Shared,
        data: Data,
        plan: RoundPlan,
        key: jax.Array,
        mask: Mask,
    ) -> _Carry:
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
            by_lane = _stacked(kept) if lanes == 1 else kept
            private = jax.tree.map(
                lambda x, new: x.at[lane, place].set(new.astype(x.dtype), mode="drop"), private, by_lane
            )
            if not self.aggregator.private:
                sums = _added(sums, lifted, row.last)
            return total, private, sums

        total, private, sums = jax.lax.cond(
            jnp.any(row.last), accumulated, lambda parts: parts, (carry.total, carry.private, sums)
        )
        return _Carry(state, total, private, sums)

    def end(self, carry: _Carry) -> tuple[Any, Any, Figures]:
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
        kept = _only(kept) if lanes == 1 else kept
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
        return self._lanes(step, lanes)(state, *(_only(inputs) if lanes == 1 else inputs))

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
            return observed(total, deltas, *_only((weight, position, keys)))
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
