"""CHT, CHTs, CHTss: exact counts, laws of the draws, early stop, density, edits, devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from odjax.core import run_edit
from odjax.sparse import (
    ch_scores,
    cht,
    chts,
    chtss,
    keep_count,
    regrowth,
    removal,
    rigl,
    set_,
    static,
    topology_edit,
    uniform,
)
from odjax.sparse.plans import overall_density
from odjax.sparse.schedules import ems

from .hebb_cases import KEY, METHODS, PARAMS, PLAN, PLANS, RNG, TWO, layer, masks_of, run, run_of, sgd, slope


@pytest.mark.parametrize("name", METHODS)
def test_links_are_exactly_those_of_the_target_and_everything_else_is_zero_in(name):
    found, plan = run_of(name), PLANS.get(name, PLAN)
    moved = 0
    for (_, before), (params, state) in itertools.pairwise(found):
        masks, was = masks_of(state, plan), masks_of(before, plan)
        moved += sum((masks[path] != was[path]).sum() for path in plan)
        for path, leaf in plan.items():
            if "chtss" not in name:
                assert masks[path].sum() == leaf.links
            trace = state.inner[0].trace[path.split("/")[0]]["kernel"]
            weights = params[path.split("/")[0]]["kernel"]
            assert not np.asarray(weights)[~masks[path]].any()
            assert not np.asarray(trace)[~masks[path]].any()
    assert moved > 0
    last = masks_of(found[-1][1], plan)
    assert {path: mask.sum() for path, mask in last.items()} == {p: leaf.links for p, leaf in plan.items()}
    if "chtss" in name:
        assert masks_of(found[0][1])["dense_1/kernel"].sum() == 16 * 16 / 2


def test_the_first_change_is_removal_percolation_and_regrowth_by_hand():
    """With hard rules nothing is drawn, and the step can be written down."""
    start = masks_of(static(sgd(), PLAN, key=KEY).init(PARAMS))
    optimizer = chts(
        sgd(),
        PLAN,
        key=KEY,
        end=None,
        interval=2,
        zeta=0.25,
        adaptive_zeta=False,
        removal_rule="hard",
        temperature=1.0,
        regrowth_rule="top",
        masks={path: jnp.asarray(mask) for path, mask in start.items()},
    )
    (before, _), (after, state) = run(optimizer, 2)[1:]
    for path, leaf in PLAN.items():
        w = np.abs(np.asarray(before[path.split("/")[0]]["kernel"]))
        keep = keep_count(leaf.links, 0.25)
        order = np.argsort(np.where(start[path], -w, np.inf).ravel(), kind="stable")
        kept = np.isin(np.arange(w.size), order[:keep]).reshape(w.shape)
        scores = np.where(kept, -1, np.asarray(ch_scores(jnp.asarray(kept))))
        new = masks_of(state)[path]
        assert (new & kept).sum() == keep
        grown = new & ~kept
        assert scores[grown].min() >= scores[~new].max()
        # A link that was dropped and grown again keeps its weight.
        back = grown & start[path]
        got = np.asarray(after[path.split("/")[0]]["kernel"])
        np.testing.assert_array_equal(got[back], np.asarray(before[path.split("/")[0]]["kernel"])[back])
        np.testing.assert_array_equal(got[grown & ~start[path]], 0)


def test_soft_removal_draws_in_proportion_to_a_power_of_the_size():
    w = jnp.asarray([[1.0, 2.0, 0.0], [4.0, 0.0, 3.0]])
    score = removal("soft", temperature=2.0)
    keys = jax.random.split(KEY, 4000)
    first = jax.vmap(lambda key: jnp.argmax(score(layer(w != 0, w, key=key))))(keys)
    law = np.asarray(w).ravel() ** 2 / (np.asarray(w) ** 2).sum()
    share = np.bincount(np.asarray(first), minlength=6) / 4000
    assert np.abs(share - law).max() < 4 * np.sqrt(law.max() / 4000)
    hard = removal("hard")(layer(w != 0, w))
    np.testing.assert_array_equal(np.argsort(-np.asarray(hard).ravel())[:4], [3, 5, 1, 0])


def test_soft_regrowth_draws_in_proportion_to_the_scores():
    mask = RNG.random((6, 8)) < 0.3
    scores = np.asarray(ch_scores(jnp.asarray(mask))).ravel()
    assert (scores > 0).sum() >= 4
    keys = jax.random.split(KEY, 4000)
    first = jax.vmap(lambda key: jnp.argmax(regrowth("soft")(layer(mask, key=key))))(keys)
    share = np.bincount(np.asarray(first), minlength=48) / 4000
    assert np.abs(share - scores / scores.sum()).max() < 4 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize("rule", ["soft", "top"])
@given(seed=st.integers(0, 99))
def test_where_too_few_links_have_a_score_any_absent_one_may_come(rule, seed):
    mask = np.zeros((6, 8), bool)
    mask[0, :2] = mask[1, 1:3] = True  # paths of length three join 0 with 2, and 1 with 0
    score = np.asarray(regrowth(rule)(layer(mask, count=5, key=jax.random.key(seed))))
    assert np.isfinite(score[~mask]).all()
    assert np.isneginf(score[mask]).all() or rule == "top"
    best = set(np.argsort(-np.where(mask, -np.inf, score).ravel())[:2].tolist())
    # The floor is 1e-5 beside scores of 4 and more: 44 others take a place once in some 40,000 draws.
    assert best == {2, 8}


def test_few_scores_get_a_floor_and_enough_of_them_do_not():
    mask = np.zeros((6, 8), bool)
    mask[0, :2] = mask[1, 1:3] = True
    enough = np.asarray(regrowth("soft")(layer(mask, count=2)))
    assert np.isfinite(enough).sum() == 2
    few = np.asarray(regrowth("soft")(layer(mask, count=3)))
    assert np.isfinite(few).sum() == 44


def test_a_layer_that_only_takes_back_what_it_dropped_stops():
    """Nothing moves the weights: the same links go and come."""
    optimizer = cht(optax.sgd(0.0), PLAN, key=KEY, interval=2, early_stop=0.0)
    found = run(optimizer, 12)
    state = found[-1][1]
    stopped = {path: float(overlap) for path, overlap in state.overlap.items()}
    assert min(stopped.values()) > 0
    for path in PLAN:
        history = [masks_of(s)[path] for _, s in found]
        changes = [int((a != b).sum()) for a, b in itertools.pairwise(history)]
        overlaps = [float(s.overlap[path]) for _, s in found]
        first = next(i for i, value in enumerate(overlaps) if value > 0)
        assert not any(changes[first:])
    with pytest.raises(ValueError, match="early_stop must be a share between 0 and 1, and density None"):
        METHODS["chts"](density=0.5, early_stop=0.9)


def test_the_overlap_is_that_of_dropped_and_grown_links():
    always = chts(
        sgd(),
        PLAN,
        key=KEY,
        end=None,
        interval=2,
        zeta=1.0,
        adaptive_zeta=False,
        temperature=1.0,
        predictor=lambda mask: jnp.ones(mask.shape, jnp.float32),
    )
    (_, old), (_, new) = run(always, 2)[1:]
    for path, leaf in PLAN.items():
        both = (masks_of(old)[path] & masks_of(new)[path]).sum()  # with zeta 1 every link goes
        assert float(new.overlap[path]) == pytest.approx(both / leaf.links)


def test_pruning_across_layers_keeps_the_number_of_all_links_and_moves_them_between_layers():
    uneven = jax.tree.map(lambda p: p, PARAMS)
    uneven["dense_0"] = {**uneven["dense_0"], "kernel": 10 * uneven["dense_0"]["kernel"]}
    found = run(
        chtss(optax.sgd(0.0), TWO, key=KEY, end=9, interval=3, zeta=0.0, across=True, prune_alpha=1.0),
        9,
        uneven,
    )
    counts = [[int(m.sum()) for m in masks_of(state, TWO).values()] for _, state in found]
    assert sum(counts[-1]) == sum(leaf.links for leaf in TWO.values())
    assert counts[-1][0] > 1.5 * TWO["dense_0/kernel"].links
    totals = [sum(count) for count in counts]
    assert totals == sorted(totals, reverse=True)
    with pytest.raises(ValueError, match="across=True is for pruning"):
        METHODS["chts"](across=True)


def test_a_density_from_above_ends_at_the_plan():
    planned = overall_density(PLAN)
    found = run(METHODS["chts"](density=ems(planned, 9)), 9)
    totals = [sum(m.sum() for m in masks_of(state).values()) for _, state in found]
    size = sum(leaf.size for leaf in PLAN.values())
    assert totals[3] == pytest.approx((planned + 0.05) * size, abs=1)
    assert totals[6] == pytest.approx((planned + 0.025) * size, abs=1)
    assert totals[-1] == sum(leaf.links for leaf in PLAN.values())


EDITED = {
    "set": lambda **o: set_(sgd(), PLAN, key=KEY, interval=3, end=9, init_new="history", **o),
    "chtss": lambda **o: METHODS["chtss"](**o),
}


@pytest.mark.parametrize("name", EDITED)
def test_an_edit_changes_the_links_as_the_optimizer_itself_would(name):
    inside = run(EDITED[name](skip_step=False), 9)
    optimizer = EDITED[name](by_edit=True)
    edit = topology_edit(optimizer, every=3, end=9)
    step = jax.jit(lambda p, s: optimizer.update(slope(p), s, p))
    change = jax.jit(lambda at, p, s: run_edit(edit, jax.random.key(0), at, p, s))
    params, state = PARAMS, jax.jit(optimizer.init)(PARAMS)
    for at in range(1, 10):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        if edit.due(at):
            params, state = change(jnp.int32(at), params, state)
        for got, want in zip(jax.tree.leaves((params, state)), jax.tree.leaves(inside[at]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)  # a fused step rounds once less


def test_an_edit_that_does_not_belong_to_its_optimizer_is_refused():
    state = METHODS["chts"]().init(PARAMS)

    def apply(optimizer, **when):
        topology_edit(optimizer, **when).apply(KEY, jnp.int32(3), PARAMS, state)

    with pytest.raises(ValueError, match="needs an optimizer made with by_edit=True"):
        apply(METHODS["chts"](), every=3, end=9)
    with pytest.raises(
        ValueError, match=r"every 5 updates from 0 to 9 is not its optimizer's, every 3 from 0"
    ):
        apply(METHODS["chts"](by_edit=True), every=5, end=9)
    with pytest.raises(ValueError, match="looks at gradients, which an Edit does not have"):
        apply(rigl(sgd(), PLAN, key=KEY, end=9, interval=3, by_edit=True), every=3, end=9)
    with pytest.raises(ValueError, match="an Edit comes after the step"):
        METHODS["chts"](by_edit=True, skip_step=True)


@pytest.mark.parametrize("axes", [None, ("fsdp", "tensor")], ids=["compiler", "by hand"])
def test_masks_have_the_same_bits_on_one_device_and_on_eight(axes):
    here = run_of("chtss")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.tree.map(
        lambda p: NamedSharding(mesh, PartitionSpec("fsdp", "tensor") if p.ndim == 2 else PartitionSpec()),
        PARAMS,
    )
    with jax.set_mesh(mesh):
        there = run(METHODS["chtss"](axes=axes), 6, jax.device_put(PARAMS, spread))
    for path in PLAN:
        np.testing.assert_array_equal(there[-1][1].masks[path], here[6][1].masks[path])
        assert not np.array_equal(here[6][1].masks[path], here[0][1].masks[path])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: METHODS["chts"](predictor="CH9"), "predictor must be one of CH2_L3n"),
        (lambda: METHODS["chts"](removal_rule="half"), "removal must be one of soft, hard, got 'half'"),
        (lambda: METHODS["chts"](regrowth_rule="half"), "regrowth must be one of soft, top, got 'half'"),
        (lambda: METHODS["chts"](alpha=2.0), "alpha must be between 0"),
        (lambda: METHODS["chts"](predictor="CH3_L3p", axes="fsdp"), "'CH3_L3p' sums over paths"),
        (lambda: chts(sgd(), PLAN, key=KEY, end=None), "adaptive_zeta=True changes until the last change"),
        (
            lambda: chts(sgd(), PLAN, key=KEY, end=None, adaptive_zeta=False),
            r"temperature=\(1.0, 9.0\) changes until",
        ),
        (lambda: chtss(sgd(), PLAN, key=KEY, end=9, decay="linear"), "decay must be one of sigmoid, cubic"),
        (lambda: chtss(sgd(), PLAN, key=KEY, end=9, density=0.1), "density=0.1 at the start is below"),
        (
            lambda: chtss(sgd(), PLAN, key=KEY, end=9, decay_end=10),
            "decay_end=10 is after the last change of links, end=9",
        ),
    ],
)
def test_a_knob_that_makes_no_sense_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_vectors_have_no_graph():
    plan = uniform(PARAMS, 0.5, where="dense_0/.*", allow_vectors=True)
    with pytest.raises(ValueError, match=r"'dense_0/bias': .* a leaf of shape \(16,\)"):
        chts(sgd(), plan, key=KEY, end=9, interval=3)
