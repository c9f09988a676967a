"""Moment probing: second moments, their normalization, the probe of both moments, its parameters, its errors."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from odjax.core import leaves_with_paths
from odjax.heads.moment_probing import MHC3, MomentProbe, feature_size
from odjax.heads.second_moments import (
    CENTERS,
    PAIRS,
    column_normalize,
    cross_moments,
    head_pairs,
    token_mean,
)

seeds = st.integers(0, 1000)
pairings = st.sampled_from(PAIRS)
centers = st.sampled_from(CENTERS)

moments = jax.jit(cross_moments, static_argnames=("pairs", "center"))
normalize = jax.jit(column_normalize)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(got, want, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


@functools.cache
def compiled(module, method="__call__"):
    return jax.jit(functools.partial(module.apply, method=method))


def run(module, params, *inputs, method="__call__", **more):
    return compiled(module, method)({"params": params}, *inputs, **more)


def moved(module, *inputs, **more):
    """Parameters away from their start, so that nothing is hidden by a zero."""
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), *inputs, **more))["params"]
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(p + 0.3 * noise.normal(size=p.shape), p.dtype), params)


# ---- Second moments.


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


# ---- Normalization by columns.


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


# ---- Sizes.


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("m, conv_layers", [(7, 2), (8, 2), (11, 2), (16, 2), (3, 1), (4, 0), (15, 3)])
def test_the_number_of_features_is_pairs_times_the_squared_side(m, conv_layers, pairs):
    pool = MHC3(dim=4 * m, heads=4, pairs=pairs, conv_layers=conv_layers)
    features = jax.eval_shape(pool.init_with_output, jax.random.key(0), jnp.zeros((2, 3, 6)))[0]
    assert features.shape == (2, feature_size(4 * m, 4, pairs, conv_layers))


@given(st.integers(7, 300), st.integers(2, 5))
def test_two_convolutions_leave_the_side_of_the_published_formula(m, heads):
    side = math.floor((math.floor((m - 3) / 2) + 1 - 3) / 2) + 1
    assert feature_size(m * heads, heads) == (heads - 1) * side**2


def test_a_probe_of_vit_b_has_the_published_parameters():
    probe = MomentProbe(num_classes=1000)
    tokens, cls = jnp.zeros((1, 196, 768)), jnp.zeros((1, 768))
    params = nn.unbox(jax.eval_shape(probe.init, jax.random.key(0), tokens, cls=cls))["params"]
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in {**params["moments"], "first": params["first"], "second": params["second"]}.items()
    }
    assert sizes == {
        "projection": 393_728,
        "norm": 256,
        "conv_0": 81,
        "conv_1": 81,
        "first": 769_000,
        "second": 2_884_000,
    }
    assert feature_size() == 2883


# ---- The pooling.


def reference_features(params, tokens, heads, interleaved, eps=1e-5):
    """MHC3 with neighbouring heads, one number at a time, in float64: the layout of released weights."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    tokens = np.asarray(tokens, np.float64)
    z = tokens @ params["projection"]["kernel"] + params["projection"]["bias"]
    m = z.shape[-1] // heads
    columns = [
        range(h, h + m * heads, heads) if interleaved else range(h * m, h * m + m) for h in range(heads)
    ]
    parts = []
    for head in columns:
        x = z[:, list(head)]
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)
        x = x * params["norm"]["scale"] + params["norm"]["bias"]
        parts.append(x - x.mean())
    maps = [a.T @ b / len(tokens) for a, b in itertools.pairwise(parts)]
    maps = [s / np.maximum(np.sqrt((s**2).sum(axis=0, keepdims=True)), 1e-12) for s in maps]
    for layer in range(2):
        if layer:
            erf = np.vectorize(math.erf)
            maps = [0.5 * s * (1 + erf(s / math.sqrt(2))) for s in maps]
        kernel = params[f"conv_{layer}"]["kernel"]
        side = (len(maps[0]) - 3) // 2 + 1
        new = [np.zeros((side, side)) for _ in maps]
        for out in range(len(maps)):
            for r in range(side):
                for c in range(side):
                    for source, s in enumerate(maps):
                        window = s[2 * r : 2 * r + 3, 2 * c : 2 * c + 3]
                        new[out][r, c] += (window * kernel[:, :, source, out]).sum()
        maps = new
    return np.array([s[r, c] for s in maps for r in range(len(s)) for c in range(len(s))])


