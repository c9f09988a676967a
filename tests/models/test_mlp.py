"""The multi-layer perceptron."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.models import MLP, PARAMETER_AXES


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (3, 4, 4, 1))


@pytest.fixture(scope="module")
def params(images):
    return nn.unbox(MLP((8, 6, 5)).init(jax.random.key(1), images))["params"]


def test_mlp_follows_its_equation(images, params):
    x = np.asarray(images, np.float64).reshape(3, 16)
    for i in range(3):
        p = {k: np.asarray(v, np.float64) for k, v in params[f"dense_{i}"].items()}
        x = x @ p["kernel"] + p["bias"]
        x = np.maximum(x, 0) if i < 2 else x
    np.testing.assert_allclose(MLP((8, 6, 5)).apply({"params": params}, images), x, rtol=1e-4, atol=1e-6)


def test_dropout_works_in_training_alone(images, params):
    model = MLP((8, 6, 5), dropout=0.5)
    plain = MLP((8, 6, 5)).apply({"params": params}, images)
    np.testing.assert_array_equal(model.apply({"params": params}, images), plain)
    trained = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
    assert not np.allclose(trained, plain)


def test_bf16_computation_returns_float32(images, params):
    exact = MLP((8, 6, 5)).apply({"params": params}, images)
    half = MLP((8, 6, 5), dtype=jnp.bfloat16).apply({"params": params}, images)
    assert half.dtype == jnp.float32
    assert np.abs(half - exact).max() < 4 * 2**-8 * np.abs(exact).max()


def test_every_axis_has_a_known_name_and_no_kernel_names_one_twice(images):
    shapes = jax.eval_shape(MLP((8, 6, 4, 5)).init, jax.random.key(1), images)
    for box in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert set(box.names) <= set(PARAMETER_AXES)
        assert len(set(box.names)) == box.value.ndim


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"features": ()}, "features must be positive widths"),
        ({"features": (4, 0)}, r"got \(4, 0\)"),
        ({"features": (4,), "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"features": (4,), "activation": "swish"}, "relu, gelu"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLP(**arguments)
