import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odjax.lowrank.sketches import (
    LAWS,
    Bernoulli,
    Coordinates,
    check_scale,
    check_side,
    dense,
    draw,
    fixed_side,
    lift,
    orthonormalise,
    project,
    sketch,
)

KEY = jax.random.key(0)
ALL = pytest.mark.parametrize("law", LAWS)


def projector(q):
    q = np.asarray(q, np.float64)
    return q @ np.linalg.pinv(q)


@ALL
def test_a_sketch_spans_a_projector_of_its_rank(law):
    q = sketch(KEY, 1, "w", 12, 3, law)
    h = projector(q)
    np.testing.assert_allclose(h, h.T, atol=1e-12)
    np.testing.assert_allclose(h @ h, h, atol=1e-12)
    np.testing.assert_allclose(np.trace(h), np.linalg.matrix_rank(np.asarray(q)), atol=1e-12)


@ALL
@pytest.mark.parametrize("scale,norm", [("unit_rms", 40**0.5), ("orthonormal", 1.0), (0.5, 0.5 * 40**0.5)])
def test_columns_have_the_norm_that_the_scale_says(law, scale, norm):
    norms = np.linalg.norm(sketch(KEY, 0, "w", 40, 4, law, batch=(30,), scale=scale), axis=-2)
    # The norm of a Gaussian column has relative deviation 1 / sqrt(2 dim); 120 of them are averaged.
    tolerance = 5 / (80 * 120) ** 0.5 if law == "gaussian" else 1e-5
    np.testing.assert_allclose((norms**2).mean() ** 0.5, norm, rtol=tolerance)


@settings(max_examples=8)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_orthonormal_columns_are_orthonormal_up_to_square(dim, rank, seed):
    rank = min(rank, dim)
    q = np.asarray(draw(jax.random.key(seed), 0, "w", dim, rank, scale="orthonormal"))
    np.testing.assert_allclose(q.T @ q, np.eye(rank), atol=2e-6)


def test_nearly_singular_columns_are_orthonormalised_in_float32():
    a = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    a[:, 5] = a[:, 4] + 1e-5 * a[:, 5]
    q = np.asarray(orthonormalise(jnp.asarray(a)))
    np.testing.assert_allclose(q.T @ q, np.eye(6), atol=1e-5)


@pytest.mark.parametrize("law", ["orthonormal", "gaussian", "rademacher", "coordinate"])
def test_the_mean_projector_of_an_isotropic_law_is_rank_over_dim_times_the_identity(law):
    dim, rank, n = 6, 2, 4000
    q = np.asarray(sketch(KEY, 0, "w", dim, rank, law, batch=(n,)), np.float64)
    if law == "rademacher":  # two equal columns, up to sign, have probability 2^(1 - dim)
        keep = np.abs(q[:, :, 0] * q[:, :, 1]).sum(1) > np.abs((q[:, :, 0] * q[:, :, 1]).sum(1))
        q = q[keep]
    h = q @ np.linalg.pinv(q)
    np.testing.assert_allclose(np.trace(h, axis1=1, axis2=2), rank, atol=1e-9)
    # Entries of a projector have a standard deviation below 1/2.
    np.testing.assert_allclose(h.mean(0), rank / dim * np.eye(dim), atol=4 * 0.5 / n**0.5)


def test_cyclic_windows_take_every_coordinate_once_in_a_round():
    taken = np.concatenate([draw(KEY, t, "w", 12, 3, "cyclic").index for t in range(4)])
    assert sorted(taken.tolist()) == list(range(12))
    assert draw(KEY, 4, "w", 12, 3, "cyclic").index.tolist() == [0, 1, 2]


def test_coordinates_of_a_draw_are_distinct_and_every_set_is_as_likely():
    index = np.asarray(draw(KEY, 0, "w", 4, 2, "coordinate", batch=(6000,)).index)
    sets, counts = np.unique(index, axis=0, return_counts=True)
    assert len(sets) == 6
    assert (index[:, 0] < index[:, 1]).all()
    np.testing.assert_allclose(counts / 6000, 1 / 6, atol=5 * (5 / 36 / 6000) ** 0.5)


