"""Splits of examples over clients, and the batches of a round."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.federated import Clients, dirichlet_split, group_by_client, label_shards, localize, plan_round

from .world import LANES, SIZES, clients, plan

OPTIONS = {
    "lanes": st.sampled_from(LANES),
    "strategy": st.sampled_from(["lanes", "chunks", "loop"]),
    "batch": st.integers(1, 4),
    "epochs": st.integers(1, 3),
    "steps": st.sampled_from([None, 1, 3]),
}


def batches(plan, index=None):
    """client -> list of its steps, each the list of the examples that count."""
    found = {}
    index = plan.index if index is None else index
    lanes = plan.lanes
    for row, lane in zip(*np.nonzero(lanes.active), strict=True):
        step = index[row, lane][plan.mask[row, lane]].tolist()
        found.setdefault(int(plan.client[lane, lanes.slot[row, lane]]), []).append(step)
    return found


@given(owner=st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_grouping_keeps_every_example_with_its_client(owner):
    grouped = group_by_client({"x": np.arange(len(owner))}, owner, 5)
    assert grouped.count == 5
    for client in range(5):
        own = grouped.examples["x"][grouped.offsets[client] : grouped.offsets[client + 1]]
        assert own.tolist() == [i for i, who in enumerate(owner) if who == client]
    assert grouped.sizes.sum() == len(owner)


@given(**OPTIONS)
def test_batches_of_a_client_depend_on_neither_lanes_nor_strategy(lanes, strategy, batch, epochs, steps):
    options = {"batch": batch, "epochs": epochs, "steps": steps}
    assert batches(plan(lanes=lanes, strategy=strategy, **options)) == batches(plan(**options))


@given(**OPTIONS)
def test_an_epoch_takes_every_example_of_a_client_once(lanes, strategy, batch, epochs, steps):
    taken = batches(plan(lanes=lanes, strategy=strategy, batch=batch, epochs=epochs, steps=steps))
    store = clients()
    assert set(taken) == {i for i, size in enumerate(SIZES) if size}
    for client, own in taken.items():
        each = -(-SIZES[client] // batch)
        assert len(own) == min(epochs * each, steps or epochs * each)
        for at in range(0, len(own) - each + 1, each):
            examples = [example for step in own[at : at + each] for example in step]
            assert sorted(examples) == list(range(*store.offsets[client : client + 2]))


def test_orders_change_with_the_round_the_epoch_and_the_seed_alone():
    order = batches(plan(epochs=2, batch=7))[4]
    assert order[0] != order[1]
    assert batches(plan(epochs=2, batch=7)) == batches(plan(ids=[4, 0, 1, 2, 3, 5, 6], epochs=2, batch=7))
    assert batches(plan(round=1, batch=7))[4] != order
    assert batches(plan(seed=2, batch=7))[4] != order


def test_weights_are_numbers_of_examples_or_one():
    by_id = dict(zip(plan().client.flat, plan().weight.flat, strict=True))
    assert [by_id.get(i, 0) for i in range(len(SIZES))] == list(SIZES)
    uniform = plan(uniform=True)
    assert {
        int(c): float(w) for c, w in zip(uniform.client.flat, uniform.weight.flat, strict=True) if c >= 0
    } == {i: 1.0 for i, size in enumerate(SIZES) if size}


def test_padding_of_a_cohort_takes_no_step_whatever_its_id():
    padded = plan(ids=[0, 2, 10**6, -5], mask=[True, True, False, False])
    assert batches(padded) == batches(plan(ids=[0, 2]))
    assert padded.cohort.tolist() == [0, 2, -1, -1]
    assert (padded.client[padded.client >= 0] < 3).all()


@given(devices=st.sampled_from([1, 2, 4]), strategy=OPTIONS["strategy"], bucket=st.sampled_from([1, 8]))
def test_local_data_hold_each_devices_examples_and_no_others(devices, strategy, bucket):
    whole = plan(lanes=4, strategy=strategy)
    store = clients()
    data, local = localize(store, whole, devices, bucket=bucket)
    held = len(data["x"]) // devices
    assert held % bucket == 0
    each = 4 // devices
    for lane in range(4):
        device = lane // each
        index = np.where(local.mask[:, lane], local.index[:, lane] + device * held, 0)
        for name, array in data.items():
            expected = store.examples[name][whole.index[:, lane]][whole.mask[:, lane]]
            np.testing.assert_array_equal(array[index][local.mask[:, lane]], expected)
    used = [
        len(np.unique(whole.index[:, d * each : (d + 1) * each][whole.mask[:, d * each : (d + 1) * each]]))
        for d in range(devices)
    ]
    assert held - max(used) < bucket


@given(count=st.integers(1, 4), shards=st.integers(1, 3), seed=st.integers(0, 3))
def test_shards_by_label_are_even_and_see_few_labels(count, shards, seed):
    labels = np.random.default_rng(seed).integers(0, 4, 60)
    owner = label_shards(labels, count, shards, seed)
    sizes = np.bincount(owner, minlength=count)
    assert sizes.sum() == 60
    assert sizes.max() - sizes.min() <= shards
    boundaries = len(set(labels)) - 1
    seen = sum(len(set(labels[owner == client])) for client in range(count))
    assert seen <= count * shards + boundaries


def test_dirichlet_proportions_go_from_one_label_to_all():
    labels = np.arange(4000) % 10
    even = dirichlet_split(labels, 4, 1e4, 0)
    assert np.bincount(even, minlength=4) == pytest.approx([1000] * 4, rel=0.05)
    rare = dirichlet_split(labels, 4, 0.01, 0)
    shares = np.stack([np.bincount(labels[rare == i], minlength=10) for i in range(4)]) / 400
    assert (shares.max(0) > 0.95).mean() >= 0.8
    np.testing.assert_array_equal(rare, dirichlet_split(labels, 4, 0.01, 0))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"ids": []}, "a list of ids, at least one, got shape \\(0,\\)"),
        ({"ids": [0, 7]}, "ids must be 0 to 6, got 0 to 7"),
        ({"ids": [-1, 0]}, "ids must be 0 to 6, got -1 to 0"),
        ({"ids": [2, 2]}, "a client is in the cohort twice"),
        ({"mask": [True]}, "mask must have one entry a client"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lanes": 0}, "lanes must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, or None, got 0"),
        ({"strategy": "pmap"}, "strategy must be one of lanes, chunks, loop, got 'pmap'"),
    ],
)
def test_bad_plans_name_the_argument(options, match):
    with pytest.raises(ValueError, match=match):
        plan(**options)


def test_bad_splits_name_the_argument():
    with pytest.raises(ValueError, match="examples is empty"):
        group_by_client({}, [])
    with pytest.raises(ValueError, match=r"examples\['x'\] has 2 rows, client has 1"):
        group_by_client({"x": np.zeros(2)}, [0])
    with pytest.raises(ValueError, match="must be 0 to 1, got 0 to 2"):
        group_by_client({"x": np.zeros(2)}, [0, 2], 2)
    with pytest.raises(ValueError, match="3 examples do not make 2 clients of 2 shards each"):
        label_shards([0, 1, 1], 2, 2, 0)
    with pytest.raises(ValueError, match="positive concentration, got 2, 0"):
        dirichlet_split([0], 2, 0, 0)
    with pytest.raises(ValueError, match="4 lanes do not divide by 3 devices"):
        localize(clients(), plan(lanes=4), 3)
    with pytest.raises(ValueError, match="bucket must be at least 1, got 0"):
        localize(clients(), plan(lanes=4), 2, bucket=0)


def test_a_store_beyond_int32_is_refused():
    huge = Clients({}, np.array([0, 2, 2**31]))
    with pytest.raises(ValueError, match="2147483648 examples are more than int32 counts"):
        plan_round(huge, [0], 0, batch=1, seed=0)
