"""The figures of a report are those of counting by hand."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core.matrices import MatrixView, to_matrices, view_of
from odjax.sparse.masks import pack
from odjax.sparse.report import (
    degree_histogram,
    degrees,
    exploration,
    format_report,
    leaf_report,
    observe_links,
    overlap,
    sparsity_report,
)

seeds = st.integers(0, 2**31 - 1)


def random_mask(seed, shape, density=0.2):
    return np.random.default_rng(seed).random(shape) < density


def shaped(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


@given(seeds, st.integers(0, 6), st.integers(1, 7), st.floats(0, 1), st.sampled_from(["float32", "bfloat16"]))
def test_a_leaf_is_counted_link_by_link(seed, n_in, n_out, density, dtype):
    mask = random_mask(seed, (n_in, n_out), density)
    (row,) = sparsity_report({"w": shaped((n_in, n_out), dtype)}, {"w": mask})
    links = [(i, j) for i in range(n_in) for j in range(n_out) if mask[i, j]]
    itemsize = 4 if dtype == "float32" else 2
    assert row.links == len(links)
    assert row.active_in == len({i for i, _ in links})
    assert row.active_out == len({j for _, j in links})
    assert (row.n_in, row.n_out, row.size) == (n_in, n_out, n_in * n_out)
    assert row.dense_bytes == n_in * n_out * itemsize
    assert row.packed_bytes == len(links) * itemsize + 4 * math.ceil(n_in * n_out / 32)
    assert (row.flops, row.dense_flops) == (2 * len(links), 2 * n_in * n_out)
    assert row.density == pytest.approx(len(links) / (n_in * n_out) if n_in else 0)
    assert row.active_out_rate == row.active_out / n_out
    assert row.active_in_rate == (row.active_in / n_in if n_in else 0)


@given(seeds)
def test_stacks_and_heads_are_read_by_their_axes(seed):
    masks = {
        "layers/mlp/kernel": random_mask(seed, (3, 5, 4)),
        "layers/q/kernel": random_mask(seed + 1, (3, 5, 2, 4)),
        "out/kernel": random_mask(seed + 2, (2, 4, 5)),
        "odd": random_mask(seed + 3, (2, 4, 5)),
    }
    params = {path: shaped(mask.shape) for path, mask in masks.items()}
    views = {"odd": MatrixView((1,), (2,), (0,))}
    mlp, q, odd, out = sparsity_report(params, masks, dimension_numbers=views)
    each = [sparsity_report({"w": shaped((5, 4))}, {"w": m})[0] for m in masks["layers/mlp/kernel"]]
    for name in ("links", "size", "active_in", "n_in", "active_out", "n_out", "flops"):
        assert getattr(mlp, name) == sum(getattr(row, name) for row in each)
    flat = masks["layers/q/kernel"].reshape(3, 5, 8)
    assert (q.n_in, q.n_out) == (15, 24)
    assert q.active_out == flat.any(axis=1).sum()
    assert out.active_in == masks["out/kernel"].reshape(8, 5).any(axis=1).sum()
    assert (odd.n_in, odd.n_out) == (20, 8)
    assert odd.active_in == masks["odd"].any(axis=0).sum()
    flags = {**masks, "layers/mlp/kernel": masks["layers/mlp/kernel"][0]}
    shapes = {**params, "layers/mlp/kernel": shaped((5, 4))}
    assert sparsity_report(shapes, flags, dimension_numbers=views, stacked=None)[0].n_in == 5


@given(seeds, st.sampled_from([("w", (4, 6)), ("layers/q/kernel", (3, 4, 2, 3)), ("o/kernel", (2, 3, 4))]))
def test_degrees_are_the_sums_of_both_sides_of_every_matrix(seed, leaf):
    path, shape = leaf
    mask = random_mask(seed, shape)
    view = view_of(path, shape)
    matrices = np.asarray(to_matrices(jnp.asarray(mask), view))
    found = degrees(jnp.asarray(mask), view)
    np.testing.assert_array_equal(found.inputs, matrices.sum(axis=-1))
    np.testing.assert_array_equal(found.outputs, matrices.sum(axis=-2))
    assert leaf_report(path, shaped(shape), found) == sparsity_report({path: shaped(shape)}, {path: mask})[0]


def test_the_table_sums_up_its_rows():
    params = {"a": {"kernel": shaped((64, 128)), "bias": shaped((128,))}, "b": {"kernel": shaped((128, 10))}}
    masks = {
        "a": {"kernel": np.eye(64, 128, dtype=bool), "bias": None},
        "b": {"kernel": np.ones((128, 10), bool)},
    }
    text = format_report(sparsity_report(params, masks)).splitlines()
    assert len(text) == 4
    assert text[1].split()[:6] == ["a/kernel", "(64,", "128)", "64", "0.78", "%"]
    assert text[-1].startswith("total: 1,344 of 9,472 links (14.19 %), ")
    assert text[-1].endswith("2,688 of 18,944 FLOPs a row")


def test_a_table_of_nothing_is_a_table():
    assert format_report(()).splitlines()[-1] == "total: 0 of 0 links (-), 0 B of 0 B, 0 of 0 FLOPs a row"


@given(seeds, st.sampled_from(["in", "out"]), st.floats(0, 1))
def test_histograms_count_the_neurons_of_every_degree(seed, side, density):
    mask = random_mask(seed, (2, 3, 5, 6), density)
    got = degree_histogram(jnp.asarray(mask), side)
    degrees = mask.sum(axis=-2 if side == "out" else -1)
    most = 5 if side == "out" else 6
    assert got.shape == (2, 3, most + 1)
    for layer in np.ndindex(2, 3):
        expected = [list(degrees[layer]).count(d) for d in range(most + 1)]
        np.testing.assert_array_equal(got[layer], expected)


@given(seeds, st.integers(1, 5))
def test_exploration_is_the_share_of_places_ever_linked(seed, steps):
    shapes = {"a": (7, 9), "b": (40, 3)}
    history = [{p: random_mask(seed + i, s) for p, s in shapes.items()} for i in range(steps)]
    packed = [{p: pack(jnp.asarray(m)) for p, m in masks.items()} for masks in history]
    ever = packed[0]
    for words in packed[1:]:
        ever = observe_links(ever, words)
    union = {p: np.any([masks[p] for masks in history], axis=0) for p in shapes}
    places = sum(math.prod(s) for s in shapes.values())
    assert exploration(ever, places) == sum(int(m.sum()) for m in union.values()) / places
    for path, mask in union.items():
        np.testing.assert_array_equal(ever[path], pack(jnp.asarray(mask)))


@given(seeds)
def test_observing_is_idempotent_and_does_not_depend_on_the_order(seed):
    a, b, c = (
        jnp.asarray(np.random.default_rng(seed + i).integers(0, 2**32, 4, np.uint32)) for i in range(3)
    )
    one = observe_links(observe_links(a, b), c)
    np.testing.assert_array_equal(one, observe_links(a, observe_links(c, b)))
    np.testing.assert_array_equal(one, jax.jit(observe_links)(one, b))


@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_overlap_is_the_share_of_regrown_links_that_were_just_removed(seed, p, q):
    removed, regrown = random_mask(seed, (3, 4, 5), p), random_mask(seed + 1, (3, 4, 5), q)
    got = overlap(removed, regrown, batch_dims=1)
    for layer in range(3):
        both, grown = (removed[layer] & regrown[layer]).sum(), regrown[layer].sum()
        assert float(got[layer]) == pytest.approx(both / grown if grown else 1, rel=1e-6)


def test_overlap_is_one_where_a_topology_stands_still_and_zero_where_all_links_are_new():
    links = random_mask(0, (4, 5))
    assert float(overlap(links, links)) == 1
    assert float(overlap(links, ~links)) == 0
    assert float(overlap(links, np.zeros((4, 5), bool))) == 1


PARAMS = {"a": shaped((4, 5)), "deep": shaped((2, 4, 5)), "bias": shaped((5,))}
FLAGS = {path: np.ones(leaf.shape, bool) for path, leaf in PARAMS.items()}
WORDS = jnp.ones(2, jnp.uint32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sparsity_report(PARAMS, {"b": FLAGS["a"]}), ValueError, "a mask for 'b', which is no leaf"),
        (lambda: sparsity_report(PARAMS, {"a": FLAGS["deep"]}), ValueError, "the parameter (4, 5)"),
        (
            lambda: sparsity_report(PARAMS, {"a": np.ones((4, 5))}),
            TypeError,
            "must be bool, got float64: unpack",
        ),
        (
            lambda: sparsity_report(PARAMS, {"deep": FLAGS["deep"]}),
            ValueError,
            "dimension_numbers={'deep': MatrixView(batch=(), inputs=(0,), outputs=(1, 2))}",
        ),
        (lambda: sparsity_report(PARAMS, {"bias": FLAGS["bias"]}), ValueError, "is no matrix"),
        (
            lambda: sparsity_report(
                PARAMS, {"a": FLAGS["a"]}, dimension_numbers={"b": MatrixView((), (0,), (1,))}
            ),
            ValueError,
            "dimension_numbers has 'b', which matches no path such as 'a'",
        ),
        (lambda: degrees(jnp.ones((2, 3)), MatrixView((), (0,), (1,))), TypeError, "got float32: unpack it"),
        (lambda: degree_histogram(jnp.ones((2, 3)), "in"), TypeError, "mask must be bool, got float32"),
        (lambda: degree_histogram(jnp.ones(3, bool), "in"), ValueError, "[..., n_in, n_out], got [3]"),
        (lambda: degree_histogram(FLAGS["a"], "left"), ValueError, "'in' or 'out', got 'left'"),
        (lambda: observe_links(WORDS, FLAGS["a"]), TypeError, "unsigned integers, got bool: pack them first"),
        (lambda: observe_links(WORDS, WORDS[:1]), ValueError, "seen are uint32[2], now uint32[1]"),
        (lambda: exploration(WORDS.astype(jnp.int32), 9), TypeError, "unsigned integers, got int32"),
        (lambda: exploration(WORDS, 1), ValueError, "2 links were seen at 1 places"),
        (lambda: overlap(FLAGS["a"], FLAGS["deep"]), ValueError, "must have one shape"),
        (lambda: overlap(FLAGS["a"], WORDS), TypeError, "must be bool, got bool and uint32"),
        (lambda: overlap(FLAGS["a"], FLAGS["a"], batch_dims=3), ValueError, "from 0 to 2, got 3"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
