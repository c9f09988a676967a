"""Reading and writing files of tensors in the safetensors format, with numpy alone.

A file is an unsigned 64-bit length (little-endian), a header of that many bytes of JSON (name -> dtype,
shape, place in the data; strings under "__metadata__"), and the data, row-major and little-endian, without
holes.

Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

MAX_HEADER = 100_000_000
"""Bytes; a longer header is refused, as the format asks."""

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
"""Names of the format -> dtypes. Numbers of less than a byte (F4, F6) are not read."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """What a header says of one tensor: its dtype, shape, and first and last place in the data (bytes)."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def load_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Opens a file of tensors without reading the data: arrays are views of the mapped file.

    Pages are read when they are touched. The file must not be changed while the arrays live.

    Args:
      path: of the file.

    Returns:
      name -> read-only array, in the order of the header; bfloat16 and float8 as `ml_dtypes`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the header is truncated, too long or not what the format asks, a name comes twice, a dtype
        is unknown, or the places of the tensors overlap, leave holes, leave the file or do not fit their
        shapes; naming the file and the tensor.

    Source: https://github.com/huggingface/safetensors, section "Format".

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_safetensors(f"{folder}/x.safetensors", {"w": np.arange(3.0)})
      ...     load_safetensors(f"{folder}/x.safetensors")["w"]
      array([0., 1., 2.])
    """
    path = Path(path)
    entries, _, start = _header(path)
    data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)[start:]
    return {name: _view(data, entry) for name, entry in entries.items()}


def safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file of tensors, `{"format": "pt"}` in those of PyTorch.

    Args:
      path: of the file.

    Returns:
      name -> text; empty where the file has none.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: as `load_safetensors`.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_safetensors(f"{folder}/x.safetensors", {}, {"format": "pt"})
      ...     safetensors_metadata(f"{folder}/x.safetensors")
      {'format': 'pt'}
    """
    return _header(Path(path))[1]


