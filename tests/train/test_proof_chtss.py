"""What the translation proof is made of: corpora, recipes, methods; the proof itself runs with the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.sparse import DstState, links, unpack
from odjax.sparse.schedules import cubic, sigmoid
from odjax_train.errors import UserError
from odjax_train.proofs.chtss import FULL, PAPER, QUICK, made_up, model_of, multi30k, optimizer, prove


@pytest.fixture(scope="module")
def params():
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model_of(QUICK).init, jax.random.key(0), tokens, tokens)["params"]


def test_made_up_sentences_say_the_words_backwards_and_follow_the_seed(tmp_path):
    corpora = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        made_up(tmp_path / name, seed)
        corpora.append(multi30k(tmp_path / name, QUICK))
    one, again, other = corpora
    assert len(one.sources) == 12
    for source, reference in zip(one.sources, one.references, strict=True):
        assert [word[::-1] for word in source.split(" ")] == reference.split(" ")
    assert one.sources == again.sources != other.sources
    example = one.pairs.train(0)[0]
    assert example["source"].shape == (QUICK.length,)


def test_missing_data_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ODJAX_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"train.de.gz is missing: put Multi30k there .* set ODJAX_DATA_DIR"):
        prove(tmp_path, quick=False, seed=0)


def test_the_real_corpus_has_the_published_sizes(real_data):
    corpus = multi30k(real_data / "multi30k", FULL)
    found = corpus.pairs.describe()
    assert (found["train_examples"], len(corpus.sources), len(corpus.references)) == (29000, 1000, 1000)
    # What does not fit into 32 tokens is rare.
    assert found["train_cut"] < 0.05 * 29000


@pytest.mark.parametrize("name", list(PAPER))
def test_every_way_ends_with_a_tenth_of_the_links(name, params):
    update = optimizer(name, model_of(QUICK), params, QUICK, jax.random.key(0))
    state = jax.eval_shape(update.init, params)
    assert isinstance(state, DstState) == (name != "dense")
    if name in ("SET", "CHTs"):  # from the start
        path = "decoder/layers_0/mlp/up/kernel"
        masks = jax.jit(lambda: update.init(jax.tree.map(lambda p: jnp.ones(p.shape), params)).masks)()
        assert int(links(unpack(masks[path], (64, 128)))) == 64 * 128 - 64 * 128 * 9 // 10


def test_links_stop_to_change_at_three_quarters_and_the_decays_cost_the_same():
    for recipe in (FULL, QUICK):
        assert recipe.end % recipe.interval == 0
        assert 0.6 * recipe.steps < recipe.end <= 0.75 * recipe.steps
    steps = jnp.arange(FULL.end)
    sums = [
        np.asarray(jax.vmap(decay)(steps), np.float64).sum()
        for decay in (cubic(0.5, 0.1, 0, FULL.end), sigmoid(0.5, 0.1, 0, FULL.end // 2))
    ]
    assert sums[0] == pytest.approx(sums[1], rel=5e-3)
