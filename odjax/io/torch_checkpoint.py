"""Reading the checkpoint files of PyTorch with numpy alone, without running what is in them.

`torch.save` writes a pickle, and a pickle names functions that are called when it is read. Here only the few
that stand for dictionaries and tensors are known, and ours are called in their place; every other name is an
error. There are two layouts. Until PyTorch 1.5: five pickles, one after the other (a magic number, a version,
facts of the machine, the objects, the keys of the storages), then for every storage its length as a 64-bit
integer and its bytes. Since 1.6: an uncompressed zip archive with the objects in `data.pkl` and a file
`data/KEY` for every storage. A tensor is a storage with a first element, sizes and strides.

Source: https://pytorch.org/docs/stable/notes/serialization.html; "Restricting Globals" in
https://docs.python.org/3/library/pickle.html.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
"""What the first pickle of the older layout holds."""

VERSION = 1001
"""Of the older layout, in its second pickle."""

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
"""Classes of storages -> dtypes."""


class _Storage(NamedTuple):
    """A storage, or with `begin` a part of one: what the objects' pickle says of it."""

    key: str
    dtype: np.dtype
    begin: int
    count: int


class _Tensor(NamedTuple):
    """A tensor whose storage may not have been read yet; `begin` and `strides` count elements."""

    storage: _Storage
    begin: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load_torch_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint of PyTorch holds, read without PyTorch and without running its code.

    Args:
        path: of a file that `torch.save` wrote, with a dictionary of tensors, numbers, texts, lists and
            dictionaries; a `state_dict`, for example. Tensors may be on any device, and views of each other.

    Returns:
        The dictionary: tensors as read-only numpy arrays (bfloat16 as `ml_dtypes`), those of one storage
        sharing its memory; ordered dictionaries as plain ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, is damaged or truncated, holds something else than a dictionary, or
            names a class or function that is not known, which is then named and was not called.

    Source: https://pytorch.org/docs/stable/notes/serialization.html

    Example:
        >>> from odjax.io import save_safetensors
        >>> state = load_torch_checkpoint("resnet20.th")["state_dict"]  # doctest: +SKIP
        >>> save_safetensors("resnet20.safetensors", state, {"format": "pt"})  # doctest: +SKIP
        >>> load_torch_checkpoint("no-such-file")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'no-such-file'
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        try:
            found = _zipped(file) if start == b"PK\x03\x04" else _legacy(file, path.stat().st_size)
        except _Refused as error:
            raise ValueError(f"{path}: {error}") from None
        except _BROKEN as error:
            raise ValueError(f"{path} is damaged or truncated: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a {type(found).__name__}, needed is a dictionary of tensors: save "
            "model.state_dict()"
        )
    return found


_BIG_ENDIAN = "was written by a big-endian machine: save it again as safetensors there"


class _Refused(Exception):
    """Something that the file asks for and that is not done, in words for the user."""


# What Python's own unpickler and zip reader raise for bytes that mean nothing.
_BROKEN = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    OSError,  # a zip archive that points before its beginning
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,  # also of recursion without end, and of zip archives with a password
    MemoryError,
    struct.error,
)


