"""Beam search against every sequence there is and against a plain one; its cache against the whole model."""

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

EOS, TREE_VOCAB, TREE_STEPS, ROWS = 1, 3, 4, 3
NODES = sum(TREE_VOCAB**depth for depth in range(TREE_STEPS + 1))


class Tree(nn.Module):
    """Every sequence of tokens, for every source, has a distribution of its own for the next one.

    The sequence is read from a cache of the shape that attention has: a token in the wrong place is another
    sequence.
    """

    vocab: int = TREE_VOCAB

    def encode(self, source, source_mask=None):
        return source.astype(jnp.float32)[..., None]

    @nn.compact
    def features(self, tokens, memory, source_mask=None, *, positions, cache_length):
        table = self.param("table", nn.initializers.normal(), (ROWS, NODES, self.vocab))
        cache = self.variable("cache", "tokens", jnp.zeros, (tokens.shape[0], cache_length, 1, 1))
        cache.value = cache.value.at[:, positions[0, 0], 0, 0].set(tokens[:, 0].astype(jnp.float32))
        node = jnp.zeros(tokens.shape[0], jnp.int32)
        for place in range(1, cache_length):
            longer = self.vocab * node + cache.value[:, place, 0, 0].astype(jnp.int32) + 1
            node = jnp.where(positions[0, 0] >= place, longer, node)
        return table[memory[:, 0, 0].astype(jnp.int32), node][:, None]

    def logits(self, features):
        return features


def _table(seed):
    table = np.random.default_rng(seed).normal(size=(ROWS, NODES, TREE_VOCAB))
    table[..., EOS] -= 1  # long sequences
    return table.astype(np.float32)


def _next(table, tokens):
    """Log-probabilities of the token after `tokens`, in float64."""
    node = functools.reduce(lambda node, token: TREE_VOCAB * node + token + 1, tokens, 0)
    logits = table[node].astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


def _penalty(n, alpha):
    return ((5 + n) / 6) ** alpha


@functools.cache
def _tree_search(beam, alpha):
    run = functools.partial(translate_beam, Tree(), steps=TREE_STEPS, bos=0, eos=EOS)
    run = functools.partial(run, beam=beam, length_penalty=alpha)
    return jax.jit(lambda table: run({"table": table}, jnp.arange(ROWS)[:, None]))


def _padded(tokens):
    return [*tokens, *[EOS] * (TREE_STEPS - len(tokens))]


def _exhaustive(table, alpha):
    """The best of all sequences that end with EOS or have all steps."""
    found = []
    for n in range(1, TREE_STEPS + 1):
        for tokens in itertools.product(range(TREE_VOCAB), repeat=n):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or n == TREE_STEPS):
                log_p = sum(_next(table, tokens[:i])[token] for i, token in enumerate(tokens))
                found.append((log_p / _penalty(n, alpha), tokens))
    return max(found)


def _plain(table, beam, alpha):
    """Beam search with lists."""
    alive, ended = [(0.0, ())], []
    for n in range(1, TREE_STEPS + 1):
        longer = [
            (score + log_p, (*tokens, token))
            for score, tokens in alive
            for token, log_p in enumerate(_next(table, tokens))
        ]
        longer.sort(reverse=True)
        ended += [(s / _penalty(n, alpha), t) for s, t in longer[:beam] if t[-1] == EOS]
        if len(ended) >= beam:
            return max(ended)
        alive = [item for item in longer if item[1][-1] != EOS][:beam]
    return max([*ended, *((s / _penalty(TREE_STEPS, alpha), t) for s, t in alive)])


@given(st.integers(0, 10**6), st.sampled_from([0.0, 2.0]))
def test_a_beam_that_holds_every_hypothesis_finds_the_best_sequence(seed, alpha):
    table = _table(seed)
    found = _tree_search(TREE_VOCAB**TREE_STEPS, alpha)(table)
    for row in range(ROWS):
        score, tokens = _exhaustive(table[row], alpha)
        assert found.tokens[row].tolist() == _padded(tokens)
        np.testing.assert_allclose(found.scores[row], score, rtol=1e-5)


