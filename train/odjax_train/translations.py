"""Text from a trained encoder-decoder, and how good it is: BLEU.

    translate = translator(model, tokenizer, length=64)
    bleu(translate(params, lines), references)

BLEU is that of sacrebleu (Post 2018, "A Call for Clarity in Reporting BLEU Scores") on text as people write
it; its signature says how it was computed and belongs beside every figure.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from odjax.models import Translations, translate_beam
from odjax_train.data import Tokenizer
from odjax_train.data.pairs import read_lines
from odjax_train.errors import UserError
from odjax_train.mesh import data_parallelism, replicated

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU

    from odjax_train.run import Loaded

Translate = Callable[..., list[str]]


class Bleu(NamedTuple):
    """A corpus BLEU.

    Attributes:
        score: from 0 to 100.
        signature: how sacrebleu computed it.
    """

    score: float
    signature: str


class Judged(NamedTuple):
    """What a run's translations are worth.

    Attributes:
        bleu: of all lines together.
        lines: the translations.
    """

    bleu: Bleu
    lines: list[str]


def bleu(lines: Sequence[str], references: Sequence[str]) -> Bleu:
    """Corpus BLEU, as sacrebleu computes it by default (tokeniser 13a, exponential smoothing, case counts).

    Args:
        lines: translations.
        references: one for each.

    Raises:
        UserError: sacrebleu is not installed; other numbers of lines, or none.
    """
    metric = _metric(lines, references)
    score = metric.corpus_score(list(lines), [list(references)]).score
    return Bleu(score, str(metric.get_signature()))


def bleu_difference(
    left: Sequence[str], right: Sequence[str], references: Sequence[str], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """BLEU of one set of translations above another one's, and its standard error over the sentences.

    Sentences are drawn with replacement, the same ones for both, `draws` times.

    Args:
        left: translations.
        right: others, of the same sentences.
        references: one for each.
        draws: of all sentences.
        seed: of the draws.

    Returns:
        The difference on the sentences as they are, and the standard deviation over the draws.

    Raises:
        UserError: as `bleu`.

    Source: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation", section 5.
    """
    metric = _metric(left, references)
    _metric(right, references)
    counts = [_counts(metric, lines, references) for lines in (left, right)]
    whole = [_score(metric, each.sum(axis=0)) for each in counts]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        rows = rng.integers(0, len(references), len(references))
        drawn.append(np.subtract(*(_score(metric, each[rows].sum(axis=0)) for each in counts)))
    return whole[0] - whole[1], float(np.std(drawn, ddof=1))


def _metric(lines: Sequence[str], references: Sequence[str]) -> "BLEU":
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UserError("BLEU needs sacrebleu: pip install 'odjax[translation]'") from error
    if len(lines) != len(references) or not references:
        raise UserError(
            f"BLEU compares line by line, got {len(lines)} lines and {len(references)} references"
        )
    return BLEU()


def _counts(metric: "BLEU", lines: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Matches and numbers of n-grams (four each), lengths of line and reference: int [lines, 10]."""
    rows = []
    metric = type(metric)(effective_order=True)  # of a sentence; counts are the same, without its warning
    for line, reference in zip(lines, references, strict=True):
        found = metric.sentence_score(line, [reference])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.asarray(rows)


def _score(metric: "BLEU", counts: np.ndarray) -> float:
    matches, totals, (length, wanted) = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
    return metric.compute_bleu(matches, totals, length, wanted, smooth_method="exp").score


def translator(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    length: int,
    steps: int | None = None,
    batch: int = 100,
    beam: int = 2,
    length_penalty: float = 0.6,
    mesh: Mesh | None = None,
) -> Translate:
    """A function that translates lines of text by beam search; it is compiled once.

    Lines of about the same length are translated together.

    Args:
        model: an `odjax.models.EncoderDecoder`.
        tokenizer: that it was trained with.
        length: tokens of a source; what is longer is cut off.
        steps: most tokens of a translation; None: as many as `length`.
        batch: lines at a time.
        beam: hypotheses of a line; 1 is greedy.
        length_penalty: see `odjax.models.translate_beam`.
        mesh: over whose data axes a batch is divided; None: the devices of the parameters.

    Returns:
        `(params, lines, collections=None) -> translations`, in the order of the lines.

    Raises:
        UserError: a number below 1.

    Example:
        >>> from odjax.models import encoder_decoder
        >>> from odjax_train.data import ByteTokenizer
        >>> model = encoder_decoder("tiny", vocab=256, layers=1, width=16)
        >>> tokens = np.ones((1, 4), np.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens, tokens)["params"]
        >>> len(translator(model, ByteTokenizer(), length=8, batch=2)(params, ["eins", "zwei", "drei"]))
        3
    """
    for name, value in (("length", length), ("batch", batch), ("beam", beam), ("steps", steps or length)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    parts = 1 if mesh is None else data_parallelism(mesh)
    batch = -(-batch // parts) * parts

    @partial(jax.jit, out_shardings=None if mesh is None else replicated(mesh))
    def search(params: Any, source: jax.Array, mask: jax.Array, collections: Any) -> Translations:
        return translate_beam(
            model,
            params,
            source,
            steps=steps or length,
            bos=tokenizer.separator,
            eos=tokenizer.separator,
            beam=beam,
            length_penalty=length_penalty,
            source_mask=mask,
            collections=collections,
        )

    def translate(
        params: Any, lines: Sequence[str], collections: Mapping[str, Any] | None = None
    ) -> list[str]:
        ids = [line[:length] for line in tokenizer.encode_all(lines)]
        order = np.argsort([line.size for line in ids], kind="stable")
        found: dict[int, str] = {}
        for start in range(0, len(ids), batch):
            rows = order[start : start + batch]
            source = np.full((batch, length), tokenizer.padding, np.int32)
            mask = np.zeros((batch, length), bool)
            for place, row in enumerate(rows):
                source[place, : ids[row].size] = ids[row]
                mask[place, : ids[row].size] = True
            mask[:, 0] = True  # attention to nothing is no number
            tokens = np.asarray(search(params, source, mask, dict(collections or {})).tokens)
            for row, line in zip(rows, tokens, strict=False):
                ends = np.flatnonzero(line == tokenizer.separator)
                found[int(row)] = tokenizer.decode(line[: ends[0]] if ends.size else line)
        return [found[row] for row in range(len(ids))]

    return translate


def judge_translations(
    loaded: "Loaded",
    source: str,
    target: str,
    *,
    beam: int = 2,
    length_penalty: float = 0.6,
    batch: int = 100,
) -> Judged:
    """Translates a file with a run's checkpoint (of `odjax_train.run.reopen`) and compares it line by line.

    Args:
        loaded: the run.
        source: `"text:<file>"` to translate.
        target: `"text:<file>"`, its translation by people.
        beam: hypotheses of a line.
        length_penalty: see `odjax.models.translate_beam`.
        batch: lines at a time.

    Returns:
        BLEU and the translations.

    Raises:
        UserError: the run is none of translation; a file that cannot be read; as `bleu`.
    """
    experiment = loaded.program.experiment
    if experiment.task.name != "translation":
        raise UserError(f"only a translation run translates; this run's task is {experiment.task.name}")
    lines, references = read_lines(source), read_lines(target)
    translate = translator(
        experiment.model,
        experiment.data.tokenizer,
        length=experiment.data.length,
        batch=batch,
        beam=beam,
        length_penalty=length_penalty,
        mesh=loaded.program.mesh,
    )
    with loaded.program.context():
        params = loaded.program.evaluated(loaded.state)
        found = translate(params, lines, loaded.state.collections)
    return Judged(bleu(found, references), found)