class _Unpickler(pickle.Unpickler):
    """Knows dictionaries and tensors; refuses every other name before it is looked up.

    Nothing that a file could change (a pickle may set attributes) outlives the reading: functions are made
    anew, classes of storages are their names.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, np.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return name
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            # The newer one has a flag and hooks more.
            return lambda storage, begin, shape, strides, *rest: _tensor(storage, begin, shape, strides)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *rest: tensor
        raise _Refused(
            f"names {module}.{name}, which is not called: only tensors, OrderedDict and plain values are "
            "read; save the state_dict alone, or as safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ValueError(f"{pid!r} is no storage")
        _, kind, key, _, count = pid[:5]
        if kind not in STORAGES or not isinstance(key, str) or not _counts(count):
            raise ValueError(f"{pid!r} is no storage")
        dtype, begin = self.storages.setdefault(key, STORAGES[kind]), 0
        if dtype != STORAGES[kind]:
            raise ValueError(f"storage {key!r} is both {dtype} and {STORAGES[kind]}")
        if len(pid) == 6 and pid[5] is not None:
            _, begin, count = pid[5]  # in the oldest files a storage may be a part of another
            if not _counts(begin, count):
                raise ValueError(f"{pid!r} is no part of a storage")
        return _Storage(key, dtype, begin, count)


def _unpickled(file: BinaryIO) -> tuple[Any, dict[str, np.dtype]]:
    """The objects of the next pickle, and the dtypes of its storages; the file then stands behind it.

    The operations are looked through before they are done: a place in the memo makes the unpickler reserve
    memory for all places before it, so a few damaged bytes could ask for all memory there is.
    """
    start = file.tell()
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise ValueError(f"place {argument} of the memo after {count} operations")
        if operation.name.startswith("EXT"):
            raise _Refused(f"names the registered function {argument}, which is not called")
    size = file.tell() - start
    file.seek(start)
    unpickler = _Unpickler(io.BytesIO(file.read(size)))
    return unpickler.load(), unpickler.storages


def _tensor(storage: Any, begin: Any, shape: Any, strides: Any) -> _Tensor:
    """A tensor that does not leave its storage."""
    if not isinstance(storage, _Storage):
        raise ValueError(f"a tensor's storage is {storage!r}")
    shape, strides = tuple(shape), tuple(strides)
    if not _counts(begin, *shape, *strides) or len(shape) != len(strides):
        raise ValueError(f"a tensor begins at {begin!r}, has sizes {shape} and strides {strides}")
    last = begin + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.count:
        raise ValueError(
            f"a tensor of sizes {shape} and strides {strides} from {begin} on leaves its storage of "
            f"{storage.count} elements"
        )
    return _Tensor(storage, begin, shape, strides)


def _counts(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _legacy(file: BinaryIO, size: int) -> Any:
    """The objects of the older layout."""
    try:
        magic, _ = _unpickled(file)
    except _BROKEN:
        magic = None
    if type(magic) is not int or magic != MAGIC:
        raise _Refused(
            "is not a checkpoint of PyTorch: neither a zip archive nor a pickle with PyTorch's magic number"
        )
    version, _ = _unpickled(file)
    if version != VERSION:
        raise _Refused(f"has version {version!r} of the older layout, {VERSION} can be read")
    if not _unpickled(file)[0]["little_endian"]:
        raise _Refused(_BIG_ENDIAN)
    objects, dtypes = _unpickled(file)
    data = {}
    for key in _unpickled(file)[0]:
        dtype = dtypes[key]
        count = int.from_bytes(_exactly(file, 8, size), "little")
        data[key] = np.frombuffer(_exactly(file, count * dtype.itemsize, size), dtype)
    return _plain(objects, data.__getitem__)


def _exactly(file: BinaryIO, count: int, size: int) -> bytes:
    """The next bytes; never more are asked for than the file has."""
    if count > size - file.tell():
        raise EOFError(f"{count} bytes are needed at {file.tell()}, the file has {size}")
    return file.read(count)


def _zipped(file: BinaryIO) -> Any:
    """The objects of the newer layout."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise _Refused(f"is not a checkpoint of PyTorch: a zip archive with {len(roots)} files data.pkl")
        root = roots[0]
        if f"{root}constants.pkl" in names:
            raise _Refused("is a TorchScript program: save its state_dict instead")

        def content(name: str) -> bytes:
            if archive.getinfo(root + name).compress_type != zipfile.ZIP_STORED:
                raise _Refused(f"is not a checkpoint of PyTorch: {root}{name} is compressed")
            return archive.read(root + name)

        if f"{root}byteorder" in names and content("byteorder") != b"little":
            raise _Refused(_BIG_ENDIAN)
        objects, dtypes = _unpickled(io.BytesIO(content("data.pkl")))
        data = {key: np.frombuffer(content(f"data/{key}"), dtype) for key, dtype in dtypes.items()}
        return _plain(objects, data.__getitem__)


def _plain(objects: Any, read: Callable[[str], np.ndarray]) -> Any:
    """The objects with plain dictionaries, and arrays in place of tensors; what is shared stays shared."""
    done: dict[int, Any] = {}

    def plain(value: Any) -> Any:
        if id(value) not in done:
            done[id(value)] = made(value)
        return done[id(value)]

    def made(value: Any) -> Any:
        if isinstance(value, _Tensor):
            return _array(value, read)
        if isinstance(value, _Storage):
            return _array(_Tensor(value, 0, (value.count,), (1,)), read)
        if isinstance(value, dict):
            return {key: plain(inside) for key, inside in dict.items(value)}
        if isinstance(value, list | tuple):
            return type(value)([plain(inside) for inside in value])
        return value

    return plain(objects)


def _array(tensor: _Tensor, read: Callable[[str], np.ndarray]) -> np.ndarray:
    storage = tensor.storage
    values = read(storage.key)[storage.begin :][: storage.count]
    if len(values) < storage.count:
        raise ValueError(f"storage {storage.key!r} has {len(values)} elements, needed are {storage.count}")
    strides = tuple(stride * values.itemsize for stride in tensor.strides)
    first = values[min(tensor.begin, len(values)) :]
    return np.lib.stride_tricks.as_strided(first, tensor.shape, strides, writeable=False)