@given(st.integers(0, 10**6), st.sampled_from([(1, 0.6), (2, 0.0), (2, 2.0), (3, 0.6)]))
def test_the_search_is_the_one_with_lists(seed, kind):
    table, (beam, alpha) = _table(seed), kind
    found = _tree_search(beam, alpha)(table)
    for row in range(ROWS):
        score, tokens = _plain(table[row], beam, alpha)
        assert found.tokens[row].tolist() == _padded(tokens)
        np.testing.assert_allclose(found.scores[row], score, rtol=1e-5)


VOCAB, STEPS = 12, 8
SOURCE = jnp.array([[2, 3, 0, 2, 1, 3], [3, 3, 1, 0, 0, 0], [0, 2, 2, 1, 0, 0]])
MASK = jnp.arange(6)[None] < jnp.array([[6], [3], [4]])


@pytest.fixture(scope="module")
def model():
    return encoder_decoder("tiny", vocab=VOCAB, width=16, layers=1, max_length=16, shared=False)


@pytest.fixture(scope="module")
def params(model):
    """Six random networks whose beams cross: the likeliest continuation is seldom that of the first beam."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), SOURCE, SOURCE))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(6, *p.shape)) * 0.6, jnp.float32), shapes)


@functools.cache
def _search(model, beam, alpha):
    run = functools.partial(translate_beam, model, steps=STEPS, bos=0, eos=EOS)
    return jax.jit(functools.partial(run, beam=beam, length_penalty=alpha))


def _one(params, draw):
    return jax.tree.map(lambda p: p[draw], params)


def test_one_beam_is_greedy(model, params):
    greedy = jax.jit(functools.partial(translate, model, steps=STEPS, bos=0, eos=EOS, key=jax.random.key(0)))
    search = _search(model, 1, 0.6)
    for draw in range(6):
        expected = greedy(_one(params, draw), SOURCE, source_mask=MASK)
        np.testing.assert_array_equal(search(_one(params, draw), SOURCE, source_mask=MASK).tokens, expected)


def test_the_score_is_that_of_the_uncached_model(model, params):
    search, better = _search(model, 4, 4.0), 0
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, SOURCE, tokens, MASK))
    for draw in range(6):
        one = _one(params, draw)
        found = search(one, SOURCE, source_mask=MASK)
        tokens = np.asarray(found.tokens)
        inputs = np.concatenate([np.zeros((3, 1), np.int32), tokens[:, :-1]], axis=1)
        log_p = np.asarray(jax.nn.log_softmax(apply(one, inputs)), np.float64)
        each = np.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
        for row in range(3):
            ends = np.flatnonzero(tokens[row] == EOS)
            n = ends[0] + 1 if ends.size else STEPS
            np.testing.assert_allclose(found.scores[row], each[row, :n].sum() / _penalty(n, 4.0), rtol=1e-4)
            better += int((tokens[row, :n] != log_p[row, :n].argmax(axis=-1)).any())
    assert better > 6  # the search did leave the greedy path


@given(st.integers(0, 5), st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_a_row_gets_the_same_translation_in_every_company(model, params, draw, company):
    one, search = _one(params, draw), _search(model, 4, 4.0)
    all_of_them = search(one, SOURCE, source_mask=MASK)
    some = search(one, SOURCE[jnp.array(company)], source_mask=MASK[jnp.array(company)])
    np.testing.assert_array_equal(some.tokens, all_of_them.tokens[jnp.array(company)])


def test_unrolled_layers_find_the_same(model, params):
    one = _one(params, 3)
    unrolled = {**one, **{name: unstack_layers(one[name]) for name in ("encoder", "decoder")}}
    expected = _search(model, 4, 4.0)(one, SOURCE, source_mask=MASK)
    found = _search(model.clone(scan=False), 4, 4.0)(unrolled, SOURCE, source_mask=MASK)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"beam": 0}, "beam must be at least 1, got 0"),
        ({"length_penalty": -1.0}, "length_penalty must be at least 0, got -1"),
        ({"eos": 12}, "eos must be a token of the vocabulary, 0 to 11, got 12"),
        ({"steps": 17}, "17 tokens is longer than max_length 16"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(model, params, change, message):
    arguments = {"steps": 4, "bos": 0, "eos": EOS, **change}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(translate_beam, model, **arguments), _one(params, 0), SOURCE)
