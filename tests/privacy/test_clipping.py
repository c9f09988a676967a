"""A clip bounds what one unit can do to a sum, whatever the unit sends."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.privacy import Clip

VALUES = st.one_of(
    st.floats(-1e3, 1e3, width=32),
    st.sampled_from([0.0, -0.0, 1e-30, 3e38, -3e38, 1e-44, math.nan, math.inf, -math.inf]),
)
FINITE = st.floats(-1e3, 1e3, width=32)
LEAVES = st.lists(VALUES, min_size=5, max_size=5)
NORMS = st.sampled_from([1e-3, 0.5, 1.0, 77.0])


def tree_of(values, dtype=np.float32):
    values = np.asarray(values, dtype)
    return {"a": values[:2], "b": [values[2:].reshape(3, 1)]}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def norm_of(tree):
    values = flat(tree)
    most = np.abs(values).max()
    return most * np.linalg.norm(values / most) if most > 0 else 0.0


clip_with = jax.jit(lambda c, tree: Clip(c)(tree), static_argnums=0)


@given(LEAVES, NORMS)
def test_no_tree_comes_out_with_more_than_the_norm(values, bound):
    clipped, norm = clip_with(bound, tree_of(values))
    assert np.isfinite(flat(clipped)).all()
    assert norm_of(clipped) <= bound * (1 + 1e-6)
    assert not math.isnan(norm)


@given(st.lists(FINITE, min_size=5, max_size=5), NORMS)
def test_what_is_below_the_norm_passes_bit_for_bit_and_the_rest_is_scaled(values, bound):
    tree = tree_of(values)
    clipped, norm = clip_with(bound, tree)
    before = norm_of(tree)
    np.testing.assert_allclose(norm, before, rtol=1e-6, atol=1e-37)
    if before <= bound * (1 - 1e-6):
        jax.tree.map(np.testing.assert_array_equal, clipped, tree)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.signbit(x), np.signbit(y)), clipped, tree)
    elif before > bound * (1 + 1e-6):
        np.testing.assert_allclose(flat(clipped), flat(tree) * (bound / before), rtol=2e-6, atol=1e-37)


def test_the_norm_is_one_for_all_leaves():
    # 3-4-12-13: one norm of 13; a norm a leaf would give 5 and 12.
    clipped, norm = Clip(6.5)({"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])})
    assert norm == 13.0
    np.testing.assert_allclose(flat(clipped), [1.5, 2.0, 6.0], rtol=1e-6)


def test_zero_stays_zero_and_a_tree_without_leaves_is_nothing():
    clipped, norm = Clip(1.0)({"a": jnp.zeros(3), "b": jnp.zeros((0, 2))})
    assert norm == 0
    assert not flat(clipped).any()
    assert Clip(1.0)({})[0] == {}
    assert Clip(1.0)({"a": jnp.zeros((0,))})[1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", [1.0, math.inf])
def test_one_number_that_is_not_finite_makes_the_whole_tree_zero(bad, bound):
    clipped, norm = Clip(bound)({"a": jnp.array([1.0, bad]), "b": jnp.ones(2)})
    assert not flat(clipped).any()
    assert norm == math.inf


def test_an_infinite_norm_clips_nothing():
    tree = tree_of([1e30, -3e38, 1.0, 0.0, 2.0])
    clipped, _ = Clip(math.inf)(tree)
    jax.tree.map(np.testing.assert_array_equal, clipped, tree)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25, 3e38])
def test_squares_neither_overflow_nor_vanish(size):
    clipped, norm = Clip(size / 4)({"a": jnp.full((4,), size / 2, jnp.float32)})
    np.testing.assert_allclose(norm, size, rtol=1e-5)
    np.testing.assert_allclose(flat(clipped), np.full(4, size / 8), rtol=1e-5)


@pytest.mark.parametrize("shape", [(2**21,), (1024, 2048)])
def test_the_bound_holds_for_millions_of_numbers(shape):
    tree = {"a": jax.random.normal(jax.random.key(0), shape) + jnp.float32(0.3)}
    clipped, norm = Clip(1.0)(tree)
    np.testing.assert_allclose(norm, norm_of(tree), rtol=1e-6)
    assert norm_of(clipped) <= 1 + 1e-6


@given(st.lists(FINITE, min_size=5, max_size=5))
def test_rounding_to_few_digits_does_not_lead_beyond_the_bound(values):
    tree = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.bfloat16), tree_of(values))
    clipped, norm = clip_with(1.0, tree)
    assert {x.dtype.name for x in jax.tree.leaves(clipped)} == {"bfloat16"}
    assert norm.dtype == jnp.float32
    assert norm_of(clipped) <= 1 + 1e-6


def test_float16_is_refused_since_its_subnormals_round_beyond_the_bound():
    with pytest.raises(TypeError, match="'w' is float16.*convert it to bfloat16 or float32"):
        Clip(1e-5)({"w": jnp.ones(4, jnp.float16)})


def test_structure_and_dtypes_stay_and_float64_is_clipped_in_float64():
    with jax.enable_x64(True):
        tree = {"a": jnp.array([3.0, 4.0], jnp.float64), "b": (jnp.array([12.0], jnp.bfloat16),)}
        clipped, norm = Clip(1.3)(tree)
        assert jax.tree.map(lambda x: x.dtype.name, clipped) == {"a": "float64", "b": ("bfloat16",)}
        assert norm == 13.0
        np.testing.assert_allclose(clipped["a"], [0.3, 0.4], rtol=1e-15)


NEIGHBOURS = st.lists(LEAVES, min_size=3, max_size=3)


@given(NEIGHBOURS, LEAVES, st.integers(0, 2))
def test_a_unit_moves_the_sum_by_the_sensitivity_at_most(units, other, which):
    clip = Clip(0.5)
    parts = [flat(clip_with(0.5, tree_of(u))[0]) for u in units]
    changed = list(parts)
    changed[which] = flat(clip_with(0.5, tree_of(other))[0])
    removed = sum(parts[:which] + parts[which + 1 :])
    assert np.linalg.norm(sum(parts) - removed) <= clip.sensitivity() * (1 + 1e-6)
    assert np.linalg.norm(sum(parts) - sum(changed)) <= clip.sensitivity("replace_one") * (1 + 1e-6)


def test_replacing_one_unit_can_move_the_sum_by_all_of_its_sensitivity():
    clip = Clip(0.5)
    a, b = (clip({"w": jnp.array([x])})[0]["w"] for x in (9.0, -9.0))
    np.testing.assert_allclose(a - b, clip.sensitivity("replace_one"), rtol=1e-6)


def test_a_sharded_tree_is_clipped_like_a_whole_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tree = {"a": jax.random.normal(jax.random.key(0), (16, 3))}
    whole, norm = clip_with(1.0, tree)
    parts, norm_of_parts = clip_with(1.0, jax.device_put(tree, place))
    np.testing.assert_allclose(norm_of_parts, norm, rtol=1e-6)
    np.testing.assert_allclose(parts["a"], whole["a"], rtol=1e-6)


def test_many_trees_are_clipped_by_vmap():
    trees = {"a": jnp.array([[3.0, 4.0], [0.0, 0.0], [math.nan, 1.0]])}
    clipped, norms = jax.vmap(Clip(1.0))(trees)
    np.testing.assert_allclose(clipped["a"], [[0.6, 0.8], [0, 0], [0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(norms, [5.0, 0.0, math.inf])


def test_a_clip_is_a_value():
    assert Clip(1.0) == Clip(1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Clip(1.0).norm = 2.0


@pytest.mark.parametrize("norm", [0, 0.0, -1.0, math.nan, True, "1"])
def test_a_norm_that_is_not_above_zero_is_an_error(norm):
    with pytest.raises(ValueError, match=r"must be a number above 0 \(math.inf for no clipping\)"):
        Clip(norm)


def test_leaves_that_are_no_floats_and_unknown_relations_are_errors():
    with pytest.raises(TypeError, match=r"leaf 'steps' is int32: only real floats are clipped"):
        Clip(1.0)({"w": jnp.ones(2), "steps": jnp.ones(2, jnp.int32)})
    with pytest.raises(ValueError, match="relation must be 'add_or_remove_one' or 'replace_one', got 'zero'"):
        Clip(1.0).sensitivity("zero")
