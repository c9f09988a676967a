"""Packing documents into sequences of one length, with random access.

Every document is stored as its separator followed by its tokens, documents one after another; example i holds
the stream's positions `[i L, i L + L)` and its targets are one further. So:

- the separator that opens a document belongs to it: generating from nothing starts from a separator;
- the target of a document's last token is a separator. It ends that document and also opens the next one, so
  no target carries a token of another document and every target counts: weights are 1 except on padding;
- each token of the corpus is an input exactly once and a target exactly once per epoch. Only the last example
  is padded.

Attention is kept inside documents by `segments`; `positions` count from the start of the document or, where
an example begins inside a document, from the start of the example, so they stay below L.
"""

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from odjax_train.data.examples import Arrays
from odjax_train.data.shuffle import key_of, permute
from odjax_train.errors import UserError

_DIGEST_CHUNKS = 64
_DIGEST_CHUNK = 1 << 20


class Corpus(NamedTuple):
    """Tokenised documents in one flat array, each behind its separator.

    Attributes:
        tokens: `[N]` in the smallest unsigned dtype that holds the vocabulary (1 byte a token for bytes); in
            memory, or mapped from disk.
        starts: int64 `[D + 1]`, where documents begin; the last is N.
    """

    tokens: np.ndarray
    starts: np.ndarray


def corpus(documents: Iterable[np.ndarray], *, separator: int, vocab: int) -> Corpus:
    """Joins tokenised documents in memory; empty ones are left out.

    Args:
        documents: ids `[n]` each, without separators.
        separator: the id before each.
        vocab: number of ids.

    >>> corpus([np.array([1, 2]), np.array([3])], separator=9, vocab=10).tokens.tolist()
    [9, 1, 2, 9, 3]
    """
    dtype = np.min_scalar_type(vocab - 1)
    parts = list(_with_separator(documents, separator, dtype))
    starts = np.cumsum([0, *(part.size for part in parts)], dtype=np.int64)
    return Corpus(np.concatenate(parts) if parts else np.zeros(0, dtype), starts)


def stored_corpus(
    path: Path, documents: Iterable[np.ndarray] | None, *, separator: int, vocab: int
) -> Corpus | None:
    """A corpus in two files that are mapped into memory, for text larger than it.

    Args:
        path: where: `<path>.tokens` (raw little-endian ids) and `<path>.starts.npy`.
        documents: ids `[n]` each, written one after another when the files are missing; None to only look.
        separator: the id before each.
        vocab: number of ids.

    Returns:
        The corpus, or None when it is not there and `documents` is None.

    Raises:
        UserError: the folder cannot be written.
    """
    dtype = np.min_scalar_type(vocab - 1).newbyteorder("<")
    tokens, starts = path.with_name(path.name + ".tokens"), path.with_name(path.name + ".starts.npy")
    if not _is_whole(tokens, starts, dtype):
        if documents is None:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            offsets = [0]
            with _replacing(tokens) as file:
                for part in _with_separator(documents, separator, dtype):
                    file.write(part.tobytes())
                    offsets.append(offsets[-1] + part.size)
            # Renamed last: when it is there, the tokens are too.
            with _replacing(starts) as file:
                np.save(file, np.array(offsets, np.int64))
        except OSError as error:
            raise UserError(f"cache {path.parent}: cannot write: {error.strerror or error}") from error
    bounds = np.load(starts, mmap_mode="r", allow_pickle=False)
    if bounds[-1] == 0:
        return Corpus(np.zeros(0, dtype), np.asarray(bounds))
    return Corpus(np.memmap(tokens, dtype, mode="r"), bounds)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _is_whole(tokens: Path, starts: Path, dtype: np.dtype) -> bool:
    try:
        bounds = np.load(starts, mmap_mode="r", allow_pickle=False)
        return tokens.stat().st_size == bounds[-1] * dtype.itemsize
    except (OSError, ValueError, EOFError, IndexError):
        return False


