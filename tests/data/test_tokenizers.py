"""Tokenizers: bytes are lossless, files are checked."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax_train.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from odjax_train.errors import UserError


@given(st.text())
def test_bytes_of_any_text_come_back(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == text


@given(st.binary())
def test_any_bytes_become_valid_text_below_the_reserved_ids(data):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(data)
    assert (tokens < 0xF8).all()
    assert tokenizer.decode(tokens) == data.decode("utf-8", errors="replace")


def test_separators_and_padding_are_not_text():
    tokenizer = ByteTokenizer()
    tokens = [tokenizer.separator, *b"ab", tokenizer.padding, tokenizer.separator]
    assert tokenizer.decode(tokens) == "ab"
    assert tokenizer.vocab == 256
    assert {tokenizer.separator, tokenizer.padding} == {0xFF, 0xFE}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    import tokenizers

    model = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>", "<pad>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_hugging_face_file_is_a_tokenizer(tokenizer_file):
    tokenizer = load_tokenizer(str(tokenizer_file))
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.vocab == 5
    assert tokenizer.separator == 3
    assert tokenizer.padding == 4
    assert tokenizer.encode("a b c").tolist() == [1, 2, 0]
    assert tokenizer.encode(b"b a").tolist() == [2, 1]
    assert [ids.tolist() for ids in tokenizer.encode_all(["a"] * 70)] == [[1]] * 70
    assert tokenizer.decode(np.array([1, 3, 2])) == "a b"
    assert load_tokenizer(str(tokenizer_file.parent)).name == tokenizer.name


def test_the_separator_can_be_named_or_declared_beside_the_file(tokenizer_file, tmp_path):
    assert HuggingFaceTokenizer(tokenizer_file, separator_token="b").separator == 2
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert HuggingFaceTokenizer(copy).separator == 1


def test_tokenizer_errors_name_the_file(tokenizer_file, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer /no/such\.json: no such file; give `byte`, the path of"):
        load_tokenizer("/no/such.json")
    with pytest.raises(UserError, match=r"tokenizer .*nothing\.json: cannot read it"):
        _ = HuggingFaceTokenizer(tmp_path / "nothing.json").vocab
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json: not a tokenizer\.json"):
        _ = HuggingFaceTokenizer(broken).vocab
    with pytest.raises(UserError, match=r"tokenizer\.json: it has no token '<eot>'"):
        _ = HuggingFaceTokenizer(tokenizer_file, separator_token="<eot>").separator
    without = json.loads(tokenizer_file.read_text().replace("</s>", "<q>"))
    path = tmp_path / "without.json"
    path.write_text(json.dumps(without))
    with pytest.raises(UserError, match=r"without\.json: no end-of-text token found .*separator_token="):
        _ = HuggingFaceTokenizer(path).separator


def test_byte_tokenizer_is_a_tokenizer():
    assert isinstance(load_tokenizer("byte"), Tokenizer)
