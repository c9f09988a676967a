"""What the proofs of GGeM and moment probing are made of, on made-up tokens and on a few real digits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.heads.ggem import GGeM
from odjax.heads.pooling import TokenPool
from odjax_train.errors import UserError
from odjax_train.proofs import ggem, moment_probing
from odjax_train.proofs.cifar_features import (
    FILES,
    MEAN,
    STD,
    Maps,
    PooledProbe,
    Recipe,
    as_colour,
    best_rate,
    data_folder,
    fit,
    in_batches,
    mnist_maps,
    network,
    normalized,
    tokens_of,
)


def made_up(sizes=(40, 60), channels=8):
    """Two seeds and two classes; in class 1 one token in four has large first channels."""
    rng = np.random.default_rng(0)

    def part(n):
        labels = np.arange(n) % 2
        x = rng.uniform(0, 1, (n, 4, channels)).astype(np.float32)
        x[labels == 1, 0, :2] += 2
        return jnp.asarray(x), jnp.asarray(labels, jnp.int32)

    (a, b), (c, d) = (zip(*(part(n) for _ in range(2)), strict=True) for n in sizes)
    return Maps(a, b, c[0], d[0], c[1], d[1])


def test_images_are_normalized_as_the_network_was_trained():
    image = np.zeros((1, 1, 1, 3), np.uint8)
    np.testing.assert_allclose(normalized(image)[0, 0, 0], -MEAN / STD, rtol=1e-6)
    np.testing.assert_allclose(normalized(image + 255)[0, 0, 0], (1 - MEAN) / STD, rtol=1e-6)
    assert normalized(image).dtype == np.float32


def test_a_digit_is_padded_by_two_black_pixels_and_has_three_equal_channels():
    digits = np.random.default_rng(0).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    back = (as_colour(digits) * STD + MEAN) * 255
    for channel in range(3):
        np.testing.assert_allclose(back[:, 2:-2, 2:-2, channel], digits, atol=1e-3)
    border = back.copy()
    border[:, 2:-2, 2:-2] = 0
    np.testing.assert_allclose(border, np.zeros(border.shape), atol=1e-3)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_batches_of_one_size_give_every_image_its_own_result(count):
    x = np.arange(count * 2, dtype=np.float32).reshape(count, 2)
    np.testing.assert_array_equal(in_batches(lambda x: x * 2, x, batch=4), 2 * x)


def test_a_fit_learns_what_its_pooling_shows_once_a_seed():
    maps = made_up()
    recipe = Recipe(60, 5e-2, 20)
    probe = PooledProbe(GGeM(4), classes=2)
    fitted = fit(probe, maps, recipe, 0)
    assert fitted.accuracy.shape == (2,)
    assert fitted.accuracy.min() > 90
    assert fitted.size == 4 + 2 * 8 + 2 * 8 + 2
    assert not np.array_equal(fitted.params[0]["head"]["kernel"], fitted.params[1]["head"]["kernel"])
    again = fit(probe, maps, recipe, 0)
    for a, b in zip(jax.tree.leaves(fitted.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_matrices_decay():
    maps = made_up()
    one = maps._replace(train_labels=[jnp.zeros_like(y) for y in maps.train_labels])
    probe = PooledProbe(GGeM(2), classes=1)
    fitted = fit(probe, one, Recipe(5, 0.5, 4, decay=0.5), 0)
    # With one class every gradient is zero, so what moves would be decay.
    np.testing.assert_array_equal(fitted.params[0]["pool"]["p"], [3.0, 3.0])
    np.testing.assert_array_equal(fitted.params[0]["norm"]["scale"], np.ones(8))
    many = fit(PooledProbe(GGeM(2), classes=2), maps, Recipe(5, 0.1, 4), 0)
    heavy = fit(PooledProbe(GGeM(2), classes=2), maps, Recipe(5, 0.1, 4, decay=2.0), 0)
    norms = [float(jnp.linalg.norm(run.params[0]["head"]["kernel"])) for run in (many, heavy)]
    assert norms[1] < norms[0]


def test_the_rate_is_chosen_on_images_that_are_neither_learned_from_nor_judged():
    maps = made_up()
    hidden = maps._replace(test=jnp.full_like(maps.test, jnp.nan))
    probe = PooledProbe(TokenPool("max"), classes=2)
    assert best_rate(probe, hidden, Recipe(40, 0.0, 20), 0, rates=(1e-9, 3e-2)) == 3e-2


def test_theory_claims_hold_on_sparse_tokens_and_fail_for_another_pooling(monkeypatch):
    x = jax.nn.relu(jax.random.normal(jax.random.key(0), (9, 5, 8)))
    assert all(claim.holds for claim in ggem.theory_claims(x))
    monkeypatch.setattr(ggem, "ggem_pool", lambda x, p: jnp.maximum(x, 1e-6).mean(1) * p[:1][None] ** 1.5)
    assert [claim.holds for claim in ggem.theory_claims(x)] == [True, False, False]


def test_a_probe_of_any_parameters_keeps_to_the_theory():
    x = jax.nn.relu(jax.random.normal(jax.random.key(0), (3, 6, 64)))
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.1 * noise.normal(size=leaf.shape), leaf.dtype),
        nn.unbox(jax.jit(moment_probing.probe().init)(jax.random.key(1), x)["params"]),
    )
    assert all(claim.holds for claim in moment_probing.theory_claims(params, x))
    assert moment_probing.size_claim().holds


def test_a_missing_file_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ODJAX_DATA_DIR", str(tmp_path))
    for proof in (ggem, moment_probing):
        with pytest.raises(UserError, match=r"resnet20.th is missing: set ODJAX_DATA_DIR .* quick proof"):
            proof.prove(tmp_path, quick=False, seed=0)


def test_real_digits_become_64_tokens_of_64_channels_and_no_image_is_used_twice(
    real_data, tmp_path, monkeypatch
):
    if not all((real_data / name).is_file() for name in FILES):
        pytest.skip(f"the data folder lacks one of {', '.join(FILES)}")
    monkeypatch.setenv("ODJAX_DATA_DIR", str(real_data))
    monkeypatch.setattr("odjax_train.proofs.cifar_features.LABELLED", 3)
    monkeypatch.setattr("odjax_train.proofs.cifar_features.DEV", 2)
    seen = []

    def record(model, variables, images):
        seen.append(images)
        return tokens_of(model, variables, images[:8])

    monkeypatch.setattr("odjax_train.proofs.cifar_features.tokens_of", record)
    model, variables = network(data_folder(), tmp_path)
    assert (tmp_path / "resnet20.safetensors").is_file()
    maps = mnist_maps(real_data, model, variables, 2, 0)
    assert [x.shape for x in (*maps.train, maps.dev)] == [(3, 64, 64), (3, 64, 64), (2, 64, 64)]
    assert len(seen[0]) == 2 * 3 + 2 + 10_000
    assert len(np.unique(seen[0][:8].reshape(8, -1), axis=0)) == 8
    assert float(maps.train[0].min()) >= 0
