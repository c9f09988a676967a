"""Sources: what is read, what is held out, and what a mistake is told."""

import gzip
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax_train.data.records import write_arrayrecord
from odjax_train.data.sources import Arrays, open_source, read_many, records, split_records
from odjax_train.errors import UserError


def _texts(source):
    return [record["text"] for record in records(source)]


@given(size=st.integers(2, 300), held_out=st.floats(0.02, 0.5))
def test_train_and_test_records_partition_the_source(size, held_out):
    source = Arrays({"row": np.arange(size)})
    k = max(2, round(1 / held_out))
    if size < k:
        with pytest.raises(UserError, match=f"{size} records are too few to hold out one in {k}"):
            split_records("npz:x", source, "test", held_out)
        return
    train, test = (split_records("npz:x", source, split, held_out) for split in ("train", "test"))
    assert len(test) == size // k
    rows = [[int(record["row"]) for record in records(part)] for part in (train, test)]
    assert sorted(rows[0] + rows[1]) == list(range(size))
    assert [int(train[place]["row"]) for place in range(len(train))] == rows[0]


def test_held_out_digits_have_every_class_about_equally():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert len(train) + len(test) == len(open_source("digits", "all")) == 1797
    counts = np.bincount([int(record["label"]) for record in records(test)], minlength=10)
    assert counts.min() > 20
    assert test[0]["image"].shape == (8, 8, 1)
    assert test[0]["image"].dtype == np.uint8


def test_stdlib_is_python_source_without_tests_and_packages():
    train, test = open_source("stdlib", "train"), open_source("stdlib", "test")
    names = [[document.name for document in part.documents] for part in (train, test)]
    both = names[0] + names[1]
    assert not set(names[0]) & set(names[1])
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(both)
    assert not [n for n in both if {"test", "tests", "site-packages"} & set(n.split("/")[:-1])]
    # One in 16 of about 700 names: within four standard deviations.
    assert abs(len(names[1]) / len(both) - 1 / 16) < 4 * np.sqrt(1 / 16 / len(both))
    argparse = both.index("argparse.py")
    part, place = (train, argparse) if argparse < len(names[0]) else (test, argparse - len(names[0]))
    assert b"class ArgumentParser" in part[place]["text"]


def test_a_single_file_holds_out_its_end_behind_a_line(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"".join(b"line %d\n" % number for number in range(100)))
    train, test = (_texts(open_source(f"text:{path}", split)) for split in ("train", "test"))
    assert train[0] + test[0] == path.read_bytes()
    assert train[0].endswith(b"\n")
    assert test[0].startswith(b"line ")
    assert 0.08 < len(test[0]) / path.stat().st_size < 0.12
    assert _texts(open_source(f"text:{path}", "all")) == [path.read_bytes()]


def test_a_single_line_is_cut_between_characters(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("äöü" * 20, encoding="utf-8")
    for held_out in (0.1, 0.11, 0.13):
        train, test = (
            _texts(open_source(f"text:{path}", split, held_out=held_out))[0] for split in ("train", "test")
        )
        assert train.decode() + test.decode() == "äöü" * 20


def test_several_files_are_split_by_name_with_one_at_least_on_each_side(tmp_path):
    wanted = [b"file %d\n" % number for number in range(40)]
    for number, text in enumerate(wanted):
        (tmp_path / "a" / str(number)).mkdir(parents=True)
        (tmp_path / "a" / str(number) / "t.txt").write_bytes(text)
    spec = f"text:{tmp_path}/a/**/*.txt"
    train, test = (_texts(open_source(spec, split)) for split in ("train", "test"))
    assert sorted(train + test) == sorted(wanted)
    assert 1 <= len(test) <= 8
    two = f"text:{tmp_path}/a/[01]/t.txt"
    for part in (0.01, 0.99):
        assert [len(open_source(two, split, held_out=part)) for split in ("train", "test")] == [1, 1]
    # The split follows the names below the pattern: a copy elsewhere is split alike.
    (tmp_path / "a").rename(tmp_path / "b")
    assert _texts(open_source(f"text:{tmp_path}/b/**/*.txt", "test")) == test


def test_compressed_text_is_read_as_text(tmp_path):
    path = tmp_path / "t.txt.gz"
    path.write_bytes(gzip.compress(b"one\ntwo\n"))
    assert _texts(open_source(f"text:{path}", "all")) == [b"one\ntwo\n"]


def test_npz_with_and_without_a_declared_test_part(tmp_path):
    images, labels = np.arange(40 * 4, dtype=np.uint8).reshape(40, 2, 2), np.arange(40) % 3
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5])
    np.savez(tmp_path / "b.npz", x=images, y=labels)
    assert len(open_source(f"npz:{tmp_path}/a.npz", "train")) == 40
    assert len(open_source(f"npz:{tmp_path}/a.npz", "test")) == 5
    assert len(open_source(f"npz:{tmp_path}/a.npz", "all")) == 45
    assert len(open_source(f"npz:{tmp_path}/b.npz", "test")) == 4
    assert len(open_source(f"npz:{tmp_path}/b.npz", "test", held_out=0.25)) == 10
    record = open_source(f"npz:{tmp_path}/a.npz", "train")[7]
    np.testing.assert_array_equal(record["image"], images[7])
    assert record["label"] == labels[7]


