"""What every statistic is: a commutative monoid that gives one answer under scan, vmap and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.core.statistics import reduce_over_axis, scan_over, vmap_over

from .contract_rows import KEY, rows

ROWS = pytest.mark.parametrize("row", rows("statistic"), ids=lambda row: row.id)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)


def three_states(stat, batch):
    observe = jax.jit(lambda *b: stat.observe(stat.zero(), *b))
    return [observe(*batch(jax.random.fold_in(KEY, i), 5)) for i in range(3)]


@ROWS
def test_the_monoid_laws_hold(row):
    stat, batch = row.build()
    combine = jax.jit(stat.combine)
    a, b, c = three_states(stat, batch)
    close(stat.result(combine(combine(a, b), c)), stat.result(combine(a, combine(b, c))))
    close(stat.result(combine(a, b)), stat.result(combine(b, a)))
    for same in (combine(a, stat.zero()), combine(stat.zero(), a)):
        close(stat.result(same), stat.result(a))


@ROWS
def test_zero_and_zero_is_zero(row):
    stat, _ = row.build()
    jax.tree.map(np.testing.assert_array_equal, stat.combine(stat.zero(), stat.zero()), stat.zero())


@ROWS
def test_observing_is_combining_with_the_batch_alone(row):
    stat, batch = row.build()
    a, b, _ = three_states(stat, batch)
    onto = jax.jit(stat.observe)(a, *batch(jax.random.fold_in(KEY, 1), 5))
    close(stat.result(onto), stat.result(stat.combine(a, b)))


@ROWS
def test_the_state_keeps_structure_shapes_and_dtypes_and_is_float32(row):
    stat, batch = row.build()
    zero = jax.eval_shape(stat.zero)
    after = jax.eval_shape(lambda b: stat.observe(stat.zero(), *b), batch(KEY, 4))
    merged = jax.eval_shape(stat.combine, zero, zero)
    assert jax.tree.structure(zero) == jax.tree.structure(after) == jax.tree.structure(merged)
    for leaf, *others in zip(*map(jax.tree.leaves, (zero, after, merged)), strict=True):
        assert leaf.dtype == jnp.float32
        assert all((o.shape, o.dtype) == (leaf.shape, leaf.dtype) for o in others)


@ROWS
@pytest.mark.parametrize("drive", [scan_over, vmap_over], ids=lambda f: f.__name__)
def test_drivers_agree_with_one_big_batch(row, drive):
    stat, batch = row.build()
    whole = batch(KEY, 24)
    batches = jax.tree.map(lambda x: x.reshape(6, 4, *x.shape[1:]), whole)
    state = jax.jit(lambda b: drive(stat, b))(batches)
    close(stat.result(state), stat.result(stat.observe(stat.zero(), *whole)))


@ROWS
def test_eight_devices_agree_with_one(row):
    stat, batch = row.build()
    whole = batch(KEY, 32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def local(*rows):
        return reduce_over_axis(stat, stat.observe(stat.zero(), *rows), "data")

    over = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec("data"), out_specs=spec(), check_vma=False))
    close(stat.result(over(*whole)), stat.result(stat.observe(stat.zero(), *whole)))


@ROWS
def test_a_row_of_weight_one_counts_once_and_one_of_weight_zero_not_at_all(row):
    stat, batch = row.build()
    *rows, _ = batch(KEY, 6)
    observe = jax.jit(lambda w, *rows: stat.observe(stat.zero(), *rows, w))
    ones = stat.result(observe(jnp.ones(6), *rows))
    close(ones, stat.result(stat.observe(stat.zero(), *rows)))
    values, *labels = rows
    padded = (
        jnp.concatenate([values, jnp.full_like(values, jnp.nan)]),
        *(jnp.concatenate([y, y]) for y in labels),
    )
    close(ones, stat.result(observe(jnp.concatenate([jnp.ones(6), jnp.zeros(6)]), *padded)))
