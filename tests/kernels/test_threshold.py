"""Draws by a threshold with noise made anew in every pass: the kernel draws what a sort of the same keys draws."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.experimental.pallas import tpu as pltpu

from odjax.sparse.masks import pack, unpack
from odjax_kernels.packing import words_shape
from odjax_kernels.threshold import (
    gumbel_noise,
    gumbel_threshold_mask,
    gumbel_threshold_mask_reference,
    threefry_2x32,
)

SHAPE = (300, 130)
"""Two blocks of whole groups; neither rows nor columns fill them."""
WIDE = (90, 9000)
"""Blocks of 32 rows, chunks of 1024 columns and a rest, and a group of three words."""
KEY = jax.random.key(0)

kernel = jax.jit(functools.partial(gumbel_threshold_mask, interpret=True))
reference = jax.jit(gumbel_threshold_mask_reference)
noise_of = jax.jit(gumbel_noise, static_argnums=1)


def weights(shape, seed, special=0.0):
    """Normal log weights, some of them -inf, inf or NaN."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    odd = rng.random(shape) < special
    x[odd] = rng.choice(np.array([-np.inf, np.inf, np.nan], np.float32), odd.sum())
    return x


def draw(fn, x, k, seed=0, allowed=None):
    words = None if allowed is None else pack(jnp.asarray(allowed))
    return np.asarray(unpack(fn(jax.random.key(seed), jnp.asarray(x), jnp.int32(k), eligible=words), x.shape))


@given(
    seed=st.integers(0, 2**31 - 1),
    k=st.integers(0, SHAPE[0] * SHAPE[1] + 5),
    special=st.sampled_from([0, 0.3, 1]),
    allowed=st.sampled_from([0, 0.5, 1]),
)
def test_the_kernel_draws_what_a_sort_of_the_same_keys_draws_and_exactly_k(seed, k, special, allowed):
    x = weights(SHAPE, seed, special)
    allowed = np.random.default_rng(seed + 1).random(SHAPE) < allowed
    got = draw(kernel, x, k, seed, allowed)
    possible = allowed & (x > -np.inf)
    assert got.sum() == min(k, possible.sum())
    assert not (got & ~possible).any()
    np.testing.assert_array_equal(got, draw(reference, x, k, seed, allowed))


@pytest.mark.parametrize("k", [1, 1000, WIDE[0] * WIDE[1] - 1])
def test_blocks_smaller_than_a_group_and_chunks_of_columns_change_nothing(k):
    x = weights(WIDE, k)
    np.testing.assert_array_equal(draw(kernel, x, k), draw(reference, x, k))


@pytest.mark.parametrize("k", [0, 7, 9001, 555_555])
def test_equal_keys_are_taken_in_the_order_of_the_rows(k):
    got = draw(kernel, np.full(WIDE, np.inf, np.float32), k)
    np.testing.assert_array_equal(np.ravel(got), np.arange(got.size) < k)


def test_slices_are_draws_of_their_own_and_the_interpreter_of_tpu_programs_gives_the_same_bits():
    x = jnp.zeros((2, 9, 5))
    k = jnp.array([20, 45])
    want = reference(KEY, x, k)
    np.testing.assert_array_equal(gumbel_threshold_mask(KEY, x, k, interpret=pltpu.InterpretParams()), want)
    np.testing.assert_array_equal(jax.lax.population_count(want).sum((-1, -2)), k)
    np.testing.assert_array_equal(want[0], reference(KEY, x[0], jnp.int32(20)))
    same = reference(KEY, jnp.zeros((2, 2, 9, 5)), jnp.int32(20)).reshape(4, -1)
    assert all((a != b).any() for a, b in itertools.combinations(np.asarray(same), 2))


def test_the_generator_gives_the_known_answers_of_its_authors():
    answers = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, want in answers:
        got = threefry_2x32(*(tuple(map(jnp.uint32, words)) for words in (key, counter)))
        assert tuple(map(int, got)) == want


def test_noise_is_standard_gumbel():
    noise = np.sort(np.ravel(noise_of(jnp.array([1, 2], jnp.uint32), (400, 500))).astype(np.float64))
    law = np.exp(-np.exp(-noise))
    steps = np.arange(noise.size + 1) / noise.size
    distance = max((steps[1:] - law).max(), (law - steps[:-1]).max())
    assert distance < 1.63 / noise.size**0.5  # Kolmogorov's test at one in a hundred
    assert len(np.unique(noise)) > 0.97 * noise.size


