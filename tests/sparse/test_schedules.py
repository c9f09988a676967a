"""Schedules meet their ends exactly, never turn back, and stay where they are outside."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.sparse.schedules import constant, cosine, cubic, ems, rewarm, sigmoid, staged

shares = st.floats(0, 1)


def values(schedule, steps):
    steps = np.asarray(steps, np.int32)
    length = 128 if steps.size <= 128 else steps.size  # one shape, so that nothing is compiled again
    padded = np.pad(steps, (0, length - steps.size), mode="edge")
    return np.asarray(jax.vmap(schedule)(jnp.asarray(padded)))[: steps.size]


@pytest.mark.parametrize("kind", [cubic, sigmoid])
@given(first=shares, last=shares, start=st.integers(0, 50), length=st.integers(1, 60))
def test_a_decay_hits_both_ends_and_is_monotone(kind, first, last, start, length):
    end = start + length
    curve = values(kind(first, last, start, end), [0, *range(start, end + 1), end + 1, 10**9])
    assert curve[0] == curve[1] == np.float32(first)
    assert curve[-3] == curve[-2] == curve[-1] == np.float32(last)
    steps = np.diff(curve) * (1 if last >= first else -1)
    assert steps.min() >= 0


@given(first=shares, last=shares, length=st.integers(1, 40))
def test_the_sigmoid_is_symmetric_about_its_middle(first, last, length):
    curve = values(sigmoid(first, last, 3, 3 + length), range(3, 4 + length))
    np.testing.assert_allclose(curve + curve[::-1], first + last, atol=3e-7)


def test_the_sigmoid_is_the_normalised_logistic_curve():
    def sig(x):
        return 1 / (1 + math.exp(-x))

    for k in (1.0, 6.0):
        got = values(sigmoid(0.5, 0.95, 0, 20, k), range(21))
        want = [0.5 + 0.45 * (sig(2 * k * (t / 20 - 0.5)) - sig(-k)) / (sig(k) - sig(-k)) for t in range(21)]
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_equal_cost_means_half_as_many_updates_for_the_sigmoid():
    steps = np.arange(4001)
    excess = {kind: values(kind(0.5, 0.1, 0, 4000), steps).mean() - 0.1 for kind in (cubic, sigmoid)}
    assert excess[cubic] == pytest.approx(0.4 / 4, rel=1e-3)
    assert excess[sigmoid] == pytest.approx(0.4 / 2, rel=1e-3)


@given(value=shares, end=st.integers(1, 100))
def test_the_cosine_starts_at_its_value_and_ends_at_zero(value, end):
    curve = values(cosine(value, end), range(end + 3))
    assert curve[0] == np.float32(value)
    assert (curve[end:] == 0).all()
    assert np.diff(curve).max() <= 0
    np.testing.assert_allclose(
        curve[: end + 1],
        [value / 2 * (1 + math.cos(math.pi * t / end)) for t in range(end + 1)],
        atol=2e-7,
    )


def test_the_cosine_stops_at_its_floor():
    curve = values(cosine(0.5, 10, floor=0.005), range(14))
    assert (curve[10:] == np.float32(0.005)).all()
    assert curve.min() == np.float32(0.005)
    assert curve[0] == 0.5


def test_updates_above_2_24_are_told_apart():
    start = 1 << 24
    curve = values(cubic(0.0, 1.0, start, start + 4), range(start, start + 5))
    np.testing.assert_allclose(curve, [1 - (1 - p / 4) ** 3 for p in range(5)], rtol=1e-6)


def test_stages_follow_one_another():
    assert values(staged((0.12, 0.11, 0.10), (9, 12)), [0, 8, 9, 11, 12, 99]).tolist() == pytest.approx(
        [0.12, 0.12, 0.11, 0.11, 0.10, 0.10]
    )


def test_ems_comes_down_to_its_target_at_the_last_update():
    curve = values(ems(0.1, 100), range(102))
    assert curve[100] == curve[101] == np.float32(0.1)
    assert sorted(set(curve.tolist()), reverse=True) == pytest.approx([0.15, 0.125, 0.1])
    three = values(ems(0.1, 100, above=(0.3, 0.2, 0.1)), range(101))
    assert np.flatnonzero(np.diff(three)).tolist() == [29, 59, 99]


@given(interval=st.integers(1, 40), share=st.floats(0, 1), step=st.integers(0, 1000))
def test_rewarming_climbs_from_zero_and_leaves_the_rest_alone(interval, share, step):
    steps = max(1, round(share * interval))
    rate = float(rewarm(lambda t: 0.5, interval, steps)(step))
    since = step % interval
    assert rate == pytest.approx(0.5 * min(1.0, since / steps), rel=1e-6)
    if since >= steps:
        assert rate == 0.5


def test_rewarming_by_the_count_of_a_skipping_optimizer_is_rewarming_by_updates():
    by_updates = rewarm(lambda t: 1.0, 5, 3)
    by_steps = rewarm(1.0, 5, 3, skip_step=True)
    own = [t for t in range(1, 31) if t % 5 != 0]  # updates 5, 10, ... change links and take no step
    assert [float(by_steps(c)) for c in range(len(own))] == [float(by_updates(t)) for t in own]


def test_schedules_are_float32_and_traced_like_numbers():
    made = [
        constant(0.3),
        cubic(0.0, 0.9, 2, 9),
        sigmoid(0.0, 0.9, 2, 9),
        cosine(0.3, 9),
        ems(0.1, 9),
        rewarm(cosine(0.3, 9), 4, 2),
    ]
    for schedule in made:
        for step in (0, 5, 9):
            traced = jax.jit(schedule)(jnp.int32(step))
            assert traced.dtype == jnp.float32
            assert float(traced) == pytest.approx(float(schedule(step)), rel=1e-6, abs=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: constant(1.5), r"value must be between 0 and 1, got 1.5"),
        (lambda: cubic(-0.1, 0.5, 0, 9), r"first value must be between 0 and 1, got -0.1"),
        (lambda: cubic(0.0, 2.0, 0, 9), r"last value must be between 0 and 1"),
        (lambda: cubic(0.0, 0.5, 9, 9), r"end must come after start, got start=9 and end=9"),
        (lambda: cubic(0.0, 0.5, 0.5, 9), r"start must be a whole number of updates, at least 0, got 0.5"),
        (lambda: sigmoid(0.0, 0.5, 0, 9, k=0), r"k must be above 0"),
        (lambda: cosine(0.3, 0), r"end must be a whole number of updates, at least 1, got 0"),
        (lambda: cosine(0.3, 9, floor=0.4), r"floor must not be above the value"),
        (lambda: staged((0.1,), (5,)), r"1 boundaries need 2 values, got 1"),
        (lambda: staged((0.1, 0.2, 0.3), (5, 5)), r"boundaries must increase, got \(5, 5\)"),
        (lambda: ems(0.98, 100), r"a value must be between 0 and 1, got 1.03"),
        (lambda: ems(0.1, 100, turn=1.0), r"0 < turn < 1"),
        (lambda: rewarm(lambda t: t, 10, 11), r"at most the interval, got steps=11 and interval=10"),
        (lambda: rewarm(lambda t: t, 0, 1), r"interval must be a whole number"),
    ],
)
def test_bad_input_says_what_was_needed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rewarming_ends_with_the_last_change():
    ended = rewarm(1.0, 10, 4, end=25)
    assert [float(ended(step)) for step in (19, 20, 22, 24, 30, 33, 50)] == [
        1.0,
        0.0,
        0.5,
        1.0,
        1.0,
        1.0,
        1.0,
    ]
    # Of the 9 own steps between changes the first after the second change is number 18.
    own = rewarm(1.0, 10, 4, skip_step=True, end=25)
    assert [float(own(count)) for count in (17, 18, 20, 27, 45)] == [1.0, 0.25, 0.75, 1.0, 1.0]
