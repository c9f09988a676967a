"""Translations of a trained model, and BLEU: sacrebleu's figure, and how sure it is."""

import builtins
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.models import encoder_decoder, translate_beam
from odjax_train import Experiment, translation
from odjax_train.data import ByteTokenizer, Pairs
from odjax_train.errors import UserError
from odjax_train.run import Loaded
from odjax_train.schedules import noam
from odjax_train.translations import bleu, bleu_difference, judge_translations, translator

REFERENCES = ["A man walks down the street .", "Two dogs play in the snow.", "A woman reads a book at home."]
GUESSES = ["A man walks on the street .", "Two dogs play in snow.", "A woman is reading a book."]
TOKENIZER = ByteTokenizer()


def test_bleu_is_one_hundred_for_the_reference_and_has_its_signature():
    score, signature = bleu(REFERENCES, REFERENCES)
    assert score == pytest.approx(100)
    assert "nrefs:1|case:mixed" in signature
    assert "tok:13a" in signature


def test_bleu_is_its_formula_on_n_grams_counted_by_hand():
    # 6 of 6 words, 4 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; six words for the seven of the reference.
    line, reference = "the cat sat on a mat", "the cat sat on a red mat"
    expected = 100 * np.exp(1 - 7 / 6) * (6 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert bleu([line], [reference]).score == pytest.approx(expected)


def test_a_difference_is_that_of_the_two_scores_and_nothing_differs_from_itself():
    gap, error = bleu_difference(GUESSES, REFERENCES, REFERENCES, draws=50)
    assert gap == pytest.approx(bleu(GUESSES, REFERENCES).score - 100)
    assert error > 0
    assert bleu_difference(GUESSES, GUESSES, REFERENCES, draws=50) == (0, 0)
    back, same = bleu_difference(REFERENCES, GUESSES, REFERENCES, draws=50)
    assert (back, same) == pytest.approx((-gap, error))


def test_one_sentence_many_times_is_no_more_certain():
    # Every draw of equal sentences is the same corpus.
    gap, error = bleu_difference(GUESSES[:1] * 5, GUESSES[1:2] * 5, REFERENCES[:1] * 5, draws=20)
    assert gap > 0
    assert error == pytest.approx(0, abs=1e-9)


def test_bleu_needs_sacrebleu_and_lines_that_belong_together(monkeypatch):
    with pytest.raises(UserError, match="got 2 lines and 3 references"):
        bleu(GUESSES[:2], REFERENCES)
    with pytest.raises(UserError, match="got 0 lines and 0 references"):
        bleu_difference([], [], [])
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install 'odjax\[translation\]'"):
        bleu(GUESSES, REFERENCES)


@pytest.fixture(scope="module")
def model():
    return encoder_decoder("tiny", vocab=256, layers=1, width=16, max_length=24)


@pytest.fixture(scope="module")
def params(model):
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *2 * [jnp.ones((1, 2), jnp.int32)]))
    rng = np.random.default_rng(1)
    draw = jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), jnp.float32), shapes["params"])
    # Letters have long vectors and are likely tokens: translations that can be read.
    letters = (jnp.arange(256) >= 97) & (jnp.arange(256) < 123)
    table = draw["embed"]["embedding"] * jnp.where(letters, 1.0, 0.05)[:, None]
    return {**draw, "embed": {"embedding": table}}


@pytest.fixture(scope="module")
def translate(model, params):
    run = translator(model, TOKENIZER, length=12, steps=6, batch=2)
    return lambda lines: run(params, lines)


LINES = ["eins zwei", "ein", "", "drei vier fünf sechs sieben", "acht"]


@pytest.fixture(scope="module")
def translations(translate):
    return dict(zip(LINES, translate(LINES), strict=True))


@given(st.permutations(LINES), st.integers(1, 5))
def test_a_line_has_one_translation_wherever_it_stands(translate, translations, lines, count):
    assert translate(lines[:count]) == [translations[line] for line in lines[:count]]


def test_a_translation_is_what_the_beam_found_up_to_its_end(model, params, translations):
    source = jnp.asarray(TOKENIZER.encode("drei vier fünf sechs sieben"))[None, :12]
    run = jax.jit(partial(translate_beam, model, steps=6, bos=0xFF, eos=0xFF, beam=2))
    text = TOKENIZER.decode(np.asarray(run(params, source).tokens[0]))
    assert translations["drei vier fünf sechs sieben"] == text
    assert text
    assert len(set(translations.values())) > 1


@pytest.mark.parametrize("name", ["length", "steps", "batch", "beam"])
def test_numbers_below_one_are_refused(model, name):
    with pytest.raises(UserError, match=f"{name} must be at least 1, got -1"):
        translator(model, TOKENIZER, **{"length": 4, name: -1})


def test_a_run_on_a_mesh_is_judged_like_its_model_alone(model, params, program_of, tmp_path, lm):
    (tmp_path / "a.de").write_text("eins zwei\nein\nacht\n")
    (tmp_path / "a.en").write_text("one two\na\neight\n")
    source, target = (f"text:{tmp_path}/a.{side}" for side in ("de", "en"))
    experiment = Experiment(
        model=model,
        task=translation(),
        data=Pairs(source=source, target=target, length=12, held_out=0.4),
        optimizer=optax.sgd(0.1),
        steps=1,
        batch=4,
    )
    program = program_of(experiment, 2, 1, 2)
    params = jax.device_put(params, program.shardings.params)
    state = program.state._replace(params=params, collections={}, ema=None)
    judged = judge_translations(Loaded(program, state, 0), source, target, batch=3)
    alone = translator(model, TOKENIZER, length=12)(params, ["eins zwei", "ein", "acht"])
    assert judged.lines == alone
    assert judged.bleu == bleu(alone, ["one two", "a", "eight"])
    other = Loaded(program_of(lm(), 1, 1, 1), state, 0)
    with pytest.raises(UserError, match="this run's task is language model"):
        judge_translations(other, source, target)


@given(st.integers(1, 1024), st.floats(0.1, 4), st.integers(1, 5000), st.integers(0, 20000))
def test_noam_is_its_equation_and_highest_at_the_end_of_the_warm_up(width, factor, warmup, step):
    rate = noam(width, factor, warmup)
    n = step + 1
    expected = factor * width**-0.5 * min(n**-0.5, n * warmup**-1.5)
    np.testing.assert_allclose(rate(step), expected, rtol=1e-5)
    assert rate(step) <= rate(warmup - 1) * (1 + 1e-5)


def test_noam_needs_positive_numbers():
    with pytest.raises(UserError, match="warmup must be positive, got 0"):
        noam(8, 1.0, 0)