def load_shards(folder: str | Path, name: str = "model.safetensors") -> dict[str, np.ndarray]:
    """Opens the weights of a folder: one file, or the shards that its index names.

    Args:
      folder: with `model.safetensors`, or `model.safetensors.index.json` and the files it names.
      name: of the file.

    Returns:
      name -> read-only array.

    Raises:
      FileNotFoundError: neither the file nor its index is there, or a shard is not.
      ValueError: the index names a tensor that is not in its shard, or a shard has others.
    """
    folder = Path(folder)
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return load_safetensors(folder / name)
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {name} nor {index.name}")
    content = _parsed(index, index.read_bytes())
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f"{index}: needs a weight_map of tensor names to file names")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise ValueError(f"{index}: {file!r} must be the name of a file in the same folder")
        shard = load_safetensors(folder / file)
        expected = {tensor for tensor, at in where.items() if at == file}
        if expected != set(shard):
            raise ValueError(
                f"{index}: the tensors of {file} differ from the index: missing "
                f"{sorted(expected - set(shard))}, not in the index {sorted(set(shard) - expected)}"
            )
        tensors |= shard
    return {tensor: tensors[tensor] for tensor in where}


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to a file; the file appears whole or not at all.

    The data of wide dtypes comes first, so that every tensor is aligned; equal tensors give equal files.

    Args:
      path: of the file; an existing one is replaced.
      tensors: name -> numpy or jax array.
      metadata: name -> text; other programs expect `{"format": "pt"}` for weights of PyTorch.

    Raises:
      TypeError: a name or metadata that is no text, or something that is no array.
      ValueError: a dtype that the format has not, the name "__metadata__", or a header above 100 MB.

    Source: https://github.com/huggingface/safetensors, section "Format".

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_safetensors(f"{folder}/x.safetensors", {"w": np.ones(2, np.float32)}, {"format": "pt"})
      ...     load_safetensors(f"{folder}/x.safetensors")["w"].tolist()
      [1.0, 1.0]
    """
    path = Path(path)
    dtypes = {name: _checked(name, value) for name, value in tensors.items()}
    header: dict[str, Any] = {}
    if metadata is not None:
        for name, text in metadata.items():
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError(f"metadata must be text, got {name!r}: {text!r}")
        header["__metadata__"] = dict(metadata)
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, _NAMES[dtypes[name]], name))
    at = 0
    for name in order:
        begin, at = at, at + math.prod(tensors[name].shape) * dtypes[name].itemsize
        header[name] = {
            "dtype": _NAMES[dtypes[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, at],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"the header of {len(tensors)} tensors has {len(text)} bytes, at most {MAX_HEADER} fit"
        )
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                # One at a time: copies of tensors that are turned, or on a device, are not all held at once.
                array = np.asarray(tensors[name], dtypes[name], order="C")
                file.write(array.reshape(-1).view(np.uint8))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(name: Any, value: Any) -> np.dtype:
    """The dtype in which a tensor is written, little-endian."""
    if not isinstance(name, str):
        raise TypeError(f"names of tensors must be text, got {name!r}")
    if name == "__metadata__":
        raise ValueError("'__metadata__' is the place of the metadata: give the tensor another name")
    if not isinstance(value, np.ndarray | np.generic | jax.Array):
        raise TypeError(f"{name!r} must be a numpy or jax array, got {type(value).__name__}")
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name!r} is an array of keys: save jax.random.key_data of it")
    dtype = value.dtype.newbyteorder("<")
    if dtype not in _NAMES:
        raise ValueError(f"{name!r} is {value.dtype}, the format has {', '.join(map(str, _NAMES))}")
    return dtype


def _view(data: np.ndarray, entry: Entry) -> np.ndarray:
    raw = data[entry.begin : entry.end]
    if raw.__array_interface__["data"][0] % entry.dtype.alignment:
        raw = raw.copy()  # another writer's header may end anywhere
        raw.flags.writeable = False
    return raw.view(entry.dtype).reshape(entry.shape)


def _header(path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """The checked header of a file: entries, metadata, and where the data starts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8:
            raise ValueError(f"{path}: {size} bytes are too few for a file of tensors")
        if length > MAX_HEADER:
            raise ValueError(
                f"{path}: a header of {length} bytes is above the {MAX_HEADER} that the format allows; "
                "this may be no safetensors file"
            )
        text = file.read(length)
    if len(text) < length:
        raise ValueError(f"{path}: the header is truncated: {len(text)} of {length} bytes")
    if not text.startswith(b"{"):
        raise ValueError(f"{path}: the header must start with '{{', got {text[:8]!r}")
    header = _parsed(path, text)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map text to text")
    start = 8 + length
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    _check_places(path, entries, size - start)
    return entries, metadata, start


def _parsed(path: Path, text: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path}: {double!r} comes twice")
        return found

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8: {error}") from None


def _entry(path: Path, name: str, entry: Any) -> Entry:
    """One entry of a header, checked on its own."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} needs dtype, shape and data_offsets, got {entry!r}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        hint = "; numbers of less than a byte are not read" if re.match("F[46]", str(entry["dtype"])) else ""
        raise ValueError(f"{where} has dtype {entry['dtype']!r}, known are {', '.join(DTYPES)}{hint}")
    if not counts(entry["shape"]):
        raise ValueError(f"{where} has shape {entry['shape']!r}, sizes must be whole numbers from 0")
    if not counts(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        raise ValueError(f"{where} has data_offsets {entry['data_offsets']!r}, needed are [begin, end]")
    begin, end = entry["data_offsets"]
    expected = math.prod(entry["shape"]) * dtype.itemsize
    if end - begin != expected:
        raise ValueError(
            f"{where} has {end - begin} bytes of data [{begin}, {end}], but {entry['dtype']} of shape "
            f"{entry['shape']} has {expected}"
        )
    return Entry(dtype, tuple(entry["shape"]), begin, end)


def _check_places(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """The tensors must cover the data once, from its first byte to its last."""
    at, last = 0, None
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        where = f"{path}: tensor {name!r} [{entry.begin}, {entry.end}]"
        if entry.end > size:
            raise ValueError(
                f"{where} is out of range: the file has {size} bytes of data, it may be truncated"
            )
        if entry.begin < at:
            raise ValueError(f"{where} overlaps {last!r}, which ends at {at}")
        if entry.begin > at:
            raise ValueError(f"{where} leaves a hole: the data before it ends at {at}")
        at, last = entry.end, name
    if at != size:
        raise ValueError(f"{path}: the tensors end at {at}, but the file has {size} bytes of data")
