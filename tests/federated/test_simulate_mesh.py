"""A cohort on a mesh: the numbers of one device, and one exchange between them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from odjax.federated import (
    Shared,
    fed_adam,
    fed_avg,
    init,
    local_sgd,
    localize,
    make_round,
    norm_bounded_mean,
    private_sum,
    scaffold,
    secure_sum,
    simulate_cohort,
    stacked,
    weighted_mean,
)
from odjax.privacy import Clip, gaussian_noise

from .world import (
    KEY,
    SIZES,
    algorithm,
    assert_close,
    clients,
    mesh,
    noisy,
    params,
    plain,
    plan,
    start,
    trained,
)

COHORT = (4, 0, 3, 6, 2)
EXCHANGES = r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("


class Noisy:
    """Stands for a privacy plan whose noise is of the size of the clip."""

    clip = Clip(0.05)
    unit = "user"

    def privatize(self, total, key, mask=None):
        return jax.tree.map(lambda x: x / 4, gaussian_noise(self.clip, 1.0, key, total, mask=mask))


AGGREGATORS = {
    "weighted_mean": weighted_mean(),
    "clip": norm_bounded_mean(0.05),
    "private_sum": private_sum(Noisy()),
    "secure_sum": secure_sum(4.0),
}


def exchanges(run, *arguments):
    text = jax.jit(run).lower(*arguments).compile().as_text()
    return re.findall(EXCHANGES, text)


@pytest.mark.parametrize(
    "lanes, strategy, rows", [(8, "lanes", "compiled"), (16, "chunks", "compiled"), (8, "loop", "called")]
)
def test_eight_devices_give_the_result_of_one(lanes, strategy, rows):
    """With the same keys of every client: the loss draws from them."""
    got = trained(algorithm(), plan(COHORT, lanes=lanes, strategy=strategy), mesh(), rows)
    assert_close(got, trained(algorithm(), plan(COHORT)))


@pytest.mark.parametrize("name", ["clip", "private_sum", "secure_sum"])
def test_every_aggregate_is_that_of_one_device(name):
    """Also the noise: it is added once, after the sum, and does not depend on the number of devices."""
    own = algorithm(aggregator=AGGREGATORS[name])
    options = {"uniform": own.aggregator.uniform}
    assert_close(
        trained(own, plan(COHORT, lanes=8, **options), mesh()), trained(own, plan(COHORT, **options))
    )


def test_scaffold_on_a_mesh_keeps_the_control_variates_of_one_device():
    own = scaffold(noisy, 0.1)
    run = jax.jit(make_round(own, mesh=mesh()))
    got, _ = run(start(own), clients().examples, plan(COHORT, lanes=8, uniform=True), KEY)
    expected, _ = trained(own, plan(COHORT, uniform=True))
    assert_close(got, expected)


@pytest.mark.parametrize("epochs", [1, 9])
def test_a_round_has_one_all_reduce_whatever_the_number_of_steps(epochs):
    own = algorithm()
    run = make_round(own, mesh=mesh())
    found = exchanges(run, start(own), clients().examples, plan(COHORT, lanes=16, epochs=epochs), KEY)
    assert found == ["all-reduce"]


@pytest.mark.parametrize("name", ["clip", "private_sum"])
def test_clipping_noise_and_fed_adam_add_no_exchange(name):
    own = fed_avg(noisy, optax.sgd(0.1), fed_adam(0.1), aggregator=AGGREGATORS[name])
    run = make_round(own, mesh=mesh())
    one = plan(COHORT, lanes=16, uniform=own.aggregator.uniform)
    assert exchanges(run, start(own), clients().examples, one, KEY) == ["all-reduce"]


def test_a_secure_sum_exchanges_integers_and_its_few_sums_apart():
    own = algorithm(aggregator=AGGREGATORS["secure_sum"])
    run = make_round(own, mesh=mesh())
    one = plan(COHORT, lanes=8, uniform=True)
    assert exchanges(run, start(own), clients().examples, one, KEY) == ["all-reduce"] * 2


def test_local_data_give_the_result_of_resident_data():
    one = plan(COHORT, lanes=16)
    data, local = localize(clients(), one, 8, bucket=4)
    assert len(data["x"]) // 8 < sum(SIZES)
    data = jax.device_put(data, NamedSharding(mesh(), PartitionSpec("clients")))
    run = jax.jit(make_round(algorithm(), mesh=mesh(), local_data=True))
    got = run(start(algorithm()), data, local, KEY)
    assert_close(got, trained(algorithm(), one))
    assert exchanges(run, start(algorithm()), data, local, KEY) == ["all-reduce"]


@functools.cache
def wide(size=8):
    random = np.random.default_rng(1)
    return {
        "in": jnp.asarray(random.normal(size=(3, size)), jnp.float32),
        "out": jnp.asarray(random.normal(size=(size,)), jnp.float32),
    }


def hidden(params, shared, batch, mask, key):
    values = jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]
    values += jax.random.normal(key, (), jnp.float32) * params["out"].sum()
    return {"loss": (jnp.sum(jnp.where(mask, values**2, 0.0)), jnp.sum(mask.astype(jnp.float32)))}


@pytest.mark.parametrize("rows", ["compiled", "called"])
def test_a_model_may_be_sharded_over_the_other_axis_of_the_mesh(rows):
    both = mesh((4, 2), ("clients", "tensor"))
    own = fed_avg(hidden, optax.sgd(0.05, 0.9))
    expected, _ = jax.jit(make_round(own))(init(own, wide(), 7), clients().examples, plan(COHORT), KEY)
    layout = {
        "in": NamedSharding(both, PartitionSpec(None, "tensor")),
        "out": NamedSharding(both, PartitionSpec("tensor")),
    }
    state = init(own, jax.device_put(wide(), layout), 7)
    run = make_round(own, mesh=both, rows=rows)
    run = jax.jit(run) if rows == "compiled" else run
    got, _ = run(state, clients().examples, plan(COHORT, lanes=4), KEY)
    assert_close(got.params, expected.params, rtol=1e-4)
    if rows == "compiled":
        assert got.params["in"].sharding.is_equivalent_to(layout["in"], 2)


def test_lanes_may_lie_over_two_axes():
    both = mesh((4, 2), ("data", "clients"))
    run = jax.jit(make_round(algorithm(), mesh=both, axis=("data", "clients")))
    got = run(start(algorithm()), clients().examples, plan(COHORT, lanes=8), KEY)
    assert_close(got, trained(algorithm(), plan(COHORT)))


def test_stacks_of_all_deltas_are_the_same_on_a_mesh():
    local, stack = local_sgd(plain, optax.sgd(0.1)), stacked(lambda stack: stack.deltas)
    data = clients().examples
    one = simulate_cohort(local, stack)(Shared(params()), None, data, plan(COHORT), KEY).total
    all_ = simulate_cohort(local, stack, mesh=mesh())(
        Shared(params()), None, data, plan(COHORT, lanes=8), KEY
    ).total
    assert_close(all_, one)


def test_bad_meshes_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"the mesh has no axis \['workers'\], it has clients"):
        make_round(algorithm(), mesh=mesh(), axis="workers")
    run = make_round(algorithm(), mesh=mesh())
    with pytest.raises(ValueError, match="3 lanes do not divide by the 8 devices"):
        run(start(algorithm()), clients().examples, plan(COHORT, lanes=3), KEY)
