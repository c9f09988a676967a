"""Where records come from: `open_source("<scheme>:<what>", split)`.

digits                  scikit-learn's 1,797 handwritten digits, 8x8 grey
stdlib                  the source files of the Python standard library
pydoc                   the topics of the Python language reference, English prose
text:<file or glob>     text files, `.gz` too; one document a file
npz:<file>              arrays: x_train y_train x_test y_test, or x y, or jpeg_s offset_s y_s
tfds:<name>[@<split>]   tensorflow-datasets, without TensorFlow
arrayrecord:<glob>      ArrayRecord files of dicts (`write_arrayrecord`); arrayrecord+text: raw text records
"""

import itertools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from odjax_train.data.shuffle import key_of
from odjax_train.errors import UserError

SPLITS = ("train", "test", "all")

Record = dict[str, Any]


class Source(Protocol):
    """Records by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """A record: arrays, bytes or text by name."""
        ...


class Arrays:
    """Records that are rows of arrays in memory.

    Args:
        columns: arrays `[n, ...]` by name.
    """

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Record:
        return {name: column[index] for name, column in self.columns.items()}


class Subset:
    """The records of one side of a split.

    Args:
        source: all records.
        indices: maps an array of numbers in this subset to numbers in `source`.
        size: number of records here.
    """

    def __init__(self, source: Source, indices: Callable[[np.ndarray], np.ndarray], size: int) -> None:
        self.source = source
        self._indices = indices
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._size:
            raise IndexError(f"record {index} of {self._size}")
        return self.source[int(self._indices(np.array([index]))[0])]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        return read_many(self.source, self._indices(np.asarray(indices, np.int64)))


def read_many(source: Source, indices: np.ndarray) -> list[Record]:
    """Several records, together where the source can (`__getitems__`, as grain's own sources have it)."""
    numbers = [int(index) for index in indices]
    if hasattr(source, "__getitems__"):
        return list(source.__getitems__(numbers))
    return [source[number] for number in numbers]


def records(source: Source, chunk: int = 256) -> Iterator[Record]:
    """All records in order, read a few at a time."""
    for start in range(0, len(source), chunk):
        yield from read_many(source, np.arange(start, min(start + chunk, len(source))))


def open_source(spec: str, split: str, *, held_out: float | None = None) -> Source:
    """Opens what a spec names.

    Where a source has no test part of its own, a part of it that depends on nothing but its size (or, for
    files, on their names) is held out.

    Args:
        spec: `"<scheme>"` or `"<scheme>:<what>"`, see the module.
        split: `"train"`, `"test"` or `"all"`.
        held_out: the part that is held out where there is no declared test part, between 0 and 1; None for
            the source's own habit (1/5 of digits, 1/16 of text files, 1/10 of anything else).

    Returns:
        Records by number.

    Raises:
        UserError: unknown scheme; missing, empty, unreadable or unsuitable files.
        ValueError: unknown split.

    >>> len(open_source("digits", "train")), len(open_source("digits", "test"))
    (1438, 359)
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if held_out is not None and not 0.0 < held_out < 1.0:
        raise UserError(f"held_out must be between 0 and 1, got {held_out}")
    scheme, colon, what = spec.partition(":")
    if scheme not in _SCHEMES:
        raise UserError(f"data source {spec!r}: unknown scheme {scheme!r}; there are {', '.join(_usage())}")
    opener, argument = _SCHEMES[scheme]
    if bool(argument) != bool(what) or (colon and not argument):
        wanted = f"{scheme}:{argument}" if argument else scheme
        raise UserError(f"data source {spec!r}: write it as `{wanted}`")
    return opener(spec, what, split, held_out)


def split_arrays(spec: str, arrays: Arrays, split: str, held_out: float) -> Arrays:
    """One side of arrays that come without a split."""
    if split == "all":
        return arrays
    subset = split_records(spec, arrays, split, held_out)
    rows = subset._indices(np.arange(len(subset)))
    return Arrays({name: column[rows] for name, column in arrays.columns.items()})


def split_records(spec: str, source: Source, split: str, held_out: float) -> Source:
    """One side of any records: of each block of k = 1 / held_out, one is held out, at a hashed place.

    Which records are held out depends on their number alone, takes no memory, and follows no period of the
    data.

    Args:
        spec: named in errors.
        source: all records.
        split: `"train"`, `"test"` or `"all"`.
        held_out: the part to hold out; what counts is the nearest 1 / k.

    Raises:
        UserError: fewer than k records.
    """
    if split == "all":
        return source
    k = max(2, round(1 / held_out))
    blocks, rest = divmod(len(source), k)
    if not blocks:
        raise UserError(f"data source {spec!r}: {len(source)} records are too few to hold out one in {k}")

    def place(block: np.ndarray) -> np.ndarray:
        return (key_of(0, block) % np.uint64(k)).astype(np.int64)

    if split == "test":
        return Subset(source, lambda i: i * k + place(i), blocks)

    def train(i: np.ndarray) -> np.ndarray:
        block, within = np.divmod(i, k - 1)
        tail = block >= blocks  # the last, incomplete block holds nothing out
        inside = block * k + within + (within >= place(block))
        return np.where(tail, blocks * k + i - blocks * (k - 1), inside)

    return Subset(source, train, blocks * (k - 1) + rest)


def _digits(spec: str, what: str, split: str, held_out: float | None) -> Source:
    """Bright values 0 to 16 become 0 to 255, so that they are images like any other."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.round(raw.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = raw.target.astype(np.int64)
    return split_arrays(spec, Arrays({"image": images, "label": labels}), split, held_out or 0.2)


def _npz(spec: str, what: str, split: str, held_out: float | None) -> Source:
    path = Path(what).expanduser()
    if not path.is_file():
        raise UserError(f"data source {spec!r}: no file {path}")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"data source {spec!r}: {path} is not an .npz archive (one array, not several)")
        with file:
            return _npz_split(spec, file, split, held_out)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"data source {spec!r}: cannot read {path}: {error}") from error


