"""Noise has the size of the clip's sensitivity, and depends on key and path alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core import fold_step
from odjax.privacy import Clip, gaussian_noise, privatizer
from odjax.privacy.noise import check_normalizer

KEY = jax.random.key(0)
TOTAL = {"a": {"w": jnp.zeros((2, 3))}, "b": jnp.zeros(4)}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def test_noise_has_mean_zero_the_stated_deviation_and_no_covariance_between_numbers_or_leaves():
    keys, clip, z = jax.random.split(KEY, 20_000), Clip(0.5), 3.0
    noise = jax.jit(jax.vmap(lambda k: gaussian_noise(clip, z, k, TOTAL)))(keys)
    draws = np.concatenate([noise["a"]["w"].reshape(len(keys), -1), noise["b"]], axis=1).astype(np.float64)
    n, variance = len(keys), 1.5**2
    assert np.abs(draws.mean(0)).max() < 5 * 1.5 / math.sqrt(n)
    covariance = np.cov(draws.T, bias=True)
    np.testing.assert_allclose(np.diag(covariance), variance, rtol=5 * math.sqrt(2 / n))
    off = covariance[~np.eye(10, dtype=bool)]
    assert np.abs(off).max() < 5 * variance / math.sqrt(n)
    kurtosis = np.mean((draws / 1.5) ** 4)
    assert abs(kurtosis - 3) < 5 * math.sqrt(96 / draws.size)


@given(st.sampled_from([0.25, 1.0, 4.0]), st.sampled_from([0.5, 2.0]))
def test_noise_scales_with_sensitivity_and_multiplier(norm, z):
    one = flat(gaussian_noise(Clip(1.0), 1.0, KEY, TOTAL))
    np.testing.assert_allclose(flat(gaussian_noise(Clip(norm), z, KEY, TOTAL)), z * norm * one, rtol=1e-6)
    replaced = gaussian_noise(Clip(norm), z, KEY, TOTAL, relation="replace_one")
    np.testing.assert_allclose(flat(replaced), 2 * z * norm * one, rtol=1e-6)


def test_noise_is_added_to_the_total():
    total = jax.tree.map(lambda x: x + 7, TOTAL)
    difference = flat(gaussian_noise(Clip(1.0), 1.0, KEY, total)) - flat(
        gaussian_noise(Clip(1.0), 1.0, KEY, TOTAL)
    )
    np.testing.assert_allclose(difference, 7, atol=2e-6)


def test_the_noise_of_a_leaf_does_not_depend_on_the_other_leaves():
    alone = gaussian_noise(Clip(1.0), 1.0, KEY, {"b": TOTAL["b"]})
    np.testing.assert_array_equal(alone["b"], gaussian_noise(Clip(1.0), 1.0, KEY, TOTAL)["b"])


def test_sharded_noise_is_the_noise_of_one_device_bit_for_bit():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    total = {"w": jax.random.normal(jax.random.key(3), (16, 5))}
    add = jax.jit(lambda t: gaussian_noise(Clip(1.0), 0.7, KEY, t))
    parts = jax.jit(lambda t: gaussian_noise(Clip(1.0), 0.7, KEY, t), out_shardings=place)(
        jax.device_put(total, place)
    )
    assert len({s.device for s in parts["w"].addressable_shards}) == 8
    np.testing.assert_array_equal(parts["w"], add(total)["w"])


def test_noise_after_a_psum_is_the_same_on_every_device_and_added_once():
    mesh = jax.make_mesh((8,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def release(rows):
        total = jax.lax.psum(rows.sum(0), "clients")
        return gaussian_noise(Clip(1.0), 1.0, KEY, {"w": total})["w"][None]

    rows = jax.random.normal(KEY, (16, 3))
    everywhere = jax.jit(
        jax.shard_map(release, mesh=mesh, in_specs=spec("clients"), out_specs=spec("clients"))
    )(rows)
    once = gaussian_noise(Clip(1.0), 1.0, KEY, {"w": rows.sum(0)})["w"]
    np.testing.assert_allclose(everywhere, np.broadcast_to(once, (8, 3)), rtol=1e-5, atol=1e-5)


def test_masked_numbers_get_exactly_no_noise_and_the_others_keep_theirs():
    total = jax.tree.map(lambda x: x + 1, TOTAL)
    mask = {"a": {"w": jnp.array([[1.0], [0.0]])}, "b": jnp.array([False, True, True, False])}
    full, some = (
        gaussian_noise(Clip(1.0), 1.0, KEY, total),
        gaussian_noise(Clip(1.0), 1.0, KEY, total, mask=mask),
    )
    np.testing.assert_array_equal(some["a"]["w"][1], 1.0)
    np.testing.assert_array_equal(some["b"][jnp.array([0, 3])], 1.0)
    np.testing.assert_array_equal(some["a"]["w"][0], full["a"]["w"][0])
    np.testing.assert_array_equal(some["b"][1:3], full["b"][1:3])


@pytest.mark.parametrize("clip", [Clip(1.0), Clip(math.inf)])
def test_no_noise_returns_the_total_bit_for_bit(clip):
    total = {"w": jnp.array([1.0, -0.0, 3e38])}
    np.testing.assert_array_equal(gaussian_noise(clip, 0.0, KEY, total)["w"], total["w"])


def test_noise_is_drawn_in_float32_and_rounded_once():
    low = gaussian_noise(Clip(1.0), 1.0, KEY, {"w": jnp.full(5, 2, jnp.bfloat16)})["w"]
    wide = gaussian_noise(Clip(1.0), 1.0, KEY, {"w": jnp.full(5, 2.0)})["w"]
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, wide.astype(jnp.bfloat16))
    with jax.enable_x64(True):
        assert gaussian_noise(Clip(1.0), 1.0, KEY, {"w": jnp.ones(2, jnp.float64)})["w"].dtype == jnp.float64


def test_the_source_of_noise_can_be_another_one():
    ones = gaussian_noise(Clip(0.5), 4.0, KEY, TOTAL, draw=lambda key, shape, dtype: jnp.ones(shape, dtype))
    np.testing.assert_array_equal(flat(ones), 2.0)


def test_any_object_that_declares_a_sensitivity_can_size_the_noise():
    @dataclasses.dataclass(frozen=True)
    class Signs:
        count: int

        def sensitivity(self, relation):
            return math.sqrt(self.count) * (2 if relation == "replace_one" else 1)

    draw = lambda key, shape, dtype: jnp.ones(shape, dtype)  # noqa: E731
    np.testing.assert_allclose(flat(gaussian_noise(Signs(9), 2.0, KEY, TOTAL, draw=draw)), 6.0)


def test_a_privatizer_adds_fresh_noise_in_every_update_and_divides_by_the_fixed_number():
    transform = privatizer(Clip(1.0), 1.0, KEY, normalizer=4.0)
    state, update = transform.init(TOTAL), jax.jit(transform.update)
    total = jax.tree.map(lambda x: x + 8, TOTAL)
    for t in range(3):
        updates, state = update(total, state)
        expected = gaussian_noise(Clip(1.0), 1.0, fold_step(KEY, t), total)
        np.testing.assert_allclose(flat(updates), flat(expected) / 4, rtol=1e-6)
    assert int(state.count) == 3


def test_a_privatizer_without_noise_in_a_chain_is_the_rest_of_the_chain():
    chain = optax.chain(privatizer(Clip(math.inf), 0.0, KEY), optax.sgd(0.1, momentum=0.9))
    plain, total = optax.sgd(0.1, momentum=0.9), jax.tree.map(lambda x: x + 2, TOTAL)
    updates, _ = chain.update(total, chain.init(TOTAL), TOTAL)
    expected, _ = plain.update(total, plain.init(TOTAL), TOTAL)
    np.testing.assert_array_equal(flat(updates), flat(expected))


@pytest.mark.parametrize("clip", [1.0, optax.clip_by_global_norm(1.0), None])
@pytest.mark.parametrize(
    "make", [lambda c: gaussian_noise(c, 1.0, KEY, TOTAL), lambda c: privatizer(c, 1.0, KEY)]
)
def test_a_clip_that_declares_no_sensitivity_is_an_error(clip, make):
    with pytest.raises(TypeError, match=r"noise needs a clip that declares its sensitivity.*Clip\(1.0\)"):
        make(clip)


class Nothing:
    def sensitivity(self, relation):
        return 0.0


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: gaussian_noise(Clip(1.0), -1.0, KEY, TOTAL),
            ValueError,
            "noise_multiplier must be a finite",
        ),
        (
            lambda: gaussian_noise(Clip(1.0), math.nan, KEY, TOTAL),
            ValueError,
            "noise_multiplier must be a finite",
        ),
        (
            lambda: gaussian_noise(Clip(1.0), math.inf, KEY, TOTAL),
            ValueError,
            "noise_multiplier must be a finite",
        ),
        (
            lambda: gaussian_noise(Clip(math.inf), 1.0, KEY, TOTAL),
            ValueError,
            "no noise hides a contribution",
        ),
        (lambda: gaussian_noise(Nothing(), 1.0, KEY, TOTAL), ValueError, "must be a number above 0, got 0.0"),
        (lambda: gaussian_noise(Clip(1.0), 1.0, KEY, TOTAL, relation="x"), ValueError, "relation must be"),
        (
            lambda: gaussian_noise(Clip(1.0), 1.0, jax.random.PRNGKey(0), TOTAL),
            TypeError,
            "legacy uint32 key",
        ),
        (
            lambda: gaussian_noise(Clip(1.0), 1.0, KEY, {"n": jnp.ones(2, jnp.int32)}),
            TypeError,
            "'n' is int32",
        ),
        (
            lambda: gaussian_noise(Clip(1.0), 1.0, KEY, TOTAL, mask={"a": 1}),
            ValueError,
            "mask must be a tree",
        ),
        (
            lambda: gaussian_noise(Clip(1.0), 1.0, KEY, {"b": jnp.ones(4)}, mask={"b": jnp.ones(3)}),
            ValueError,
            r"mask of 'b' has shape \(3,\), which does not broadcast to \(4,\)",
        ),
        (lambda: privatizer(Clip(1.0), 1.0, KEY, normalizer=0.0), ValueError, "normalizer must be a finite"),
        (lambda: privatizer(Clip(math.inf), 1.0, KEY), ValueError, "no noise hides a contribution"),
        (lambda: check_normalizer(jnp.float32(3)), TypeError, "size of the cohort that came"),
    ],
)
def test_bad_input_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
