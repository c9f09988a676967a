"""Selections are exact: numpy's stable sort is the judge, on one device and on eight."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core.selection import gumbel_top_k_mask, kth_value, perturbed, top_k_mask

NOT_REAL = 12
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, -1e-45, 3.4e38, 0.5])
floats = few | st.floats(width=32)
vectors = st.lists(floats, min_size=NOT_REAL, max_size=NOT_REAL)
masks = st.none() | st.lists(st.booleans(), min_size=NOT_REAL, max_size=NOT_REAL)

select = jax.jit(top_k_mask, static_argnames=("largest", "bits_per_pass", "batch_dims"))
threshold = jax.jit(kth_value, static_argnames=("largest", "bits_per_pass", "batch_dims"))


def by_sorting(scores, k, eligible=None, largest=True):
    """The k best candidates by numpy's stable sort, in float64 or exact integers."""
    scores = np.asarray(scores)
    flat = scores.reshape(-1)
    candidate = np.ones(flat.shape, bool) if eligible is None else np.asarray(eligible).reshape(-1)
    if np.issubdtype(flat.dtype, np.integer):
        flat = flat.astype(object)
    else:
        flat = flat.astype(np.float64)
        candidate = candidate & ~np.isnan(flat)
    ranked = sorted(np.flatnonzero(candidate), key=lambda i: -flat[i] if largest else flat[i])
    mask = np.zeros(flat.shape, bool)
    mask[ranked[: max(0, k)]] = True
    return mask.reshape(scores.shape)


@given(vectors, masks, st.integers(0, NOT_REAL + 2), st.booleans(), st.sampled_from([None, 3, 4]))
def test_the_mask_is_that_of_a_stable_sort(scores, eligible, k, largest, bits):
    scores = np.asarray(scores, np.float32)
    eligible = None if eligible is None else np.asarray(eligible)
    mask = select(scores, jnp.int32(k), eligible=eligible, largest=largest, bits_per_pass=bits)
    np.testing.assert_array_equal(mask, by_sorting(scores, k, eligible, largest))


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool"]
)
@pytest.mark.parametrize("largest", [True, False])
def test_every_dtype_is_ordered_by_value(dtype, largest):
    rng = np.random.default_rng(0)
    if dtype == "bool":
        scores = rng.random(40) < 0.5
    elif "int" in dtype:
        info = np.iinfo(dtype)
        scores = rng.integers(info.min, info.max, 40, dtype, endpoint=True)
        scores[:3] = info.min, info.max, 0
    else:
        scores = np.array(jnp.asarray(rng.normal(size=40) * 10.0 ** rng.integers(-6, 4, 40), dtype))
        scores[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan]
    plain = scores.astype(np.int64) if dtype == "bool" else scores
    eligible = rng.random(40) < 0.7
    for k in (0, 1, 7, 25, 40, 50):
        got = select(scores, jnp.int32(k), eligible=eligible, largest=largest)
        np.testing.assert_array_equal(got, by_sorting(plain, k, eligible, largest))


def test_float64_is_exact_under_x64():
    with jax.enable_x64(True):
        scores = np.array([1.0, 1.0 + 2**-50, 1.0 - 2**-52, -0.0, 0.0, 5e-324, np.nan])
        for k in range(8):
            np.testing.assert_array_equal(top_k_mask(scores, k), by_sorting(scores, k))
        assert float(kth_value(jnp.asarray(scores), 1)) == 1.0 + 2**-50


@pytest.mark.parametrize("bits", range(1, 9))
def test_any_number_of_bits_a_pass_gives_the_same_mask(bits):
    scores = np.random.default_rng(1).normal(size=37).round(1).astype(np.float32)
    np.testing.assert_array_equal(top_k_mask(scores, 11, bits_per_pass=bits), by_sorting(scores, 11))
    small = (scores * 10).astype(np.int8)
    np.testing.assert_array_equal(top_k_mask(small, 11, bits_per_pass=bits), by_sorting(small, 11))


