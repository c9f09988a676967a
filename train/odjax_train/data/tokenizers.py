"""Text to token ids and back: bytes, or a Hugging Face `tokenizer.json`."""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from odjax_train.errors import UserError

if TYPE_CHECKING:
    import tokenizers

Text = str | bytes

_END_OF_TEXT = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")


@runtime_checkable
class Tokenizer(Protocol):
    """What a data set needs of a tokenizer.

    Attributes:
        name: identifies it in run records and caches.
        vocab: number of ids, the model's vocabulary.
        separator: the id between documents; it begins and ends each of them.
        padding: the id where there is no token; it never counts in a loss.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab(self) -> int: ...
    @property
    def separator(self) -> int: ...
    @property
    def padding(self) -> int: ...

    def encode(self, text: Text) -> np.ndarray:
        """Ids int32 `[n]` of one text, without separators."""
        ...

    def encode_all(self, texts: Iterable[Text]) -> Iterator[np.ndarray]:
        """As `encode`, for many texts."""
        ...

    def decode(self, tokens: np.ndarray | Iterable[int]) -> str:
        """The text of ids `[n]`, without separators and padding."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as ids: a vocabulary of exactly 256.

    The bytes 0xF8 to 0xFF never occur in UTF-8, so 0xFF separates documents and 0xFE is padding. What is not
    valid UTF-8 becomes U+FFFD first; valid text comes back unchanged.

    >>> ByteTokenizer().decode(ByteTokenizer().encode("Ωmega"))
    'Ωmega'
    """

    name: str = dataclasses.field(default="byte", init=False)
    vocab: int = dataclasses.field(default=256, init=False)
    separator: int = dataclasses.field(default=0xFF, init=False)
    padding: int = dataclasses.field(default=0xFE, init=False)

    def encode(self, text: Text) -> np.ndarray:
        """Ids int32 `[n]` of one text, without separators."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int32)

    def encode_all(self, texts: Iterable[Text]) -> Iterator[np.ndarray]:
        """As `encode`, for many texts."""
        return map(self.encode, texts)

    def decode(self, tokens: np.ndarray | Iterable[int]) -> str:
        """The text of ids `[n]`; separators and padding are left out, broken UTF-8 becomes U+FFFD."""
        ids = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens), np.int64)
        return ids[(ids >= 0) & (ids < 0xF8)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


BYTES = ByteTokenizer()


@dataclasses.dataclass(frozen=True)
class SizedTokenizer:
    """A vocabulary's size alone: enough to plan a run, not to make one.

    Args:
        vocab: number of ids.

    Raises:
        UserError: when a text is given to it.
    """

    vocab: int

    @property
    def name(self) -> str:
        """The flag that makes it."""
        return f"vocab:{self.vocab}"

    @property
    def separator(self) -> int:
        """The last id."""
        return self.vocab - 1

    @property
    def padding(self) -> int:
        """The id before."""
        return self.vocab - 2

    def encode(self, text: Text) -> np.ndarray:
        """There is nothing to encode with."""
        raise UserError(
            f"tokenizer {self.name} is the size of a vocabulary, for odjax plan: it has no tokens"
        )

    def encode_all(self, texts: Iterable[Text]) -> Iterator[np.ndarray]:
        """As `encode`."""
        return map(self.encode, texts)

    def decode(self, tokens: np.ndarray | Iterable[int]) -> str:
        """There is nothing to decode with."""
        return self.encode("")


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` package.

    Opened when it is first used. The separator is, in this order: `separator_token`, the `eos_token` of a
    `tokenizer_config.json` beside the file, a well-known end-of-text token.

    Args:
        file: path of the `tokenizer.json`.
        separator_token: the token between documents, None to find it.

    Raises:
        UserError: on first use: the file is missing or not a tokenizer, or has no separator.
    """

    file: str | Path
    separator_token: str | None = None

    @functools.cached_property
    def _content(self) -> bytes:
        try:
            return Path(self.file).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"tokenizer {self.file}: cannot read it: {error.strerror or error}") from error

    @functools.cached_property
    def _tokenizer(self) -> "tokenizers.Tokenizer":
        import tokenizers

        try:
            return tokenizers.Tokenizer.from_str(self._content.decode())
        except Exception as error:  # the package raises bare Exception
            reason = str(error).splitlines()[0]
            raise UserError(f"tokenizer {self.file}: not a tokenizer.json: {reason}") from error

    @functools.cached_property
    def name(self) -> str:
        """File name and a digest of the content."""
        digest = hashlib.blake2b(self._content, digest_size=8).hexdigest()
        return f"{Path(self.file).name}:{digest}:{self.separator}"

    @functools.cached_property
    def vocab(self) -> int:
        """Largest id + 1, with added tokens."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def separator(self) -> int:
        """Id of the token between documents."""
        found = self._separator_token()
        if found is None:
            raise UserError(
                f"tokenizer {self.file}: no end-of-text token found (looked for {', '.join(_END_OF_TEXT)}); "
                "name it with separator_token="
            )
        return self._tokenizer.token_to_id(found)

    @functools.cached_property
    def padding(self) -> int:
        """Id of the padding token, the separator when there is none."""
        for token in ("<pad>", "[PAD]", "<|pad|>"):
            if (number := self._tokenizer.token_to_id(token)) is not None:
                return number
        return self.separator

    def _separator_token(self) -> str | None:
        if self.separator_token is not None:
            if self._tokenizer.token_to_id(self.separator_token) is None:
                raise UserError(f"tokenizer {self.file}: it has no token {self.separator_token!r}")
            return self.separator_token
        config = Path(self.file).expanduser().with_name("tokenizer_config.json")
        declared = []
        if config.is_file():
            token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            declared = [token["content"] if isinstance(token, dict) else token]
        known = (token for token in (*declared, *_END_OF_TEXT) if token)
        return next((token for token in known if self._tokenizer.token_to_id(token) is not None), None)

    def encode(self, text: Text) -> np.ndarray:
        """Ids int32 `[n]` of one text, without separators or any other special token."""
        return next(self.encode_all([text]))

    def encode_all(self, texts: Iterable[Text]) -> Iterator[np.ndarray]:
        """As `encode`, for many texts, a few at once on all cores."""
        decoded = (
            text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text for text in texts
        )
        while group := list(itertools.islice(decoded, 64)):
            for encoding in self._tokenizer.encode_batch_fast(group, add_special_tokens=False):
                yield np.asarray(encoding.ids, np.int32)

    def decode(self, tokens: np.ndarray | Iterable[int]) -> str:
        """The text of ids `[n]`, without special tokens."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a flag names.

    Args:
        spec: `"byte"`, the path of a `tokenizer.json` (or of a folder that holds one), or `"vocab:32000"`: a
            size alone, for plans.

    Raises:
        UserError: no such file.

    >>> load_tokenizer("byte").vocab
    256
    """
    if spec == "byte":
        return ByteTokenizer()
    if re.fullmatch(r"vocab:\d+", spec):
        return SizedTokenizer(int(spec.removeprefix("vocab:")))
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"tokenizer {spec}: no such file; give `byte`, the path of a tokenizer.json, or for a plan alone "
            "the size of the vocabulary, such as vocab:32000"
        )
    return HuggingFaceTokenizer(path)
