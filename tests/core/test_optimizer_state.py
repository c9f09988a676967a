"""Every moment of every optimizer is found, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from odjax.core.edits import Edit, as_transform
from odjax.core.optimizer_state import map_params_state, reset_moments


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's own bias correction raises a float to an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


PARAMS = {"kernel": jnp.ones((4, 3)), "block": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
LABELS = {"kernel": "x", "block": {"kernel": "y", "bias": "x"}}
MASK = {"kernel": True, "block": False}  # a prefix of the parameters
KEEP = Edit(lambda k, i, p, s: (p, s), 1, "keep")

# name -> (optimizer, how many parameter-shaped leaves its state has)
OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), 0),
    "momentum": (optax.sgd(0.1, momentum=0.9), 3),
    "adam": (optax.adam(0.1), 6),
    "adam-bf16-moment": (optax.adam(0.1, mu_dtype=jnp.bfloat16), 6),
    "adamw-schedule": (optax.adamw(optax.linear_schedule(0.1, 0.0, 10)), 6),
    "lion": (optax.lion(0.1), 3),
    "rmsprop": (optax.rmsprop(0.1, momentum=0.9), 6),
    "muon": (contrib.muon(0.1), 2 + 2 * 1),
    "chain": (optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale_by_adam()), 9),
    "masked": (optax.masked(optax.adam(0.1), {"kernel": True, "block": {"kernel": False, "bias": True}}), 4),
    "masked-prefix": (optax.masked(optax.adam(0.1), MASK), 2),
    "multi-transform": (optax.multi_transform({"x": optax.adam(0.1), "y": optax.sgd(0.1, 0.9)}, LABELS), 5),
    "multi-steps": (optax.MultiSteps(optax.adam(0.1), 2), 9),
    "inject": (optax.inject_hyperparams(optax.adam)(learning_rate=0.1), 6),
    "apply-if-finite": (optax.apply_if_finite(optax.adam(0.1), 3), 6),
    "edit": (as_transform(KEEP, optax.adam(0.1), key=jax.random.key(0)), 6),
    "nested": (
        optax.MultiSteps(optax.inject_hyperparams(lambda lr: optax.masked(optax.adam(lr), MASK))(lr=0.1), 2),
        5,
    ),
}


def trained(optimizer):
    """A state in which every moment that there is differs from zero."""
    state = optimizer.init(PARAMS)
    for _ in range(3):
        _, state = optimizer.update(jax.tree.map(lambda p: 0.3 * p, PARAMS), state, PARAMS)
    return state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_shaped_leaf_is_visited_once_with_its_own_parameter(name):
    optimizer, expected = OPTIMIZERS[name]
    state, seen = trained(optimizer), []

    def visit(path, param, leaf):
        assert param.shape == leaf.shape
        assert (
            param
            is {"kernel": PARAMS["kernel"], **{f"block/{k}": v for k, v in PARAMS["block"].items()}}[path]
        )
        seen.append(path)
        return leaf

    same = map_params_state(visit, state, PARAMS)
    assert len(seen) == expected
    assert jax.tree.structure(same) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("sgd", "edit")])
def test_optax_itself_counts_the_same_leaves_where_it_can(name):
    optimizer, expected = OPTIMIZERS[name]
    count = []
    try:
        optax.tree.map_params(
            optimizer,
            lambda leaf: count.append(1) or leaf,
            trained(optimizer),
            is_leaf=lambda x: x is optax.MaskedNode,
        )
    except Exception:
        pytest.skip("optax.tree.map_params does not support this optimizer")
    assert len(count) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_full_reset_is_the_state_at_the_start_but_for_schedules_and_hyperparameters(name):
    optimizer, _ = OPTIMIZERS[name]
    state, start = trained(optimizer), optimizer.init(PARAMS)
    for reset in (reset_moments(state, PARAMS), reset_moments(state, PARAMS, init=optimizer.init)):
        for (path, leaf), begin, before in zip(
            jax.tree_util.tree_leaves_with_path(reset),
            jax.tree.leaves(start),
            jax.tree.leaves(state),
            strict=True,
        ):
            assert (leaf.dtype, leaf.shape) == (before.dtype, before.shape)
            text = jax.tree_util.keystr(path)
            if leaf.ndim:
                np.testing.assert_array_equal(leaf, begin, err_msg=text)
            elif not text.endswith(".count"):
                np.testing.assert_array_equal(leaf, before, err_msg=text)


def test_counts_of_moments_go_back_and_counts_of_schedules_do_not():
    optimizer = OPTIMIZERS["adamw-schedule"][0]
    state = reset_moments(trained(optimizer), PARAMS)
    assert int(state[0].count) == 0
    assert int(state[2].count) == 3
    assert int(reset_moments(trained(optimizer), PARAMS, counts=False)[0].count) == 3


def test_a_partial_reset_keeps_the_count_and_the_other_moments():
    optimizer = optax.adam(0.1)
    before = trained(optimizer)
    after = reset_moments(before, PARAMS, "block/.*")
    assert int(after[0].count) == 3
    assert float(jnp.abs(after[0].mu["block"]["kernel"]).max()) == 0
    np.testing.assert_array_equal(after[0].mu["kernel"], before[0].mu["kernel"])
    np.testing.assert_array_equal(after[0].nu["kernel"], before[0].nu["kernel"])


def test_a_group_whose_leaves_are_all_selected_is_reset_with_its_count():
    optimizer = optax.multi_transform({"x": optax.adam(0.1), "y": optax.adam(0.1)}, LABELS)
    after = reset_moments(trained(optimizer), PARAMS, "block/kernel")
    assert int(after.inner_states["y"].inner_state[0].count) == 0
    assert int(after.inner_states["x"].inner_state[0].count) == 3


def test_adafactors_factored_moments_are_left_alone():
    params = {"w": jnp.ones((256, 256)), "b": jnp.ones(8)}
    optimizer = optax.adafactor(0.1, min_dim_size_to_factor=128)
    state = optimizer.init(params)
    seen = []
    map_params_state(lambda path, p, leaf: seen.append((path, leaf.shape)) or leaf, state, params)
    assert ("w", (256,)) not in seen
    assert ("b", (8,)) in seen
    assert all(shape == params[path].shape for path, shape in seen)


def test_states_that_do_not_start_at_zero_need_the_initialiser():
    params = {"w": jnp.full(3, 2.0)}
    for optimizer in (optax.adagrad(0.1), contrib.schedule_free_sgd(0.1)):
        state = optimizer.init(params)
        _, state = optimizer.update(params, state, params)
        with pytest.raises(ValueError, match=r"does not start at zero: pass init=optimizer\.init"):
            reset_moments(state, params)
        reset = reset_moments(state, params, init=optimizer.init)
        for got, want in zip(jax.tree.leaves(reset), jax.tree.leaves(optimizer.init(params)), strict=True):
            if got.shape == (3,):
                np.testing.assert_array_equal(got, want)


def test_paths_are_those_of_the_parameters_when_one_path_ends_with_another():
    seen = set()
    map_params_state(
        lambda path, p, leaf: seen.add((path, leaf.shape)) or leaf, trained(optax.adam(0.1)), PARAMS
    )
    assert seen == {("kernel", (4, 3)), ("block/kernel", (2, 3)), ("block/bias", (3,))}


def test_a_bare_array_of_parameters_is_found_and_a_bare_scalar_refused():
    params = jnp.ones(3)
    state = optax.adam(0.1).init(params)
    state = map_params_state(lambda path, p, m: m + 1, state, params)
    assert float(state[0].mu[0]) == 1
    assert int(state[0].count) == 0
    with pytest.raises(ValueError, match="single scalar"):
        map_params_state(lambda path, p, m: m, optax.adam(0.1).init(jnp.float32(1)), jnp.float32(1))
    with pytest.raises(ValueError, match="no leaves"):
        map_params_state(lambda path, p, m: m, optax.adam(0.1).init({}), {})


def test_changing_a_dtype_is_an_error_with_the_path():
    state = optax.adam(0.1).init(PARAMS)
    with pytest.raises(ValueError, match=r"'block/bias' was float32\[3\] and became bfloat16\[3\]"):
        map_params_state(lambda path, p, m: m.astype(jnp.bfloat16), state, PARAMS)


def test_it_runs_under_jit_and_on_shapes():
    state = trained(optax.adam(0.1))
    reset = jax.jit(lambda s, p: reset_moments(s, p, "block/.*"))(state, PARAMS)
    assert float(jnp.abs(reset[0].nu["block"]["bias"]).max()) == 0
    shapes = jax.eval_shape(lambda: PARAMS)
    jax.tree.map(np.testing.assert_array_equal, reset_moments(state, shapes, "block/.*"), reset)


def test_nnx_states_and_partitioned_holes_are_understood():
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: x + 1, optax.adam(0.1).init(params))
    reset = reset_moments(state, params, "kernel")
    assert float(reset[0].mu["kernel"][...].max()) == 0
    assert float(reset[0].mu["bias"][...].min()) == 1
    holes = {"kernel": jnp.ones((4, 3)), "block": {"kernel": None, "bias": jnp.ones(3)}}
    state = jax.tree.map(lambda x: x + 1, optax.adam(0.1).init(holes))
    assert float(reset_moments(state, holes)[0].mu["block"]["bias"].max()) == 0
