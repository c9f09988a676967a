"""Checkpoints: what is written is read on any mesh, and what was damaged is noticed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax_train.checkpoints import Checkpoints
from odjax_train.errors import UserError
from odjax_train.stored import fingerprints

# Orbax forgets the reads that were under way when one of them fails.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("forgotten_reads"),
]


def same(left, right):
    return all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.fixture(scope="module")
def program(images, program_of):
    return program_of(images(ema=0.9), 1, 1, 1)


@pytest.fixture(scope="module")
def initial(program):
    with program.context():
        return jax.device_get(program.init())


@pytest.fixture
def at(program, initial):
    """The initial state, standing at some step."""

    def make(step):
        return jax.device_put(initial._replace(step=np.int32(step)), program.shardings)

    return make


def read(folder, program, **options):
    warnings = []
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        return checkpoints.restore(program.state, warn=warnings.append, **options), warnings
    finally:
        checkpoints.close()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_a_checkpoint_is_restored_onto_any_mesh_bit_for_bit(tmp_path, images, program_of, program, at, sizes):
    other = program_of(images(ema=0.9), *sizes)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(3), {"step": 3})
    checkpoints.close()
    restored, warnings = read(tmp_path, other)
    assert not warnings
    assert (restored.step, restored.data, restored.skipped) == (3, {"step": 3}, ())
    assert same(restored.state, at(3))
    for leaf, sharding in zip(jax.tree.leaves(restored.state), jax.tree.leaves(other.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_the_newest_and_the_best_are_kept(tmp_path, at):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=1, best=("accuracy", "max"))
    for step, accuracy in enumerate([0.1, 0.9, 0.3, None, 0.5], 1):
        checkpoints.save(at(step), {}, None if accuracy is None else {"accuracy": accuracy, "loss": 1.0})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2
    checkpoints.close()


def test_an_evaluation_that_is_not_a_number_is_never_the_best(tmp_path, at):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    for step, loss in enumerate([1.0, float("nan")], 1):
        checkpoints.save(at(step), {}, {"loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.best() == 1
    checkpoints.close()


def test_random_keys_in_the_optimizer_state_are_stored(tmp_path, images, program_of):
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1))
    program = program_of(images(optimizer=noisy), 1, 1, 1)
    with program.context():
        state = program.init()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.close()
    restored, warnings = read(tmp_path, program)
    assert not warnings
    before, after = (jax.random.key_data(s.opt_state[0].rng_key) for s in (state, restored.state))
    assert np.array_equal(before, after)


def test_the_best_loss_is_the_smallest(tmp_path, at):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    for step, loss in enumerate([2.0, 0.5, 1.0], 1):
        checkpoints.save(at(step), {}, {"loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.best() == 2
    checkpoints.close()


def _largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage", [_flip, _truncate, lambda path: path.unlink()], ids=["flip", "truncate", "unlink"]
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_restored(tmp_path, program, at, damage):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(at(step), {"step": step})
    checkpoints.close()
    damage(_largest_file(tmp_path / "2" / "model"))
    restored, warnings = read(tmp_path, program)
    assert restored.step == 1
    assert [step for step, _ in restored.skipped] == [2]
    assert len(warnings) == 1
    assert f"checkpoint of step 2 in {tmp_path} cannot be read" in warnings[0]


def test_a_half_written_checkpoint_is_passed_over(tmp_path, program, at):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(at(step), {"step": step})
    checkpoints.close()
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    restored, _ = read(tmp_path, program)
    assert restored.step == 1


def test_a_damaged_checkpoint_is_moved_aside_so_that_its_step_can_be_written_again(tmp_path, program, at):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(at(step), {"step": step})
    checkpoints.close()
    _flip(_largest_file(folder / "2" / "model"))
    checkpoints = Checkpoints(folder)
    aside = checkpoints.set_aside(2)
    assert (aside / "model").is_dir()
    checkpoints.save(at(2), {"step": 2})
    checkpoints.close()
    restored, warnings = read(folder, program)
    assert (restored.step, warnings) == (2, [])


def test_when_none_can_be_read_the_run_does_not_start_over(tmp_path, program, at):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(1), {})
    checkpoints.close()
    _truncate(_largest_file(tmp_path / "1" / "model"))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(tried \[1\]\)"):
        read(tmp_path, program)


def test_a_checkpoint_of_another_model_names_the_first_path_that_differs(
    tmp_path, lm, program_of, program, at
):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(1), {})
    checkpoints.close()
    narrow, wide = program_of(lm(), 1, 1, 1), program_of(lm(sizes={"width": 128}), 1, 1, 1)
    with narrow.context():
        state = narrow.init()
    folder = tmp_path / "narrow"
    checkpoints = Checkpoints(folder)
    checkpoints.save(state, {})
    checkpoints.close()
    with pytest.raises(
        UserError, match=r"is of another model: .*params/.*96.*128|is of another model: .*params/.*128.*96"
    ):
        read(folder, wide)
    with pytest.raises(UserError, match="is of another model: "):
        read(tmp_path, wide)


def test_a_step_that_is_not_there_lists_those_that_are(tmp_path, program, at):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(1), {})
    checkpoints.close()
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*; there are \[1\]"):
        read(tmp_path, program, step=7)


def test_an_empty_folder_has_nothing_to_restore(tmp_path, program):
    assert read(tmp_path, program) == (None, [])


def test_a_state_that_is_not_finite_is_never_written(tmp_path, at):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(1), {})
    bad = at(2)
    bad = bad._replace(params=jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.nan), bad.params))
    with pytest.raises(FloatingPointError, match="parameters after step 2 are not finite"):
        checkpoints.save(bad, {})
    checkpoints.wait()
    assert checkpoints.steps() == [1]
    checkpoints.close()


@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16", "int32", "uint8", "bool"]),
    data=st.data(),
)
def test_any_changed_bit_changes_the_fingerprint(shape, dtype, data):
    array = np.zeros(shape, jnp.dtype(dtype))
    where = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    changed = array.copy()
    raw = changed[where].tobytes()
    if dtype == "bool":
        changed[where] = True
    else:
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        bits = np.unpackbits(np.frombuffer(raw, np.uint8))
        bits[bit] ^= 1
        changed[where] = np.frombuffer(np.packbits(bits).tobytes(), changed.dtype)[0]
    assert fingerprints([jnp.asarray(array)])[0] != fingerprints([jnp.asarray(changed)])[0]


def test_exchanged_elements_change_the_fingerprint_and_the_layout_does_not():
    array = jax.random.normal(jax.random.key(0), (8, 4))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    reference = jax.jit(fingerprints)([array])[0]
    for spec in (P("a", "b"), P(("a", "b")), P(None, "a")):
        sharded = jax.device_put(array, NamedSharding(mesh, spec))
        assert jax.jit(fingerprints)([sharded])[0] == reference
    assert fingerprints([array[::-1]])[0] != reference
    assert fingerprints([array[:, ::-1]])[0] != reference
    assert fingerprints([-array])[0] != reference
    assert fingerprints([jnp.array([1.5, -1.5])])[0] != fingerprints([jnp.array([-1.5, 1.5])])[0]


def test_a_checkpoint_that_cannot_be_written_names_the_last_good_one(tmp_path, at, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(1), {})
    checkpoints.wait()

    def full(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(
        UserError, match="could not be written to .*: No space left on device; the last good one is of step 1"
    ):
        checkpoints.save(at(2), {})
    checkpoints.close()
