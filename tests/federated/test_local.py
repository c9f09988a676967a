"""What a client does: closed forms of its steps."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.federated import Shared, local_scaffold, local_sgd
from odjax.federated.local import mean_gradient

from .world import KEY, assert_close, assert_same, noisy, params, plain

BATCH = {"x": jnp.arange(12.0).reshape(4, 3) / 10, "y": jnp.array([1.0, -1.0, 0.5, 2.0])}
ALL = jnp.ones(4, bool)


def bowl(params, shared, batch, mask, key):
    """h (theta - b)^2 / 2, with h and b in the batch."""
    loss = jnp.sum(jnp.where(mask, batch["h"] * (params["w"] - batch["b"]) ** 2 / 2, 0.0))
    return {"loss": (loss, jnp.sum(mask.astype(jnp.float32)))}


@functools.partial(jax.jit, static_argnums=0)
def steps_of(client, shared, batch, mask, count, private=None):
    def step(_, state):
        return client.step(state, shared, batch, mask, KEY)[0]

    return client.final(jax.lax.fori_loop(0, count, step, client.init(shared, private)), shared)


@functools.cache
def bowl_client(rate, mu=0.0):
    return local_sgd(bowl, optax.sgd(rate), proximal=mu)


@given(h=st.floats(0.1, 2), b=st.floats(-3, 3), count=st.integers(1, 6))
def test_k_steps_on_a_quadratic_go_a_power_of_the_way(h, b, count):
    batch = {"h": jnp.array([h], jnp.float32), "b": jnp.array([b], jnp.float32)}
    shared = Shared({"w": jnp.float32(0.7)})
    delta, private = steps_of(bowl_client(0.3), shared, batch, ALL[:1], count)
    assert private is None
    assert_close(0.7 + delta["w"], b + (1 - 0.3 * h) ** count * (0.7 - b))


@given(mu=st.sampled_from([0.0, 0.5, 3.0]), count=st.integers(1, 5))
def test_fed_prox_on_a_quadratic_is_the_same_with_a_steeper_bowl_between_both_centres(mu, count):
    # h (y - b)^2 / 2 + mu (y - theta)^2 / 2 has curvature h + mu and its minimum at (h b + mu theta) / (h + mu).
    h, b, theta = 0.8, 2.0, -1.0
    batch = {"h": jnp.array([h]), "b": jnp.array([b])}
    delta, _ = steps_of(bowl_client(0.2, mu), Shared({"w": jnp.float32(theta)}), batch, ALL[:1], count)
    centre = (h * b + mu * theta) / (h + mu)
    assert_close(theta + delta["w"], centre + (1 - 0.2 * (h + mu)) ** count * (theta - centre))


SCAFFOLD = local_scaffold(plain, 0.1)
STEP = jax.jit(lambda state, shared: SCAFFOLD.step(state, shared, BATCH, ALL, KEY))
GRADIENT = jax.jit(lambda params, shared: mean_gradient(plain, params, shared, BATCH, ALL, KEY)[0])


@given(count=st.integers(1, 5), own=st.floats(-1, 1), server=st.floats(-1, 1))
def test_scaffold_keeps_the_mean_of_its_gradients_for_a_control_variate(count, own, server):
    # Option II: c_i' = c_i - c + (theta - y) / (K eta) is the mean of the gradients of the K steps.
    shared = Shared(params(), control={"w": jnp.full(3, server, jnp.float32), "b": jnp.float32(server)})
    private = {"w": jnp.full(3, own, jnp.float32), "b": jnp.float32(own)}
    client = SCAFFOLD
    state, gradients = client.init(shared, private), []
    for _ in range(count):
        gradients.append(GRADIENT(state.params, shared))
        state, _ = STEP(state, shared)
    delta, kept = client.final(state, shared)
    mean = jax.tree.map(lambda *g: sum(g) / count, *gradients)
    assert_close(kept, mean, atol=1e-5)
    assert_close(delta.control, jax.tree.map(jnp.subtract, kept, private), atol=1e-5)
    assert_close(delta.params, jax.tree.map(lambda g: -0.1 * count * (g - own + server), mean), atol=1e-5)


def test_examples_that_do_not_count_change_nothing():
    half = jnp.array([True, True, False, False])
    other = jax.tree.map(lambda x: x.at[2:].set(1e3), BATCH)
    run = jax.jit(lambda b, m: mean_gradient(plain, params(), Shared(params()), b, m, KEY))
    got, figures = run(BATCH, half)
    assert_same(run(other, half), (got, figures))
    assert_close((got, figures), run(jax.tree.map(lambda x: x[:2], BATCH), half[:2]))
    assert figures["loss"][1] == 2


def test_a_batch_that_counts_nothing_has_no_gradient():
    gradient, _ = mean_gradient(plain, params(), Shared(params()), BATCH, ~ALL, KEY)
    assert_same(gradient, jax.tree.map(jnp.zeros_like, params()))


def test_schedules_in_the_clients_optimizer_count_its_own_steps():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.0})
    with jax.numpy_dtype_promotion("standard"):
        delta, _ = steps_of(local_sgd(plain, optax.sgd(schedule)), Shared(params()), BATCH, ALL, 3)
        once, _ = steps_of(local_sgd(plain, optax.sgd(1.0)), Shared(params()), BATCH, ALL, 1)
    assert_close(delta, once)


def test_deltas_of_bfloat16_are_float32_and_of_float64_float64():
    for name, wide in (("bfloat16", "float32"), ("float32", "float32")):
        shared = Shared(params(jnp.dtype(name)))
        client = local_sgd(plain, optax.sgd(0.1))
        batch = jax.tree.map(lambda x, name=name: x.astype(name), BATCH)
        delta, _ = steps_of(client, shared, batch, ALL, 2)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(delta)} == {wide}
    with jax.enable_x64(True):
        shared = Shared(params(jnp.float64))
        batch = jax.tree.map(lambda x: x.astype(jnp.float64), BATCH)
        delta, _ = steps_of(local_sgd(plain, optax.sgd(0.1)), shared, batch, ALL, 2)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(delta)} == {"float64"}


def test_bad_input_names_the_argument():
    with pytest.raises(ValueError, match="proximal must not be negative, got -1"):
        local_sgd(plain, optax.sgd(0.1), proximal=-1)
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        local_scaffold(plain, 0)
    with pytest.raises(ValueError, match=r"figure named 'loss', got \['acc'\]"):
        mean_gradient(lambda *args: {"acc": noisy(*args)["loss"]}, params(), Shared(None), BATCH, ALL, KEY)
