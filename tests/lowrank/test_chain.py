"""Chains: the restart merges, the factor view is the chain of the paper, moments are treated as asked."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from odjax.core import combine, fold_path, leaves_with_paths, partition, run_edit
from odjax.lowrank.adapt import adapt
from odjax.lowrank.chain import jagged_cosine, next_block, prune_moments, restart
from odjax.lowrank.factors import Sizes, frozen_half
from odjax.lowrank.methods import FACTORS

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 6))
Y = jax.random.normal(jax.random.key(2), (5, 4))


def model_of(method="rac", **settings):
    return adapt(nn.Dense(4), rank=2, method=method, alpha=3.0, **settings)


def optimizer_step(optimizer, loss, params, state):
    free, frozen = partition(params, FACTORS)
    grads = jax.grad(lambda f: loss(combine(f, frozen)))(free)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(grads, state, free)
        return combine(optax.apply_updates(free, updates), frozen), state


@functools.cache
def run(method, on_boundary, optimizer=None, steps=6, every=3, **settings):
    """Parameters after every update, edits included, and the last optimizer state."""
    model = model_of(method, **dict(settings))
    optimizer = optimizer or optax.adam(0.05)
    edit = restart(model, every=every, on_boundary=on_boundary)
    params = model.init(KEY, X)["params"]
    state = optimizer.init(partition(params, FACTORS)[0])

    def loss(params):
        return jnp.mean((model.apply({"params": params}, X) - Y) ** 2)

    step = jax.jit(functools.partial(optimizer_step, optimizer, loss))
    edited = jax.jit(functools.partial(run_edit, edit, KEY))
    trace = []
    for i in range(1, steps + 1):
        params, state = step(params, state)
        if edit.due(i):
            trace.append((params, state))
            params, state = edited(i, params, state)
        trace.append((params, state))
    return model, trace


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("law", ["orthonormal", "gaussian"])
def test_the_factor_view_is_the_chain_of_the_paper(side, law):
    rate, every, blocks = 0.01, 2, 3
    model = adapt(nn.Dense(4, use_bias=False), rank=2, method="rac", alpha=3.0, side=side, law=law)
    params = model.init(KEY, X)["params"]
    edit = restart(model, every=every)
    optimizer = optax.sgd(rate)
    state = optimizer.init(partition(params, FACTORS)[0])
    weight, words = params["kernel"], params["lora_sketch"]

    @jax.jit
    def step(params, state):
        return optimizer_step(
            optimizer, lambda p: jnp.sum((model.apply({"params": p}, X) - Y) ** 2), params, state
        )

    for block in range(blocks):
        # The paper's inner loop, written out: Q from the key, Z from zero, W + s lift(Q, Z).
        leaves = {k: v for k, v in params.items() if k != "kernel"}
        q = frozen_half(model.spec, {**leaves, "lora_sketch": words.at[2].set(block)}, Sizes((), (6,), (4,)))
        lift = (lambda z, q=q: 1.5 * z @ q) if side == "left" else (lambda z, q=q: 1.5 * q @ z)
        z = jnp.zeros((6, 2) if side == "left" else (2, 4))
        gradient = jax.grad(lambda z, w, lift=lift: jnp.sum((X @ (w + lift(z)) - Y) ** 2))
        for k in range(every):
            params, state = step(params, state)
            z = z - rate * gradient(z, weight)
            name = "lora_a" if side == "left" else "lora_b"
            np.testing.assert_allclose(params[name], z, rtol=1e-4, atol=1e-5)
            if k == every - 1:
                params, state = run_edit(edit, KEY, every * (block + 1), params, state)
        weight = weight + lift(z)
        np.testing.assert_allclose(params["kernel"], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["rac", "cola", "relora"])
def test_a_restart_keeps_the_function_and_the_structure(method):
    model, trace = run(method, None)
    before, after = trace[2], trace[3]
    for old, new in zip(before, after, strict=True):
        assert jax.tree.structure(old) == jax.tree.structure(new)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), old) == jax.tree.map(
            lambda x: (x.shape, x.dtype), new
        )
    a, b = (model.apply({"params": params}, X) for params, _ in (before, after))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.abs(after[0]["kernel"] - before[0]["kernel"]).max() > 1e-3
    # Right after it the output is that of the merged weights to the bit.
    bare = model.inner.apply({"params": partition(after[0], "kernel|bias")[0]}, X)
    np.testing.assert_array_equal(b, bare)


def test_a_block_changes_a_weight_by_at_most_its_rank_and_the_sum_of_blocks_by_more():
    _, trace = run("rac", "reset")
    start = model_of().init(KEY, X)["params"]["kernel"]
    first, last = trace[3][0]["kernel"], trace[-1][0]["kernel"]
    assert np.linalg.matrix_rank(np.asarray(first - start), tol=1e-4) == 2
    assert np.linalg.matrix_rank(np.asarray(last - start), tol=1e-4) > 2


def test_factors_of_zero_change_no_weight_and_the_next_sketch_is_another():
    model = model_of(cache_sketch=True)
    params = model.init(KEY, X)["params"]
    after = next_block(model, params, KEY)
    np.testing.assert_array_equal(after["kernel"], params["kernel"])
    assert after["lora_sketch"][2] == 1
    assert np.abs(after["lora_frozen"] - params["lora_frozen"]).max() > 0.1


def test_reset_zeroes_moments_and_count_and_keep_keeps_them():
    _, trace = run("rac", "reset")
    state = trace[3][1][0]
    assert state.count == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves((state.mu, state.nu)))
    _, trace = run("rac", "keep")
    jax.tree.map(np.testing.assert_array_equal, trace[2][1], trace[3][1])
    assert np.any(jax.tree.leaves(trace[3][1][0].mu)[0])


def test_a_state_over_all_parameters_is_reset_for_the_factors_alone():
    model = model_of("cola")
    params = model.init(KEY, X)["params"]
    optimizer = optax.trace(0.9)
    state = jax.tree.map(jnp.ones_like, optimizer.init(params))
    edit = restart(model, every=1, trainable=None)
    _, after = run_edit(edit, KEY, 1, params, state)
    np.testing.assert_array_equal(after.trace["kernel"], 1)
    np.testing.assert_array_equal(after.trace["lora_a"], 0)


def test_relora_prunes_the_asked_part_of_the_moments():
    params = {"lora_a": jnp.ones((200, 50)), "norm": jnp.ones(10)}
    moments = jax.tree.map(lambda p: jax.random.uniform(KEY, p.shape, minval=0.1), params)
    state = optax.scale_by_adam().init(params)._replace(mu=moments, nu=moments, count=jnp.int32(7))
    after = prune_moments(state, params, 0.9, key=KEY)
    np.testing.assert_allclose(np.mean(after.mu["lora_a"] == 0), 0.9, atol=0.02)
    assert np.any((after.mu["lora_a"] == 0) != (after.nu["lora_a"] == 0))
    np.testing.assert_array_equal(after.mu["norm"], moments["norm"])
    assert after.count == 7
    smallest = prune_moments(state, params, 0.9).mu["lora_a"]
    np.testing.assert_allclose(np.mean(smallest == 0), 0.9, atol=1e-3)
    assert smallest[smallest > 0].min() >= np.quantile(moments["lora_a"], 0.9)


def test_the_edit_draws_from_the_key_of_the_run_and_its_own_name():
    model = model_of("cola")
    params = model.init(KEY, X)["params"]
    own = jax.random.fold_in(fold_path(KEY, "restart"), 4)
    state = optax.identity().init(params)
    edit = restart(model, every=4, on_boundary="keep")
    after, _ = run_edit(edit, KEY, 4, params, state)
    np.testing.assert_array_equal(after["lora_a"], next_block(model, params, own)["lora_a"])


def test_an_embedding_begins_a_block_as_it_began_the_first():
    model = adapt(nn.Embed(50, 40), rank=8, method="cola", where="embedding")
    params = model.init(KEY, jnp.zeros((2,), int))["params"]
    for block in (params, next_block(model, params, KEY)):
        assert not np.any(block["lora_a"])
        assert np.std(block["lora_b"]) == pytest.approx(1, abs=0.2)


def test_an_optimizer_of_more_than_the_factors_is_not_passed_over():
    model = model_of()
    params = model.init(KEY, X)["params"]
    trained = FACTORS + "|bias"
    held, _ = partition(params, trained)
    state = optax.adam(0.1).init(held)
    state = (state[0]._replace(mu=jax.tree.map(jnp.ones_like, held)), *state[1:])
    with pytest.raises(ValueError, match=r"no moments shaped like the factors: pass restart\(trainable=\)"):
        run_edit(restart(model, every=1), KEY, 1, params, state)
    _, after = run_edit(restart(model, every=1, trainable=trained), KEY, 1, params, state)
    assert not np.any(after[0].mu["lora_a"])
    np.testing.assert_array_equal(after[0].mu["bias"], 1)
    rows = (jnp.ones(3),)
    with pytest.raises(ValueError, match="or on_boundary='keep'"):
        run_edit(restart(model, every=1), KEY, 1, params, rows)
    assert run_edit(restart(model, every=1, on_boundary="keep"), KEY, 1, params, rows)[1] is rows


def test_the_jagged_cosine_starts_anew_after_each_restart():
    rate = jagged_cosine(2.0, 100, 25, warmup=5, rewarm=10, floor=0.1)
    values = np.array([rate(t) for t in range(100)])
    np.testing.assert_allclose(values[:5], 2.0 * np.arange(1, 6) / 5, rtol=1e-6)
    for start in (25, 50, 75):
        assert values[start] < 0.15 * values[start - 1]
        assert np.all(np.diff(values[start : start + 10]) > 0)
    plain = 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (np.arange(100) - 5) / 95)))
    np.testing.assert_allclose(values[10:25], plain[10:25], rtol=1e-5)
    np.testing.assert_allclose(values[60:75], plain[60:75], rtol=1e-5)
    slow = jagged_cosine(1.0, 400, 50, warmup=200, rewarm=10, floor=1.0)
    np.testing.assert_allclose([slow(49), slow(50), slow(59), slow(60)], [0.25, 0.1, 0.3, 0.305], rtol=1e-6)
    with pytest.raises(ValueError, match="warmup must be 0 to 9, fewer than steps"):
        jagged_cosine(1.0, 10, 5, warmup=10)
    with pytest.raises(ValueError, match="rewarm must be 1 to every=5"):
        jagged_cosine(1.0, 10, 5)


@pytest.mark.parametrize(
    "method,settings,message",
    [
        ("lora", {}, "is no chain and has nothing to restart: use method='cola'"),
        ("asym", {}, "use method='rac'"),
        ("dora", {}, "use one of rac, cola, relora"),
        (
            "rac",
            {"on_boundary": "rotate"},
            "on_boundary must be one of .*rotating moments is done by odjax.rac_lora",
        ),
        ("rac", {"pruned": 0.5}, "pruned= goes with on_boundary='prune_random'"),
        ("relora", {"pruned": 1.5}, r"pruned must be in \(0, 1\], got 1.5"),
        ("rac", {"every": 0}, "every must be at least 1, got 0"),
    ],
)
def test_restarts_that_cannot_be_are_refused(method, settings, message):
    with pytest.raises(ValueError, match=message):
        restart(model_of(method), **{"every": 2, **settings})


def test_a_tree_of_another_structure_is_refused():
    model, trace = run("rac", "reset")
    params, state = trace[0]
    paths = [path for path, _ in leaves_with_paths(params)]
    assert "kernel" in paths
    with pytest.raises(ValueError, match="does not fit a weight"):
        next_block(model, {**params, "kernel": jnp.ones((7, 4))}, KEY)
    both = adapt(nn.Dense(4), rank=2, method="cola")
    odd = {**both.init(KEY, X)["params"], "lora_b": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match=r"lora_a \[6, 2\] has rank 2 and lora_b \[3, 4\] rank 3 beside"):
        next_block(both, odd, KEY)
    with pytest.raises(ValueError, match="selects no leaf"):
        run_edit(restart(model, every=1), KEY, 1, {"kernel": params["kernel"]}, state)
