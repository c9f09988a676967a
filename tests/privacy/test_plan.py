"""A plan runs what it counts, and refuses what cannot be counted."""

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.privacy import (
    Clip,
    PrivacyForecast,
    PrivacyPlan,
    calibrate,
    epsilon_of,
    gaussian_noise,
    privacy_plan,
)

KEY = jax.random.key(0)
USUAL = {
    "population": 10_000,
    "cohort": 100,
    "clip": 0.5,
    "rounds": 200,
    "delta": 1e-6,
    "accountant": "moments",
}


def make(**changes):
    arguments = {**USUAL, **changes}
    if "epsilon" not in arguments:
        arguments.setdefault("noise_multiplier", 1.0)
    return privacy_plan(**arguments)


def ones(key, shape, dtype):
    return jnp.ones(shape, dtype)


def test_the_plan_of_the_language_model_benchmark_has_its_published_noise():
    with pytest.warns(UserWarning, match="delta=1e-06 is not below"):
        plan = make(population=10**6, cohort=5000, clip=0.1, rounds=1000, epsilon=2.0, accountant="pld")
    assert abs(plan.noise_multiplier - 0.8005) < 1e-4
    assert 2.0 - 1e-3 <= plan.epsilon() <= 2.0
    assert plan.rate == 0.005
    assert plan.capacity == 5488
    assert plan.normalizer == 5000


def test_the_noise_of_a_budget_is_that_of_the_accountant():
    plan = make(epsilon=1.5)
    assert plan.noise_multiplier == calibrate(0.01, 200, 1.5, 1e-6, "moments")
    assert plan.epsilon() == epsilon_of(plan.noise_multiplier, 0.01, 200, 1e-6, "moments")
    assert plan.guarantee == (plan.epsilon(), 1e-6, "user", "add_or_remove_one")


def test_epsilon_grows_from_nothing_with_the_rounds():
    plan = make()
    spent = [plan.epsilon(t) for t in (0, 1, 10, 200, 1000)]
    assert spent[0] == 0.0
    assert spent == sorted(spent)
    assert spent[3] == plan.epsilon()


def test_the_rounds_within_the_epsilon_of_a_plan_are_the_rounds_of_the_plan():
    plan = make()
    assert plan.rounds_within(plan.epsilon()) == plan.rounds
    assert plan.rounds_within(plan.epsilon() * 0.999) < plan.rounds


def test_the_release_is_the_sum_and_its_noise_over_the_expected_cohort():
    plan, total = make(noise_multiplier=3.0), {"w": jnp.full(4, 250.0), "b": jnp.full(2, 50.0)}
    released = plan.privatize(total, KEY, draw=ones)
    np.testing.assert_allclose(released["w"], (250 + 3 * 0.5) / 100, rtol=1e-6)
    noisy = gaussian_noise(Clip(0.5), 3.0, KEY, total)
    np.testing.assert_allclose(plan.privatize(total, KEY)["b"], noisy["b"] / 100, rtol=1e-6)


@given(st.integers(0, 50))
def test_the_release_of_one_round_is_divided_by_the_same_number_whoever_came(round):
    plan = make(noise_multiplier=0.0, clip=math.inf)
    sample = plan.sample(0, round)
    values = jnp.where(jnp.asarray(sample.mask)[:, None], jnp.ones((plan.capacity, 2)), jnp.float32(0))
    released = plan.privatize({"w": values.sum(0)}, KEY)
    np.testing.assert_allclose(released["w"], sample.mask.sum() / 100, rtol=1e-6)


def test_without_noise_and_clip_the_release_is_the_plain_sum_over_the_expected_cohort():
    plan = make(noise_multiplier=0.0, clip=math.inf)
    rows = {"w": jax.random.normal(KEY, (6, 3))}
    clipped, _ = jax.vmap(plan.clip)(rows)
    released = plan.privatize(jax.tree.map(lambda x: x.sum(0), clipped), KEY)
    np.testing.assert_array_equal(released["w"], rows["w"].sum(0) / 100)


