"""Initial topologies have exact counts, the right laws, and the geometry that their formulas say."""

import functools
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.sparse.correlation import feature_correlation
from odjax.sparse.masks import NM, links, unpack
from odjax.sparse.methods import gmp, static
from odjax.sparse.plans import LeafPlan, overall_density, target_links, uniform
from odjax.sparse.topology import (
    brf_mask,
    bsw_mask,
    csti_mask,
    drawn,
    er_mask,
    link_count,
    plan_masks,
)

KEY = jax.random.key(0)
seeds = st.integers(0, 2**31 - 1)
# (n_in, n_out, density, r, law of the degrees); few, because each is compiled.
FIELDS = [
    (5, 14, 0.3, 0.25, "fixed"),
    (14, 5, 0.3, 1.0, "poisson"),
    (16, 9, 0.3, 0.25, "uniform"),
]


def brf(seed, n_in, n_out, density, r, degrees="fixed", side="out", batch=()):
    key = jax.random.key(seed)
    return np.asarray(brf_mask(key, n_in, n_out, density, r, degrees=degrees, degree_side=side, batch=batch))


def ring_distances(n_in, n_out):
    """Distance of every input from the centre of every output, in exact fractions, straight from the card."""
    distance = np.empty((n_in, n_out), object)
    for j in range(n_out):
        centre = Fraction(2 * j + 1, 2) * Fraction(n_in, n_out) - Fraction(1, 2)
        for i in range(n_in):
            apart = abs(i - centre) % n_in
            distance[i, j] = min(apart, n_in - apart)
    return distance


def nearest(n_in, n_out, degrees):
    """The `degrees[j]` nearest inputs of every output; of two equally near the lower."""
    distance = ring_distances(n_in, n_out)
    mask = np.zeros((n_in, n_out), bool)
    for j in range(n_out):
        mask[sorted(range(n_in), key=lambda i: (distance[i, j], i))[: degrees[j]], j] = True
    return mask


@pytest.mark.parametrize(
    ("n_in", "n_out", "links", "side"),
    [(12, 12, 30, "out"), (5, 14, 15, "out"), (14, 5, 33, "out"), (7, 10, 23, "in")],
)
def test_without_spread_the_links_are_the_nearest_on_the_ring(n_in, n_out, links, side):
    density = links / (n_in * n_out)
    mask = brf(0, n_in, n_out, density, 0.0, side=side)
    expected = nearest(n_in, n_out, mask.sum(0)) if side == "out" else nearest(n_out, n_in, mask.sum(1)).T
    np.testing.assert_array_equal(mask, expected)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_fields_that_are_as_wide_as_their_centres_are_apart_cover_every_input(n_in, n_out, data):
    k = data.draw(st.integers(math.ceil(n_in / n_out), n_in))
    degrees = data.draw(st.lists(st.integers(k, min(k + 1, n_in)), min_size=n_out, max_size=n_out))
    assert nearest(n_in, n_out, degrees).any(axis=1).all()


def test_no_neuron_is_empty_without_spread_where_the_published_centres_leave_some():
    # Centres at i * floor(172 / 64) would end at 126 of 172.
    assert brf(0, 64, 172, 3 / 64, 0.0).any(axis=1).all()
    assert brf(0, 64, 172, 3 / 172, 0.0, side="in").any(axis=0).all()
    assert brf(0, 64, 172, 3 / 172, 0.0, side="in").any(axis=1).all()


@given(seeds, st.sampled_from(FIELDS))
def test_receptive_fields_have_the_exact_number_of_links_and_no_empty_output(seed, settings):
    n_in, n_out, density, _, degrees = settings
    mask = brf(seed, *settings)
    k = mask.sum(axis=0)
    assert mask.dtype == bool
    assert mask.shape == (n_in, n_out)
    assert mask.sum() == round(density * n_in * n_out)
    assert k.min() >= 1
    if degrees == "fixed":
        assert k.max() - k.min() <= 1
    if degrees == "uniform":
        assert k.max() <= math.ceil(2 * density * n_in)


@given(seeds)
def test_on_the_input_side_the_inputs_have_the_degrees(seed):
    np.testing.assert_array_equal(brf(seed, 14, 5, 0.4, 0.3, "fixed", "in").sum(axis=1), 2)


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_uniform_degrees_are_evenly_distributed_as_wide_as_they_can(density):
    n_in, n_out = 50, 400
    k = np.sort(brf(1, n_in, n_out, density, 0.0, "uniform").sum(axis=0))
    mean = density * n_in
    half = min(mean - 1, n_in - mean)
    ideal = mean + half * (2 * (np.arange(n_out) + 0.5) / n_out - 1)
    assert k.sum() == round(density * n_in * n_out)
    assert np.abs(k - ideal).max() <= 1.0


