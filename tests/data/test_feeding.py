"""Feeding a mesh: the same global batches on any number of devices and processes, and exact continuation."""

import json
import os
import subprocess
import sys

import grain
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax_train.data import Images, Text, batches, evaluation_batches, feed, local_rows
from odjax_train.data.examples import Examples
from odjax_train.data.feeding import _cut, to_devices
from odjax_train.errors import UserError

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 1), (1, 1, 8)]


BATCH = P(("data", "fsdp"))


def _sharding(*shape, spec=BATCH):
    names = ("data", "fsdp", "tensor")
    devices = jax.devices()[: int(np.prod(shape))]
    return NamedSharding(jax.make_mesh(shape, names, (AxisType.Auto,) * 3, devices=devices), spec)


def _numbers(size=37, seed=0, threads=0):
    def read(rows, draws):
        return {"row": rows.astype(np.int32), "weights": np.ones((len(rows), 2), np.float32)}

    return Examples(read, size, seed=seed, fingerprint="numbers", threads=threads)


@pytest.fixture(scope="module")
def text():
    return Text(source="stdlib", length=16)


def _same(left, right):
    for name in left:
        np.testing.assert_array_equal(np.asarray(left[name]), np.asarray(right[name]))


@pytest.mark.parametrize("shape", MESHES)
def test_global_batches_do_not_depend_on_the_mesh(shape, text):
    sharding = _sharding(*shape)
    dataset = text.train(0)
    with feed(dataset, 16, sharding) as batches_on_mesh:
        for step in range(3):
            batch = next(batches_on_mesh)
            _same(batch, dataset.take(step * 16 + np.arange(16)))
            for name, array in batch.items():
                assert array.sharding.is_equivalent_to(sharding, array.ndim), name
                parts = shape[0] * shape[1]
                assert {s.data.shape for s in array.addressable_shards} == {(16 // parts, *array.shape[1:])}


def test_arrays_of_different_ranks_share_one_sharding():
    data = Images()
    with feed(data.train(0), 8, _sharding(2, 2, 2)) as batches_on_mesh:
        _same(next(batches_on_mesh), data.train(0).take(np.arange(8)))


def test_a_sharding_for_each_name_may_cut_other_dimensions_too(text):
    by_name = {name: _sharding(2, 2, 2) for name in text.element_spec()}
    by_name["tokens"] = _sharding(2, 2, 2, spec=P(("data", "fsdp"), "tensor"))
    with feed(text.train(0), 8, by_name) as batches_on_mesh:
        batch = next(batches_on_mesh)
    _same(batch, text.train(0).take(np.arange(8)))
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 8)}
    by_name = {"row": _sharding(2, 2, 2), "weights": _sharding(1, 1, 1)}
    with feed(_numbers(), 8, by_name) as batches_on_mesh:
        _same(next(batches_on_mesh), _numbers().take(np.arange(8)))


@pytest.mark.parametrize("shape", [shape for shape in MESHES if shape != (1, 1, 1)])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_global_batch(shape, processes):
    sharding = _sharding(*shape)
    devices = list(sharding.mesh.devices.flat)
    dataset, batch = _numbers(), 8
    whole = dataset.take(3 * batch + np.arange(batch))
    seen = np.zeros(batch, int)
    for part in np.split(np.array(devices), processes):
        rows = local_rows(sharding, batch, devices=list(part))
        local = batches(dataset, batch, rows)[3]
        _same(local, {name: column[rows] for name, column in whole.items()})
        seen[rows] += 1
        # Every device of the process finds its rows in what the process read.
        for device, index in sharding.devices_indices_map((batch,)).items():
            if device in set(part):
                assert set(np.arange(batch)[index]) <= set(rows.tolist())
    assert (seen >= 1).all()


def test_rows_of_a_process_are_cut_for_its_devices():
    # One process with the second half of the devices: the arrays it hands to its devices hold their own rows.
    sharding = _sharding(4, 2, 1)
    devices = list(sharding.mesh.devices.flat)[4:]
    rows = local_rows(sharding, 16, devices=devices)
    assert rows.tolist() == list(range(8, 16))
    half = NamedSharding(jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=devices), P("data"))
    local = batches(_numbers(), 16, rows)[0]
    out = to_devices(local, np.arange(8), 8, half)
    _same(out, {name: column[8:] for name, column in _numbers().take(np.arange(16)).items()})


def test_scattered_rows_find_their_devices():
    sharding = _sharding(8, 1, 1)
    column = np.arange(16, dtype=np.int32)

    rows = local_rows(sharding, 16, devices=[sharding.mesh.devices[1, 0, 0], sharding.mesh.devices[5, 0, 0]])
    assert rows.tolist() == [2, 3, 10, 11]
    cut = _cut(column[rows], rows, 16)
    np.testing.assert_array_equal(cut((slice(10, 12),)), [10, 11])
    np.testing.assert_array_equal(cut((slice(2, 4),)), [2, 3])


