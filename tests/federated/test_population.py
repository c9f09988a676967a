"""What clients keep: only the cohort's rows move."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from odjax.core import combine
from odjax.federated import gather, make_round, population_of, scaffold, scatter, split

from .world import KEY, SIZES, assert_close, assert_same, clients, mesh, noisy, params, plan, start

N = 6
IDS = st.lists(st.integers(-1, N - 1), min_size=4, max_size=4).filter(
    lambda ids: len({i for i in ids if i >= 0}) == sum(i >= 0 for i in ids)
)


def population(host):
    rows = {"c": np.arange(N * 2, dtype=np.float32).reshape(N, 2), "n": np.arange(N, dtype=np.int32)}
    return rows if host else jax.tree.map(jnp.asarray, rows)


@pytest.mark.parametrize("host", [True, False])
@given(ids=IDS)
def test_rows_outside_the_cohort_stay_bit_for_bit(host, ids):
    ids = np.array(ids, np.int32).reshape(2, 2)
    before = jax.tree.map(np.array, population(host))
    rows = jax.tree.map(lambda x: x + 100, gather(population(host), ids))
    after = scatter(population(host), ids, rows)
    for name, leaf in after.items():
        for i in range(N):
            expected = before[name][i] + (100 if i in ids else 0)
            np.testing.assert_array_equal(leaf[i], expected)
    assert isinstance(after["c"], np.ndarray) == host


def test_zeros_on_the_host_take_no_memory_before_they_are_written():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = population_of({"c": jnp.zeros(500, jnp.float32)}, 10**6, host=True)  # 2 GB
    ids = np.arange(0, 10**6, 2000)
    scatter(huge, ids, {"c": np.ones((500, 500), np.float32)})
    assert huge["c"][ids].all()
    assert gather(huge, ids + 1)["c"].sum() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    ones = population_of({"c": jnp.ones(2)}, 3, host=True)
    ones["c"][0] = 5
    assert ones["c"].tolist() == [[5, 5], [1, 1], [1, 1]]


@pytest.mark.parametrize("place", ["device", "host", "sharded"])
@pytest.mark.parametrize("rows", ["compiled", "called"])
def test_a_round_moves_the_cohorts_control_variates_alone(place, rows):
    own = scaffold(noisy, 0.1)
    state = start(own, host=place == "host")
    filled = jax.tree.map(
        lambda x: np.array(x) + np.arange(7, dtype=np.float32).reshape(7, *[1] * (x.ndim - 1)),
        state.population,
    )
    if place == "sharded":
        filled = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), filled)  # eight clients, one a device
        filled = jax.device_put(filled, NamedSharding(mesh(), PartitionSpec("clients")))
    elif place == "device":
        filled = jax.tree.map(jnp.asarray, filled)
    before = jax.tree.map(np.array, filled)
    ids = (4, 0, 3)  # 3 has no examples: it keeps its row
    run = make_round(own, rows=rows, mesh=mesh() if place == "sharded" else None)
    lanes = 8 if place == "sharded" else 2
    after, _ = run(
        state._replace(population=filled), clients().examples, plan(ids, lanes=lanes, uniform=True), KEY
    )
    for name, leaf in after.population.items():
        changed = [i for i in range(7) if (np.asarray(leaf[i]) != before[name][i]).any()]
        assert changed == [0, 4]
        assert isinstance(leaf, np.ndarray) == (place == "host")


def test_a_population_on_the_host_trains_as_one_on_the_device():
    own = scaffold(noisy, 0.1)
    run = make_round(own)
    states = []
    for host in (True, False):
        state = start(own, host=host)
        for round in range(3):
            state, _ = run(state, clients().examples, plan((round, 4, 6), round=round, uniform=True), KEY)
        states.append(state)
    assert_close(states[0], states[1])
    assert int(states[0].round) == 3
    assert len(states[0].population["b"]) == len(SIZES)


def test_split_parameters_go_together_again():
    shared, own = split(params(), "b")
    assert shared["b"] is None
    assert own["w"] is None
    assert_same(combine(shared, own), params())


def test_bad_input_names_the_argument():
    with pytest.raises(ValueError, match="at least 1 client, got 0"):
        population_of(jnp.zeros(2), 0)
    with pytest.raises(ValueError, match="selects all 2 parameters: nothing is shared"):
        split(params(), ".*")
    with pytest.raises(ValueError, match="haed"):
        split(params(), "haed")
