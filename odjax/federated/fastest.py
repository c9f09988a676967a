"""How many lanes: measured, because no rule tells it for a model and a machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from odjax.federated.clients import Clients, RoundPlan, plan_round


def fastest_lanes(
    run: Callable[[RoundPlan], Any],
    clients: Clients,
    ids: Any,
    *,
    candidates: Sequence[int] = (1, 2, 4, 8, 16),
    devices: int = 1,
    repeats: int = 3,
    **plan: Any,
) -> int:
    """Runs a round of one cohort with several numbers of lanes and says which was the fastest.

    More lanes fill an accelerator that one small model leaves idle; on CPUs they may be slower than one. The
    result of a round does not depend on them but for rounding.

    Args:
      run: runs a round by its plan and returns its arrays; it must not donate what it is called with again.
      clients: the population's data.
      ids: int [K], a typical cohort.
      candidates: lanes of one device, ascending. It stops at the first that takes twice as long as the best.
      devices: devices of the mesh axis.
      repeats: runs of each, after one that compiles; their median counts.
      **plan: further arguments of `plan_round`: batch, seed, epochs, ...

    Returns:
      Lanes in all, one of the candidates times `devices`, for `plan_round(lanes=)`.

    Raises:
      ValueError: no candidate, or one below 1.

    Example:
      >>> import numpy as np
      >>> from odjax.federated import fastest_lanes, group_by_client
      >>> clients = group_by_client({"x": np.zeros(4)}, np.arange(4))
      >>> run = lambda plan: plan.weight
      >>> fastest_lanes(run, clients, [0, 1], candidates=(2,), devices=2, batch=1, seed=0)
      4
    """
    if not candidates or min(candidates) < 1 or repeats < 1 or devices < 1:
        raise ValueError(
            f"need candidates, repeats and devices of at least 1, got {candidates}, {repeats}, {devices}"
        )
    best, least = 0, float("inf")
    for lanes in candidates:
        packed = plan_round(clients, ids, 0, lanes=lanes * devices, **plan)
        jax.block_until_ready(run(packed))
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(run(packed))
            times.append(time.perf_counter() - begin)
        median = statistics.median(times)
        if median < least:
            best, least = lanes * devices, median
        elif median > 2 * least:
            break
    return best
