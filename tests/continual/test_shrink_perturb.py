"""Shrink and perturb moves what it says, by as much as it says, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from odjax.continual.shrink_perturb import shrink_perturb
from odjax.core.edits import run_edit
from odjax.core.keys import fold_path, fold_step
from odjax.core.trees import unbox
from odjax.models import MLP

KEY = jax.random.key(0)
PARAMS = {
    "body": {"kernel": jnp.linspace(-3.0, 4.0, 12).reshape(3, 4), "bias": jnp.ones(4)},
    "head": jnp.ones((4, 2)),
}


def run(params=PARAMS, opt_state=(), step=10, **options):
    return run_edit(shrink_perturb(every=10, **options), KEY, step, params, opt_state)


def test_shrink_one_and_scale_zero_change_no_bit():
    weird = {"w": jnp.asarray([jnp.nan, jnp.inf, -0.0, 1e-45, 1 / 3])}
    params, _ = run(weird, shrink=1.0, scale=0.0)
    np.testing.assert_array_equal(
        np.asarray(params["w"]).view(np.uint32), np.asarray(weird["w"]).view(np.uint32)
    )


@given(st.floats(0, 1, width=32))
def test_without_noise_it_is_a_multiplication(shrink):
    params, _ = run(shrink=shrink, scale=0.0)
    expected = np.asarray(PARAMS["body"]["kernel"]) * np.float32(shrink)
    np.testing.assert_array_equal(params["body"]["kernel"], expected)


def test_leaves_that_are_not_selected_are_never_touched():
    params, _ = run(where="body/.*")
    assert params["head"] is PARAMS["head"]
    assert float(jnp.abs(params["body"]["bias"] - PARAMS["body"]["bias"]).max()) > 0


def test_the_noise_is_normal_with_the_given_standard_deviation():
    n = 100_000
    params, _ = run({"w": jnp.zeros(n)}, scale=0.3)
    z = np.asarray(params["w"], np.float64) / 0.3
    # The means of z, z^2, z^3, z^4 have the variances 1, 2, 15, 96 over n; four standard errors are allowed.
    for power, moment, error in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(z**power) - moment) < 4 * (error / n) ** 0.5


def test_the_noise_of_a_leaf_is_that_of_its_path_and_step():
    params, _ = run({"w": jnp.zeros((2, 3))}, scale=1.0, step=20)
    key = fold_path(fold_step(fold_path(KEY, "shrink-perturb"), 20), "w")
    np.testing.assert_array_equal(params["w"], jax.random.normal(key, (2, 3)))
    assert not np.array_equal(params["w"], run({"w": jnp.zeros((2, 3))}, scale=1.0, step=30)[0]["w"])


def test_a_fresh_network_is_scaled_and_added():
    def init(key):
        return jax.tree.map(lambda p: jnp.full_like(p, 2.0), PARAMS)

    params, _ = run(shrink=0.5, scale=0.25, fresh=init)
    np.testing.assert_array_equal(params["head"], np.full((4, 2), 1.0))
    same = run(shrink=1.0, scale=0.0, fresh=init)[0]
    jax.tree.map(np.testing.assert_array_equal, same, PARAMS)


@pytest.mark.parametrize("trained", [unbox, lambda params: params], ids=["plain", "boxed"])
def test_a_fresh_network_may_have_the_boxes_that_init_gives_it(trained):
    model, x = MLP((3, 2)), jnp.ones((1, 4))

    def init(key):
        return model.init(key, x)["params"]

    params = trained(init(jax.random.key(1)))
    moved, _ = run(params, shrink=0.5, scale=0.25, fresh=init)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    noise = unbox(init(fold_path(fold_step(fold_path(KEY, "shrink-perturb"), 10), "fresh")))
    expected = jax.tree.map(lambda p, n: 0.5 * p + 0.25 * n, unbox(params), noise)
    jax.tree.map(np.testing.assert_array_equal, unbox(moved), expected)


def test_the_moments_of_the_selected_parameters_are_reset_and_only_those():
    optimizer = optax.sgd(0.1, momentum=0.9)
    _, state = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    _, after = run(PARAMS, state, where="body/.*")
    assert float(jnp.abs(after[0].trace["body"]["kernel"]).max()) == 0
    np.testing.assert_array_equal(after[0].trace["head"], state[0].trace["head"])
    _, kept = run(PARAMS, state, reset=False)
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_bfloat16_rounds_once():
    w = jnp.asarray([1.0, 1.5, 3.0], jnp.bfloat16)
    params, _ = run({"w": w}, shrink=0.4, scale=0.0)
    np.testing.assert_array_equal(
        params["w"], (w.astype(jnp.float32) * jnp.float32(0.4)).astype(jnp.bfloat16)
    )
    assert params["w"].dtype == jnp.bfloat16


def test_it_is_the_same_on_eight_devices():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    params = {"w": jnp.arange(32.0).reshape(16, 2)}
    edit = jax.jit(lambda p: run_edit(shrink_perturb(every=1), KEY, 1, p, ())[0])
    sharded = edit(jax.device_put(params, sharding))
    assert sharded["w"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(sharded["w"], edit(params)["w"])


def test_an_nnx_state_and_its_dict_get_the_same_noise():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    ours, theirs = run(state)[0], run(nnx.to_pure_dict(state))[0]
    np.testing.assert_array_equal(ours["kernel"][...], theirs["kernel"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shrink": 1.5}, r"shrink must be in \[0, 1\]"),
        ({"shrink": float("nan")}, r"shrink must be in \[0, 1\]"),
        ({"scale": -1.0}, "scale must be a finite number of at least 0"),
        ({"scale": float("inf")}, "scale must be a finite number of at least 0"),
    ],
)
def test_factors_out_of_range_are_refused_when_it_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        shrink_perturb(every=10, **options)


def test_what_it_cannot_move_is_named():
    with pytest.raises(ValueError, match="selects 'table', which is int32: narrow where="):
        run({"table": jnp.ones(2, jnp.int32)})
    with pytest.raises(ValueError, match="selects no leaf"):
        run(where="tail")
    with pytest.raises(ValueError, match="structure of those in training"):
        run(fresh=lambda key: {"w": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"shape \(4, 3\) at 'body/bias'|shape \(1,\) at 'body/bias'"):
        run(fresh=lambda key: jax.tree.map(lambda p: jnp.ones(1), PARAMS))
