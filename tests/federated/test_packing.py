"""Lanes: every step once and in order, loads as Graham bounds them, and the efficiencies of the table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.federated import efficiency, pack_chunks, pack_lanes

STEPS = st.lists(st.integers(0, 9), min_size=1, max_size=12)
COUNT = st.integers(1, 5)
PACKS = pytest.mark.parametrize("pack", [pack_lanes, pack_chunks])


def runs(plan):
    """(client, lane, rows, steps) of every client, read from the arrays as the loop reads them."""
    found = {}
    for row, lane in zip(*np.nonzero(plan.active), strict=True):
        client = plan.member[lane, plan.slot[row, lane]]
        found.setdefault(int(client), []).append((lane, row, plan.step[row, lane]))
    return found


@PACKS
@given(steps=STEPS, lanes=COUNT)
def test_every_step_of_every_client_runs_once_and_in_order_in_one_lane(pack, steps, lanes):
    plan = pack(steps, lanes, bucket=4)
    found = runs(plan)
    assert set(found) == {i for i, count in enumerate(steps) if count}
    for client, places in found.items():
        lane, rows, numbers = (np.array(x) for x in zip(*places, strict=True))
        assert len(set(lane)) == 1
        np.testing.assert_array_equal(numbers, np.arange(steps[client]))
        np.testing.assert_array_equal(rows, rows[0] + np.arange(len(rows)))
        assert plan.first[rows, lane].tolist() == [True] + [False] * (len(rows) - 1)
        assert plan.last[rows, lane].tolist() == [False] * (len(rows) - 1) + [True]
    assert plan.first.sum() == plan.last.sum() == len(found)
    assert not (plan.first | plan.last)[~plan.active].any()
    rows = np.arange(len(plan.active))[:, None]
    np.testing.assert_array_equal(np.where(plan.active, rows + 1, 0).max(0), plan.length)


@PACKS
@given(steps=STEPS, lanes=COUNT)
def test_sizes_are_filled_up_to_few(pack, steps, lanes):
    plan = pack(steps, lanes, bucket=4)
    rows, slots = plan.active.shape[0], plan.member.shape[1]
    assert rows % 4 == 0
    assert rows - max(4, plan.length.max()) < 4
    assert slots & (slots - 1) == 0


@given(steps=STEPS, lanes=COUNT)
def test_the_longest_lane_is_within_the_bound_of_list_scheduling(steps, lanes):
    length = pack_lanes(steps, lanes).length.max()
    assert length <= sum(steps) / lanes + (1 - 1 / lanes) * max(steps)
    assert length >= max(max(steps), sum(steps) / lanes)


@given(steps=STEPS, lanes=COUNT)
def test_a_chunk_lasts_as_long_as_its_longest_client(steps, lanes):
    ordered = sorted(steps, reverse=True)
    assert pack_chunks(steps, lanes).length.max() == sum(ordered[::lanes])


def test_fifty_log_normal_clients_fill_lanes_where_padding_wastes_three_quarters():
    steps = np.maximum(1, np.rint(np.random.default_rng(0).lognormal(np.log(40), 1.0, 50) / 10)).astype(int)
    assert (steps.sum(), steps.max()) == (339, 28)
    for lanes in (2, 5, 10):
        assert efficiency(pack_lanes(steps, lanes)) == 339 / 340
    assert efficiency(pack_chunks(steps, 50)) == 339 / (50 * 28)
    assert round(efficiency(pack_chunks(steps, 10)), 3) == 0.706


def test_equal_inputs_give_equal_plans():
    a, b = pack_lanes([3, 3, 1, 2], 2), pack_lanes(np.array([3, 3, 1, 2]), 2)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_cohort_that_takes_no_step_is_a_plan_without_rows():
    plan = pack_lanes([0, 0], 2)
    assert plan.length.tolist() == [0, 0]
    assert efficiency(plan) == 1.0


@PACKS
@pytest.mark.parametrize(
    "arguments, match",
    [
        (([], 1), "one number a client of a cohort, got shape \\(0,\\)"),
        (([[1]], 1), "got shape \\(1, 1\\)"),
        (([1.5], 1), "must be integers, got float64"),
        (([2, -1], 1), "must not be negative, client 1 has -1"),
        (([1], 0), "lanes must be at least 1, got 0"),
    ],
)
def test_bad_input_names_the_argument(pack, arguments, match):
    with pytest.raises(ValueError, match=match):
        pack(*arguments)
    with pytest.raises(ValueError, match="bucket must be at least 1, got 0"):
        pack([1], 1, bucket=0)
