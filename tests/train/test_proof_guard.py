"""Texts with labels of harm, the task and measure of a guard, and what its proof is made of."""

import gzip
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import average_precision_score

from odjax.core import leaves_with_paths, partition
from odjax.lowrank import GUARD, Guard, adapt, guard_loss, positive_weights
from odjax.models import bert
from odjax_train import Experiment
from odjax_train.config import load
from odjax_train.data.moderation import CATEGORIES, Moderation, Texts, guard_precision, read_labelled
from odjax_train.errors import UserError
from odjax_train.loop import measure
from odjax_train.proofs import lora_guard
from odjax_train.tasks import moderation

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "worse"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of whole words with [CLS] and [SEP], and sixty texts of it."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("guard")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path / "tokenizer.json"))
    rng = np.random.default_rng(0)
    lines = []
    for i in range(60):
        words = rng.choice(WORDS[4:], size=rng.integers(1, 12))
        line = {"prompt": " ".join(words), "S": int("bad" in words), "V": int("worse" in words)}
        if i % 5 == 0:
            del line["V"]
        lines.append(json.dumps(line))
    lines.append(json.dumps({"prompt": "good film"}))  # no label
    with gzip.open(path / "texts.jsonl.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return path


def data_of(folder, **more):
    given = {"source": folder / "texts.jsonl.gz", "encoder": folder, "length": 8, "categories": ("S", "V")}
    return Moderation(**{**given, **more})


def experiment_of(folder, **more):
    data = data_of(folder)
    encoder = bert("tiny", vocab=8, layers=1, width=16, heads=2, mlp_width=16)
    backbone = adapt(encoder, rank=2, alpha=4.0, where=".*attn/(q|v)/kernel")
    given = {
        "model": Guard(backbone, categories=2),
        "task": moderation(weights=data.weights),
        "data": data,
        "optimizer": optax.sgd(1.0),
        "trainable": GUARD,
        "measures": [guard_precision(2)],
        "steps": 2,
        "batch": 8,
    }
    return Experiment(**{**given, **more})


def test_texts_are_cut_padded_on_the_right_and_keep_what_is_not_known(folder):
    data = data_of(folder)
    train, test = data.parts
    prompts, labels = read_labelled(data.source, ("S", "V"))
    assert len(train.tokens) + len(test.tokens) == len(prompts) == 60
    assert (labels == -1).sum() == 12
    sizes = sorted(min(8, 2 + len(prompt.split())) for prompt in prompts)
    assert sorted([*train.mask.sum(axis=1), *test.mask.sum(axis=1)]) == sizes
    for part in (train, test):
        assert (part.tokens[:, 0] == 2).all()
        last = part.mask.sum(axis=1) - 1
        assert (part.tokens[np.arange(len(last)), last] == 3).all()
        assert not part.tokens[~part.mask].any()
        assert not (part.mask[:, 1:] & ~part.mask[:, :-1]).any()
    assert train.cut + test.cut == sum(len(prompt.split()) > 6 for prompt in prompts)
    assert data.describe()["train_examples"] == len(train.tokens)
    found = data.train(0)[3]
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in data.element_spec().items()
    }


def test_equal_texts_are_on_one_side_of_the_split(folder):
    train, test = data_of(folder).parts
    sides = [{tuple(row) for row in part.tokens[~(part.mask.all(axis=1))]} for part in (train, test)]
    assert not sides[0] & sides[1]


def test_the_weights_are_those_of_the_training_texts_also_while_a_step_is_traced(folder):
    data = data_of(folder)
    labels = data.parts[0].labels
    expected = positive_weights(jnp.asarray(labels == 1), jnp.asarray(labels >= 0))
    found = jax.jit(lambda: data.weights())()
    np.testing.assert_allclose(found.categories, expected.categories)
    np.testing.assert_allclose(found.unsafe, expected.unsafe)
    rare = data_of(folder, categories=("S", "HR"))
    with pytest.raises(UserError, match=r"texts.jsonl.gz: .* no positive in category 1, .* give cap="):
        rare.weights()
    assert rare.weights(cap=0.25).categories.tolist() == [0.25, 0]


