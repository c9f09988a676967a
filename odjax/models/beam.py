"""Beam search with a cache: the likeliest translations, not the likeliest next tokens."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from odjax.models.generate import cached_steps


class Translations(NamedTuple):
    """What beam search found.

    Attributes:
        tokens: [B, steps] int32, without the start symbol; what follows the end symbol repeats it.
        scores: [B] float32, log-probability over the length penalty.
    """

    tokens: jax.Array
    scores: jax.Array


class _Search(NamedTuple):
    """Hypotheses of B rows in K beams.

    Attributes:
        step: tokens so far, int32 [].
        tokens: [B, K, steps].
        scores: log-probabilities [B, K]; minus infinity where there is no hypothesis yet.
        parents: the beam that each one came from, [B, K].
        ended: how many of a row have ended, [B].
        best_tokens: of the best one that has ended, [B, steps].
        best: its score over the length penalty, [B].
    """

    step: jax.Array
    tokens: jax.Array
    scores: jax.Array
    parents: jax.Array
    ended: jax.Array
    best_tokens: jax.Array
    best: jax.Array


def translate_beam(
    model: nn.Module,
    params: Any,
    source: jax.Array,
    *,
    steps: int,
    bos: int,
    eos: int,
    beam: int = 4,
    length_penalty: float = 0.6,
    source_mask: jax.Array | None = None,
    collections: Mapping[str, Any] | None = None,
) -> Translations:
    """Translates by beam search; with one beam it is greedy.

    In every step each of the `beam` hypotheses of a row is continued by every token. Those among the `beam`
    best continuations that are the end symbol have ended, with the score log p / ((5 + n) / 6)^length_penalty
    for n tokens; the `beam` best others go on. A row is done when `beam` hypotheses have ended, when none
    that goes on can score better than the best one that has ended, or after `steps` tokens, where what goes
    on ends as it is. What a row gives does not depend on the others.

    Everything but `params`, `source`, `source_mask` and `collections` is static under `jit`; the loop ends
    when all rows are done.

    Args:
        model: an `odjax.models.encoder_decoder.EncoderDecoder`.
        params: its "params" collection.
        source: [B, S] int32.
        steps: most tokens of a translation, with its end symbol.
        bos: the start symbol of a target.
        eos: the end symbol.
        beam: hypotheses of a row, at least 1.
        length_penalty: 0 compares log-probabilities; larger values favour longer translations.
        source_mask: True where the source is not padding [B, S] bool.
        collections: further collections that the model reads.

    Returns:
        The best translation of every row and its score.

    Raises:
        ValueError: `steps` or `beam` below 1, a negative length penalty, an end symbol outside the
            vocabulary, or `steps` longer than the model's `max_length`.

    Source: Wu et al. 2016, "Google's Neural Machine Translation System", section 7 (equation 14, without
    coverage).

    Example:
        >>> from functools import partial
        >>> from odjax.models.encoder_decoder import encoder_decoder
        >>> model = encoder_decoder("tiny", vocab=20, width=16, layers=1)
        >>> source = jnp.array([[5, 6, 7]])
        >>> params = jax.jit(model.init)(jax.random.key(0), source, source)["params"]
        >>> translate = jax.jit(partial(translate_beam, model, steps=4, bos=1, eos=1, beam=2))
        >>> translate(params, source).tokens.shape
        (1, 4)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}; 1 is greedy")
    if length_penalty < 0:
        raise ValueError(f"length_penalty must be at least 0, got {length_penalty}")
    if not 0 <= eos < model.vocab:
        raise ValueError(f"eos must be a token of the vocabulary, 0 to {model.vocab - 1}, got {eos}")
    rows = source.shape[0]
    variables = {**(collections or {}), "params": params}
    memory = model.apply(variables, source, source_mask, method="encode")
    memory = jnp.repeat(memory, beam, axis=0)
    mask = None if source_mask is None else jnp.repeat(source_mask, beam, axis=0)
    step = cached_steps(model, variables, memory, mask, steps)

    def penalty(length: jax.Array | int) -> jax.Array:
        return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** jnp.float32(length_penalty)

    def done(search: _Search) -> jax.Array:
        """Which rows are done, [B]."""
        hope = jnp.max(search.scores, axis=1) / penalty(steps)
        return (search.ended >= beam) | (search.best >= hope)

    def chosen(search: _Search, logits: jax.Array) -> _Search:
        """The hypotheses one token longer, by the logits [B K, vocab] of that token."""
        vocab = logits.shape[-1]
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).reshape(rows, beam, vocab)
        scores = (search.scores[:, :, None] + log_p).reshape(rows, beam * vocab)
        # One continuation of a beam ends at most: twice as many as are wanted are enough.
        scores, place = jax.lax.top_k(scores, min(2 * beam, beam * vocab))
        parents, token = place // vocab, place % vocab
        tokens = jnp.take_along_axis(search.tokens, parents[:, :, None], axis=1)
        tokens = tokens.at[:, :, search.step].set(token)
        length = search.step + 1

        ends = token == eos
        ranked = (jnp.arange(scores.shape[1]) < beam)[None] & jnp.isfinite(scores) & ~done(search)[:, None]
        ending = jnp.where(ends & ranked, scores / penalty(length), -jnp.inf)
        first = jnp.argmax(ending, axis=1)[:, None]
        value = jnp.take_along_axis(ending, first, axis=1)[:, 0]
        line = jnp.take_along_axis(tokens, first[:, :, None], axis=1)[:, 0]
        line = jnp.where((jnp.arange(steps) < length)[None], line, eos)
        better = value > search.best

        scores, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), beam)
        return _Search(
            length,
            jnp.take_along_axis(tokens, kept[:, :, None], axis=1),
            scores,
            jnp.take_along_axis(parents, kept, axis=1),
            search.ended + jnp.sum(ends & ranked, axis=1, dtype=jnp.int32),
            jnp.where(better[:, None], line, search.best_tokens),
            jnp.where(better, value, search.best),
        )

    def go_on(carry: tuple[_Search, Any]) -> jax.Array:
        search, _ = carry
        return (search.step < steps) & ~jnp.all(done(search))

    def longer(carry: tuple[_Search, Any]) -> tuple[_Search, Any]:
        search, cache = carry
        origin = (search.parents + beam * jnp.arange(rows, dtype=jnp.int32)[:, None]).reshape(-1)
        # Keys and values are [..., B K, slots, heads, head width].
        cache = jax.tree.map(lambda x: jnp.take(x, origin, axis=x.ndim - 4), cache)
        last = jax.lax.dynamic_index_in_dim(search.tokens, search.step - 1, axis=2, keepdims=False)
        at = jnp.full((rows * beam, 1), search.step, jnp.int32)
        logits, cache = step(last.reshape(-1, 1), at, cache)
        return chosen(search, logits), cache

    start = jnp.zeros((rows * beam, 1), jnp.int32)
    logits, cache = step(jnp.full_like(start, bos), start, None)
    search = _Search(
        jnp.int32(0),
        jnp.full((rows, beam, steps), eos, jnp.int32),
        jnp.full((rows, beam), -jnp.inf).at[:, 0].set(0.0),
        jnp.zeros((rows, beam), jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.full((rows, steps), eos, jnp.int32),
        jnp.full((rows,), -jnp.inf),
    )
    search, _ = jax.lax.while_loop(go_on, longer, (chosen(search, logits), cache))
    rest = jnp.max(search.scores, axis=1) / penalty(steps)
    cut = (search.ended < beam) & (search.step == steps) & (rest > search.best)
    place = jnp.argmax(search.scores, axis=1)[:, None, None]
    longest = jnp.take_along_axis(search.tokens, place, axis=1)[:, 0]
    return Translations(
        jnp.where(cut[:, None], longest, search.best_tokens), jnp.where(cut, rest, search.best)
    )
