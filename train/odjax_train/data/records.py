"""Records from storage: ArrayRecord files, and data sets that tensorflow-datasets has prepared as such.

An ArrayRecord file of ours holds one msgpack map a record (`flax.serialization.msgpack_serialize`): names to
arrays, bytes, text or numbers. `write_arrayrecord` writes it. Raw text records (`arrayrecord+text:`) are
UTF-8, one document each.
"""

import glob
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import flax.serialization

from odjax_train.data.sources import Record, Source, split_records
from odjax_train.errors import UserError

_HELD_OUT = 0.1


def write_arrayrecord(path: str | Path, records: Iterable[Record | bytes]) -> int:
    """Writes an ArrayRecord file that `arrayrecord:<path>` reads.

    Args:
        path: the file; it appears under its name when it is complete.
        records: dicts of arrays, bytes, text and numbers; or bytes, which are stored as they are
            (`arrayrecord+text:`).

    Returns:
        Number of records written.

    Raises:
        TypeError: a record is neither a dict nor bytes.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    # One record a group: what is read is what was asked for, at any place.
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    count = 0
    try:
        for record in records:
            if not isinstance(record, dict | bytes):
                raise TypeError(f"record {count} is a {type(record).__name__}; needed a dict or bytes")
            data = record if isinstance(record, bytes) else flax.serialization.msgpack_serialize(dict(record))
            writer.write(data)
            count += 1
        writer.close()
        temporary.replace(path)
    finally:
        if writer.is_open():
            writer.close()
        temporary.unlink(missing_ok=True)
    return count


class Decoded:
    """Stored records, decoded when they are read.

    Args:
        spec: named in errors.
        stored: the bytes by number.
        decode: bytes of one record -> record.
    """

    def __init__(self, spec: str, stored: Any, decode: Callable[[bytes], Record]) -> None:
        self.spec = spec
        self.stored = stored
        self.decode = decode

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> Record:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        return [
            self._decode(data, index)
            for data, index in zip(self.stored.__getitems__(indices), indices, strict=True)
        ]

    def _decode(self, data: bytes, index: int) -> Record:
        try:
            record = self.decode(data)
        except Exception as error:  # whatever a decoder meets in foreign bytes
            raise UserError(
                f"data source {self.spec!r}: record {index} cannot be decoded: {error}; for raw text "
                "write arrayrecord+text:"
            ) from error
        if not isinstance(record, dict):
            raise UserError(
                f"data source {self.spec!r}: record {index} is a {type(record).__name__}, not a map; for raw "
                "text write arrayrecord+text:"
            )
        return record


def open_arrayrecord(spec: str, what: str, split: str, held_out: float | None) -> Source:
    """ArrayRecord files of msgpack maps."""
    return _open_arrayrecord(spec, what, split, held_out, flax.serialization.msgpack_restore)


def open_arrayrecord_text(spec: str, what: str, split: str, held_out: float | None) -> Source:
    """ArrayRecord files of raw text."""
    return _open_arrayrecord(spec, what, split, held_out, _text)


def _text(data: bytes) -> Record:
    return {"text": data}


def _open_arrayrecord(
    spec: str, what: str, split: str, held_out: float | None, decode: Callable[[bytes], Record]
) -> Source:
    import grain

    paths = sorted(glob.glob(str(Path(what).expanduser()), recursive=True))
    paths = [path for path in paths if Path(path).is_file()]
    if not paths:
        raise UserError(f"data source {spec!r}: no file matches {what}")
    for path in paths:
        if not Path(path).stat().st_size:
            raise UserError(f"data source {spec!r}: {path} is empty")
    try:
        stored = grain.sources.ArrayRecordDataSource(paths)
        size = len(stored)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"data source {spec!r}: cannot read {', '.join(paths)}: {reason}") from error
    if not size:
        raise UserError(f"data source {spec!r}: {', '.join(paths)} hold no records")
    return split_records(spec, Decoded(spec, stored, decode), split, held_out or _HELD_OUT)


def open_tfds(spec: str, what: str, split: str, held_out: float | None) -> Source:
    """A data set of tensorflow-datasets through its random-access reader, which needs no TensorFlow.

    `train` and `test` are the data set's own (`validation` where there is no `test`; a part of `train` where
    there is neither). `tfds:<name>@<split>` takes that TFDS split as everything there is. A data set that is
    not prepared yet is downloaded and prepared once, under the folder that tensorflow-datasets itself chooses
    (`TFDS_DATA_DIR`).
    """
    import tensorflow_datasets as tfds

    name, _, only = what.partition("@")
    try:
        builder = tfds.builder(name, file_format="array_record")
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise UserError(f"data source {spec!r}: {str(error).splitlines()[0]}") from error
    try:
        builder.download_and_prepare()
    except Exception as error:  # a download and foreign code: anything can come
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data source {spec!r}: not prepared under {builder.data_dir} and preparing it failed "
            f"({reason}); run `tfds build {name} --file_format=array_record` where TensorFlow is installed "
            "and copy the folder here"
        ) from error
    known = set(builder.info.splits)
    if only:
        return split_records(spec, _tfds_records(spec, builder, only), split, held_out or _HELD_OUT)
    test = next((part for part in ("test", "validation") if part in known or not known), None)
    if split == "all":
        return _tfds_records(spec, builder, "+".join(sorted(known)) or "train")
    if test is None:
        return split_records(spec, _tfds_records(spec, builder, "train"), split, held_out or _HELD_OUT)
    return _tfds_records(spec, builder, "train" if split == "train" else test)


def _tfds_records(spec: str, builder: Any, split: str) -> Source:
    try:
        source = builder.as_data_source(split)
    except NotImplementedError as error:
        raise UserError(
            f"data source {spec!r}: the data set under {builder.data_dir} was not prepared as array_record; "
            "delete it or set TFDS_DATA_DIR to another folder"
        ) from error
    except (ValueError, KeyError) as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"data source {spec!r}: no split {split!r}; there are {known}") from error
    if not len(source):
        raise UserError(f"data source {spec!r}: split {split!r} is empty")
    return source