def _npz_split(spec: str, file: "np.lib.npyio.NpzFile", split: str, held_out: float | None) -> Source:
    keys = set(file.files)

    def read(end: str) -> Arrays:
        label = file[f"y{end}"]
        if f"x{end}" in keys:
            image = file[f"x{end}"]
        else:
            image = _decode_images(spec, file[f"jpeg{end}"], file[f"offset{end}"])
        if len(image) != len(label):
            raise UserError(
                f"data source {spec!r}: {len(image)} images in x{end} but {len(label)} labels in y{end}"
            )
        if not len(label):
            raise UserError(f"data source {spec!r}: y{end} is empty")
        return Arrays({"image": image, "label": label})

    def has(end: str) -> bool:
        return f"y{end}" in keys and (f"x{end}" in keys or {f"jpeg{end}", f"offset{end}"} <= keys)

    if has("_train") and has("_test"):
        if split != "all":
            return read(f"_{split}")
        train, test = read("_train").columns, read("_test").columns
        return Arrays({name: np.concatenate([train[name], test[name]]) for name in train})
    if has(""):
        return split_arrays(spec, read(""), split, held_out or 0.1)
    raise UserError(
        f"data source {spec!r}: needs the arrays x_train, y_train, x_test, y_test, or x, y, or jpeg_s, "
        f"offset_s, y_s for s in train, test; it holds {', '.join(sorted(keys)) or 'nothing'}"
    )


def _decode_images(spec: str, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """All images of a split, decoded once: uint8 `[n, H, W, C]`."""
    import io

    from PIL import Image, UnidentifiedImageError

    out = None
    for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
        try:
            image = np.asarray(Image.open(io.BytesIO(data[start:stop].tobytes())))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"data source {spec!r}: image {number} cannot be decoded: {error}") from error
        if out is None:
            out = np.empty((len(offsets) - 1, *image.shape), np.uint8)
        if image.shape != out.shape[1:]:
            raise UserError(
                f"data source {spec!r}: image {number} has shape {image.shape}, the first has {out.shape[1:]}"
            )
        out[number] = image
    return np.zeros((0,), np.uint8) if out is None else out


def _late(module: str, name: str) -> Callable[[str, str, str, float | None], Source]:
    """An opener that lives in another module, imported when it is used."""

    def opener(spec: str, what: str, split: str, held_out: float | None) -> Source:
        import importlib

        return getattr(importlib.import_module(f"odjax_train.data.{module}"), name)(
            spec, what, split, held_out
        )

    return opener


# scheme -> (opener, what follows the colon; "" for nothing)
_SCHEMES: dict[str, tuple[Callable[[str, str, str, float | None], Source], str]] = {
    "digits": (_digits, ""),
    "stdlib": (_late("documents", "open_stdlib"), ""),
    "pydoc": (_late("documents", "open_pydoc"), ""),
    "text": (_late("documents", "open_text"), "<file or glob>"),
    "npz": (_npz, "<file>"),
    "tfds": (_late("records", "open_tfds"), "<name>"),
    "arrayrecord": (_late("records", "open_arrayrecord"), "<glob>"),
    "arrayrecord+text": (_late("records", "open_arrayrecord_text"), "<glob>"),
}


def _usage() -> list[str]:
    return [f"{scheme}:{argument}" if argument else scheme for scheme, (_, argument) in _SCHEMES.items()]
