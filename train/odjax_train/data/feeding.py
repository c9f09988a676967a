"""Feeding a mesh: which rows a process reads, and global arrays made ahead of time in the background."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from odjax_train.data.examples import Arrays, Examples, batches
from odjax_train.errors import UserError

Shardings = Sharding | Mapping[str, Sharding]
Batch = dict[str, jax.Array]


def local_rows(sharding: Sharding, batch: int, devices: Sequence[jax.Device] | None = None) -> np.ndarray:
    """The rows of a global batch that devices of this process hold.

    Args:
        sharding: of batch arrays; only its first dimension matters.
        batch: rows in a global batch.
        devices: whose rows; None for all devices of this process.

    Returns:
        int64 `[n]`, ascending.

    Raises:
        UserError: the batch does not divide by the mesh axes that it is laid out over.

    >>> local_rows(jax.sharding.SingleDeviceSharding(jax.devices()[0]), 4)
    array([0, 1, 2, 3])
    """
    if isinstance(sharding, NamedSharding):
        axes = sharding.spec[0] if sharding.spec else None
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = {name: sharding.mesh.shape[name] for name in names}
        if batch % int(np.prod(list(parts.values()), dtype=np.int64)):
            sizes = " x ".join(f"{name} ({size})" for name, size in parts.items())
            raise UserError(f"batch {batch} does not divide by the mesh axes {sizes}")
        sharding = NamedSharding(sharding.mesh, PartitionSpec(axes))
    if devices is None:
        devices = list(sharding.addressable_devices)
    where = sharding.devices_indices_map((batch,))
    rows = {index[0].indices(batch)[:2] for device, index in where.items() if device in set(devices)}
    return np.unique(np.concatenate([np.arange(start, stop) for start, stop in sorted(rows)]))


def to_devices(local: Arrays, rows: np.ndarray, batch: int, shardings: Shardings) -> Batch:
    """Global arrays from the rows that this process has.

    Args:
        local: arrays `[n, ...]`, row i of which is row `rows[i]` of the global batch.
        rows: int64 `[n]`, ascending, with all rows of this process's devices.
        batch: rows in the global batch.
        shardings: one for all arrays, or one by name.

    Returns:
        Arrays `[batch, ...]`, of which this process holds its part.
    """
    out = {}
    for name, array in local.items():
        sharding = shardings[name] if isinstance(shardings, Mapping) else shardings
        if len(rows) == batch:
            cut = array.__getitem__
        else:
            cut = _cut(array, rows, batch)
        out[name] = jax.make_array_from_callback((batch, *array.shape[1:]), sharding, cut)
    return out


def _cut(array: np.ndarray, rows: np.ndarray, batch: int) -> Callable[[Any], np.ndarray]:
    def cut(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(batch)
        first = int(np.searchsorted(rows, start))
        return array[(slice(first, first + stop - start), *index[1:])]

    return cut


class Feed:
    """Iterator over global batches on the mesh, read and transferred ahead in the background (`feed`).

    Its state is the number of the next batch: the data order is a function of (seed, step), so nothing else
    is needed to continue exactly, on any number of devices and processes.
    """

    def __init__(
        self, open_at: Callable[[int], grain.IterDataset], step: int, identity: dict[str, Any]
    ) -> None:
        self._open_at = open_at
        self._identity = identity
        self._step = step
        # The running iterator, if there is one; in a list, so that it can be let go of at interpreter exit,
        # before the modules that its background thread needs are taken down.
        self._running: list[grain.DatasetIterator] = []
        weakref.finalize(self, _stop, self._running)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if not self._running:
            self._running.append(iter(self._open_at(self._step)))
        try:
            batch = next(self._running[0])
        except BaseException:
            # The background thread ended with the error; asking again starts anew at the same batch.
            self.close()
            raise
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """What to store to continue behind the last batch that was taken; JSON."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where a stored state was taken.

        Args:
            state: from `get_state`.

        Raises:
            UserError: the state belongs to other data, another seed or another batch size.
        """
        for name, mine in self._identity.items():
            if name in state and state[name] != mine:
                raise UserError(
                    f"the stored data position is of {name} {state[name]}, this run has {name} {mine}"
                )
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """Stops the background work; taking the next batch starts it again."""
        _stop(self._running)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stop(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def feed(
    dataset: grain.MapDataset,
    batch: int,
    shardings: Shardings,
    *,
    start_step: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
    workers: int = 0,
    make_batches: Callable[[grain.MapDataset, int, np.ndarray], grain.MapDataset] = batches,
) -> Feed:
    """Global batches on the mesh, from batch `start_step` on.

    Args:
        dataset: of examples.
        batch: examples in a global batch.
        shardings: of the batch arrays, one for all or one by name; all of them cut the first dimension alike.
        start_step: number of the first batch.
        threads: batches that are read at once; None for what the data set asks for (none when it is in
            memory).
        prefetch: batches that are kept ready on the devices.
        workers: processes that read instead of threads, for decoding that holds the interpreter's lock. Each
            has a copy of the data set; they are spawned, so the program must be guarded by `if __name__ ==
            "__main__"`.
        make_batches: `batches`, or `evaluation_batches` for a finite data set whose last batch is filled up.

    Returns:
        An iterator; `close` it.

    Raises:
        UserError: the batch does not divide by the mesh axes, or the data set holds less than one batch.
        ValueError: shardings cut the first dimension differently.

    >>> numbers = Examples(lambda rows, draws: {"row": rows.astype(np.int32)}, 8)
    >>> with feed(numbers, 4, jax.sharding.SingleDeviceSharding(jax.devices()[0])) as steps:
    ...     [batch["row"].tolist() for batch in steps]
    [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    layouts = list(shardings.values()) if isinstance(shardings, Mapping) else [shardings]
    rows = local_rows(layouts[0], batch)
    for layout in layouts[1:]:
        if not np.array_equal(rows, local_rows(layout, batch)):
            raise ValueError("shardings of one batch must cut its first dimension alike")
    source = make_batches(dataset, batch, rows)
    if not len(source):
        raise UserError(f"batch {batch} is larger than the data set ({len(dataset)} examples)")
    if threads is None:
        threads = dataset.threads if isinstance(dataset, Examples) else 1
    identity: dict[str, Any] = {"batch": batch}
    if isinstance(dataset, Examples):
        identity |= {"seed": dataset.order_seed, "data": dataset.fingerprint}

    def open_at(step: int) -> grain.IterDataset:
        ahead = 2 * threads if threads else 0
        read = source[step:].to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        )
        if workers:
            # grain reads absl flags when it starts processes; our command line does not parse them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        placed = read.map(lambda local: to_devices(local, rows, batch, shardings))
        return grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=prefetch)

    return Feed(open_at, start_step, identity)