def test_uniform_degrees_are_dealt_out_at_random():
    k, other = (brf(seed, *FIELDS[-1]).sum(axis=0) for seed in (1, 2))
    assert (k != other).any()
    np.testing.assert_array_equal(np.sort(k), np.sort(other))


def test_poisson_degrees_have_the_variance_of_randomly_placed_links():
    # One link and a share of the rest: a hypergeometric number of the n_in - 1 places of a neuron.
    n_in, n_out, links = 40, 2000, 8000
    k = brf(0, n_in, n_out, links / (n_in * n_out), 0.0, "poisson").sum(axis=0)
    places, rest = n_out * (n_in - 1), links - n_out
    p = rest / places
    variance = (n_in - 1) * p * (1 - p) * (places - n_in + 1) / (places - 1)
    # The variance of a sample variance is at most (kurtosis - 1) / n, with a kurtosis of about 3.4.
    assert abs(k.var() - variance) < 4 * variance * math.sqrt(2.4 / n_out)


def test_links_lie_further_out_the_larger_r_is():
    distance = ring_distances(60, 30).astype(float)
    means = [distance[brf(0, 60, 30, 0.1, r)].mean() for r in (0.0, 0.25, 1.0)]
    assert (np.diff(means) > 0).all()
    assert means[-1] == pytest.approx(15, rel=0.1)  # uniform on a ring of 60


def test_one_link_a_neuron_falls_by_the_power_law_of_the_distance():
    n, r, draws = 6, 0.4, 3000
    masks = brf(5, n, n, 1 / n, r, batch=(draws,))
    weight = (1.0 + ring_distances(n, n).astype(float)) ** (-(1 - r) / r)
    probability = weight / weight.sum(axis=0)
    error = np.abs(masks.mean(axis=0) - probability)
    assert (error < 4.5 * np.sqrt(probability * (1 - probability) / draws)).all()


def test_a_spread_of_almost_nothing_is_no_spread():
    fields = brf(3, 12, 12, 0.25, 1e-45)
    np.testing.assert_array_equal(fields, brf(3, 12, 12, 0.25, 0.0))


MAKERS = {
    "brf": lambda key, batch: brf_mask(key, 16, 24, 0.2, 0.3, degrees="uniform", batch=batch),
    "bsw": lambda key, batch: bsw_mask(key, 16, 24, 0.2, batch=batch),
    "er": lambda key, batch: er_mask(key, (16, 24), 77, batch=batch),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_slice_of_stacked_layers_is_the_mask_of_its_own_key(name):
    key = jax.random.key(4)
    stacked = MAKERS[name](key, (2, 2))
    assert stacked.shape == (2, 2, 16, 24)
    np.testing.assert_array_equal(stacked[1, 0], MAKERS[name](jax.random.fold_in(key, 2), ()))
    assert (stacked[0, 0] != stacked[1, 1]).any()


@pytest.mark.parametrize("name", MAKERS)
def test_the_mask_does_not_depend_on_the_mesh_and_only_counts_travel(name):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    key = jax.random.key(7)
    layout = NamedSharding(mesh, P("fsdp", "tensor"))
    compiled = jax.jit(lambda k: MAKERS[name](k, ()), out_shardings=layout).lower(key).compile()
    sharded = compiled(key)
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, MAKERS[name](key, ()))
    collectives = re.findall(r"= \w+\[([\d,]*)\]\S* (all-\w+|collective-permute)", compiled.as_text())
    assert {kind for _, kind in collectives} == {"all-reduce"}
    # A count an output of a shard at most: 24 outputs are 6 on each of four devices.
    assert max(math.prod(int(n) for n in sizes.split(",") if n) for sizes, _ in collectives) <= 6


def test_a_small_world_lies_between_the_lattice_and_a_random_graph():
    key = jax.random.key(0)
    lattice = np.asarray(bsw_mask(key, 12, 20, 0.2, 0.0))
    np.testing.assert_array_equal(lattice, brf(0, 12, 20, 0.2, 0.0))
    # The larger side has the fields, also when it is the inputs.
    np.testing.assert_array_equal(bsw_mask(key, 20, 12, 0.2, 0.0), lattice.T)
    # A link stays when it is not dropped, or is drawn again: (1 - b) + b * b E / (N - (1 - b) E) on average.
    draws, beta, links, places = 400, 0.25, 48, 240
    worlds = np.asarray(bsw_mask(key, 12, 20, 0.2, beta, batch=(draws,)))
    np.testing.assert_array_equal(worlds.sum(axis=(1, 2)), links)
    stays = worlds[:, lattice].mean()
    again = beta * links / (places - (1 - beta) * links)
    expected = (1 - beta) + beta * again
    assert abs(stays - expected) < 4 * math.sqrt(expected * (1 - expected) / (draws * links))
    random = np.asarray(bsw_mask(key, 12, 20, 0.2, 1.0, batch=(draws,)))
    np.testing.assert_array_equal(random.sum(axis=(1, 2)), links)
    everywhere = random.mean(axis=0)
    assert np.abs(everywhere - 0.2).max() < 4.5 * math.sqrt(0.2 * 0.8 / draws)


