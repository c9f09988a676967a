"""Tasks: sums and counts that add up, and losses from their closed forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.lowrank import adapt
from odjax.models import MLP
from odjax_train.tasks import add, classification, language_model, mean, translation


class _Table(nn.Module):
    """Logits that do not depend on anything but the token."""

    @nn.compact
    def __call__(self, tokens, segments=None, positions=None):
        return nn.Embed(5, 5, name="table")(tokens)


def _batch(key, rows=4, length=6):
    keys = jax.random.split(key, 3)
    return {
        "tokens": jax.random.randint(keys[0], (rows, length), 0, 5, jnp.int32),
        "targets": jax.random.randint(keys[1], (rows, length), 0, 5, jnp.int32),
        "segments": jnp.ones((rows, length), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length)),
        "weights": jax.random.bernoulli(keys[2], 0.7, (rows, length)).astype(jnp.float32),
    }


@pytest.fixture(scope="module")
def variables():
    return _Table().init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@given(seed=st.integers(0, 2**31), cut=st.integers(1, 3))
def test_sums_over_parts_of_a_batch_add_up_to_those_of_the_whole(variables, seed, cut):
    task, batch = language_model(), _batch(jax.random.key(seed))
    whole, _ = task.loss(_Table(), variables, batch, None)
    parts = [
        task.loss(_Table(), variables, {k: v[rows] for k, v in batch.items()}, None)[0]
        for rows in (slice(0, cut), slice(cut, None))
    ]
    for got, want in zip(jax.tree.leaves(add(*parts)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6)


def test_the_loss_is_the_negative_log_probability_of_the_targets(variables):
    batch = _batch(jax.random.key(1))
    table = np.asarray(variables["params"]["table"]["embedding"], np.float64)
    logits = table[np.asarray(batch["tokens"])]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    weights = np.asarray(batch["weights"])
    sums, _ = language_model().loss(_Table(), variables, batch, None)
    np.testing.assert_allclose(mean(sums)["loss"], (nll * weights).sum() / weights.sum(), rtol=1e-6)
    right = (logits.argmax(-1) == np.asarray(batch["targets"])) * weights
    np.testing.assert_allclose(mean(sums)["accuracy"], right.sum() / weights.sum(), rtol=1e-6)


def test_the_z_loss_is_added_in_training_and_not_in_evaluation(variables):
    batch = _batch(jax.random.key(2))
    plain, _ = language_model().loss(_Table(), variables, batch, jax.random.key(0))
    judged, _ = language_model(z_loss=0.5).loss(_Table(), variables, batch, None)
    trained, _ = language_model(z_loss=0.5).loss(_Table(), variables, batch, jax.random.key(0))
    logits = np.asarray(variables["params"]["table"]["embedding"], np.float64)[np.asarray(batch["tokens"])]
    z = np.log(np.exp(logits).sum(-1)) ** 2
    np.testing.assert_allclose(judged["loss"].total, plain["loss"].total, rtol=1e-6)
    extra = 0.5 * (z * np.asarray(batch["weights"])).sum()
    np.testing.assert_allclose(trained["loss"].total - plain["loss"].total, extra, rtol=1e-4)


class _Fixed(nn.Module):
    """The same logits for every image."""

    logits: tuple[float, ...]

    @nn.compact
    def __call__(self, image):
        bias = self.param("bias", lambda key: jnp.array(self.logits))
        return jnp.broadcast_to(bias, (image.shape[0], len(self.logits)))


@given(smoothing=st.floats(0.0, 0.9))
def test_label_smoothing_mixes_the_target_with_the_uniform_distribution(smoothing):
    logits = (1.0, -2.0, 0.5)
    batch = {
        "image": jnp.zeros((2, 1)),
        "label": jnp.array([0, 2], jnp.int32),
        "weight": jnp.array([1.0, 1.0]),
    }
    task = classification(label_smoothing=smoothing)
    sums, _ = task.loss(_Fixed(logits), {"params": {"bias": jnp.array(logits)}}, batch, jax.random.key(0))
    log_p = np.array(logits) - np.log(np.exp(logits).sum())
    target = (1 - smoothing) * np.eye(3)[[0, 2]] + smoothing / 3
    np.testing.assert_allclose(sums["loss"].total, -(target * log_p).sum(), rtol=1e-5)


def test_an_adapted_model_drops_in_training_like_the_bare_one():
    bare = MLP((8, 3), dropout=0.5)
    image = jnp.linspace(-1.0, 1.0, 16).reshape(4, 4)
    batch = {"image": image, "label": jnp.zeros(4, jnp.int32), "weight": jnp.ones(4)}
    task = classification()
    for model in (bare, adapt(bare, rank=1)):
        variables = model.init(jax.random.key(0), image)
        losses = [
            float(task.loss(model, variables, batch, key)[0]["loss"].total)
            for key in (None, jax.random.key(1), jax.random.key(2))
        ]
        assert len(set(losses)) == 3


def test_examples_of_weight_zero_do_not_count():
    logits = (1.0, -2.0, 0.5)
    variables = {"params": {"bias": jnp.array(logits)}}
    batch = {
        "image": jnp.zeros((2, 1)),
        "label": jnp.array([0, 1], jnp.int32),
        "weight": jnp.array([1.0, 0.0]),
    }
    sums, _ = classification().loss(_Fixed(logits), variables, batch, None)
    assert mean(sums)["accuracy"] == 1.0
    assert sums["loss"].count == 1.0


@pytest.mark.parametrize("make", [classification, translation])
def test_an_impossible_smoothing_is_refused(make):
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.5"):
        make(label_smoothing=1.5)
