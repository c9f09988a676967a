"""The factors of one weight: kinds of axes from ranks alone, the frozen half from its key, lengths of columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.lowrank.factors import (
    Sizes,
    both,
    column_norms,
    frozen_half,
    principal_split,
    recipes,
    redrawn,
    sizes_of,
    truncated,
    update_of,
    with_update,
)
from odjax.lowrank.methods import LowRank, rank_of, scale_of, side_of

KEY = jax.random.key(0)


def made(spec, sizes, seed=0):
    kernel = jax.random.normal(jax.random.key(seed), tuple(n for part in sizes for n in part))
    leaves = recipes(spec, "kernel", sizes, kernel)
    return kernel, {name: recipe.init(jax.random.key(seed + 1)) for name, recipe in leaves.items()}


axes = st.lists(st.integers(2, 4), min_size=1, max_size=2).map(tuple)


@given(
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    inputs=axes,
    outputs=axes,
    method=st.sampled_from(["lora", "rac", "dora"]),
    side=st.sampled_from(["left", "right"]),
)
def test_the_kinds_of_axes_follow_from_the_ranks_of_the_leaves(batch, inputs, outputs, method, side):
    sizes = Sizes(batch, inputs, outputs)
    shape = (*batch, *inputs, *outputs)
    leaves = recipes(LowRank(method=method, rank=2, side=side), "kernel", sizes, jnp.zeros(shape))
    shapes = {name: jax.eval_shape(recipe.init, KEY) for name, recipe in leaves.items()}
    assert sizes_of(shape, shapes) == sizes
    for name, recipe in leaves.items():
        assert len(recipe.axes) == shapes[name].ndim
        for axis, size in zip(recipe.axes, shapes[name].shape, strict=True):
            assert axis is None or shape[axis] == size


def test_the_frozen_half_is_a_function_of_key_and_block_and_has_unit_entries():
    spec, sizes = LowRank(method="rac", rank=3, side="right"), Sizes((2,), (16,), (4,))
    _, leaves = made(spec, sizes)
    first = frozen_half(spec, leaves, sizes)
    np.testing.assert_array_equal(first, frozen_half(spec, leaves, sizes))
    np.testing.assert_allclose(jnp.mean(first**2), 1.0, rtol=1e-5)
    for q in first:
        np.testing.assert_allclose(q.T @ q, 16 * np.eye(3), atol=2e-5)
    assert np.abs(first[0] - first[1]).max() > 0.1
    after = redrawn(spec, KEY, leaves, sizes)
    assert after["lora_sketch"][..., 2].tolist() == [1, 1]
    assert np.abs(frozen_half(spec, after, sizes) - first).max() > 0.1


@pytest.mark.parametrize("law", ["gaussian", "rademacher", "coordinate", "cyclic"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_law_gives_a_half_of_the_right_shape(law, side):
    spec, sizes = LowRank(method="rac", rank=3, side=side, law=law), Sizes((2,), (3, 4), (2, 5))
    _, leaves = made(spec, sizes)
    a, b = both(spec, leaves, sizes)
    assert (a.shape, b.shape) == ((2, 3, 4, 3), (2, 3, 2, 5))
    assert update_of(a, b, 1.0, sizes).shape == (2, 3, 4, 2, 5)


def test_column_norms_are_those_of_the_sum():
    with jax.enable_x64(True):
        sizes = Sizes((2,), (3, 4), (5,))
        keys = jax.random.split(KEY, 3)
        kernel = jax.random.normal(keys[0], (2, 3, 4, 5), jnp.float64)
        a = jax.random.normal(keys[1], (2, 3, 4, 2), jnp.float64)
        b = jax.random.normal(keys[2], (2, 2, 5), jnp.float64)
        total = kernel + 1.5 * jnp.einsum("bijr,bro->bijo", a, b)
        expected = jnp.sqrt(jnp.sum(total**2, axis=(1, 2)))
        np.testing.assert_allclose(column_norms(kernel, sizes, a, b, 1.5), expected, rtol=1e-12)


def test_dora_with_the_lengths_of_the_merged_weight_is_lora():
    spec, sizes = LowRank(method="dora", rank=2, alpha=3.0), Sizes((), (6,), (4,))
    kernel, leaves = made(spec, sizes)
    leaves = {**leaves, "lora_b": jax.random.normal(KEY, (2, 4))}
    plain = with_update(spec, "kernel", kernel, {n: leaves[n] for n in ("lora_a", "lora_b")})
    lengths = jnp.linalg.norm(plain, axis=0)
    dora = with_update(spec, "kernel", kernel, {**leaves, "lora_magnitude": lengths})
    np.testing.assert_allclose(dora, plain, rtol=1e-5, atol=1e-6)


def test_pissa_keeps_the_weight_and_takes_its_best_approximation():
    spec, sizes = LowRank(method="pissa", rank=2, alpha=3.0), Sizes((), (6,), (4,))
    kernel, leaves = made(spec, sizes)
    rest, factors = principal_split(spec, "kernel", kernel, leaves)
    np.testing.assert_allclose(with_update(spec, "kernel", rest, factors), kernel, rtol=1e-5, atol=1e-6)
    values = jnp.linalg.svd(kernel, compute_uv=False)
    np.testing.assert_allclose(jnp.linalg.norm(rest), jnp.linalg.norm(values[2:]), rtol=1e-5)


def test_the_starts_are_those_of_the_papers():
    sizes = Sizes((), (10000,), (4,))
    kernel = jnp.zeros((10000, 4))
    start = lambda **s: recipes(LowRank(rank=4, **s), "kernel", sizes, kernel)  # noqa: E731
    uniform = start()["lora_a"].init(KEY)
    assert float(jnp.abs(uniform).max()) <= 0.01
    np.testing.assert_allclose(jnp.std(uniform), 0.01 / np.sqrt(3), rtol=0.02)
    np.testing.assert_allclose(jnp.std(start(init="gaussian")["lora_a"].init(KEY)), 1 / 4, rtol=0.02)
    assert not jnp.any(start()["lora_b"].init(KEY))
    table = recipes(LowRank(rank=4), "embedding", sizes, kernel, table=True)
    assert not jnp.any(table["lora_a"].init(KEY))
    assert jnp.any(table["lora_b"].init(KEY))


def test_ranks_scales_and_sides():
    spec = LowRank(rank=8, alpha=4.0, rank_pattern=((".*/q", 2), (".*", 4)), alpha_pattern=((".*/q", 6.0),))
    assert rank_of(spec, "a/q", 16, 16) == 2
    assert rank_of(spec, "a/k", 16, 16) == 4
    assert scale_of(spec, "a/q", 2) == 3.0
    assert scale_of(spec, "a/k", 4) == 1.0
    assert scale_of(LowRank(method="rslora", alpha=4.0), "a", 4) == 2.0
    assert side_of(LowRank(method="asym"), 16, 4) == "right"
    assert side_of(LowRank(method="rac"), 4, 16) == "right"
    assert side_of(LowRank(), 4, 16) is None


def test_truncation_keeps_the_first_columns_and_rows():
    a, b = truncated(jnp.ones((2, 5, 3)), jnp.ones((2, 3, 4)), 2, 1)
    np.testing.assert_array_equal(a[0, 0], [1, 1, 0])
    np.testing.assert_array_equal(b[1, :, 0], [1, 1, 0])


@pytest.mark.parametrize(
    "shape,leaves,message",
    [
        ((6, 4), {"lora_a": (6, 2)}, "needs lora_a and lora_b, or one of them and lora_sketch"),
        ((6, 4), {"lora_a": (5, 2), "lora_b": (2, 4)}, "does not fit a weight .*without its rank it must be"),
        ((6, 4), {"lora_a": (6, 2), "lora_b": (2, 5)}, "lora_b .* does not fit a weight"),
    ],
)
def test_leaves_that_do_not_belong_to_a_weight_are_refused(shape, leaves, message):
    with pytest.raises(ValueError, match=message):
        sizes_of(shape, {name: jnp.zeros(size) for name, size in leaves.items()})
