"""The cohort's local training in one program: a loop over rows of lanes, then one sum over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from odjax.core import check_key
from odjax.federated.aggregate import Aggregator, Mask
from odjax.federated.clients import RoundPlan
from odjax.federated.device import Carry, Data, Device, add_axis, drop_axis
from odjax.federated.local import Figures, LocalStep, Shared
from odjax.federated.packing import LanePlan


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
    device = Device(local, aggregator, axes if mesh is not None else ())

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
        return add_axis(device.begin(shared, private, data, plan, key, mask)[-1])

    def row(
        at: jax.Array,
        carry: Carry,
        shared: Shared,
        data: Data,
        plan: RoundPlan,
        key: jax.Array,
        mask: Mask,
    ) -> Any:
        shared, data, key, mask = device.varying((shared, data, key, mask))
        # Beyond the last step of its lanes a device keeps nothing of a row. So no branch is needed, in which
        # XLA's convolutions would be as slow as in a loop.
        return add_axis(device.row(at, drop_axis(carry), shared, data, plan, key, mask))

    def end(carry: Carry) -> Any:
        return device.end(drop_axis(carry))

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
