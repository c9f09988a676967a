"""Examples by number, one at a time or a batch at once, in an order that is a function of (seed, index)."""

import sys
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from odjax_train.data.shuffle import key_of, permute
from odjax_train.errors import UserError

Arrays = dict[str, np.ndarray]
Read = Callable[[np.ndarray, np.ndarray], Arrays]


class Examples(grain.MapDataset):
    """Examples that are read many at once.

    With a seed: endless, every epoch a new shuffle of all examples; example i is a function of (seed, i).
    Without: finite, in the order of the source.

    Args:
        read: `(rows [n] int64, draws [n] uint64) -> {name: array [n, ...]}`; `rows` are numbers of source
            examples, `draws` are random bits that belong to the seed and to the place in the stream
            (augmentation draws from them).
        size: number of source examples, at least 1.
        seed: of the order, None for the fixed order.
        fingerprint: identifies the content; a resumed run compares it.
        threads: how many reads at once are worth having: 0 when the data is in memory.

    Raises:
        UserError: `size` is 0.

    >>> squares = Examples(lambda rows, draws: {"square": rows**2}, 4)
    >>> squares.take(np.array([3, 1]))
    {'square': array([9, 1])}
    >>> shuffled = Examples(squares.read, 4, seed=0)
    >>> sorted(int(shuffled[place]["square"]) for place in range(4, 8))  # the second epoch
    [0, 1, 4, 9]
    """

    def __init__(
        self, read: Read, size: int, *, seed: int | None = None, fingerprint: str = "", threads: int = 0
    ) -> None:
        super().__init__()
        if size < 1:
            raise UserError("there are no examples to read")
        self.read = read
        self.size = size
        self.order_seed = seed
        self.fingerprint = fingerprint
        self.threads = threads

    def __len__(self) -> int:
        return self.size if self.order_seed is None else sys.maxsize

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return {name: column[0] for name, column in self.take(np.array([index])).items()}

    def take(self, indices: np.ndarray) -> Arrays:
        """Examples at several places of the stream, stacked.

        Args:
            indices: int64 `[n]`.

        Returns:
            Arrays `[n, ...]` by name.
        """
        indices = np.asarray(indices, np.int64)
        if self.order_seed is None:
            return self.read(indices, key_of(0, indices))
        epoch, row = np.divmod(indices, self.size)
        rows = permute(row, self.size, key_of(self.order_seed, epoch))
        return self.read(rows, key_of(self.order_seed, 1, indices))


class _Batches(grain.MapDataset):
    """Element `step` is this process's rows of global batch `step`."""

    def __init__(self, dataset: grain.MapDataset, batch: int, rows: np.ndarray, *, pad: bool) -> None:
        super().__init__(dataset)
        if batch < 1:
            raise UserError(f"batch must be at least 1, got {batch}")
        self._dataset = dataset
        self._batch = batch
        self._rows = np.asarray(rows, np.int64)
        self._pad = pad

    def __len__(self) -> int:
        total = len(self._dataset)
        return -(-total // self._batch) if self._pad else total // self._batch

    def __getitem__(self, step: int | slice) -> Any:
        if isinstance(step, slice):
            return self.slice(step)
        if not 0 <= step < len(self):
            raise IndexError(f"batch {step} of {len(self)}")
        indices = step * self._batch + self._rows
        if not self._pad:
            return _take(self._dataset, indices)
        total = len(self._dataset)
        out = _take(self._dataset, np.minimum(indices, total - 1))
        outside = indices >= total
        if outside.any():
            for name in ("weights", "weight"):
                if name in out:
                    out[name] = np.where(
                        outside.reshape((-1,) + (1,) * (out[name].ndim - 1)), np.float32(0), out[name]
                    )
        return out


def _take(dataset: grain.MapDataset, indices: np.ndarray) -> Arrays:
    if isinstance(dataset, Examples):
        return dataset.take(indices)
    examples = [dataset[int(index)] for index in indices]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def batches(dataset: grain.MapDataset, batch: int, rows: np.ndarray) -> grain.MapDataset:
    """Global batches of consecutive examples, of which this process reads its own rows.

    What global batch `step` holds does not depend on how the rows are divided. A last batch that would not be
    full is left out.

    Args:
        dataset: of dicts of arrays; an `Examples` is read a batch at once, any other element by element.
        batch: examples in a global batch.
        rows: int64 `[n]`, row numbers in `[0, batch)` that this process reads (`local_rows`).

    Returns:
        A dataset whose element `step` is `{name: array [n, ...]}`.

    >>> numbers = Examples(lambda rows, draws: {"row": rows}, 10)
    >>> batches(numbers, 4, np.array([0, 1]))[1]  # the first of two processes
    {'row': array([4, 5])}
    """
    return _Batches(dataset, batch, rows, pad=False)


def evaluation_batches(dataset: grain.MapDataset, batch: int, rows: np.ndarray) -> grain.MapDataset:
    """As `batches`, with a last batch that is filled up with rows of weight 0.

    Args:
        dataset: finite; its examples hold `weights` or `weight`.
        batch: examples in a global batch.
        rows: row numbers that this process reads.

    Returns:
        A dataset of ceil(len(dataset) / batch) batches.

    >>> ones = Examples(lambda rows, draws: {"weight": np.ones(len(rows), np.float32)}, 3)
    >>> evaluation_batches(ones, 2, np.arange(2))[1]
    {'weight': array([1., 0.], dtype=float32)}
    """
    return _Batches(dataset, batch, rows, pad=True)
