"""The encoder-decoder as a function."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.models import PARAMETER_AXES, EncoderDecoder, encoder_decoder, unstack_layers

from . import golden

SIZES = {"vocab": 11, "layers": 2, "width": 8, "heads": 2, "mlp_width": 12, "max_length": 16}


@pytest.fixture(scope="module")
def pair():
    source = jax.random.randint(jax.random.key(1), (2, 6), 0, 11)
    return source, jax.random.randint(jax.random.key(2), (2, 5), 0, 11)


def perturbed(model, *inputs):
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *inputs))["params"]
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(p + 0.2 * noise.normal(size=p.shape), p.dtype), params)


@pytest.fixture(scope="module")
def params(pair):
    return perturbed(EncoderDecoder(**SIZES), *pair)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(
        lambda params, *args, **kwargs: EncoderDecoder(**SIZES).apply({"params": params}, *args, **kwargs)
    )


def reference_logits(params, source, tokens, pre_norm):
    """Vaswani et al. 2017, sections 3.1 to 3.5, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), unstack_layers(params))
    table = p["embed"]["embedding"]
    width = table.shape[1]

    def embed(ids):
        t, i = np.arange(ids.shape[1])[:, None], np.arange(width // 2)[None]
        angles = t / 10000 ** (2 * i / width)
        return table[ids] * np.sqrt(width) + np.concatenate([np.sin(angles), np.cos(angles)], -1)

    def norm(x, q):
        return golden.layer_norm(x, q["scale"], q["bias"], 1e-6)

    def residual(x, q, inner):
        return x + inner(norm(x, q)) if pre_norm else norm(x + inner(x), q)

    def attend(x, source, q, mask=None):
        query, key, value = (golden.project(*a) for a in ((x, q["q"]), (source, q["k"]), (source, q["v"])))
        return golden.merge_heads(golden.attention(query, key, value, mask), q["o"])

    def feedforward(x, q):
        return golden.dense(np.maximum(golden.dense(x, q["up"]), 0), q["down"])

    memory, x = embed(source), embed(tokens)
    causal = np.tril(np.ones((tokens.shape[1],) * 2, bool))
    for i in range(2):
        q = p["encoder"][f"layers_{i}"]
        memory = residual(memory, q["attn_norm"], lambda h, q=q: attend(h, h, q["attn"]))
        memory = residual(memory, q["mlp_norm"], lambda h, q=q: feedforward(h, q["mlp"]))
    memory = norm(memory, p["encoder"]["norm"]) if pre_norm else memory
    for i in range(2):
        q = p["decoder"][f"layers_{i}"]
        x = residual(x, q["attn_norm"], lambda h, q=q: attend(h, h, q["attn"], causal))
        x = residual(x, q["cross_norm"], lambda h, q=q: attend(h, memory, q["cross"]))
        x = residual(x, q["mlp_norm"], lambda h, q=q: feedforward(h, q["mlp"]))
    x = norm(x, p["decoder"]["norm"]) if pre_norm else x
    return x @ table.T


@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre", "post"])
def test_encoder_decoder_follows_its_equations(pair, pre_norm):
    model = EncoderDecoder(**SIZES, pre_norm=pre_norm)
    params = perturbed(model, *pair)
    logits = jax.jit(model.apply)({"params": params}, *pair)
    expected = reference_logits(params, *map(np.asarray, pair), pre_norm)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=2e-4)


def test_no_logit_sees_a_later_target_token(pair, params, apply):
    source, tokens = pair
    before = apply(params, source, tokens)
    after = apply(params, source, tokens.at[:, 3].set((tokens[:, 3] + 1) % 11))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert not np.allclose(before[:, 3:], after[:, 3:])


def test_padding_of_the_source_is_not_seen(pair, params, apply):
    source, tokens = pair
    mask = jnp.broadcast_to(jnp.arange(6) < 4, (2, 6))
    masked = apply(params, source, tokens, mask)
    np.testing.assert_allclose(masked, apply(params, source.at[:, 4:].set(0), tokens, mask), atol=1e-6)
    np.testing.assert_allclose(masked, apply(params, source[:, :4], tokens), rtol=1e-4, atol=1e-5)


def test_packed_pairs_give_the_logits_of_separate_ones(pair, params, apply):
    source, tokens = pair
    ids = {
        "source_segments": jnp.broadcast_to(jnp.array([1, 1, 2, 2, 2, 2]), (2, 6)),
        "segments": jnp.broadcast_to(jnp.array([1, 1, 1, 2, 2]), (2, 5)),
        "source_positions": jnp.broadcast_to(jnp.array([0, 1, 0, 1, 2, 3]), (2, 6)),
        "positions": jnp.broadcast_to(jnp.array([0, 1, 2, 0, 1]), (2, 5)),
    }
    packed = apply(params, source, tokens, **ids)
    first = apply(params, source[:, :2], tokens[:, :3])
    second = apply(params, source[:, 2:], tokens[:, 3:])
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], 1), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "change",
    [{"shared": False, "source_vocab": 7}, {"learned_positions": True}, {"activation": "swiglu"}],
    ids=str,
)
def test_options_have_the_parameters_that_they_say(change, pair):
    model = EncoderDecoder(**SIZES, **change)
    source, tokens = pair
    logits, variables = jax.jit(model.init_with_output)(jax.random.key(0), source % 7, tokens)
    assert logits.shape == (2, 5, 11)
    params = nn.unbox(variables)["params"]
    if not model.shared:
        assert params["source_embed"]["embedding"].shape == (7, 8)
        assert params["lm_head"]["kernel"].shape == (8, 11)
    assert ("positions" in params) == model.learned_positions
    assert ("gate" in params["encoder"]["layers"]["mlp"]) == (model.activation == "swiglu")
    for box in jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert set(box.names) <= set(PARAMETER_AXES)


def test_bf16_computation_returns_float32(pair, params, apply):
    exact = apply(params, *pair)
    half = jax.jit(EncoderDecoder(**SIZES, dtype=jnp.bfloat16).apply)({"params": params}, *pair)
    assert half.dtype == jnp.float32
    assert np.abs(half - exact).max() < 8 * 2**-8 * np.abs(exact).max()


def test_dropout_needs_a_key_and_works_in_training_alone(pair, params, apply):
    model = EncoderDecoder(**SIZES, dropout=0.5, remat="full")
    plain = apply(params, *pair)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, *pair), plain, atol=1e-6)
    train = jax.jit(functools.partial(model.apply, train=True))
    with pytest.raises(flax.errors.InvalidRngError, match='"dropout"'):
        train({"params": params}, *pair)
    assert not np.allclose(train({"params": params}, *pair, rngs={"dropout": jax.random.key(0)}), plain)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 3}, "width must be a multiple of heads, got 8 and 3"),
        ({"source_vocab": 7}, "one vocabulary, got 7 and 11; set shared=False"),
        ({"width": 9, "heads": 3}, "even width, got 9"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"attention": "flash"}, "attention must be one of"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_at_construction(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderDecoder(**{**SIZES, **change})


def test_sequences_and_segments_that_do_not_fit_are_refused(pair, params):
    source, tokens = pair
    model = EncoderDecoder(**SIZES)
    with pytest.raises(ValueError, match="17 tokens is longer than max_length 16"):
        model.apply({"params": params}, jnp.zeros((1, 17), jnp.int32), tokens[:1])
    with pytest.raises(ValueError, match="segments are for both sides"):
        model.apply({"params": params}, source, tokens, segments=tokens)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown encoder-decoder preset 'huge'; there are tiny, multi30k-small, multi30k,"
    ):
        encoder_decoder("huge", vocab=5)
