"""The engine: exact zeros, exact counts, the inner optimizer untouched, whatever that optimizer is."""

import itertools
import math
import re
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from odjax.core.optimizer_state import map_params_state
from odjax.core.paths import leaves_with_paths
from odjax.sparse.engine import DstState, dst
from odjax.sparse.mask_trees import apply_masks, check_masks
from odjax.sparse.masks import NM, Block, Channel, links, pack, unpack
from odjax.sparse.plans import LeafPlan, target_links, uniform
from odjax.sparse.schedules import cubic

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
PARAMS = {
    "body": {"kernel": RNG.normal(size=(8, 6)).astype(np.float32), "bias": np.ones(6, np.float32)},
    "head": RNG.normal(size=(6, 4)).astype(np.float32),
}
GOAL = jax.tree.map(lambda p: RNG.normal(size=p.shape).astype(np.float32), PARAMS)
PATH = "body/kernel"
PLAN = uniform(PARAMS, 0.75, where=PATH)


def magnitude(layer):
    return jnp.abs(layer.w)


def slope(layer):
    return jnp.abs(layer.gradient)


def noise(layer):
    return jax.random.bits(layer.key, layer.w.shape)


def lenient(inner):
    """optax promotes int32 counts to floats."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra)

    def init(params):
        with jax.numpy_dtype_promotion("standard"):
            return inner.init(params)

    return optax.GradientTransformationExtraArgs(init, update)


def engine(inner=None, plan=PLAN, **options):
    options = {"drop": magnitude, "grow": slope, "zeta": 0.5, "interval": 3, "key": KEY} | options
    return dst(lenient(optax.sgd(0.1)) if inner is None else inner, plan, **options)


def gradients(params):
    return jax.tree.map(lambda p, goal: p - goal, params, GOAL)


def run(tx, steps, params=PARAMS):
    """States and parameters after every update."""

    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    found = [(params, state)]
    for _ in range(steps):
        found.append(step(*found[-1]))
    assert len(traces) == 1
    return found


def mask_of(state, path=PATH, shape=(8, 6)):
    return np.asarray(unpack(state.masks[path], shape))


LABELS = {"body": {"kernel": "a", "bias": "b"}, "head": "b"}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "lion": lambda: optax.lion(0.01),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "muon": lambda: contrib.muon(0.1),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "masked": lambda: optax.masked(optax.adam(0.1), jax.tree.map(lambda label: label == "a", LABELS)),
    "multi_transform": lambda: optax.multi_transform({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, LABELS),
    "schedule_free": lambda: contrib.schedule_free_adamw(0.1),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_moments_of_absent_links_are_zero_with(name):
    inner = lenient(OPTIMIZERS[name]())
    follow = jax.jit(inner.update)
    found = run(engine(inner), 7)
    changed = 0
    for step in range(1, 8):
        (before, old), (after, new) = found[step - 1], found[step]
        mask, was = mask_of(new), mask_of(old)
        assert mask.sum() == 12
        kernel = np.asarray(after["body"]["kernel"])
        assert (kernel[~mask] == 0).all()

        def absent(path, param, leaf, mask=mask):
            if path == PATH:
                assert (np.asarray(leaf)[~mask] == 0).all()
            return leaf

        map_params_state(absent, new.inner, after)
        if step % 3 == 0:
            changed += (mask != was).sum()
            np.testing.assert_array_equal(
                kernel[mask & was], np.asarray(before["body"]["kernel"])[mask & was]
            )
            np.testing.assert_array_equal(kernel[mask & ~was], 0)
            np.testing.assert_array_equal(after["head"], before["head"])
            continue
        np.testing.assert_array_equal(mask, was)
        # The inner optimizer by itself, on what it should see.
        seen = apply_masks(before, old.masks)
        own = apply_masks(gradients(before), old.masks)
        updates, state = follow(own, old.inner, seen)
        by_itself = optax.apply_updates(seen, updates)
        for path, leaf in leaves_with_paths(by_itself):
            got = np.asarray(dict(leaves_with_paths(after))[path])
            where = mask if path == PATH else np.ones(leaf.shape, bool)
            np.testing.assert_allclose(got[where], np.asarray(leaf)[where], rtol=2e-6, atol=1e-7)
        for got, want in zip(jax.tree.leaves(new.inner), jax.tree.leaves(state), strict=True):
            where = mask if np.shape(got) == (8, 6) else np.ones(np.shape(got), bool)
            np.testing.assert_allclose(np.asarray(got)[where], np.asarray(want)[where], rtol=2e-6, atol=1e-7)
    assert changed > 0


@pytest.fixture(scope="module")
def rewired():
    """One update that changes links, with a traced zeta and any state."""
    tx = {}

    @jax.jit
    def update(params, state, zeta):
        tx["made"] = engine(zeta=zeta, interval=1, skip_step=False, drop=magnitude, grow=slope)
        grads = jax.tree.map(lambda p, goal: 10 * goal, params, GOAL)
        return tx["made"].update(grads, state, params)

    return update


@given(seed=st.integers(0, 99), zeta=st.floats(0, 1))
def test_the_smallest_links_go_and_the_steepest_absent_ones_come(rewired, seed, zeta):
    old = np.random.default_rng(seed).permutation(np.arange(48) < 12).reshape(8, 6)
    state = engine(interval=1, skip_step=False, masks={PATH: jnp.asarray(old)}).init(PARAMS)
    updates, after = rewired(PARAMS, state, jnp.float32(zeta))
    new = mask_of(after)
    drops = math.floor(12 * Fraction(float(np.float32(zeta))))
    grad = 10 * GOAL["body"]["kernel"]
    moved = np.where(old, PARAMS["body"]["kernel"] - np.float32(0.1) * grad, 0)
    order = np.argsort(np.where(old, -np.abs(moved), np.inf).ravel(), kind="stable")
    kept = np.isin(np.arange(48), order[: 12 - drops]).reshape(8, 6)
    slopes = np.argsort(np.where(kept, np.inf, -np.abs(grad)).ravel(), kind="stable")
    grown = np.isin(np.arange(48), slopes[:drops]).reshape(8, 6)
    np.testing.assert_array_equal(new, kept | grown)
    assert (new != old).sum() <= 2 * drops
    kernel = np.asarray(PARAMS["body"]["kernel"] + updates["body"]["kernel"])
    np.testing.assert_allclose(kernel, np.where(new & old, moved, 0), rtol=1e-5, atol=1e-6)


def test_no_share_to_replace_leaves_masks_alone_and_is_a_static_mask():
    for still in (engine(zeta=0.0), engine(zeta=lambda step: jnp.float32(0))):
        assert (mask_of(run(still, 4)[-1][1]) == mask_of(run(still, 4)[0][1])).all()
    static = run(engine(drop=None, grow=None), 4)[-1]
    moving = run(engine(zeta=0.0, skip_step=False), 4)[-1]
    for got, want in zip(jax.tree.leaves(moving[0]), jax.tree.leaves(static[0]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_links_change_at_multiples_of_the_interval_between_start_and_end_only():
    found = run(engine(grow=noise, start=3, end=7, interval=2), 10)
    masks = [mask_of(state) for _, state in found]
    moved = [i for i in range(1, 11) if (masks[i] != masks[i - 1]).any()]
    assert moved == [4, 6]


def test_stacked_layers_have_their_count_each():
    params = {"layers": {"kernel": RNG.normal(size=(3, 8, 5)).astype(np.float32)}}
    tx = engine(plan=uniform(params, 0.7), grow=noise, interval=2)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        before = state
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        mask = unpack(state.masks["layers/kernel"], (3, 8, 5))
        assert links(mask, batch_dims=1).tolist() == [12, 12, 12]
        assert (np.asarray(params["layers"]["kernel"])[~np.asarray(mask)] == 0).all()
    fresh = np.asarray(mask) & ~np.asarray(unpack(before.masks["layers/kernel"], (3, 8, 5)))
    assert fresh.any(axis=(1, 2)).all()
    assert (fresh[0] != fresh[1]).any()


@pytest.mark.parametrize(
    "structure", [NM(2, 4), NM(1, 2, axis=-1), Block(2, 3), Block(4, 2, "max"), Channel()]
)
def test_groups_move_and_stay_whole(structure):
    share = None if isinstance(structure, NM) else 0.5
    plan = uniform(PARAMS, share, where=PATH, structure=structure)
    found = run(engine(plan=plan, grow=noise, interval=2, zeta=0.5), 4)
    for _, state in found:
        mask = mask_of(state)
        assert mask.sum() == plan[PATH].links
        if isinstance(structure, NM):
            groups = np.moveaxis(mask, structure.axis, -1).reshape(-1, structure.m)
            assert (groups.sum(1) == structure.n).all()
        elif isinstance(structure, Block):
            h, w = structure.rows, structure.columns
            tiles = mask.reshape(8 // h, h, 6 // w, w).transpose(0, 2, 1, 3).reshape(-1, h * w)
            assert (tiles == tiles[:, :1]).all()
        else:
            assert (mask == mask[:1]).all()
    assert (mask_of(found[-1][1]) != mask_of(found[0][1])).any()


@pytest.mark.parametrize("structure", [None, Block(2, 3)])
def test_a_falling_density_only_removes_links_and_ends_at_the_plan(structure):
    plan = uniform(PARAMS, 0.75, where=PATH, structure=structure)
    # The schedule ends after the last update that changes links; the plan is reached all the same.
    tx = engine(plan=plan, grow=None, density=cubic(1.0, 0.25, 0, 20), interval=2, end=9)
    found = run(tx, 10)
    masks = [mask_of(state) for _, state in found]
    assert masks[0].all()
    for before, after in itertools.pairwise(masks):
        assert (after <= before).all()
    assert masks[7].sum() > masks[8].sum() == plan[PATH].links == masks[10].sum()


def test_n_m_groups_follow_a_density_too():
    plan = uniform(PARAMS, where=PATH, structure=NM(1, 4))
    tx = engine(plan=plan, grow=noise, zeta=0.3, density=cubic(1.0, 0.25, 0, 6), interval=2, end=6)
    counts = []
    for _, state in run(tx, 6)[::2]:
        groups = mask_of(state).reshape(2, 4, 6).sum(1)
        assert (groups == groups[0, 0]).all()
        counts.append(int(groups[0, 0]))
    assert counts[0] == 4
    assert counts[-1] == 1
    assert counts == sorted(counts, reverse=True)


@given(links=st.integers(1, 500), density=st.floats(0, 1))
def test_leaves_follow_the_density_of_the_whole_in_proportion(links, density):
    leaf = LeafPlan((20, 25), links)
    planned = links / 500
    found = int(target_links(leaf, jnp.float32(density), planned))
    assert links <= found <= 500
    if density > planned:
        assert found == pytest.approx(density * 500, abs=0.51)
    assert int(target_links(leaf, jnp.float32(1), planned)) == 500
    assert int(target_links(leaf, jnp.float32(planned), planned)) == links


def test_percolation_runs_after_the_drop_and_growth_refills_to_the_target():
    def percolate(masks):
        return {path: mask.at[:, 0].set(False) for path, mask in masks.items()}

    def grow(layer):
        # Column 1, but nothing at all where growth saw the links that percolation took.
        return jnp.where((jnp.arange(6) == 1)[None] & ~layer.mask[:, :1], 1.0, 0.0)

    full = jnp.zeros((8, 6), bool).at[:, 0].set(True).at[:4, 2].set(True)
    tx = engine(masks={PATH: full}, percolate=percolate, grow=grow, zeta=0.0, interval=1, skip_step=False)
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(mask_of(state), full.at[:, 0].set(False).at[:, 1].set(True))


def test_a_link_that_comes_back_starts_from_its_history():
    first = jnp.zeros((8, 6), bool).at[:2].set(True)

    def rows(low):
        return lambda layer: jnp.where(
            (jnp.arange(8)[:, None] // 2 == low(layer.step)) & (layer.w == layer.w), 1.0, 0.0
        )

    # Every second update all links move: to rows 2-3, and back to rows 0-1.
    tx = engine(
        masks={PATH: first},
        drop=magnitude,
        grow=rows(lambda step: (step // 2) % 2),
        zeta=1.0,
        interval=2,
        init_new="history",
    )
    found = run(tx, 5)
    kernel = [np.asarray(params["body"]["kernel"]) for params, _ in found]
    assert mask_of(found[2][1])[2:4].all()
    np.testing.assert_array_equal(kernel[2][2:4], 0)
    assert mask_of(found[4][1])[:2].all()
    np.testing.assert_array_equal(kernel[4][:2], kernel[1][:2])
    assert (kernel[4][2:] == 0).all()


def test_bfloat16_weights_and_gradients_give_exact_zeros():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    tx = engine(lenient(optax.adam(0.1)), interval=2)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(jax.tree.map(lambda p: p + 1, params), state, params)
        params = optax.apply_updates(params, updates)
        assert params["body"]["kernel"].dtype == jnp.bfloat16
        kernel = np.asarray(params["body"]["kernel"].astype(jnp.float32))
        assert (kernel[~mask_of(state)] == 0).all()


def test_masks_are_the_same_on_one_and_on_eight_devices():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"kernel": RNG.normal(size=(16, 24)).astype(np.float32)}
    grads = {"kernel": RNG.normal(size=(16, 24)).astype(np.float32)}
    tx = engine(lenient(optax.adam(0.1)), plan=uniform(params, 0.8), grow=noise, interval=2)
    update = jax.jit(tx.update)
    results = []
    for spec in (PartitionSpec(), PartitionSpec(None, "x")):
        put = lambda tree, spec=spec: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
        p, g = put(params), put(grads)
        state = jax.jit(tx.init)(p)
        for _ in range(4):
            updates, state = update(g, state, p)
            p = optax.apply_updates(p, updates)
        results.append((p["kernel"], state.masks["kernel"]))
    np.testing.assert_array_equal(results[0][1], results[1][1])
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)
    assert not results[1][0].sharding.is_fully_replicated
    # Only counts travel: no weight, score or mask is gathered.
    compiled = update.lower(p, state, p).compile().as_text()
    sent = re.findall(r"= (\S+?)\[\S* (?:all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled)
    assert sent
    assert set(sent) <= {"u32", "s32"}
    assert "all-gather" not in compiled


@pytest.mark.parametrize("name", ["chain", "multi_transform", "multi_steps", "masked"])
def test_it_composes_with_the_wrappers_of_optax(name):
    made = {
        "chain": lambda: optax.chain(optax.scale(2.0), engine(interval=2)),
        "multi_transform": lambda: optax.multi_transform(
            {"a": engine(interval=2), "b": optax.sgd(0.1)}, LABELS
        ),
        "multi_steps": lambda: optax.MultiSteps(engine(interval=2), 2).gradient_transformation(),
        "masked": lambda: optax.masked(engine(interval=2), jax.tree.map(lambda label: label == "a", LABELS)),
    }[name]()
    params, state = run(lenient(made), 4)[-1]
    (words,) = [w for p, w in leaves_with_paths(state) if p.endswith(f"masks/{PATH}")]
    mask = np.asarray(unpack(words, (8, 6)))
    assert mask.sum() == 12
    assert (np.asarray(params["body"]["kernel"])[~mask] == 0).all()


def test_parameters_may_be_in_boxes():
    def boxed(tree):
        return jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), tree)

    tx = engine(lenient(optax.adam(0.1)))
    params, plain = boxed(PARAMS), PARAMS
    state, other, update = tx.init(params), tx.init(plain), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(boxed(GOAL), state, params)
        params = optax.apply_updates(params, updates)
        updates, other = update(GOAL, other, plain)
        plain = optax.apply_updates(plain, updates)
    assert jax.tree.structure(params) == jax.tree.structure(boxed(PARAMS))
    np.testing.assert_array_equal(state.masks[PATH], other.masks[PATH])
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(got, want)


def test_restored_masks_are_checked_against_the_plan():
    state = engine().init(PARAMS)
    check_masks(state.masks, PLAN)
    with pytest.raises(
        ValueError, match=r"'body/kernel' has 12 links, the plan 24: it was made with another"
    ):
        check_masks(state.masks, uniform(PARAMS, 0.5, where=PATH))
    check_masks(state.masks, uniform(PARAMS, 0.5, where=PATH), exact=False)
    with pytest.raises(ValueError, match=r"the plan have 'head' and the masks do not"):
        check_masks(state.masks, uniform(PARAMS, 0.75))
    with pytest.raises(
        ValueError, match=r"words of shape \(1, 6\), a leaf of shape \(64, 6\) needs \(2, 6\)"
    ):
        check_masks(state.masks, {PATH: LeafPlan((64, 6), 12)})


def test_the_state_is_made_from_shapes_and_keeps_its_types():
    tx = engine(init_new="history")
    shapes = jax.eval_shape(tx.init, jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS))
    state = tx.init(PARAMS)
    assert isinstance(state, DstState)
    after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)[1]
    for a, b, c in zip(*map(jax.tree.leaves, (shapes, state, after)), strict=True):
        assert a.shape == b.shape == c.shape
        assert a.dtype == b.dtype == c.dtype


WRONG = jnp.zeros((8, 6), bool)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interval": 0}, r"interval must be a whole number of updates, at least 1, got 0"),
        ({"start": -1}, r"start must be a whole number"),
        ({"start": 30, "end": 20}, r"no update from start=30 to end=20 is a multiple of interval=3"),
        ({"end": 2}, r"no update from start=0 to end=2 is a multiple of interval=3"),
        ({"interval": 1}, r"never takes a step: pass skip_step=False"),
        ({"drop": None}, r"grow without drop never changes a link"),
        ({"zeta": 1.5}, r"zeta must be between 0 and 1, got 1.5"),
        ({"density": -0.5}, r"density must be between 0 and 1, got -0.5"),
        ({"init_new": "random"}, r"init_new must be 'zero' or 'history', got 'random'"),
        ({"plan": {}}, r"the plan is empty"),
        ({"masks": {PATH: WRONG}}, r"'body/kernel' has 0 links, the plan 12"),
        ({"masks": {PATH: WRONG[:2]}}, r"must be bool\[8, 6\], got bool\[2, 6\]"),
        ({"masks": {PATH: jnp.ones((8, 6))}}, r"must be bool\[8, 6\], got float32\[8, 6\]"),
        (
            {"masks": {"w": WRONG}},
            r"must have the paths of the plan; look at 'body/kernel', which masks= lacks",
        ),
    ],
)
def test_bad_options_say_what_to_type(options, message):
    with pytest.raises(ValueError, match=message):
        engine(**options)


def test_bad_parameters_and_scores_are_named():
    with pytest.raises(TypeError, match="typed key"):
        engine(key=jnp.zeros(2, jnp.uint32))
    tx = engine()
    with pytest.raises(ValueError, match="dst needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"names 'body/kernel', which the parameters do not have"):
        tx.init({"body": {"weight": jnp.ones((8, 6))}})
    flat = engine(drop=lambda layer: jnp.abs(layer.w).sum(0))
    with pytest.raises(ValueError, match=r"a score of 'body/kernel' has shape \(6,\), the layer \(8, 6\)"):
        flat.update(PARAMS, flat.init(PARAMS), PARAMS)


def test_a_state_that_is_donated_takes_nothing_of_the_caller_with_it():
    key, mask = jax.random.key(5), jnp.arange(48).reshape(8, 6) < 12
    tx = engine(key=key, masks={PATH: mask})
    jax.jit(lambda state: state, donate_argnums=0)(tx.init(PARAMS))
    assert not any(x.is_deleted() for x in (jax.random.key_data(key), mask))
    tx.init(PARAMS)


def test_given_masks_may_be_drawn_by_a_function():
    def diagonal(key, leaf, count):
        assert count == leaf.links
        return jnp.eye(*leaf.shape, dtype=bool) | jnp.zeros(leaf.shape, bool).at[0].set(True).at[1, 0].set(
            True
        )

    state = engine(masks=diagonal).init(PARAMS)
    assert mask_of(state).sum() == 12
    np.testing.assert_array_equal(state.masks[PATH], pack(diagonal(KEY, PLAN[PATH], 12)))
