"""What every edit keeps: structure, shapes, dtypes, layout, and every leaf it does not select."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from odjax.core.edits import as_transform, run_edit
from odjax.core.paths import leaves_with_paths, select

from .contract_rows import KEY, lenient, rows

ROWS = pytest.mark.parametrize("row", rows("edit"), ids=lambda row: row.id)
MESH_AXES = ("fsdp", "tensor")


def params_of(dtype=jnp.float32):
    return {
        "body": {
            "kernel": jnp.linspace(-1.0, 2.0, 32).reshape(8, 4).astype(dtype),
            "bias": jnp.ones(4, dtype),
        },
        "head": jnp.full((4, 2), 0.5, dtype),
    }


def state_of(params):
    optimizer = lenient(optax.adam(0.1))
    return optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[1]


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@ROWS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_structure_shapes_and_dtypes_are_unchanged(row, dtype):
    edit, _ = row.build()
    params = params_of(dtype)
    state = state_of(params)
    after = jax.eval_shape(lambda p, s: run_edit(edit, KEY, 2, p, s), params, state)
    assert shapes(after) == shapes((params, state))


@ROWS
def test_jit_with_donated_buffers_equals_eager(row):
    edit, _ = row.build()
    params = params_of()
    state = state_of(params)
    eager = run_edit(edit, KEY, 2, params, state)
    compiled = jax.jit(lambda step, p, s: run_edit(edit, KEY, step, p, s), donate_argnums=(1, 2))
    donated = jax.tree.map(lambda x: x + 0, (params, state))
    result = compiled(jnp.int32(2), *donated)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6), result, eager)
    assert donated[0]["body"]["kernel"].is_deleted()


@ROWS
def test_leaves_that_it_does_not_select_are_bit_identical(row):
    edit, where = row.build()
    params = params_of()
    touched = dict(leaves_with_paths(select(params, where)))
    after, _ = jax.jit(lambda p, s: run_edit(edit, KEY, 2, p, s))(params, state_of(params))
    for (path, old), (_, new) in zip(leaves_with_paths(params), leaves_with_paths(after), strict=True):
        if touched[path]:
            assert not np.array_equal(old, new), f"{path} was selected and did not change"
        else:
            np.testing.assert_array_equal(np.asarray(old).view(np.uint32), np.asarray(new).view(np.uint32))


@ROWS
def test_eight_devices_give_the_edit_of_one_and_keep_the_layout(row):
    edit, _ = row.build()
    mesh = jax.make_mesh((4, 2), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(x):
        spec = jax.sharding.PartitionSpec(*MESH_AXES) if x.ndim == 2 else jax.sharding.PartitionSpec()
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    plain = (params_of(), state_of(params_of()))
    sharded = jax.tree.map(place, plain)
    run = jax.jit(lambda p, s: run_edit(edit, KEY, 2, p, s))
    one, eight = run(*plain), run(*sharded)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6), eight, one)
    for before, after in zip(jax.tree.leaves(sharded[0]), jax.tree.leaves(eight[0]), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, after.ndim)


@ROWS
def test_the_same_key_and_step_give_the_same_edit_and_another_step_another_one(row):
    edit, _ = row.build()
    params = params_of()
    run = jax.jit(lambda step: run_edit(edit, KEY, step, params, ())[0])
    jax.tree.map(np.testing.assert_array_equal, run(2), run(2))
    assert not np.array_equal(run(2)["body"]["kernel"], run(4)["body"]["kernel"])


@ROWS
def test_as_transform_equals_a_loop_that_calls_the_edit(row):
    edit, _ = row.build()
    inner = lenient(optax.adam(0.1))
    transform = as_transform(edit, inner, key=KEY)
    params = theirs = params_of()
    state, their_state = transform.init(params), inner.init(params)
    update, their_update = jax.jit(transform.update), jax.jit(inner.update)
    run = jax.jit(lambda step, p, s: run_edit(edit, KEY, step, p, s))
    for step in range(1, 2 * edit.every + 2):
        gradient = jax.tree.map(lambda p, step=step: jnp.cos(p + step), params_of())
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        updates, their_state = their_update(gradient, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        if edit.due(step):
            theirs, their_state = run(step, theirs, their_state)
        close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)  # noqa: E731
        jax.tree.map(close, (params, state.inner), (theirs, their_state))


@ROWS
def test_params_without_any_optimizer_state_can_be_edited(row):
    edit, _ = row.build()
    assert shapes(run_edit(edit, KEY, 2, params_of(), ())[0]) == shapes(params_of())
