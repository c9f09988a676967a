"""The interface of token poolings: plain means and maxima, the module, the names, what all of them share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.heads.ggem import GGeM
from odjax.heads.pooling import NAMES, TokenPool, check_tokens, max_pool, mean_pool, token_pooling

SEEDS = st.integers(0, 2**31)
MEAN, MAX = jax.jit(mean_pool), jax.jit(max_pool)
POOLINGS = {
    "mean": token_pooling("mean"),
    "max": token_pooling("max"),
    "gem": token_pooling("gem"),
    "ggem": token_pooling("ggem", num_groups=4, signed=True),
}
APPLY = {name: jax.jit(pooling.apply) for name, pooling in POOLINGS.items()}
VARIABLES = {name: pooling.init(jax.random.key(0), jnp.ones((1, 1, 8))) for name, pooling in POOLINGS.items()}


def samples(seed):
    """Tokens [3, 6, 8] and a mask that keeps at least one token of every sample."""
    rng = np.random.default_rng(seed)
    mask = rng.random((3, 6)) < 0.5
    mask[np.arange(3), rng.integers(0, 6, 3)] = True
    return rng.normal(size=(3, 6, 8)).astype(np.float32), mask


@given(SEEDS)
def test_mean_and_maximum_are_those_of_the_tokens_that_are_kept(seed):
    x, mask = samples(seed)
    mean = [one[kept].mean(0) for one, kept in zip(x, mask, strict=True)]
    largest = [one[kept].max(0) for one, kept in zip(x, mask, strict=True)]
    np.testing.assert_allclose(MEAN(x, mask), mean, atol=1e-6)
    np.testing.assert_array_equal(MAX(x, mask), largest)
    np.testing.assert_allclose(MEAN(x), x.mean(1), atol=1e-6)
    np.testing.assert_array_equal(MAX(x), x.max(1))


def test_equal_largest_entries_share_the_gradient_and_masked_ones_get_none():
    x, mask = jnp.array([[2.0], [2.0], [7.0]]), jnp.array([True, True, False])
    slope = jax.grad(lambda x: max_pool(x, mask)[0])(x)
    np.testing.assert_array_equal(slope[:, 0], [0.5, 0.5, 0])


def test_a_mean_of_bfloat16_is_summed_in_float32():
    # In bfloat16 the sum would stop at 256.
    x = jnp.ones((1000, 2), jnp.bfloat16)
    for got in (MEAN(x), MEAN(x, jnp.ones(1000, bool))):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, np.ones(2))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, mask = samples(0)
        x = x.astype(np.float64)
        for pooling in (mean_pool, max_pool):
            assert pooling(x, mask).dtype == jnp.float64
        np.testing.assert_allclose(mean_pool(x), x.mean(1), rtol=1e-14)


@pytest.mark.parametrize("name", POOLINGS)
@given(SEEDS, st.sampled_from([np.nan, np.inf, 1e38]))
def test_every_pooling_ignores_the_order_and_what_is_masked(name, seed, rubbish):
    x, mask = samples(seed)
    run = APPLY[name]
    got = run(VARIABLES[name], x, mask=mask)
    assert got.shape == (3, 8)
    dirty = np.where(mask[..., None], x, np.float32(rubbish))
    np.testing.assert_array_equal(run(VARIABLES[name], dirty, mask=mask), got)
    order = np.random.default_rng(seed).permutation(6)
    np.testing.assert_allclose(run(VARIABLES[name], x[:, order], mask=mask[:, order]), got, atol=1e-5)
    whole = run(VARIABLES[name], x, mask=np.ones_like(mask))
    np.testing.assert_allclose(whole, run(VARIABLES[name], x), atol=1e-6)


@pytest.mark.parametrize("name", POOLINGS)
def test_every_pooling_sends_gradients_to_kept_tokens_only_and_gives_zeros_without_a_token(name):
    x, mask = samples(0)
    mask[1] = False

    @jax.jit
    def run(x, mask):
        def total(x):
            y = POOLINGS[name].apply(VARIABLES[name], x, mask=mask)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(total, has_aux=True)(x)

    slope, y = run(np.where(mask[..., None], x, np.nan).astype(np.float32), mask)
    np.testing.assert_array_equal(y[1], np.zeros(8))
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(np.asarray(slope)[~mask], 0)
    assert (np.abs(slope).sum((1, 2)) > 0).tolist() == [True, False, True]


@pytest.mark.parametrize("name", POOLINGS)
def test_every_pooling_takes_leading_axes_and_gives_its_dtype(name):
    x, mask = samples(0)
    for dtype in (jnp.float32, jnp.bfloat16):
        pooling = POOLINGS[name].clone(dtype=dtype)
        got = pooling.apply(VARIABLES[name], x, mask=mask)
        assert got.dtype == dtype
        deeper = pooling.apply(VARIABLES[name], x[None], cls=x[None, :, 0], mask=mask[None])
        np.testing.assert_array_equal(deeper[0], got)


def test_the_class_token_is_what_is_given():
    x, _ = samples(0)
    pooling = token_pooling("cls", dtype=jnp.bfloat16)
    got = pooling.apply({}, x, cls=x[:, 2])
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, x[:, 2].astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="kind 'cls' takes the class token: pool"):
        pooling.apply({}, x)


def test_poolings_without_parameters_have_none():
    x, _ = samples(0)
    for kind in ("cls", "mean", "max"):
        assert not TokenPool(kind).init(jax.random.key(0), x, cls=x[:, 0])


def test_names_make_the_modules_they_say():
    assert token_pooling("mean") == TokenPool("mean")
    assert token_pooling("gem", p_init=1.0) == GGeM(1, p_init=1.0)
    assert token_pooling("ggem", num_groups=4) == GGeM(4)
    assert {type(token_pooling(n, **({"num_groups": 2} if n == "ggem" else {}))) for n in NAMES} == {
        TokenPool,
        GGeM,
    }


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("avg", {}, ValueError, "there is no pooling 'avg'; there are cls, mean, max, gem, ggem"),
        (
            "ggem",
            {},
            ValueError,
            r"needs its number of groups: write token_pooling\('ggem', num_groups=heads\)",
        ),
        ("gem", {"num_groups": 3}, ValueError, r"one group: write token_pooling\('ggem', num_groups=3\)"),
        ("mean", {"p_init": 1.0}, TypeError, "p_init"),
    ],
)
def test_names_and_options_that_do_not_exist_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        token_pooling(name, **options)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match="kind must be one of cls, mean, max, got 'sum'"):
        TokenPool("sum")


X = np.ones((2, 3, 8), np.float32)


@pytest.mark.parametrize("pooling", [mean_pool, max_pool, TokenPool("mean"), TokenPool("max"), check_tokens])
@pytest.mark.parametrize(
    "tokens, mask, error, message",
    [
        (X.astype(np.int32), None, TypeError, r"floating point, got int32: tokens.astype\(jnp.float32\)"),
        (X[0, 0], None, ValueError, r"tokens must be \[..., N, D\] with N at least 1, got shape \(8,\)"),
        (X[:, :0], None, ValueError, r"with N at least 1, got shape \(2, 0, 8\)"),
        (X, np.ones((2, 3)), TypeError, "mask must be bool, got float64: compare first, such as mask != 0"),
        (X, np.ones(3, bool), ValueError, r"here \(2, 3\), got \(3,\): jnp.broadcast_to\(mask"),
        (X, np.array([[True] * 3, [False] * 3]), ValueError, "no token for 1 of 2 samples: leave those"),
    ],
)
def test_what_cannot_be_pooled_is_refused(pooling, tokens, mask, error, message):
    call = pooling if not isinstance(pooling, TokenPool) else lambda x, m: pooling.apply({}, x, mask=m)
    with pytest.raises(error, match=message):
        call(tokens, mask)


def test_a_concrete_mask_is_judged_under_jit_too():
    mask = jnp.array([[True] * 3, [False] * 3])
    with pytest.raises(ValueError, match="no token for 1 of 2 samples"):
        jax.jit(lambda x: mean_pool(x, mask))(X)
