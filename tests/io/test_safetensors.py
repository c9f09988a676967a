"""Safetensors files: what is written is read, by us and by the format's own package, and bad files are refused."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.io import load_safetensors, load_shards, safetensors_metadata, save_safetensors
from odjax.io.safetensors import DTYPES, MAX_HEADER

safetensors = pytest.importorskip("safetensors.numpy", reason="the package of the format is not installed")

deserialize = safetensors.deserialize

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def arrays(draw):
    """Any bits of any dtype of the format; only 0 and 1 are bool."""
    dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(SHAPES)
    size = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype == np.bool_:
        data = bytes(byte & 1 for byte in data)
    return np.frombuffer(data, dtype).reshape(shape)


TENSORS = st.dictionaries(NAMES, arrays(), max_size=4)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("safetensors") / "x.safetensors"


@given(
    tensors=TENSORS,
    metadata=st.none() | st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_what_is_written_is_read_bit_for_bit(file, tensors, metadata):
    save_safetensors(file, tensors, metadata)
    assert_same(load_safetensors(file), tensors)
    assert safetensors_metadata(file) == (metadata or {})
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@given(tensors=TENSORS)
def test_every_tensor_is_aligned_and_equal_tensors_give_equal_files(file, tensors):
    save_safetensors(file, tensors)
    first = file.read_bytes()
    length = int.from_bytes(first[:8], "little")
    assert length % 8 == 0
    for name, array in load_safetensors(file).items():
        if array.size:
            assert first[8 : 8 + length].startswith(b"{")
            offset = json.loads(first[8 : 8 + length])[name]["data_offsets"][0]
            assert (8 + length + offset) % array.dtype.alignment == 0
    save_safetensors(file, dict(reversed(tensors.items())))
    assert file.read_bytes() == first


@given(tensors=TENSORS)
def test_the_package_of_the_format_reads_what_is_written_here(file, tensors):
    save_safetensors(file, tensors)
    names = {dtype: name for name, dtype in DTYPES.items()}
    found = dict(deserialize(file.read_bytes()))
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        assert found[name]["dtype"] == names[array.dtype]
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()


@given(tensors=TENSORS)
def test_what_the_package_of_the_format_writes_is_read_here(file, tensors):
    safetensors.save_file({name: array.copy() for name, array in tensors.items()}, file, {"format": "pt"})
    assert_same(load_safetensors(file), tensors)
    assert safetensors_metadata(file) == {"format": "pt"}


def test_arrays_are_views_of_the_file_that_cannot_be_written(file):
    save_safetensors(file, {"w": np.arange(6, dtype=np.float32).reshape(2, 3)})
    w = load_safetensors(file)["w"]
    with pytest.raises(ValueError, match="read-only"):
        w[0, 0] = 1
    with file.open("r+b") as other:
        other.seek(-4, 2)
        other.write(struct.pack("<f", 7.0))
    assert w[1, 2] == 7


def test_arrays_of_jax_and_of_other_layouts_are_written_row_by_row_and_little_endian(file):
    w = np.arange(6.0).reshape(2, 3)
    given_ = {
        "jax": jnp.asarray(w, jnp.bfloat16),
        "turned": w.T,
        "big": w.astype(">f8"),
        "scalar": np.float32(2),
    }
    save_safetensors(file, given_)
    found = load_safetensors(file)
    assert found["jax"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["jax"].astype(np.float32), w)
    np.testing.assert_array_equal(found["turned"], w.T)
    np.testing.assert_array_equal(found["big"], w)
    assert found["scalar"].shape == ()


def test_a_header_of_odd_length_gives_aligned_arrays_all_the_same(file):
    header = json.dumps({"w": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}).encode()
    for spaces in range(8):
        text = header + b" " * spaces
        file.write_bytes(struct.pack("<Q", len(text)) + text + np.arange(2.0).tobytes())
        w = load_safetensors(file)["w"]
        assert w.flags.aligned
        assert not w.flags.writeable
        np.testing.assert_array_equal(w, [0, 1])


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "x.safetensors"
    save_safetensors(file, {"w": np.ones(2)})
    before = file.read_bytes()
    for bad, error in (
        ({"w": np.array(["text"])}, ValueError),
        ({"w": [1.0]}, TypeError),
        ({3: np.ones(1)}, TypeError),
    ):
        with pytest.raises(error):
            save_safetensors(file, bad)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        save_safetensors(tmp_path / "folder", {"w": np.ones(2)})
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.safetensors"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        ({"w": np.array([1j])}, None, ValueError, "'w' is complex128"),
        ({"__metadata__": np.ones(1)}, None, ValueError, "place of the metadata"),
        ({"k": jax.random.key(0)}, None, TypeError, "jax.random.key_data"),
        ({}, {"step": 3}, TypeError, "metadata must be text, got 'step': 3"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(file, tensors, metadata, error, message):
    with pytest.raises(error, match=message):
        save_safetensors(file, tensors, metadata)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LATER = F32 | {"data_offsets": [8, 16]}
BAD = {
    "too few bytes": (b"1234567", "7 bytes are too few"),
    "truncated": (struct.pack("<Q", 100) + b"{}", "truncated: 2 of 100 bytes"),
    "header above 100 MB": (struct.pack("<Q", MAX_HEADER + 1) + b"{}", "header of 100000001 bytes"),
    "no object": (b"[]", "must start with '{'"),
    "no JSON": (b'{"w": ', "not JSON"),
    "no UTF-8": (b'{"\xff": 1}', "not JSON in UTF-8"),
    "nested too deep": (b'{"w":' + b"[" * 200_000, "not JSON"),
    "same name twice": (b'{"w": %s, "w": %s}' % ((json.dumps(F32).encode(),) * 2), "'w' comes twice"),
    "metadata": ({"__metadata__": {"a": 1}}, "must map text to text"),
    "no entry": ({"w": [0, 8]}, "tensor 'w' needs dtype, shape and data_offsets"),
    "unknown key": ({"w": F32 | {"more": 1}}, "tensor 'w' needs dtype"),
    "unknown dtype": ({"w": F32 | {"dtype": "F33"}}, "tensor 'w' has dtype 'F33'"),
    "half a byte": ({"w": F32 | {"dtype": "F4"}}, "less than a byte"),
    "dtype is no text": ({"w": F32 | {"dtype": ["F32"]}}, "tensor 'w' has dtype"),
    "negative size": ({"w": F32 | {"shape": [-2]}}, r"shape \[-2\]"),
    "size is no number": ({"w": F32 | {"shape": [True, 2]}}, "sizes must be whole numbers"),
    "one offset": ({"w": F32 | {"data_offsets": [8]}}, r"needed are \[begin, end\]"),
    "offsets turned round": ({"w": F32 | {"data_offsets": [8, 0]}}, "-8 bytes of data"),
    "size and shape": ({"w": F32 | {"shape": [3]}}, "has 8 bytes of data .* shape .3. has 12"),
    "out of range": ({"w": F32, "v": LATER}, r"tensor 'v' \[8, 16\] is out of range: the file has 8 bytes"),
    "overlap": ({"w": F32, "v": F32 | {"shape": [1], "data_offsets": [4, 8]}}, "'v' .* overlaps 'w'"),
    "same place": ({"w": F32, "v": F32}, "tensor 'v' .* overlaps 'w'|tensor 'w' .* overlaps 'v'"),
    "hole": ({"w": F32 | {"shape": [1], "data_offsets": [4, 8]}}, "leaves a hole"),
    "data left over": ({"w": F32 | {"shape": [1], "data_offsets": [0, 4]}}, "the tensors end at 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_name(file, case):
    content, message = BAD[case]
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    whole = case in ("too few bytes", "truncated", "header above 100 MB")
    file.write_bytes(text if whole else struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(ValueError, match=message) as caught:
        load_safetensors(file)
    assert str(file) in str(caught.value)


@given(tensors=TENSORS, data=st.data())
def test_a_file_cut_anywhere_is_refused(file, tensors, data):
    save_safetensors(file, tensors)
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="x.safetensors"):
        load_safetensors(file)


def write_index(folder, where):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_are_put_together_in_the_order_of_their_index(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"x": np.ones(1), "y": np.zeros(2)})
    save_safetensors(tmp_path / "b.safetensors", {"z": np.full(3, 2.0)})
    write_index(tmp_path, {"z": "b.safetensors", "x": "a.safetensors", "y": "a.safetensors"})
    found = load_shards(tmp_path)
    assert list(found) == ["z", "x", "y"]
    np.testing.assert_array_equal(found["z"], np.full(3, 2.0))
    save_safetensors(tmp_path / "model.safetensors", {"w": np.ones(1)})
    assert list(load_shards(tmp_path)) == ["w"]


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"x": "a.safetensors"}, ValueError, r"not in the index \['y'\]"),
        ({"x": "a.safetensors", "y": "a.safetensors", "z": "a.safetensors"}, ValueError, r"missing \['z'\]"),
        ({"x": "../a.safetensors"}, ValueError, "in the same folder"),
        ({"x": "c.safetensors"}, FileNotFoundError, "c.safetensors"),
        (None, ValueError, "needs a weight_map"),
    ],
)
def test_an_index_that_differs_from_its_shards_is_refused(tmp_path, where, error, message):
    save_safetensors(tmp_path / "a.safetensors", {"x": np.ones(1), "y": np.zeros(2)})
    write_index(tmp_path, where)
    with pytest.raises(error, match=message):
        load_shards(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json"):
        load_shards(tmp_path)
