"""Several processes: joining them, agreeing to stop, and who speaks."""

import dataclasses
import glob
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax_train import watch
from odjax_train.errors import UserError

T = TypeVar("T")

# Over the other processes; None when there are none.
watching: watch.Watch | None = None


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of a run find each other.

    Args:
        coordinator: `host:port` of process 0; without it a cluster is looked for (TPU pod, GKE, SLURM, Open
            MPI).
        processes: number of processes.
        process: number of this one, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        given = [value is not None for value in dataclasses.astuple(self)]
        if any(given) and not all(given):
            raise UserError("give --coordinator, --processes and --process together, or none of them")
        if self.processes is not None and not 0 <= self.process < self.processes:
            raise UserError(f"--process {self.process} is not one of 0..{self.processes - 1}")


def on_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of one process among several, in a form that JAX detects by itself.

    >>> on_cluster({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"})
    True
    >>> on_cluster({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"})
    False
    """
    slurm = int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment
    mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    gke = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    multislice = "MEGASCALE_COORDINATOR_ADDRESS" in environment
    return slurm or mpi or gke or multislice


def _on_tpu_vm() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def join(processes: Processes, cpu_devices: int | None = None) -> None:
    """Joins the other processes, if there are any, and watches over them.

    To be called before anything touches a device.

    Args:
        processes: who they are.
        cpu_devices: run on that many virtual CPU devices a process.
    """
    if cpu_devices is not None:
        if cpu_devices < 1:
            raise UserError(f"--cpu-devices must be at least 1, got {cpu_devices}")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    try:
        if processes.coordinator is not None:
            jax.distributed.initialize(processes.coordinator, processes.processes, processes.process)
        elif on_cluster(os.environ) or (cpu_devices is None and _on_tpu_vm()):
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        where = processes.coordinator or "the detected cluster"
        raise UserError(
            f"cannot join the other processes at {where}: {' '.join(str(error).split())}"
        ) from error
    if jax.distributed.is_initialized():
        global watching
        watching = watch.begin(processes.coordinator)


def pause() -> None:
    """To be called before an error is explained: does not return when another process is its cause."""
    if watching is not None:
        watching.pause()


def advise(advice: Callable[[], str]) -> None:
    """Sets what is said after "process 2 of 4 is gone"; called from another thread."""
    if watching is not None:
        watching.advice = advice


def is_main() -> bool:
    """Whether this process is the one that logs and writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def together(action: Callable[[], T]) -> T:
    """Does something in every process, and fails in all of them when it fails in one.

    Args:
        action: what to do.

    Returns:
        what it returned here.

    Raises:
        UserError: with the message of the first process in which it failed.
    """
    value, text = None, ""
    try:
        value = action()
    except (UserError, OSError) as error:
        if jax.process_count() == 1:
            raise
        text = str(error) or type(error).__name__
    if jax.process_count() > 1:
        sent = np.zeros(1024, np.uint8)
        content = np.frombuffer(text.encode()[: sent.size], np.uint8)
        sent[: content.size] = content
        everywhere = multihost_utils.process_allgather(sent)
        failed = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in everywhere if row.any()]
        if failed:
            raise UserError(failed[0])
    return value


def everywhere(flag: bool) -> bool:
    """Whether it is true in every process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).all())


def as_main(value: int) -> int:
    """Process 0's value, in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def same_everywhere(value: np.ndarray, what: str) -> None:
    """Raises when the processes do not hold the same value.

    Raises:
        UserError: naming what differs.
    """
    if jax.process_count() == 1:
        return
    everywhere = multihost_utils.process_allgather(value)
    if not (everywhere == everywhere[0]).all():
        raise UserError(f"the processes of this run do not have the same {what}")


class Agreement:
    """Lets any process ask all of them to stop, at the same step, without waiting for each other.

    Every step sums the processes' votes on the devices; the sum is read one step later, when it has long
    arrived, so all processes see the same one at the same step.
    """

    def __init__(self, mesh: Mesh) -> None:
        axes = P(mesh.axis_names)
        self._sharding = NamedSharding(mesh, axes)
        self._size = mesh.size
        self._sum = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
        self._pending: jax.Array | None = None

    def vote(self, stop: bool) -> bool:
        """Casts this process's vote; whether anybody voted to stop a step ago."""
        if jax.process_count() == 1:
            return stop
        before = self._pending
        votes = jax.make_array_from_callback(
            (self._size,), self._sharding, lambda index: np.full((self._size,), stop, np.int32)[index]
        )
        self._pending = self._sum(votes)
        return before is not None and int(before) > 0
