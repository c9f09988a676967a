"""Initial values lie on the links only and have the variance that keeps activations at their size."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.sparse.init import kaiming, masked, swi

KEY = jax.random.key(0)


def random_mask(shape, density, seed=0):
    return np.random.default_rng(seed).random(shape) < density


@given(st.floats(0.02, 1.0), st.sampled_from([kaiming, swi]), st.sampled_from(["float32", "bfloat16"]))
def test_absent_links_are_zero_and_present_ones_are_not(density, make, dtype):
    mask = random_mask((12, 10), density)
    kernel = make(mask)(KEY, (12, 10), jnp.dtype(dtype))
    assert kernel.dtype == dtype
    np.testing.assert_array_equal(np.asarray(kernel, np.float32) != 0, mask)


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_the_mean_square_of_an_activation_passes_through_a_sparse_layer(density):
    # E[relu(x W)^2] = E[x^2] for values of variance 2 / (links an output): the claim behind the rule.
    outputs = 3000
    x = np.maximum(np.random.default_rng(0).normal(size=(20, 300)), 0)
    kernel = np.asarray(swi(random_mask((300, outputs), density))(KEY, (300, outputs)))
    y = np.maximum(x @ kernel, 0)
    # relu(z)^2 of a normal z has a mean of 1/2 and a variance of 5/4, so a relative deviation of sqrt(5).
    assert abs(np.mean(y**2) / np.mean(x**2) - 1) < 4 * math.sqrt(5 / outputs)


@pytest.mark.parametrize(
    ("shape", "in_axes", "batch_axes", "fan_in"),
    [
        ((40, 60), None, (), 40),
        ((3, 3, 8, 20), None, (), 72),
        ((40, 5, 12), (0,), (), 40),
        ((5, 12, 40), (0, 1), (), 60),
        ((4, 40, 60), None, (0,), 40),
        ((40, 4, 60), (-3,), (-2,), 40),
    ],
)
def test_the_deviation_follows_the_inputs_of_one_layer(shape, in_axes, batch_axes, fan_in):
    mask = random_mask(shape, 0.3)
    axes = {"in_axes": in_axes, "batch_axes": batch_axes}
    plain, sparse = kaiming(mask, **axes)(KEY, shape), swi(mask, **axes)(KEY, shape)
    noise = np.asarray(jax.random.normal(KEY, shape))
    np.testing.assert_allclose(plain, np.where(mask, noise * math.sqrt(2 / fan_in), 0), rtol=1e-6)
    layer = tuple(i for i in range(len(shape)) if i not in [axis % len(shape) for axis in batch_axes])
    density = mask.mean(axis=layer, keepdims=True)
    expected = np.where(mask, noise * np.sqrt(2 / (density * fan_in)), 0)
    np.testing.assert_allclose(sparse, expected, rtol=1e-6)


def test_each_layer_of_a_stack_has_its_own_density():
    mask = np.stack([random_mask((200, 200), 0.02), random_mask((200, 200), 0.5)])
    kernel = np.asarray(swi(mask, batch_axes=(0,))(KEY, mask.shape))
    for layer, links in zip(kernel, mask, strict=True):
        square = layer[links] ** 2
        # The variance of a normal square is twice its mean squared.
        expected = 2 / (links.mean() * 200)
        assert abs(square.mean() - expected) < 4 * expected * math.sqrt(2 / links.sum())


def test_a_layer_without_links_is_zero():
    np.testing.assert_array_equal(swi(np.zeros((3, 4), bool))(KEY, (3, 4)), np.zeros((3, 4)))


def test_double_precision_is_drawn_in_double_precision():
    with jax.enable_x64(True):
        kernel = kaiming(np.ones((4, 8), bool))(KEY, (4, 8), jnp.float64)
        assert kernel.dtype == jnp.float64
        assert (np.asarray(kernel) != np.asarray(kernel, np.float32)).any()


def test_flax_layers_take_them():
    mask = random_mask((6, 5), 0.5)
    for init in (swi(mask), kaiming(mask), masked(nn.initializers.lecun_normal(), mask)):
        kernel = nn.Dense(5, kernel_init=init).init(KEY, jnp.ones((2, 6)))["params"]["kernel"]
        np.testing.assert_array_equal(np.asarray(kernel) != 0, mask)


def test_masked_leaves_the_present_links_to_the_initializer():
    mask, init = random_mask((6, 5), 0.5), nn.initializers.lecun_normal()
    expected = np.where(mask, init(KEY, (6, 5)), 0)
    np.testing.assert_array_equal(masked(init, mask)(KEY, (6, 5)), expected)


MASK = np.ones((4, 6), bool)


@pytest.mark.parametrize("make", [swi, kaiming, lambda mask: masked(nn.initializers.ones, mask)])
def test_a_mask_of_another_shape_or_dtype_is_named(make):
    with pytest.raises(ValueError, match=re.escape("the mask has the shape (4, 6), the parameter (6, 4)")):
        make(MASK)(KEY, (6, 4))
    with pytest.raises(TypeError, match=re.escape("mask must be bool, got float32: type mask != 0")):
        make(MASK.astype(np.float32))


@pytest.mark.parametrize("make", [swi, kaiming])
@pytest.mark.parametrize(
    ("mask", "axes", "message"),
    [
        (MASK, {"in_axes": (2,)}, "must name axes of a mask (4, 6)"),
        (MASK, {"in_axes": (0,), "batch_axes": (-2,)}, "each once"),
        (MASK, {"in_axes": (0, 1)}, "leaves 2 axes, 2 of them inputs"),
        (MASK, {"batch_axes": (0,)}, "leaves 1 axes"),
        (MASK[0], {}, "a layer needs input and output axes"),
    ],
)
def test_axes_that_are_no_layer_are_named(make, mask, axes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(mask, **axes)
