"""An edit in a loop and the same edit as a transform are one thing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from odjax.core.edits import Edit, EditState, as_transform, run_edit, run_edits
from odjax.core.keys import fold_path, fold_step
from odjax.core.optimizer_state import map_params_state, reset_moments

KEY = jax.random.key(0)


def adam(rate):
    """Adam, outside strict promotion: optax's bias correction raises a float to an int32 count."""
    inner = optax.adam(rate)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def keep(key, step, params, opt_state):
    return params, opt_state


def jitter(key, step, params, opt_state):
    noise = jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), params)
    return jax.tree.map(lambda p, n: p * p.dtype.type(0.5) + n, params, noise), reset_moments(
        opt_state, params
    )


def double(key, step, params, opt_state):
    return jax.tree.map(lambda p: 2 * p, params), opt_state


def zero_first(key, step, params, opt_state):
    mask = jax.tree.map(lambda p: jnp.arange(p.size).reshape(p.shape) > 0, params)
    params = jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros_like(p)), params, mask)
    return params, opt_state


bounds = st.none() | st.integers(0, 20)


@given(st.integers(1, 7), bounds, bounds, st.integers(0, 40))
def test_due_is_the_same_for_python_and_traced_steps(every, start, stop, step):
    if start is not None and stop is not None and stop < start:
        start, stop = stop, start
    edit = Edit(keep, every, "keep", start, stop)
    expected = (
        step > 0 and step % every == 0 and (start is None or step >= start) and (stop is None or step <= stop)
    )
    assert edit.due(step) is expected
    assert bool(edit.due(jnp.int32(step))) is expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"every": 2, "start": 5, "stop": 4}, "stop=4 is before start=5"),
        ({"every": 2, "start": -1}, "start must be at least 0, got -1"),
        ({"every": 2, "name": ""}, "an edit needs a name"),
    ],
)
def test_an_impossible_edit_is_refused_when_it_is_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        Edit(**{"apply": keep, "name": "keep", **arguments})


def test_wrong_types_are_refused_when_an_edit_is_built():
    with pytest.raises(TypeError, match="every must be an int"):
        Edit(keep, 1.5, "keep")
    with pytest.raises(TypeError, match="every must be an int"):
        Edit(keep, True, "keep")
    with pytest.raises(TypeError, match="apply must be"):
        Edit(None, 1, "keep")
    with pytest.raises(TypeError, match="edits must be Edit objects"):
        as_transform([keep], optax.sgd(0.1), key=KEY)
    with pytest.raises(TypeError, match="legacy"):
        as_transform(Edit(keep, 1, "keep"), optax.sgd(0.1), key=jax.random.PRNGKey(0))


def test_an_edit_draws_from_the_key_of_its_name_and_step():
    seen = []

    def watch(key, step, params, opt_state):
        seen.append((key, step))
        return params, opt_state

    run_edit(Edit(watch, 3, "watch"), KEY, 6, {}, ())
    assert bool(seen[0][0] == fold_step(fold_path(KEY, "watch"), 6))
    assert (int(seen[0][1]), seen[0][1].dtype) == (6, jnp.int32)


@pytest.mark.parametrize(
    "apply, message",
    [
        (
            lambda k, i, p, s: (jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), s),
            r"changed params at 'w' from float32\[2\] to bfloat16",
        ),
        (lambda k, i, p, s: ({"v": p["w"]}, s), "changed the structure of params"),
        (lambda k, i, p, s: (p, (s[0][:1],)), r"changed opt_state at '0' from float32\[2\] to float32\[1\]"),
    ],
)
def test_an_edit_that_changes_a_shape_or_dtype_is_an_error(apply, message):
    with pytest.raises(ValueError, match=message):
        run_edit(Edit(apply, 1, "bad"), KEY, 1, {"w": jnp.ones(2)}, (jnp.ones(2),))


