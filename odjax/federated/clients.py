"""Data of a population: one flat store of examples and where each client's begin; the batches of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from odjax.federated.packing import LanePlan, pack_chunks, pack_lanes

STRATEGIES = ("lanes", "chunks", "loop")


class Clients(NamedTuple):
    """Examples of all clients.

    Attributes:
      examples: name -> array [n, ...], sorted by client.
      offsets: int64 [N + 1], client i has the rows offsets[i] to offsets[i + 1].
    """

    examples: dict[str, np.ndarray]
    offsets: np.ndarray

    @property
    def count(self) -> int:
        """Number of clients N."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """int64 [N], examples of each client."""
        return np.diff(self.offsets)


class RoundPlan(NamedTuple):
    """All that a round needs besides parameters and data; the arrays of a compiled round.

    Attributes:
      lanes: `LanePlan`.
      index: int32 [rows, lanes, batch], the examples of each step; 0 where the mask is False.
      mask: bool [rows, lanes, batch], which of them count.
      client: int32 [lanes, slots], ids of the clients; -1 where there is none.
      cohort: int32 [K], ids in the order in which they were given; -1 for padding.
      weight: float32 [lanes, slots], of each client in the aggregate.
      round: int32 scalar.
    """

    lanes: LanePlan
    index: np.ndarray
    mask: np.ndarray
    client: np.ndarray
    cohort: np.ndarray
    weight: np.ndarray
    round: np.ndarray


def group_by_client(examples: Mapping[str, Any], client: Any, count: int | None = None) -> Clients:
    """Sorts examples by the client that each belongs to.

    Args:
      examples: name -> array [n, ...].
      client: int [n], the client of each example.
      count: number of clients; None for the largest id and one.

    Returns:
      The clients; one without examples is one of them.

    Raises:
      ValueError: arrays of different lengths, or an id outside 0 to count - 1.

    Example:
      >>> clients = group_by_client({"x": np.array([10, 20, 30])}, np.array([1, 0, 1]))
      >>> clients.examples["x"].tolist(), clients.offsets.tolist()
      ([20, 10, 30], [0, 1, 3])
    """
    client = np.asarray(client)
    arrays = {name: np.asarray(array) for name, array in examples.items()}
    if not arrays:
        raise ValueError("examples is empty: give at least one array")
    for name, array in arrays.items():
        if len(array) != len(client):
            raise ValueError(f"examples[{name!r}] has {len(array)} rows, client has {len(client)}")
    count = int(client.max(initial=-1)) + 1 if count is None else count
    if client.size and (client.min() < 0 or client.max() >= count):
        raise ValueError(f"ids of clients must be 0 to {count - 1}, got {client.min()} to {client.max()}")
    order = np.argsort(client, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(client, minlength=count))]).astype(np.int64)
    return Clients({name: array[order] for name, array in arrays.items()}, offsets)


def label_shards(labels: Any, clients: int, shards: int, seed: int) -> np.ndarray:
    """A strongly non-IID split: examples sorted by label, cut into shards, some shards to each client.

    Args:
      labels: int [n].
      clients: number of clients.
      shards: shards of one client; it then sees about as many labels.
      seed: of the order within a label and of the assignment.

    Returns:
      int64 [n], the client of each example; shards differ in size by one at most.

    Raises:
      ValueError: fewer examples than shards.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    section 3.

    Example:
      >>> label_shards([0, 0, 1, 1], clients=2, shards=1, seed=0).tolist()
      [1, 1, 0, 0]
    """
    labels = np.asarray(labels)
    total = clients * shards
    if clients < 1 or shards < 1 or len(labels) < total:
        raise ValueError(f"{len(labels)} examples do not make {clients} clients of {shards} shards each")
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owner = np.empty(len(labels), np.int64)
    for at, shard in zip(random.permutation(total), np.array_split(order, total), strict=True):
        owner[shard] = at // shards
    return owner


def dirichlet_split(labels: Any, clients: int, concentration: float, seed: int) -> np.ndarray:
    """A split whose clients have proportions of labels from a Dirichlet distribution.

    Args:
      labels: int [n].
      clients: number of clients.
      concentration: of the symmetric Dirichlet distribution over the clients of each label; small for few
        labels a client.
      seed: of everything random.

    Returns:
      int64 [n], the client of each example; a client may have none.

    Raises:
      ValueError: no client, or a concentration that is not positive.

    Source: Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification", section 2.

    Example:
      >>> owner = dirichlet_split(np.arange(100) % 10, clients=5, concentration=0.1, seed=0)
      >>> owner.shape, int(owner.max()) < 5
      ((100,), True)
    """
    labels = np.asarray(labels)
    if clients < 1 or not concentration > 0:
        raise ValueError(
            f"need at least 1 client and a positive concentration, got {clients}, {concentration}"
        )
    random = np.random.default_rng(seed)
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        parts = random.dirichlet(np.full(clients, concentration))
        cuts = np.rint(np.cumsum(parts)[:-1] * len(rows)).astype(np.int64)
        for client, part in enumerate(np.split(rows, cuts)):
            owner[part] = client
    return owner


def plan_round(
    clients: Clients,
    ids: Any,
    round: int,
    *,
    batch: int,
    seed: int,
    epochs: int = 1,
    steps: int | None = None,
    lanes: int = 1,
    strategy: str = "lanes",
    mask: Any = None,
    uniform: bool = False,
    bucket: int = 16,
) -> RoundPlan:
    """The local batches of a cohort, packed.

    A client goes through its examples in a new order every epoch, a function of (seed, round, id) alone; the
    last batch of an epoch may be smaller.

    Args:
      clients: the population's data.
      ids: int [K], the cohort.
      round: number of the round.
      batch: examples of a local step.
      seed: of the orders.
      epochs: passes over a client's examples.
      steps: local steps at most, None for all.
      lanes: lanes in all, over all devices.
      strategy: "lanes"; "chunks", where clients begin together; "loop", one lane a device (`lanes` is then
        the number of devices).
      mask: bool [K], False for padding of the cohort.
      uniform: every client weighs 1, as privacy demands; otherwise the number of its examples.
      bucket: see `pack_lanes`.

    Returns:
      The plan. A client without examples takes no step: its delta and its weight are 0.

    Raises:
      ValueError: naming the argument: an empty cohort, an id that there is not, one that comes twice, a
        number below 1.

    Example:
      >>> clients = group_by_client({"x": np.arange(5)}, np.array([0, 0, 0, 1, 1]))
      >>> plan = plan_round(clients, [0, 1], 0, batch=2, seed=0, bucket=1)
      >>> plan.mask.sum(), plan.lanes.length.tolist(), plan.weight.tolist()
      (np.int64(5), [3], [[3.0, 2.0]])
    """
    ids = np.asarray(ids)
    mask = np.ones(len(ids), bool) if mask is None else np.asarray(mask, bool)
    _check_round(clients, ids, mask, strategy, {"batch": batch, "epochs": epochs, "lanes": lanes})
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, or None, got {steps}")
    sizes = np.where(mask, clients.sizes[np.where(mask, ids, 0)], 0)
    num_steps = epochs * -(-sizes // batch)
    if steps is not None:
        num_steps = np.minimum(num_steps, steps)
    pack = pack_chunks if strategy == "chunks" else pack_lanes
    plan = pack(num_steps, lanes, bucket=bucket)
    rows, count = plan.slot.shape
    index, counts = np.zeros((rows, count, batch), np.int32), np.zeros((rows, count, batch), bool)
    member, there = plan.member, plan.member >= 0
    for lane in range(count):
        starts = np.flatnonzero(plan.first[:, lane])
        for at, begin in enumerate(starts):
            position = member[lane, at]
            client, taken = int(ids[position]), int(num_steps[position])
            rows_of = _batches(clients, client, batch, epochs, taken, (seed, round, client))
            index[begin : begin + taken, lane] = np.maximum(rows_of, 0)
            counts[begin : begin + taken, lane] = rows_of >= 0
    weight = np.where(sizes > 0, 1 if uniform else sizes, 0).astype(np.float32)
    return RoundPlan(
        plan,
        index,
        counts,
        np.where(there, ids[member], -1).astype(np.int32),
        np.where(mask, ids, -1).astype(np.int32),
        np.where(there, weight[member], 0).astype(np.float32),
        np.int32(round),
    )


def localize(
    clients: Clients, plan: RoundPlan, devices: int, *, bucket: int = 256
) -> tuple[dict[str, np.ndarray], RoundPlan]:
    """What each device needs of the data for one round, for `local_data=True`.

    Device d has the lanes d L / D to (d + 1) L / D - 1, and gets the examples of their clients alone.

    Args:
      clients: the population's data, which may be memory-mapped.
      plan: of the round.
      devices: number of devices D.
      bucket: every device holds a multiple of this, so that a new cohort seldom compiles anew.

    Returns:
      (data, plan): name -> array [devices * m, ...], to be sharded over its leading axis, and the plan whose
      indices count from a device's first example.

    Raises:
      ValueError: lanes that the devices do not divide, or a bucket below 1.

    Example:
      >>> clients = group_by_client({"x": np.arange(5)}, np.array([0, 0, 1, 1, 1]))
      >>> plan = plan_round(clients, [0, 1], 0, batch=4, seed=0, lanes=2, bucket=1)
      >>> data, plan = localize(clients, plan, 2, bucket=1)
      >>> data["x"].tolist(), sorted(plan.index[0, 1][plan.mask[0, 1]].tolist())
      ([0, 1, 0, 2, 3, 4], [0, 1, 2])
    """
    lanes = plan.index.shape[1]
    if devices < 1 or lanes % devices or bucket < 1:
        raise ValueError(
            f"{lanes} lanes do not divide by {devices} devices: plan the round with a multiple of them"
            if bucket >= 1
            else f"bucket must be at least 1, got {bucket}"
        )
    each, index, taken = lanes // devices, np.zeros_like(plan.index), []
    for device in range(devices):
        own = (slice(None), slice(device * each, (device + 1) * each))
        rows, place = np.unique(plan.index[own][plan.mask[own]], return_inverse=True)
        taken.append(rows)
        part = np.zeros_like(index[own])
        part[plan.mask[own]] = place
        index[own] = part
    held = max(1, -(-max(len(rows) for rows in taken) // bucket)) * bucket

    def placed(array: np.ndarray) -> np.ndarray:
        out = np.zeros((devices * held, *array.shape[1:]), array.dtype)
        for device, rows in enumerate(taken):
            out[device * held : device * held + len(rows)] = array[rows]
        return out

    return {name: placed(array) for name, array in clients.examples.items()}, plan._replace(index=index)


def _batches(
    clients: Clients, client: int, batch: int, epochs: int, steps: int, entropy: Sequence[int]
) -> np.ndarray:
    """int64 [steps, batch], rows of the store; -1 fills up the last batch of an epoch."""
    begin, end = clients.offsets[client : client + 2]
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    each = -(-int(end - begin) // batch)
    out = np.full((epochs * each, batch), -1, np.int64)
    for epoch in range(epochs):
        if epoch * each >= steps:
            break
        own = out[epoch * each : (epoch + 1) * each].reshape(-1)
        own[: end - begin] = random.permutation(np.arange(begin, end))
    return out[:steps]


def _check_round(
    clients: Clients, ids: np.ndarray, mask: np.ndarray, strategy: str, numbers: Mapping[str, int]
) -> None:
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"the cohort must be a list of ids, at least one, got shape {ids.shape}")
    if mask.shape != ids.shape:
        raise ValueError(f"mask must have one entry a client, {ids.shape}, got {mask.shape}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    real = ids[mask]
    if real.size and (real.min() < 0 or real.max() >= clients.count):
        raise ValueError(f"ids must be 0 to {clients.count - 1}, got {real.min()} to {real.max()}")
    if clients.offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{clients.offsets[-1]} examples are more than int32 counts: split the population")
    if len(np.unique(real)) < real.size:
        raise ValueError("a client is in the cohort twice: its delta would count twice")
