"""A compressed Transformer is a smaller model that computes the same."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core.meta import unbox

from odjax.core.paths import leaves_with_paths
from odjax.models.bert import Bert
from odjax.models.decoder import Decoder
from odjax.models.encoder_decoder import EncoderDecoder
from odjax.models.mlp import MLP
from odjax.models.vit import ViT
from odjax.sparse.compress import compress
from odjax.sparse.percolation import percolate
from odjax.sparse.wiring import Cut, Ends, Junction, compressed_model, restrict_wiring, wiring_of

HIDDEN = 12


def attention(query, key, value, *, mask, is_causal):
    """In the dtype of the query: jax's own has its softmax in float32."""
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query, key) / query.shape[-1] ** 0.5
    if is_causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool)[None, None], scores, -jnp.inf)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value)


class Case(NamedTuple):
    model: object
    inputs: tuple
    method: str  # what gives a result in the model's own dtype
    sizes: dict  # that are left


SMALL = {"layers": 2, "width": 8, "attention": attention}
DOUBLE = {"dtype": "float64", "param_dtype": "float64"}
TOKENS = np.arange(6, dtype=np.int32)[None] % 5
IMAGES = np.linspace(-1, 1, 32).reshape(2, 4, 4, 1)
CASES = {
    "decoder": Case(
        Decoder(vocab=8, heads=6, kv_heads=3, head_dim=4, mlp_width=HIDDEN, max_length=8, **SMALL, **DOUBLE),
        (TOKENS,),
        "features",
        {"kv_heads": 2, "mlp_width": 7},
    ),
    "vit, gated with biases, unrolled": Case(
        ViT(
            image=(4, 4),
            patch=2,
            heads=2,
            mlp_width=HIDDEN,
            channels=1,
            activation="swiglu",
            scan=False,
            **SMALL,
            **DOUBLE,
        ),
        (IMAGES,),
        "features",
        {"mlp_width": 8},
    ),
    "bert": Case(
        Bert(vocab=8, heads=2, mlp_width=HIDDEN, max_length=8, **SMALL, **DOUBLE),
        (TOKENS, TOKENS < 9),
        "features",
        {"mlp_width": 7},
    ),
    "encoder and decoder": Case(
        EncoderDecoder(vocab=8, heads=2, mlp_width=HIDDEN, activation="tanh", **SMALL, **DOUBLE),
        (TOKENS, TOKENS),
        "__call__",
        {"mlp_width": 7},
    ),
}


def shapes_of(model, inputs):
    return unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])


def network(case):
    """Parameters in which nothing is 0, and masks with dead neurons of every kind."""
    rng = np.random.default_rng(3)
    shapes = shapes_of(case.model, case.inputs)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / 2, shapes)
    masks = {}
    for path, leaf in leaves_with_paths(shapes):
        if "layers" not in path or not path.endswith("kernel"):
            continue
        mask = rng.random(leaf.shape) < 0.7
        stack = mask if "layers/" in path else mask[None]
        first = stack[:1] if "layers_1" not in path else stack[:0]
        last = stack[-1:] if "layers_0" not in path else stack[:0]
        name = path.split("/")[-2]
        if name in ("up", "gate"):
            stack[:, :, :2] = first[:, :, 2:4] = False  # dead in every layer, and in one
        if name == "up":
            first[:, :, 4] = last[:, :, 5] = False
        if name == "down":
            stack[:, 6] = last[:, 7] = False
        if name == "k":
            stack[:, :, 0, 0::2] = False  # what rotary positions turn together
        if name == "v":
            first[:, :, 1] = stack[:, :, 0, 1] = False  # a head, a dimension of a head
        if name == "o":
            group = stack.shape[1] // (case.model.kv_heads if isinstance(case.model, Decoder) else 2)
            last[:, :group] = stack[:, group - 1, 2] = False
        masks[path] = mask
    return params, masks


