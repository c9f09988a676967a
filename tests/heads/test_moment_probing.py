"""Moment probing: sizes, the pooling, the probe of both moments, its parameters, its errors."""

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
    PAIRS,
)

from .moment_cases import close, moved, normal, run, seeds


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
