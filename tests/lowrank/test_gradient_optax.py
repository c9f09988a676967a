"""The gradient view among the transforms of optax, on trees of any kind."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from odjax.core.paths import leaves_with_paths
from odjax.lowrank import rac_lora

from .gradient_cases import KEY, lenient, traced

PARAMS = {"body": {"kernel": jnp.arange(32.0).reshape(8, 4) / 10, "bias": jnp.ones(4)}}


@pytest.mark.parametrize(
    "name", ["chain", "multi_transform", "multi_steps", "apply_if_finite", "inject", "inside"]
)
def test_it_composes_with_the_wrappers_of_optax(name):
    tx = rac_lora(lenient(optax.scale_by_adam()), 2, 2, key=KEY)
    made = {
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.add_decayed_weights(0.1)),
        "multi_transform": lambda: optax.multi_transform(
            {"a": tx, "b": optax.sgd(0.1)}, {"body": {"kernel": "a", "bias": "b"}}
        ),
        "multi_steps": lambda: optax.MultiSteps(tx, 2).gradient_transformation(),
        "apply_if_finite": lambda: optax.apply_if_finite(tx, 3),
        "inject": lambda: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(0.5),
        "inside": lambda: rac_lora(
            lenient(optax.inject_hyperparams(optax.sgd)(0.5, momentum=0.9)), 2, 2, key=KEY
        ),
    }[name]()
    made = lenient(made)
    params, state = PARAMS, made.init(PARAMS)
    shapes = jax.tree.map(jnp.shape, state)
    update, traces = traced(made.update)
    for _ in range(5):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1
    assert jax.tree.map(jnp.shape, state) == shapes
    assert float(jnp.abs(params["body"]["kernel"] - PARAMS["body"]["kernel"]).max()) > 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_multi_steps_counts_real_updates():
    tx = optax.MultiSteps(rac_lora(optax.sgd(0.1), 2, 2, key=KEY), 3).gradient_transformation()
    state, update = tx.init(PARAMS), jax.jit(lenient(tx).update)
    for _ in range(6):
        _, state = update(PARAMS, state, PARAMS)
    assert int(state.inner_opt_state.count) == 2


def test_optax_maps_over_the_factors_of_the_state():
    tx = rac_lora(optax.scale_by_adam(), 2, 2, key=KEY)
    state = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(PARAMS))
    assert float(state.factors.mu["body/kernel"].min()) == float(state.rest.nu["body"]["bias"].min()) == 1
    assert int(state.count) == int(state.factors.count) == 0


def test_boxed_parameters_and_nnx_states_give_the_numbers_of_a_dict():
    tx = rac_lora(lenient(optax.adam(0.1)), 2, 2, key=KEY)
    plain = PARAMS["body"]
    boxed = {k: nn.Partitioned(v, ("x",) * v.ndim) for k, v in plain.items()}
    layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    state = nnx.state(layer)
    state["kernel"].set_value(plain["kernel"])
    state["bias"].set_value(plain["bias"])
    results = []
    for tree in (plain, boxed, state):
        opt = tx.init(tree)
        for _ in range(3):
            updates, opt = tx.update(tree, opt, tree)
            tree = optax.apply_updates(tree, updates)
        results.append(dict(leaves_with_paths(tree)))
    for other in results[1:]:
        assert set(other) == set(results[0])
        for path, leaf in other.items():
            np.testing.assert_array_equal(leaf, results[0][path])
