"""The baselines keep what their papers keep, and grow what they grow."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.sparse.mask_trees import apply_masks
from odjax.sparse.masks import NM, unpack
from odjax.sparse.methods import gmp, granet, mest, rigl, set_, static
from odjax.sparse.one_shot import magnitude_masks, snip_masks, ste
from odjax.sparse.plans import LeafPlan, uniform
from odjax.sparse.removal import keep_count
from odjax.sparse.schedules import ems, staged

KEY = jax.random.key(5)
RNG = np.random.default_rng(1)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(8, 5)), jnp.float32), "b": jnp.ones(5)}
SLOPE = {"w": jnp.asarray(RNG.normal(size=(8, 5)), jnp.float32), "b": jnp.ones(5)}
PLAN = uniform(PARAMS, 0.75)  # 10 of 40 links


def run(tx, steps):
    """Masks and weights before every update, and after the last; the gradient is always the same."""
    update = jax.jit(tx.update)
    params, state, masks, weights = PARAMS, tx.init(PARAMS), [], []
    for step in range(steps + 1):
        masks.append(np.asarray(unpack(state.masks["w"], (8, 5))))
        weights.append(np.asarray(params["w"]))
        if step < steps:
            updates, state = update(SLOPE, state, params)
            params = optax.apply_updates(params, updates)
    return masks, weights


def best(scores, count, among):
    order = np.argsort(np.where(among, -np.asarray(scores), np.inf).ravel(), kind="stable")
    return np.isin(np.arange(scores.size), order[:count]).reshape(scores.shape)


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest():
    masks, weights = run(rigl(optax.sgd(0.01), PLAN, key=KEY, end=8, interval=2, zeta=0.6), 10)
    slope = np.abs(np.asarray(SLOPE["w"]))
    for step, drops in ((2, 5), (4, 3), (6, 0), (8, 0)):  # floor(10 * 0.3 (1 + cos(pi step / 8)))
        kept = best(np.abs(weights[step - 1]) * masks[step - 1], 10 - drops, masks[step - 1])
        np.testing.assert_array_equal(masks[step], kept | best(slope, drops, ~kept))
    np.testing.assert_array_equal(masks[8], masks[10])


def test_set_grows_every_absent_link_with_the_same_probability():
    tx = set_(optax.sgd(0.0), PLAN, key=KEY, zeta=0.5, interval=1, skip_step=False)
    first = jnp.arange(40).reshape(8, 5) < 10
    state = set_(optax.sgd(0.0), PLAN, key=KEY, masks={"w": first}).init(PARAMS)
    draws = 600

    @jax.jit
    @jax.vmap
    def grown(key):
        _, after = tx.update(SLOPE, state._replace(key=jax.random.key_data(key)), PARAMS)
        return unpack(after.masks["w"], (8, 5))

    masks = np.asarray(grown(jax.random.split(KEY, draws)))
    kept = best(np.abs(np.asarray(PARAMS["w"])), 5, np.asarray(first))
    assert masks[:, kept].all()
    counts = masks.sum(0)[~kept]
    assert counts.sum() == 5 * draws
    # 35 cells, each hit with p = 1/7; drawing without replacement makes the variance 1 - 1/35 smaller.
    p = 5 / 35
    statistic = ((counts - draws * p) ** 2 / (draws * p * (1 - p))).sum() * 34 / 35
    assert 12 < statistic < 68  # chi-square with 34 degrees of freedom: 0.1 % is cut off on either side
    other = np.corrcoef(masks[:, ~kept].T.astype(float))
    assert abs(other[np.triu_indices(35, 1)].mean() + 1 / 34) < 0.01


def test_em_prunes_to_the_lower_density_and_grows_back_to_the_plan():
    lower = staged((0.15, 0.2, 0.25), (3, 5))  # 6, 8 and 10 of 40
    masks, weights = run(mest(optax.sgd(0.01), PLAN, key=KEY, end=6, lower=lower, interval=2, weight=0.5), 6)
    score = np.abs(np.asarray(SLOPE["w"])) / 2
    for step, keep in ((2, 6), (4, 8), (6, 10)):
        kept = best(np.abs(weights[step - 1]) + score, keep, masks[step - 1])
        assert (kept <= masks[step]).all()
        assert masks[step].sum() == 10
    np.testing.assert_array_equal(masks[6], masks[5])


@pytest.mark.parametrize("lower, keep", [(0.2, 8), (0.15, 6), (0.25, 10)])
def test_mest_keeps_exactly_the_lower_density(lower, keep):
    tx = mest(optax.sgd(0.0), PLAN, key=KEY, end=9, lower=lower, weight=0.0, interval=1, skip_step=False)
    first = jnp.arange(40).reshape(8, 5) % 4 == 0
    state = set_(optax.sgd(0.0), PLAN, key=KEY, masks={"w": first}).init(PARAMS)
    update = jax.jit(jax.vmap(lambda key: tx.update(SLOPE, state._replace(key=key), PARAMS)[1].masks["w"]))
    masks = jax.vmap(lambda words: unpack(words, (8, 5)))(
        update(jax.random.key_data(jax.random.split(KEY, 200)))
    )
    # What 200 random growths have in common is what was kept.
    common = np.asarray(masks).all(0)
    np.testing.assert_array_equal(common, best(np.abs(np.asarray(PARAMS["w"])), keep, np.asarray(first)))


def test_em_and_s_comes_down_to_the_plan_from_above():
    tx = mest(
        optax.sgd(0.01), PLAN, key=KEY, end=10, lower=0.25, upper=ems(0.25, 10, above=(0.25, 0.1)), interval=2
    )
    masks, weights = run(tx, 10)
    assert [int(mask.sum()) for mask in masks[::2]] == [20, 20, 20, 14, 14, 10]
    for step in (2, 6, 8, 10):
        size = np.abs(weights[step - 1]) + 0.01 * np.abs(np.asarray(SLOPE["w"]))
        assert (best(size, 10, masks[step - 1]) <= masks[step]).all()


def test_gmp_removes_the_smallest_and_nothing_comes_back():
    masks, weights = run(gmp(optax.sgd(0.01), PLAN, key=KEY, end=8, interval=2), 9)
    counts = [int(mask.sum()) for mask in masks]
    assert counts[0] == counts[1] == 40
    assert counts[8] == counts[9] == 10
    assert counts[2::2] == [round(10 + 30 * (1 - step / 8) ** 3) for step in (2, 4, 6, 8)]
    for before, after in itertools.pairwise(masks):
        assert (after <= before).all()
    small = np.abs(weights[2])[~masks[2]]
    assert (small == 0).all()
    one_step = np.abs(weights[1] - 0.01 * np.asarray(SLOPE["w"]))
    np.testing.assert_array_equal(masks[2], best(one_step, counts[2], masks[1]))
    assert (weights[2] != weights[1])[masks[2]].all()  # pruning does not replace the optimizer's step


def test_granet_follows_the_density_and_regrows_as_much_as_it_drops_again():
    masks, weights = run(granet(optax.sgd(0.01), PLAN, key=KEY, end=8, interval=2), 9)
    counts = [int(mask.sum()) for mask in masks]
    assert counts[0] == 20
    assert counts[2::2] == [round(10 + 10 * (1 - step / 8) ** 3) for step in (2, 4, 6, 8)]
    drops = int(counts[2] * 0.25 * (1 + np.cos(np.pi / 4)))
    kept = best(np.abs(weights[1]), counts[2] - drops, masks[1])
    np.testing.assert_array_equal(masks[2], kept | best(np.abs(np.asarray(SLOPE["w"])), drops, ~kept))
    assert (masks[2] & ~masks[1]).any()


def test_a_static_mask_stays_and_may_be_snips():
    masks = jax.jit(lambda p, g: snip_masks(p, g, PLAN))(PARAMS, SLOPE)
    found, weights = run(static(optax.sgd(0.01), PLAN, key=KEY, masks=masks), 3)
    for mask, weight in zip(found, weights, strict=True):
        np.testing.assert_array_equal(mask, masks["w"])
        if weight is not weights[0]:
            assert (weight[~mask] == 0).all()
    saliency = np.abs(np.asarray(PARAMS["w"] * SLOPE["w"]))
    np.testing.assert_array_equal(masks["w"], best(saliency, 10, np.ones((8, 5), bool)))


@functools.cache
def forward_and_back(links):
    plan = {"w": LeafPlan((8, 5), links)}

    @jax.jit
    def call(params, back):
        masked, pull = jax.vjp(functools.partial(ste, masks=plan), params)
        return masked, pull(back)[0], magnitude_masks(params, plan)

    return call


@given(seed=st.integers(0, 1000), links=st.sampled_from([1, 17, 40]))
def test_straight_through_masks_are_exact_forward_and_the_identity_backward(seed, links):
    w = np.random.default_rng(seed).normal(size=(8, 5)).astype(np.float32) * 10
    params = {"w": jnp.asarray(w), "b": jnp.ones(5)}
    mask = best(np.abs(w), links, np.ones((8, 5), bool))
    back = {
        "w": jnp.asarray(np.random.default_rng(seed + 1).normal(size=(8, 5)), jnp.float32),
        "b": jnp.ones(5),
    }
    masked, pulled, masks = forward_and_back(links)(params, back)
    np.testing.assert_array_equal(masked["w"], np.where(mask, w, 0))
    np.testing.assert_array_equal(masked["w"], apply_masks(params, masks)["w"])
    np.testing.assert_array_equal(pulled["w"], back["w"])


def test_a_pruned_weight_comes_back_straight_through():
    plan, params = {"w": LeafPlan((1, 2), 1)}, {"w": jnp.array([[1.0, 0.9]])}
    loss = lambda p: jnp.sum((ste(p, plan)["w"] - jnp.array([[0.0, 3.0]])) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    for _ in range(3):
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient(params))
    assert float(ste(params, plan)["w"][0, 1]) > 1
    assert float(ste(params, plan)["w"][0, 0]) == 0


def test_straight_through_takes_a_traced_density_a_structure_or_a_function():
    masked = jax.jit(lambda d: ste(PARAMS, PLAN, density=d)["w"])
    for density, count in ((1.0, 40), (0.5, 20), (0.25, 10)):
        assert int((masked(jnp.float32(density)) != 0).sum()) == count
    groups = jax.jit(lambda p: ste(p, uniform(PARAMS, structure=NM(2, 4)))["w"])(PARAMS)
    assert (np.asarray(groups != 0).reshape(2, 4, 5).sum(1) == 2).all()
    positive = ste(PARAMS, lambda path, w: w > 0 if path == "w" else None)
    np.testing.assert_array_equal(positive["w"], np.maximum(PARAMS["w"], 0))
    np.testing.assert_array_equal(positive["b"], PARAMS["b"])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: snip_masks(PARAMS, None, PLAN), r"needs the gradient of 'w' with shape \(8, 5\), got None"),
        (lambda: snip_masks(PARAMS, {"w": jnp.ones((5, 8))}, PLAN), r"shape \(8, 5\), got \(5, 8\)"),
        (lambda: magnitude_masks({"v": PARAMS["w"]}, PLAN), r"names 'w', which the parameters do not have"),
        (lambda: ste(PARAMS, lambda path, w: w[0] > 0), r"the mask of 'b' has shape \(\), the leaf \(5,\)"),
        (lambda: ste(PARAMS, lambda path, w: w > 0, density=0.5), r"\['density'\] are options of plans"),
        (lambda: rigl(optax.sgd(0.1), PLAN, key=KEY, end=50), r"end=50 is a multiple of interval=100"),
        (lambda: rigl(optax.sgd(0.1), PLAN, key=KEY, end=500, zeta=1.2), r"value must be between 0 and 1"),
        (lambda: gmp(optax.sgd(0.1), PLAN, key=KEY, end=500, start=500), r"end must come after start"),
        (lambda: mest(optax.sgd(0.1), PLAN, key=KEY, end=500, lower=0.0), r"lower must be a density above 0"),
        (
            lambda: mest(optax.sgd(0.1), PLAN, key=KEY, end=500, lower=0.1, upper=2),
            r"upper must be a density",
        ),
        (lambda: set_(optax.sgd(0.1), PLAN, key=KEY, interval=0), r"interval must be a whole number"),
    ],
)
def test_bad_input_says_what_was_needed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_lower_density_of_mest_is_exact_for_large_leaves(monkeypatch):
    seen = {}
    monkeypatch.setattr("odjax.sparse.methods.dst", lambda *a, **options: seen.update(options))
    big = {"w": LeafPlan((10_000, 10_000), 10_000_000)}
    mest(optax.sgd(0.1), big, key=jax.random.key(0), end=100, lower=0.08)
    assert keep_count(10_000_000, seen["zeta"]) == 8_000_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda **o: granet(optax.sgd(0.1), PLAN, density=0.01, **o), "density=0.01 at the start is below"),
        (lambda **o: gmp(optax.sgd(0.1), PLAN, density=0.01, **o), "density=0.01 at the start is below"),
    ],
)
def test_a_density_below_the_plan_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(key=jax.random.key(0), end=100, interval=10)
