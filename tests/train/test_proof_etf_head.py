"""What the proof of fixed heads is made of, on small networks; the proof itself runs with the others."""

import io
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from odjax.heads import etf_matrix
from odjax_train.proofs.etf_head import (
    Row,
    constancy_claims,
    digits,
    experiment_claims,
    mnist,
    table,
    transfer_claim,
)
from odjax_train.proofs.etf_head_figures import METRICS, _plane, collapse_figure, feature_figure
from odjax_train.proofs.etf_head_training import (
    CE,
    DR,
    HEADS,
    LEARNABLE,
    Recipe,
    class_vectors,
    collapse,
    features,
)
from odjax_train.proofs.etf_head_transfer import (
    Target,
    digits_transfers,
    of_classes,
    omniglot,
    probe,
    shrunk,
    turned,
)


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def rows(data):
    """The three heads after five epochs of small networks, two seeds each."""
    return table(data, Recipe(widths=(32, 16), epochs=5), 2, 0)


def test_digits_are_1200_to_train_on_and_597_to_test(data):
    assert [x.shape for part in data for x in part] == [(1200, 64), (1200,), (597, 64), (597,)]


def test_every_head_learns_digits_in_a_few_epochs(rows):
    for row in rows.values():
        assert row.accuracy.shape == (2,)
        assert row.accuracy.min() > 85