def test_masked_numbers_are_not_released_whatever_the_sum_holds_there():
    total, mask = {"a": jnp.full((2, 3), 900.0)}, {"a": jnp.array([[1], [0]])}
    released = make().privatize(total, KEY, mask)
    np.testing.assert_array_equal(released["a"][1], 0.0)
    np.testing.assert_array_equal(released["a"][0], make().privatize(total, KEY)["a"][0])


def test_a_release_may_be_compiled_and_its_dtypes_stay():
    total = {"w": jnp.ones(3), "low": jnp.ones(2, jnp.bfloat16)}
    compiled, eager = jax.jit(make().privatize)(total, KEY), make().privatize(total, KEY)
    np.testing.assert_allclose(compiled["w"], eager["w"], rtol=1e-6)
    assert compiled["low"].dtype == jnp.bfloat16


def test_fixed_cohorts_have_twice_the_sensitivity_and_their_own_accountant():
    plan = make(sampling="fixed", accountant="rdp", rounds=5)
    assert plan.relation == "replace_one"
    assert plan.sensitivity() == 1.0
    assert plan.capacity == 100
    assert plan.sample(0, 0).mask.all()
    assert plan.epsilon() == epsilon_of(1.0, 0.01, 5, 1e-6, "rdp", "replace_one")
    released = plan.privatize({"w": jnp.zeros(2)}, KEY, draw=ones)
    np.testing.assert_allclose(released["w"], 1.0 * 1.0 / 100, rtol=1e-6)


def test_the_sampler_is_that_of_the_accountant():
    plan = make()
    sizes = [plan.sample(7, r).mask.sum() for r in range(50)]
    assert len(set(sizes)) > 10
    assert plan.sample(7, 0).ids.shape == (176,)


def test_a_plan_prints_in_one_line():
    assert str(make(noise_multiplier=2.0, unit="record")) == (
        f"epsilon {make(noise_multiplier=2.0).epsilon():.4g}, delta 1e-06 for one record (add_or_remove_one): "
        "z 2, poisson q 0.01 of 10,000, 200 rounds, moments"
    )
    assert str(make(noise_multiplier=0.0)).startswith("not private for one user")


def test_a_plan_is_a_value_that_is_checked_when_it_is_changed():
    plan = make()
    assert dataclasses.replace(plan, rounds=7).rounds == 7
    with pytest.raises(ValueError, match="rounds must be a whole number of at least 1"):
        dataclasses.replace(plan, rounds=0)
    with pytest.raises(ValueError, match="rate must be a probability"):
        dataclasses.replace(plan, rate=1.5)
    assert isinstance(plan, PrivacyPlan)


def test_a_forecast_has_the_noise_of_the_large_cohort_on_its_mean():
    plan = make(population=10**5, cohort=5000, noise_multiplier=0.8)
    small = plan.forecast(50)
    np.testing.assert_allclose(small.noise_multiplier, 0.008)
    zero = {"w": jnp.zeros(3)}
    np.testing.assert_allclose(small.privatize(zero, KEY)["w"], plan.privatize(zero, KEY)["w"], rtol=1e-5)
    assert small.normalizer == 50
    assert small.capacity == 107
    assert small.sample(0, 0).ids.shape == (107,)
    assert small.clip is plan.clip
    assert small.sensitivity() == plan.sensitivity()


def test_a_forecast_promises_nothing():
    small = make().forecast(10)
    assert isinstance(small, PrivacyForecast)
    assert small.guarantee is None
    assert str(small) == "forecast for a cohort of 100; this run is not private"
    with pytest.raises(
        ValueError, match=r"not private: it has no epsilon; forecast.plan.epsilon\(\) is that"
    ):
        small.epsilon()
    assert small.rounds_within(1.0) == make().rounds_within(1.0)


def test_a_forecast_has_all_that_a_plan_has():
    plan = make()
    names = {n for n in dir(plan) if not n.startswith("_")} - {"delta", "accountant", "unit", "forecast"}
    assert names <= set(dir(plan.forecast(10)))