@given(seeds, st.sampled_from([0, 23, 60]))
def test_random_links_are_exactly_as_many_as_asked(seed, links):
    assert int(er_mask(jax.random.key(seed), (3, 4, 5), links).sum()) == links


def test_every_place_is_equally_likely_in_a_random_graph():
    draws = 2000
    share = np.asarray(er_mask(jax.random.key(1), (4, 6), 5, batch=(draws,))).mean(axis=0)
    p = 5 / 24
    assert np.abs(share - p).max() < 4 * math.sqrt(p * (1 - p) / draws)


def planned():
    """A plan for a stack of two layers with attention heads, and a matrix of its own."""
    shapes = {"layers/q/kernel": (2, 8, 2, 4), "layers/out/kernel": (2, 2, 4, 8), "head": (8, 10)}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    return params, uniform(params, 0.7)


@pytest.mark.parametrize("draw", [functools.partial(brf_mask, r=0.0), bsw_mask], ids=["fields", "world"])
def test_the_topologies_of_a_plan_are_what_the_engine_starts_from(draw):
    params, plan = planned()
    masks = plan_masks(KEY, plan, draw)
    state = static(optax.sgd(0.1), plan, masks=masks, key=KEY).init(params)
    for path, mask in masks.items():
        np.testing.assert_array_equal(unpack(state.masks[path], mask.shape), mask)
    # The outputs of a kernel have the degrees of its fields: heads and their dimensions together.
    if draw is not bsw_mask:
        assert np.ptp(masks["layers/q/kernel"].reshape(2, 8, 8).sum(axis=1)) <= 1
        assert np.ptp(masks["layers/out/kernel"].reshape(2, 8, 8).sum(axis=1)) <= 1


