"""Node based Cannistraci-Hebb scores."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.core import top_k_mask
from odjax.sparse.link_prediction import NODE_PREDICTORS, ch_scores, common_neighbours, sharded_ch_scores

N, M = 9, 6
F = {
    "CH2_L3n": lambda i, e: (1 + i) / (1 + e),
    "CH3_L3n": lambda i, e: 1 / (1 + e),
    "CH3.1_L3n": lambda i, e: (1 + i) / (1 + e) ** (1 + e / (1 + e)),
}


def graphs(shape=(N, M)):
    """Masks of every density."""

    def draw(seed: int, density: float) -> np.ndarray:
        return np.random.default_rng(seed).random(shape) < density

    return st.builds(draw, st.integers(0, 2**32 - 1), st.floats(0, 1))


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(ch_scores, **options))


def scores(mask, **options):
    return np.asarray(compiled(**options)(jnp.asarray(mask)))


def by_enumeration(mask: np.ndarray, predictor: str) -> np.ndarray:
    """The definition, node by node, in float64."""
    n, m = mask.shape
    ins = [set(np.flatnonzero(row)) for row in mask]
    outs = [set(np.flatnonzero(column)) for column in mask.T]
    total = np.zeros((n, m))
    for u in range(n):
        for v in range(m):
            if mask[u, v]:
                continue
            paths = [(a, b) for a in ins[u] for b in outs[v] if a in ins[b]]
            for b in {b for _, b in paths}:
                internal = len({a for a, other in paths if other == b})
                total[u, v] += F[predictor](internal, len(ins[b]) - internal - 1)
            for a in {a for a, _ in paths}:
                internal = len({b for other, b in paths if other == a})
                total[u, v] += F[predictor](internal, len(outs[a]) - internal - 1)
    return total


@pytest.mark.parametrize("predictor", NODE_PREDICTORS)
@given(mask=graphs())
def test_the_matrix_form_is_the_sum_over_the_nodes_of_the_local_community(predictor, mask):
    want = by_enumeration(mask, predictor)
    # A weight is cut at 2^-24 of the largest of its row, which is at most 1 + M or 1 + N.
    np.testing.assert_allclose(
        scores(mask, predictor=predictor), want, rtol=1e-6, atol=N * (1 + N) * 2.0**-24
    )
    np.testing.assert_allclose(scores(mask, predictor=predictor, exact=False), want, rtol=2e-6)


@given(mask=graphs())
def test_a_score_is_positive_exactly_where_a_link_is_absent_and_a_path_of_length_three_joins_its_ends(mask):
    a = mask.astype(np.int64)
    reachable = (a @ a.T @ a > 0) & ~mask
    for predictor in NODE_PREDICTORS:
        got = scores(mask, predictor=predictor)
        np.testing.assert_array_equal(got > 0, reachable)
        np.testing.assert_array_equal(got[~reachable], 0)


@given(mask=graphs(), seed=st.integers(0, 1000))
def test_scores_move_with_the_nodes_and_with_the_sides_bit_by_bit(mask, seed):
    rng = np.random.default_rng(seed)
    p, q = rng.permutation(N), rng.permutation(M)
    got = scores(mask)
    np.testing.assert_array_equal(scores(mask[p][:, q]), got[p][:, q])
    np.testing.assert_array_equal(scores(mask.T), got.T)


@given(first=graphs((4, 3)), second=graphs((5, 3)))
def test_blocks_without_links_between_them_are_scored_alone_and_never_joined(first, second):
    both = np.zeros((N, M), bool)
    both[:4, :3], both[4:, 3:] = first, second
    got = scores(both)
    np.testing.assert_array_equal(got[:4, :3], scores(first))
    np.testing.assert_array_equal(got[4:, 3:], scores(second))
    assert not got[:4, 3:].any()
    assert not got[4:, :3].any()


@pytest.mark.parametrize(("n", "m"), [(2, 2), (5, 3), (4, 7)])
def test_the_one_absent_link_of_a_complete_graph_has_the_score_of_the_formula(n, m):
    mask = np.ones((n, m), bool)
    mask[n - 1, 0] = False
    want = np.zeros((n, m))
    want[n - 1, 0] = (n - 1) * m + (m - 1) * n
    np.testing.assert_array_equal(scores(mask), want)


def test_the_scores_of_a_graph_small_enough_for_the_hand():
    mask = np.array([[True, True, False], [False, True, True]])
    np.testing.assert_array_equal(scores(mask), [[0, 0, 4], [4, 0, 0]])
    np.testing.assert_array_equal(scores(mask, predictor="CH3_L3n"), [[0, 0, 2], [2, 0, 0]])


@pytest.mark.parametrize("precision", [None, "bfloat16", "float32", "tensorfloat32"])
def test_counts_are_exact_integers_beyond_4096_in_every_precision(precision):
    mask = np.random.default_rng(0).random((3, 9001)) < 0.8
    with jax.default_matmul_precision(precision) if precision else jax.default_matmul_precision("default"):
        got = common_neighbours(jnp.asarray(mask))
    a = mask.astype(np.int64)
    assert got.dtype == jnp.int32
    assert (a @ a.T).min() > 4096
    np.testing.assert_array_equal(got, a @ a.T)


@given(mask=graphs((2, N, M)))
def test_blocks_of_rows_and_stacked_layers_give_the_same_bits(mask):
    apart = np.stack([scores(layer) for layer in mask])
    np.testing.assert_array_equal(scores(mask), apart)
    np.testing.assert_array_equal(scores(mask, row_block=4), apart)
    np.testing.assert_array_equal(scores(mask[0], row_block=100), apart[0])


def test_sums_over_more_than_4096_nodes_are_exact_too():
    mask = np.random.default_rng(0).random((4200, 5)) < 0.5
    got = scores(mask, row_block=600)
    np.testing.assert_array_equal(scores(mask[::-1], row_block=600), got[::-1])
    assert got.max() > 4096
    np.testing.assert_allclose(got, scores(mask, row_block=600, exact=False), rtol=4200 * 2.0**-24)


def test_blocks_of_rows_never_hold_all_pairs_of_inputs():
    mask = jax.ShapeDtypeStruct((4, 2048, 32), jnp.bool_)
    pairs = 4 * 2048 * 2048

    def temporary(row_block):
        return compiled(row_block=row_block).lower(mask).compile().memory_analysis().temp_size_in_bytes

    assert temporary(None) >= pairs
    assert temporary(64) < pairs // 4


def test_the_kernel_is_in_programs_for_tpus_alone_and_only_where_it_is_asked_for():
    mask = jnp.asarray(np.random.default_rng(5).random((2, N, M)) < 0.3)

    def program(platform, implementation):
        fn = jax.jit(functools.partial(ch_scores, implementation=implementation))
        return jax.export.export(fn, platforms=[platform])(mask).mlir_module()

    assert "link_scores_columns" in program("tpu", "pallas")
    assert "link_scores_columns" not in program("tpu", "xla")
    assert "link_scores_columns" not in program("cpu", "pallas")
    np.testing.assert_array_equal(scores(mask, implementation="pallas"), scores(mask))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("row_block", [None, 3])
def test_eight_devices_give_the_bits_of_one_and_gather_no_scores(mesh, row_block):
    mask = np.random.default_rng(1).random((2, 40, 21)) < 0.2
    fn = jax.jit(functools.partial(sharded_ch_scores, mesh=mesh, axis="data", row_block=row_block))
    placed = jax.device_put(mask, NamedSharding(mesh, P()))
    executable = fn.lower(placed).compile()
    lines = executable.as_text().splitlines()
    assert not [line for line in lines if " all-gather" in line or " all-reduce" in line]
    assert [line for line in lines if " all-to-all(" in line]
    got = executable(placed)
    assert got.sharding.shard_shape(got.shape) == (2, 5, 21)
    np.testing.assert_array_equal(got, scores(mask))


def test_the_links_grown_are_the_same_on_one_and_on_eight_devices(mesh):
    mask = np.random.default_rng(3).random((40, 24)) < 0.1
    one = jax.jit(lambda mask: top_k_mask(ch_scores(mask), 50))(mask)
    eight = jax.jit(lambda mask: top_k_mask(sharded_ch_scores(mask, mesh=mesh, axis="data"), 50))(mask)
    assert one.sum() == 50
    assert not (np.asarray(one) & mask).any()
    np.testing.assert_array_equal(eight, one)


def test_devices_need_not_divide_the_nodes(mesh):
    mask = np.random.default_rng(2).random((13, 6)) < 0.3
    got = sharded_ch_scores(jnp.asarray(mask), mesh=mesh, axis="data")
    np.testing.assert_array_equal(got, scores(mask))


def test_devices_that_divide_the_outputs_alone_shard_the_outputs_and_gather_nothing(mesh):
    mask = np.random.default_rng(2).random((13, 24)) < 0.3
    fn = jax.jit(functools.partial(sharded_ch_scores, mesh=mesh, axis="data"))
    executable = fn.lower(jax.device_put(mask, NamedSharding(mesh, P()))).compile()
    assert " all-gather" not in executable.as_text()
    got = executable(jax.device_put(mask, NamedSharding(mesh, P())))
    assert got.sharding.shard_shape(got.shape) == (13, 3)
    np.testing.assert_array_equal(got, scores(mask))


def test_without_a_mesh_it_is_the_mesh_in_force_and_without_any_the_scores_of_one_device(mesh):
    mask = jnp.asarray(np.random.default_rng(4).random((16, 9)) < 0.3)
    grid = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    want = scores(mask)
    with jax.set_mesh(grid):
        for got, rows in [
            (jax.jit(sharded_ch_scores)(mask), 2),
            (sharded_ch_scores(mask), 2),
            (sharded_ch_scores(mask, axis="data"), 4),
        ]:
            assert got.sharding.shard_shape(got.shape) == (rows, 9)
            np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(sharded_ch_scores(mask), want)


def test_a_mask_in_shards_gives_the_bits_of_one_device(mesh):
    mask = np.random.default_rng(2).random((16, 24)) < 0.2
    placed = jax.device_put(mask, NamedSharding(mesh, P("data", None)))
    np.testing.assert_array_equal(compiled()(placed), scores(mask))


def test_bad_input_is_named():
    good = jnp.ones((2, 3), bool)
    with pytest.raises(TypeError, match=r"bool \[\.\.\., n, m\], got float32\[2, 3\]: type mask != 0"):
        ch_scores(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"got bool\[3\]: reshape a kernel to a matrix"):
        ch_scores(jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"predictor must be one of CH2_L3n.*got 'CH2'$"):
        ch_scores(good, "CH2")
    with pytest.raises(ValueError, match="for a sum over paths use path_scores"):
        ch_scores(good, "CH3_L3p")
    with pytest.raises(ValueError, match="row_block must be at least 1, or None"):
        ch_scores(good, row_block=0)
    with pytest.raises(ValueError, match="precision='highest' is for exact=False"):
        ch_scores(good, precision="highest")
    with pytest.raises(ValueError, match="precision='highest' is for implementation='xla'"):
        ch_scores(good, exact=False, precision="highest", implementation="pallas")
    with pytest.raises(ValueError, match="implementation must be 'xla' or 'pallas', got 'mosaic'"):
        ch_scores(good, implementation="mosaic")
    with pytest.raises(ValueError, match=r"up to 2\^16 nodes a side, got \[1, 65537\]: type exact=False"):
        jax.eval_shape(ch_scores, jax.ShapeDtypeStruct((1, 65537), jnp.bool_))
    with pytest.raises(ValueError, match=r"fewer than 2\^24 nodes a side"):
        jax.eval_shape(ch_scores, jax.ShapeDtypeStruct((1, 1 << 24), jnp.bool_))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="the mesh has no axis 'model', only 'data'"):
        sharded_ch_scores(good, mesh=mesh, axis="model")
    with pytest.raises(ValueError, match="no mesh is in force for the axis 'data': type mesh="):
        sharded_ch_scores(good, axis="data")
    with pytest.raises(ValueError, match="axis 'data' must be of type Auto, got Explicit"):
        sharded_ch_scores(good, mesh=jax.make_mesh((1,), ("data",)))
