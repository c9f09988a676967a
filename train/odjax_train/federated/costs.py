"""What a federated run costs: epsilon, and bytes between clients and server."""

from typing import TYPE_CHECKING, Any

from odjax.federated.traffic import Traffic, traffic
from odjax.lowrank import Adapted

if TYPE_CHECKING:
    from odjax_train.program import Program


def bytes_of(program: "Program") -> Traffic:
    """What one client sends and gets in a round in which all that is trained takes part.

    Control variates double both. A chain is sent as seeds and mean factors of the rounds that the client has
    missed.

    Args:
        program: of a federated run.
    """
    experiment = program.experiment
    model = experiment.model if isinstance(experiment.model, Adapted) else None
    missed = 1
    if experiment.edits and model is not None:
        clients = experiment.data.clients().count
        missed = max(1, round(clients / experiment.federated.expected_cohort))
    each = traffic(program.state.params, experiment.trainable, model=model, missed=missed)
    times = 1 if program.state.opt_state.control is None else 2
    return Traffic(times * each.up, times * each.down)


def costs(program: "Program", step: int) -> dict[str, float]:
    """What is spent after some rounds: epsilon, and bytes of all clients together; nothing for other runs.

    Args:
        program: the run's functions.
        step: rounds done.

    Returns:
        `federated/epsilon`, where there is a promise, `federated/uploaded_mb` and `federated/downloaded_mb`.
    """
    federated = program.experiment.federated
    if federated is None:
        return {}
    each, epsilon = bytes_of(program), federated.epsilon(step)
    clients = federated.expected_cohort * float(program.shares[:step].sum())
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
