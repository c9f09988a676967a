"""CHT, CHTs, CHTss on heads, groups, blocks and wirings: whole units, graphs of their own, living neurons."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from odjax.models.decoder import decoder
from odjax.sparse import (
    NM,
    PER_HEAD,
    Block,
    Channel,
    LeafPlan,
    Rewiring,
    apply_masks,
    brf_mask,
    chts,
    drawn,
    live_units,
    pack,
    regrowth,
    removal,
    uniform,
    unpack,
    wiring_of,
)
from odjax.sparse.masks import pooled, top_links, unit

from .hebb_cases import KEY, METHODS, PARAMS, PLAN, TWO, WIRING, layer, masks_of, run, run_of, sgd


def test_every_head_is_a_graph_of_its_own():
    params = {"layers": {"attn": {"q": {"kernel": jnp.ones((2, 8, 2, 4))}}}}
    path = "layers/attn/q/kernel"
    plan = uniform(params, 0.5, per_head=PER_HEAD)
    leaf = plan[path]
    assert (leaf.batch_shape, leaf.slice_shape, leaf.links) == ((2, 2), (8, 4), 16)
    optimizer = chts(optax.sgd(0.1), plan, key=KEY, end=4, interval=2)
    state = jax.jit(optimizer.init)(params)
    _, after = jax.jit(optimizer.update)(params, state._replace(count=jnp.int32(1)), params)
    old, new = (np.asarray(unpack(s.masks[path], leaf.shape)) for s in (state, after))
    assert (old != new).any()
    np.testing.assert_array_equal(new.sum(axis=(1, 3)), 16)
    np.testing.assert_array_equal(leaf.graphs(new)[1, 0], new[1, :, 0, :])
    np.testing.assert_array_equal(leaf.leaf(leaf.graphs(new)), new)


def test_percolation_runs_before_the_growth_of_a_network():
    """Growth cannot start from a neuron without links, so percolated neurons stay dead."""
    found = run_of("chts, fixed and percolating")
    masks = masks_of(found[-1][1], TWO)
    restricted = tuple(j for j in WIRING if all(e.path in TWO for e in (*j.inputs, *j.outputs)))
    assert len(restricted) == 1
    (alive,) = live_units(masks, restricted)
    assert 0 < int(alive.sum()) <= 16


@pytest.mark.parametrize("structure", [NM(2, 4), Block(4, 4)], ids=["2:4", "blocks"])
def test_groups_and_blocks_take_the_same_rules(structure):
    plan = uniform(
        PARAMS, None if isinstance(structure, NM) else 0.5, where="dense_1/kernel", structure=structure
    )
    plan |= uniform(PARAMS, 0.75, where="dense_0/kernel")
    found = run(chts(sgd(), plan, key=KEY, end=6, interval=2, zeta=0.5, wiring=WIRING), 6)
    moved = 0
    for (_, before), (_, after) in itertools.pairwise(found):
        old, new = masks_of(before, plan)["dense_1/kernel"], masks_of(after, plan)["dense_1/kernel"]
        moved += (old != new).sum()
        tiles = new.reshape(4, 4, 16) if isinstance(structure, NM) else new.reshape(4, 4, 4, 4)
        if isinstance(structure, NM):
            np.testing.assert_array_equal(tiles.sum(axis=1), 2)
        else:
            assert set(tiles.sum(axis=(1, 3)).ravel().tolist()) == {0, 16}
    assert moved > 0


def test_a_receptive_field_is_where_training_starts():
    optimizer = METHODS["chts"](masks=drawn(functools.partial(brf_mask, r=0.0)))
    params = apply_masks(PARAMS, optimizer.init(PARAMS).masks)
    for path, leaf in PLAN.items():
        degrees = np.asarray(params[path.split("/")[0]]["kernel"] != 0).sum(axis=0)
        assert (degrees == leaf.slice_shape[0] // 4).all()


def test_packed_words_are_what_the_state_holds():
    state = METHODS["chts"]().init(PARAMS)
    for path, leaf in PLAN.items():
        np.testing.assert_array_equal(pack(unpack(state.masks[path], leaf.shape)), state.masks[path])
        assert state.masks[path].nbytes <= leaf.shape[1] * 4 * -(-leaf.shape[0] // 32)


BLOCKS = jnp.kron(jnp.array([[4.0, 2.0], [1.0, 0.0]]), jnp.ones((4, 4)))


@pytest.mark.parametrize("structure", [Block(4, 4), Channel(-1)], ids=["blocks", "channels"])
def test_soft_removal_draws_whole_blocks_in_proportion_to_a_power_of_their_sizes(structure):
    w = BLOCKS if isinstance(structure, Block) else jnp.asarray([[4.0, 2.0, 1.0, 0.0]] * 4)
    score = removal("soft", temperature=2.0)
    keys = jax.random.split(KEY, 4000)
    drawn_ = jax.vmap(
        lambda key: top_links(
            score(layer(w > 0, w, key=key)._replace(structure=structure)),
            unit(structure, w.shape),
            structure,
            eligible=w > 0,
        )
    )(keys)
    first = np.asarray(pooled(drawn_, structure, 1, "any")).reshape(4000, -1)
    assert (first.sum(axis=1) == 1).all()
    law = np.array([16, 4, 1, 0]) / 21
    assert np.abs(first.mean(axis=0) - law).max() < 4 * np.sqrt(0.25 / 4000)


def test_soft_regrowth_draws_whole_blocks_in_proportion_to_their_scores():
    mask = jnp.kron(jnp.array([[1, 0], [0, 0]]), jnp.ones((4, 4), jnp.int32)) > 0
    weights = jnp.kron(jnp.array([[9.0, 2.0], [1.0, 5.0]]), jnp.ones((4, 4)))
    score = regrowth("soft", predictor=lambda mask: weights)
    keys = jax.random.split(KEY, 4000)
    best = jax.vmap(
        lambda key: jnp.argmax(score(layer(mask, count=16, key=key)._replace(structure=Block(4, 4))))
    )(keys)
    share = [np.mean(np.asarray(best) == place) for place in (4, 32, 36)]
    assert np.abs(np.array(share) - np.array([2, 1, 5]) / 8).max() < 4 * np.sqrt(0.25 / 4000)


def test_a_group_without_scores_is_filled_up_at_random():
    mask = jnp.zeros((8, 2), bool).at[0, 0].set(True)
    score = regrowth("soft", predictor=lambda mask: jnp.zeros(mask.shape))
    keys = jax.random.split(KEY, 64)
    places = jax.vmap(
        lambda key: jnp.argmax(score(layer(mask, count=1, key=key)._replace(structure=NM(1, 8)))[:, 1])
    )(keys)
    assert len(set(np.asarray(places).tolist())) == 8


def test_a_stopped_layer_keeps_its_neurons_alive_for_the_others():
    old = {"dense_0/kernel": jnp.eye(12, 16, dtype=bool), "dense_1/kernel": jnp.eye(16, 16, dtype=bool)}
    plan = {path: LeafPlan(mask.shape, int(mask.sum())) for path, mask in old.items()}
    w = {path: jnp.where(mask, 1.0, 0.0) for path, mask in old.items()}
    seen = {}

    def note(masks):
        seen.update(masks)
        return masks

    change = Rewiring(plan, removal("hard"), regrowth("top"), zeta=0.5, percolate=note, early_stop=0.9)
    before = {"dense_0/kernel": jnp.float32(1), "dense_1/kernel": jnp.float32(0)}
    new, _ = change(old, w, None, jnp.int32(1), KEY, before)
    np.testing.assert_array_equal(seen["dense_0/kernel"], old["dense_0/kernel"])
    np.testing.assert_array_equal(new["dense_0/kernel"], old["dense_0/kernel"])
    assert seen["dense_1/kernel"].sum() == 8


def test_a_wiring_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"the wiring .* names no leaf of the plan \('dense_1/kernel'"):
        METHODS["chts"](wiring=wiring_of(decoder("tiny")))
    with pytest.raises(ValueError, match="leave out percolate="):
        METHODS["chts"](wiring=WIRING, percolate=lambda masks: masks)
    with pytest.raises(ValueError, match=r"temperature must be two numbers of at least 0, or one, got \(-1"):
        METHODS["chts"](temperature=(-1.0, 9.0))
