"""Beam search against every sequence there is, against greedy decoding, and row by row."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.models import encoder_decoder, translate, translate_beam, unstack_layers

VOCAB, STEPS, EOS = 4, 4, 1
SOURCE = jnp.array([[2, 3, 0, 2, 1, 3], [3, 3, 1, 0, 0, 0], [0, 2, 2, 1, 0, 0]])
MASK = jnp.arange(6)[None] < jnp.array([[6], [3], [4]])


@pytest.fixture(scope="module")
def model():
    return encoder_decoder("tiny", vocab=VOCAB, width=16, layers=1, max_length=16)


@pytest.fixture(scope="module")
def params(model):
    """Eight random networks, apart enough that hypotheses cross."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), SOURCE, SOURCE))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(8, *p.shape)) * 0.4, jnp.float32), shapes)


@functools.cache
def _search(model, **options):
    return jax.jit(functools.partial(translate_beam, model, bos=0, eos=EOS, **options))


@functools.cache
def _log_probabilities(model):
    """Of every sequence of STEPS tokens, token by token: [rows, sequences, STEPS]."""

    def run(params):
        def of_row(source, mask):
            tokens = jnp.concatenate([jnp.zeros((len(SEQUENCES), 1), jnp.int32), SEQUENCES[:, :-1]], axis=1)
            many = (jnp.broadcast_to(x, (len(SEQUENCES), 6)) for x in (source, mask))
            source, mask = many
            logits = model.apply({"params": params}, source, tokens, mask)
            return jnp.take_along_axis(jax.nn.log_softmax(logits), SEQUENCES[:, :, None], axis=-1)[..., 0]

        return jax.vmap(of_row)(SOURCE[:, None], MASK[:, None])

    return jax.jit(run)


SEQUENCES = jnp.array(list(itertools.product(range(VOCAB), repeat=STEPS)), jnp.int32)


def _best(log_p, alpha):
    """The best sequence of a row, of those that end with EOS or are full: brute force in float64."""
    best, score = None, -np.inf
    for tokens, each in zip(np.asarray(SEQUENCES), np.asarray(log_p, np.float64), strict=True):
        ends = np.flatnonzero(tokens == EOS)
        n = ends[0] + 1 if ends.size else STEPS
        value = each[:n].sum() / ((5 + n) / 6) ** alpha
        if value > score + 1e-9:
            best, score = np.where(np.arange(STEPS) < n, tokens, EOS), value
    return best, score


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_a_beam_that_holds_every_hypothesis_finds_the_best_sequence(model, params, alpha):
    search = _search(model, steps=STEPS, beam=VOCAB**STEPS, length_penalty=alpha)
    lengths = set()
    for draw in range(8):
        one = jax.tree.map(lambda p, draw=draw: p[draw], params)
        found = search(one, SOURCE, source_mask=MASK)
        log_p = _log_probabilities(model)(one)
        for row in range(len(SOURCE)):
            tokens, score = _best(log_p[row], alpha)
            np.testing.assert_array_equal(found.tokens[row], tokens)
            np.testing.assert_allclose(found.scores[row], score, rtol=1e-5)
            lengths.add(int(np.sum(tokens != EOS)))
    assert len(lengths) > 1  # long ones and short ones


def test_one_beam_is_greedy(model, params):
    greedy = jax.jit(functools.partial(translate, model, steps=9, bos=0, eos=EOS, key=jax.random.key(0)))
    search = _search(model, steps=9, beam=1)
    ended = 0
    for draw in range(8):
        one = jax.tree.map(lambda p, draw=draw: p[draw], params)
        expected = greedy(one, SOURCE, source_mask=MASK)
        np.testing.assert_array_equal(search(one, SOURCE, source_mask=MASK).tokens, expected)
        ended += int(np.sum(np.any(np.asarray(expected) == EOS, axis=1)))
    assert 0 < ended < 24


def test_the_score_is_that_of_the_tokens(model, params):
    search = _search(model, steps=STEPS, beam=2, length_penalty=0.6)
    for draw in range(4):
        one = jax.tree.map(lambda p, draw=draw: p[draw], params)
        found, log_p = search(one, SOURCE, source_mask=MASK), _log_probabilities(model)(one)
        for row in range(len(SOURCE)):
            tokens = np.asarray(found.tokens[row])
            place = int(np.flatnonzero((np.asarray(SEQUENCES) == tokens).all(axis=1))[0])
            ends = np.flatnonzero(tokens == EOS)
            n = ends[0] + 1 if ends.size else STEPS
            score = float(log_p[row, place, :n].sum()) / ((5 + n) / 6) ** 0.6
            np.testing.assert_allclose(found.scores[row], score, rtol=1e-5)


@given(st.integers(0, 7), st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_a_row_gets_the_same_translation_in_every_company(model, params, draw, company):
    one = jax.tree.map(lambda p: p[draw], params)
    search = _search(model, steps=9, beam=3)
    all_of_them = search(one, SOURCE, source_mask=MASK)
    some = search(one, SOURCE[jnp.array(company)], source_mask=MASK[jnp.array(company)])
    np.testing.assert_array_equal(some.tokens, all_of_them.tokens[jnp.array(company)])


def test_unrolled_layers_find_the_same(model, params):
    one = jax.tree.map(lambda p: p[0], params)
    expected = _search(model, steps=9, beam=3)(one, SOURCE, source_mask=MASK)
    found = _search(model.clone(scan=False), steps=9, beam=3)(
        {
            name: unstack_layers(tree) if name in ("encoder", "decoder") else tree
            for name, tree in one.items()
        },
        SOURCE,
        source_mask=MASK,
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"beam": 0}, "beam must be at least 1, got 0"),
        ({"length_penalty": -1.0}, "length_penalty must be at least 0, got -1"),
        ({"eos": 4}, "eos must be a token of the vocabulary, 0 to 3, got 4"),
        ({"steps": 17}, "17 tokens is longer than max_length 16"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(model, params, change, message):
    one = jax.tree.map(lambda p: p[0], params)
    with pytest.raises(ValueError, match=message):
        translate_beam(model, one, SOURCE, **{"steps": 4, "bos": 0, "eos": EOS, **change})