@pytest.mark.parametrize("interleaved", [False, True])
def test_features_are_those_of_a_loop_in_the_order_map_row_column(interleaved):
    with jax.enable_x64(True):
        pool = MHC3(dim=33, heads=3, interleaved=interleaved, dtype=jnp.float64, param_dtype=jnp.float64)
        tokens = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)))
        params = moved(pool, tokens)
        got = run(pool, params, tokens)
        want = reference_features(params, tokens, 3, interleaved)
        assert got.shape == (2 * 2 * 2,)
        close(got, want, 1e-10, 1e-12)


def test_interleaved_heads_are_consecutive_heads_of_permuted_columns():
    tokens = normal(0, 2, 5, 6)
    pool = MHC3(dim=28, heads=4)
    params = moved(pool, tokens)
    order = np.arange(28).reshape(7, 4).T.reshape(-1)  # column of head h, channel i
    permuted = {
        **params,
        "projection": jax.tree.map(lambda p: p[..., np.argsort(order)], params["projection"]),
    }
    close(
        run(MHC3(dim=28, heads=4, interleaved=True), permuted, tokens),
        run(pool, params, tokens),
    )


@given(seeds)
def test_a_set_has_the_features_of_its_tokens_whatever_pads_it(seed):
    tokens = normal(seed, 2, 5, 6)
    pool, params = small()
    padded = jnp.concatenate([tokens, jnp.full((2, 3, 6), jnp.nan)], axis=1)
    order = np.random.default_rng(seed).permutation(8)
    mask = jnp.broadcast_to((jnp.arange(8) < 5)[None], (2, 8))
    want = run(pool, params, tokens)
    close(run(pool, params, padded[:, order], mask=mask[:, order]), want, 1e-4, 1e-5)
    close(run(pool, params, jnp.concatenate([tokens, tokens], axis=1)), want, 1e-4, 1e-5)


@functools.cache
def small(**options):
    pool = MHC3(dim=28, heads=4, **options)
    return pool, moved(pool, normal(0, 2, 5, 6))


def test_nan_at_a_padding_reaches_no_gradient():
    pool, params = small()
    tokens = normal(0, 2, 5, 6).at[:, 3:].set(jnp.nan)
    mask = jnp.broadcast_to((jnp.arange(5) < 3)[None], (2, 5))

    def loss(params, tokens):
        return jnp.sum(jnp.sin(3 * pool.apply({"params": params}, tokens, mask=mask)))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, tokens)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    assert not np.any(gradients[1][:, 3:])


def test_centring_by_channel_makes_the_bias_of_the_norm_irrelevant():
    pool, params = small(center="channel")
    tokens = normal(0, 2, 5, 6)
    shifted = {**params, "norm": {**params["norm"], "bias": params["norm"]["bias"] + jnp.arange(7.0)}}
    close(run(pool, shifted, tokens), run(pool, params, tokens), 1e-4, 1e-5)


def test_a_pooling_takes_any_leading_axes():
    pool, params = small()
    tokens = normal(0, 2, 3, 5, 6)
    got = run(pool, params, tokens)
    assert got.shape == (2, 3, 3)
    close(got[1, 2], run(pool, params, tokens[1, 2]), 1e-4, 1e-5)
    mask = jnp.ones((2, 3, 5), bool)
    close(run(pool, params, tokens, mask=mask), got, 1e-4, 1e-5)