@given(st.integers(1, 200))
def test_a_forecast_of_the_whole_cohort_is_the_plan(cohort):
    plan = make(cohort=cohort)
    same = plan.forecast(cohort)
    np.testing.assert_allclose(same.noise_multiplier, plan.noise_multiplier, rtol=1e-12)
    np.testing.assert_array_equal(same.sample(0, 1).ids, plan.sample(0, 1).ids)


def test_forecasts_of_fixed_cohorts_are_fixed():
    small = make(sampling="fixed", accountant="rdp").forecast(7)
    assert small.sample(0, 0).ids.shape == (7,)
    with pytest.raises(ValueError, match="needs a whole cohort"):
        make(sampling="fixed", accountant="rdp").forecast(7.5)


def test_useless_noise_and_delta_are_warned_of():
    with pytest.warns(UserWarning, match="noise_multiplier=0.2 is below 0.3"):
        make(noise_multiplier=0.2)
    with pytest.warns(UserWarning, match=r"delta=0.001 is not below 1 / population = 0.0001"):
        make(delta=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(noise_multiplier=0.0, delta=1e-3)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"cohort": 10_001},
            ValueError,
            "cohort must be above 0 and at most the population of 10000, got 10001",
        ),
        ({"cohort": 0}, ValueError, "cohort must be above 0"),
        ({"cohort": math.nan}, ValueError, "cohort must be above 0"),
        ({"population": 0}, ValueError, "population must be a whole number of at least 1"),
        ({"clip": 0.0}, ValueError, "clipping norm must be a number above 0"),
        ({"clip": -1.0}, ValueError, "clipping norm must be a number above 0"),
        ({"clip": lambda tree: (tree, 0)}, TypeError, "needs a clip that declares its sensitivity"),
        ({"clip": math.inf}, ValueError, "no noise hides a contribution without bound"),
        ({"clip": math.inf, "epsilon": 2.0}, ValueError, "must have a finite norm"),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier must be a finite number of at least 0"),
        ({"noise_multiplier": 0.0, "epsilon": 2.0}, ValueError, "give exactly one of epsilon"),
        ({"noise_multiplier": None}, ValueError, "give exactly one of epsilon"),
        ({"epsilon": math.inf}, ValueError, "a run without privacy is noise_multiplier=0"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be a finite number above 0"),
        ({"rounds": 0}, ValueError, "rounds must be a whole number of at least 1"),
        ({"rounds": 2.5}, ValueError, "rounds must be a whole number of at least 1"),
        ({"delta": 0.0}, ValueError, r"delta must be in \(0, 1\)"),
        ({"delta": 1.0}, ValueError, r"delta must be in \(0, 1\)"),
        ({"sampling": "shuffle"}, ValueError, "sampling must be 'poisson' or 'fixed'"),
        ({"accountant": "prv"}, ValueError, "accountant must be 'pld', 'rdp' or 'moments'"),
        (
            {"sampling": "fixed"},
            ValueError,
            "accountant='moments' counts Poisson sampling, not cohorts of fixed",
        ),
        (
            {"sampling": "fixed", "accountant": "pld"},
            ValueError,
            "type accountant='rdp', or sampling='poisson'",
        ),
        (
            {"sampling": "fixed", "accountant": "rdp", "cohort": 10.5},
            ValueError,
            "needs a whole number as cohort",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_errors(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


@pytest.mark.parametrize("cohort", [0, -1, 101, math.nan, "3"])
def test_a_forecast_needs_a_smaller_cohort(cohort):
    with pytest.raises(ValueError, match="cohort must be above 0 and at most that of the plan, 100"):
        make().forecast(cohort)


def test_a_forecast_may_simulate_with_fewer_units_than_it_predicts_for():
    plan = make(population=10**5, cohort=5000, noise_multiplier=0.8)
    small = plan.forecast(50, population=980)
    assert small.population == 980
    assert small.unit == plan.unit
    np.testing.assert_allclose(small.noise_multiplier, 0.8 * 50 / 5000)
    assert small.sample(0, 0).ids.max() <= 980
    with pytest.raises(ValueError, match="a cohort of 50 is larger than a population of 40"):
        plan.forecast(50, population=40)
