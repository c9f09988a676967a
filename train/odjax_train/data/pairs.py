"""Line-aligned translation pairs, padded to one length."""

import dataclasses

import numpy as np

from odjax_train.data.documents import Documents
from odjax_train.data.examples import Arrays as Columns
from odjax_train.data.packing import digest
from odjax_train.data.sources import Arrays, open_source, split_arrays
from odjax_train.data.tokenizers import Tokenizer
from odjax_train.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class _Side:
    """Lines of one language: ids in one flat array, line i at `starts[i]`, of `sizes[i]` ids."""

    tokens: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class LinePairs:
    """Pairs of lines by number (`read_pairs`).

    Attributes:
        source: the lines to translate.
        target: their translations.
        length: tokens on each side.
        separator: id that begins and ends a target.
        padding: id behind the end.
        cut: how many pairs did not fit.
        left_out: how many pairs had an empty side.
        digest: identifies the content.
    """

    source: _Side
    target: _Side
    length: int
    separator: int
    padding: int
    cut: int
    left_out: int
    digest: str

    def __len__(self) -> int:
        return self.source.sizes.size

    def read(self, rows: np.ndarray, draws: np.ndarray | None = None) -> Columns:
        """Examples by number.

        Args:
            rows: int64 `[B]`.
            draws: not used.

        Returns:
            `source`, `tokens`, `targets` int32, `source_mask` bool and `weights` float32, each `[B, length]`.
        """
        del draws
        source, source_mask = self._padded(self.source, rows, self.length)
        target, target_mask = self._padded(self.target, rows, self.length - 1)
        edge = np.full((len(rows), 1), self.separator, np.int32)
        tokens = np.concatenate([edge, target], axis=1)
        targets = np.concatenate([target, np.full_like(edge, self.padding)], axis=1)
        ends = target_mask.sum(axis=1)
        targets[np.arange(len(rows)), ends] = self.separator
        weights = (np.arange(self.length) <= ends[:, None]).astype(np.float32)
        return {
            "source": source,
            "source_mask": source_mask,
            "tokens": tokens,
            "targets": targets,
            "weights": weights,
        }

    def _padded(self, side: _Side, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        place = np.arange(length)
        mask = place < side.sizes[rows][:, None]
        index = np.minimum(side.starts[rows][:, None] + place, side.tokens.size - 1)
        return np.where(mask, side.tokens[index].astype(np.int32), np.int32(self.padding)), mask


def read_pairs(
    source: str, target: str, split: str, held_out: float, tokenizer: Tokenizer, length: int
) -> LinePairs:
    """Reads and tokenises two line-aligned files.

    Args:
        source: `"text:<file>"`.
        target: `"text:<file>"`.
        split: `"train"`, `"test"` or `"all"` of the pairs.
        held_out: the part of the pairs that is `"test"`.
        tokenizer: of both sides.
        length: tokens on each side, with the separator of a target.

    Raises:
        UserError: a file cannot be read, numbers of lines differ, or no pair is left.
    """
    lines = [read_lines(spec) for spec in (source, target)]
    if len(lines[0]) != len(lines[1]):
        raise UserError(
            f"data sources {source!r} and {target!r} are not line-aligned: {len(lines[0])} and "
            f"{len(lines[1])} lines"
        )
    pairs = [pair for pair in zip(*lines, strict=True) if pair[0].strip() and pair[1].strip()]
    if not pairs:
        raise UserError(f"data sources {source!r} and {target!r}: no line has text on both sides")
    chosen = split_arrays(source, Arrays({"row": np.arange(len(pairs))}), split, held_out).columns["row"]
    sides, cut = [], np.zeros(len(chosen), bool)
    for column, room in ((0, length), (1, length - 1)):
        ids = list(tokenizer.encode_all([pairs[row][column] for row in chosen]))
        sizes = np.array([line.size for line in ids])
        tokens = np.concatenate(ids).astype(np.min_scalar_type(tokenizer.vocab - 1))
        cut |= sizes > room
        sides.append(_Side(tokens, np.cumsum(sizes) - sizes, sizes))
    content = digest(*(array for side in sides for array in (side.tokens, side.starts)))
    left_out = len(lines[0]) - len(pairs)
    return LinePairs(
        *sides, length, tokenizer.separator, tokenizer.padding, int(cut.sum()), left_out, content
    )


def read_lines(spec: str) -> list[str]:
    """The lines of a text file.

    Args:
        spec: `"text:<file>"`, `.gz` too.

    Raises:
        UserError: it cannot be read, or is something else than one file.
    """
    documents = open_source(spec, "all")
    if not isinstance(documents, Documents) or len(documents) != 1:
        raise UserError(f"data source {spec!r}: pairs are read from one text file a side; write text:<file>")
    text = documents[0]["text"]
    return text.decode("utf-8", errors="replace").removesuffix("\n").split("\n")
