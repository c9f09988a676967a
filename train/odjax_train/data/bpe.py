"""Byte-pair tokens learned from the training text itself."""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from odjax_train.data.pairs import read_lines
from odjax_train.data.tokenizers import Text
from odjax_train.errors import UserError

if TYPE_CHECKING:
    import tokenizers

PADDING, SEPARATOR = "<pad>", "</s>"
SMALLEST = 256 + 2
"""All bytes, the padding and the separator."""


@dataclasses.dataclass(frozen=True)
class BpeTokenizer:
    """Byte-pair encoding of UTF-8 bytes, joint for all sources, learned when it is first used.

    What is learned is a function of the text and `vocab` alone. Every text has tokens, an unseen character as
    its bytes; `decode` gives back the text, but for a space at its beginning and what NFC composes. Id 0 is
    the padding and id 1 the separator, which no text contains.

    Args:
        sources: `"text:<file>"`, one sentence a line, `.gz` too.
        vocab: number of ids, at least 258; fewer are used where the text has fewer pairs.
        cache: folder in which what was learned is kept between runs, None to learn it anew (a second for a
            few megabytes).

    Raises:
        UserError: `vocab` is too small or there is no source; on first use: a source that cannot be read.

    Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2.

    Example:
        >>> tokenizer = BpeTokenizer(("text:train.de.gz", "text:train.en.gz"), vocab=8000)
        >>> tokenizer.padding, tokenizer.separator
        (0, 1)
    """

    sources: tuple[str, ...]
    vocab: int = 8000
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        if self.vocab < SMALLEST:
            raise UserError(
                f"vocab must be at least {SMALLEST} (bytes, padding, separator), got {self.vocab}"
            )
        if not self.sources:
            raise UserError("a tokenizer is learned from text: give at least one source, text:<file>")

    padding: int = dataclasses.field(default=0, init=False)
    separator: int = dataclasses.field(default=1, init=False)

    @functools.cached_property
    def name(self) -> str:
        """Size and a digest of what was learned."""
        content = hashlib.blake2b(self._learned.to_str().encode(), digest_size=8).hexdigest()
        return f"bpe-{self.vocab}:{content}"

    @functools.cached_property
    def _learned(self) -> "tokenizers.Tokenizer":
        import tokenizers

        lines = [line for source in self.sources for line in read_lines(source)]
        file = None
        if self.cache is not None:
            content = hashlib.blake2b(digest_size=8)
            for line in (tokenizers.__version__, str(self.vocab), *lines):
                content.update(line.encode() + b"\n")
            file = Path(self.cache).expanduser() / f"bpe-{content.hexdigest()}.json"
        if file is not None and file.is_file():
            found = tokenizers.Tokenizer.from_file(str(file))
        else:
            found = _learn(lines, self.vocab)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_name(f"{file.name}.{os.getpid()}")
                found.save(str(temporary))
                temporary.replace(file)
        found.encode_special_tokens = True  # `</s>` in a text is four characters
        return found

    def encode(self, text: Text) -> np.ndarray:
        """Ids int32 `[n]` of one text, without separators."""
        return next(self.encode_all([text]))

    def encode_all(self, texts: Iterable[Text]) -> Iterator[np.ndarray]:
        """As `encode`, for many texts, a few at once on all cores."""
        decoded = (
            text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text for text in texts
        )
        while group := list(itertools.islice(decoded, 1024)):
            for encoding in self._learned.encode_batch_fast(group, add_special_tokens=False):
                yield np.asarray(encoding.ids, np.int32)

    def decode(self, tokens: np.ndarray | Iterable[int]) -> str:
        """The text of ids `[n]`, without separators and padding."""
        text = self._learned.decode([int(token) for token in tokens], skip_special_tokens=True)
        return text.removeprefix(" ")


def _learn(lines: list[str], vocab: int) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.NFC()
    # A word is the same in the middle of a sentence and at its beginning.
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    learned.decoder = decoders.ByteLevel()
    learned.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[PADDING, SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return learned