def test_the_pooling_and_the_probe_run_on_tokens_split_over_a_mesh_axis():
    mesh = jax.make_mesh((8,), ("tokens",), axis_types=(AxisType.Auto,))
    tokens = normal(0, 2, 16, 6)
    mask = jnp.asarray(np.random.default_rng(0).random((2, 16)) < 0.6)
    options = {"num_classes": 3, "first_order": "mean_norm", "dim": 28, "stop_gradient": False}
    probe = MomentProbe(**options)
    params = moved(probe, tokens)
    split = jax.shard_map(
        lambda params, tokens, mask: MomentProbe(**options, axis_name="tokens").apply(
            {"params": params}, tokens, mask=mask
        ),
        mesh=mesh,
        in_specs=(P(), P(None, "tokens"), P(None, "tokens")),
        out_specs=P(),
    )

    def value(function, params):
        logits = function(params, tokens, mask)
        return jnp.sum(jnp.sin(logits)), logits

    whole = lambda params, tokens, mask: probe.apply({"params": params}, tokens, mask=mask)  # noqa: E731
    want, got = (jax.jit(jax.grad(functools.partial(value, f), has_aux=True))(params) for f in (whole, split))
    jax.tree.map(functools.partial(close, rtol=1e-3, atol=1e-5), got, want)


# ---- The probe.


@functools.cache
def probed(first_order, **options):
    probe = MomentProbe(num_classes=3, first_order=first_order, dim=28, **options)
    tokens, cls = normal(0, 2, 5, 6), normal(1, 2, 6)
    return probe, moved(probe, tokens, cls=cls), tokens, cls


@pytest.mark.parametrize("first_order", ["cls", "mean", "mean_norm"])
def test_logits_are_the_mean_of_two_linear_classifiers(first_order):
    probe, params, tokens, cls = probed(first_order)
    first, second = run(probe, params, tokens, cls=cls, method="branches")
    close(run(probe, params, tokens, cls=cls), (first + second) / 2, 1e-6, 1e-6)
    seen = {"cls": cls, "mean": jnp.mean(tokens, axis=1)}.get(first_order)
    if seen is None:
        seen = np.asarray(jnp.mean(tokens, axis=1), np.float64)
        seen = seen - seen.mean(axis=-1, keepdims=True)
        seen = seen / np.sqrt((seen**2).mean(axis=-1, keepdims=True) + 1e-5)
        seen = seen * np.asarray(params["norm"]["scale"])[None] + np.asarray(params["norm"]["bias"])[None]
    close(
        first, np.asarray(seen) @ params["first"]["kernel"] + np.asarray(params["first"]["bias"])[None], 1e-4
    )
    features = run(MHC3(dim=28), params["moments"], tokens)
    want = np.asarray(features) @ params["second"]["kernel"] + np.asarray(params["second"]["bias"])[None]
    close(second, want, 1e-4)


@pytest.mark.parametrize("first_order", ["mean", "mean_norm"])
def test_masked_tokens_change_no_logit(first_order):
    probe, params, tokens, _ = probed(first_order)
    padded = jnp.concatenate([tokens, jnp.full((2, 3, 6), jnp.nan)], axis=1)
    mask = jnp.broadcast_to((jnp.arange(8) < 5)[None], (2, 8))
    got = run(probe, params, padded, mask=mask)
    close(got, run(probe, params, tokens), 1e-4)


def test_a_new_probe_predicts_every_class_alike():
    probe, _, tokens, cls = probed("cls")
    logits, _ = jax.jit(probe.init_with_output)(jax.random.key(0), tokens, cls=cls)
    assert not np.any(logits)


def test_no_gradient_reaches_the_backbone_unless_asked_for():
    for frozen in (True, False):
        probe, params, tokens, cls = probed("cls", stop_gradient=frozen)
        gradients = jax.jit(
            jax.grad(
                lambda tokens, cls, probe=probe, params=params: jnp.sum(
                    jnp.sin(probe.apply({"params": params}, tokens, cls=cls))
                ),
                argnums=(0, 1),
            )
        )(tokens, cls)
        assert all(bool(np.any(g)) != frozen for g in gradients)