def test_noise_is_that_of_the_counter_in_64_bits_where_float32_uniforms_end():
    """Against the definition in float64, on counters found to be far out in both tails."""
    seed = jnp.array([5, 6], jnp.uint32)
    shape = (400, 500)
    flat = jnp.arange(shape[0] * shape[1], dtype=jnp.uint32)
    high, low = jax.jit(threefry_2x32)((seed[0], seed[1]), (jnp.zeros_like(flat), flat))
    v = (np.asarray(high).astype(np.float64) * 2.0**32 + np.asarray(low)) * 2.0**-64
    far = np.argsort(v)[[*range(20), *range(-20, 0)]]
    want = -np.log(-np.log1p(-v[far]))
    got = np.ravel(noise_of(seed, shape))[far]
    assert want.max() > 11
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_draws_follow_the_weights_one_after_the_other():
    weight = np.array([1.0, 2.0, 4.0])
    trials = 20_000
    x = jnp.broadcast_to(jnp.log(jnp.asarray(weight, jnp.float32)), (trials, 1, 3))
    words = reference(KEY, x, jnp.int32(2))[:, 0]
    left_out = 1 - np.asarray(words & 1)
    p = weight / weight.sum()
    for out in range(3):
        a, b = (p[i] for i in range(3) if i != out)
        want = a * b / (1 - a) + b * a / (1 - b)
        assert abs(left_out[:, out].mean() - want) < 4 * (want * (1 - want) / trials) ** 0.5


def test_k_may_change_without_another_trace():
    traces = []

    @jax.jit
    def fn(k):
        traces.append(k)
        return gumbel_threshold_mask_reference(KEY, jnp.zeros((4, 4)), k)

    counts = [int(jax.lax.population_count(fn(jnp.int32(k))).sum()) for k in (-1, 0, 3, 99)]
    assert counts == [0, 0, 3, 16]
    assert len(traces) == 1


def test_a_key_of_another_generator_will_do():
    got = reference(jax.random.key(0, impl="rbg"), jnp.zeros((4, 4)), jnp.int32(5))
    assert jax.lax.population_count(got).sum() == 5


@pytest.mark.parametrize("candidates", [True, False])
def test_it_lowers_for_tpus_on_a_machine_without_one(candidates):
    words = jax.ShapeDtypeStruct(words_shape((2048, 5461)), jnp.uint32)
    arguments = (jax.ShapeDtypeStruct((2048, 5461), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
    if candidates:
        fn = jax.jit(lambda x, k, words: gumbel_threshold_mask(KEY, x, k, eligible=words))
        arguments = (*arguments, words)
    else:
        fn = jax.jit(lambda x, k: gumbel_threshold_mask(KEY, x, k))
    exported = jax.export.export(fn, platforms=["tpu"])(*arguments)
    assert "gumbel_threshold" in exported.mlir_module()
    assert (exported.out_avals[0].shape, exported.out_avals[0].dtype) == (words.shape, words.dtype)


def test_bad_input_is_named():
    x = jnp.zeros((4, 3))
    words = jnp.zeros((1, 3), jnp.uint32)
    with pytest.raises(TypeError, match=r"log_weights must be float32.*got int32\[4, 3\]"):
        gumbel_threshold_mask(KEY, x.astype(jnp.int32), 1)
    with pytest.raises(ValueError, match=r"\[\.\.\., n, m\] with entries, got float32\[4\]: reshape"):
        gumbel_threshold_mask(KEY, x[:, 0], 1)
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        gumbel_threshold_mask(KEY, x, -1)
    with pytest.raises(TypeError, match="k must be an integer, got float32: round"):
        gumbel_threshold_mask(KEY, x, jnp.float32(1))
    with pytest.raises(ValueError, match=r"k must be a scalar or have the batch shape \(\), got \(2,\)"):
        gumbel_threshold_mask(KEY, x, jnp.array([1, 2]))
    with pytest.raises(TypeError, match="eligible must be uint32, got bool: pack a bool mask first"):
        gumbel_threshold_mask(KEY, x, 1, eligible=x > 0)
    with pytest.raises(ValueError, match=r"eligible of a mask of shape \(40, 3\) are \[\.\.\., 2, 3\]"):
        gumbel_threshold_mask(KEY, jnp.zeros((40, 3)), 1, eligible=words)
    with pytest.raises(ValueError, match=r"eligible must have the batch shape \(2,\), got \(\)"):
        gumbel_threshold_mask(KEY, jnp.zeros((2, 4, 3)), 1, eligible=words)
    with pytest.raises(ValueError, match=r"fewer than 2\^30 entries"):
        jax.eval_shape(
            lambda x: gumbel_threshold_mask(KEY, x, 1), jax.ShapeDtypeStruct((1 << 15, 1 << 15), jnp.float32)
        )