def test_npz_of_compressed_images_is_decoded(tmp_path):
    import io

    from PIL import Image

    images = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 3), np.uint8)
    parts = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")  # lossless, so that what comes out is known
        parts.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *(part.size for part in parts)])
    arrays = {"jpeg": np.concatenate(parts), "offset": offsets, "y": np.array([2, 0, 1])}
    path = tmp_path / "c.npz"
    np.savez(path, **{f"{name}_{split}": a for name, a in arrays.items() for split in ("train", "test")})
    source = open_source(f"npz:{path}", "test")
    np.testing.assert_array_equal(source.columns["image"], images)
    np.testing.assert_array_equal(source.columns["label"], [2, 0, 1])


def test_arrayrecord_returns_what_was_written(tmp_path):
    written = [{"image": np.full((2, 2), number, np.uint8), "label": number} for number in range(30)]
    assert write_arrayrecord(tmp_path / "a-0.arrayrecord", written[:20]) == 20
    assert write_arrayrecord(tmp_path / "a-1.arrayrecord", written[20:]) == 10
    source = open_source(f"arrayrecord:{tmp_path}/a-*.arrayrecord", "all")
    assert [record["label"] for record in records(source)] == list(range(30))
    np.testing.assert_array_equal(source[23]["image"], np.full((2, 2), 23))
    test = open_source(f"arrayrecord:{tmp_path}/a-*.arrayrecord", "test", held_out=0.2)
    assert len(test) == len(read_many(test, np.arange(6))) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.arrayrecord", "a-1.arrayrecord"]


def test_arrayrecord_of_raw_text(tmp_path):
    write_arrayrecord(tmp_path / "t.arrayrecord", [b"one", b"two"])
    assert _texts(open_source(f"arrayrecord+text:{tmp_path}/t.arrayrecord", "all")) == [b"one", b"two"]
    with pytest.raises(UserError, match=r"record 0 (is|cannot).* for raw text write arrayrecord\+text:"):
        open_source(f"arrayrecord:{tmp_path}/t.arrayrecord", "all")[0]


def test_a_record_of_another_kind_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(TypeError, match="record 1 is a str; needed a dict or bytes"):
        write_arrayrecord(tmp_path / "t.arrayrecord", [b"one", "two"])
    assert list(tmp_path.iterdir()) == []


def test_tfds_reads_its_mock_data_without_tensorflow():
    program = """
import sys
import tensorflow_datasets as tfds
from tensorflow_datasets.core.data_sources.array_record import ArrayRecordDataSource
from odjax_train.data import Images

# The mock's own __getitems__ cannot be called; its __getitem__ can.
ArrayRecordDataSource.__getitems__ = lambda self, keys: [self[key] for key in keys]
with tfds.testing.mock_data(num_examples=7):
    data = Images(source="tfds:mnist", shape=(28, 28, 1))
    batch = data.train(0).take(__import__("numpy").arange(20))
    assert batch["image"].shape == (20, 28, 28, 1), batch["image"].shape
    assert data.describe()["evaluation_examples"] == 7
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


_TINY_TFDS = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = sys.argv[1]
    def _info(self):
        image = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8)
        label = tfds.features.ClassLabel(num_classes=3)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, manager):
        return {"train": self._numbers(20), "validation": self._numbers(5)}
    def _numbers(self, count):
        for number in range(count):
            yield number, {"image": np.full((2, 2, 1), number, np.uint8), "label": number % 3}
    def _generate_examples(self):
        raise NotImplementedError

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


def test_tfds_reads_a_prepared_data_set_and_uses_validation_where_there_is_no_test(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-c", _TINY_TFDS, str(tmp_path)], check=True, timeout=120)
    program = """