def loop(edits, optimizer, params, gradients):
    state, history = optimizer.init(params), []
    step_fn = jax.jit(
        lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*optimizer.update(g, s, p))
    )
    edit_fns = [jax.jit(lambda k, i, p, s, e=e: run_edit(e, k, i, p, s)) for e in edits]
    for step, g in enumerate(gradients, 1):
        params, state = step_fn(g, state, params)
        for edit, fn in zip(edits, edit_fns, strict=True):
            if edit.due(step):
                params, state = fn(KEY, step, params, state)
        history.append((params, state))
    return history


def transformed(edits, optimizer, params, gradients, wrap=lambda t: t):
    transform = wrap(as_transform(edits, optimizer, key=KEY))
    state, history = transform.init(params), []
    step_fn = jax.jit(
        lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*transform.update(g, s, p))
    )
    for g in gradients:
        params, state = step_fn(g, state, params)
        history.append((params, state))
    return history


def problem():
    params = {"a": jnp.arange(1.0, 5.0), "b": {"w": jnp.full((2, 2), 0.3)}}
    gradients = [jax.tree.map(lambda p, i=i: jnp.sin(p + i), params) for i in range(6)]
    return params, gradients


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    "edits",
    [
        [Edit(jitter, 2, "jitter")],
        [Edit(jitter, 2, "jitter", start=3), Edit(double, 3, "double")],
        [Edit(double, 3, "double"), Edit(jitter, 3, "jitter", stop=3)],
    ],
    ids=["one", "two-cadences", "same-step"],
)
def test_as_transform_equals_the_loop(edits, optimizer):
    params, gradients = problem()
    ours = transformed(edits, optimizer, params, gradients)
    theirs = loop(edits, optimizer, params, gradients)
    for (p, s), (q, t) in zip(ours, theirs, strict=True):
        # p + (p' - p) rounds: a few units in the last place of numbers below 16.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-6, atol=3e-6), (p, s.inner), (q, t)
        )
    assert int(ours[-1][1].count) == len(gradients)


def test_the_order_of_edits_that_are_due_together_matters_and_is_the_order_given():
    add = Edit(lambda k, i, p, s: (jax.tree.map(lambda x: x + 1, p), s), 1, "add")
    twice = Edit(double, 1, "double")
    assert float(run_edits([add, twice], KEY, 1, jnp.float32(3), ())[0]) == 8
    assert float(run_edits([twice, add], KEY, 1, jnp.float32(3), ())[0]) == 7
    traced = jax.jit(lambda step: run_edits([twice, add], KEY, step, jnp.float32(3), ())[0])
    assert float(traced(1)) == 7
    assert float(traced(0)) == 3


def test_two_edits_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two edits are named 'keep'"):
        as_transform([Edit(keep, 1, "keep"), Edit(double, 1, "keep")], optax.sgd(0.1), key=KEY)


def test_zeros_that_an_edit_writes_are_exact():
    params = {"w": jnp.asarray([1 / 3, 1e20, 1e-20], jnp.float32)}
    zero = Edit(lambda k, i, p, s: (jax.tree.map(jnp.zeros_like, p), s), 1, "zero")
    history = transformed([zero], optax.sgd(0.7), params, [{"w": jnp.ones(3)}])
    np.testing.assert_array_equal(history[0][0]["w"], np.zeros(3))


def test_bfloat16_gradients_do_not_round_the_edit_of_float32_parameters():
    params = {"w": jnp.asarray([1.0, 2.0], jnp.float32)}
    add = Edit(lambda k, i, p, s: (jax.tree.map(lambda x: x + jnp.float32(1e-4), p), s), 1, "add")
    transform = as_transform(add, optax.identity(), key=KEY)
    updates, _ = transform.update({"w": jnp.zeros(2, jnp.bfloat16)}, transform.init(params), params)
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_allclose(updates["w"], 1e-4, rtol=2e-3)  # rounding of 2.0001 in float32: 1.2e-7 / 1e-4