def test_all_heads_begin_with_the_same_backbone_and_leave_it(rows):
    for head in (CE, DR):
        for one, other, after in zip(
            jax.tree.leaves(rows[LEARNABLE].trained.before["params"]["backbone"]),
            jax.tree.leaves(rows[head].trained.before["params"]["backbone"]),
            jax.tree.leaves(rows[head].trained.variables["params"]["backbone"]),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
            assert not np.array_equal(other, after)


def test_a_fixed_head_costs_nothing_and_keeps_its_bits(rows):
    cost, bits = constancy_claims(rows)
    assert cost.holds
    assert cost.measured == "learnable 680 + 1,360, ETF + CE 0 + 0, ETF + DR 0 + 0 bytes"
    assert bits.holds
    assert bits.measured == "0 of 640"


def test_a_code_that_moved_by_one_bit_is_noticed(rows):
    trained = rows[DR].trained
    code = np.array(trained.variables["constants"]["head"]["code"])
    code[0, 0, 0] = np.nextafter(code[0, 0, 0], np.float32(2))
    moved = trained._replace(variables={**trained.variables, "constants": {"head": {"code": code}}})
    claim = constancy_claims({**rows, DR: rows[DR]._replace(trained=moved)})[1]
    assert not claim.holds
    assert claim.measured == "1 of 640"


@pytest.mark.parametrize("head", HEADS)
def test_class_vectors_are_those_that_logits_are_products_with(rows, data, head):
    trained, x = rows[head].trained, data[1][0][:5]
    variables = jax.tree.map(lambda leaf: leaf[1], trained.variables)
    h = np.asarray(features(trained.model, trained.variables, x))[1]
    logits = np.asarray(trained.model.apply(variables, x))
    h = h if head == LEARNABLE else h / np.linalg.norm(h, axis=1, keepdims=True)
    scale = {LEARNABLE: 1, CE: 16, DR: 1}[head]
    found = scale * h @ np.asarray(class_vectors(trained.model, trained.variables))[1]
    if head == LEARNABLE:
        found += np.asarray(variables["params"]["head"]["bias"])
    np.testing.assert_allclose(found, logits, atol=1e-4)


@pytest.mark.parametrize("normalized", [False, True])
def test_statistics_of_collapse_are_those_of_the_covariances(rows, data, normalized):
    trained, (x, y) = rows[LEARNABLE].trained, data[0]
    found = collapse(trained, data[0], normalized=normalized)
    h = np.asarray(features(trained.model, trained.variables, x), np.float64)[0]
    h = h / np.linalg.norm(h, axis=1, keepdims=True) if normalized else h
    means = np.stack([h[np.asarray(y) == k].mean(0) for k in range(10)])
    away, between = h - means[np.asarray(y)], np.cov(means.T, bias=True)
    within = away.T @ away / len(h)
    assert found["within_between"][0] == pytest.approx(np.trace(within) / np.trace(between), rel=1e-4)
    assert found["nc1"][0] == pytest.approx(np.trace(np.linalg.pinv(between, 1e-9) @ within) / 10, rel=1e-3)


def test_the_learnable_head_is_judged_by_the_better_of_its_features(rows, data):
    both = [collapse(rows[LEARNABLE].trained, data[0], normalized=n) for n in (False, True)]
    for name in METRICS:
        assert rows[LEARNABLE].metrics[name].mean() == min(found[name].mean() for found in both)


def made_up(accuracy, within, nc2, nc3):
    return Row(
        None,
        np.full(3, accuracy),
        {"within_between": np.array([within]), "nc2": np.array([nc2]), "nc3": np.array([nc3])},
    )


@pytest.mark.parametrize(
    "row,holds",
    [
        (made_up(98.6, 0.39, 0.19, 0.19), (True, True, True)),
        (made_up(98.4, 0.39, 0.19, 0.19), (False, True, True)),
        (made_up(99.6, 0.39, 0.19, 0.19), (False, True, True)),
        (made_up(99.0, 0.41, 0.19, 0.19), (True, False, True)),
        (made_up(99.0, 0.39, 0.21, 0.19), (True, True, False)),
        (made_up(99.0, 0.39, 0.19, 0.21), (True, True, False)),
    ],
)
def test_claims_hold_within_half_a_point_and_above_their_ratios(row, holds):
    learnable = made_up(99.0, 1.0, 1.0, 1.0)
    claims = experiment_claims("digits", {LEARNABLE: learnable, CE: learnable, DR: row}, 0.5)
    assert tuple(claim.holds for claim in claims) == holds


def test_a_transfer_is_reported_whichever_head_is_best():
    found = {LEARNABLE: np.array([90.0, 92.0]), CE: np.array([80.0, 80.0]), DR: np.array([93.0, 91.0])}
    claim = transfer_claim("elsewhere", "here, then there", found)
    assert claim.holds
    assert claim.text == (
        "Transfer to elsewhere is measured, and no head is claimed to win: here, then there."
    )
    assert claim.measured == (
        "learnable 91.0 ± 1.4 %, ETF + CE 80.0 ± 0.0 %, ETF + DR 92.0 ± 1.4 %; "
        "fixed less learnable -11.0 ± 1.4 and 1.0 ± 2.8 points (linear probe, 2 seeds)"
    )
    assert not transfer_claim("elsewhere", "here, then there", {**found, CE: np.array([80.0, np.nan])}).holds
    assert not transfer_claim("elsewhere", "here, then there", {LEARNABLE: found[LEARNABLE]}).holds


def test_a_probe_reads_the_digits_from_few_labels_and_follows_its_seed(rows, data):
    target = Target(*data, 5)
    first = probe(rows[CE].trained, target, 0)
    np.testing.assert_array_equal(first, probe(rows[CE].trained, target, 0))
    assert not np.array_equal(first, probe(rows[CE].trained, target, 1))
    assert first.shape == (2,)
    assert first.min() > 60


def test_a_probe_of_two_of_the_classes_is_judged_on_them_alone(rows, data):
    found = probe(rows[CE].trained, Target(*data, 5, classes=2), 0)
    assert found.min() > 80


def test_mirrored_and_transposed_is_a_quarter_turn(data):
    x, y = turned((data[0][0][:3], data[0][1][:3]), 8)
    for image, old in zip(x, data[0][0], strict=False):
        np.testing.assert_array_equal(image.reshape(8, 8), np.rot90(np.asarray(old).reshape(8, 8)))
    np.testing.assert_array_equal(y, data[0][1][:3])


def test_new_classes_are_numbered_from_zero_and_were_not_in_the_training(data):
    new, turned_ones = digits_transfers(*data).values()
    (_, pretrained, classes, target), (_, whole, ten, _) = new, turned_ones
    assert (classes, ten) == (7, 10)
    assert np.unique(pretrained[1]).tolist() == list(range(7))
    assert np.unique(target.pool[1]).tolist() == np.unique(target.test[1]).tolist() == [0, 1, 2]
    assert pretrained[0].shape[0] + target.pool[0].shape[0] == whole[0].shape[0] == 1200
    one = of_classes(data[0], range(9, 10))[0]
    np.testing.assert_array_equal(one, data[0][0][np.asarray(data[0][1]) == 9])


def test_shrunk_images_are_means_of_the_middle():
    image = np.zeros((28, 28), np.float32)
    image[2:5, 2:5], image[0, 0], image[25, 25] = 1.0, 1.0, 0.9
    x, _ = shrunk((jnp.asarray(image.reshape(1, 784)), jnp.zeros(1, jnp.int32)))
    expected = np.zeros((8, 8))
    expected[0, 0], expected[7, 7] = 1.0, 0.1
    np.testing.assert_allclose(x.reshape(8, 8), expected, atol=1e-6)


def test_characters_are_white_on_black_and_parted_by_who_drew_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "small.zip", "w") as archive:
        for character in (2, 1):
            for drawer in (1, 10, 11):
                image = np.full((105, 105), 255, np.uint8)
                image[1 + 4 * drawer : 5 + 4 * drawer, 1:5] = 0
                file = io.BytesIO()
                Image.fromarray(image).convert("1").save(file, "png")
                archive.writestr(
                    f"a/Some/character0{character}/000{character}_{drawer:02}.png", file.getvalue()
                )
    (x, y), (x_other, y_other) = omniglot(tmp_path / "small.zip")
    assert (y.tolist(), y_other.tolist()) == ([0, 0, 1, 1], [0, 1])
    assert x.shape == (4, 784)
    for images, drawers in ((x, (1, 10, 1, 10)), (x_other, (11, 11))):
        for image, drawer in zip(images, drawers, strict=True):
            expected = np.zeros((28, 28))
            expected[drawer + 1, 1] = 1
            np.testing.assert_array_equal(image.reshape(28, 28), expected)