@pytest.mark.parametrize("law", ["orthonormal", "gaussian", "rademacher", "coordinate"])
def test_leaves_blocks_keys_and_layers_have_different_sketches_and_the_same_name_has_the_same(law):
    base = np.asarray(sketch(KEY, 1, "a", 30, 4, law, batch=(2,)))
    np.testing.assert_array_equal(base, sketch(KEY, 1, "a", 30, 4, law, batch=(2,)))
    traced = jax.jit(lambda t: sketch(KEY, t, "a", 30, 4, law, batch=(2,)))(jnp.int32(1))
    np.testing.assert_allclose(base, traced, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(base[0], base[1])
    for other in (
        sketch(KEY, 2, "a", 30, 4, law, batch=(2,)),
        sketch(KEY, 1, "b", 30, 4, law, batch=(2,)),
        sketch(jax.random.key(1), 1, "a", 30, 4, law, batch=(2,)),
    ):
        assert not np.array_equal(base, other)


@ALL
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_lift_is_the_adjoint_of_project_and_both_are_products_with_the_dense_sketch(law, side, batch):
    inputs, outputs, rank = 5, 4, 2
    made = draw(KEY, 3, "w", outputs if side == "left" else inputs, rank, law, batch=batch)
    q = np.asarray(dense(made), np.float64)
    rng = np.random.default_rng(0)
    g = rng.normal(size=(*batch, inputs, outputs)).astype(np.float32)
    down = g @ q if side == "left" else np.swapaxes(q, -1, -2) @ g
    np.testing.assert_allclose(project(made, jnp.asarray(g), side), down, rtol=1e-5, atol=1e-5)
    z = rng.normal(size=down.shape).astype(np.float32)
    up = z @ np.swapaxes(q, -1, -2) if side == "left" else q @ z
    np.testing.assert_allclose(lift(made, jnp.asarray(z), side), up, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose((up * g).sum(), (down * z).sum(), rtol=1e-9)


@pytest.mark.parametrize("law", ["coordinate", "cyclic"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_coordinate_sketches_need_no_matrix_product(law, side):
    def step(g, block):
        made = draw(KEY, block, "w", 8, 2, law)
        assert isinstance(made, Coordinates)
        return lift(made, project(made, g, side), side)

    text = jax.jit(step).lower(jnp.ones((8, 8)), jnp.int32(0)).as_text()
    assert "dot_general" not in text
    assert "gather" in text
    assert "scatter" in text


@ALL
def test_values_do_not_depend_on_the_mesh_and_nothing_is_gathered(law):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))

    def step(g, block):
        made = draw(KEY, block, "w", 64, 4, law)
        return lift(made, project(made, g, "right"), "right")

    g = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    sharded = jax.jit(step, in_shardings=(spec, None), out_shardings=spec)
    np.testing.assert_allclose(sharded(g, jnp.int32(1)), step(g, 1), rtol=2e-5, atol=2e-5)
    text = sharded.lower(g, jnp.int32(1)).compile().as_text()
    for line in text.splitlines():
        if " all-gather(" in line or " all-to-all(" in line:
            raise AssertionError(line)


@settings(max_examples=10)
@given(st.integers(1, 6), st.integers(1, 6))
def test_auto_takes_the_smaller_side(inputs, outputs):
    side = fixed_side("auto", inputs, outputs)
    assert (outputs if side == "left" else inputs) == min(inputs, outputs)


def test_a_law_of_ones_own_is_scaled_like_the_others():
    ones = lambda key, dim, rank, dtype: jnp.ones((dim, rank), dtype)  # noqa: E731
    np.testing.assert_array_equal(sketch(KEY, 0, "w", 4, 2, ones, scale="orthonormal"), np.full((4, 2), 0.5))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: sketch(KEY, 0, "w", 4, 2, "normal"), "law must be one of \\('orthonormal'.*got 'normal'"),
        (lambda: sketch(KEY, 0, "w", 4, 5), "'w' has 4 rows: rank must be 1 to 4, got 5"),
        (lambda: sketch(KEY, 0, "w", 4, 0), "rank must be 1 to 4, got 0"),
        (lambda: check_scale("unit"), "scale must be 'unit_rms', 'orthonormal' or a positive number"),
        (lambda: check_scale(-1.0), "scale must be .* got -1.0"),
        (lambda: check_side("top"), "side must be one of \\('left', 'right', 'auto'\\) or Bernoulli\\(p\\)"),
        (lambda: check_side(Bernoulli(1.5)), "needs a probability, got 1.5"),
        (
            lambda: sketch(KEY, 0, "w", 4, 2, lambda *_: jnp.ones((2, 4))),
            "gave shape \\(2, 4\\) for 'w', needed \\(4, 2\\)",
        ),
    ],
)
def test_a_sketch_that_cannot_be_is_an_error_with_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