from odjax_train.data.sources import open_source, records
from odjax_train.errors import UserError
train, test = open_source("tfds:tiny", "train"), open_source("tfds:tiny", "test")
assert len(train) == 20 and len(test) == 5, (len(train), len(test))
assert len(open_source("tfds:tiny", "all")) == 25
for record in records(train):
    assert int(record["image"].max()) % 3 == record["label"]
part = open_source("tfds:tiny@train[:50%]", "all")
assert len(part) == 10
assert len(open_source("tfds:tiny@train", "test")) == 2
try:
    open_source("tfds:tiny@nothing", "all")
except UserError as error:
    assert "no split 'nothing'; there are train, validation" in str(error), error
else:
    raise AssertionError
"""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "cifar:x",
            r"unknown scheme 'cifar'; there are digits, stdlib, pydoc, text:<file or glob>, npz:<file>, tfds:<name>",
        ),
        ("digits:8", r"data source 'digits:8': write it as `digits`"),
        ("stdlib:", r"write it as `stdlib`"),
        ("npz", r"write it as `npz:<file>`"),
        ("text:/no/such.txt", r"data source 'text:/no/such\.txt': no file matches /no/such\.txt"),
        ("npz:/no/such.npz", r"no file /no/such\.npz"),
        ("arrayrecord:/no/such*", r"no file matches /no/such\*"),
        ("tfds:no_such_data_set", r"data source 'tfds:no_such_data_set': .*not found"),
    ],
)
def test_a_wrong_spec_is_told_what_to_write(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, spec, message",
    [
        (b"", "text:{}", r"is empty"),
        (b" \n ", "text:{}", r"is empty"),
        (b"a", "text:{}", r"too short \(1 bytes\) to hold out"),
        (b"not a gzip file", "text:{}.gz", r"cannot read .*\.gz"),
        (gzip.compress(b"text" * 100, mtime=0)[:-9], "text:{}.gz", r"cannot read .*\.gz"),
        (b"not an archive", "npz:{}", r"cannot read .*file"),
        (b"", "npz:{}", r"cannot read .*file"),
        (b"", "arrayrecord:{}", r"file is empty"),
        (b"x" * 100, "arrayrecord:{}", r"cannot read .*file"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, content, spec, message):
    spec = spec.format(tmp_path / "file")
    with open(spec.partition(":")[2], "wb") as file:
        file.write(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec, "train")
    assert repr(spec) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_told_how_to_be_a_glob(tmp_path):
    with pytest.raises(UserError, match=r"is a folder; write text:.*/\* or"):
        open_source(f"text:{tmp_path}", "train")


def test_npz_errors_list_what_is_there(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros(3), labels=np.zeros(3))
    with pytest.raises(UserError, match=r"needs the arrays x_train.*; it holds images, labels"):
        open_source(f"npz:{tmp_path}/a.npz", "train")
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 2)), y=np.zeros(4))
    with pytest.raises(UserError, match="3 images in x but 4 labels in y"):
        open_source(f"npz:{tmp_path}/b.npz", "train")
    np.savez(tmp_path / "c.npz", x=np.zeros((0, 2)), y=np.zeros(0))
    with pytest.raises(UserError, match="y is empty"):
        open_source(f"npz:{tmp_path}/c.npz", "train")
    np.save(tmp_path / "d.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"is not an \.npz archive"):
        open_source(f"npz:{tmp_path}/d.npy", "train")


def test_unknown_splits_and_parts_are_refused():
    with pytest.raises(ValueError, match="split must be one of train, test, all, got 'dev'"):
        open_source("digits", "dev")
    with pytest.raises(UserError, match=r"held_out must be between 0 and 1, got 1\.5"):
        open_source("digits", "test", held_out=1.5)
