"""Text files as records: one document a file, the standard library's own source among them."""

import dataclasses
import glob
import gzip
import hashlib
import sysconfig
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from odjax_train.errors import UserError

_STDLIB_EXCLUDED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "pydoc_data",
}
_HELD_OUT_OF_FILES = 1 / 16
_HELD_OUT_OF_A_FILE = 1 / 10


@dataclasses.dataclass(frozen=True)
class Document:
    """A file, or the part of it between two byte offsets.

    Attributes:
        name: path as it is shown and hashed: relative, with forward slashes.
        path: where it is.
        start: first byte of the uncompressed text.
        stop: byte after the last, None for the end.
    """

    name: str
    path: Path
    start: int = 0
    stop: int | None = None


class Documents:
    """Records `{"text": bytes, "name": str}`, read from disk when asked for.

    Args:
        spec: named in errors.
        documents: what to read.
    """

    def __init__(self, spec: str, documents: Sequence[Document]) -> None:
        self.spec = spec
        self.documents = tuple(documents)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, bytes | str]:
        document = self.documents[index]
        text = read_bytes(self.spec, document.path)[document.start : document.stop]
        return {"text": text, "name": document.name}


def read_bytes(spec: str, path: Path) -> bytes:
    """A whole file, uncompressed when its name ends in `.gz`.

    Raises:
        UserError: naming the spec and the path, when it cannot be read.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data source {spec!r}: cannot read {path}: {reason}") from error


def open_stdlib(spec: str, what: str, split: str, held_out: float | None) -> Documents:
    """The `.py` files of the running Python's standard library: real text on every machine.

    Without installed packages, the library's own tests, bytecode, the manual (`open_pydoc`), and the files
    that describe the build or the machine. Another Python version is another corpus.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        machine = parts[-1].startswith("_sysconfigdata") or parts[-1] in (
            "sitecustomize.py",
            "usercustomize.py",
        )
        if not machine and not _STDLIB_EXCLUDED.intersection(parts[:-1]):
            found.append(Document("/".join(parts), path))
    if not found:
        raise UserError(f"data source {spec!r}: no .py files under {root}; use text:<file or glob> instead")
    return Documents(spec, _split_files(found, split, held_out))


class Texts:
    """Records `{"text": bytes, "name": str}` held in memory.

    Args:
        texts: text by name.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = tuple(texts.items())

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, bytes | str]:
        name, text = self._texts[index]
        return {"text": text.encode(), "name": name}


def open_pydoc(spec: str, what: str, split: str, held_out: float | None) -> Texts:
    """The topics of the Python language reference that `help()` shows: half a megabyte of English prose.

    Another Python version is another corpus.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            f"data source {spec!r}: this Python has no pydoc_data; use text:<file or glob> instead"
        ) from error
    names = _split_names(sorted(topics), split, held_out)
    return Texts({name: topics[name] for name in names})


def open_text(spec: str, what: str, split: str, held_out: float | None) -> Documents:
    """Text files by name or glob (`**` for any depth).

    Of several files, those whose name hashes low are held out, at least one. Of a single file, the end is
    held out, cut behind a line.
    """
    pattern = Path(what).expanduser()
    if pattern.is_dir():
        raise UserError(
            f"data source {spec!r}: {pattern} is a folder; write text:{pattern}/* or text:{pattern}/**/*.txt"
        )
    if pattern.is_file():
        return Documents(spec, _split_file(spec, pattern, split, held_out))
    paths = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if Path(name).is_file())
    if not paths:
        raise UserError(f"data source {spec!r}: no file matches {pattern}")
    if len(paths) == 1:
        return Documents(spec, _split_file(spec, paths[0], split, held_out))
    root = _fixed_part(pattern)
    found = [Document(path.relative_to(root).as_posix(), path) for path in paths]
    return Documents(spec, _split_files(found, split, held_out))


def _fixed_part(pattern: Path) -> Path:
    """The folders before the first wildcard; names are relative to it, so a moved corpus splits alike."""
    fixed = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _split_files(found: list[Document], split: str, held_out: float | None) -> list[Document]:
    names = set(_split_names([document.name for document in found], split, held_out))
    return [document for document in found if document.name in names]


def _split_names(names: list[str], split: str, held_out: float | None) -> list[str]:
    if split == "all":
        return names
    part = _HELD_OUT_OF_FILES if held_out is None else held_out
    hashes = [_hash(name) for name in names]
    # At least one is held out, and at least one is not.
    low, high = min(hashes), max(hashes)
    held = [(number < part or number == low) and number != high for number in hashes]
    return [name for name, out in zip(names, held, strict=True) if out == (split == "test")]


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big") / 2**48


def _split_file(spec: str, path: Path, split: str, held_out: float | None) -> list[Document]:
    text = read_bytes(spec, path)
    if not text.strip():
        raise UserError(f"data source {spec!r}: {path} is empty")
    if split == "all":
        return [Document(path.name, path)]
    part = _HELD_OUT_OF_A_FILE if held_out is None else held_out
    cut = _cut(text, round(len(text) * (1 - part)))
    if not 0 < cut < len(text):
        raise UserError(
            f"data source {spec!r}: {path} is too short ({len(text)} bytes) to hold out a part of it"
        )
    return [Document(path.name, path, 0, cut) if split == "train" else Document(path.name, path, cut)]


def _cut(text: bytes, near: int) -> int:
    """Behind the last line that ends at or before `near`; without one, between two characters."""
    cut = text.rfind(b"\n", 0, near) + 1
    if cut:
        return cut
    while 0 < near < len(text) and text[near] & 0xC0 == 0x80:
        near -= 1
    return near
