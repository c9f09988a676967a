"""Checkpoints of runs that train a part of the parameters: the rest is written when it has changed."""

import jax
import numpy as np
import pytest

from odjax_train.checkpoints import Checkpoints
from odjax_train.errors import UserError

# Orbax forgets the reads that were under way when one of them fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("forgotten_reads"),
]

TRAINED = "head/.*"


@pytest.fixture(scope="module")
def program(images, program_of):
    return program_of(images(trainable=TRAINED, ema=0.9), 1, 1, 1)


@pytest.fixture(scope="module")
def initial(program):
    with program.context():
        return jax.device_get(program.init())


@pytest.fixture
def at(program, initial):
    """The initial state, standing at some step; `merged` is added to every frozen kernel."""

    def make(step, merged=0.0):
        params = {
            name: part if name == "head" else jax.tree.map(lambda p: p + np.float32(merged), part)
            for name, part in initial.params.items()
        }
        params["head"] = jax.tree.map(lambda p: p + np.float32(step), params["head"])
        return jax.device_put(initial._replace(step=np.int32(step), params=params), program.shardings)

    return make


def opened(folder, **options):
    return Checkpoints(folder, trainable=TRAINED, keep_last=1, keep_best=0, **options)


def holds_frozen(folder):
    return sorted(int(path.parent.name) for path in folder.glob("*/frozen"))


def same(left, right):
    return all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_is_not_trained_is_written_once_and_kept_for_those_that_refer_to_it(tmp_path, program, at):
    checkpoints = opened(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(at(step), {"step": step})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
    assert holds_frozen(tmp_path) == [1]
    assert size(tmp_path / "3") < size(tmp_path / "1") / 2
    checkpoints.close()
    checkpoints = opened(tmp_path)
    restored = checkpoints.restore(program.state, warn=pytest.fail)
    assert same(restored.state, at(3))
    # A run that goes on refers to the same one.
    checkpoints.save(at(4), {})
    checkpoints.wait()
    assert (checkpoints.steps(), holds_frozen(tmp_path)) == ([1, 4], [1])
    checkpoints.close()


def test_what_an_edit_has_changed_is_written_again_and_the_old_weights_go(tmp_path, program, at):
    checkpoints = opened(tmp_path)
    for step, merged in ((1, 0.0), (2, 0.0), (3, 0.5), (4, 0.5)):
        checkpoints.save(at(step, merged), {})
    checkpoints.wait()
    assert (checkpoints.steps(), holds_frozen(tmp_path)) == ([3, 4], [3])
    restored = checkpoints.restore_model(program.state, warn=pytest.fail)
    assert same(restored.state.params, at(4, 0.5).params)
    checkpoints.close()


def test_they_are_restored_onto_another_mesh(tmp_path, images, program_of, at):
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        checkpoints.save(at(step), {})
    checkpoints.close()
    other = program_of(images(trainable=TRAINED, ema=0.9), 2, 2, 2)
    checkpoints = opened(tmp_path, read_only=True)
    assert same(checkpoints.restore(other.state, warn=pytest.fail).state, at(2))
    checkpoints.close()


def test_damaged_weights_are_noticed_by_every_checkpoint_that_refers_to_them(tmp_path, program, at):
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        checkpoints.save(at(step), {})
    checkpoints.close()
    largest = max((tmp_path / "1" / "frozen").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    checkpoints = opened(tmp_path, read_only=True)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(tried \[2, 1\]\)"):
        checkpoints.restore(program.state, warn=lambda text: None)
    checkpoints.close()
