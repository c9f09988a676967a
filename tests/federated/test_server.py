"""Server optimizers, and steps of which a mask keeps entries out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.federated import fed_adam, fed_avgm, server_step
from odjax.federated.server import fed_avg

from .world import assert_close, assert_same, params

DELTAS = [
    {"w": jnp.array([0.5, -1.0, 2.0]) * scale, "b": jnp.float32(scale)} for scale in (1.0, -0.5, 0.25, 3.0)
]
MASK = {"w": jnp.array([1, 0, 1]), "b": jnp.array(0)}


def run(server, deltas=DELTAS, mask=None):
    own, state = params(), server.init(params())
    for delta in deltas:
        own, state = server_step(server, own, state, delta, mask)
    return own, state


@given(
    rate=st.floats(0.01, 2),
    b1=st.sampled_from([0.0, 0.9]),
    b2=st.sampled_from([0.0, 0.99]),
    tau=st.sampled_from([1e-3, 0.1]),
)
def test_fed_adam_is_the_loop_of_its_paper(rate, b1, b2, tau):
    theta, m, v = np.array([0.5, -1.0, 0.25]), np.zeros(3), np.full(3, tau**2)
    for delta in DELTAS:
        d = np.asarray(delta["w"], np.float64)
        m = b1 * m + (1 - b1) * d
        v = b2 * v + (1 - b2) * d**2
        theta = theta + rate * m / (np.sqrt(v) + tau)
    own, state = run(fed_adam(rate, b1=b1, b2=b2, tau=tau))
    assert_close(own["w"], theta.astype(np.float32), rtol=1e-4)
    assert_close(state.nu["w"], v.astype(np.float32), rtol=1e-4)


def test_the_first_step_of_fed_adam_is_not_that_of_adam():
    one, _ = run(fed_adam(0.1, tau=1e-3), DELTAS[:1])
    with jax.numpy_dtype_promotion("standard"):
        adam, _ = run(optax.adam(0.1, 0.9, 0.99, eps=1e-3), DELTAS[:1])
    # m = 0.1 D and sqrt(v) about 0.1 |D|, where Adam corrects both to D and |D|
    assert_close(
        one["w"] - params()["w"],
        0.1 * 0.1 * DELTAS[0]["w"] / (np.sqrt(0.99e-6 + 0.01 * DELTAS[0]["w"] ** 2) + 1e-3),
    )
    assert np.abs(one["w"] - adam["w"]).max() > 1e-5


@given(rate=st.floats(0.1, 2), momentum=st.floats(0, 0.9))
def test_fed_avgm_is_momentum_on_the_deltas(rate, momentum):
    theta, m = np.array([0.5, -1.0, 0.25]), np.zeros(3)
    for delta in DELTAS:
        m = momentum * m + np.asarray(delta["w"])
        theta = theta + rate * m
    assert_close(run(fed_avgm(rate, momentum))[0]["w"], theta.astype(np.float32), rtol=1e-4, atol=1e-5)


def test_fed_avg_takes_over_the_mean():
    own, _ = run(fed_avg(), DELTAS[:1])
    assert_close(own, jax.tree.map(jnp.add, params(), DELTAS[0]))


SERVERS = {
    "fed_avg": fed_avg(),
    "fed_avgm": fed_avgm(),
    "fed_adam": fed_adam(0.1),
    "decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5, momentum=0.9)),
    "masked": optax.masked(fed_avgm(), {"w": True, "b": False}),
}


@pytest.mark.parametrize("name", SERVERS)
def test_entries_outside_the_mask_stay_bit_for_bit_with_all_their_moments(name):
    server = SERVERS[name]
    before = run(server)
    own, state = before
    for _ in range(2):
        own, state = jax.jit(lambda p, s: server_step(server, p, s, DELTAS[0], MASK))(own, state)

    def outside(tree):
        return [
            np.asarray(leaf)[1] if np.shape(leaf) == (3,) else np.asarray(leaf)
            for leaf in jax.tree.leaves(tree)
            if np.shape(leaf) in ((3,), ())
        ]

    assert_same(outside(own), outside(before[0]))
    assert_same(outside(state), outside(before[1]))
    assert (np.asarray(own["w"])[[0, 2]] != np.asarray(before[0]["w"])[[0, 2]]).all()


@pytest.mark.parametrize("name", SERVERS)
def test_a_mask_of_ones_is_no_mask(name):
    ones = {"w": jnp.ones(3, jnp.int32), "b": jnp.array(1)}
    assert_same(run(SERVERS[name], mask=ones), run(SERVERS[name]))


def test_moments_are_float32_for_bfloat16_and_float64_for_float64():
    server = fed_adam(0.1)
    state = server.init(params(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    own, state = server_step(server, params(jnp.bfloat16), state, DELTAS[0])
    assert own["w"].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = params(jnp.float64)
        own, state = server_step(
            server, wide, server.init(wide), jax.tree.map(lambda x: x.astype(jnp.float64), DELTAS[0])
        )
        assert {str(leaf.dtype) for leaf in jax.tree.leaves((own, state))} == {"float64"}


@pytest.mark.parametrize(
    "options, match",
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
    ],
)
def test_bad_numbers_name_the_argument(options, match):
    with pytest.raises(ValueError, match=match):
        fed_adam(0.1, **options)


def test_an_update_that_does_not_fit_says_so():
    server = fed_avg()
    with pytest.raises(ValueError, match="the local step must return a delta like the parameters"):
        server_step(server, params(), server.init(params()), {"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"the update of 'w' has shape \(4, 3\), the parameter \(3,\)"):
        server_step(server, params(), server.init(params()), {"w": jnp.zeros((4, 3)), "b": jnp.zeros(())})
