"""What an experiment holds: lazy, checked, and reproducible."""

import gzip
import json
import os

import jax
import numpy as np
import pytest

from odjax_train.data import ByteTokenizer, HuggingFaceTokenizer, Images, Pairs, Text
from odjax_train.data.records import write_arrayrecord
from odjax_train.errors import UserError


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"line {number}\n" for number in range(200)))
    return path


@pytest.fixture(scope="module")
def pair_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    source = [f"Satz {number}" for number in range(40)]
    target = [f"sentence {number}" for number in range(40)]
    source[3] = target[5] = " "
    (folder / "a.de.gz").write_bytes(gzip.compress("\n".join(source).encode() + b"\n"))
    (folder / "b.en").write_text("\n".join(target) + "\n")
    return folder


def _same(left, right):
    return all(np.array_equal(left[name], right[name]) for name in left)


def _datasets(text_file, pair_files):
    return {
        "text": Text(source=f"text:{text_file}", length=16),
        "images": Images(shift=1, flip=True),
        "pairs": Pairs(
            source=f"text:{pair_files}/a.de.gz", target=f"text:{pair_files}/b.en", length=12, held_out=0.1
        ),
    }


@pytest.mark.parametrize("kind", ["text", "images", "pairs"])
def test_examples_are_what_element_spec_says(kind, text_file, pair_files):
    data = _datasets(text_file, pair_files)[kind]
    spec = data.element_spec()
    for dataset in (data.train(0), data.evaluation()):
        example = dataset[0]
        assert set(example) == set(spec)
        for name, column in example.items():
            assert jax.ShapeDtypeStruct(np.shape(column), column.dtype) == spec[name], name


@pytest.mark.parametrize("kind", ["text", "images", "pairs"])
def test_the_same_seed_is_the_same_stream_and_another_is_another(kind, text_file, pair_files):
    data, again = (_datasets(text_file, pair_files)[kind] for _ in range(2))
    places = np.arange(100, 140)
    first = data.train(3).take(places)
    assert _same(first, again.train(3).take(places))
    assert not _same(first, data.train(4).take(places))
    assert data.train(3).fingerprint == again.train(4).fingerprint
    assert _same(data.evaluation().take(np.arange(3)), again.evaluation().take(np.arange(3)))


@pytest.mark.parametrize("kind", ["text", "images", "pairs"])
def test_descriptions_are_json_and_count_the_examples(kind, text_file, pair_files):
    data = _datasets(text_file, pair_files)[kind]
    found = json.loads(json.dumps(data.describe()))
    assert found["evaluation_examples"] == len(data.evaluation())
    assert found["train_examples"] == data.train(0).size
    assert found["train_fingerprint"] == data.train(0).fingerprint
    assert found["train_fingerprint"] != found["evaluation_fingerprint"]


def test_a_plan_touches_no_file():
    specs = [
        Text(
            source="text:/no/such", tokenizer=HuggingFaceTokenizer("/no/such.json"), length=32
        ).element_spec(),
        Images(source="npz:/no/such", shape=(28, 28, 1)).element_spec(),
        Pairs(source="text:/no/such", target="text:/no/such").element_spec(),
    ]
    assert [len(spec) for spec in specs] == [5, 3, 5]
    with pytest.raises(UserError, match="tokenizer /no/such"):
        Text(source="digits", tokenizer=HuggingFaceTokenizer("/no/such.json")).train(0)
    with pytest.raises(UserError, match="no file matches /no/such"):
        Text(source="text:/no/such").train(0)


def test_an_epoch_of_text_is_the_train_part_and_evaluation_the_rest(text_file):
    data = Text(source=f"text:{text_file}", length=16)
    dataset = data.train(0)
    epoch = dataset.take(np.arange(dataset.size))
    tokens = epoch["tokens"][epoch["segments"] > 0]
    held = data.evaluation().take(np.arange(len(data.evaluation())))
    held_text = ByteTokenizer().decode(held["targets"].reshape(-1))
    whole = text_file.read_text()
    assert whole.endswith(held_text)
    assert sorted(tokens[tokens < 0xF8]) == sorted(whole[: -len(held_text)].encode())


def test_text_of_an_evaluation_source_is_used_whole(text_file, tmp_path):
    (tmp_path / "held.txt").write_text("held out\n")
    data = Text(source=f"text:{text_file}", evaluation_source=f"text:{tmp_path}/held.txt", length=16)
    assert ByteTokenizer().decode(data.evaluation()[0]["targets"]) == "held out\n"
    assert data.describe()["train_tokens"] == text_file.stat().st_size + 1