def test_the_sums_of_the_task_are_those_of_the_loss(folder, program_of):
    experiment = experiment_of(folder)
    program = program_of(experiment, 1, 1, 1)
    with program.context():
        state = program.init()
    rows = [experiment.data.train(0)[i] for i in range(8)]
    batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    batch["weight"] = batch["weight"].at[-1].set(0.0)
    sums = program.evaluate(state.params, state.collections, batch)
    verdict = experiment.model.apply({"params": state.params}, batch["tokens"], batch["mask"], method="guard")
    weights = experiment.data.weights()
    each = guard_loss(
        *verdict,
        batch["labels"] == 1,
        pos_weight=weights.categories,
        unsafe_pos_weight=weights.unsafe,
        label_mask=batch["labels"] >= 0,
    )
    np.testing.assert_allclose(sums["loss"].total, each[:7].sum(), rtol=1e-5)
    assert sums["loss"].count == 7
    right = (verdict.unsafe >= 0) == (batch["labels"] == 1).any(axis=1)
    np.testing.assert_allclose(sums["unsafe_accuracy"].total, right[:7].sum())


def test_a_step_trains_the_guard_and_leaves_the_encoder_as_it_is(folder, program_of):
    experiment = experiment_of(folder)
    program = program_of(experiment, 2, 2, 2)
    with program.context():
        state = program.init()
    before = jax.device_get(state.params)
    rows = [experiment.data.train(0)[i] for i in range(8)]
    batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    with program.context():
        for _ in range(2):
            state, metrics = program.step(state, batch)
    after = jax.device_get(state.params)
    assert float(metrics["grad_norm"]) > 0
    (free, frozen), (new, kept) = (partition(tree, GUARD) for tree in (before, after))
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)
    for old, leaf in zip(jax.tree.leaves(free), jax.tree.leaves(new), strict=True):
        assert not np.array_equal(old, leaf)
    vectors = [
        jax.jit(experiment.model.apply)({"params": tree}, batch["tokens"], batch["mask"])
        for tree in (before, after)
    ]
    np.testing.assert_array_equal(*vectors)


def test_the_measure_is_the_average_precision_of_scikit_learn(folder, program_of):
    experiment = experiment_of(folder)
    program = program_of(experiment, 1, 1, 1)
    with program.context():
        state = program.init()
    found = measure(program, state)
    test = experiment.data.parts[1]
    verdict = experiment.model.apply(
        {"params": state.params}, test.tokens, jnp.asarray(test.mask), method="guard"
    )
    unsafe = average_precision_score((test.labels == 1).any(axis=1), verdict.unsafe)
    each = []
    for j in range(2):
        known = test.labels[:, j] >= 0
        each.append(average_precision_score(test.labels[known, j], verdict.categories[known, j]))
    np.testing.assert_allclose(found["precision/unsafe"], unsafe, rtol=1e-5)
    np.testing.assert_allclose(found["precision/categories"], np.mean(each), rtol=1e-5)