def test_it_needs_parameters():
    transform = as_transform(Edit(keep, 1, "keep"), optax.sgd(0.1), key=KEY)
    with pytest.raises(ValueError, match="needs the parameters"):
        transform.update({"w": jnp.ones(1)}, transform.init({"w": jnp.ones(1)}))


def test_multi_steps_outside_counts_real_updates():
    params, gradients = problem()
    edit = [Edit(zero_first, 2, "zero-first")]
    wrap = lambda t: optax.MultiSteps(t, every_k_schedule=3)  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):  # optax's running mean divides by an int32 count
        history = transformed(edit, optax.sgd(0.1), params, gradients, wrap)
    assert int(history[-1][1].inner_opt_state.count) == 2
    assert float(history[4][0]["a"][0]) != 0
    assert float(history[5][0]["a"][0]) == 0


def test_apply_if_finite_outside_skips_the_edit_with_the_update():
    params = {"a": jnp.ones(3)}
    bad = {"a": jnp.array([1.0, jnp.nan, 1.0])}
    wrap = lambda t: optax.apply_if_finite(t, 5)  # noqa: E731
    history = transformed(
        [Edit(double, 1, "double")], optax.sgd(1.0), params, [bad, {"a": jnp.full(3, 0.5)}], wrap
    )
    np.testing.assert_array_equal(history[0][0]["a"], np.ones(3))
    np.testing.assert_array_equal(history[1][0]["a"], np.ones(3))  # (1 - 0.5) * 2
    assert int(history[1][1].inner_state.count) == 1


def test_multi_transform_edits_its_own_group_only():
    params, gradients = problem()
    transform = optax.multi_transform(
        {
            "edited": as_transform(Edit(zero_first, 1, "zero-first"), optax.sgd(0.1), key=KEY),
            "plain": optax.sgd(0.1),
        },
        {"a": "edited", "b": "plain"},
    )
    updates, _ = transform.update(gradients[0], transform.init(params), params)
    new = optax.apply_updates(params, updates)
    assert float(new["a"][0]) == 0
    np.testing.assert_array_equal(
        new["b"]["w"], optax.apply_updates(params["b"]["w"], -0.1 * gradients[0]["b"]["w"])
    )


def test_inject_hyperparams_reaches_the_inner_optimizer():
    params = {"a": jnp.ones(2)}
    build = optax.inject_hyperparams(
        lambda learning_rate: as_transform(Edit(keep, 1, "keep"), optax.sgd(learning_rate), key=KEY)
    )
    transform = build(learning_rate=0.5)
    state = transform.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0.25)
    updates, state = jax.jit(transform.update)(params, state, params)
    np.testing.assert_array_equal(updates["a"], [-0.25, -0.25])
    assert isinstance(state.inner_state, EditState)


def test_an_nnx_state_is_edited_like_a_dict():
    params = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    transform = as_transform(Edit(zero_first, 1, "zero-first"), adam(0.1), key=KEY)
    updates, state = jax.jit(transform.update)(params, transform.init(params), params)
    new = optax.apply_updates(params, updates)
    assert float(new["kernel"][...][0, 0]) == 0
    assert float(new["kernel"][...][1, 1]) != 0
    cleared = map_params_state(lambda path, p, m: jnp.zeros_like(m), state, params)
    assert float(jnp.abs(cleared.inner[0].mu["kernel"][...]).max()) == 0


def test_shardings_of_parameters_and_state_survive_a_boundary():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    params = {"w": jax.device_put(jnp.arange(16.0), sharding)}
    transform = as_transform(Edit(jitter, 1, "jitter"), adam(0.1), key=KEY)
    state = jax.jit(transform.init, out_shardings=None)(params)
    updates, state = jax.jit(transform.update)(params, state, params)
    assert updates["w"].sharding.is_equivalent_to(sharding, 1)
    single = as_transform(Edit(jitter, 1, "jitter"), adam(0.1), key=KEY)
    plain = {"w": jnp.arange(16.0)}
    expected, _ = jax.jit(single.update)(plain, single.init(plain), plain)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6, atol=1e-6)
