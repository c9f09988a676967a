"""What a federated run costs: epsilon, and bytes between clients and server."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from odjax.core import partition

if TYPE_CHECKING:
    from odjax_train.program import Program


class Bytes(NamedTuple):
    """Bytes of one client in a round."""

    up: int
    down: int


def bytes_of(program: "Program") -> Bytes:
    """What one client sends and gets in a round, in the dtypes of the parameters.

    It sends its delta, and gets what has changed on the server since the round before: what is trained, and
    with control variates as much again, both ways. What a chain draws anew it gets as a key and a number.

    Args:
        program: of a federated run.
    """
    experiment = program.experiment
    free, frozen = partition(program.state.params, experiment.trainable)
    trained = sum(_size(leaf) for leaf in jax.tree.leaves(free))
    if program.state.opt_state.control is not None:
        trained *= 2
    seeds = sum(_size(leaf) for leaf in jax.tree.leaves(frozen) if leaf.dtype == np.uint32)
    return Bytes(trained, trained + (seeds if experiment.edits else 0))


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def costs(program: "Program", step: int) -> dict[str, float]:
    """What is spent after some rounds: epsilon, and bytes of all clients together; none for other runs.

    Args:
        program: the run's functions.
        step: rounds done.

    Returns:
        `federated/epsilon`, where there is a promise, `federated/uploaded_mb` and `federated/downloaded_mb`.
    """
    federated = program.experiment.federated
    if federated is None:
        return {}
    each = bytes_of(program)
    clients = federated.expected_cohort * step
    epsilon = federated.epsilon(step)
    return {
        **({} if epsilon is None else {"federated/epsilon": epsilon}),
        "federated/uploaded_mb": clients * each.up / 1e6,
        "federated/downloaded_mb": clients * each.down / 1e6,
    }


def describe(program: "Program") -> dict[str, Any]:
    """The section and its traffic, for a report.

    Args:
        program: of a federated run.
    """
    each = bytes_of(program)
    return {
        **program.experiment.federated.describe(),
        "bytes up, a client and round": f"{each.up:,}",
        "bytes down, a client and round": f"{each.down:,}",
    }