def _with_separator(documents: Iterable[np.ndarray], separator: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    for document in documents:
        if document.size:
            part = np.empty(document.size + 1, dtype)
            part[0], part[1:] = separator, document
            yield part


def digest(*arrays: np.ndarray) -> str:
    """Identifies arrays by shape, dtype and content; of those above 64 MiB, by 64 evenly spaced MiB.

    >>> digest(np.arange(3)) == digest(np.arange(4))
    False
    """
    state = hashlib.blake2b(digest_size=16)
    for array in arrays:
        state.update(f"{array.shape}{array.dtype.str}".encode())
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if flat.size <= _DIGEST_CHUNKS * _DIGEST_CHUNK:
            state.update(flat)
        else:
            for start in np.linspace(0, flat.size - _DIGEST_CHUNK, _DIGEST_CHUNKS).astype(np.int64):
                state.update(np.ascontiguousarray(flat[start : start + _DIGEST_CHUNK]))
    return state.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A corpus cut into sequences of one length (`pack`).

    Attributes:
        tokens: the corpus, flat.
        begins: int64 `[D]`, where each document of the (permuted) stream begins in the stream.
        shift: int64 `[D]`, what takes a stream position inside document d to its place in `tokens`.
        total: length of the stream.
        length: L.
        separator: id between documents.
        padding: id after the end of the stream.
    """

    tokens: np.ndarray
    begins: np.ndarray
    shift: np.ndarray
    total: int
    length: int
    separator: int
    padding: int

    def __len__(self) -> int:
        return -(-self.total // self.length)

    def read(self, rows: np.ndarray, draws: np.ndarray | None = None) -> Arrays:
        """Examples by number.

        Args:
            rows: int64 `[B]` in `[0, len(self))`.
            draws: not used.

        Returns:
            `tokens`, `targets`, `segments` (1, 2, ... within the example, 0 on padding), `positions`, int32
            `[B, L]`, and `weights` float32 `[B, L]`.
        """
        del draws
        place = rows[:, None] * self.length + np.arange(self.length + 1)
        document = np.searchsorted(self.begins, place, side="right") - 1
        source = place + self.shift[document]
        ended = int(rows.max(initial=0)) == len(self) - 1
        if ended:
            np.minimum(source, self.tokens.size - 1, out=source)
        stream = self.tokens[source].astype(np.int32)
        document, start = document[:, :-1], place[:, :1]
        segments = (document - document[:, :1] + 1).astype(np.int32)
        positions = (place[:, :-1] - np.maximum(self.begins[document], start)).astype(np.int32)
        weights = np.ones(positions.shape, np.float32)
        if ended:
            stream[place == self.total] = self.separator
            stream[place > self.total] = self.padding
            outside = place[:, :-1] >= self.total
            # The position after the last is a target (the closing separator), never an input.
            tokens = np.where(outside, np.int32(self.padding), stream[:, :-1])
            segments[outside], positions[outside], weights[outside] = 0, 0, 0.0
        else:
            tokens = np.ascontiguousarray(stream[:, :-1])
        return {
            "tokens": tokens,
            "targets": np.ascontiguousarray(stream[:, 1:]),
            "segments": segments,
            "positions": positions,
            "weights": weights,
        }


def pack(documents: Corpus, length: int, *, separator: int, padding: int, seed: int | None = None) -> Packed:
    """Cuts a corpus into sequences.

    Args:
        documents: the corpus.
        length: tokens in a sequence.
        separator: id before each document.
        padding: id after the end.
        seed: of the order in which documents are joined, None for the order of the corpus.

    Returns:
        Examples by number: ceil(tokens / length) of them.

    Raises:
        UserError: the corpus is empty.
        ValueError: `length` is not positive.

    >>> documents = corpus([np.array([1, 2]), np.array([3])], separator=9, vocab=10)
    >>> packed = pack(documents, 3, separator=9, padding=8)
    >>> packed.read(np.array([0, 1]))["tokens"].tolist()
    [[9, 1, 2], [9, 3, 8]]
    >>> packed.read(np.array([0, 1]))["targets"].tolist()
    [[1, 2, 9], [3, 9, 8]]
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    starts = np.asarray(documents.starts)
    count, total = starts.size - 1, int(starts[-1])
    if total < 1:
        raise UserError("there is no text to pack: every document is empty")
    order = np.arange(count) if seed is None else permute(np.arange(count), count, key_of(seed, 0))
    sizes = np.diff(starts)[order]
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return Packed(documents.tokens, begins, starts[:-1][order] - begins, total, length, separator, padding)