@pytest.mark.parametrize(
    "scores, k, expected",
    [
        ([1.0, 2.0], 0, [False, False]),
        ([1.0, 2.0], 5, [True, True]),
        ([math.nan, math.nan], 1, [False, False]),
        ([math.nan, -math.inf], 2, [False, True]),
        ([math.inf, math.inf, 1.0], 1, [True, False, False]),
        ([-0.0, 0.0], 1, [True, False]),
        ([0.0, 1e-45], 1, [False, True]),
        ([], 3, []),
    ],
)
def test_edge_cases_are_as_the_table_says(scores, k, expected):
    mask = top_k_mask(jnp.asarray(scores, jnp.float32), k)
    assert mask.tolist() == expected
    assert mask.dtype == bool


def test_a_traced_negative_k_selects_nothing_and_a_scalar_is_a_selection_of_one():
    assert not select(jnp.arange(3.0), jnp.int32(-2)).any()
    assert bool(top_k_mask(jnp.float32(3), 1))


def test_a_changing_k_does_not_compile_again():
    traces = []

    @jax.jit
    def count(scores, k):
        traces.append(1)
        return top_k_mask(scores, k).sum()

    scores = jnp.arange(10.0)
    assert [int(count(scores, jnp.int32(k))) for k in range(12)] == [*range(11), 10]
    assert len(traces) == 1


@given(vectors, masks, st.integers(0, NOT_REAL + 2), st.booleans())
def test_the_kth_value_is_the_kth_of_the_sorted_scores(scores, eligible, k, largest):
    scores = np.asarray(scores, np.float32)
    keep = ~np.isnan(scores) & (True if eligible is None else np.asarray(eligible))
    ranked = sorted(scores[keep].astype(np.float64), reverse=largest)
    got = float(
        threshold(
            scores, jnp.int32(k), eligible=None if eligible is None else np.asarray(eligible), largest=largest
        )
    )
    if k == 0 or not ranked:
        assert math.isnan(got)
    else:
        assert got == ranked[min(k, len(ranked)) - 1]


def test_the_kth_value_keeps_the_dtype():
    assert kth_value(jnp.asarray([3, -7, 5], jnp.int8), 3) == -7
    assert kth_value(jnp.asarray([3, -7, 5], jnp.int8), 3).dtype == jnp.int8
    assert kth_value(jnp.asarray([3, 7, 5], jnp.uint16), 1, largest=False) == 3
    assert float(kth_value(jnp.asarray([0.5, -2.0], jnp.bfloat16), 2)) == -2.0
    assert kth_value(jnp.zeros((0,), jnp.int32), 2) == 0


