"""Algorithms: fixed points in closed form, and what the round makes of its parts."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.federated import (
    fed_adam,
    fed_avg,
    group_by_client,
    init,
    make_round,
    plan_round,
    private_sum,
    scaffold,
    weighted_mean,
)
from odjax.privacy import Clip, privacy_plan

from .world import (
    KEY,
    algorithm,
    assert_close,
    assert_same,
    clients,
    mesh,
    noisy,
    params,
    plain,
    plan,
    start,
    trained,
)

H, B, SIZES = np.array([0.5, 1.0, 2.0]), np.array([1.0, -1.0, 3.0]), np.array([1, 2, 3])
BOWLS = group_by_client(
    {"h": np.repeat(H, SIZES).astype(np.float32), "b": np.repeat(B, SIZES).astype(np.float32)},
    np.repeat(np.arange(3), SIZES),
)
RATE, STEPS = 0.2, 5


def bowl(params, shared, batch, mask, key):
    """h (theta - b)^2 / 2."""
    loss = jnp.sum(jnp.where(mask, batch["h"] * (params["w"] - batch["b"]) ** 2 / 2, 0.0))
    return {"loss": (loss, jnp.sum(mask.astype(jnp.float32)))}


def after(algorithm, rounds, **options):
    """The state after some rounds of K full-batch steps on each client's quadratic."""
    one = jax.device_put(plan_round(BOWLS, [0, 1, 2], 0, batch=3, seed=0, epochs=STEPS, **options))
    run = make_round(algorithm)
    state = init(algorithm, {"w": jnp.float32(5.0)}, 3)
    return jax.jit(
        lambda s: jax.lax.fori_loop(0, rounds, lambda _, s: run(s, BOWLS.examples, one, KEY)[0], s)
    )(state)


@pytest.mark.parametrize("uniform", [False, True])
def test_fed_avg_ends_at_its_own_fixed_point_and_not_at_the_minimum(uniform):
    w = np.ones(3) if uniform else SIZES
    q = 1 - (1 - RATE * H) ** STEPS
    expected, minimum = (w * q * B).sum() / (w * q).sum(), (w * H * B).sum() / (w * H).sum()
    got = after(fed_avg(bowl, optax.sgd(RATE)), 60, uniform=uniform, lanes=2).params["w"]
    assert_close(got, np.float32(expected))
    assert abs(expected - minimum) > 0.05


def test_scaffold_ends_at_the_minimum():
    state = after(scaffold(bowl, RATE), 80, uniform=True)
    assert_close(state.params["w"], np.float32((H * B).sum() / H.sum()))
    # where each client's control variate is its gradient, and the server's their mean: zero
    assert_close(state.population["w"], (H * (float(state.params["w"]) - B)).astype(np.float32), atol=1e-5)
    assert abs(state.control["w"]) < 1e-5


def test_one_local_step_of_scaffold_from_the_start_is_fed_avg():
    own = plan(epochs=1, batch=7, uniform=True)
    got, _ = trained(scaffold(plain, 0.1), own)
    expected, _ = trained(fed_avg(plain, optax.sgd(0.1)), own)
    assert_close(got.params, expected.params)


@given(ids=st.sampled_from([(0, 1), (4, 6), (2, 5)]))
def test_the_servers_control_variate_stays_the_mean_of_the_clients(ids):
    # c <- c + (1 / N) sum (c_i' - c_i) over the cohort.
    own = _SCAFFOLD
    state = start(own)
    for round in range(2):
        one = plan(ids, round=round, lanes=2, uniform=True)
        state, _ = _SCAFFOLD_ROUND(state, clients().examples, one, KEY)
    assert_close(state.control, jax.tree.map(lambda x: x.mean(0), state.population), atol=1e-5)


_SCAFFOLD = scaffold(noisy, 0.1)
_SCAFFOLD_ROUND = jax.jit(make_round(_SCAFFOLD))


def test_control_variates_of_bfloat16_models_are_float32():
    state = init(_SCAFFOLD, params(jnp.bfloat16), 7)
    data = {name: x.astype(jnp.bfloat16) for name, x in clients().examples.items()}
    state, _ = _SCAFFOLD_ROUND(state, data, plan((0, 4), lanes=2, uniform=True), KEY)
    assert {str(x.dtype) for x in jax.tree.leaves((state.control, state.population))} == {"float32"}
    assert state.params["w"].dtype == jnp.bfloat16


def test_scaffold_takes_no_weights_by_examples():
    """They would make its control variates drift: c is a mean over clients."""
    with pytest.raises(ValueError, match="plan the round with uniform=True"):
        make_round(_SCAFFOLD)(start(_SCAFFOLD), clients().examples, plan((0, 4)), KEY)
    by_examples, _ = _SCAFFOLD_ROUND(start(_SCAFFOLD), clients().examples, plan((0, 4), lanes=2), KEY)
    uniform, _ = _SCAFFOLD_ROUND(
        start(_SCAFFOLD), clients().examples, plan((0, 4), lanes=2, uniform=True), KEY
    )
    assert_same(by_examples, uniform)


def test_fed_prox_stays_nearer_to_the_server():
    near, _ = trained(algorithm(plain, proximal=5.0), plan(epochs=9))
    far, _ = trained(algorithm(plain), plan(epochs=9))
    distance = [float(optax.tree.norm(jax.tree.map(jnp.subtract, s.params, params()))) for s in (near, far)]
    assert distance[0] < 0.7 * distance[1]


