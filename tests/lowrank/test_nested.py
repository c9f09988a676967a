"""One pair of factors at every rank: masked, cut, served."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core import combine, leaves_with_paths, partition
from odjax.lowrank.adapt import adapt
from odjax.lowrank.merge import merge
from odjax.lowrank.methods import FACTORS
from odjax.lowrank.nested import (
    at_rank,
    check_nested,
    model_at,
    padded,
    rank_axes,
    rank_mask,
    slice_rank,
    unslice,
)

from .lowrank_models import MODELS, trained

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 6))
R = 4


def model_of(method="lora", alpha=3.0, **settings):
    return adapt(nn.Dense(5), rank=R, method=method, alpha=alpha, **settings)


@functools.cache
def params_of(method="lora", alpha=3.0):
    return trained(model_of(method, alpha).init(KEY, X)["params"])


@functools.cache
def scanned():
    model, inputs, where = MODELS["scanned decoder"]
    model = adapt(model, rank=R, alpha=2.0, where=where)
    params = nn.unbox(jax.jit(model.init)(KEY, *inputs)["params"])
    return model, trained(params), inputs


def test_a_rank_is_the_first_columns_times_the_first_rows_by_alpha_over_that_rank():
    params = params_of()
    for b in range(1, R + 1):
        made = merge(model_of(), at_rank(model_of(), params, b))["kernel"]
        a, z = params["lora_a"], params["lora_b"]
        np.testing.assert_allclose(made, params["kernel"] + 3.0 / b * a[:, :b] @ z[:b], rtol=1e-5, atol=1e-6)


@given(st.integers(1, R), st.sampled_from([None, 3.0]))
def test_masked_and_cut_parameters_are_one_function(rank, alpha):
    model, params = model_of(alpha=alpha), params_of(alpha=alpha)
    masked = model.apply({"params": at_rank(model, params, jnp.int32(rank))}, X)
    small = model_at(model, rank)
    cut = small.apply({"params": slice_rank(params, rank)}, X)
    np.testing.assert_allclose(masked, cut, rtol=1e-5, atol=1e-5)


def test_the_same_holds_for_stacked_layers_and_embeddings():
    model, params, inputs = scanned()
    masked = jax.jit(lambda b: model.apply({"params": at_rank(model, params, b)}, *inputs))(jnp.int32(2))
    cut = jax.jit(lambda p: model_at(model, 2).apply({"params": p}, *inputs))(slice_rank(params, 2))
    np.testing.assert_allclose(masked, cut, rtol=1e-4, atol=1e-5)
    full = jax.jit(lambda p: model.apply({"params": p}, *inputs))(params)
    assert np.abs(full - cut).max() > 1e-3


def test_ranks_by_pattern_and_by_dimension_are_cut_to_the_smaller_one():
    settings = {"where": r".*kernel", "rank_pattern": {"dense_1/kernel": 2}}
    model = adapt(MODELS["mlp"][0], rank=R, **settings)
    x = MODELS["mlp"][1][0]
    params = trained(nn.unbox(model.init(KEY, x)["params"]))
    ranks = {path: place.rank for path, place in rank_axes(params).items()}
    assert ranks["dense_0/lora_a"] == R
    assert ranks["dense_1/lora_b"] == 2
    masked = model.apply({"params": at_rank(model, params, 3)}, x)
    cut = model_at(model, 3).apply({"params": slice_rank(params, 3)}, x)
    np.testing.assert_allclose(masked, cut, rtol=1e-5, atol=1e-5)


def test_the_full_rank_is_the_model_bit_for_bit():
    model, params = model_of(), params_of()
    jax.tree.map(np.testing.assert_array_equal, at_rank(model, params, jnp.int32(R)), params)


def test_serving_a_rank_is_what_dylora_serves():
    params = params_of("dylora")
    for b in range(1, R + 1):
        served = merge(model_of("dylora"), params, rank=b)
        ours = merge(model_of("dylora"), at_rank(model_of("dylora"), params, b))
        np.testing.assert_allclose(served["kernel"], ours["kernel"], rtol=1e-6, atol=1e-6)


@given(st.integers(1, R))
def test_gradients_above_the_rank_are_exactly_zero_and_below_those_of_the_cut_model(rank):
    model, params = model_of(), params_of()
    free, frozen = partition(params, FACTORS)
    masked = jax.grad(
        lambda f: jnp.sum(
            jnp.sin(model.apply({"params": at_rank(model, combine(f, frozen), jnp.int32(rank))}, X))
        )
    )(free)
    small, rest = partition(slice_rank(params, rank), FACTORS)
    cut = jax.grad(lambda f: jnp.sum(jnp.sin(model_at(model, rank).apply({"params": combine(f, rest)}, X))))(
        small
    )
    axes = rank_axes(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), masked, padded(cut, axes)
    )
    mask = rank_mask(params, rank)
    for (_, g), (_, m) in zip(leaves_with_paths(masked), leaves_with_paths(mask), strict=True):
        assert not np.any(np.asarray(g)[np.asarray(m) == 0])
        assert np.all(np.asarray(g)[np.asarray(m) == 1])


def test_the_mask_has_ones_in_the_first_columns_and_rows_or_in_the_last_of_them_alone():
    params = params_of()
    mask = rank_mask(params, jnp.int32(3), r"lora_a|lora_b|bias")
    assert mask["kernel"] is None
    assert np.all(mask["bias"] == 1)
    np.testing.assert_array_equal(mask["lora_a"], np.tile([1.0, 1, 1, 0], (6, 1)))
    np.testing.assert_array_equal(mask["lora_b"][:, 0], [1, 1, 1, 0])
    last = rank_mask(params, 3, last=True)
    np.testing.assert_array_equal(last["lora_b"][:, 0], [0, 0, 1, 0])
    assert rank_axes(scanned()[1])["layers/attn/q/lora_b"].axis == 1


@given(st.integers(1, R))
def test_cutting_and_writing_back_changes_nothing_and_keeps_what_was_cut_off(rank):
    params = params_of()
    jax.tree.map(np.testing.assert_array_equal, unslice(slice_rank(params, rank), params), params)
    changed = unslice(jax.tree.map(jnp.zeros_like, slice_rank(params, rank)), params)
    np.testing.assert_array_equal(changed["lora_a"][:, rank:], params["lora_a"][:, rank:])
    np.testing.assert_array_equal(changed["lora_b"][rank:], params["lora_b"][rank:])
    assert not np.any(changed["lora_a"][:, :rank])
    assert not np.any(changed["kernel"])


def test_bad_ranks_and_methods_are_named():
    model, params = model_of(), params_of()
    for call in (at_rank, lambda m, p, b: slice_rank(p, b), lambda m, p, b: rank_mask(p, b)):
        for rank in (0, R + 1, True):
            with pytest.raises(ValueError, match=f"rank must be 1 to {R}"):
                call(model, params, rank)
    with pytest.raises(ValueError, match="adapt\\(method='lora'\\)"):
        check_nested(model_of("rac"))
    with pytest.raises(ValueError, match="needs? lora_a and lora_b"):
        rank_axes(model_of("rac").init(KEY, X)["params"])
    with pytest.raises(ValueError, match="nothing in params is adapted"):
        rank_axes({"kernel": X})
    with pytest.raises(ValueError, match="clip_rank"):
        model_at(model_of(alpha=None, clip_rank=True), 2)
    with pytest.raises(ValueError, match="whole number"):
        model_at(model, 0)
