"""Byte pairs learned from the training text: complete, reversible, the same every time."""

import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax_train.data import BpeTokenizer, Pairs, Tokenizer
from odjax_train.errors import UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "text.en"
    words = ["a", "man", "men", "woman", "is", "walking", "walks", "über", "street."]
    rng = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(200)) + "\n")
    return f"text:{path}"


@pytest.fixture(scope="module")
def tokenizer(text):
    return BpeTokenizer((text,), vocab=300)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_every_text_comes_back_in_its_composed_form(tokenizer, text):
    assert isinstance(tokenizer, Tokenizer)
    text = text.lstrip()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.size == 0 or (ids.min() > 1 and ids.max() < tokenizer.vocab)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_special_tokens_are_no_text_and_text_is_no_special_token(tokenizer):
    ids = tokenizer.encode("a man </s> walks <pad>")
    assert not np.isin(ids, (tokenizer.separator, tokenizer.padding)).any()
    framed = [tokenizer.separator, *ids, tokenizer.separator, tokenizer.padding]
    assert tokenizer.decode(framed) == "a man </s> walks <pad>"


def test_frequent_words_are_one_token_wherever_they_stand(tokenizer):
    # Nine words have fewer pairs than the 42 that may be learned.
    assert tokenizer.encode("walking walking").size == 2
    assert len(set(tokenizer.encode("woman woman").tolist())) == 1
    assert tokenizer.encode("gnikl").size == 6


def test_what_is_learned_is_the_same_in_another_process_and_follows_the_text(text, tokenizer, tmp_path):
    code = f"from odjax_train.data import BpeTokenizer; print(BpeTokenizer(({text!r},), vocab=300).name)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == tokenizer.name
    (tmp_path / "other").write_text("other words\n" * 9)
    other = BpeTokenizer((f"text:{tmp_path}/other",), vocab=300)
    both = BpeTokenizer((text, f"text:{tmp_path}/other"), vocab=300)
    assert len({other.name, both.name, tokenizer.name}) == 3


def test_a_kept_tokenizer_is_read_and_is_the_learned_one(text, tokenizer, tmp_path):
    kept = BpeTokenizer((text,), vocab=300, cache=tmp_path)
    assert kept.name == tokenizer.name
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = BpeTokenizer((text,), vocab=300, cache=tmp_path)
    assert again.name == tokenizer.name
    np.testing.assert_array_equal(again.encode("</s> men"), tokenizer.encode("</s> men"))
    assert [f.stat().st_mtime_ns for f in tmp_path.iterdir()] == [written]
    assert BpeTokenizer((text,), vocab=290, cache=tmp_path).name != tokenizer.name
    assert len(list(tmp_path.iterdir())) == 2


def test_a_description_touches_no_file_and_errors_say_what_is_wrong():
    tokenizer = BpeTokenizer(("text:/no/such",))
    assert (tokenizer.vocab, tokenizer.padding, tokenizer.separator) == (8000, 0, 1)
    Pairs(source="text:/no/such", target="text:/no/such", tokenizer=tokenizer).element_spec()
    with pytest.raises(UserError, match="no file matches /no/such"):
        tokenizer.encode("a")
    with pytest.raises(UserError, match=r"vocab must be at least 258 .* got 257"):
        BpeTokenizer(("text:a",), vocab=257)
    with pytest.raises(UserError, match="at least one source"):
        BpeTokenizer(())


def test_translation_pairs_end_with_the_separator_and_are_padded_with_padding(text, tokenizer):
    data = Pairs(source=text, target=text, length=16, tokenizer=tokenizer)
    example = data.evaluation()[0]
    size = int(example["source_mask"].sum())
    assert (example["source"][size:] == 0).all()
    assert example["tokens"][0] == 1
    assert example["targets"][size] == 1
    assert tokenizer.decode(example["source"]) == tokenizer.decode(example["targets"])
