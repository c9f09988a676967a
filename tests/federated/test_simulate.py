"""A cohort's training: no packing, no padding and no other client changes what a client gives."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.federated import (
    Shared,
    fed_avg,
    group_by_client,
    init,
    local_sgd,
    make_round,
    mixed,
    norm_bounded_mean,
    plan_round,
    private_sum,
    secure_sum,
    simulate_cohort,
    stacked,
    trimmed_mean,
    weighted_mean,
)
from odjax.privacy import Clip

from .world import (
    KEY,
    SIZES,
    algorithm,
    assert_close,
    assert_same,
    clients,
    noisy,
    params,
    plain,
    plan,
    round_of,
    start,
    trained,
)

COHORT = (4, 0, 3, 6, 2)
STACK = stacked(lambda stack: stack.deltas)


class Plan:
    """Stands for a privacy plan without noise."""

    unit = "user"

    def __init__(self, norm):
        self.clip = Clip(norm)

    def privatize(self, total, key, mask=None):
        return jax.tree.map(lambda x: x / 4, total)


AGGREGATORS = {
    "weighted_mean": weighted_mean(),
    "clip": norm_bounded_mean(0.05),
    "trimmed_mean": trimmed_mean(0.25),
    "secure_sum": secure_sum(4.0),
    "private_sum": private_sum(Plan(0.05)),
}


@functools.cache
def cohort_of(aggregator, rows="compiled", local=None):
    return simulate_cohort(local or local_sgd(noisy, optax.sgd(0.1, 0.9)), aggregator, rows=rows)


def stack_of(plan, data=None, rows="compiled"):
    """(deltas, weights) of the clients of a plan, by place in the cohort."""
    run = cohort_of(STACK, rows)
    total = run(Shared(params()), None, clients().examples if data is None else data, plan, KEY).total
    return total.deltas, total.weights


@pytest.mark.parametrize(
    "lanes, strategy, rows",
    [
        (2, "lanes", "compiled"),
        (3, "lanes", "compiled"),
        (8, "lanes", "compiled"),
        (2, "chunks", "compiled"),
        (7, "chunks", "compiled"),
        (1, "loop", "called"),
        (2, "lanes", "called"),
    ],
)
def test_no_packing_changes_what_a_client_gives(lanes, strategy, rows):
    """The loss draws from its key, so the keys of a client are the same everywhere, too."""
    expected, weights = stack_of(plan(COHORT))
    got = stack_of(plan(COHORT, lanes=lanes, strategy=strategy), rows=rows)
    assert_close(got, (expected, weights))
    assert weights.tolist() == [SIZES[i] for i in COHORT]
    assert len(np.unique(np.round(expected["b"], 6))) == len(COHORT)  # the client without data gives 0


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("lanes, strategy, rows", [(3, "lanes", "compiled"), (2, "chunks", "called")])
def test_every_aggregate_is_the_same_for_every_packing(name, lanes, strategy, rows):
    own = algorithm(aggregator=AGGREGATORS[name])
    options = {"uniform": own.aggregator.uniform}
    expected = trained(own, plan(COHORT, **options))
    got = trained(own, plan(COHORT, lanes=lanes, strategy=strategy, **options), rows=rows)
    assert_close(got, expected)
    assert (set(expected[1]) == set()) == own.aggregator.private


@given(order=st.permutations(COHORT), lanes=st.sampled_from([1, 3]))
def test_the_order_of_a_cohort_changes_nothing(order, lanes):
    (state, figures), (other, others) = (
        trained(algorithm(), plan(COHORT)),
        trained(algorithm(), plan(order, lanes=lanes)),
    )
    assert_close((other.params, others), (state.params, figures))


@given(padding=st.sampled_from([0, 2, 10**6]), lanes=st.sampled_from([1, 3]))
def test_masked_clients_change_nothing(padding, lanes):
    ids, mask = [*COHORT, padding, padding], [True] * len(COHORT) + [False] * 2
    expected, got = (
        trained(algorithm(), plan(COHORT)),
        trained(algorithm(), plan(ids, mask=mask, lanes=lanes)),
    )
    assert_close(got, expected)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_client_of_weight_zero_has_no_influence_even_without_numbers(name, lanes):
    own = algorithm(aggregator=AGGREGATORS[name])
    options = {"lanes": lanes, "uniform": own.aggregator.uniform}
    whole = plan(COHORT, **options)
    # Weight 0 for client 4, whose examples are no numbers.
    weighted = whole._replace(weight=np.where(whole.client == 4, 0, whole.weight).astype(np.float32))
    data = {name: np.array(x) for name, x in clients().examples.items()}
    data["y"][clients().offsets[4] : clients().offsets[5]] = np.nan
    state, _ = round_of(own)(start(own), data, weighted, KEY)
    without, _ = trained(own, plan(COHORT, mask=[i != 4 for i in COHORT], **options))
    assert_close(state.params, without.params)


@pytest.mark.parametrize("lanes", [1, 3])
def test_one_client_without_numbers_gives_nothing_to_a_private_sum(lanes):
    own = algorithm(aggregator=AGGREGATORS["private_sum"])
    data = {name: np.array(x) for name, x in clients().examples.items()}
    data["y"][clients().offsets[4] : clients().offsets[5]] = np.nan
    state, figures = round_of(own)(start(own), data, plan(COHORT, lanes=lanes, uniform=True), KEY)
    without, _ = trained(own, plan(COHORT, mask=[i != 4 for i in COHORT], uniform=True))
    assert_close(state.params, without.params)
    assert figures == {}
    # and to a mean it gives itself, where everybody sees it
    spoilt, _ = round_of(algorithm())(start(algorithm()), data, plan(COHORT, lanes=lanes), KEY)
    assert np.isnan(spoilt.params["w"]).all()


@given(client=st.sampled_from(COHORT), lanes=st.sampled_from([1, 3]))
def test_removing_a_client_moves_a_private_sum_by_its_clip_at_most(client, lanes):
    run = cohort_of(AGGREGATORS["private_sum"])

    def total(mask):
        one = plan(COHORT, lanes=lanes, uniform=True, mask=mask)
        return run(Shared(params()), None, clients().examples, one, KEY).total.total

    moved = optax.tree.norm(jax.tree.map(jnp.subtract, total(None), total([i != client for i in COHORT])))
    assert moved <= 0.05 * (1 + 1e-4)
    assert bool(moved > 0.025) == (SIZES[client] > 0)


def test_a_compiled_program_counts_every_weight_of_a_private_sum_as_one():
    """Weights cannot be looked at inside `jax.jit`; numbers of examples must not get into the sum."""
    own = algorithm(aggregator=AGGREGATORS["private_sum"])
    by_examples, _ = trained(own, plan(COHORT))
    uniform, _ = trained(own, plan(COHORT, uniform=True))
    assert_same(by_examples.params, uniform.params)


def test_one_full_batch_step_is_a_gradient_step_on_the_pooled_loss():
    own = fed_avg(plain, optax.sgd(0.1))
    one = plan(batch=7, epochs=1)
    state, figures = trained(own, one)

    def pooled(params):
        total = plain(
            params, None, jax.tree.map(jnp.asarray, clients().examples), jnp.ones(sum(SIZES), bool), KEY
        )
        return total["loss"][0] / sum(SIZES)

    loss, gradient = jax.value_and_grad(pooled)(params())
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params(), gradient))
    assert_close(figures["loss"][0] / figures["loss"][1], loss)


def test_figures_are_sums_over_all_steps_that_took_place():
    _, figures = trained(algorithm(), plan(COHORT, lanes=3))
    assert figures["loss"][1] == 2 * sum(SIZES[i] for i in COHORT)  # two epochs


def test_a_cohort_in_which_nobody_takes_a_step_changes_nothing():
    for lanes in (1, 3):
        nobody = plan([3, 0], mask=[True, False], lanes=lanes)
        state, figures = trained(algorithm(), nobody)
        assert_same(state.params, params())
        assert figures["loss"] == (0, 0)
        assert state.round == 1


def test_keys_change_with_the_round_and_the_run():
    at_zero, at_one = stack_of(plan(COHORT))[0], stack_of(plan(COHORT)._replace(round=np.int32(1)))[0]
    assert (np.asarray(at_zero["w"])[0] != np.asarray(at_one["w"])[0]).all()


def test_a_new_cohort_compiles_nothing_new_within_a_bucket():
    traces = []

    def counted(*args):
        traces.append(1)
        return noisy(*args)

    own = fed_avg(counted, optax.sgd(0.1))
    run = jax.jit(make_round(own))
    state = init(own, params(), len(SIZES))
    data = jax.device_put(clients().examples)
    lengths = set()
    for round, ids in enumerate([(0, 1, 2), (4, 6, 5), (2, 5, 1)]):
        one = plan(ids, round=round)
        lengths.add(int(one.lanes.length[0]))
        state, _ = run(state, data, one, KEY)
        if round == 0:
            once = len(traces)
    assert len(lengths) == 3
    assert len(traces) == once > 0


def test_a_round_outside_jit_compiles_once():
    traces = []

    def counted(*args):
        traces.append(1)
        return noisy(*args)

    own = fed_avg(counted, optax.sgd(0.1))
    for rows in ("compiled", "called"):
        run, state, counts = make_round(own, rows=rows), init(own, params(), len(SIZES)), []
        for round in range(3):
            state, _ = run(state, clients().examples, plan((0, 1, 2), round=round), KEY)
            counts.append(len(traces))
        assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("lanes", [1, 2])
def test_no_parameters_are_copied_from_step_to_step(lanes):
    """Beyond the start of a client, which is a branch; lanes select there, and nowhere else."""
    big = {"w": jnp.zeros((64, 3)), "b": jnp.zeros(())}

    def loss(params, shared, batch, mask, key):
        hidden = jnp.tanh(batch["x"] @ params["w"].T).sum(1) + params["b"]
        return {"loss": (jnp.sum(jnp.where(mask, hidden**2, 0.0)), jnp.sum(mask.astype(jnp.float32)))}

    own = fed_avg(loss, optax.sgd(0.1))
    state, one = init(own, big, len(SIZES)), plan(COHORT, lanes=lanes)
    text = jax.jit(make_round(own)).lower(state, clients().examples, one, KEY).compile().as_text()
    (body,) = (part for part in text.split("\n\n") if part.count(" conditional(") == 2)  # a row of the loop
    shape = r"f32\[(\d,)?64,3\]\S*"
    assert re.search(rf"= {shape} \w+\(", body)  # the step itself
    assert not re.search(rf"= {shape} (copy|select)\(", body)
    fused = re.findall(r"calls=(%\S+?)[,\s]", body)
    assert not [
        part
        for part in text.split("\n\n")
        if part.split(" ")[0] in fused and re.search(rf"{shape} select\(", part)
    ]


def test_bfloat16_parameters_are_summed_in_float32():
    own = algorithm(plain)
    state = init(own, params(jnp.bfloat16), len(SIZES))
    data = {name: x.astype(jnp.bfloat16) for name, x in clients().examples.items()}
    run = simulate_cohort(own.local, own.aggregator)
    total = run(Shared(state.params), None, data, plan(COHORT, lanes=3), KEY).total
    assert {leaf.dtype for leaf in jax.tree.leaves(total)} == {jnp.dtype(jnp.float32)}
    after, _ = round_of(own)(state, data, plan(COHORT, lanes=3), KEY)
    assert after.params["w"].dtype == jnp.bfloat16
    exact, _ = trained(own, plan(COHORT))
    assert_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), after.params), exact.params, rtol=0.1, atol=0.05
    )


def test_float64_clients_agree_to_float64():
    with jax.enable_x64(True):
        own = fed_avg(plain, optax.sgd(0.1))
        data = clients("float64").examples
        states = [
            jax.jit(make_round(own))(init(own, params(jnp.float64), 7), data, plan(COHORT, lanes=lanes), KEY)[
                0
            ]
            for lanes in (1, 3)
        ]
        assert states[0].params["w"].dtype == jnp.float64
        assert_close(states[0].params, states[1].params, rtol=1e-14, atol=1e-15)


def test_personal_updates_come_from_a_mixing_matrix():
    matrix = np.kron(np.eye(2), np.full((2, 2), 0.5)).astype(np.float32)
    ids = [0, 2, 4, 6]
    aggregator = mixed(matrix)
    local = local_sgd(noisy, optax.sgd(0.1, 0.9))
    run = simulate_cohort(local, aggregator)
    total = run(Shared(params()), None, clients().examples, plan(ids, lanes=2), KEY).total
    deltas, _ = stack_of(plan(ids))
    own = aggregator.finish(total, KEY, None)
    assert_close(own["w"][0], (deltas["w"][0] + deltas["w"][1]) / 2)
    assert_same(own["w"][2], own["w"][3])


@pytest.mark.parametrize(
    "change, match",
    [
        ({"weight": -1.0}, "weights of clients must not be negative, the smallest is -1.0"),
        ({"weight": 0.5}, "needs weights of 0 or 1: plan the round with uniform=True"),
        (
            {"private": True},
            r"private state has leading axes \(2, 2\), the plan has \[lanes, slots\] \(1, 4\)",
        ),
        ({"index": 99}, r"takes example 99, data\['x'\] has 22 for a device: it is a plan of other clients"),
    ],
)
def test_bad_rounds_say_what_is_wrong(change, match):
    run = cohort_of(AGGREGATORS["secure_sum"])
    one, private = plan(COHORT, uniform=True), None
    if "weight" in change:
        one = one._replace(weight=np.full_like(one.weight, change["weight"]))
    if "index" in change:
        one = one._replace(index=np.full_like(one.index, 99))
    if "private" in change:
        private = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match=match):
        run(Shared(params()), private, clients().examples, one, KEY)


def test_bad_parts_say_what_is_wrong():
    with pytest.raises(ValueError, match="rows must be 'compiled' or 'called', got 'loop'"):
        simulate_cohort(algorithm().local, weighted_mean(), rows="loop")
    local = algorithm().local
    run = simulate_cohort(local, weighted_mean())
    with pytest.raises(TypeError, match="key must be a typed key"):
        run(Shared(params()), None, clients().examples, plan(COHORT), jnp.zeros(2, jnp.uint32))
    whole = local._replace(final=lambda state, shared: ({"n": state.count}, state.private))
    with pytest.raises(ValueError, match="must be of floating numbers, one of its leaves is int32"):
        simulate_cohort(whole, weighted_mean())(Shared(params()), None, clients().examples, plan(COHORT), KEY)
    named = replace(weighted_mean(), lift=lambda delta, mask: (delta, {"loss": (jnp.ones(()), jnp.ones(()))}))
    with pytest.raises(ValueError, match=r"have the same names: \['loss'\]"):
        simulate_cohort(local, named)(Shared(params()), None, clients().examples, plan(COHORT), KEY)
    partial = local._replace(final=lambda state, shared: ({"w": state.params["w"]}, state.private))
    own = replace(algorithm(), local=partial)
    with pytest.raises(ValueError, match="the local step must return a delta like the parameters"):
        make_round(own)(init(own, params(), 7), clients().examples, plan(COHORT), KEY)
    own = replace(algorithm(), aggregator=mixed(np.eye(len(COHORT))))
    with pytest.raises(ValueError, match="is for simulate_cohort, not for one server"):
        make_round(own)(init(own, params(), 7), clients().examples, plan(COHORT), KEY)


def test_a_population_of_equal_clients_trains_like_one_of_them():
    store = group_by_client(
        {k: np.tile(v[:4], (3, *[1] * (v.ndim - 1))) for k, v in clients().examples.items()},
        np.repeat(np.arange(3), 4),
    )
    own = fed_avg(plain, optax.sgd(0.1))
    run = jax.jit(make_round(own))
    options = {"batch": 4, "seed": 0, "epochs": 3}
    together, _ = run(init(own, params(), 3), store.examples, plan_round(store, [0, 1, 2], 0, **options), KEY)
    alone, _ = run(init(own, params(), 3), store.examples, plan_round(store, [0], 0, **options), KEY)
    assert_close(together.params, alone.params)
