"""The numbers of the accountants are published ones, and move the right way."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.privacy import calibrate, epsilon_of, rounds_within
from odjax.privacy.accounting import renyi_divergences

# (noise multiplier, rate, rounds, delta) -> epsilon, of dp-accounting 0.6.0.
PLD = {
    (1.0, 0.05, 100, 1e-5): 3.502,
    (0.8, 0.01, 1500, 1e-6): 4.362,
    (1.5, 0.1, 200, 1e-5): 5.054,
    (1.0, 0.01, 1000, 1e-5): 1.8282,
    (3.0, 0.1, 512, 1e-6): 3.7697,
    (0.8, 0.005, 1000, 1e-6): 2.0041,
    (2.0, 1.0, 10, 1e-5): 7.5113,
}
RDP = {(1.0, 0.05, 100, 1e-5): 4.039, (0.8, 0.01, 1500, 1e-6): 4.946, (1.5, 0.1, 200, 1e-5): 5.550}
MOMENTS = {
    (1.0, 0.01, 1000, 1e-5): 2.1078,
    (3.0, 0.1, 512, 1e-6): 4.0519,
    (0.8, 0.005, 1000, 1e-6): 2.6440,
    (2.0, 1.0, 10, 1e-5): 8.0879,
}
CASES = [
    (k, v, a) for a, table in (("pld", PLD), ("rdp", RDP), ("moments", MOMENTS)) for k, v in table.items()
]


@pytest.mark.parametrize("setting, epsilon, accountant", CASES)
def test_reference_values_are_reproduced(setting, epsilon, accountant):
    assert abs(epsilon_of(*setting, accountant=accountant) - epsilon) < 1e-3


@pytest.mark.parametrize(
    "rate, rounds, accountant, z",
    [(1e-3, 1500, "pld", 0.6162), (0.005, 1000, "pld", 0.8005), (0.005, 1000, "rdp", 0.8844)],
)
def test_reference_calibrations_to_epsilon_2_are_reproduced(rate, rounds, accountant, z):
    assert abs(calibrate(rate, rounds, 2.0, 1e-6, accountant) - z) < 1e-4


@given(
    st.sampled_from([1e-3, 0.02, 0.5, 1.0]),
    st.sampled_from([1, 30, 2000]),
    st.sampled_from([0.3, 2.0, 20.0]),
    st.sampled_from([1e-3, 1e-7]),
)
def test_calibrated_noise_spends_the_budget_and_hardly_less(rate, rounds, epsilon, delta):
    z = calibrate(rate, rounds, epsilon, delta, "moments")
    assert epsilon - 1e-3 <= epsilon_of(z, rate, rounds, delta, "moments") <= epsilon


@pytest.mark.parametrize(
    "rate, rounds, epsilon, accountant, relation",
    [
        (0.2, 20, 1.0, "pld", "add_or_remove_one"),
        (0.2, 20, 0.05, "pld", "add_or_remove_one"),
        (1.0, 5, 3.0, "pld", "add_or_remove_one"),
        (0.02, 20, 1.0, "rdp", "add_or_remove_one"),
        (0.2, 20, 4.0, "rdp", "replace_one"),
    ],
)
def test_noise_calibrated_by_the_package_spends_the_budget_and_hardly_less(
    rate, rounds, epsilon, accountant, relation
):
    z = calibrate(rate, rounds, epsilon, 1e-5, accountant, relation)
    assert epsilon - 1e-3 <= epsilon_of(z, rate, rounds, 1e-5, accountant, relation) <= epsilon


SETTINGS = st.tuples(st.floats(0.4, 5.0), st.floats(1e-3, 0.5), st.integers(1, 500), st.floats(1e-8, 1e-3))


@given(SETTINGS)
def test_epsilon_falls_with_noise_and_delta_and_rises_with_rate_and_rounds(setting):
    z, q, rounds, delta = setting
    here = epsilon_of(z, q, rounds, delta, "moments")
    assert epsilon_of(1.2 * z, q, rounds, delta, "moments") <= here
    assert epsilon_of(z, q, rounds, 2 * delta, "moments") <= here
    assert epsilon_of(z, 1.5 * q, rounds, delta, "moments") >= here
    assert epsilon_of(z, q, rounds + 1, delta, "moments") >= here


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_of_the_package_moves_the_same_ways(accountant):
    here = epsilon_of(3.0, 0.1, 20, 1e-5, accountant)
    assert epsilon_of(3.6, 0.1, 20, 1e-5, accountant) < here
    assert epsilon_of(3.0, 0.1, 20, 2e-5, accountant) < here
    assert epsilon_of(3.0, 0.15, 20, 1e-5, accountant) > here
    assert epsilon_of(3.0, 0.1, 21, 1e-5, accountant) > here


@pytest.mark.parametrize("z", [0.9, 3.0])
@pytest.mark.parametrize("q, rounds", [(0.01, 40), (0.2, 1), (1.0, 40)])
@pytest.mark.parametrize("delta", [1e-6, 1e-3])
def test_loss_distributions_are_tighter_than_divergences(z, q, rounds, delta):
    pld, rdp, moments = (epsilon_of(z, q, rounds, delta, a) for a in ("pld", "rdp", "moments"))
    assert pld <= min(rdp, moments)


def test_divergences_of_order_two_have_their_closed_form():
    # A(2) = (1 - q)^2 + 2 q (1 - q) + q^2 exp(1 / z^2) = 1 + q^2 (exp(1 / z^2) - 1).
    for z, q in [(0.5, 0.1), (2.0, 0.01), (1.0, 0.9)]:
        expected = math.log1p(q**2 * math.expm1(1 / z**2))
        np.testing.assert_allclose(renyi_divergences(z, q, np.array([2])), [expected], rtol=1e-10)


def test_divergences_do_not_overflow():
    assert np.isfinite(renyi_divergences(0.01, 0.1)).all()


def test_no_round_spends_nothing_and_no_noise_everything():
    for accountant in ("pld", "rdp", "moments"):
        assert epsilon_of(1.0, 0.1, 0, 1e-5, accountant) == 0.0
        assert epsilon_of(0.0, 0.1, 1, 1e-5, accountant) == math.inf


def test_without_subsampling_the_gaussian_mechanism_has_its_exact_epsilon():
    # Balle and Wang 2018: delta(eps) = Phi(m / 2 - eps / m) - e^eps Phi(-m / 2 - eps / m), m = sqrt(T) / z.
    z, rounds = 2.0, 10
    m, epsilon = math.sqrt(rounds) / z, epsilon_of(z, 1.0, rounds, 1e-5)
    phi = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
    delta = phi(m / 2 - epsilon / m) - math.exp(epsilon) * phi(-m / 2 - epsilon / m)
    np.testing.assert_allclose(delta, 1e-5, rtol=1e-3)


def test_an_enormous_epsilon_is_found_without_an_enormous_discretization():
    loss, renyi = (epsilon_of(0.1, 0.1, 1000, 1e-6, a) for a in ("pld", "rdp"))
    assert 5000 < loss <= renyi
    assert epsilon_of(0.01, 0.1, 1000, 1e-6) > 1e5


def test_cohorts_of_fixed_size_at_rate_one_are_the_gaussian_mechanism():
    whole = epsilon_of(2.0, 1.0, 10, 1e-5, "rdp", relation="replace_one")
    np.testing.assert_allclose(whole, epsilon_of(2.0, 1.0, 10, 1e-5, "rdp"), rtol=1e-9)


def test_cohorts_of_fixed_size_have_the_bound_of_order_two():
    # arXiv 1808.00087, Theorem 27, at order 2: log(1 + q^2 min(4 (e^(1/z^2) - 1), 2 e^(1/z^2))).
    dp_accounting = pytest.importorskip("dp_accounting")
    z, n, size = 1.0, 1000, 50
    event = dp_accounting.SampledWithoutReplacementDpEvent(n, size, dp_accounting.GaussianDpEvent(z))
    counter = dp_accounting.rdp.RdpAccountant([2.0], dp_accounting.NeighboringRelation.REPLACE_ONE)
    rho = math.log1p((size / n) ** 2 * min(4 * math.expm1(1 / z**2), 2 * math.exp(1 / z**2)))
    expected = rho + math.log(0.5) - math.log(1e-5 * 2)
    np.testing.assert_allclose(counter.compose(event).get_epsilon(1e-5), expected, rtol=1e-9)
    assert epsilon_of(z, size / n, 1, 1e-5, "rdp", "replace_one") <= expected


@pytest.mark.parametrize("accountant", ["moments", "rdp", "pld"])
def test_the_rounds_within_a_budget_are_the_most_that_fit(accountant):
    rounds = rounds_within(2.0, 1.5, 0.1, 1e-5, accountant)
    assert epsilon_of(1.5, 0.1, rounds, 1e-5, accountant) <= 2.0
    assert epsilon_of(1.5, 0.1, rounds + 1, 1e-5, accountant) > 2.0


def test_a_budget_below_one_round_buys_none():
    assert rounds_within(0.1, 0.5, 0.5, 1e-5, "moments") == 0
    assert rounds_within(0, 5.0, 0.5, 1e-5, "moments") == 0
    assert rounds_within(1.0, 0.0, 0.5, 1e-5) == 0


def test_importing_the_family_loads_no_accountant():
    program = (
        "import sys, odjax.privacy\n"
        "assert not {'dp_accounting', 'jax_privacy'} & set(sys.modules)\n"
        "sys.modules['dp_accounting'] = sys.modules['jax_privacy'] = None\n"
        "from odjax.privacy import Clip, epsilon_of, privacy_plan, private_gradient\n"
        "print(round(epsilon_of(1.0, 0.01, 1000, 1e-5, 'moments'), 4))\n"
        "plan = privacy_plan(population=100, cohort=5, clip=1.0, rounds=3, delta=1e-3, noise_multiplier=1.0)\n"
        "for call in (plan.epsilon, lambda: private_gradient(lambda p, x: x, plan)):\n"
        "    try: call()\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    number, accountant, gradient = done.stdout.splitlines()
    assert number == "2.1078"
    assert "pip install 'odjax[privacy]', or take accountant='moments'" in accountant
    assert "pip install 'odjax[privacy]'" in gradient


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: epsilon_of(-1.0, 0.1, 1, 1e-5), "noise_multiplier must be a finite number of at least 0"),
        (lambda: epsilon_of(math.nan, 0.1, 1, 1e-5), "noise_multiplier must be a finite number"),
        (lambda: epsilon_of("1", 0.1, 1, 1e-5), "noise_multiplier must be a number"),
        (lambda: epsilon_of(1.0, 0.0, 1, 1e-5), "rate must be a probability"),
        (lambda: epsilon_of(1.0, 1.1, 1, 1e-5), "rate must be a probability"),
        (lambda: epsilon_of(1.0, 0.1, -1, 1e-5), "rounds must be a whole number of at least 0"),
        (lambda: epsilon_of(1.0, 0.1, 1, 0.0), r"delta must be in \(0, 1\)"),
        (lambda: epsilon_of(1.0, 0.1, 1, 1.0), r"delta must be in \(0, 1\)"),
        (
            lambda: epsilon_of(1.0, 0.1, 1, 1e-5, "prv"),
            "accountant must be 'pld', 'rdp' or 'moments', got 'prv'",
        ),
        (lambda: epsilon_of(1.0, 0.1, 1, 1e-5, "pld", "replace_one"), "only 'rdp' knows sampling without"),
        (lambda: epsilon_of(1.0, 0.1, 1, 1e-5, relation="zero"), "relation must be"),
        (lambda: calibrate(0.1, 0, 1.0, 1e-5), "rounds must be a whole number of at least 1"),
        (lambda: calibrate(0.1, 1, 0.0, 1e-5), "epsilon must be a finite number above 0"),
        (lambda: calibrate(0.1, 1, math.inf, 1e-5), "a run without privacy is noise_multiplier=0"),
        (lambda: rounds_within(-1.0, 1.0, 0.1, 1e-5), "epsilon must be a finite number above 0"),
        (lambda: rounds_within(1.0, -1.0, 0.1, 1e-5, "moments"), "noise_multiplier must be"),
    ],
)
def test_bad_input_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