@pytest.mark.parametrize("classes", [3, 10])
def test_in_the_plane_of_the_figure_a_simplex_is_a_regular_polygon(classes):
    vectors = np.asarray(etf_matrix(jax.random.key(0), classes, 16), np.float64)
    plane = _plane(vectors)
    np.testing.assert_allclose(plane.T @ plane, np.eye(2), atol=1e-6)
    corners = vectors.T @ plane
    angles = np.pi / 2 + 2 * np.pi * np.arange(classes) / classes
    radius = (2 / (classes - 1)) ** 0.5
    np.testing.assert_allclose(corners, radius * np.stack([np.cos(angles), np.sin(angles)], 1), atol=1e-5)


def test_figures_are_written(rows, data, tmp_path):
    means = {head: {name: float(row.metrics[name].mean()) for name in METRICS} for head, row in rows.items()}
    spreads = {head: values["within_between"] for head, values in means.items()}
    drawn = {head: row.trained for head, row in rows.items()}
    assert feature_figure(tmp_path / "features.svg", drawn, data[0], spreads) == "features.svg"
    assert collapse_figure(tmp_path / "bars.svg", {"digits": means, "MNIST": means}) == "bars.svg"
    for name, words in (("features.svg", 10_000), ("bars.svg", 5_000)):
        assert (tmp_path / name).stat().st_size > words


def test_mnist_is_as_many_training_images_as_asked_for_and_all_for_testing(real_data):
    (x, y), (x_test, _) = mnist(real_data / "mnist.npz", 50)
    assert (x.shape, y.shape, x_test.shape) == ((50, 784), (50,), (10_000, 784))
    assert (float(x.min()), float(x.max())) == (0, 1)