def test_batch_dims_select_layer_by_layer_with_a_k_of_their_own():
    scores = np.random.default_rng(2).normal(size=(2, 3, 4, 5)).astype(np.float32).round(1)
    k = np.arange(6, dtype=np.int32).reshape(2, 3) * 3
    mask = np.asarray(select(scores, k, batch_dims=2))
    values = np.asarray(threshold(scores, k, batch_dims=2))
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(mask[i, j], by_sorting(scores[i, j], int(k[i, j])))
        assert k[i, j] == 0 or values[i, j] == np.sort(scores[i, j].reshape(-1))[-k[i, j]]
    shared = np.asarray(select(scores, jnp.int32(4), eligible=scores > 0, batch_dims=1))
    for i in range(2):
        np.testing.assert_array_equal(shared[i], by_sorting(scores[i], 4, scores[i] > 0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: top_k_mask(jnp.ones(3), -1), ValueError, "k must be at least 0, got -1"),
        (lambda: top_k_mask(jnp.ones(3), 1.5), TypeError, "k must be an integer, got float32"),
        (lambda: top_k_mask(jnp.ones(3, jnp.complex64), 1), TypeError, "real numbers .* got complex64"),
        (
            lambda: top_k_mask(jnp.ones(3), 1, eligible=jnp.ones(2, bool)),
            ValueError,
            r"bool\[3\] .* got bool\[2\]",
        ),
        (
            lambda: top_k_mask(jnp.ones(3), 1, eligible=jnp.ones(3)),
            ValueError,
            r"bool\[3\] .* got float32\[3\]",
        ),
        (
            lambda: top_k_mask(jnp.ones(3), jnp.ones(3, int)),
            ValueError,
            "k must be a scalar or have the batch shape",
        ),
        (lambda: top_k_mask(jnp.ones(3), 1, batch_dims=2), ValueError, "batch_dims must be between 0 and 1"),
        (
            lambda: top_k_mask(jnp.ones(3), 1, bits_per_pass=9),
            ValueError,
            "bits_per_pass must be between 1 and 8",
        ),
        (lambda: gumbel_top_k_mask(jax.random.PRNGKey(0), jnp.ones(3), 1), TypeError, "legacy uint32 key"),
        (
            lambda: gumbel_top_k_mask(jax.random.key(0), jnp.ones(3, int), 1),
            TypeError,
            "log_weights must be floats",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_2_to_the_32_scores_in_one_selection_are_refused():
    shape = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="fewer than 2\\^32 scores"):
        jax.eval_shape(lambda s: top_k_mask(s, 1), shape)
    assert jax.eval_shape(lambda s: top_k_mask(s, 1, batch_dims=1), shape).shape == (1 << 16, 1 << 16)


MESHES = {
    "rows": ("x", None),
    "columns": (None, "x"),
    "both": ("x", "y"),
    "one-axis-for-both": (("x", "y"), None),
}


def sharded_over(spec):
    sizes = (4, 2) if "y" in str(spec) else (8,)
    axes = ("x", "y")[: len(sizes)]
    mesh = jax.make_mesh(sizes, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


@pytest.mark.parametrize("layout", MESHES)
@pytest.mark.parametrize("bits", [1, 4])
def test_sharded_scores_give_the_same_bits_and_only_counts_travel(layout, bits):
    sharding = sharded_over(MESHES[layout])
    scores = np.random.default_rng(3).normal(size=(64, 128)).round(2).astype(np.float32)

    def both(scores, log_weights, k):
        drawn = gumbel_top_k_mask(jax.random.key(5), log_weights, k, bits_per_pass=bits)
        return top_k_mask(scores, k, bits_per_pass=bits), drawn

    plain = jax.jit(both)(scores, scores, jnp.int32(777))
    on_mesh = (
        jax.jit(both, in_shardings=(sharding, sharding, None)).lower(scores, scores, jnp.int32(777)).compile()
    )
    masks = on_mesh(jax.device_put(scores, sharding), jax.device_put(scores, sharding), jnp.int32(777))
    np.testing.assert_array_equal(masks[0], by_sorting(scores, 777))
    for ours, theirs in zip(plain, masks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert int(theirs.sum()) == 777
        assert theirs.sharding.is_equivalent_to(sharding, 2)
    assert_only_counts_travel(on_mesh.as_text(), 1 << bits)


def assert_only_counts_travel(text, largest):
    # A name may be "sort" in metadata; what counts is the operation.
    operations = set(re.findall(r"= \S+ ([a-z-]+)\(", text))
    assert "all-reduce" in operations
    forbidden = {
        "sort",
        "all-gather",
        "all-to-all",
        "collective-permute",
        "gather",
        "scatter",
    }
    assert not operations & forbidden
    # A prefix sum is a reduce-window of stride 1; tiles that only touch are a reduction in two levels.
    for size, stride in re.findall(r"reduce-window\(.*window=\{size=([0-9x]+) stride=([0-9x]+)", text):
        assert size == stride
    for shape in re.findall(r"= \(?[a-z0-9]+\[([0-9,]*)\][^=]* all-reduce\(", text):
        assert math.prod(int(n) for n in shape.split(",") if n) <= largest


def test_there_is_no_sort_on_one_device_either():
    text = jax.jit(top_k_mask).lower(jnp.ones(1000), jnp.int32(3)).compile().as_text()
    assert not re.search(r"= \S+ (sort|topk|custom-call)\(", text)
    assert re.search(
        r"= \(?.*(sort|custom-call)\(", jax.jit(jnp.sort).lower(jnp.ones(1000)).compile().as_text()
    )


def plackett_luce(weights, k):
    """Probability of every ordered draw of k, by enumeration."""
    table = {}
    for order in itertools.permutations(range(len(weights)), k):
        left, probability = sum(weights), 1.0
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        table[order] = probability
    return table


def chi_square_limit(degrees):
    """The 1 - 1e-4 quantile (z = 3.72) by Wilson and Hilferty's cube, good to a percent from 2 degrees on."""
    return degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0, 4.0], [0.05, 0.05, 10.0, 1.0, 1.0]])