def test_cached_text_is_the_same_and_follows_the_file(text_file, tmp_path):
    plain = Text(source=f"text:{text_file}", length=16)
    for _ in range(2):
        cached = Text(source=f"text:{text_file}", length=16, cache=tmp_path)
        assert _same(cached.train(1).take(np.arange(30)), plain.train(1).take(np.arange(30)))
        assert cached.train(1).fingerprint == plain.train(1).fingerprint
    assert len(list(tmp_path.iterdir())) == 2
    copy = tmp_path / "other" / "book.txt"
    copy.parent.mkdir()
    copy.write_bytes(text_file.read_bytes())
    first = Text(source=f"text:{copy}", length=16, cache=tmp_path / "cache").train(0).fingerprint
    # Of the same size and written at another time.
    copy.write_bytes(text_file.read_bytes().upper())
    os.utime(copy, (1, 1))
    assert Text(source=f"text:{copy}", length=16, cache=tmp_path / "cache").train(0).fingerprint != first


def test_text_from_records_of_text_and_of_token_ids(tmp_path):
    write_arrayrecord(tmp_path / "t", [{"text": "abc"}] * 10)
    write_arrayrecord(tmp_path / "i", [{"text": np.frombuffer(b"abc", np.uint8)}] * 10)
    examples = [Text(source=f"arrayrecord:{tmp_path}/{name}", length=4).train(0)[0] for name in "ti"]
    assert examples[0]["tokens"].tolist() == [0xFF, *b"abc"]
    assert _same(*examples)


def test_text_errors(text_file, tmp_path):
    with pytest.raises(
        UserError, match=r"book\.txt': length 5000 is longer than its whole text of \d+ tokens"
    ):
        Text(source=f"text:{text_file}", length=5000).train(0)
    with pytest.raises(
        UserError, match=r"'digits': its records have no field 'text'; they hold image, label"
    ):
        Text(source="digits").train(0)
    with pytest.raises(UserError, match="length must be at least 1, got 0"):
        Text(length=0)
    with pytest.raises(UserError, match="held_out must be between 0 and 1, got 1"):
        Text(held_out=1.0)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("")
    with pytest.raises(UserError, match="all 1 documents of its train part are empty"):
        Text(source=f"text:{tmp_path}/*.txt").train(0)
    write_arrayrecord(tmp_path / "i", [{"text": np.array([1, 300])}] * 10)
    with pytest.raises(
        UserError, match="record 0 has token ids from 1 to 300, the tokenizer byte has 0 to 255"
    ):
        Text(source=f"arrayrecord:{tmp_path}/i").train(0)


def test_images_are_scaled_to_one_and_standardised():
    plain = Images().evaluation().take(np.arange(20))["image"]
    assert plain.min() == 0.0
    assert plain.max() == 1.0
    normal = Images(mean=(0.25,), std=(0.5,)).evaluation().take(np.arange(20))["image"]
    np.testing.assert_allclose(normal, (plain - 0.25) / 0.5, rtol=0, atol=1e-6)


def test_images_are_moved_within_the_shift_and_mirrored_half_of_the_time(tmp_path):
    image = np.zeros((7, 9, 1), np.uint8)
    image[3, 4] = 255  # in the middle: mirroring does not move it
    image[3, 5] = 100
    np.savez(tmp_path / "a.npz", x=np.repeat(image[None], 20, 0), y=np.zeros(20, int))
    data = Images(source=f"npz:{tmp_path}/a.npz", shape=(7, 9, 1), classes=1, shift=2, flip=True)
    images = data.train(0).take(np.arange(2000))["image"][..., 0]
    places = np.array([np.unravel_index(np.argmax(one), one.shape) for one in images]) - [3, 4]
    assert {tuple(place) for place in places} == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    beside = [one[3 + y, 5 + x] > 0 for one, (y, x) in zip(images, places, strict=True)]
    # Binomial(2000, 1/2): five standard deviations.
    assert abs(sum(beside) - 1000) < 5 * np.sqrt(500)
    assert np.allclose(images.sum((1, 2)), 355 / 255)
    still = data.evaluation()[0]["image"]
    np.testing.assert_array_equal(still, image.astype(np.float32) / np.float32(255))


def test_image_errors_name_the_source_the_example_and_the_value(tmp_path):
    labels = np.arange(20) % 3
    np.savez(tmp_path / "a.npz", x=np.zeros((20, 4, 4, 3), np.uint8), y=labels)
    spec = f"npz:{tmp_path}/a.npz"
    with pytest.raises(
        UserError, match=r"a\.npz': image 0 has shape \(4, 4, 3\), needed \(8, 8, 1\); set shape=\(4, 4, 3\)"
    ):
        Images(source=spec).train(0)
    with pytest.raises(UserError, match=r"a\.npz': example 2 has label 2, outside the classes 0 to 1"):
        Images(source=spec, shape=(4, 4, 3), classes=2, evaluation_source=spec).train(0)
    np.savez(tmp_path / "b.npz", x=np.zeros((20, 4, 4), np.uint8), y=labels / 2)
    with pytest.raises(UserError, match="labels must be integers"):
        Images(source=f"npz:{tmp_path}/b.npz", shape=(4, 4, 1)).train(0)
    with pytest.raises(UserError, match="its records have no 'image'; they hold name, text"):
        Images(source="stdlib").train(0)


