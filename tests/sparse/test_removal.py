"""Which links are removed and how many."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given

from odjax.core import gumbel_top_k_mask, top_k_mask
from odjax.sparse.removal import keep_count, removal_logits

N, M = 5, 4

seeds = st.integers(0, 2**32 - 1)
logits_of = jax.jit(removal_logits, static_argnames="eps")
count_of = jax.jit(keep_count)
soft = jax.jit(lambda key, w, mask, k: gumbel_top_k_mask(key, removal_logits(w, mask, temperature=9.0), k))
hard = jax.jit(lambda w, mask, k: top_k_mask(removal_logits(w, mask), k, eligible=mask))


def layer(seed, zeros=0.2):
    rng = np.random.default_rng(seed)
    mask = rng.random((N, M)) < rng.random()
    w = rng.standard_normal((N, M)).astype(np.float32) * (rng.random((N, M)) >= zeros).astype(np.float32)
    return w, mask


@given(seed=seeds, alpha=st.floats(0, 1), temperature=st.floats(0, 9))
def test_logits_are_the_power_of_the_formula_on_links_and_minus_infinity_elsewhere(seed, alpha, temperature):
    w, mask = layer(seed, zeros=0)
    got = np.asarray(logits_of(w, mask, alpha=np.float32(alpha), temperature=np.float32(temperature)))
    size = np.abs(w.astype(np.float64)) * mask
    alpha, temperature = float(np.float32(alpha)), float(np.float32(temperature))
    column, row = (alpha + (1 - alpha) * (1e-5 + size.sum(axis, keepdims=True)) for axis in (0, 1))
    want = temperature * np.log(np.where(mask, size / column + size / row, 1))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[mask], want[mask], rtol=2e-6, atol=2e-5)
    assert (got[~mask] == -np.inf).all()


def test_the_two_ends_are_magnitude_and_relative_importance():
    w, mask = jnp.array([[3.0, -1.0], [1.0, 100.0]]), jnp.array([[True, True], [True, False]])
    magnitude = removal_logits(w, mask, alpha=1.0)
    np.testing.assert_allclose(jnp.exp(magnitude), [[6, 2], [2, 0]], rtol=1e-6)
    importance = removal_logits(w, mask, alpha=0.0, eps=0.0)
    np.testing.assert_allclose(jnp.exp(importance), [[3 / 4 + 3 / 4, 1 + 1 / 4], [1 / 4 + 1, 0]], rtol=1e-6)


@given(seed=seeds, zeta=st.floats(0, 1))
def test_removal_never_keeps_an_absent_link_and_keeps_the_exact_count(seed, zeta):
    w, mask = layer(seed)
    links = int(mask.sum())
    wanted = keep_count(links, zeta)
    for kept in (soft(jax.random.key(seed % 1000), w, mask, wanted), hard(w, mask, wanted)):
        assert not (np.asarray(kept) & ~mask).any()
        assert kept.sum() == wanted


def test_the_links_kept_by_magnitude_are_the_same_on_one_and_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    w, mask = rng.standard_normal((16, 6)).astype(np.float32), rng.random((16, 6)) < 0.6
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
    placed = jax.device_put((w, mask), rows)
    want = soft(jax.random.key(0), w, mask, 20)
    assert want.sum() == 20
    np.testing.assert_array_equal(soft(jax.random.key(0), *placed, 20), want)


def test_links_of_weight_zero_stay_candidates_at_every_temperature():
    w, mask = jnp.zeros((2, 3)), jnp.array([[True, False, True], [True, False, False]])
    logits = removal_logits(w, mask, alpha=0.0, temperature=9.0)
    assert jnp.isfinite(logits[mask]).all()
    np.testing.assert_array_equal(top_k_mask(logits, 3, eligible=logits > -jnp.inf), mask)


def test_a_large_power_of_small_weights_does_not_underflow():
    w = jnp.array([[1e-6, 2e-6]], jnp.bfloat16)
    logits = removal_logits(w, jnp.ones((1, 2), bool), temperature=9.0)
    assert float(logits[0, 1] - logits[0, 0]) == pytest.approx(
        9 * math.log(float(w[0, 1]) / float(w[0, 0])), rel=1e-5
    )


@given(seed=seeds)
def test_relative_importance_is_equivariant_to_nodes_and_sides_and_blind_to_scale(seed):
    w, mask = layer(seed, zeros=0)
    rng = np.random.default_rng(seed)
    p, q = rng.permutation(N), rng.permutation(M)

    def scores(w, mask):
        return np.exp(np.asarray(logits_of(w, mask, alpha=0.0, temperature=1.0, eps=0.0)))

    want = scores(w, mask)
    np.testing.assert_allclose(scores(w[p][:, q], mask[p][:, q]), want[p][:, q], rtol=2e-6)
    np.testing.assert_allclose(scores(w.T, mask.T), want.T, rtol=2e-6)
    np.testing.assert_allclose(scores(w * np.float32(0.25), mask), want, rtol=2e-6)


def test_stacked_layers_are_layers_of_their_own():
    pairs = [layer(seed) for seed in range(3)]
    w, mask = (np.stack(part) for part in zip(*pairs, strict=True))
    got = logits_of(w, mask, alpha=0.0)
    for i in range(3):
        np.testing.assert_allclose(got[i], logits_of(w[i], mask[i], alpha=0.0), rtol=1e-6)


@given(links=st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4), thousandths=st.integers(0, 10**9))
@example(links=[10, 100, 16777217, 2**31 - 1], thousandths=3 * 10**8)
@example(links=[10, 100, 16777217, 2**31 - 1], thousandths=10**9)
def test_a_written_part_is_removed_exactly(links, thousandths):
    part = Fraction(thousandths, 10**9)
    want = [n - math.floor(part * n) for n in links]
    zeta = thousandths / 10**9
    assert [keep_count(n, zeta) for n in links] == want
    got = keep_count(jnp.array(links, jnp.int32), zeta)
    assert got.dtype == jnp.int32
    assert got.tolist() == want


@given(
    links=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4),
    zeta=st.floats(0, 1, width=32, allow_subnormal=False),
)
@example(links=[0, 1, 2**24 + 1, 2**32 - 1], zeta=1.0)
@example(links=[0, 1, 2**24 + 1, 2**32 - 1], zeta=2.0**-33)
@example(links=[0, 1, 2**24 + 1, 2**32 - 1], zeta=2.0**-8)
@example(links=[0, 1, 2**24 + 1, 2**32 - 1], zeta=2.0**-9)
def test_a_traced_part_is_removed_exactly(links, zeta):
    got = count_of(np.array(links, np.uint32), np.float32(zeta))
    assert got.tolist() == [n - math.floor(Fraction(zeta) * n) for n in links]


def test_a_count_in_float32_would_have_been_wrong():
    links = 2**24 + 3
    assert keep_count(links, 1.0) == 0 != links - int(np.float32(links) * np.float32(1.0))
    assert int(count_of(np.int32(links), np.float32(1.0))) == 0


def test_bad_input_is_named():
    w, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(TypeError, match="mask must be bool, got float32: type mask != 0"):
        removal_logits(w, w)
    with pytest.raises(TypeError, match="w must be real floats, got int32"):
        removal_logits(jnp.ones((2, 3), jnp.int32), mask)
    with pytest.raises(ValueError, match=r"of one shape, got \[2, 3\] and \[3, 2\]"):
        removal_logits(w, mask.T)
    with pytest.raises(ValueError, match="alpha must be at least 0 and at most 1, got 2"):
        removal_logits(w, mask, alpha=2)
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        removal_logits(w, mask, temperature=-1)
    with pytest.raises(ValueError, match=r"1 links of w \[2, 3\] have weights that are not finite"):
        removal_logits(w.at[0, 0].set(jnp.nan), mask)
    assert jnp.isfinite(removal_logits(w.at[0, 0].set(jnp.nan), mask.at[0, 0].set(False))[0, 1])
    assert jnp.isnan(logits_of(w.at[0, 0].set(jnp.nan), mask)[0, 0])
    with pytest.raises(ValueError, match=r"zeta must be at least 0 and at most 1, got 1\.5"):
        keep_count(3, 1.5)
    with pytest.raises(ValueError, match="links must be at least 0 and below 2\\^32, got -1"):
        keep_count(-1, 0.5)
    with pytest.raises(TypeError, match="links must be int32 or uint32, got float32"):
        keep_count(jnp.ones(2), 0.5)
    with pytest.raises(TypeError, match="zeta must be a number or a float array, got int32"):
        keep_count(jnp.array([3]), jnp.array(1))
