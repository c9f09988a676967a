"""The stacked Hadamard code and its fast transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.heads.hadamard import (
    block_signs,
    hadamard_columns,
    hadamard_logits,
    walsh_hadamard,
    walsh_matrix,
)

KEY = jax.random.key(3)
sizes = st.sampled_from([1, 2, 8, 16, 64])
transform = jax.jit(walsh_hadamard, static_argnames="radix")
logits_of = jax.jit(hadamard_logits, static_argnames=("num_classes", "width", "radix"))


def sylvester(n):
    """H_2n = [[H, H], [H, -H]], the definition."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


@given(sizes)
def test_the_matrix_is_sylvesters(n):
    np.testing.assert_array_equal(walsh_matrix(n), sylvester(n))


@given(sizes, st.sampled_from([2, 4, 8, 128]), st.integers(0, 9))
def test_the_transform_is_the_product_with_the_matrix_for_every_radix(n, radix, seed):
    x = jax.random.randint(jax.random.key(seed), (3, n), -8, 9).astype(jnp.float32)
    np.testing.assert_array_equal(transform(x, radix=radix), np.asarray(x) @ sylvester(n))


@given(sizes, st.integers(0, 9))
def test_the_transform_twice_is_n_times_the_identity(n, seed):
    x = jax.random.randint(jax.random.key(seed), (2, n), -8, 9).astype(jnp.float32)
    np.testing.assert_array_equal(transform(transform(x, radix=4), radix=2), n * np.asarray(x))


def additions(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_the_butterfly_takes_n_log_n_operations_where_the_matrix_takes_n_squared():
    x = jnp.ones((4, 256))
    butterfly = additions(lambda x: walsh_hadamard(x, radix=2), x)
    assert butterfly <= 1.01 * 4 * 256 * 8
    assert additions(lambda x: walsh_hadamard(x, radix=16), x) <= 1.01 * 4 * 256 * (2 * 32)


def test_logits_of_a_code_take_two_square_roots_of_the_dimension_a_class_or_its_logarithm():
    h, classes = jnp.ones((64, 256)), 1024
    dense = additions(lambda h: h @ jnp.ones((256, classes)), h)
    assert dense == 2 * 64 * 256 * classes
    split = additions(lambda h: hadamard_logits(None, h, classes, width=16, radix=16), h)
    assert split < 0.2 * dense  # (16 + 16) / 256 and the signs
    butterfly = additions(lambda h: hadamard_logits(None, h, classes, width=256, radix=2), h)
    assert butterfly < 0.05 * dense


@given(
    st.sampled_from([(16, 32), (8, 24), (4, 10), (16, 5), (1, 3)]),
    st.integers(0, 5),
    st.sampled_from([2, 4]),
)
def test_fast_logits_are_the_products_with_the_columns(size, seed, radix):
    dim, classes = size
    h = jax.random.normal(jax.random.key(seed), (2, 3, dim))
    columns = hadamard_columns(KEY, jnp.arange(classes, dtype=jnp.int32), dim)
    expected = np.asarray(h, np.float64) @ np.asarray(columns, np.float64).T
    for width in {1, dim, None}:
        got = logits_of(KEY, h, num_classes=classes, width=width, radix=radix)
        np.testing.assert_allclose(got, expected, atol=2e-6 * dim)


def test_blocks_are_orthonormal_and_whole_blocks_a_tight_frame():
    with jax.enable_x64(True):
        code = np.asarray(hadamard_columns(KEY, jnp.arange(48, dtype=jnp.int32), 16), np.float64).T
    for block in np.split(code, 3, axis=1):
        np.testing.assert_allclose(block.T @ block, np.eye(16), atol=1e-12)
    np.testing.assert_allclose(code @ code.T, 3 * np.eye(16), atol=1e-12)


@given(st.permutations(range(12)))
def test_a_column_does_not_depend_on_which_others_are_made(order):
    order = jnp.asarray(order, jnp.int32)
    all_of_them = hadamard_columns(KEY, jnp.arange(12, dtype=jnp.int32), 4)
    np.testing.assert_array_equal(hadamard_columns(KEY, order, 4), all_of_them[order])


def test_signs_are_fair_and_differ_between_blocks_and_keys():
    signs = np.asarray(block_signs(KEY, jnp.arange(64, dtype=jnp.int32), 64))
    assert abs(signs.mean() - 0.5) < 5 * 0.5 / 64  # five standard deviations of a mean of 4096 coins
    assert len({row.tobytes() for row in signs}) == 64
    other = block_signs(jax.random.key(4), jnp.arange(64, dtype=jnp.int32), 64)
    assert 0.4 < np.mean(signs != np.asarray(other)) < 0.6


def test_the_largest_cosine_stays_under_that_of_random_directions():
    # Two blocks share d distinct products, each a mean of d signs: Gaussian tails over their number.
    dim, classes = 64, 512
    code = np.asarray(hadamard_columns(KEY, jnp.arange(classes, dtype=jnp.int32), dim))
    gram = np.abs(code @ code.T) - np.eye(classes)
    welch = np.sqrt((classes - dim) / (dim * (classes - 1)))
    assert welch <= gram.max() <= np.sqrt(2 * np.log(classes**2 / dim) / dim)


def test_bfloat16_features_are_summed_in_float32():
    h = jax.random.normal(KEY, (8, 256)).astype(jnp.bfloat16)
    exact = hadamard_logits(KEY, h.astype(jnp.float32), 512)
    low = hadamard_logits(KEY, h, 512)
    assert low.dtype == jnp.float32
    # The partial sums are rounded once, to 2^-9 of each; the last sums are not.
    assert float(jnp.abs(low - exact).max()) < 2**-8 * float(jnp.abs(exact).max())
    assert np.mean(low != low.astype(jnp.bfloat16).astype(jnp.float32)) > 0.9
    single = hadamard_logits(KEY, h[:, :64], 256)  # one factor: nothing is rounded
    np.testing.assert_allclose(
        single, hadamard_logits(KEY, h[:, :64].astype(jnp.float32), 256), rtol=1e-6, atol=1e-6
    )


def test_any_number_of_classes_is_as_cheap_as_a_multiple_of_the_width():
    h = jnp.ones((64, 1024))
    odd, even = (additions(lambda h, k=k: hadamard_logits(KEY, h, k), h) for k in (2001, 2048))
    assert odd <= even


def test_eight_devices_give_the_logits_of_one_without_a_gather():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec
    h = jax.random.normal(KEY, (4, 64))
    out = jax.sharding.NamedSharding(mesh, spec("data", "tensor"))
    placed = jax.device_put(h, jax.sharding.NamedSharding(mesh, spec("data")))
    program = jax.jit(lambda h: hadamard_logits(KEY, h, 512), out_shardings=out).lower(placed).compile()
    assert "all-gather" not in program.as_text()
    np.testing.assert_allclose(program(placed), hadamard_logits(KEY, h, 512), atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: walsh_hadamard(jnp.ones((2, 6))), r"power of two, got shape \(2, 6\)"),
        (lambda: walsh_hadamard(jnp.ones(4), radix=3), "radix must be 2, 4, 8, ..., got 3"),
        (lambda: hadamard_logits(KEY, jnp.ones((2, 6)), 8), r"power of two, got \(2, 6\)"),
        (lambda: hadamard_logits(KEY, jnp.ones((2, 8)), 12, width=16), "divides the dimension 8, got 16"),
    ],
    ids=range(4),
)
def test_sizes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