def test_servers_are_optax_transforms_of_minus_the_update():
    plainly, _ = trained(algorithm(), plan())
    update = jax.tree.map(jnp.subtract, plainly.params, params())
    other, _ = trained(fed_avg(noisy, optax.sgd(0.1), fed_adam(0.5)), plan())
    steps, _ = fed_adam(0.5).update(jax.tree.map(jnp.negative, update), fed_adam(0.5).init(params()))
    assert_close(other.params, jax.tree.map(jnp.add, params(), steps), rtol=1e-4)
    assert other.round == 1


@pytest.mark.parametrize("rows", ["compiled", "called"])
def test_context_and_mask_are_the_servers_and_the_same_for_every_client(rows):
    """The server draws anew each round what everybody knows; entries without part stay bit for bit."""
    server = optax.sgd(1.0, momentum=0.9)

    def loss(params, shared, batch, mask, key):
        figures = noisy(params, shared, batch, mask, key)
        count = figures["loss"][1]
        return {"loss": figures["loss"], "rank": (shared.context.astype(jnp.float32) * count, count)}

    own = replace(
        fed_avg(loss, optax.sgd(0.1), server),
        context=lambda key, round: jax.random.randint(key, (), 1, 4),
        mask=lambda params, rank: {"w": (jnp.arange(3) < rank).astype(jnp.int32), "b": jnp.array(0)},
    )
    run = make_round(own, rows=rows)
    state, ranks = start(own), []
    for round in range(6):
        new, figures = run(state, clients().examples, plan(lanes=2, round=round), KEY)
        rank = float(figures["rank"][0] / figures["rank"][1])
        ranks.append(rank)
        assert rank in (1.0, 2.0, 3.0)
        moved = np.asarray(new.params["w"]) != np.asarray(state.params["w"])
        assert moved.tolist() == [i < rank for i in range(3)]
        assert_same(new.params["b"], state.params["b"])
        state = new
    assert len(set(ranks)) > 1


class Plan:
    """Stands for a privacy plan without noise."""

    clip = Clip(1.0)
    unit = "user"

    def privatize(self, total, key, mask=None):
        return total


def test_without_noise_and_clip_a_private_round_is_the_sum_over_the_expected_cohort():
    privacy = privacy_plan(population=7, cohort=4, clip=math.inf, rounds=1, delta=1e-2, noise_multiplier=0.0)
    private = fed_avg(noisy, optax.sgd(0.1), aggregator=private_sum(privacy))
    got, _ = trained(private, plan((4, 0, 6), uniform=True))
    mean, _ = trained(algorithm(), plan((4, 0, 6), uniform=True))
    # three clients came, four were expected: the divisor is fixed
    expected = jax.tree.map(lambda m, p: p + (m - p) * 3 / 4, mean.params, params())
    assert_close(got.params, expected)


def test_every_round_has_noise_of_its_own_of_the_size_that_the_plan_says():
    privacy = privacy_plan(population=7, cohort=4, clip=0.2, rounds=3, delta=1e-2, noise_multiplier=2.0)
    aggregator = private_sum(privacy)
    state = init(
        fed_avg(noisy, optax.sgd(0.1), aggregator=aggregator), {"w": jnp.zeros(3), "b": jnp.zeros(())}, 7
    )
    total = aggregator.statistic({"w": jnp.zeros(4000)}, 7).zero()
    noise = aggregator.finish(total, KEY, None)["w"]
    assert abs(float(noise.std()) * 4 / (2.0 * 0.2) - 1) < 0.05
    nobody = plan((0, 1), mask=[False, False], uniform=True)
    run = jax.jit(make_round(fed_avg(noisy, optax.sgd(0.1), aggregator=aggregator)))
    moves = []
    for _ in range(2):
        new, _ = run(state, clients().examples, nobody, KEY)
        moves.append(np.asarray(new.params["w"] - state.params["w"]))
        state = new
    assert (moves[0] != moves[1]).all()  # also where nobody came


def test_what_a_client_keeps_is_refused_beside_a_private_aggregator():
    with pytest.raises(ValueError, match="covers the update alone"):
        replace(scaffold(noisy, 0.1), aggregator=private_sum(Plan()))
    with pytest.raises(ValueError, match="covers the update alone"):
        replace(algorithm(), aggregator=private_sum(Plan()), control=True)
    assert fed_avg(noisy, optax.sgd(0.1), aggregator=private_sum(Plan())).aggregator.private


def test_control_variates_need_deltas_of_both():
    own = replace(algorithm(), control=True, aggregator=replace(weighted_mean(), uniform=True))
    with pytest.raises(ValueError, match="needs deltas that are `Controlled`"):
        make_round(own)(start(own), clients().examples, plan(uniform=True), KEY)


def test_a_frozen_part_reaches_the_loss_and_has_no_delta():
    def loss(params, shared, batch, mask, key):
        return plain({"w": params["w"] + shared.frozen, "b": params["b"]}, shared, batch, mask, key)

    own = fed_avg(loss, optax.sgd(0.1))
    frozen = jnp.array([0.1, 0.2, 0.3])
    moved = {"w": params()["w"] + frozen, "b": params()["b"]}
    got, _ = jax.jit(make_round(own))(start(own), clients().examples, plan(), KEY, frozen)
    plainly = fed_avg(plain, optax.sgd(0.1))
    expected, _ = jax.jit(make_round(plainly))(init(plainly, moved, 7), clients().examples, plan(), KEY)
    assert_close(got.params["w"] + frozen, expected.params["w"])
    on_mesh, _ = jax.jit(make_round(own, mesh=mesh()))(
        start(own), clients().examples, plan(lanes=8), KEY, frozen
    )
    assert_close(on_mesh, got)
