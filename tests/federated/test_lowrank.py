"""Low-rank methods across clients: exact means, one public rank, nothing above it, bytes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from odjax.core import combine, leaves_with_paths, partition
from odjax.federated import (
    fed_adam,
    fed_avgm,
    group_by_client,
    init,
    make_round,
    plan_round,
    private_sum,
    scaffold,
)
from odjax.federated.dylora import dp_dylora, draw_rank, fed_dylora
from odjax.federated.lowrank import chain_round, fed_low_rank
from odjax.federated.traffic import Traffic, traffic
from odjax.lowrank import FACTORS, adapt, merge, next_block
from odjax.lowrank.nested import at_rank, model_at, rank_mask
from odjax.privacy import privacy_plan

KEY = jax.random.key(0)
R, IN, OUT = 4, 6, 5
SIZES = (4, 7, 3)


@functools.cache
def clients():
    random = np.random.default_rng(0)
    owner = np.repeat(np.arange(len(SIZES)), SIZES)
    x = random.normal(size=(len(owner), IN)).astype(np.float32)
    # Clients want different maps, so that their factors differ.
    maps = random.normal(size=(len(SIZES), IN, OUT)).astype(np.float32)
    return group_by_client({"x": x, "y": np.einsum("ni,nio->no", x, maps[owner])}, owner)


def loss(model, params, batch, mask, key):
    error = jnp.square(model.apply({"params": params}, batch["x"]) - batch["y"])
    counts = mask.astype(jnp.float32)
    return {"loss": (jnp.sum(counts * jnp.mean(error, -1)), jnp.sum(counts))}


def model_of(method="lora", rank=R, **settings):
    return adapt(nn.Dense(OUT), rank=rank, method=method, **{"alpha": 3.0, **settings})


def started(model, seed=0):
    """Parameters as after some training: no factor is zero but those of a chain."""
    params = model.init(jax.random.key(seed), jnp.ones((1, IN)))["params"]
    free, frozen = partition(params, FACTORS)
    if model.spec.method in ("lora", "dylora"):
        free = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), free)
    return free, frozen


def planned(ids=(0, 1, 2), round=0, **settings):
    return plan_round(clients(), list(ids), round, **{"batch": 2, "seed": 0, "lanes": 2, **settings})


def one_round(model, algorithm, free, frozen, ids=(0, 1, 2)):
    round = jax.jit(make_round(algorithm))
    return round(init(algorithm, free, 3), clients().examples, planned(ids), KEY, frozen)[0]


def merged_mean(model):
    """(the round's merged weight, the weighted mean of the merged weights of each client alone)."""
    algorithm = fed_low_rank(model, loss, optax.sgd(0.1))
    free, frozen = started(model)

    def weight(ids):
        return merge(model, combine(one_round(model, algorithm, free, frozen, ids).params, frozen))["kernel"]

    alone = [np.asarray(weight([i]), np.float64) for i in range(3)]
    return np.asarray(weight([0, 1, 2])), np.average(alone, axis=0, weights=SIZES)


@pytest.mark.parametrize("method,settings", [("rac", {"side": "left"}), ("rac", {}), ("lora_fa", {})])
def test_with_one_half_frozen_the_mean_of_factors_is_the_mean_of_models(method, settings):
    together, mean = merged_mean(model_of(method, rank=2, **settings))
    np.testing.assert_allclose(together, mean, rtol=1e-5, atol=1e-6)


def test_with_both_factors_trained_it_is_not():
    together, mean = merged_mean(model_of("lora", rank=2))
    assert np.abs(together - mean).max() > 1e-3


def test_merging_the_mean_factor_is_the_mean_of_merges_to_the_last_bits_of_float64():
    with jax.enable_x64(True):
        model = adapt(nn.Dense(OUT, param_dtype=jnp.float64), rank=2, method="rac", dtype=jnp.float64)
        params = model.init(KEY, jnp.ones((1, IN), jnp.float64))["params"]
        free, frozen = partition(params, FACTORS)
        several = [
            jax.tree.map(lambda z, i=i: jax.random.normal(jax.random.key(i), z.shape, z.dtype), free)
            for i in range(5)
        ]
        mean = jax.tree.map(lambda *z: sum(z) / 5, *several)
        exact = next_block(model, combine(mean, frozen), KEY)["kernel"]
        each = [next_block(model, combine(z, frozen), KEY)["kernel"] for z in several]
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(exact, sum(each) / 5, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("server", [None, fed_adam(0.1)], ids=["sgd", "adam"])
def test_a_chain_merges_after_every_round_and_begins_with_another_sketch(server):
    model = model_of("rac", rank=2)
    algorithm = fed_low_rank(model, loss, optax.sgd(0.1), server)
    free, frozen = started(model)
    start = init(algorithm, free, 3)
    round = jax.jit(chain_round(model, algorithm))
    state, after, _ = round(start, frozen, clients().examples, planned(), KEY)
    plain = one_round(model, algorithm, free, frozen)
    np.testing.assert_allclose(
        after["kernel"], merge(model, combine(plain.params, frozen))["kernel"], rtol=1e-6, atol=1e-6
    )
    assert not any(np.any(z) for z in jax.tree.leaves(state.params))
    assert np.asarray(after["lora_sketch"]).tolist()[2] == 1
    assert state.round == 1
    # The moments start as they did, which is not at zero for Adam of the paper.
    jax.tree.map(np.testing.assert_array_equal, state.server, start.server)
    state, again, _ = round(state, after, clients().examples, planned(round=1), KEY)
    moved = np.asarray(again["kernel"] - frozen["kernel"], np.float64)
    assert np.linalg.matrix_rank(moved, tol=1e-4) > 2


def test_a_block_of_two_rounds_merges_after_the_second():
    model = model_of("cola", rank=2)
    algorithm = fed_low_rank(model, loss, optax.sgd(0.1))
    free, frozen = started(model)
    state, round = init(algorithm, free, 3), jax.jit(chain_round(model, algorithm, every=2))
    state, first, _ = round(state, frozen, clients().examples, planned(), KEY)
    np.testing.assert_array_equal(first["kernel"], frozen["kernel"])
    state, second, _ = round(state, first, clients().examples, planned(round=1), KEY)
    assert np.abs(second["kernel"] - frozen["kernel"]).max() > 1e-3
    assert not np.any(state.params["lora_b"])


def test_the_chain_on_a_mesh_is_the_chain_on_one_device():
    model = model_of("rac", rank=2)
    algorithm = fed_low_rank(model, loss, optax.sgd(0.1))
    free, frozen = started(model)
    mesh = jax.make_mesh((2,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    found = [
        jax.jit(chain_round(model, algorithm, mesh=mesh))(
            init(algorithm, free, 3), frozen, clients().examples, planned(), KEY
        )[1]["kernel"]
        for mesh in (None, mesh)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


def moments(state, path):
    return [leaf for p, leaf in leaves_with_paths(state) if p.endswith(path) and leaf.ndim]


def plan_of(noise_multiplier, cohort=3, clip=0.5, population=3):
    return privacy_plan(
        population=population,
        cohort=cohort,
        clip=clip,
        rounds=1,
        delta=1e-3,
        noise_multiplier=noise_multiplier,
        accountant="moments",
    )


@pytest.mark.parametrize("mode", ["nested", "frozen"])
@pytest.mark.parametrize("rank", [1, 3])
def test_nothing_above_the_rank_moves_neither_parameters_nor_moments(rank, mode):
    model = model_of()
    free, frozen = started(model)
    ranks = [float(b == rank) for b in range(1, R + 1)]
    client = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1))
    settings = {"ranks": ranks, "mode": mode}
    algorithm = dp_dylora(
        model, combine(free, frozen), loss, client, plan_of(1.0), fed_avgm(1.0, 0.9), **settings
    )
    state = init(algorithm, free, 3)
    state = state._replace(server=jax.tree.map(lambda x: x + 0.5, state.server))
    after, _ = jax.jit(make_round(algorithm))(state, clients().examples, planned(uniform=True), KEY, frozen)
    mask = rank_mask(combine(free, frozen), rank, last=mode == "frozen")
    for name in ("lora_a", "lora_b"):
        out = np.asarray(mask[name]) == 0
        assert np.any(out)
        pairs = [
            (state.params[name], after.params[name]),
            *zip(moments(state.server, name), moments(after.server, name), strict=True),
        ]
        assert len(pairs) == 2
        for old, new in pairs:
            np.testing.assert_array_equal(np.asarray(old)[out], np.asarray(new)[out])
            assert np.all(np.asarray(old)[~out] != np.asarray(new)[~out])


def test_a_round_pays_noise_for_its_rank_alone():
    model = adapt(nn.Dense(40), rank=R, alpha=3.0)
    params = model.init(KEY, jnp.ones((1, 60)))["params"]
    free, frozen = partition(params, FACTORS)
    data = group_by_client({"x": np.ones((3, 60), np.float32), "y": np.ones((3, 40), np.float32)}, [0, 1, 2])
    z, clip, cohort = 2.0, 0.5, 3
    spent = {}
    for rank in (1, R):
        # A learning rate of zero: deltas of zero, and noise is all that moves.
        algorithm = dp_dylora(model, params, loss, optax.sgd(0.0), plan_of(z, cohort, clip), rank=rank)
        state = init(algorithm, free, 3)
        plan = plan_round(data, [0, 1, 2], 0, batch=1, seed=0, uniform=True)
        after = jax.jit(make_round(algorithm))(state, data.examples, plan, KEY, frozen)[0]
        change = jax.tree.map(lambda new, old: jnp.sum(jnp.square(new - old)), after.params, free)
        spent[rank] = float(sum(jax.tree.leaves(change)))
        expected = z**2 * clip**2 * rank * (60 + 40) / cohort**2
        # A sum of d squares of normal numbers deviates by sqrt(2 / d) of its mean.
        assert abs(spent[rank] / expected - 1) < 4 * np.sqrt(2 / (rank * 100))
    assert spent[R] > 2 * spent[1]


@pytest.mark.parametrize("method,settings", [("lora", {}), ("lora_fa", {}), ("rac", {"side": "left"})])
def test_without_noise_and_clipping_a_private_round_is_the_plain_one_of_equal_weights(method, settings):
    model = model_of(method, rank=2, **settings)
    free, frozen = started(model)
    plain = fed_low_rank(model, loss, optax.sgd(0.1))
    private = fed_low_rank(model, loss, optax.sgd(0.1), aggregator=private_sum(plan_of(0.0, clip=np.inf)))
    found = []
    for algorithm in (plain, private):
        round = chain_round(model, algorithm) if method == "rac" else None
        start, plan = init(algorithm, free, 3), planned(uniform=True)
        if round is None:
            state = jax.jit(make_round(algorithm))(start, clients().examples, plan, KEY, frozen)[0]
            found.append(combine(state.params, frozen))
        else:
            state, rest, _ = jax.jit(round)(start, frozen, clients().examples, plan, KEY)
            found.append(combine(state.params, rest))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)


@pytest.mark.parametrize("server", [None, fed_adam(0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("alpha", [3.0, None])
def test_cut_clients_and_masked_ones_make_one_round(server, alpha):
    model = model_of(alpha=alpha)
    free, frozen = started(model)
    whole = combine(free, frozen)
    rank = int(draw_rank(KEY, 0, R))
    drawn = fed_dylora(model, whole, loss, optax.sgd(0.1, momentum=0.5), server)
    fixed = fed_dylora(model, whole, loss, optax.sgd(0.1, momentum=0.5), server, rank=rank)
    a, b = (one_round(model, algorithm, free, frozen) for algorithm in (drawn, fixed))
    assert rank < R
    assert np.abs(a.params["lora_a"] - free["lora_a"]).max() > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_what_is_no_factor_trains_at_every_rank_cut_or_masked():
    model = model_of()
    free, frozen = started(model)
    where = r"lora_(a|b)|bias"
    whole = combine(free, frozen)
    free, frozen = partition(whole, where)
    rank = int(draw_rank(KEY, 0, R))
    build = functools.partial(fed_dylora, model, whole, loss, optax.sgd(0.1), trainable=where)
    a, b = (one_round(model, algorithm, free, frozen).params for algorithm in (build(), build(rank=rank)))
    assert np.abs(a["bias"] - free["bias"]).max() > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_a_private_round_at_a_rank_is_the_same_on_a_mesh():
    model = model_of()
    free, frozen = started(model)
    algorithm = dp_dylora(model, combine(free, frozen), loss, optax.sgd(0.1), plan_of(1.0))
    mesh = jax.make_mesh((2,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    plan = planned(uniform=True)
    found = [
        jax.jit(make_round(algorithm, mesh=devices))(
            init(algorithm, free, 3), clients().examples, plan, KEY, frozen
        )[0].params
        for devices in (None, mesh)
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *found)


def test_at_the_full_rank_it_is_federated_lora():
    model = model_of()
    free, frozen = started(model)
    always = [0.0] * (R - 1) + [1.0]
    dylora = fed_dylora(model, combine(free, frozen), loss, optax.sgd(0.1), ranks=always)
    a = one_round(model, dylora, free, frozen)
    b = one_round(model, fed_low_rank(model, loss, optax.sgd(0.1)), free, frozen)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), a, b)


def test_a_round_at_a_rank_is_federated_lora_of_the_cut_model():
    model = model_of()
    free, frozen = started(model)
    only_two = [0.0, 1.0, 0.0, 0.0]
    dylora = fed_dylora(model, combine(free, frozen), loss, optax.sgd(0.1), ranks=only_two)
    after = one_round(model, dylora, free, frozen).params
    small = {"lora_a": free["lora_a"][:, :2], "lora_b": free["lora_b"][:2], "bias": None, "kernel": None}
    cut = model_at(model, 2)
    expected = one_round(cut, fed_low_rank(cut, loss, optax.sgd(0.1)), small, frozen).params
    np.testing.assert_allclose(after["lora_a"][:, :2], expected["lora_a"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after["lora_b"][:2], expected["lora_b"], rtol=1e-5, atol=1e-6)


def test_the_loss_gets_a_model_that_draws_no_rank_of_its_own():
    seen = []

    def looking(model, params, batch, mask, key):
        seen.append(model.spec.method)
        model.apply({"params": params}, batch["x"], rngs={"dropout": key})
        return loss(model, params, batch, mask, key)

    model = model_of("dylora")
    free, frozen = started(model)
    algorithm = fed_dylora(model, combine(free, frozen), looking, optax.sgd(0.1))
    one_round(model, algorithm, free, frozen)
    assert set(seen) == {"lora"}
    with pytest.raises(ValueError, match="draws a rank in every call, on the client"):
        fed_low_rank(model, loss, optax.sgd(0.1))


def test_ranks_are_drawn_with_their_probabilities():
    p = [0.5, 0.0, 0.3, 0.2]
    for ranks, expected in ((None, [0.25] * R), (p, p)):
        drawn = jax.vmap(lambda t, ranks=ranks: draw_rank(KEY, t, R, ranks))(jnp.arange(4000))
        share = np.bincount(np.asarray(drawn), minlength=R + 1)[1:] / 4000
        np.testing.assert_allclose(share, expected, atol=4 * 0.5 / np.sqrt(4000))
        assert share[1] > 0 or ranks is p


def test_bytes_follow_from_shapes():
    x = jnp.ones((1, IN))
    bare = nn.Dense(OUT).init(KEY, x)["params"]
    assert traffic(bare) == Traffic(4 * (IN * OUT + OUT), 4 * (IN * OUT + OUT))
    lora, both = model_of(), 4 * R * (IN + OUT)
    params = lora.init(KEY, x)["params"]
    assert traffic(params, model=lora) == Traffic(both, both)
    for b in range(1, R + 1):
        assert traffic(params, model=lora, rank=b) == Traffic(both * b // R, both * b // R)
    ffa = model_of("lora_fa")
    assert traffic(ffa.init(KEY, x)["params"], model=ffa) == Traffic(4 * R * OUT, 4 * R * OUT)
    shapes = jax.eval_shape(lambda: params)
    assert traffic(shapes, model=lora) == traffic(params, model=lora)
    assert traffic(params, r".*", model=lora) == Traffic(both + 4 * (IN + 1) * OUT, both + 4 * (IN + 1) * OUT)


def test_a_chain_sends_seeds_and_whoever_missed_rounds_gets_what_was_merged_since():
    model = adapt(nn.Dense(64), rank=2, method="rac", side="right")
    params = model.init(KEY, jnp.ones((1, 100)))["params"]
    z, q, weight = 4 * 2 * 64, 4 * 2 * 100, 4 * 64 * 100
    assert traffic(params, model=model) == Traffic(z, z + 12)
    assert traffic(params, model=model, sketches="array") == Traffic(z, z + q)
    assert traffic(params, model=model, missed=10) == Traffic(z, 10 * z + 12)
    assert traffic(params, model=model, missed=1000) == Traffic(z, weight + 12)


def test_bad_input_is_named():
    model = model_of()
    free, frozen = started(model)
    whole = combine(free, frozen)
    build = functools.partial(fed_dylora, model, whole, loss, optax.sgd(0.1))
    for ranks in ([0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [1.5, -0.5, 0.0, 0.0], [float("nan")] * 4):
        with pytest.raises(ValueError, match="ranks must be 4 probabilities"):
            build(ranks=ranks)
    for settings, message in (
        ({"rank": 0}, "whole number of at least 1"),
        ({"rank": R + 1}, "rank must be 1 to 4"),
        ({"rank": 2, "ranks": [0.25] * 4}, "give one"),
        ({"mode": "frozen", "rank": 2}, "nothing to cut"),
        ({"mode": "all"}, "nested, frozen"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**settings)
    rac = model_of("rac")
    with pytest.raises(ValueError, match="method='lora'"):
        fed_dylora(rac, whole, loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match="no chain"):
        chain_round(model, fed_low_rank(model, loss, optax.sgd(0.1)))
    with pytest.raises(ValueError, match="other sketches"):
        chain_round(rac, scaffold(lambda *_: {}, 0.1))
    for settings, message in (
        ({"model": model, "sketches": "none"}, "'seed' or 'array'"),
        ({"missed": 0}, "at least 1 round"),
        ({"rank": 2}, "pass model="),
        ({"model": model, "rank": 9}, "rank must be 1 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            traffic(whole, **settings)


def test_a_served_rank_is_what_the_round_trained():
    model = model_of()
    free, frozen = started(model)
    whole = combine(free, frozen)
    x = jnp.asarray(clients().examples["x"])
    for b in (1, R):
        served = merge(model, at_rank(model, whole, b))
        trained = model.apply({"params": at_rank(model, whole, jnp.int32(b))}, x)
        np.testing.assert_allclose(nn.Dense(OUT).apply({"params": served}, x), trained, rtol=1e-4, atol=1e-5)