def test_gumbel_top_k_draws_sets_with_the_probabilities_of_successive_sampling(weights):
    draws, k = 20_000, 2
    keys = jax.random.split(jax.random.key(11), draws)
    masks = np.asarray(
        jax.jit(jax.vmap(lambda key: gumbel_top_k_mask(key, jnp.log(jnp.asarray(weights)), k)))(keys)
    )
    assert (masks.sum(1) == k).all()
    expected = {}
    for order, probability in plackett_luce(weights, k).items():
        expected[frozenset(order)] = expected.get(frozenset(order), 0) + probability
    codes = masks @ (1 << np.arange(len(weights)))
    statistic = 0.0
    for chosen, probability in expected.items():
        observed = np.sum(codes == sum(1 << i for i in chosen))
        statistic += (observed - draws * probability) ** 2 / (draws * probability)
    assert statistic < chi_square_limit(len(expected) - 1)


def test_growing_k_reveals_the_ordered_draw_with_its_probabilities():
    weights, draws = [1.0, 2.0, 5.0], 20_000
    keys = jax.random.split(jax.random.key(12), draws)

    @jax.jit
    @jax.vmap
    def draw(key):
        return jnp.stack([gumbel_top_k_mask(key, jnp.log(jnp.asarray(weights)), k) for k in (1, 2)])

    masks = np.asarray(draw(keys))
    assert (masks[:, 1] >= masks[:, 0]).all()
    first = masks[:, 0].argmax(1)
    second = (masks[:, 1] & ~masks[:, 0]).argmax(1)
    table = plackett_luce(weights, 2)
    counts = [np.sum((first == i) & (second == j)) for i, j in table]
    statistic = sum((c - draws * p) ** 2 / (draws * p) for c, p in zip(counts, table.values(), strict=True))
    assert statistic < chi_square_limit(len(table) - 1)


def test_impossible_entries_are_never_drawn_and_infinite_ones_first():
    draw = jax.jit(gumbel_top_k_mask)
    log_weights = jnp.asarray([-jnp.inf, 0.0, jnp.nan, jnp.inf, 1.0, jnp.inf])
    for seed in range(5):
        key = jax.random.key(seed)
        assert draw(key, log_weights, 10).tolist() == [False, True, False, True, True, True]
        assert draw(key, log_weights, 1).tolist() == [False, False, False, True, False, False]
    eligible = jnp.asarray([True, True, True, False, False, False])
    assert gumbel_top_k_mask(key, log_weights, 3, eligible=eligible).tolist() == [False, True] + [False] * 4


def test_bfloat16_weights_and_layers_draw_in_float32():
    log_weights = jnp.zeros((3, 100), jnp.bfloat16)
    draw = jax.jit(gumbel_top_k_mask, static_argnames="batch_dims")
    mask = draw(jax.random.key(0), log_weights, jnp.array([0, 10, 100]), batch_dims=1)
    assert mask.sum(1).tolist() == [0, 10, 100]


def test_the_noise_of_a_draw_is_standard_gumbel_to_the_top_of_the_race():
    count = 1 << 17
    noise = np.sort(np.asarray(perturbed(jax.random.key(7), jnp.zeros(count)), np.float64))
    law = np.exp(-np.exp(-noise))
    assert np.isfinite(noise).all()
    # Kolmogorov's distance at the level 0.001.
    assert np.abs(law - (np.arange(count) + 0.5) / count).max() < 1.95 / math.sqrt(count)
    assert len(np.unique(noise[-100:])) == 100
    assert perturbed(jax.random.key(7), jnp.array([-jnp.inf, jnp.inf])).tolist() == [-math.inf, math.inf]


def test_noise_is_for_float32_and_float64_alone():
    with pytest.raises(TypeError, match="float32 or float64, got bfloat16"):
        perturbed(jax.random.key(0), jnp.zeros(2, jnp.bfloat16))
