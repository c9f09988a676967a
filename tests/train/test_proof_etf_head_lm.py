"""What the language-model proof of fixed heads is made of, and its quick version."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from odjax.core import leaves_with_paths
from odjax_train.errors import UserError
from odjax_train.proofs.etf_head_lm import (
    BIASED,
    FULL,
    HEADS,
    QUICK,
    Corpus,
    halves,
    judge,
    loss_of,
    model_of,
    prove,
    reference,
    shakespeare,
    sizes,
    start,
)

KEY = jax.random.key(0)
SMALL = QUICK._replace(length=8)


def test_the_last_tenth_of_a_text_is_held_out():
    corpus = halves(b"a" * 8 + b"b" * 12)
    assert (corpus.train.tobytes(), corpus.held.tobytes()) == (b"a" * 8 + b"b" * 10, b"bb")
    assert corpus.frequencies[ord("a")] == 8 / 18
    # Ten and one of eighteen and one for each of the 256.
    assert corpus.unigram == pytest.approx(-math.log(11 / 274))


def test_missing_data_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ODJAX_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"tinyshakespeare.txt is missing: put .* set ODJAX_DATA_DIR"):
        prove(tmp_path, quick=False, seed=0)


def test_tiny_shakespeare_has_sixty_five_of_the_bytes(real_data):
    corpus = shakespeare(real_data / "tinyshakespeare.txt")
    assert (len(corpus.train), len(corpus.held)) == (1003854, 111540)
    assert np.count_nonzero(corpus.frequencies) == 65


def test_the_reference_comes_with_python_and_has_the_size_asked_for():
    corpus = reference(5000)
    assert (len(corpus.train), len(corpus.held)) == (4500, 500)


def test_weights_below_the_head_are_the_same_for_all_heads():
    below = {name: dict(leaves_with_paths(start(model_of(SMALL, name), KEY))) for name in HEADS}
    head = below["learned"].pop("lm_head/kernel")
    assert head.shape == (32, 256)
    np.testing.assert_array_equal(below[BIASED].pop("head/bias"), np.zeros(256))
    for leaves in below.values():
        assert leaves.keys() == below["learned"].keys()
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, below["learned"][path])


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_the_cross_entropy_of_the_next_byte(name):
    model = model_of(SMALL, name)
    params = start(model, KEY)
    tokens = jax.random.randint(KEY, (2, 9), 0, 256)
    logits = model.apply({"params": params}, tokens[:, :-1])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    np.testing.assert_allclose(loss_of(model, params, tokens), expected, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_equal_logits_lose_log_k_and_log_k_over_the_bytes_that_occur_of_it_to_those_that_never_do(name):
    model = model_of(SMALL, name)
    params = jax.tree.map(jnp.zeros_like, start(model, KEY))
    train = np.arange(2000, dtype=np.uint8) % 64
    train[0] = 200  # once in 2000: rare
    held = np.where(np.arange(16 * 9) % 9 == 4, 200, 1).astype(np.uint8)
    found = judge(model, params, Corpus(train, held), SMALL.length)
    assert found == pytest.approx((math.log(256), math.log(256 / 65), math.log(256)), rel=1e-6)


@pytest.mark.parametrize("recipe", [*FULL, QUICK])
def test_a_fixed_head_saves_its_parameters_and_two_moments_but_for_those_of_a_bias(recipe):
    found = {name: sizes(recipe, name) for name in recipe.heads}
    params, state = found.pop("learned")
    for name, fixed in found.items():
        saved = 256 * recipe.width - (256 if name == BIASED else 0)
        assert (params - fixed[0], state - fixed[1]) == (saved, 8 * saved)
    assert recipe.steps % recipe.interval == 0


def test_the_quick_proof_learns_with_a_fixed_head_without_any_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("ODJAX_DATA_DIR", raising=False)
    proof = prove(tmp_path, quick=True, seed=1)
    assert proof.holds, str(proof)
    assert len(proof.claims) == 2
