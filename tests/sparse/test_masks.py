"""Masks: packing loses nothing, counts are exact, groups hold what they must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from odjax.sparse.masks import (
    NM,
    Block,
    Channel,
    add_links,
    links,
    pack,
    packed_axis,
    packed_shape,
    top_links,
    unit,
    unpack,
)

SHAPES = [
    (1,),
    (31,),
    (33,),
    (3, 5),
    (64, 10),
    (300, 3),
    (257, 2),
    (512, 4),
    (2, 70, 5),
    (3, 3, 4, 6),
    (5, 0),
]
pick = jax.jit(top_links, static_argnames=("structure", "batch_dims"))
grow = jax.jit(add_links, static_argnames=("structure", "batch_dims"))


def random_mask(shape, density=0.3, seed=0):
    return np.random.default_rng(seed).random(shape) < density


@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_the_mask_back(shape):
    for density in (0.0, 0.4, 1.0):
        mask = random_mask(shape, density)
        words = pack(jnp.asarray(mask))
        assert words.shape == packed_shape(shape)
        np.testing.assert_array_equal(unpack(words, shape), mask)
        assert int(links(words)) == int(links(jnp.asarray(mask))) == mask.sum()


def test_a_row_sits_in_the_word_and_bit_of_the_tile():
    rows = 600
    for row in (0, 7, 8, 255, 256, 599):
        group, within = divmod(row, 256)
        bit, sublane = divmod(within, 8)
        words = np.asarray(pack(jnp.zeros((rows, 2), bool).at[row, 1].set(True)))
        expected = np.zeros((24, 2), np.uint32)
        expected[8 * group + sublane, 1] = 1 << bit
        np.testing.assert_array_equal(words, expected)


def test_a_packed_mask_takes_a_bit_a_weight():
    for shape in [(2048, 5461), (512, 512), (512, 8, 64), (12, 768, 3072), (64, 10)]:
        assert 4 * np.prod(packed_shape(shape)) == np.prod(shape) / 8


def test_the_packed_axis_is_never_the_lanes():
    assert packed_axis((8, 4096)) == 0
    assert packed_axis((7, 64, 64)) == 1
    assert packed_axis((9,)) == 0


def test_counts_are_exact_where_float32_is_not():
    assert int(links(jnp.ones((4097, 4099), bool))) == 4097 * 4099 > 1 << 24


def test_links_of_stacked_layers_are_counted_apart():
    mask = random_mask((3, 40, 5))
    np.testing.assert_array_equal(links(jnp.asarray(mask), batch_dims=1), mask.sum((1, 2)))
    np.testing.assert_array_equal(links(pack(jnp.asarray(mask)), batch_dims=1), mask.sum((1, 2)))


def test_packing_keeps_the_sharding_of_the_other_axes_and_moves_nothing():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
    mask = jax.device_put(random_mask((300, 16)), sharding)
    step = jax.jit(lambda m: unpack(pack(m), m.shape)).lower(mask).compile()
    text = step.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    assert jax.jit(pack)(mask).sharding.is_equivalent_to(sharding, 2)


scores_of = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, -2.0, 0.5, float("inf"), float("-inf")]) | st.floats(-4, 4, width=32),
    min_size=48,
    max_size=48,
).map(lambda x: np.asarray(x, np.float32).reshape(8, 6))


@given(scores_of, st.integers(0, 4))
def test_n_m_masks_hold_the_n_best_of_every_group(scores, n):
    structure = NM(2, 4)
    mask = np.asarray(pick(scores, jnp.int32(n * 12), structure=structure))
    for group in range(2):
        for column in range(6):
            part = slice(4 * group, 4 * group + 4)
            order = np.argsort(-scores[part, column], kind="stable")
            expected = np.isin(np.arange(4), order[:n])
            np.testing.assert_array_equal(mask[part, column], expected)


@given(scores_of, st.integers(0, 8), st.sampled_from(["mean", "max"]))
def test_block_masks_are_constant_on_blocks_and_hold_the_best(scores, blocks, pool):
    scores = np.nan_to_num(scores, posinf=9.0, neginf=-9.0)
    mask = np.asarray(pick(scores, jnp.int32(blocks * 6), structure=Block(2, 3, pool)))
    tiles = mask.reshape(4, 2, 2, 3).transpose(0, 2, 1, 3).reshape(8, 6)
    assert (tiles == tiles[:, :1]).all()
    pooled = scores.reshape(4, 2, 2, 3).transpose(0, 2, 1, 3).reshape(8, 6)
    pooled = pooled.mean(1) if pool == "mean" else pooled.max(1)
    held = tiles[:, 0]
    assert held.sum() == blocks
    if 0 < blocks < 8:
        assert pooled[held].min() >= pooled[~held].max() - 1e-6


@given(scores_of, st.integers(0, 6))
def test_channels_are_whole(scores, channels):
    mask = np.asarray(pick(scores, jnp.int32(8 * channels), structure=Channel()))
    assert mask.all(0).sum() == channels == mask.any(0).sum()


@given(scores_of, st.integers(0, 48), st.integers(0, 10))
def test_added_links_bring_the_count_to_k_and_are_the_best_absent_ones(scores, k, seed):
    kept = random_mask((8, 6), 0.3, seed)
    k = max(k, int(kept.sum()))
    mask = np.asarray(grow(kept, scores, jnp.int32(k)))
    assert mask.sum() == k
    assert (mask & kept == kept).all()
    new, absent = mask & ~kept, ~mask
    if new.any() and absent.any():
        assert scores[new].min() >= scores[absent].max()


@given(scores_of, st.integers(0, 10))
def test_every_n_m_group_is_filled_up_again(scores, seed):
    full = np.asarray(pick(scores[::-1], jnp.int32(24), structure=NM(2, 4)))
    kept = full & random_mask((8, 6), 0.5, seed)
    mask = np.asarray(grow(kept, scores, jnp.int32(24), structure=NM(2, 4)))
    assert (mask & kept == kept).all()
    assert (mask.reshape(2, 4, 6).sum(1) == 2).all()


def test_stacked_layers_are_selected_apart():
    scores = np.random.default_rng(1).normal(size=(3, 8, 6)).astype(np.float32)
    for structure in (None, NM(2, 4), Block(4, 3), Channel()):
        k = jnp.array([24, 24, 24])
        stacked = pick(scores, k, structure=structure, batch_dims=1)
        apart = [pick(s, jnp.int32(24), structure=structure) for s in scores]
        np.testing.assert_array_equal(stacked, np.stack(apart))
        kept = np.asarray(stacked) & (structure is None or isinstance(structure, NM))
        added = grow(kept, scores, k, structure=structure, batch_dims=1)
        np.testing.assert_array_equal(links(added, batch_dims=1), [24, 24, 24])


def test_nan_scores_come_last_and_counts_stay_exact():
    scores = jnp.array([jnp.nan, 1.0, jnp.nan, -3.0])
    assert pick(scores, jnp.int32(2)).tolist() == [False, True, False, True]
    assert int(links(pick(scores, jnp.int32(3)))) == 3


def test_only_eligible_blocks_are_taken():
    eligible = jnp.zeros((4, 4), bool).at[:2, :2].set(True)
    mask = pick(-jnp.ones((4, 4)), jnp.int32(8), structure=Block(2, 2), eligible=eligible)
    np.testing.assert_array_equal(mask, eligible)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: NM(3, 2), ValueError, r"1 <= n <= m, got n=3, m=2"),
        (lambda: NM(1, 2, axis=0), ValueError, r"counted from the end"),
        (lambda: Block(0, 2), ValueError, r"at least one row and column, got 0 x 2"),
        (lambda: Block(2, 2, "sum"), ValueError, r"'mean' or 'max', got 'sum'"),
        (lambda: Channel(pool="min"), ValueError, r"'mean' or 'max', got 'min'"),
        (lambda: unit(NM(2, 4), (6, 8)), ValueError, r"2:4 along axis -2 of \(6, 8\).*multiple of 4.*got 6"),
        (lambda: unit(NM(2, 4, axis=-3), (8, 8)), ValueError, r"names an axis that the shape \(8, 8\)"),
        (lambda: unit(Block(4, 4), (8, 6)), ValueError, r"4 x 4 do not divide the shape \(8, 6\)"),
        (lambda: top_links(jnp.ones((2, 3)), 8), ValueError, r"8 links do not fit .* 6 weights: 2 short"),
        (lambda: top_links(jnp.ones((4, 4)), 5, Block(2, 2)), ValueError, r"multiple of 4 .* got 5"),
        (lambda: pack(jnp.ones(3)), TypeError, r"must be bool, got float32"),
        (lambda: pack(jnp.array(True)), ValueError, r"at least one axis"),
        (lambda: unpack(jnp.ones(3), (3,)), TypeError, r"must be uint32, got float32"),
        (
            lambda: unpack(jnp.ones(3, jnp.uint32), (64, 3)),
            ValueError,
            r"words of shape \(2, 3\), got \(3,\)",
        ),
        (lambda: links(jnp.ones(3)), TypeError, r"bool mask or its packed uint32 words, got float32"),
    ],
)
def test_bad_input_says_what_to_type(call, error, message):
    with pytest.raises(error, match=message):
        call()
