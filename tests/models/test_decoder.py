"""The decoder as a function: golden values, causality, packing, sizes, errors."""

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.models import (
    PARAMETER_AXES,
    Decoder,
    RotaryScaling,
    decoder,
    flops_per_token,
    parameter_count,
    unstack_layers,
)
from odjax.models.decoder import PRESETS

from . import golden

SIZES = {"vocab": 13, "layers": 2, "width": 8, "heads": 4, "kv_heads": 2, "mlp_width": 12, "max_length": 16}
LENGTH = 10


@pytest.fixture(scope="module")
def model():
    return Decoder(**SIZES, rope_theta=100.0)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(7), (2, LENGTH), 0, 13)


@pytest.fixture(scope="module")
def params(model, tokens):
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"]
    # Away from the neutral values of an initialization, so that no term can hide.
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(p + 0.2 * noise.normal(size=p.shape), p.dtype), params)


@pytest.fixture(scope="module")
def apply(model):
    return jax.jit(lambda params, *args: model.apply({"params": params}, *args))


def test_decoder_follows_its_equations(model, params, tokens, apply):
    reference = jax.tree.map(lambda p: np.asarray(p, np.float64), unstack_layers(params))
    expected = golden.decoder(reference, np.asarray(tokens), theta=100.0, eps=1e-5)
    np.testing.assert_allclose(apply(params, tokens), expected, rtol=1e-4, atol=1e-4)


@given(st.integers(1, LENGTH - 1), st.integers(0, 12))
def test_no_logit_sees_a_later_token(params, tokens, apply, position, token):
    changed = tokens.at[:, position].set(token)
    before, after = apply(params, tokens), apply(params, changed)
    np.testing.assert_array_equal(before[:, :position], after[:, :position])


def test_every_logit_sees_its_own_and_earlier_tokens(params, tokens, apply):
    for position in range(LENGTH):
        changed = tokens.at[:, position].set((tokens[:, position] + 1) % 13)
        moved = np.abs(apply(params, tokens) - apply(params, changed)).max(axis=(0, 2)) > 1e-6
        assert moved.tolist() == [t >= position for t in range(LENGTH)]


@pytest.mark.parametrize("cut", [3, 5])
def test_packed_documents_give_the_logits_of_separate_ones(params, tokens, apply, cut):
    segments = (jnp.arange(LENGTH) >= cut).astype(jnp.int32)[None] + 1
    positions = jnp.where(segments == 1, jnp.arange(LENGTH)[None], jnp.arange(LENGTH)[None] - cut)
    both = [jnp.broadcast_to(a, tokens.shape) for a in (segments, positions)]
    packed = apply(params, tokens, *both)
    first, second = (apply(params, part) for part in (tokens[:, :cut], tokens[:, cut:]))
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], 1), rtol=1e-4, atol=2e-5)


def test_segments_without_positions_differ_by_rounding_alone(params, tokens, apply):
    segments = jnp.broadcast_to(jnp.array([1] * 4 + [2] * 6), tokens.shape)
    positions = jnp.broadcast_to(jnp.array([*range(4), *range(6)]), tokens.shape)
    np.testing.assert_allclose(
        apply(params, tokens, segments), apply(params, tokens, segments, positions), rtol=1e-4, atol=2e-5
    )


def test_head_after_features_is_the_whole_model(model, params, tokens, apply):
    features = model.apply({"params": params}, tokens, method="features")
    assert features.shape == (2, LENGTH, 8)
    logits = model.apply({"params": params}, features, method="logits")
    np.testing.assert_allclose(logits, apply(params, tokens), rtol=1e-5, atol=1e-6)


def test_tied_head_is_the_transposed_embedding(tokens):
    model = Decoder(**SIZES, tied=True)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"]
    assert set(params) == {"embed", "layers", "norm"}
    features = model.apply({"params": params}, tokens, method="features")
    expected = np.asarray(features, np.float64) @ np.asarray(params["embed"]["embedding"], np.float64).T
    np.testing.assert_allclose(model.apply({"params": params}, tokens), expected, rtol=1e-4, atol=1e-5)


def test_a_given_head_replaces_the_learned_one(tokens):
    model = Decoder(**SIZES, head=lambda x: jnp.concatenate([x, x], -1))
    logits, variables = model.init_with_output(jax.random.key(0), tokens)
    assert logits.shape == (2, LENGTH, 16)
    assert "lm_head" not in variables["params"]
    module = Decoder(**SIZES, head=nn.Dense(5))
    assert module.init(jax.random.key(0), tokens)["params"]["head"]["kernel"].shape == (8, 5)


