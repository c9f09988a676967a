"""The data of an experiment: `Text`, `Images` and `Pairs`.

They are descriptions: making one and asking for its `element_spec` touches no file, so a plan can be made
where the data is not. The data is opened by the first `train`, `evaluation` or `describe`, and stays in
memory.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from odjax_train.data import packing
from odjax_train.data.examples import Examples
from odjax_train.data.images import ImageReader, image_columns
from odjax_train.data.pairs import LinePairs, read_pairs
from odjax_train.data.sources import Source, open_source, records
from odjax_train.data.tokenizers import BYTES, Tokenizer
from odjax_train.errors import UserError

Spec = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Documents packed into sequences, for language models (`packing` says how).

    Examples hold `tokens`, `targets`, `segments`, `positions` (int32 `[length]`) and `weights` (float32
    `[length]`).

    Args:
        source: what `open_source` opens; its records have a field `field` of UTF-8 text, or of token ids.
        length: tokens in an example.
        tokenizer: `ByteTokenizer()` or `load_tokenizer(path)`.
        evaluation_source: judged on instead of the held-out part of `source`.
        held_out: the part of `source` that is held out, None for the source's own habit.
        field: name of the text in a record.
        cache: a folder in which tokens are kept between runs and from which they are mapped instead of being
            held in memory (1 byte a token for bytes, 2 or 4 for larger vocabularies). None: tokenised anew by
            each process.

    Raises:
        UserError: `length` or `held_out` makes no sense; later, when the data is opened, what is wrong with
            the data.

    >>> Text(source="text:book.txt", length=64).element_spec()["tokens"]
    ShapeDtypeStruct(shape=(64,), dtype=int32)
    """

    source: str = "stdlib"
    length: int = 128
    tokenizer: Tokenizer = BYTES
    evaluation_source: str | None = None
    held_out: float | None = None
    field: str = "text"
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        _positive("length", self.length)
        _fraction("held_out", self.held_out)

    def element_spec(self) -> Spec:
        """Shapes and dtypes of one example."""
        integers = ("tokens", "targets", "segments", "positions")
        spec = {name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in integers}
        return {**spec, "weights": jax.ShapeDtypeStruct((self.length,), np.float32)}

    def train(self, seed: int) -> Examples:
        """Endless; the seed orders the documents, and shuffles the examples anew every epoch."""
        corpus = self._train
        tokens = int(corpus.starts[-1])
        if tokens < self.length:
            raise UserError(
                f"data source {self.source!r}: length {self.length} is longer than its whole text of "
                f"{tokens} tokens; use a shorter length"
            )
        packed = self._packed(corpus, seed)
        return Examples(packed.read, len(packed), seed=seed, fingerprint=self._fingerprint(corpus))

    def evaluation(self) -> Examples:
        """The held-out documents, in a fixed order."""
        packed = self._packed(self._evaluation, None)
        return Examples(packed.read, len(packed), fingerprint=self._fingerprint(self._evaluation))

    def describe(self) -> dict[str, Any]:
        """What was found; opens the data."""
        out: dict[str, Any] = {"source": self.source, "tokenizer": self.tokenizer.name}
        for part, corpus in (("train", self._train), ("evaluation", self._evaluation)):
            tokens = int(corpus.starts[-1])
            out[f"{part}_documents"] = int(corpus.starts.size - 1)
            out[f"{part}_tokens"] = tokens
            out[f"{part}_examples"] = -(-tokens // self.length)
            out[f"{part}_fingerprint"] = self._fingerprint(corpus)
        return out

    @functools.cached_property
    def _train(self) -> packing.Corpus:
        return self._corpus(self.source, "train" if self.evaluation_source is None else "all")

    @functools.cached_property
    def _evaluation(self) -> packing.Corpus:
        if self.evaluation_source is None:
            return self._corpus(self.source, "test")
        return self._corpus(self.evaluation_source, "all")

    def _corpus(self, spec: str, split: str) -> packing.Corpus:
        source = open_source(spec, split, held_out=self.held_out)
        tokenizer = self.tokenizer
        separator = {"separator": tokenizer.separator, "vocab": tokenizer.vocab}
        if self.cache is None:
            corpus = packing.corpus(self._tokens(spec, source), **separator)
        else:
            kept = Path(self.cache).expanduser() / _cache_name(
                spec, split, source, self.field, tokenizer.name
            )
            corpus = packing.stored_corpus(kept, None, **separator)
            if corpus is None:
                corpus = packing.stored_corpus(kept, self._tokens(spec, source), **separator)
        if not corpus.starts[-1]:
            raise UserError(
                f"data source {spec!r}: all {len(source)} documents of its {split} part are empty"
            )
        return corpus

    def _tokens(self, spec: str, source: Source) -> Iterator[np.ndarray]:
        first = source[0] if len(source) else {}
        if len(source) and self.field not in first:
            found = ", ".join(sorted(first))
            raise UserError(
                f"data source {spec!r}: its records have no field {self.field!r}; they hold {found}"
            )
        values = (record[self.field] for record in records(source))
        if isinstance(first.get(self.field), np.ndarray) and first[self.field].dtype.kind in "iu":
            return self._checked(spec, values)
        return self.tokenizer.encode_all(values)

    def _checked(self, spec: str, values: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for number, ids in enumerate(values):
            if ids.size and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab:
                raise UserError(
                    f"data source {spec!r}: record {number} has token ids from {ids.min()} to {ids.max()}, "
                    f"the tokenizer {self.tokenizer.name} has 0 to {self.tokenizer.vocab - 1}"
                )
            yield ids

    def _packed(self, corpus: packing.Corpus, seed: int | None) -> packing.Packed:
        separator, padding = self.tokenizer.separator, self.tokenizer.padding
        return packing.pack(corpus, self.length, separator=separator, padding=padding, seed=seed)

    def _fingerprint(self, corpus: packing.Corpus) -> str:
        content = packing.digest(np.asarray(corpus.starts), corpus.tokens)
        return _identity(content, self.length, self.tokenizer.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images.

    Examples hold `image` (float32 `[H, W, C]`), `label` (int32) and `weight` (float32, 1). uint8 images are
    scaled to [0, 1]; with `mean` and `std` they are standardised after that. Training images are moved and
    mirrored at random when asked; what happens to an image depends on (seed, place in the stream) alone.

    Args:
        source: what `open_source` opens; its records have fields `image` and `label`.
        shape: height, width, channels. Images without a channel dimension get one.
        classes: labels are in `[0, classes)`.
        evaluation_source: judged on instead of the test part of `source`.
        held_out: the part of `source` that is held out when it has no test part.
        mean: of each channel, in units of [0, 1].
        std: of each channel.
        shift: largest random move in pixels, up, down, left and right; zeros come in.
        flip: mirror left to right, half of the time.

    Raises:
        UserError: an argument makes no sense; later, an image of another shape or a label outside the
            classes.

    >>> data = Images(source="digits")
    >>> data.train(seed=0)[0]["image"].shape, len(data.evaluation())
    ((8, 8, 1), 359)
    """

    source: str = "digits"
    shape: tuple[int, int, int] = (8, 8, 1)
    classes: int = 10
    evaluation_source: str | None = None
    held_out: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        _fraction("held_out", self.held_out)
        _positive("classes", self.classes)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise UserError(f"shape must be (height, width, channels), got {self.shape}")
        if (self.mean is None) != (self.std is None):
            raise UserError("mean and std belong together; give both or neither")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.shape[2]:
                raise UserError(
                    f"{name} has {len(values)} values; shape {self.shape} has {self.shape[2]} channels"
                )
        if self.std is not None and min(self.std) <= 0:
            raise UserError(f"std must be positive, got {self.std}")
        if not 0 <= self.shift < min(self.shape[:2]):
            raise UserError(
                f"shift must be from 0 to below the image's sides {self.shape[:2]}, got {self.shift}"
            )

    def element_spec(self) -> Spec:
        """Shapes and dtypes of one example."""
        return {
            "image": jax.ShapeDtypeStruct(self.shape, np.float32),
            "label": jax.ShapeDtypeStruct((), np.int32),
            "weight": jax.ShapeDtypeStruct((), np.float32),
        }

    def train(self, seed: int) -> Examples:
        """Endless and shuffled anew every epoch."""
        reader = dataclasses.replace(self._train, shift=self.shift, flip=self.flip)
        return Examples(
            reader.read, len(reader), seed=seed, fingerprint=self._fingerprint(reader), threads=reader.threads
        )

    def evaluation(self) -> Examples:
        """The test part, in a fixed order, not augmented."""
        reader = self._evaluation
        return Examples(
            reader.read, len(reader), fingerprint=self._fingerprint(reader), threads=reader.threads
        )

    def describe(self) -> dict[str, Any]:
        """What was found; opens the data."""
        out: dict[str, Any] = {"source": self.source, "classes": self.classes}
        for part, reader in (("train", self._train), ("evaluation", self._evaluation)):
            out[f"{part}_examples"] = len(reader)
            out[f"{part}_fingerprint"] = self._fingerprint(reader)
        return out

    @functools.cached_property
    def _train(self) -> ImageReader:
        return self._reader(self.source, "train" if self.evaluation_source is None else "all")

    @functools.cached_property
    def _evaluation(self) -> ImageReader:
        if self.evaluation_source is None:
            return self._reader(self.source, "test")
        return self._reader(self.evaluation_source, "all")

    def _reader(self, spec: str, split: str) -> ImageReader:
        source = open_source(spec, split, held_out=self.held_out)
        return image_columns(
            spec, source, shape=self.shape, classes=self.classes, mean=self.mean, std=self.std
        )

    def _fingerprint(self, reader: ImageReader) -> str:
        augment = (self.shift, self.flip, self.mean, self.std)
        return _identity(reader.digest, self.shape, self.classes, augment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Sentences and their translations, line by line.

    Examples hold `source` (int32 `[length]`), `source_mask` (bool `[length]`, true on tokens), `tokens` (the
    decoder's input: a separator, then the target), `targets` (the target, then a separator) (int32
    `[length]`) and `weights` (float32 `[length]`, 1 on targets). What does not fit is cut off, and `describe`
    says how often; a pair with an empty side is left out.

    Args:
        source: `"text:<file>"`, one sentence a line, `.gz` too.
        target: `"text:<file>"`, its translations, as many lines.
        evaluation_source: judged on instead of a held-out part.
        evaluation_target: belongs to `evaluation_source`.
        length: tokens on each side, with the separator.
        tokenizer: of both sides.
        held_out: the part of the lines that is held out where there is no `evaluation_source`.

    Raises:
        UserError: an argument makes no sense; later, numbers of lines that differ.
    """

    source: str
    target: str
    evaluation_source: str | None = None
    evaluation_target: str | None = None
    length: int = 128
    tokenizer: Tokenizer = BYTES
    held_out: float = 0.05

    def __post_init__(self) -> None:
        _positive("length", self.length)
        _fraction("held_out", self.held_out)
        if (self.evaluation_source is None) != (self.evaluation_target is None):
            raise UserError("evaluation_source and evaluation_target belong together; give both or neither")

    def element_spec(self) -> Spec:
        """Shapes and dtypes of one example."""
        spec = {
            name: jax.ShapeDtypeStruct((self.length,), np.int32) for name in ("source", "tokens", "targets")
        }
        spec["source_mask"] = jax.ShapeDtypeStruct((self.length,), np.bool_)
        return {**spec, "weights": jax.ShapeDtypeStruct((self.length,), np.float32)}

    def train(self, seed: int) -> Examples:
        """Endless and shuffled anew every epoch."""
        pairs = self._train
        return Examples(pairs.read, len(pairs), seed=seed, fingerprint=self._fingerprint(pairs))

    def evaluation(self) -> Examples:
        """The held-out pairs, in a fixed order."""
        pairs = self._evaluation
        return Examples(pairs.read, len(pairs), fingerprint=self._fingerprint(pairs))

    def describe(self) -> dict[str, Any]:
        """What was found; opens the data."""
        out: dict[str, Any] = {"source": self.source, "target": self.target, "tokenizer": self.tokenizer.name}
        for part, pairs in (("train", self._train), ("evaluation", self._evaluation)):
            out[f"{part}_examples"] = len(pairs)
            out[f"{part}_cut"] = pairs.cut
            out[f"{part}_left_out"] = pairs.left_out
            out[f"{part}_fingerprint"] = self._fingerprint(pairs)
        return out

    @functools.cached_property
    def _train(self) -> LinePairs:
        split = "train" if self.evaluation_source is None else "all"
        return read_pairs(self.source, self.target, split, self.held_out, self.tokenizer, self.length)

    @functools.cached_property
    def _evaluation(self) -> LinePairs:
        if self.evaluation_source is None or self.evaluation_target is None:
            return read_pairs(self.source, self.target, "test", self.held_out, self.tokenizer, self.length)
        source, target = self.evaluation_source, self.evaluation_target
        return read_pairs(source, target, "all", self.held_out, self.tokenizer, self.length)

    def _fingerprint(self, pairs: LinePairs) -> str:
        return _identity(pairs.digest, self.length, self.tokenizer.name)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")


def _fraction(name: str, value: float | None) -> None:
    if value is not None and not 0.0 < value < 1.0:
        raise UserError(f"{name} must be between 0 and 1, got {value}")


def _identity(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _cache_name(spec: str, split: str, source: Source, field: str, tokenizer: str) -> str:
    """Changes with the data, which is not read whole: sizes and times of files, samples of other records."""
    if hasattr(source, "documents"):
        seen = [
            (d.name, d.start, d.stop, d.path.stat().st_size, d.path.stat().st_mtime_ns)
            for d in source.documents
        ]
    else:
        places = np.unique(np.linspace(0, len(source) - 1, 64).astype(int)) if len(source) else []
        seen = [(len(source), [str(source[int(place)].get(field)) for place in places])]
    return _identity(spec, split, seen, field, tokenizer)
