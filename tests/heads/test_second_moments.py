"""Second moments of heads and their normalization by columns, against their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from odjax.heads.second_moments import (
    CENTERS,
    PAIRS,
    column_normalize,
    cross_moments,
    head_pairs,
    token_mean,
)

from .moment_cases import centers, close, moments, normal, normalize, pairings, seeds


@given(seeds, pairings, centers)
def test_moments_are_sums_of_outer_products_of_centred_tokens(seed, pairs, center):
    z = normal(seed, 2, 5, 4, 3) + 1
    got = moments(z, pairs, center)
    z = np.asarray(z, np.float64)
    axes = {"global": (1, 3), "channel": (1,)}.get(center)
    z = z if axes is None else z - z.mean(axis=axes, keepdims=True)
    want = [
        sum(np.einsum("bi,bj->bij", z[:, token, i], z[:, token, j]) for token in range(5)) / 5
        for i, j in head_pairs(4, pairs)
    ]
    close(got, np.stack(want, axis=1))


@pytest.mark.parametrize(
    "pairs, expected",
    [
        ("near", ((0, 1), (1, 2), (2, 3))),
        ("half", ((0, 2), (1, 3))),
        ("all", ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))),
        ("first", ((0, 1), (0, 2), (0, 3))),
    ],
)
def test_pairs_of_heads_are_listed(pairs, expected):
    assert head_pairs(4, pairs) == expected


@given(seeds, pairings, centers)
def test_the_order_of_tokens_changes_nothing(seed, pairs, center):
    z = normal(seed, 2, 5, 4, 3)
    order = np.random.default_rng(seed).permutation(5)
    close(moments(z[:, order], pairs, center), moments(z, pairs, center))


@given(seeds, pairings, centers)
def test_duplicating_every_token_changes_nothing(seed, pairs, center):
    z = normal(seed, 2, 5, 4, 3)
    close(moments(jnp.concatenate([z, z], axis=1), pairs, center), moments(z, pairs, center))


@given(seeds, pairings, centers)
def test_what_lies_at_masked_tokens_is_inert(seed, pairs, center):
    z = normal(seed, 2, 5, 4, 3)
    mask = np.zeros((2, 5), bool)
    mask[:, np.random.default_rng(seed).permutation(5)[:3]] = True
    compact = z[:, mask[0]]
    filled = jnp.where(mask[:, :, None, None], z, jnp.float32(jnp.nan))
    close(moments(filled, pairs, center, jnp.asarray(mask)), moments(compact, pairs, center))


@pytest.mark.parametrize("center", CENTERS)
def test_a_set_without_a_token_gives_zeros_and_no_gradient(center):
    z = normal(0, 2, 5, 4, 3)
    mask = jnp.asarray([[True] * 5, [False] * 5])

    def loss(z, mask):
        s = column_normalize(cross_moments(z, "near", center, mask))
        return jnp.sum(jnp.sin(s)), s

    gradient, s = jax.jit(jax.grad(loss, has_aux=True))(z, mask)
    assert not np.any(s[1])
    assert not np.any(gradient[1])
    assert np.all(np.isfinite(gradient[0]))
    assert np.any(gradient[0])


@given(seeds, pairings)
def test_uncentred_moments_are_bilinear_in_the_two_heads(seed, pairs):
    with jax.enable_x64(True):
        z, w = (jnp.asarray(np.random.default_rng(seed + i).normal(size=(5, 4, 3))) for i in range(2))
        a = jnp.asarray(np.random.default_rng(seed).normal(size=4))
        s = moments(z * a[None, :, None], pairs, "none")
        factors = np.array([float(a[i] * a[j]) for i, j in head_pairs(4, pairs)])
        close(s, factors[:, None, None] * np.asarray(moments(z, pairs, "none")), 1e-12, 1e-12)
        # additive in every head alone: here in the last, the other heads fixed
        last = jnp.asarray([0.0, 0.0, 0.0, 1.0])[None, :, None]
        one, other, both = (moments(z * (1 - last) + v * last, pairs, "none") for v in (z, w, z + w))
        mixed = np.array([j == 3 for _, j in head_pairs(4, pairs)])
        close(both[mixed], (one + other)[mixed], 1e-12, 1e-12)
        assert s.dtype == jnp.float64


@given(seeds, pairings)
def test_global_centring_of_tokens_with_mean_zero_changes_nothing(seed, pairs):
    z = normal(seed, 2, 5, 4, 3)
    z = z - jnp.mean(z, axis=-1, keepdims=True)  # what a LayerNorm with a bias of mean zero gives
    close(moments(z, pairs, "global"), moments(z, pairs, "none"), 1e-6, 1e-6)


@given(seeds, pairings)
def test_channel_centring_forgets_a_constant_vector_of_a_head(seed, pairs):
    z, vector = normal(seed, 2, 5, 4, 3), normal(seed + 1, 1, 1, 4, 3)
    close(moments(z + vector, pairs, "channel"), moments(z, pairs, "channel"))
    assert float(jnp.abs(moments(z + vector, pairs, "none") - moments(z, pairs, "none")).max()) > 1e-3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("center", CENTERS)
def test_tokens_split_over_a_mesh_axis_give_the_same_moments_and_gradients(center, masked):
    mesh = jax.make_mesh((8,), ("tokens",), axis_types=(AxisType.Auto,))
    z = normal(0, 2, 16, 4, 3) + 1
    mask = jnp.asarray(np.random.default_rng(0).random((2, 16)) < 0.6) if masked else None
    in_specs = (P(None, "tokens"), P(None, "tokens") if masked else None)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=P())
    def split(z, mask):
        return cross_moments(z, "near", center, mask, axis_name="tokens")

    def value(function, z):
        s = function(z)
        return jnp.sum(jnp.sin(3 * s)), s

    whole = functools.partial(cross_moments, pairs="near", center=center, mask=mask)
    results = [
        jax.jit(jax.grad(functools.partial(value, f), has_aux=True))(z)
        for f in (whole, lambda z: split(z, mask))
    ]
    close(results[1][1], results[0][1], 1e-5, 1e-6)
    close(results[1][0], results[0][0], 1e-5, 1e-6)


def test_moments_of_bf16_tokens_are_accumulated_in_float32():
    # Every token adds 1: a bf16 sum of 1000 ones stops at 256.
    z = jnp.ones((1000, 2, 3), jnp.bfloat16)
    s = moments(z, "near", "none")
    assert s.dtype == jnp.float32
    np.testing.assert_array_equal(s, np.ones((1, 3, 3), np.float32))


def test_all_pairs_are_one_matrix_product():
    z = jnp.ones((2, 5, 4, 3))
    for pairs in PAIRS:
        program = str(jax.make_jaxpr(functools.partial(cross_moments, pairs=pairs))(z))
        assert program.count("dot_general[") == 1


def test_the_mean_of_tokens_counts_those_of_the_mask():
    x = normal(0, 2, 5, 3)
    close(token_mean(x), np.mean(x, axis=1))
    mask = jnp.asarray([[True, False, True, False, False], [False] * 5])
    close(jax.jit(token_mean)(x, mask), np.stack([np.mean(x[0, ::2][:2], axis=0), np.zeros(3)]))
    with pytest.raises(ValueError, match="mask has no token for 1 of 2 samples"):
        token_mean(x, mask)


@given(seeds)
def test_columns_have_length_one_and_zero_columns_stay_zero(seed):
    s = normal(seed, 2, 4, 5).at[:, :, 2].set(0)
    lengths = jnp.linalg.norm(normalize(s), axis=-2)
    close(lengths, np.broadcast_to([1, 1, 0, 1, 1], (2, 5)))


def test_a_column_is_normalized_over_the_first_index_and_not_over_the_second():
    close(normalize(jnp.asarray([[3.0, 5.0], [4.0, 12.0]])), [[0.6, 5 / 13], [0.8, 12 / 13]])


@given(seeds, st.sampled_from([1e-3, 0.5, 7.0, 1e3]), pairings)
def test_a_positive_factor_of_a_head_leaves_normalized_maps_alone(seed, factor, pairs):
    z = normal(seed, 5, 4, 3)
    for head in range(4):
        scaled = z.at[:, head].multiply(factor)
        close(normalize(moments(scaled, pairs, "none")), normalize(moments(z, pairs, "none")))


def test_the_gradient_of_normalized_columns_is_the_projection_off_the_column():
    with jax.enable_x64(True):
        s, t = (jnp.asarray(np.random.default_rng(i).normal(size=(4, 5))) for i in range(2))
        _, gradient = jax.jvp(column_normalize, (s,), (t,))
        length = jnp.linalg.norm(s, axis=0, keepdims=True)
        u = s / length
        close(gradient, (t - u * jnp.sum(u * t, axis=0, keepdims=True)) / length, 1e-12, 1e-12)


def test_the_gradient_at_a_zero_column_is_that_of_a_division_by_eps():
    gradient = jax.grad(lambda s: jnp.sum(column_normalize(s, eps=0.25)))(jnp.zeros((3, 2)))
    close(gradient, np.full((3, 2), 4.0))
    assert np.all(np.isfinite(jax.grad(lambda s: jnp.sum(column_normalize(s)))(jnp.zeros((3, 2)))))


@pytest.mark.parametrize(
    "error, z, options, message",
    [
        (
            ValueError,
            jnp.zeros((5, 4)),
            {},
            r"z must be \[..., tokens, heads, channels\], got shape \(5, 4\)",
        ),
        (ValueError, jnp.zeros((2, 0, 4, 3)), {}, "z must have at least one token"),
        (ValueError, jnp.zeros((5, 1, 3)), {}, "heads must be at least 2, got 1"),
        (ValueError, jnp.zeros((5, 4, 3)), {"pairs": "one"}, "pairs must be one of"),
        (ValueError, jnp.zeros((5, 4, 3)), {"center": "token"}, "center must be one of"),
        (
            ValueError,
            jnp.zeros((5, 4, 3)),
            {"mask": jnp.ones((5, 1), bool)},
            r"mask must be \[..., N\], here \(5,\), got \(5, 1\)",
        ),
        (TypeError, jnp.zeros((5, 4, 3), jnp.int8), {}, "z must be floating point, got int8"),
    ],
)
def test_moments_of_what_is_no_set_of_tokens_are_refused(error, z, options, message):
    with pytest.raises(error, match=message):
        cross_moments(z, **options)


@pytest.mark.parametrize(
    "s, eps, message",
    [(jnp.zeros(3), 1e-12, r"s must be \[..., rows, columns\]"), (jnp.zeros((3, 3)), 0.0, "eps")],
)
def test_columns_that_cannot_be_normalized_are_refused(s, eps, message):
    with pytest.raises(ValueError, match=message):
        column_normalize(s, eps)
