"""The number of lanes is measured."""

import time

import pytest

from odjax.federated import fastest_lanes

from .world import EVERYBODY, clients


def timed(seconds):
    """A round that takes as long as its number of lanes says, and the lanes that were asked for."""
    asked = []

    def run(plan):
        asked.append(plan.index.shape[1])
        time.sleep(seconds[asked[-1]])
        return plan.weight

    return run, asked


def test_the_fastest_candidate_wins_and_slow_ones_end_the_search():
    run, asked = timed({1: 0.02, 2: 0.002, 4: 0.03, 8: 0.0})
    best = fastest_lanes(run, clients(), EVERYBODY, candidates=(1, 2, 4, 8), repeats=1, batch=2, seed=0)
    assert best == 2
    assert asked == [1, 1, 2, 2, 4, 4]  # each compiles once; 4 takes more than twice as long, 8 is not tried


def test_lanes_are_for_all_devices():
    run, asked = timed({3: 0.01, 6: 0.001})
    assert (
        fastest_lanes(run, clients(), EVERYBODY, candidates=(1, 2), devices=3, repeats=1, batch=2, seed=0)
        == 6
    )
    assert set(asked) == {3, 6}


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match=r"of at least 1, got \(0,\), 3, 1"):
        fastest_lanes(lambda plan: plan, clients(), EVERYBODY, candidates=(0,), batch=2, seed=0)
    with pytest.raises(ValueError, match=r"got \(\), 3, 1"):
        fastest_lanes(lambda plan: plan, clients(), EVERYBODY, candidates=(), batch=2, seed=0)