def test_the_configuration_builds_and_trains_what_the_paper_counts(folder, program_of):
    flags = {"data": folder / "texts.jsonl.gz", "base": folder, "cap": 50.0, "batch": 8}
    experiment = load(CONFIGS / "guard_moderation.py", flags).experiment()
    assert experiment.start_from == folder
    program = program_of(experiment, 1, 1, 1)
    free, _ = partition(program.state.params, experiment.trainable)
    factors, head = 6 * 2 * 8 * (384 + 384), 9 * 385
    assert sum(leaf.size for leaf in jax.tree.leaves(free)) == factors + head


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is no object with \"prompt\""),
        ('{"S": 1}', r"line 2 is no object with \"prompt\""),
        ('{"prompt": "a", "S": 2}', "line 2 has the label 2, neither 0 nor 1"),
        ('{"prompt": 3, "S": 1}', "line 2 has a prompt that is no text"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, line, message):
    file = tmp_path / "texts.jsonl"
    file.write_text(f'{{"prompt": "b", "S": 1}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        read_labelled(file, ("S",))


def test_files_and_settings_that_make_no_sense_are_named(tmp_path, folder):
    with pytest.raises(UserError, match="nothing.jsonl: cannot read it: No such file"):
        read_labelled(tmp_path / "nothing.jsonl", ("S",))
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="broken.gz: cannot read it"):
        read_labelled(tmp_path / "broken.gz", ("S",))
    with pytest.raises(UserError, match="no text has a label X"):
        read_labelled(folder / "texts.jsonl.gz", ("X",))
    with pytest.raises(UserError, match="tokenizer.json: no such file; encoder= is a folder"):
        _ = data_of(folder, encoder=tmp_path).parts
    with pytest.raises(UserError, match="length must be at least 1, got 0"):
        data_of(folder, length=0)
    with pytest.raises(UserError, match=r"held_out must be above 0 and at most 0.5, got 0.9"):
        data_of(folder, held_out=0.9)
    with pytest.raises(UserError, match="categories must be different names"):
        data_of(folder, categories=("S", "S"))
    with pytest.raises(UserError, match="its 60 texts are too few to hold out"):
        _ = data_of(folder, held_out=1e-6).parts


def test_every_text_of_the_proof_is_in_one_batch_of_about_its_length():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 97, 90)
    mask = np.arange(96)[None] < sizes[:, None]
    tokens = np.where(mask, 1 + np.arange(90)[:, None], 0)
    texts = Texts(tokens, mask, rng.integers(-1, 2, (90, 3)), 0)
    for order in (None, np.random.default_rng(1)):
        seen = np.zeros(90, int)
        for ids, kept, labels, weights, rows in lora_guard.batches(texts, order):
            np.add.at(seen, rows[weights > 0], 1)
            assert ids.shape == kept.shape
            assert ids.shape[1] % lora_guard.STEP == 0
            np.testing.assert_array_equal(kept.sum(axis=1), sizes[rows])
            np.testing.assert_array_equal(labels, texts.labels[rows])
            assert sizes[rows].min() > ids.shape[1] - lora_guard.STEP
        np.testing.assert_array_equal(seen, 1)


def test_the_head_alone_separates_what_is_linear():
    features = np.random.default_rng(0).normal(size=(96, 6)).astype(np.float32)
    labels = (features[:, :2] > 0.3).astype(np.float32)
    texts = Texts(np.ones((96, 1), np.int32), np.ones((96, 1), bool), labels, 0)
    head, params = lora_guard.fit_head(features, texts, epochs=60, seed=0)
    scores = lora_guard.stacked(head.apply({"params": params}, features))
    found = lora_guard.precisions(scores, jnp.asarray(labels))
    assert float(found[1]) > 0.97
    draws = lora_guard.resampled(np.asarray(scores), labels, 0)
    assert draws.shape == (lora_guard.RESAMPLES, 2)
    assert draws[:, 1].min() > 0.9


def test_the_real_prompts_have_the_published_labels(real_data):
    file = real_data / "moderation" / "samples-1680.jsonl.gz"
    if not file.is_file():
        pytest.skip("no moderation prompts in the data folder")
    prompts, labels = read_labelled(file, CATEGORIES)
    assert len(prompts) == 1680
    assert (labels == 1).any(axis=1).sum() == 522
    assert (labels == 1).sum(axis=0).tolist() == [237, 162, 94, 76, 51, 85, 41, 24]


def test_the_example_of_the_documentation_runs():
    page = pathlib.Path(__file__).parents[2] / "docs" / "guard.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["flagged"].shape == (1,)
    assert names["reply"].shape == (1, 4)
    trained = {path.split("/")[-1] for path, _ in leaves_with_paths(names["grads"])}
    assert trained == {"lora_a", "lora_b", "kernel", "bias"}