@pytest.mark.parametrize("threads", [0, 2])
def test_continuing_from_a_state_equals_not_stopping(text, threads):
    sharding = _sharding(2, 2, 2)
    with feed(text.train(1), 8, sharding, threads=threads) as first:
        uninterrupted = [next(first) for _ in range(6)]
    with feed(text.train(1), 8, sharding, threads=threads) as second:
        for _ in range(2):
            next(second)
        state = json.loads(json.dumps(second.get_state()))
        assert state["step"] == 2
    with feed(text.train(1), 8, _sharding(8, 1, 1), threads=threads) as third:
        next(third)
        third.set_state(state)
        for step in range(2, 6):
            _same(next(third), uninterrupted[step])
        assert third.get_state() == {**state, "step": 6}
    with feed(text.train(1), 8, sharding, threads=threads, start_step=4) as fourth:
        _same(next(fourth), uninterrupted[4])


def test_closing_twice_and_going_on_after_closing():
    batches_on_mesh = feed(_numbers(), 8, _sharding(8, 1, 1))
    next(batches_on_mesh)
    batches_on_mesh.close()
    batches_on_mesh.close()
    _same(next(batches_on_mesh), _numbers().take(8 + np.arange(8)))
    batches_on_mesh.close()


@pytest.mark.parametrize("name, change", [("seed", 1), ("batch", 16), ("data", "other")])
def test_a_state_of_another_run_is_refused(name, change):
    batches_on_mesh = feed(_numbers(), 8, _sharding(8, 1, 1))
    state = {**batches_on_mesh.get_state(), name: change}
    with pytest.raises(
        UserError, match=f"the stored data position is of {name} {change}, this run has {name} "
    ):
        batches_on_mesh.set_state(state)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16])
def test_evaluation_counts_every_example_once(size):
    dataset = _numbers(size, seed=None)
    with feed(dataset, 8, _sharding(2, 2, 2), make_batches=evaluation_batches) as batches_on_mesh:
        found = [(np.asarray(b["row"]), np.asarray(b["weights"])) for b in batches_on_mesh]
        with pytest.raises(StopIteration):
            next(batches_on_mesh)
    assert len(found) == -(-size // 8)
    rows, weights = (np.concatenate(parts) for parts in zip(*found, strict=True))
    assert rows[weights[:, 0] > 0].tolist() == list(range(size))
    np.testing.assert_array_equal(weights, np.repeat(np.arange(rows.size)[:, None] < size, 2, axis=1))


def test_evaluation_of_images_pads_with_weight_zero():
    data = Images()
    held = data.evaluation()
    last = evaluation_batches(held, 100, np.arange(100))[len(held) // 100]
    assert last["weight"].sum() == len(held) % 100


def test_any_grain_dataset_can_be_fed():
    dataset = grain.MapDataset.range(20).map(lambda i: {"row": np.full(2, i)})
    with feed(dataset, 8, _sharding(4, 1, 1)) as batches_on_mesh:
        found = [np.asarray(batch["row"])[:, 0].tolist() for batch in batches_on_mesh]
    assert found == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize("threads", [0, 2])
def test_errors_in_the_background_arrive_where_the_batch_is_taken(threads):
    def read(rows, draws):
        if 20 in rows:
            raise UserError("example 20 has label 7")
        return {"row": rows}

    with feed(Examples(read, 40), 8, _sharding(1, 1, 1), threads=threads) as batches_on_mesh:
        next(batches_on_mesh)
        next(batches_on_mesh)
        for _ in range(2):
            with pytest.raises(UserError, match="example 20 has label 7"):
                next(batches_on_mesh)
        assert batches_on_mesh.get_state()["step"] == 2


def test_a_batch_that_does_not_divide_names_the_axes():
    with pytest.raises(UserError, match=r"batch 6 does not divide by the mesh axes data \(2\) x fsdp \(2\)"):
        feed(_numbers(), 6, _sharding(2, 2, 2))
    with pytest.raises(UserError, match=r"batch 6 does not divide by the mesh axes data \(8\)"):
        local_rows(_sharding(8, 1, 1, spec=P("data", None)), 6)


def test_batches_larger_than_the_data_are_refused():
    with pytest.raises(UserError, match=r"batch 64 is larger than the data set \(37 examples\)"):
        feed(_numbers(seed=None), 64, _sharding(1, 1, 1))
    with pytest.raises(UserError, match="batch must be at least 1, got 0"):
        batches(_numbers(), 0, np.arange(0))


def test_a_feed_that_nobody_closed_does_not_disturb_the_end_of_a_program():
    program = """
import jax
from odjax_train.data import Images, feed
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
feeds = [feed(Images().train(0), 8, sharding, threads=threads) for threads in (0, 2)]
print([next(one)["label"].shape for one in feeds])
"""
    command = [sys.executable, "-W", "error", "-c", program]
    alone = {**os.environ, "JAX_PLATFORMS": "cpu"}  # where libtpu is, JAX would look for a TPU
    ended = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True, env=alone)
    assert ended.stdout == "[(8,), (8,)]\n"
    assert ended.stderr == ""


def test_worker_processes_give_the_same_batches(tmp_path):
    program = """
import numpy as np

def main():
    import jax
    from odjax_train.data import Images, feed
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    data = Images()
    with feed(data.train(0), 8, sharding, workers=2, start_step=3) as workers:
        for step in range(3, 6):
            batch, expected = next(workers), data.train(0).take(step * 8 + np.arange(8))
            for name in expected:
                np.testing.assert_array_equal(np.asarray(batch[name]), expected[name])
    assert workers.get_state()["step"] == 6

if __name__ == "__main__":
    main()
"""
    (tmp_path / "program.py").write_text(program)
    subprocess.run([sys.executable, str(tmp_path / "program.py")], check=True, timeout=120)
