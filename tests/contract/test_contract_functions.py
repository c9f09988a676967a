"""What every function on arrays keeps: jit, vmap and any layout give the same answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .contract_rows import rows

ROWS = pytest.mark.parametrize("row", rows("function"), ids=lambda row: row.id)


def same(row, a, b):
    """Bit for bit, or to the row's tolerance of the largest value."""

    def leaves(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=row.tolerance * float(jnp.abs(y).max()))

    jax.tree.map(np.testing.assert_array_equal if row.tolerance == 0 else leaves, a, b)


@ROWS
def test_jit_equals_eager(row):
    fn, arguments = row.build()
    same(row, jax.jit(fn)(*arguments), fn(*arguments))


@ROWS
def test_vmap_equals_one_by_one(row):
    fn, arguments = row.build()
    several = jax.tree.map(lambda x: jnp.stack([x, x + 1, -x]), arguments)
    batched = jax.jit(jax.vmap(fn))(*several)
    one = jax.jit(fn)
    for i in range(3):
        expected = one(*jax.tree.map(lambda x, i=i: x[i], several))
        same(row, jax.tree.map(lambda b, i=i: b[i], batched), expected)


@ROWS
def test_eight_devices_give_the_numbers_of_one(row):
    fn, arguments = row.build()
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    sharded = jax.jit(fn)(*jax.device_put(arguments, sharding))
    same(row, sharded, jax.jit(fn)(*arguments))


@ROWS
def test_shapes_alone_are_enough_to_trace_it(row):
    fn, arguments = row.build()
    shapes = jax.eval_shape(fn, *jax.eval_shape(lambda: arguments))
    result = jax.eval_shape(fn, *arguments)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), result
    )