@functools.cache
def compressed(name):
    with jax.enable_x64(True):
        case = CASES[name]
        params, masks = network(case)
        return params, masks, compress(params, masks, wiring_of(case.model))


def masked(params, masks):
    flat = [np.where(masks[p], leaf, 0.0) if p in masks else leaf for p, leaf in leaves_with_paths(params)]
    return jax.tree.structure(params).unflatten(flat)


def outputs(case, model, params):
    apply = jax.jit(functools.partial(model.apply, method=case.method))
    return [leaf for leaf in jax.tree.leaves(apply({"params": params}, *case.inputs)) if leaf.size]


@pytest.mark.parametrize("name", CASES)
def test_the_smaller_model_computes_the_same(name):
    params, masks, small = compressed(name)
    case = CASES[name]
    model = compressed_model(case.model, small.sizes)
    with jax.enable_x64(True):
        want = outputs(case, case.model, masked(params, masks))
        got = outputs(case, model, small.params)
        expected = {path: leaf.shape for path, leaf in leaves_with_paths(shapes_of(model, case.inputs))}
    assert {path: leaf.shape for path, leaf in leaves_with_paths(small.params)} == expected
    for one, other in zip(got, want, strict=True):
        limit = 1e-12 if one.dtype == "float64" else 1e-6
        np.testing.assert_allclose(one, other, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", CASES)
def test_the_sizes_are_those_of_the_layer_that_needs_most(name):
    _, masks, small = compressed(name)
    assert small.sizes == CASES[name].sizes
    for path, mask in small.masks.items():
        kinds = {"up": -1, "gate": -1, "down": -2}
        if (axis := kinds.get(path.split("/")[-2])) is not None:
            assert mask.shape[axis] == small.sizes["mlp_width"] < masks[path].shape[axis]


@pytest.mark.parametrize("name", ["decoder", "bert"])
def test_nothing_is_left_to_percolate_or_to_compress(name):
    _, _, small = compressed(name)
    wiring = wiring_of(compressed_model(CASES[name].model, small.sizes))
    after = percolate({path: jnp.asarray(mask) for path, mask in small.masks.items()}, wiring)
    for path, mask in small.masks.items():
        np.testing.assert_array_equal(after[path], mask)
    with jax.enable_x64(True):
        twice = compress(small.params, small.masks, wiring)
    for one, other in zip(jax.tree.leaves(small.params), jax.tree.leaves(twice.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_queries_of_dead_keys_go_where_there_are_no_biases():
    for name, gone in (("decoder", True), ("bert", False)):
        query = compressed(name)[2].masks["layers/attn/q/kernel"][0]
        assert query[:, 0, 0::2].any() != gone
        assert query[:, 0, 1::2].any()


def test_dead_dimensions_of_a_head_keep_their_place_and_lose_their_links():
    _, masks, small = compressed("bert")
    value, out = (small.masks[f"layers/attn/{name}/kernel"] for name in "vo")
    assert value.shape == masks["layers/attn/v/kernel"].shape
    assert masks["layers/attn/v/kernel"][:, :, 0, 2].any()
    assert not value[:, :, 0, 1:3].any()
    assert not out[:, 0, 1:3].any()


GATED = (
    Junction(
        (Ends("gate", (1,), bias="gate_bias"), Ends("up", (1,), bias="up_bias")),
        (Ends("down", (0,), bias="down_bias"),),
        activation=lambda gate, up: jax.nn.silu(gate) * up,
        cut=Cut(size="mlp_width"),
    ),
)


@pytest.mark.parametrize(("bias", "kept"), [(0.0, [1]), (2.0, [0, 1])])
def test_a_product_without_links_on_one_side_is_nothing_only_where_its_bias_is_zero(bias, kept):
    params = {
        "gate": np.ones((3, 2)),
        "gate_bias": np.ones(2),
        "up": np.ones((3, 2)),
        "up_bias": np.array([bias, 1.0]),
        "down": np.ones((2, 1)),
        "down_bias": np.zeros(1),
    }
    masks = {"up": np.array([[False, True]] * 3)}
    small = compress(params, masks, GATED)
    assert small.kept["gate"].tolist() == kept
    assert small.sizes == {"mlp_width": len(kept)}
    assert small.params["up_bias"].shape == (len(kept),)


def test_a_part_of_a_wiring_cuts_nothing():
    params, masks = {"a": np.ones((2, 3)), "b": np.ones((3, 2))}, {"a": np.eye(2, 3, dtype=bool)}
    chain = (Junction((Ends("a", (1,)),), (Ends("b", (0,)),), activation=jax.nn.relu, cut=Cut()),)
    assert compress(params, masks, chain).params["a"].shape == (2, 2)
    both = {**masks, "b": np.ones((3, 2), bool)}
    small = compress(params, both, restrict_wiring(chain, both))
    assert small.params["a"].shape == (2, 3)
    assert not small.masks["b"][2].any()
    assert small.sizes == {} == small.kept


def test_what_follows_a_cut_loses_its_biases_too():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(2, 4)) for name in ("v", "q")} | {"o": rng.normal(size=(4, 3))}
    params["q_bias"] = rng.normal(size=4)
    value, out = Ends("v", (1,)), Ends("o", (0,))
    cut = Cut(follow=(Ends("q", (1,), bias="q_bias"),), size="heads")
    masks = {"v": np.array([[True, False, True, False]] * 2)}
    small = compress(params, masks, (Junction((value,), (out,), cut=cut),))
    assert small.sizes == {"heads": 2}
    np.testing.assert_array_equal(small.params["q_bias"], params["q_bias"][[0, 2]])
    np.testing.assert_array_equal(small.params["q"], params["q"][:, [0, 2]])


VALUES = {"v": np.ones((2, 4)), "o": np.ones((4, 2))}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: compress(
                VALUES, {}, (Junction((Ends("v", (1,)),), (Ends("o", (0,)),), cut=Cut(axis=1)),)
            ),
            "junction 0 cuts axis 1 of units [4]",
        ),
        (
            lambda: compress(
                VALUES,
                {},
                (Junction((Ends("v", (1,)),), (Ends("o", (0,)),), cut=Cut(follow=(Ends("v", (0,)),))),),
            ),
            "junction 0 cuts [4] units, 'v' cannot follow with [2]",
        ),
        (
            lambda: compressed_model(MLP((4, 4, 2)), {"mlp_width": 3}),
            "a MLP has the sizes features/0, features/1, got mlp_width: compress with the wiring of this model",
        ),
        (lambda: compressed_model(CASES["bert"].model, {"kv_heads": 1}), "a Bert has the sizes mlp_width"),
        (
            lambda: compress(
                {"v": np.ones((2, 4)), "o": np.ones((4, 2))},
                {"v": np.array([[True, False, False, True]] * 2)},
                (
                    Junction(
                        (Ends("v", (1,), split=(4,)),),
                        (Ends("o", (0,)),),
                        cut=Cut(follow=(Ends("o", (0,)),)),
                    ),
                ),
            ),
            "two junctions cut axis 0 of 'o'",
        ),
        (
            lambda: compress(
                {"v": np.ones((2, 2, 2)), "o": np.ones((2, 2, 2))},
                {"v": np.array([[[True, True], [False, True]]] * 2)},
                (Junction((Ends("v", (1, 2), split=(4,)),), (Ends("o", (0, 1), split=(4,)),), cut=Cut()),),
            ),
            "the neurons that stay of 'v' are no whole indices of axes (1, 2)",
        ),
        (
            lambda: compress(
                {"q": np.ones((2, 4)), "o": np.ones((2, 2))},
                {"q": np.zeros((2, 4), bool)},
                (Junction((Ends("q", (1,), 0, (2, 2), (1,)),), (Ends("o", (0,)),)),),
            ),
            "'q' has several neurons in a unit of a junction with outputs",
        ),
    ],
)
def test_a_cut_that_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
