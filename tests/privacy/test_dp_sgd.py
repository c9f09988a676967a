"""Private gradients are the noised mean of clipped gradients of records, whatever fills the batch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.privacy import Clip, gaussian_noise, privacy_plan, private_gradient

KEY = jax.random.key(0)
PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.25], [0.1, 0.3]]), "b": jnp.array([0.1, -0.2])}


def loss(params, example):
    x, y = example
    return jnp.sum(jnp.square(x @ params["w"] + params["b"] - y))


def plan_of(clip=1.0, z=0.0, **changes):
    return privacy_plan(
        **{
            "population": 1000,
            "cohort": 5,
            "rounds": 10,
            "delta": 1e-6,
            "accountant": "moments",
            "unit": "record",
        }
        | {"clip": clip, "noise_multiplier": z}
        | changes
    )


def batch_of(seed, places=8):
    a, b = jax.random.split(jax.random.key(seed))
    return jax.random.normal(a, (places, 3)), 3 * jax.random.normal(b, (places, 2))


each_gradient = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))


def by_hand(batch, mask, bound):
    """Clipped gradients, one example after the other, in float64."""
    total = jax.tree.map(lambda p: np.zeros(p.shape), PARAMS)
    gradients, norms = each_gradient(PARAMS, batch), []
    for i in range(len(mask)):
        gradient = jax.tree.map(lambda g, i=i: np.asarray(g[i], np.float64), gradients)
        norms.append(math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient))))
        factor = min(1.0, bound / norms[-1]) if mask[i] else 0.0
        total = jax.tree.map(lambda t, g, f=factor: t + f * g, total, gradient)
    return total, np.where(mask, norms, 0)


def assert_close(a, b, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-5, "atol": 1e-6, **tolerance}), a, b
    )


MASKS = st.lists(st.booleans(), min_size=8, max_size=8)
compiled = {}


def gradient_of(clip, microbatch=None):
    if (clip, microbatch) not in compiled:
        compiled[clip, microbatch] = jax.jit(private_gradient(loss, plan_of(clip), microbatch=microbatch))
    return compiled[clip, microbatch]


@given(MASKS, st.integers(0, 99), st.sampled_from([0.5, 4.0, math.inf]))
def test_without_noise_it_is_the_sum_of_clipped_gradients_over_the_expected_batch(mask, seed, bound):
    batch = batch_of(seed)
    gradient, aux = gradient_of(bound)(PARAMS, batch, jnp.array(mask), KEY)
    total, norms = by_hand(batch, mask, bound)
    assert_close(gradient, jax.tree.map(lambda t: t / 5, total))
    np.testing.assert_allclose(aux.norms, norms, rtol=1e-5)


def test_without_noise_and_clip_it_is_the_gradient_of_the_sum_over_the_expected_batch():
    batch, mask = batch_of(0), jnp.ones(8, bool)
    gradient, aux = gradient_of(math.inf)(PARAMS, batch, mask, KEY)
    losses = jax.vmap(loss, (None, 0))(PARAMS, batch)
    assert_close(gradient, jax.grad(lambda p: jax.vmap(loss, (None, 0))(p, batch).sum() / 5)(PARAMS))
    np.testing.assert_allclose(aux.losses, losses, rtol=1e-6)


@given(st.integers(0, 99), st.sampled_from([0.0, 1e30, math.nan, math.inf]))
def test_what_is_in_the_padding_has_no_influence(seed, rubbish):
    mask = jnp.array([True] * 5 + [False] * 3)
    x, y = batch_of(seed)
    dirty = (jnp.where(mask[:, None], x, rubbish), jnp.where(mask[:, None], y, rubbish))
    clean, aux = gradient_of(0.5)(PARAMS, (x, y), mask, KEY)
    other, other_aux = gradient_of(0.5)(PARAMS, dirty, mask, KEY)
    jax.tree.map(np.testing.assert_array_equal, clean, other)
    jax.tree.map(np.testing.assert_array_equal, aux, other_aux)


@given(st.integers(0, 99), st.sampled_from([1.0, 1e6, math.nan, math.inf]))
def test_a_record_moves_the_gradient_by_the_clip_over_the_expected_batch_at_most(seed, size):
    x, y = batch_of(seed)
    mask = jnp.ones(8, bool)
    here, _ = gradient_of(0.5)(PARAMS, (x, y), mask, KEY)
    removed, _ = gradient_of(0.5)(PARAMS, (x, y), mask.at[2].set(False), KEY)
    replaced, _ = gradient_of(0.5)(PARAMS, (x.at[2].set(size), y), mask, KEY)
    for other, sensitivity in ((removed, 0.5), (replaced, 1.0)):
        moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), here, other)
        assert optax.tree.norm(moved) <= sensitivity / 5 * (1 + 1e-5)


@pytest.mark.parametrize("microbatch", [1, 2, 8])
def test_microbatches_change_nothing(microbatch):
    batch, mask = batch_of(1), jnp.array([True, False, True, True, False, True, True, False])
    some, aux = gradient_of(0.5, microbatch)(PARAMS, batch, mask, KEY)
    whole, whole_aux = gradient_of(0.5)(PARAMS, batch, mask, KEY)
    assert_close(some, whole)
    assert_close(aux, whole_aux)


def test_the_noise_is_that_of_the_plan():
    batch, mask = batch_of(2), jnp.ones(8, bool)
    plain, _ = gradient_of(0.5)(PARAMS, batch, mask, KEY)
    noisy, _ = private_gradient(loss, plan_of(0.5, z=3.0))(PARAMS, batch, mask, KEY)
    noise = gaussian_noise(Clip(0.5), 3.0, KEY, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_close(jax.tree.map(jnp.subtract, noisy, plain), jax.tree.map(lambda n: n / 5, noise))


def test_records_of_fixed_batches_are_hidden_by_twice_the_noise():
    plan = plan_of(0.5, z=3.0, sampling="fixed", accountant="rdp")
    batch, mask = batch_of(2, 5), jnp.ones(5, bool)
    plain, _ = private_gradient(loss, plan_of(0.5))(PARAMS, batch, mask, KEY)
    noisy, _ = private_gradient(loss, plan)(PARAMS, batch, mask, KEY)
    noise = gaussian_noise(Clip(0.5), 6.0, KEY, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_close(jax.tree.map(jnp.subtract, noisy, plain), jax.tree.map(lambda n: n / 5, noise))


def test_parameters_of_bfloat16_are_clipped_and_noised_in_float32():
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), batch_of(3))
    gradient, aux = private_gradient(loss, plan_of(0.5, z=1.0))(low, batch, jnp.ones(8, bool), KEY)
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}
    assert aux.norms.dtype == jnp.float32
    wide, _ = private_gradient(loss, plan_of(0.5, z=1.0))(PARAMS, batch_of(3), jnp.ones(8, bool), KEY)
    assert_close(jax.tree.map(lambda g: g.astype(jnp.float32), gradient), wide, rtol=0.1, atol=0.02)


def test_a_private_run_finds_the_line_through_its_records():
    plan = privacy_plan(
        population=2000,
        cohort=200,
        clip=1.0,
        rounds=60,
        delta=1e-4,
        epsilon=3.0,
        accountant="moments",
        unit="record",
    )
    x = jax.random.normal(jax.random.key(1), (2000, 3))
    y = x @ PARAMS["w"] + PARAMS["b"][None]
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    optimizer, gradient = optax.sgd(0.3), private_gradient(loss, plan)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch, mask, key):
        updates, state = optimizer.update(gradient(params, batch, mask, key)[0], state)
        return optax.apply_updates(params, updates), state

    for t in range(plan.rounds):
        ids, mask = plan.sample(0, t)
        rows = np.where(mask, ids, 0)
        params, state = step(params, state, (x[rows], y[rows]), jnp.asarray(mask), jax.random.fold_in(KEY, t))
    assert jnp.abs(params["w"] - PARAMS["w"]).max() < 0.2


def test_a_forecast_can_take_the_place_of_a_plan():
    gradient = private_gradient(loss, plan_of(0.5, z=1.0).forecast(4))
    result, _ = gradient(PARAMS, batch_of(0), jnp.ones(8, bool), KEY)
    assert jax.tree.structure(result) == jax.tree.structure(PARAMS)


class Declared:
    def sensitivity(self, relation):
        return 1.0


def call(mask=None, key=KEY, microbatch=None, batch=None):
    gradient = private_gradient(loss, plan_of(0.5), microbatch=microbatch)
    return gradient(
        PARAMS, batch_of(0) if batch is None else batch, jnp.ones(8, bool) if mask is None else mask, key
    )


@pytest.mark.parametrize(
    "attempt, error, message",
    [
        (lambda: private_gradient(loss, plan_of(Declared())), TypeError, "needs a clip with a norm"),
        (lambda: call(microbatch=0), ValueError, "microbatch must be a whole number of at least 1"),
        (lambda: call(microbatch=3), ValueError, "microbatch=3 must divide the 8 places"),
        (lambda: call(mask=jnp.ones(8)), TypeError, r"mask must be bool \[B\]"),
        (lambda: call(mask=jnp.ones(7, bool)), ValueError, "must have the 7 places of the mask"),
        (lambda: call(key=jax.random.PRNGKey(0)), TypeError, "legacy uint32 key"),
    ],
)
def test_bad_input_is_an_error(attempt, error, message):
    with pytest.raises(error, match=message):
        attempt()
