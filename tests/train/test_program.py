"""The compiled functions: one result on any mesh, no gathered stack, and every option of a step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from odjax.core import Edit, leaves_with_paths
from odjax_train.data import feed
from odjax_train.errors import UserError
from odjax_train.mesh import batch_sharding

MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)]


def run(program, steps):
    """Losses and the state after some steps."""
    experiment = program.experiment
    losses = []
    with (
        program.context(),
        feed(
            experiment.data.train(experiment.seed), experiment.batch, batch_sharding(program.mesh)
        ) as batches,
    ):
        state = program.init()
        for _ in range(steps):
            state, metrics = program.step(state, next(batches))
            losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.fixture(scope="module")
def lm_runs(lm, program_of):
    """Twenty steps of the decoder on every mesh."""
    programs = {sizes: program_of(lm(), *sizes).compile()[0] for sizes in MESHES}
    return {sizes: (program, *run(program, 20)) for sizes, program in programs.items()}


@pytest.mark.parametrize("sizes", MESHES[1:])
def test_twenty_steps_of_the_decoder_lose_the_same_on_every_mesh(lm_runs, sizes):
    _, reference, _ = lm_runs[MESHES[0]]
    assert reference[-1] < reference[0] - 1
    np.testing.assert_allclose(lm_runs[sizes][1], reference, rtol=1e-4)


def test_twenty_steps_of_the_vision_transformer_lose_the_same_on_every_mesh(images, program_of):
    losses = {sizes: run(program_of(images(), *sizes), 20)[0] for sizes in MESHES}
    assert losses[MESHES[0]][-1] < losses[MESHES[0]][0]
    for sizes in MESHES[1:]:
        np.testing.assert_allclose(losses[sizes], losses[MESHES[0]], rtol=1e-4)


def test_parameters_and_moments_really_are_sharded(lm_runs):
    _, _, state = lm_runs[2, 2, 2]
    params = dict(leaves_with_paths(state.params))
    moments = dict(leaves_with_paths(optax.tree.get(state.opt_state, "mu")))
    for tree in (params, moments):
        layers, width, heads, size = tree["layers/attn/q/kernel"].shape
        shards = tree["layers/attn/q/kernel"].addressable_shards
        assert {shard.data.shape for shard in shards} == {(layers, width // 2, heads // 2, size)}
        vocab, width = tree["embed/embedding"].shape
        assert {s.data.shape for s in tree["embed/embedding"].addressable_shards} == {
            (vocab // 2, width // 2)
        }
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
    assert held < 0.3 * whole


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_the_compiled_step_gathers_no_whole_stack(lm_runs, sizes):
    program, _, _ = lm_runs[sizes]
    text = program.step.as_text()
    gathered = [
        tuple(map(int, shape.split(",")))
        for line in text.splitlines()
        if re.search(r" all-gather(-start)?\(", line)
        for shape in re.findall(r"\w+\[([\d,]+)\]", line.split(" all-gather")[0])
    ]
    stacks = {
        leaf.shape for path, leaf in leaves_with_paths(program.state.params) if path.startswith("layers/")
    }
    # What a device would hold of a stack that is whole along fsdp: cut over tensor, or not at all.
    tensor = program.mesh.shape["tensor"]
    whole = {(*shape[:i], shape[i] // tensor, *shape[i + 1 :]) for shape in stacks for i in range(len(shape))}
    assert gathered, "a sharded model gathers its layers one at a time"
    assert not (whole | stacks) & set(gathered)


def test_the_state_is_donated_and_keeps_its_layout(lm_runs):
    program, _, state = lm_runs[2, 2, 2]
    memory = program.step.memory_analysis()
    state_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= state_bytes
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(program.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_accumulated_microbatches_take_the_step_of_the_whole_batch(lm, program_of):
    # Plain gradient descent: Adam would divide rounding by rounding where a gradient is nothing but rounding.
    whole = run(program_of(lm(optimizer=optax.sgd(0.1)), 2, 1, 1), 3)
    parts = run(program_of(lm(optimizer=optax.sgd(0.1), accumulate=4), 2, 1, 1), 3)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(parts[1].params), jax.tree.leaves(whole[1].params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_only_trainable_parameters_move_and_only_they_have_moments(lm, program_of):
    program = program_of(lm(trainable="layers/attn/.*"), 1, 1, 1)
    with program.context():
        before = jax.device_get(program.init().params)
    _, state = run(program, 2)
    for (path, a), b in zip(leaves_with_paths(before), jax.tree.leaves(state.params), strict=True):
        assert np.array_equal(a, b) == (not path.startswith("layers/attn/")), path
    paths = [path for path, _ in leaves_with_paths(optax.tree.get(state.opt_state, "mu"))]
    assert paths
    assert all("layers/attn/" in path for path in paths)


def test_a_pattern_that_selects_nothing_shows_the_closest_paths(lm, program_of):
    with pytest.raises(ValueError, match="layers/attn/q/kernel"):
        program_of(lm(trainable="layers/atn/q/kernel"), 1, 1, 1)


def test_the_average_follows_its_recursion(images, program_of):
    program = program_of(images(ema=0.9), 1, 1, 1)
    with (
        program.context(),
        feed(program.experiment.data.train(0), 8, batch_sharding(program.mesh)) as batches,
    ):
        state = program.init()
        expected = jax.device_get(state.params)
        for step in range(4):
            state, _ = program.step(state, next(batches))
            rate = 1 - min(0.9, (1 + step) / (10 + step))
            expected = jax.tree.map(lambda e, p, r=rate: e + r * (np.asarray(p) - e), expected, state.params)
    for got, want in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    judged = program.evaluated(state)
    assert jax.tree.structure(judged) == jax.tree.structure(state.params)


def test_an_edit_is_compiled_apart_and_changes_what_it_says(images, program_of):
    halve = Edit(lambda key, step, p, s: (jax.tree.map(lambda x: x * 0.5, p), s), every=2, name="halve")
    program = program_of(images(edits=[halve]), 2, 2, 1)
    plain = program_of(images(), 2, 2, 1)
    with program.context():
        assert (
            program.step.lower(program.state, program.batch).as_text()
            == plain.step.lower(plain.state, plain.batch).as_text()
        )
        state = program.init()
        before = jax.device_get(state.params)
        ((_, apply),) = program.edits
        state = apply(state)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(b, a * 0.5)


def test_the_average_of_what_an_edit_changes_begins_anew(images, program_of):
    def apply(key, step, params, state):
        del key, step
        return {**params, "cls": params["cls"] + 1}, state

    program = program_of(images(ema=0.9, edits=[Edit(apply, every=2, name="shift")]), 1, 1, 1)
    with program.context():
        state = program.init()
        state = state._replace(ema=jax.tree.map(lambda e: e + 7, state.ema))
        before = jax.device_get(state.ema)
        ((_, edited),) = program.edits
        state = edited(state)
    np.testing.assert_array_equal(state.ema["cls"], state.params["cls"])
    np.testing.assert_array_equal(state.ema["positions"], before["positions"])


def test_bfloat16_compute_keeps_float32_parameters_and_learns(lm, program_of):
    with jax.numpy_dtype_promotion("standard"):  # the gradient of jax.nn.dot_product_attention needs it
        losses, state = run(program_of(lm(sizes={"dtype": jnp.bfloat16}), 1, 2, 1), 20)
    assert losses[-1] < losses[0] - 1
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_a_batch_that_does_not_divide_is_refused(lm, program_of):
    with pytest.raises(
        UserError, match="batch 6 does not divide by the 4 parts of the mesh axes data x fsdp"
    ):
        program_of(lm(batch=6), 2, 2, 1)
    with pytest.raises(UserError, match="batch 8 in 4 microbatches of 2 does not divide by the 4 parts"):
        program_of(lm(batch=8, accumulate=4), 4, 1, 1)


def test_a_program_is_built_without_touching_the_data(lm, program_of, tmp_path):
    from odjax_train.data import Text

    program = program_of(lm(data=Text(source=f"text:{tmp_path / 'nothing'}", length=32)), 1, 1, 1)
    with program.context():
        program.step.lower(program.state, program.batch)
