"""Packing the local steps of a cohort into lanes: which client's step runs where and when.

Clients differ in how many steps they take. A lane is a sequence of steps of clients, one after another; some
lanes run side by side. Padding every client to the longest one would spend most of the work on nothing.

All of it is NumPy on the host, and deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class LanePlan(NamedTuple):
    """Which step of which client runs in which lane at which row.

    A client keeps its lane. The arrays are filled up to a few sizes, so that a new cohort seldom compiles
    anew; a loop over rows ends with `length`.

    Attributes:
      member: int32 [lanes, slots], position in the cohort of each client of a lane; -1 where there is none.
      slot: int32 [rows, lanes], whose step it is, as an index into the lane's `member`.
      step: int32 [rows, lanes], the number of the step within its client.
      first: bool [rows, lanes], whether it is the first step of its client.
      last: bool [rows, lanes], whether it is the last step of its client.
      active: bool [rows, lanes], whether there is a step at all.
      length: int32 [lanes], rows up to the lane's last step.
    """

    member: np.ndarray
    slot: np.ndarray
    step: np.ndarray
    first: np.ndarray
    last: np.ndarray
    active: np.ndarray
    length: np.ndarray


def pack_lanes(num_steps: Any, lanes: int, *, bucket: int = 16) -> LanePlan:
    """Assigns clients to lanes, the longest first, each to the lane that has least to do.

    Longest-processing-time-first scheduling ends at most a third after the best assignment (Graham 1969).

    Args:
      num_steps: int [K], local steps of each client of the cohort; 0 for one that takes part in nothing.
      lanes: lanes in all, over all devices.
      bucket: rows are filled up to a multiple of this.

    Returns:
      The plan.

    Raises:
      ValueError: no lane, a negative number of steps, or an empty cohort.

    Source: Granqvist et al. 2024, "pfl-research", section 4.4 (greedy balancing, there over processes).

    Example:
      >>> plan = pack_lanes([3, 2, 1], lanes=2, bucket=1)
      >>> plan.member.tolist(), plan.length.tolist()
      ([[0, -1], [1, 2]], [3, 3])
      >>> efficiency(plan)
      1.0
    """
    steps = _checked(num_steps, lanes, bucket)
    loads = [(0, lane) for lane in range(lanes)]
    starts: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]
    for client in np.argsort(-steps, kind="stable"):
        if steps[client] == 0:
            break
        load, lane = heapq.heappop(loads)
        starts[lane].append((int(client), load))
        heapq.heappush(loads, (load + int(steps[client]), lane))
    return _plan(steps, starts, bucket)


def pack_chunks(num_steps: Any, lanes: int, *, bucket: int = 16) -> LanePlan:
    """Runs clients in chunks that begin together; each chunk lasts as long as its longest client.

    The clients of a chunk are of similar length, as they are sorted. It is here to be compared with.

    Args:
      num_steps: int [K], local steps of each client of the cohort.
      lanes: clients of a chunk; all of them for the usual padding to the longest client.
      bucket: rows are filled up to a multiple of this.

    Returns:
      The plan.

    Raises:
      ValueError: as in `pack_lanes`.

    Source: Ro et al. 2021, "FedJAX", section 3 (clients of a block, there one a device).

    Example:
      >>> plan = pack_chunks([3, 2, 1], lanes=2, bucket=1)
      >>> plan.member.tolist(), plan.length.tolist()
      ([[0, 2], [1, -1]], [4, 2])
    """
    steps = _checked(num_steps, lanes, bucket)
    starts: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]
    order = [int(client) for client in np.argsort(-steps, kind="stable") if steps[client]]
    begin = 0
    for at in range(0, len(order), lanes):
        chunk = order[at : at + lanes]
        for lane, client in enumerate(chunk):
            starts[lane].append((client, begin))
        begin += int(steps[chunk[0]])
    return _plan(steps, starts, bucket)


def efficiency(plan: LanePlan) -> float:
    """The part of the work that is some client's: steps / (lanes x rows of the longest lane).

    Args:
      plan: of a cohort.

    Returns:
      At most 1; 1.0 for a cohort without a step.
    """
    rows = int(plan.length.max(initial=0))
    return float(plan.active.sum()) / (rows * plan.length.size) if rows else 1.0


def _checked(num_steps: Any, lanes: int, bucket: int) -> np.ndarray:
    steps = np.asarray(num_steps)
    if steps.ndim != 1 or steps.size == 0:
        raise ValueError(f"num_steps must be one number a client of a cohort, got shape {steps.shape}")
    if not np.issubdtype(steps.dtype, np.integer):
        raise ValueError(f"num_steps must be integers, got {steps.dtype}")
    if steps.min() < 0:
        raise ValueError(f"num_steps must not be negative, client {int(steps.argmin())} has {steps.min()}")
    for name, value in (("lanes", lanes), ("bucket", bucket)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return steps.astype(np.int64)


def _plan(steps: np.ndarray, starts: Sequence[Sequence[tuple[int, int]]], bucket: int) -> LanePlan:
    """The arrays, from (client, first row) of every lane."""
    lanes = len(starts)
    ends = [max((begin + int(steps[client]) for client, begin in lane), default=0) for lane in starts]
    rows = max(1, -(-max(ends) // bucket)) * bucket
    slots = 1 << (max(1, *(len(lane) for lane in starts), 1) - 1).bit_length()
    member = np.full((lanes, slots), -1, np.int32)
    slot, step = np.zeros((rows, lanes), np.int32), np.zeros((rows, lanes), np.int32)
    first, last, active = (np.zeros((rows, lanes), bool) for _ in range(3))
    for lane, clients in enumerate(starts):
        for index, (client, begin) in enumerate(clients):
            count = int(steps[client])
            own = slice(begin, begin + count)
            member[lane, index] = client
            slot[own, lane] = index
            step[own, lane] = np.arange(count)
            first[begin, lane] = last[begin + count - 1, lane] = active[own, lane] = True
    return LanePlan(member, slot, step, first, last, active, np.array(ends, np.int32))
