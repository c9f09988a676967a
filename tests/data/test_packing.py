"""Packing: every token once, no mixing of documents, targets one further."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax_train.data.packing import corpus, digest, pack, stored_corpus
from odjax_train.errors import UserError

SEPARATOR, PADDING, VOCAB = 255, 254, 256

documents_of_tokens = st.lists(st.lists(st.integers(0, 247), max_size=30), min_size=1, max_size=8).filter(
    lambda documents: any(documents)
)


def _pack(documents, length, seed=None):
    joined = corpus([np.array(d, np.int32) for d in documents], separator=SEPARATOR, vocab=VOCAB)
    return pack(joined, length, separator=SEPARATOR, padding=PADDING, seed=seed)


def _epoch(packed):
    return packed.read(np.arange(len(packed)))


@given(documents=documents_of_tokens, length=st.integers(1, 40), seed=st.integers(0, 9))
def test_an_epoch_holds_every_token_exactly_once(documents, length, seed):
    epoch = _epoch(_pack(documents, length, seed))
    real = epoch["segments"] > 0
    kept = [d for d in documents if d]
    wanted = sorted([SEPARATOR] * len(kept) + [token for d in kept for token in d])
    assert sorted(epoch["tokens"][real].tolist()) == wanted
    assert sorted(epoch["targets"][epoch["weights"] > 0].tolist()) == wanted


@given(documents=documents_of_tokens, length=st.integers(1, 40), seed=st.integers(0, 9))
def test_joined_examples_are_the_documents(documents, length, seed):
    epoch = _epoch(_pack(documents, length, seed))
    stream = epoch["tokens"][epoch["segments"] > 0]
    edges = np.flatnonzero(stream == SEPARATOR)
    found = [part.tolist() for part in np.split(stream, edges)[1:]]
    assert sorted(part[1:] for part in found) == sorted(d for d in documents if d)


@given(documents=documents_of_tokens, length=st.integers(1, 40), seed=st.integers(0, 9))
def test_targets_are_the_tokens_one_further(documents, length, seed):
    epoch = _epoch(_pack(documents, length, seed))
    np.testing.assert_array_equal(
        epoch["targets"].reshape(-1)[:-1][epoch["segments"].reshape(-1)[1:] > 0],
        epoch["tokens"].reshape(-1)[1:][epoch["segments"].reshape(-1)[1:] > 0],
    )
    # The last real target closes the last document.
    assert epoch["targets"][epoch["weights"] > 0][-1] == SEPARATOR


@given(documents=documents_of_tokens, length=st.integers(1, 40), seed=st.integers(0, 9))
def test_segments_never_mix_documents_and_no_target_carries_a_token_of_another(documents, length, seed):
    # Documents of one repeated token each tell whose token it is.
    marked = [[number] * len(d) for number, d in enumerate(documents)]
    epoch = _epoch(_pack(marked, length, seed))
    for tokens, targets, segments in zip(epoch["tokens"], epoch["targets"], epoch["segments"], strict=True):
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            both = np.concatenate([tokens[inside], targets[inside]])
            assert np.unique(both[both != SEPARATOR]).size <= 1


@given(documents=documents_of_tokens, length=st.integers(1, 40), seed=st.integers(0, 9))
def test_segments_count_up_and_positions_restart(documents, length, seed):
    epoch = _epoch(_pack(documents, length, seed))
    for tokens, segments, positions in zip(
        epoch["tokens"], epoch["segments"], epoch["positions"], strict=True
    ):
        real = segments > 0
        expected_position, expected_segment = -1, 0
        for place in np.flatnonzero(real):
            opens = place == 0 or tokens[place] == SEPARATOR
            expected_position = 0 if opens else expected_position + 1
            expected_segment += opens
            assert positions[place] == expected_position
            assert segments[place] == expected_segment
        assert positions.max() < length


@given(documents=documents_of_tokens, length=st.integers(1, 40), seed=st.integers(0, 9))
def test_only_the_end_of_the_last_example_is_padded(documents, length, seed):
    packed = _pack(documents, length, seed)
    epoch = _epoch(packed)
    real = epoch["segments"].reshape(-1) > 0
    assert real[: packed.total].all()
    assert not real[packed.total :].any()
    np.testing.assert_array_equal(epoch["weights"].reshape(-1), real.astype(np.float32))
    for name in ("tokens", "targets"):
        assert (epoch[name].reshape(-1)[~real] == PADDING).all()
    assert (epoch["positions"].reshape(-1)[~real] == 0).all()


@given(documents=documents_of_tokens, length=st.integers(1, 40), data=st.data())
def test_a_batch_is_its_examples(documents, length, data):
    packed = _pack(documents, length, 0)
    rows = np.array(data.draw(st.lists(st.integers(0, len(packed) - 1), min_size=1, max_size=6)))
    batch = packed.read(rows)
    for place, row in enumerate(rows):
        for name, column in packed.read(np.array([row])).items():
            np.testing.assert_array_equal(column[0], batch[name][place])
            assert column.dtype == (np.float32 if name == "weights" else np.int32)


def test_documents_are_joined_in_an_order_of_the_seed():
    documents = [[number] for number in range(50)]
    orders = [_epoch(_pack(documents, 100, seed))["tokens"][0, 1::2].tolist() for seed in (0, 0, 1, None)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[3] == list(range(50))
    assert sorted(orders[0]) == orders[3]


@pytest.mark.parametrize(
    "vocab, dtype", [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_tokens_are_kept_in_the_smallest_dtype_that_holds_them(vocab, dtype):
    joined = corpus([np.array([vocab - 1])], separator=0, vocab=vocab)
    assert joined.tokens.dtype == dtype
    assert joined.tokens.tolist() == [0, vocab - 1]


def test_a_stored_corpus_equals_the_one_in_memory(tmp_path):
    documents = [np.array([1, 2, 300]), np.array([], np.int64), np.array([4])]
    kept = stored_corpus(tmp_path / "folder" / "c", documents, separator=999, vocab=1000)
    memory = corpus(documents, separator=999, vocab=1000)
    np.testing.assert_array_equal(kept.tokens, memory.tokens)
    np.testing.assert_array_equal(kept.starts, memory.starts)
    again = stored_corpus(tmp_path / "folder" / "c", None, separator=999, vocab=1000)
    np.testing.assert_array_equal(again.tokens, memory.tokens)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["c.starts.npy", "c.tokens"]


def test_a_corpus_that_broke_off_is_not_there(tmp_path):
    def broken():
        yield np.array([1])
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        stored_corpus(tmp_path / "c", broken(), separator=9, vocab=10)
    assert list(tmp_path.iterdir()) == []
    assert stored_corpus(tmp_path / "c", None, separator=9, vocab=10) is None


@pytest.mark.parametrize("damaged", ["c.tokens", "c.starts.npy"])
def test_a_damaged_cache_is_written_anew(tmp_path, damaged):
    documents = [np.array([1, 2]), np.array([3])]
    stored_corpus(tmp_path / "c", documents, separator=9, vocab=10)
    path = tmp_path / damaged
    path.write_bytes(path.read_bytes()[:-3])
    assert stored_corpus(tmp_path / "c", None, separator=9, vocab=10) is None
    again = stored_corpus(tmp_path / "c", documents, separator=9, vocab=10)
    assert again.tokens.tolist() == [9, 1, 2, 9, 3]
    assert again.starts.tolist() == [0, 3, 5]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cache .*file: cannot write"):
        stored_corpus(tmp_path / "file" / "c", [np.array([1])], separator=9, vocab=10)


def test_nothing_to_pack_is_an_error():
    with pytest.raises(UserError, match="every document is empty"):
        pack(corpus([], separator=9, vocab=10), 4, separator=9, padding=8)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        pack(corpus([np.array([1])], separator=9, vocab=10), 0, separator=9, padding=8)


@given(st.lists(st.integers(0, 255), max_size=20), st.integers(0, 19), st.integers(1, 255))
def test_digest_changes_with_any_byte(values, place, change):
    array = np.array(values, np.uint8)
    assert digest(array) == digest(array.copy())
    if place < array.size:
        other = array.copy()
        other[place] ^= np.uint8(change)
        assert digest(other) != digest(array)
    assert digest(array.astype(np.uint16)) != digest(array)