def test_records_from_storage_are_checked_when_they_are_read(tmp_path):
    good = [{"image": np.zeros((4, 4), np.uint8), "label": number % 2} for number in range(20)]
    write_arrayrecord(tmp_path / "label", [*good[:-1], {**good[0], "label": 7}])
    write_arrayrecord(tmp_path / "shape", [*good[:-1], {**good[0], "image": np.zeros((5, 4), np.uint8)}])
    spec = {"shape": (4, 4, 1), "classes": 2, "evaluation_source": "digits"}
    for name, message in (
        ("label", "example 19 has label 7, outside the classes 0 to 1"),
        ("shape", r"image 19 has shape \(5, 4\), needed \(4, 4, 1\)"),
    ):
        dataset = Images(source=f"arrayrecord:{tmp_path}/{name}", **spec).train(0)
        with pytest.raises(UserError, match=message):
            dataset.take(np.arange(20))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"shape": (8, 8)}, r"shape must be \(height, width, channels\), got \(8, 8\)"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"mean": (0.5,)}, "mean and std belong together"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, r"mean has 2 values; shape \(8, 8, 1\) has 1 channels"),
        ({"mean": (0.5,), "std": (0.0,)}, r"std must be positive, got \(0\.0,\)"),
        ({"shift": 8}, r"shift must be from 0 to below the image's sides \(8, 8\), got 8"),
    ],
)
def test_image_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(UserError, match=message):
        Images(**arguments)


def test_pairs_stay_together_and_targets_are_shifted(pair_files):
    data = Pairs(
        source=f"text:{pair_files}/a.de.gz", target=f"text:{pair_files}/b.en", length=14, held_out=0.1
    )
    tokenizer = data.tokenizer
    numbers = []
    for dataset in (data.train(0), data.evaluation()):
        batch = dataset.take(np.arange(dataset.size))
        for place in range(dataset.size):
            one = {name: column[place] for name, column in batch.items()}
            number = tokenizer.decode(one["source"][one["source_mask"]]).removeprefix("Satz ")
            real = one["weights"] > 0
            assert tokenizer.decode(one["targets"][real]) == f"sentence {number}"
            assert one["targets"][real][-1] == tokenizer.separator
            np.testing.assert_array_equal(one["tokens"][real][1:], one["targets"][real][:-1])
            assert one["tokens"][0] == tokenizer.separator
            assert (one["targets"][~real] == tokenizer.padding).all()
            assert (one["source"][~one["source_mask"]] == tokenizer.padding).all()
            numbers.append(int(number))
    assert sorted(numbers) == [number for number in range(40) if number not in (3, 5)]
    assert data.describe()["train_left_out"] == 2
    assert data.describe()["train_cut"] == 0


def test_long_pairs_are_cut_and_counted(pair_files):
    data = Pairs(
        source=f"text:{pair_files}/a.de.gz", target=f"text:{pair_files}/b.en", length=9, held_out=0.1
    )
    example = data.evaluation()[0]
    # 8 tokens of the target fit beside the separator that ends it.
    assert data.tokenizer.decode(example["targets"]) == "sentence"
    assert example["targets"][-1] == data.tokenizer.separator
    found = data.describe()
    assert found["train_cut"] == found["train_examples"]


def test_pair_errors(pair_files, tmp_path):
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"not line-aligned: 40 and 2 lines"):
        Pairs(source=f"text:{pair_files}/b.en", target=f"text:{tmp_path}/short.txt").train(0)
    with pytest.raises(
        UserError, match="'digits': pairs are read from one text file a side; write text:<file>"
    ):
        Pairs(source="digits", target="digits").train(0)
    with pytest.raises(UserError, match="evaluation_source and evaluation_target belong together"):
        Pairs(source="text:a", target="text:b", evaluation_source="text:c")


def test_real_translation_pairs(real_data):
    folder = real_data / "multi30k"
    data = Pairs(
        source=f"text:{folder}/val.de.gz",
        target=f"text:{folder}/val.en.gz",
        evaluation_source=f"text:{folder}/test_2016_flickr.de.gz",
        evaluation_target=f"text:{folder}/test_2016_flickr.en.gz",
        length=64,
    )
    found = data.describe()
    assert (found["train_examples"], found["evaluation_examples"]) == (1014, 1000)


def test_real_mnist(real_data):
    data = Images(source=f"npz:{real_data}/mnist.npz", shape=(28, 28, 1))
    assert data.train(0).size == 60000
    assert len(data.evaluation()) == 10000


def test_stdlib_trains_on_millions_of_bytes():
    found = Text(length=128).describe()
    assert found["train_tokens"] > 5_000_000
    assert found["evaluation_tokens"] > 200_000
