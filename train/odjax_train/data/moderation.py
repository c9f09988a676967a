"""Texts with labels of harm, some missing: JSON lines, padded to one length; how a guard is judged."""

import dataclasses
import functools
import gzip
import json
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from odjax.core import Statistic
from odjax.core.average_precision import average_precision_over
from odjax.lowrank import PositiveWeights, positive_weights
from odjax_train.data.examples import Arrays, Examples
from odjax_train.data.packing import digest
from odjax_train.errors import UserError
from odjax_train.measures import Found, Measure, Pass
from odjax_train.tasks import Batch, Variables

CATEGORIES = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
"""Of Markov et al. 2022: sexual, hate, violence, harassment, self-harm, minors, threatening, graphic."""


class Texts(NamedTuple):
    """Texts as token ids, and their labels.

    Attributes:
        tokens: [n, length] int32, padded on the right.
        mask: [n, length] bool, True at tokens.
        labels: [n, C] float32, 1, 0, or -1 where it is not known.
        cut: how many texts did not fit.
    """

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    cut: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moderation:
    """Texts with labels of harm.

    Examples hold `tokens` (int32 `[length]`), `mask` (bool `[length]`, true on tokens), `labels` (float32
    `[C]`: 1, 0, or -1 where it is not known) and `weight` (float32, 1). What does not fit is cut off. Equal
    texts are on one side of the split.

    Args:
        source: JSON lines, `.gz` too: objects with `prompt` and labels 0 or 1 by category; a missing one is
            not known.
        encoder: folder of Hugging Face with the `tokenizer.json` of the model; its special tokens are added.
        length: tokens of a text.
        categories: names of the labels.
        held_out: the part of the texts that is judged on, at most one half.

    Raises:
        UserError: an argument makes no sense; later, a file that cannot be read, or labels that are none.

    >>> data = Moderation(source="samples.jsonl.gz", encoder="all-MiniLM-L6-v2", length=64)
    >>> data.element_spec()["labels"].shape
    (8,)
    """

    source: str | Path
    encoder: str | Path
    length: int = 128
    categories: tuple[str, ...] = CATEGORIES
    held_out: float = 0.25

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"length must be at least 1, got {self.length}")
        if not 0.0 < self.held_out <= 0.5:
            raise UserError(f"held_out must be above 0 and at most 0.5, got {self.held_out}")
        if not self.categories or len(set(self.categories)) < len(self.categories):
            raise UserError(f"categories must be different names, got {self.categories}")

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example."""
        return {
            "tokens": jax.ShapeDtypeStruct((self.length,), np.int32),
            "mask": jax.ShapeDtypeStruct((self.length,), np.bool_),
            "labels": jax.ShapeDtypeStruct((len(self.categories),), np.float32),
            "weight": jax.ShapeDtypeStruct((), np.float32),
        }

    def train(self, seed: int) -> Examples:
        """Endless and shuffled anew every epoch."""
        return self._examples(self.parts[0], seed)

    def evaluation(self) -> Examples:
        """The held-out texts, in a fixed order."""
        return self._examples(self.parts[1], None)

    def describe(self) -> dict[str, Any]:
        """What was found; opens the data."""
        out: dict[str, Any] = {"source": str(self.source), "categories": ", ".join(self.categories)}
        for name, part in zip(("train", "evaluation"), self.parts, strict=True):
            out[f"{name}_examples"] = len(part.tokens)
            out[f"{name}_unsafe"] = int((part.labels == 1).any(axis=1).sum())
            out[f"{name}_cut"] = part.cut
            out[f"{name}_fingerprint"] = digest(part.tokens, part.mask, part.labels)
        return out

    def weights(self, cap: float | None = None) -> PositiveWeights:
        """How much positives weigh, from the training texts; opens the data.

        Args:
            cap: the largest weight.

        Raises:
            UserError: a category has no positive there and there is no cap.
        """
        labels = self.parts[0].labels
        try:
            with jax.ensure_compile_time_eval():  # while a step is traced, too
                return positive_weights(jnp.asarray(labels == 1), jnp.asarray(labels >= 0), cap)
        except ValueError as error:
            raise UserError(f"{self.source}: {error}") from error

    @functools.cached_property
    def parts(self) -> tuple[Texts, Texts]:
        """Training texts and held-out ones."""
        prompts, labels = read_labelled(self.source, self.categories)
        tokens, mask, cut = tokenized(self.encoder, prompts, self.length)
        # By the text itself: equal texts fall on the same side, wherever they stand.
        place = np.asarray([zlib.crc32(prompt.encode()) for prompt in prompts]) / 2**32
        sides = [place >= self.held_out, place < self.held_out]
        if not all(side.any() for side in sides):
            raise UserError(f"{self.source}: its {len(prompts)} texts are too few to hold out a part of them")
        return tuple(Texts(tokens[s], mask[s], labels[s], int(cut[s].sum())) for s in sides)

    def _examples(self, part: Texts, seed: int | None) -> Examples:
        def read(rows: np.ndarray, draws: np.ndarray) -> Arrays:
            return {
                "tokens": part.tokens[rows],
                "mask": part.mask[rows],
                "labels": part.labels[rows],
                "weight": np.ones(len(rows), np.float32),
            }

        content = digest(part.tokens, part.mask, part.labels)
        return Examples(read, len(part.tokens), seed=seed, fingerprint=content)


def read_labelled(source: str | Path, categories: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """Texts and labels of JSON lines.

    Args:
        source: the file, `.gz` too.
        categories: names of the labels.

    Returns:
        n texts, and labels float32 `[n, C]`: 1, 0, or -1 where it is not known. Texts without a character or
        without a single label are left out.

    Raises:
        UserError: the file cannot be read, a line is no such object, or a label is neither 0 nor 1.
    """
    path = Path(source).expanduser()
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read it: {getattr(error, 'strerror', None) or error}") from error
    prompts, rows = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, labels = record["prompt"], [record.get(name) for name in categories]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f'{path}: line {number} is no object with "prompt"') from None
        wrong = [label for label in labels if label not in (0, 1, None)]
        if wrong or not isinstance(prompt, str):
            found = f"the label {wrong[0]!r}, neither 0 nor 1" if wrong else "a prompt that is no text"
            raise UserError(f"{path}: line {number} has {found}")
        if prompt.strip() and any(label is not None for label in labels):
            prompts.append(prompt)
            rows.append([-1 if label is None else label for label in labels])
    if not prompts:
        raise UserError(f"{path}: no text has a label {', '.join(categories)}")
    return prompts, np.asarray(rows, np.float32)


def tokenized(
    encoder: str | Path, texts: list[str], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts as token ids with the special tokens of a model, padded on the right with 0.

    Args:
        encoder: folder with the `tokenizer.json` of the model.
        texts: n texts.
        length: tokens of a text; what is longer is cut off before its last special token.

    Returns:
        ids int32 `[n, length]`, the mask bool `[n, length]`, and which texts were cut, bool `[n]`.

    Raises:
        UserError: there is no such tokenizer.
    """
    import tokenizers

    file = Path(encoder).expanduser() / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; encoder= is a folder of Hugging Face")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise UserError(f"{file}: not a tokenizer.json: {str(error).splitlines()[0]}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    found = tokenizer.encode_batch(texts)
    ids = np.zeros((len(texts), length), np.int32)
    for row, encoding in enumerate(found):
        ids[row, : len(encoding.ids)] = encoding.ids
    sizes = np.asarray([len(encoding.ids) for encoding in found])
    cut = np.asarray([bool(encoding.overflowing) for encoding in found])
    return ids, np.arange(length) < sizes[:, None], cut