@pytest.mark.parametrize("first_order", ["cls", "mean", "mean_norm"])
def test_a_gradient_reaches_every_parameter(first_order):
    probe, params, tokens, cls = probed(first_order)

    def loss(params):
        return jnp.sum(jnp.sin(probe.apply({"params": params}, tokens, cls=cls)))

    for path, gradient in leaves_with_paths(jax.jit(jax.grad(loss))(params)):
        assert np.all(np.isfinite(gradient)), path
        assert np.any(gradient), path


def test_bf16_computation_keeps_float32_parameters_and_gives_close_float32_logits():
    probe, params, tokens, cls = probed("cls")
    narrow = probe.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(narrow.init, jax.random.key(0), tokens, cls=cls)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    got, want = (run(m, params, tokens, cls=cls) for m in (narrow, probe))
    assert got.dtype == jnp.float32
    assert float(jnp.abs(got - want).max()) < 0.05 * float(jnp.abs(want).max())
    low = tokens.astype(jnp.bfloat16)
    assert run(narrow, params, low, cls=cls.astype(jnp.bfloat16)).dtype == jnp.float32


def test_every_axis_of_every_parameter_has_a_name_or_none():
    probe, _, tokens, cls = probed("mean_norm")
    variables = jax.eval_shape(probe.init, jax.random.key(0), tokens, cls=cls)
    boxes = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert len(boxes) == 12
    assert all(isinstance(b, nn.LogicallyPartitioned) and len(b.names) == b.value.ndim for b in boxes)


# ---- Errors.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dim": 30}, "dim must be a multiple of heads, got 30 and 4: take dim=28"),
        ({"heads": 1}, "heads must be at least 2, got 1"),
        ({"dim": 24}, r"a head has 6 channels .*need at least 7: take dim=28"),
        ({"dim": 56, "conv_layers": 3}, "a head has 14 channels .*need at least 15: take dim=60"),
        ({"pairs": "cn2"}, "pairs must be one of near, half, all, first, got 'cn2'"),
        ({"pairs": "half", "heads": 7, "dim": 49}, "needs an even number of heads, got 7"),
        ({"center": "mean"}, "center must be one of global, channel, none, got 'mean'"),
        ({"conv_layers": -1}, "conv_layers must be at least 0, got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        MHC3(**options)
    with pytest.raises(ValueError, match=message):
        MomentProbe(3, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        (
            {"num_classes": 3, "first_order": "max"},
            "first_order must be one of cls, mean, mean_norm, got 'max'",
        ),
    ],
)
def test_a_probe_that_cannot_be_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        MomentProbe(**options)


@pytest.mark.parametrize(
    "error, inputs, message",
    [
        (ValueError, {"tokens": jnp.zeros(6)}, r"tokens must be \[..., N, D\] .* got shape \(6,\)"),
        (ValueError, {"tokens": jnp.zeros((2, 0, 6))}, "with N at least 1"),
        (TypeError, {"tokens": jnp.zeros((2, 5, 6), jnp.int32)}, "tokens must be floating point, got int32"),
        (ValueError, {"mask": jnp.ones((2, 4), bool)}, r"mask must be \[..., N\], here \(2, 5\)"),
        (TypeError, {"mask": jnp.ones((2, 5))}, "mask must be bool, got float32: compare first"),
        (
            ValueError,
            {"mask": jnp.ones(5, bool)},
            r"mask must be \[..., N\], here \(2, 5\), got \(5,\)",
        ),
        (ValueError, {"cls": None}, "needs the class token: call the probe with cls="),
        (ValueError, {"cls": jnp.zeros((3, 6))}, r"cls must be one vector a set of tokens.*got \(3, 6\)"),
        (
            ValueError,
            {"cls": jnp.zeros((2, 1, 6))},
            r"cls must be one vector a set of tokens.*got \(2, 1, 6\)",
        ),
    ],
)
def test_tokens_that_do_not_fit_are_refused(error, inputs, message):
    probe = MomentProbe(3, dim=28)
    inputs = {"tokens": jnp.zeros((2, 5, 6)), "cls": jnp.zeros((2, 6)), **inputs}
    with pytest.raises(error, match=message):
        jax.eval_shape(functools.partial(probe.init, jax.random.key(0)), **inputs)


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
