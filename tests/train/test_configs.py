"""The configurations build, and what the low-rank ones set fits together."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from odjax.core import leaves_with_paths, partition
from odjax.lowrank import Adapted
from odjax_train.config import load
from odjax_train.program import packed_masks

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "name",
    [
        "lm_stdlib",
        "lm_rac_lora",
        "lm_fixed_head",
        "vit_digits",
        "mlp_digits",
        "mlp_digits_sparse",
        "mlp_digits_etf",
        "fed_digits",
        "fed_lm_lora",
    ],
)
def test_a_configuration_builds_with_its_defaults(name, program_of):
    program = program_of(load(CONFIGS / f"{name}.py").experiment(), 1, 1, 1)
    assert program.state.step.shape == ()


@pytest.mark.parametrize(
    ("method", "edits", "numbers"),
    # 192 x 192 four times, 192 x 512 twice and 512 x 192, in four layers.
    [
        ("rac", 1, 4 * (4 * 8 * 192 + 3 * 8 * 512)),
        ("lora", 0, 4 * (4 * 8 * 384 + 3 * 8 * 704)),
        ("asym", 0, 4 * (4 * 8 * 192 + 2 * 8 * 512 + 8 * 192)),
        ("cola", 1, 4 * (4 * 8 * 384 + 3 * 8 * 704)),
        ("full", 0, None),
    ],
)
def test_the_adaptation_trains_what_its_method_trains(method, edits, numbers, program_of):
    experiment = load(CONFIGS / "lm_rac_lora.py", {"method": method}).experiment()
    assert isinstance(experiment.model, Adapted) == (method != "full")
    assert len(experiment.edits) == edits
    program = program_of(experiment, 1, 1, 1)
    free, frozen = partition(program.state.params, experiment.trainable)
    if numbers is None:
        assert not jax.tree.leaves(frozen)
    else:
        assert sum(leaf.size for leaf in jax.tree.leaves(free)) == numbers
    # A restart falls between two checkpoints, so that not every one of them holds the weights.
    assert all(edit.every % experiment.checkpoint_every == 0 for edit in experiment.edits)
    assert all(edit.every > experiment.checkpoint_every for edit in experiment.edits)


@pytest.mark.parametrize(
    ("method", "edits", "share"),
    [("rac", 1, 1.0), ("lora", 0, 1.0), ("lora_fa", 0, 1.0), ("dylora", 0, None)],
)
def test_across_clients_the_adaptation_trains_what_its_method_trains(method, edits, share, program_of):
    experiment = load(
        CONFIGS / "fed_lm_lora.py", {"method": method, "preset": "tiny", "steps": 6}
    ).experiment()
    assert len(experiment.edits) == edits
    program = program_of(experiment, 1, 1, 1)
    if share is not None:
        np.testing.assert_array_equal(program.shares, share)
        return
    # The server draws a rank of 1 to 8 for each round.
    eighths = program.shares * 8
    np.testing.assert_allclose(eighths, np.round(eighths), atol=1e-5)
    assert len(set(np.round(eighths).tolist())) > 1


def test_the_configuration_for_llama_weights_builds(tmp_path):
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(tmp_path / "tokenizer.json"))
    config = load(CONFIGS / "llama_rac_lora.py", {"base": tmp_path, "source": "pydoc"})
    experiment = config.experiment()
    assert (experiment.start_from, experiment.model.layers) == (tmp_path, 16)
    assert experiment.edits[0].every > experiment.checkpoint_every
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    params = jax.eval_shape(experiment.model.init, jax.random.key(0), tokens)["params"]
    dtypes = {path.rpartition("/")[2]: leaf.dtype for path, leaf in leaves_with_paths(params)}
    assert (dtypes["kernel"], dtypes["lora_a"]) == ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("method", "edits"), [("dense", 0), ("static", 0), ("rigl", 0), ("granet", 0), ("cht", 1), ("chtss", 1)]
)
def test_every_sparse_method_is_a_flag(method, edits, program_of):
    config = load(CONFIGS / "mlp_digits_sparse.py", {"method": method, "width": 32})
    experiment = config.experiment()
    assert len(experiment.edits) == edits
    program = program_of(experiment, 1, 1, 1)
    assert bool(packed_masks(program.state.opt_state)) == (method != "dense")


def test_a_sparse_run_starts_without_absent_links(program_of):
    program = program_of(load(CONFIGS / "mlp_digits_sparse.py", {"width": 32}).experiment(), 1, 1, 1)
    with program.context():
        state = program.init()
    kernel = np.asarray(state.params["dense_0"]["kernel"])
    assert (kernel != 0).sum() == -(-64 * 32 // 10)


def test_an_average_of_sparse_weights_has_their_links_alone(program_of):
    experiment = load(CONFIGS / "mlp_digits_sparse.py", {"width": 32, "method": "rigl"}).experiment()
    program = program_of(dataclasses.replace(experiment, ema=0.9), 1, 1, 1)
    with program.context():
        state = program.init()
    state = state._replace(ema=jax.tree.map(jnp.ones_like, state.ema))  # of links that were there before
    averaged = program.evaluated(state)
    assert int((averaged["dense_0"]["kernel"] != 0).sum()) == -(-64 * 32 // 10)
    assert int((averaged["dense_2"]["kernel"] != 0).sum()) == 320


def test_the_sparse_llama_builds_with_its_links_over_the_mesh(program_of):
    flags = {"tokenizer": "byte", "source": "pydoc", "batch": 8, "percolation": True, "divide_scores": True}
    experiment = load(CONFIGS / "llama_60m_chts.py", flags).experiment()
    program = program_of(experiment, 1, 4, 2)
    words = packed_masks(program.state.opt_state)
    assert len(words) == 7
    up = "layers/mlp/up/kernel"
    assert words[up].shape == (8, 16, 1376)
    assert packed_masks(program.shardings.opt_state)[up].shard_shape(words[up].shape) == (8, 16, 688)
    assert experiment.edits[0].every == 100
