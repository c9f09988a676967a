"""Generation with a cache is the uncached model, a token at a time."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from odjax.models import Decoder, encoder_decoder, generate, keep_top, sample, translate, unstack_layers

SIZES = {"vocab": 17, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24, "max_length": 32}
STEPS = 6


@pytest.fixture(scope="module")
def model():
    return Decoder(**SIZES)


@pytest.fixture(scope="module")
def prompt():
    return jax.random.randint(jax.random.key(7), (3, 5), 0, 17)


@pytest.fixture(scope="module")
def params(model, prompt):
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), prompt))["params"]
    return jax.tree.map(lambda p: 2.5 * p, params)  # apart enough for a clear largest logit


@pytest.fixture(scope="module")
def greedy(model, params, prompt):
    run = functools.partial(generate, model, steps=STEPS, key=jax.random.key(1), temperature=0.0)
    return jax.jit(run)(params, prompt)


def test_greedy_generation_takes_the_largest_logit_of_the_uncached_model(model, params, prompt, greedy):
    whole = jnp.concatenate([prompt, greedy], axis=1)
    logits = model.apply({"params": params}, whole)[:, prompt.shape[1] - 1 : -1]
    assert len(np.unique(greedy)) > 3
    np.testing.assert_array_equal(greedy, jnp.argmax(logits, -1))


def test_cached_logits_are_the_uncached_ones(model, params, prompt):
    expected = model.apply({"params": params}, prompt)
    variables = {"params": params}
    cached = []
    step = jax.jit(functools.partial(model.apply, segments=None, cache_length=9, mutable=["cache"]))
    for t in range(prompt.shape[1]):
        y, new = step(variables, prompt[:, t : t + 1], positions=jnp.full((3, 1), t))
        variables = {"params": params, **new}
        cached.append(y)
    np.testing.assert_allclose(jnp.concatenate(cached, 1), expected, rtol=1e-4, atol=1e-5)


def test_unrolled_layers_generate_the_same(model, params, prompt, greedy):
    run = functools.partial(
        generate, model.clone(scan=False), steps=STEPS, key=jax.random.key(1), temperature=0.0
    )
    tokens = jax.jit(run)(unstack_layers(params), prompt)
    np.testing.assert_array_equal(tokens, greedy)


def test_ragged_prompts_continue_like_single_ones(model, params, prompt):
    lengths = jnp.array([5, 2, 4])
    filled = jnp.where(jnp.arange(5)[None] < lengths[:, None], prompt, 16)
    run = functools.partial(generate, model, key=jax.random.key(1), temperature=0.0, steps=STEPS)
    run = jax.jit(run)
    together = run(params, filled, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = run(params, prompt[row : row + 1, :length])
        np.testing.assert_array_equal(together[row], alone[0])


def test_one_token_to_choose_from_is_greedy(model, params, prompt, greedy):
    for choice in ({"top_k": 1}, {"top_p": 1e-6}):
        run = functools.partial(generate, model, steps=STEPS, key=jax.random.key(3), **choice)
        tokens = jax.jit(run)(params, prompt)
        np.testing.assert_array_equal(tokens, greedy)


def test_the_key_decides_what_is_sampled(model, params, prompt):
    run = jax.jit(functools.partial(generate, model, steps=STEPS, temperature=3.0))
    one, again, other = (run(params, prompt, key=jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_row_repeats_its_end_symbol(model, params, prompt, greedy):
    eos = int(greedy[0, 2])
    run = functools.partial(generate, model, steps=STEPS, key=jax.random.key(1), temperature=0.0, eos=eos)
    tokens = jax.jit(run)(params, prompt)
    for row, expected in zip(np.asarray(tokens), np.asarray(greedy), strict=True):
        ends = np.flatnonzero(expected == eos)
        end = ends[0] if ends.size else STEPS
        np.testing.assert_array_equal(row[: end + 1], expected[: end + 1])
        assert np.all(row[end:] == eos)


def test_a_single_step_is_the_first_of_many(model, params, prompt, greedy):
    run = functools.partial(generate, model, steps=1, key=jax.random.key(1), temperature=0.0)
    tokens = jax.jit(run)(params, prompt)
    np.testing.assert_array_equal(tokens, greedy[:, :1])


def test_the_cache_is_split_like_the_key_heads(model, params, prompt):
    mesh = jax.make_mesh((3, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = [("batch", "data"), ("act_kv_heads", "tensor"), ("act_heads", "tensor")]

    def prefill(params):
        return model.apply({"params": params}, prompt, cache_length=9, mutable=["cache"], method="features")[
            1
        ]["cache"]

    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        cache = jax.jit(prefill)(params)
    key = cache["layers"]["attn"]["key"]
    assert key.shape == (2, 3, 9, 2, 4)
    assert key.addressable_shards[0].data.shape == (2, 1, 9, 1, 4)


def test_sampling_at_temperature_zero_takes_the_largest():
    logits = jax.random.normal(jax.random.key(0), (4, 9))
    np.testing.assert_array_equal(
        sample(jax.random.key(1), logits, temperature=0), jnp.argmax(logits, axis=-1)
    )


def test_sampled_frequencies_are_the_kept_probabilities():
    probabilities = jnp.array([0.4, 0.3, 0.2, 0.1])
    logits = jnp.broadcast_to(jnp.log(probabilities), (20000, 4))
    drawn = sample(jax.random.key(0), logits, top_k=3)
    counts = np.bincount(drawn, minlength=4) / 20000
    # Four standard deviations of a frequency of 4/9.
    np.testing.assert_allclose(counts, np.array([4, 3, 2, 0]) / 9, atol=4 * (4 / 9 * 5 / 9 / 20000) ** 0.5)


logits_of = hnp.arrays(np.float32, 7, elements=st.floats(-8, 8, width=32))


@given(logits_of, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_its_probability(logits, top_p):
    kept = np.isfinite(keep_top(jnp.asarray(logits), top_p=top_p))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    order = np.argsort(-logits, kind="stable")
    assert kept[order[: kept.sum()]].all()
    assert p[kept].sum() >= top_p - 1e-5
    if kept.sum() > 1:
        assert p[kept].sum() - p[kept].min() < top_p + 1e-5


@given(logits_of, st.integers(1, 9))
def test_top_k_keeps_exactly_k(logits, top_k):
    kept = np.isfinite(keep_top(jnp.asarray(logits), top_k=top_k))
    assert kept.sum() == min(top_k, 7)
    assert kept.all() or logits[kept].min() >= logits[~kept].max()


def test_top_p_works_on_what_top_k_left():
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    # Of the two that are left the first has 4/7 > 0.5.
    kept = np.isfinite(keep_top(logits, top_k=2, top_p=0.5))
    assert kept.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"steps": 0}, "one step, got 5 and 0"),
        ({"steps": 28}, "5 tokens and 28 steps are longer than max_length 32"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(model, params, prompt, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompt, **{"steps": STEPS, "key": jax.random.key(0), **change})


def test_greedy_translation_takes_the_largest_logit_of_the_uncached_model():
    model = encoder_decoder("tiny", vocab=17, width=16)
    source = jax.random.randint(jax.random.key(2), (2, 6), 0, 17)
    mask = jnp.arange(6)[None] < jnp.array([[6], [4]])
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), source, source))["params"]
    params = jax.tree.map(lambda p: 2.0 * p, params)
    run = jax.jit(functools.partial(translate, model, steps=STEPS, bos=1, key=jax.random.key(1)))
    tokens = run(params, source, source_mask=mask)
    target = jnp.concatenate([jnp.ones((2, 1), jnp.int32), tokens], axis=1)
    logits = model.apply({"params": params}, source, target, mask)[:, :-1]
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, -1))
    alone = run(params, source[1:, :4])
    np.testing.assert_array_equal(tokens[1:], alone)
