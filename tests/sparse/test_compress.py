"""A compressed network gives the outputs of the masked one, and has no dead neuron left."""

import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.models.mlp import MLP
from odjax.sparse.compress import compress
from odjax.sparse.wiring import Cut, Ends, Junction, compressed_model, wiring_of

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}
FLAT = {  # the same functions in numpy, so that the judge is not jax
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@st.composite
def networks(draw):
    """(params, masks, wiring, activation): a chain of dense layers with many dead neurons."""
    widths = draw(st.lists(st.integers(1, 7), min_size=3, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    density = draw(st.sampled_from([0.05, 0.2, 0.4]))
    name = draw(st.sampled_from(sorted(ACTIVATIONS)))
    params, masks = {}, {}
    for i, shape in enumerate(itertools.pairwise(widths)):
        params[f"layer_{i}"] = {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[1])}
        masks[f"layer_{i}/kernel"] = rng.random(shape) < density
    return params, masks, chain(len(widths) - 1, name), name


def pair(first, second, activation=jax.nn.relu, first_bias=None, second_bias=None):
    inputs, outputs = Ends(first, (1,), bias=first_bias), Ends(second, (0,), bias=second_bias)
    return Junction((inputs,), (outputs,), activation=activation, cut=Cut())


def chain(layers, activation, bias="bias"):
    return [
        pair(
            f"layer_{i}/kernel",
            f"layer_{i + 1}/kernel",
            ACTIVATIONS[activation],
            bias and f"layer_{i}/{bias}",
            bias and f"layer_{i + 1}/{bias}",
        )
        for i in range(layers - 1)
    ]


def apply(params, x, activation, masks=None):
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        kernel = np.asarray(layer["kernel"])
        x = x @ (kernel if masks is None else kernel * masks[f"layer_{i}/kernel"])
        x = x + layer["bias"][None] if "bias" in layer else x
        x = FLAT[activation](x) if i < len(params) - 1 else x
    return x


@given(networks())
def test_the_outputs_stay_exactly_what_they_were(network):
    params, masks, wiring, activation = network
    x = np.random.default_rng(0).normal(size=(5, params["layer_0"]["kernel"].shape[0]))
    with jax.enable_x64(True):
        small = compress(params, masks, wiring)
    expected = apply(params, x, activation, masks)
    np.testing.assert_allclose(apply(small.params, x, activation), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(apply(small.params, x, activation, small.masks), expected, atol=1e-12)


@given(networks())
def test_in_single_precision_only_the_rounding_of_the_biases_is_seen(network):
    params, masks, wiring, activation = network
    params = jax.tree.map(np.float32, params)
    x = np.random.default_rng(0).normal(size=(5, params["layer_0"]["kernel"].shape[0]))
    small = compress(params, masks, wiring)
    assert {leaf.dtype for leaf in jax.tree.leaves(small.params)} == {np.dtype("float32")}
    expected = apply(jax.tree.map(np.float64, params), x, activation, masks)
    compressed = apply(jax.tree.map(np.float64, small.params), x, activation)
    np.testing.assert_allclose(compressed, expected, rtol=1e-6, atol=1e-6)


@given(networks())
def test_the_neurons_that_are_kept_lie_on_a_path_from_inputs_to_outputs(network):
    params, masks, wiring, _ = network
    links = [masks[f"layer_{i}/kernel"] for i in range(len(params))]
    forward = [np.ones(links[0].shape[0], bool)]
    for link in links:
        forward.append((link & forward[-1][:, None]).any(axis=0))
    backward = [np.ones(links[-1].shape[1], bool)]
    for link in reversed(links):
        backward.insert(0, (link & backward[0][None]).any(axis=1))
    kept = compress(params, masks, wiring).kept
    for i in range(len(links) - 1):
        on_a_path = np.flatnonzero(forward[i + 1] & backward[i + 1])
        # One neuron stays where all are dead.
        np.testing.assert_array_equal(kept[f"layer_{i}/kernel"], on_a_path if on_a_path.size else [0])


@given(networks(), st.randoms(use_true_random=False))
def test_the_order_of_the_wiring_does_not_matter(network, random):
    params, masks, wiring, _ = network
    shuffled = random.sample(wiring, len(wiring))
    one, other = compress(params, masks, wiring), compress(params, masks, shuffled)
    for path, kept in one.kept.items():
        np.testing.assert_array_equal(kept, other.kept[path])
    x = np.random.default_rng(0).normal(size=(5, params["layer_0"]["kernel"].shape[0]))
    outputs = [apply(small.params, x, "relu") for small in (one, other)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


@given(networks())
def test_compressing_again_changes_nothing(network):
    params, masks, wiring, _ = network
    once = compress(params, masks, wiring)
    twice = compress(once.params, once.masks, wiring)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice._replace(kept=once.kept)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_network_without_links_is_its_biases():
    params = {f"layer_{i}": {"kernel": np.ones((2, 2)), "bias": np.array([1.0, -3.0]) + i} for i in range(3)}
    masks = {f"layer_{i}/kernel": np.zeros((2, 2), bool) for i in range(3)}
    small = compress(params, masks, chain(3, "relu"))
    assert [small.params[f"layer_{i}"]["kernel"].shape for i in range(3)] == [(2, 1), (1, 1), (1, 2)]
    np.testing.assert_array_equal(apply(small.params, np.ones((1, 2)), "relu"), [[3.0, -1.0]])


def test_a_constant_goes_through_the_layers_up_to_the_output():
    # relu(2) = 2 into the middle bias, relu(1 + 3 * 2) = 7 into the last: 10 + 5 * 7.
    params = {
        "layer_0": {"kernel": np.array([[9.0]]), "bias": np.array([2.0])},
        "layer_1": {"kernel": np.array([[3.0]]), "bias": np.array([1.0])},
        "layer_2": {"kernel": np.array([[5.0]]), "bias": np.array([10.0])},
    }
    small = compress(params, {"layer_0/kernel": np.zeros((1, 1), bool)}, chain(3, "relu"))
    np.testing.assert_array_equal(small.params["layer_2"]["bias"], [45.0])
    assert not any(mask.any() for mask in small.masks.values())


@pytest.mark.parametrize(("activation", "kept"), [("relu", [1]), ("tanh", [1]), ("sigmoid", [0, 1])])
def test_without_a_bias_to_take_it_a_constant_keeps_its_neuron(activation, kept):
    params = {f"layer_{i}": {"kernel": np.eye(2, dtype=np.float32)} for i in range(2)}
    masks = {"layer_0/kernel": np.array([[False, True], [False, True]])}
    small = compress(params, masks, chain(2, activation, bias=None))
    np.testing.assert_array_equal(small.kept["layer_0/kernel"], kept)
    x = np.random.default_rng(0).normal(size=(3, 2))
    expected = apply(params, x, activation, masks | {"layer_1/kernel": np.ones((2, 2), bool)})
    np.testing.assert_allclose(apply(small.params, x, activation), expected, rtol=1e-6)


def test_a_bias_is_rounded_once_in_half_precision():
    # 256 + 256 * 1.0 rounded after every addition would stay at 256 in bfloat16.
    n = 256
    params = {
        "layer_0": {"kernel": jnp.ones((1, n), jnp.bfloat16), "bias": jnp.ones(n, jnp.bfloat16)},
        "layer_1": {"kernel": jnp.ones((n, 1), jnp.bfloat16), "bias": jnp.full(1, 256, jnp.bfloat16)},
    }
    small = compress(params, {"layer_0/kernel": np.zeros((1, n), bool)}, chain(2, "relu"))
    assert small.params["layer_1"]["bias"].dtype == jnp.bfloat16
    assert float(small.params["layer_1"]["bias"][0]) == 512


def test_a_model_of_the_smaller_widths_takes_the_compressed_parameters():
    x = jax.random.normal(jax.random.key(0), (4, 10))
    variables = MLP((12, 9, 3)).init(jax.random.key(1), x)
    rng = np.random.default_rng(0)
    params = nn.meta.unbox(variables["params"])
    masks = {
        f"dense_{i}": {"kernel": rng.random(params[f"dense_{i}"]["kernel"].shape) < 0.12} for i in (0, 1)
    }
    masks["dense_2"] = {"kernel": None}
    small = compress(params, masks, wiring_of(MLP((12, 9, 3))))
    widths = [len(small.kept[f"dense_{i}/kernel"]) for i in (0, 1)]
    assert 0 < widths[0] < 12
    assert 0 < widths[1] < 9
    masked = jax.tree.map(lambda w: w, params)
    for i in (0, 1):
        kernel, mask = params[f"dense_{i}"]["kernel"], masks[f"dense_{i}"]["kernel"]
        masked[f"dense_{i}"]["kernel"] = jnp.where(mask, kernel, 0.0)
    expected = MLP((12, 9, 3)).apply({"params": masked}, x)
    model = compressed_model(MLP((12, 9, 3)), small.sizes)
    assert model.features == (*widths, 3)
    np.testing.assert_allclose(model.apply({"params": small.params}, x), expected, atol=1e-6)


def test_leaves_outside_the_wiring_stay_but_for_their_masks():
    params = {
        "layer_0": {"kernel": np.ones((2, 2))},
        "layer_1": {"kernel": np.ones((2, 1))},
        "norm": np.ones(3),
    }
    masks = {"norm": np.array([True, False, True]), "layer_0/kernel": np.array([[True, False]] * 2)}
    small = compress(params, masks, chain(2, "relu", bias=None))
    np.testing.assert_array_equal(small.params["norm"], [1, 0, 1])
    np.testing.assert_array_equal(small.masks["norm"], masks["norm"])
    assert small.params["layer_1"]["kernel"].shape == (1, 1)


PARAMS = {
    "a": {"kernel": np.ones((2, 3)), "bias": np.ones(3)},
    "b": {"kernel": np.ones((3, 4)), "bias": np.ones(4)},
    "deep": np.ones((2, 3, 3)),
}
RELU = jax.nn.relu


@pytest.mark.parametrize(
    ("masks", "wiring", "error", "message"),
    [
        (
            {},
            [pair("x", "b/kernel", RELU)],
            ValueError,
            "'x', which is no leaf of the parameters; there are",
        ),
        (
            {},
            [pair("b/kernel", "a/kernel", RELU)],
            ValueError,
            "joins layers whose units differ: 'b/kernel' has [4], 'a/kernel' has [2]",
        ),
        (
            {},
            [Junction((Ends("deep", (2,), 1),), (Ends("b/kernel", (0,)),))],
            ValueError,
            "units differ: 'deep' has [2, 3], 'b/kernel' has [3]",
        ),
        ({}, [pair("a/kernel", "b/kernel", RELU, "b/bias")], ValueError, "must be [3] like the outputs"),
        ({}, [pair("a/kernel", "b/kernel", RELU, "c")], ValueError, "None where there is none"),
        ({}, [pair("a/kernel", "b/kernel", RELU)] * 2, ValueError, "'a/kernel' is among the inputs of two"),
        ({}, [("a/kernel", "b/kernel")], TypeError, "must hold Junction(inputs, outputs, ...)"),
        ({"c": np.ones(3, bool)}, [], ValueError, "a mask for 'c', which is no leaf"),
        ({"a/bias": np.ones(3)}, [], TypeError, "must be bool, got float64: unpack it first"),
        ({"a/bias": np.ones(4, bool)}, [], ValueError, "has the shape (4,), the parameter (3,)"),
        (
            {"a/kernel": np.zeros((2, 3), bool)},
            [pair("a/kernel", "b/kernel", jnp.sum, "a/bias", "b/bias")],
            ValueError,
            "must be elementwise, it made () of (3,)",
        ),
    ],
)
def test_a_wiring_or_mask_that_does_not_fit_is_named(masks, wiring, error, message):
    with pytest.raises(error, match=re.escape(message)):
        compress(jax.tree.map(np.float32, PARAMS), masks, wiring)