@pytest.fixture(scope="module")
def wide():
    """As initialized and wide enough for roundings to average out."""
    model = decoder("tiny")
    tokens = jax.random.randint(jax.random.key(7), (2, LENGTH), 0, 256)
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"], tokens


def distance(a, b):
    a, b = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (a, b))
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


# bf16 rounds at 2^-9; some dozens of roundings follow one another and add up like a random walk.
BF16_DISTANCE = 8 * 2**-9


def test_bf16_computation_keeps_float32_parameters_and_logits(wide):
    model, params, tokens = wide
    half = model.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(half.init, jax.random.key(0), tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    exact, rounded = (jax.jit(m.apply)({"params": params}, tokens) for m in (model, half))
    assert rounded.dtype == jnp.float32
    assert 0 < distance(rounded, exact) < BF16_DISTANCE


@pytest.mark.parametrize("attention, promotion", [("xla", "standard"), ("blocked", "strict")])
def test_bf16_gradients_are_float32_and_close(wide, attention, promotion):
    model, params, tokens = wide

    def grads(model):
        return jax.jit(jax.grad(lambda p: jnp.mean(model.apply({"params": p}, tokens) ** 2)))(params)

    # JAX's own attention cannot be differentiated in bf16 under strict promotion.
    with jax.numpy_dtype_promotion(promotion):
        exact = grads(model)
        rounded = grads(model.clone(dtype=jnp.bfloat16, attention=attention, remat="full"))
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {jnp.dtype(jnp.float32)}
    assert 0 < distance(rounded, exact) < BF16_DISTANCE


def test_bf16_parameters_are_stored_as_asked(tokens):
    model = Decoder(**SIZES, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, qk_norm=True)
    logits, variables = model.init_with_output(jax.random.key(0), tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32


def test_every_axis_of_every_parameter_has_a_known_name(model, tokens):
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    boxes = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert set(box.names) <= set(PARAMETER_AXES)


@pytest.mark.parametrize(
    "change",
    [{}, {"tied": True}, {"kv_heads": 4}, {"kv_heads": 1, "head_dim": 6}, {"qk_norm": True}, {"scan": False}],
    ids=str,
)
def test_parameters_are_counted_in_closed_form(change, tokens):
    model = Decoder(**{**SIZES, **change})
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    assert parameter_count(model) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "preset, published",
    # The totals that the model cards' checkpoints have.
    [("1b", 1_235_814_400), ("7b", 6_738_415_616), ("8b", 8_030_261_248), ("70b", 70_553_706_496)],
)
def test_presets_have_the_sizes_of_the_published_models(preset, published):
    assert parameter_count(decoder(preset)) == published


def test_every_preset_can_be_built_without_memory():
    for name in PRESETS:
        model = decoder(name)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameter_count(model)


def test_operations_are_counted_in_closed_form():
    # One layer: the compiler counts a loop's body once.
    model = Decoder(vocab=64, layers=1, width=64, heads=4, kv_heads=2, mlp_width=160, max_length=32)
    tokens = jnp.zeros((2, 32), jnp.int32)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
    forward = jax.jit(model.apply).lower(variables, tokens).compile().cost_analysis()["flops"]
    counted = 2 * 32 * flops_per_token(model, 32, training=False)
    # Norms, rotations, masks and the softmax are the rest.
    assert counted <= forward < 1.12 * counted
    assert flops_per_token(model, 32) == 3 * flops_per_token(model, 32, training=False)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown decoder preset '3b'; there are tiny, .*, 70b"):
        decoder("3b")


def test_overrides_replace_the_presets_sizes():
    model = decoder("8b", layers=2, rope_scaling=RotaryScaling())
    assert (model.layers, model.width, model.rope_scaling.factor) == (2, 4096, 8.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"width": 10}, "width 10 is not a multiple of heads 4: give head_dim"),
        ({"head_dim": 5}, "head_dim must be even for rotary positions, got 5"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"attention": "flash"}, "attention must be one of"),
        ({"tied": True, "head": nn.Dense(3)}, "either tied=True or head="),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_at_construction(change, message):
    with pytest.raises(ValueError, match=message):
        Decoder(**{**SIZES, **change})


def test_a_sequence_longer_than_the_maximum_is_refused(model, params):
    with pytest.raises(ValueError, match="17 tokens is longer than max_length 16"):
        model.apply({"params": params}, jnp.zeros((1, 17), jnp.int32))


def test_segments_and_a_cache_exclude_each_other(model, params, tokens):
    with pytest.raises(ValueError, match="segments and cache_length exclude each other"):
        model.apply({"params": params}, tokens, tokens, cache_length=12, mutable=["cache"])
