"""What every federated algorithm keeps: packing, devices and absent clients change nothing."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.federated import init, make_round, plan_round

from .contract_rows import KEY, rows

ROWS = pytest.mark.parametrize("row", rows("algorithm"), ids=lambda row: row.id)


@functools.cache
def built(row):
    return row.build()


def start(row, **options):
    algorithm, params, _, clients = built(row)
    return init(algorithm, params, clients.count, **options)


def plan_of(row, ids=(3, 0, 2), round=0, **options):
    algorithm, _, _, clients = built(row)
    options = {"batch": 2, "seed": 0, "uniform": algorithm.aggregator.uniform, **options}
    return plan_round(clients, ids, round, **options)


@functools.cache
def round_of(row, devices=1):
    mesh = None
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(make_round(built(row)[0], mesh=mesh))


@functools.cache
def after(row):
    """The state after two rounds on one lane, and the last figures."""
    _, _, frozen, clients = built(row)
    state = start(row)
    for round in range(2):
        state, figures = round_of(row)(state, clients.examples, plan_of(row, round=round), KEY, frozen)
    return state, figures


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def shapes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@ROWS
@pytest.mark.parametrize("lanes, devices", [(2, 1), (8, 8)])
def test_lanes_and_devices_change_nothing(row, lanes, devices):
    _, _, frozen, clients = built(row)
    state = start(row)
    for round in range(2):
        one = plan_of(row, round=round, lanes=lanes)
        state, figures = round_of(row, devices)(state, clients.examples, one, KEY, frozen)
    assert_close((state, figures), after(row))


@ROWS
def test_rounds_train_and_keep_structure_shapes_and_dtypes(row):
    state, _ = after(row)
    assert shapes(state) == shapes(start(row))
    assert int(state.round) == 2
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, start(row).params)
    assert any(jax.tree.leaves(moved))


@ROWS
def test_the_state_can_be_made_of_shapes_alone(row):
    algorithm, params, _, clients = built(row)
    state = jax.eval_shape(lambda p: init(algorithm, p, clients.count), params)
    assert shapes(state) == shapes(start(row))


@ROWS
def test_the_state_survives_serialisation(row):
    state, _ = after(row)
    back = flax.serialization.from_bytes(start(row), flax.serialization.to_bytes(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


@ROWS
def test_masked_clients_change_nothing(row):
    _, _, frozen, clients = built(row)
    run = round_of(row)
    short = plan_of(row, ids=(3, 0, 2), mask=[True, False, True])
    other = plan_of(row, ids=(3, 99, 2), mask=[True, False, True])
    a, b = (run(start(row), clients.examples, one, KEY, frozen) for one in (short, other))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    for leaf in jax.tree.leaves(a[0].population):
        np.testing.assert_array_equal(leaf[:3], np.zeros_like(leaf[:3]))


@ROWS
def test_a_private_algorithm_shows_nothing_of_a_client(row):
    algorithm = built(row)[0]
    _, figures = after(row)
    assert (figures == {}) == algorithm.aggregator.private
    if algorithm.aggregator.private:
        assert algorithm.aggregator.sensitivity("add_or_remove_one") == 0.1
        assert algorithm.private is None