def test_the_topology_of_a_leaf_does_not_depend_on_the_other_leaves():
    _, plan = planned()
    alone = {"head": plan["head"]}
    draw = functools.partial(bsw_mask, beta=0.5)
    masks = plan_masks(KEY, plan, draw)
    np.testing.assert_array_equal(masks["head"], plan_masks(KEY, alone, draw)["head"])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"head": LeafPlan((8, 10), 40, 0, NM(2, 4))}, "'head': a leaf of shape (8, 10) has NM(n=2"),
        ({"qkv": LeafPlan((8, 2, 4), 20)}, "'qkv': which axes of a leaf of shape (8, 2, 4) are inputs"),
    ],
)
def test_a_plan_that_no_topology_fits_is_named(plan, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_masks(KEY, plan, bsw_mask)


def test_a_drawn_topology_follows_the_density_of_the_start():
    params, plan = planned()
    start = drawn(functools.partial(brf_mask, r=0.25))
    options = {"key": KEY, "end": 10, "interval": 2}
    state = jax.jit(gmp(optax.sgd(0.1), plan, density=0.5, masks=start, **options).init)(params)
    for path, leaf in plan.items():
        mask = leaf.graphs(unpack(state.masks[path], leaf.shape))
        wanted = int(target_links(leaf, jnp.float32(0.5), overall_density(plan)))
        np.testing.assert_array_equal(links(mask, batch_dims=leaf.batch_dims), wanted)
        assert abs(wanted - leaf.size / 2) <= 1


features = st.integers(0, 2**31 - 1).map(
    lambda seed: (
        np.random.default_rng(seed).normal(size=(20, 6)) @ np.random.default_rng(seed + 1).normal(size=(6, 6))
    )
)


correlation = jax.jit(feature_correlation)
correlated = functools.cache(
    lambda shape, links: jax.jit(lambda x: csti_mask(x, shape, links / math.prod(shape)))
)


@given(features)
def test_correlations_are_those_of_numpy_without_the_diagonal(x):
    with jax.enable_x64(True):
        r = correlation(jnp.asarray(x))
    expected = np.corrcoef(x, rowvar=False)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(r, expected, atol=1e-13)


@given(features, st.sampled_from([1e-30, 1.0, 1e30]), st.sampled_from([1e-18, 1e18]))
def test_correlations_do_not_depend_on_the_units_of_the_features(x, scale, other):
    units = np.where(np.arange(6) % 2, scale, other)
    r = correlation(jnp.asarray(x * units, jnp.float32))
    np.testing.assert_allclose(r, correlation(jnp.asarray(x, jnp.float32)), atol=3e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_features_without_information_have_no_correlation(constant):
    x = np.random.default_rng(0).normal(size=(1000, 5)).astype(np.float32)
    x[:, 1] = constant  # the float32 mean of 1000 times 0.1 is not 0.1
    x[:, 2] = 2 * constant
    x[3, 3] = np.nan
    x[7, 4] = np.inf
    r = np.asarray(feature_correlation(jnp.asarray(x)))
    np.testing.assert_array_equal(r, np.zeros((5, 5)))


@given(features, st.sampled_from([1, 8, 30]))
def test_the_most_correlated_features_are_linked(x, links):
    # 30 of the 36 places are off the diagonal; each value stands twice, in mirrored places.
    mask = np.asarray(correlated((6, 6), links)(jnp.asarray(x, jnp.float32)))
    r = np.abs(np.corrcoef(x, rowvar=False))
    np.fill_diagonal(r, 0)
    assert mask.sum() == links
    assert not np.diag(mask).any()
    assert r[mask].min() >= r[~mask].max() - 1e-5


@given(features)
def test_a_wider_layer_repeats_the_correlations_like_tiles(x):
    x = jnp.asarray(x, jnp.float32)
    one, wide = correlated((6, 6), 8)(x), correlated((12, 18), 48)(x)
    np.testing.assert_array_equal(wide, np.tile(one, (2, 3)))


@given(st.integers(1, 10**6), st.integers(1, 5000), st.integers(1, 5000))
def test_the_density_of_a_number_of_links_gives_back_that_number(links, n_in, n_out):
    links = min(links, n_in * n_out)
    assert link_count(links / (n_in * n_out), n_in, n_out) == links


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: brf_mask(KEY, 8, 8, 0.0, 0.2), ValueError, "density must be in (0, 1], got 0.0"),
        (lambda: brf_mask(KEY, 8, 8, 1.5, 0.2), ValueError, "share of links kept, 1 - sparsity"),
        (lambda: brf_mask(KEY, 8, 8, math.nan, 0.2), ValueError, "density must be in (0, 1], got nan"),
        (lambda: brf_mask(KEY, 8, 9, 0.1, 0.2), ValueError, "gives 7 links to 9 output neurons"),
        (lambda: brf_mask(KEY, 9, 8, 0.1, 0.2, degree_side="in"), ValueError, "7 links to 9 input neurons"),
        (lambda: brf_mask(KEY, 8, 8, 0.5, -0.1), ValueError, "r must be in [0, 1]"),
        (lambda: brf_mask(KEY, 8, 8, 0.5, 1.1), ValueError, "got 1.1"),
        (lambda: brf_mask(KEY, 8, 8, 0.5, 0.2, degrees="binomial"), ValueError, "'fixed', 'poisson' or"),
        (lambda: brf_mask(KEY, 8, 8, 0.5, 0.2, degree_side="left"), ValueError, "'out' or 'in', got 'left'"),
        (lambda: brf_mask(KEY, 0, 8, 0.5, 0.2), ValueError, "n_in must be at least 1, got 0"),
        (
            lambda: brf_mask(KEY, 8, 8, 0.5, 0.2, batch=(0,)),
            ValueError,
            "batch must hold sizes of at least 1",
        ),
        (lambda: brf_mask(jax.random.PRNGKey(0), 8, 8, 0.5, 0.2), TypeError, "key must be a typed key"),
        (lambda: brf_mask(KEY, 65537, 65539, 0.5, 0.2), ValueError, "too large for exact ring distances"),
        (lambda: bsw_mask(KEY, 8, 8, 0.5, 2.0), ValueError, "beta must be in [0, 1]"),
        (lambda: bsw_mask(KEY, 8, 9, 0.1), ValueError, "gives 7 links to 9 output neurons"),
        (lambda: er_mask(KEY, (4, 4), 17), ValueError, "from 0 to 16 for a layer (4, 4), got 17"),
        (lambda: er_mask(KEY, (4, 4), 0.5), TypeError, "link_count turns a density into one"),
        (lambda: csti_mask(jnp.ones(4), (4, 4), 0.5), ValueError, "features must be [samples, n]"),
        (lambda: csti_mask(jnp.ones((1, 4)), (4, 4), 0.5), ValueError, "two samples or more, got [1, 4]"),
        (lambda: csti_mask(jnp.ones((3, 4)), (4, 6), 0.5), ValueError, "multiples of the 4 features"),
        (lambda: csti_mask(jnp.ones((3, 4)), (2, 4, 4), 0.5), ValueError, "shape must be (n_in, n_out)"),
        (lambda: csti_mask(jnp.ones((3, 4), complex), (4, 4), 0.5), TypeError, "must be real numbers"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