def guard_precision(
    columns: int, *, on: Literal["train", "held-out"] = "held-out", batches: int = 64
) -> Measure:
    """Average precision of a guard (`odjax.lowrank.Guard`) on examples of `Moderation`.

    Args:
        columns: C, the categories.
        on: "train": the first batches of the training order; "held-out": the held-out examples.
        batches: at most as many.

    Returns:
        The measure, with the figures `unsafe`, whether any known label is positive, and `categories`, the
        mean over the categories that have a positive among the examples.
    """

    def look(model: nn.Module, variables: Variables, batch: Batch) -> tuple[jax.Array, ...]:
        verdict = model.apply(variables, batch["tokens"], batch["mask"], method="guard")
        labels = batch["labels"]
        some = jnp.max(labels, axis=1, keepdims=True)
        scores = jnp.concatenate([verdict.unsafe[:, None], verdict.categories], axis=1)
        return scores, jnp.concatenate([some, labels], axis=1), batch["weight"]

    def statistic(model: nn.Module, variables: Variables, found: Found, looked: Any) -> Statistic:
        return average_precision_over(batches * looked[0].shape[0], columns + 1)

    def figures(model: nn.Module, variables: Variables, found: Found) -> dict[str, jax.Array]:
        (values,) = found
        return {"unsafe": values[0], "categories": jnp.nanmean(values[1:])}

    return Measure("precision", (Pass(statistic, look),), figures, on=on, batches=batches)
