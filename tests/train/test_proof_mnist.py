"""What the MNIST proof of RAC-LoRA is made of, on a few of the digits."""

import jax
import numpy as np
import optax
import pytest

from odjax_train.proofs.rac_lora import accuracy, chain_of_lora, chain_of_sketches, init, mnist, train

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def half(real_data):
    """A network that knows 0 to 4, and some of the other digits to learn from and to be judged on."""
    data = mnist(real_data / "mnist.npz")
    few = {name: (x[:1280], y[:1280]) for name, (x, y) in data.items()}
    with jax.numpy_dtype_promotion("standard"):
        params = train(init(KEY), lambda p: p, optax.adamw(1e-3), few["train 0"], 6, KEY)
    assert accuracy(params, few["test 0"]) > 90
    return params, few["train 1"], few["test 1"]


def test_the_halves_are_the_digits_below_five_and_above(real_data):
    halves = mnist(real_data / "mnist.npz")
    assert {name: x.shape[0] for name, (x, _) in halves.items()} == {
        "train 0": 30596,
        "train 1": 29404,
        "test 0": 5139,
        "test 1": 4861,
    }
    for x, y in halves.values():
        assert (float(x.min()), float(x.max())) == (0, 1)
        assert np.unique(y).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("side,numbers", [("right", 64 + 64 + 5), ("left", 784 + 64 + 64)])
def test_a_chain_of_sketches_learns_the_other_digits_and_leaves_the_biases(half, side, numbers):
    params, new, test = half
    with jax.numpy_dtype_promotion("standard"):
        adapted, trained = chain_of_sketches(params, new, 30, side, KEY, 40, "reset")
    assert trained == numbers
    assert accuracy(adapted, test) > accuracy(params, test) + 5
    for name in params:
        np.testing.assert_array_equal(adapted[name]["bias"], params[name]["bias"])
        moved = np.asarray(adapted[name]["kernel"] - params[name]["kernel"], np.float64)
        # Eight blocks of rank 1, up to the rounding of their sum.
        assert np.linalg.matrix_rank(moved, tol=1e-4 * np.linalg.norm(moved)) <= 8


def test_a_chain_of_lora_trains_both_factors(half):
    params, new, test = half
    with jax.numpy_dtype_promotion("standard"):
        adapted, trained = chain_of_lora(params, new, 30, "left", KEY, 15)
    assert trained == 784 + 64 + 64 + 64 + 64 + 5
    assert accuracy(adapted, test) > accuracy(params, test) + 5
