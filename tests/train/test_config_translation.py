"""The translation configuration: every method builds, and one trains and is judged."""

import pathlib

import jax
import numpy as np
import pytest

from odjax.sparse import DstState, links, unpack
from odjax_train.config import load
from odjax_train.errors import UserError
from odjax_train.proofs.chtss import made_up

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "translation_multi30k.py"
TINY = {"size": "small", "vocab": 300, "length": 16, "batch": 8, "steps": 8, "interval": 2, "rewarm": 1}
# What is sparse costs time to trace.
FEW = {"where": ".*/mlp/.*/kernel"}


def build(**arguments):
    return load(CONFIG, {**TINY, **arguments}).experiment()


def shapes(experiment):
    tokens = jax.ShapeDtypeStruct((1, 2), "int32")
    params = jax.eval_shape(experiment.model.init, jax.random.key(0), tokens, tokens)["params"]
    return params, jax.eval_shape(experiment.optimizer.init, params)


@pytest.mark.parametrize(
    "method", ["dense", "static", "set", "rigl", "gmp", "granet", "cht", "chts", "chtss"]
)
def test_every_method_builds_without_the_data_and_has_its_state(method):
    experiment = build(method=method, data=pathlib.Path("/no/such"), **FEW)
    _, state = shapes(experiment)
    assert isinstance(state, DstState) == (method != "dense")
    # What needs no gradient changes links apart from the step.
    assert len(experiment.edits) == (method in ("set", "cht", "chts", "chtss"))


def test_the_sizes_are_those_of_the_paper_and_of_two_cores():
    full = load(CONFIG).experiment()
    model = full.model
    assert (model.width, model.mlp_width, model.layers, model.heads) == (512, 1024, 6, 8)
    assert (model.dropout, full.steps) == (0.1, 5000)
    # noam: 0.25 / sqrt(512 * 1000) at the end of the warm-up, where no change of links is near.
    assert float(full.schedule(999)) == pytest.approx(0.25 * (512 * 1000) ** -0.5)
    # After a change, the first of twenty steps back to the full rate.
    assert float(full.schedule(2001)) == pytest.approx(0.25 * (512 * 2002) ** -0.5 / 20, rel=1e-4)
    (edit,) = full.edits
    assert edit.every == 100
    assert [edit.due(step) for step in (3700, 3750, 3800)] == [True, False, False]
    small = load(CONFIG, {"size": "small"}).experiment()
    assert (small.model.width, small.steps, small.edits[0].every) == (128, 1500, 50)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "method": "chts",
            "where": ".*/attn/q/kernel",
            "initial_topology": "bsw",
            "per_head": True,
            "percolation": False,
            "predictor": "CH3_L3n",
        },
        {"method": "chtss", "initial_topology": "er", "decay": "cubic", "removal": "hard", "regrowth": "top"},
        {"method": "chts", "skip_step": True, "history": True, "temperature": (1.0, 3.0), "alpha": 0.0},
        {"method": "rigl", "distribution": "erk", "initial_topology": "brf", "rewarm": 0, "skip_step": True},
    ],
    ids=lambda changes: changes["method"],
)
def test_knobs_go_where_they_belong(changes):
    experiment = build(**{**FEW, **changes})
    _, state = shapes(experiment)
    assert bool(state.history) == changes.get("history", False)
    assert len(experiment.edits) == (changes["method"] != "rigl" and not changes.get("skip_step", False))


def test_a_knob_that_makes_no_sense_is_an_error_of_the_person():
    with pytest.raises(ValueError, match=r"r must be in \[0, 1\]"):
        shapes(build(method="chts", r=1.5, **FEW))
    with pytest.raises(UserError, match="move end"):
        build(method="chts", end=0.2)


def test_it_trains_and_an_edit_brings_its_density(program_of, tmp_path):
    made_up(tmp_path, 0)
    for side in ("de", "en"):
        (tmp_path / f"val.{side}.gz").write_bytes((tmp_path / f"test_2016_flickr.{side}.gz").read_bytes())
    # One kernel is sparse: what the others cost to compile shows nothing more.
    path = "encoder/layers/mlp/up/kernel"
    experiment = build(data=tmp_path, where=path, density=0.4, steps=4, dropout=0.0)
    program = program_of(experiment, 1, 1, 1)
    assert len(experiment.data.evaluation()) == 12
    data, ((edit, apply),) = experiment.data.train(0), program.edits
    shares = []
    with program.context(), jax.numpy_dtype_promotion("standard"):
        state = program.init()
        for step in range(1, 4):
            rows = np.arange(8 * (step - 1), 8 * step)
            state, metrics = program.step(state, data.take(rows))
            assert np.isfinite(metrics["loss"])
            if edit.due(step):
                state = apply(state)
            shares.append(float(links(unpack(state.opt_state.masks[path], (2, 128, 256)))) / 2**16)
    # The last change goes to the plan, whatever the decay says.
    assert shares == pytest.approx([0.4, 0.1, 0.1], abs=1e-3)
    kernel = state.params["encoder"]["layers"]["mlp"]["up"]["kernel"]
    assert 0.05 < float((kernel != 0).mean()) <= 0.1  # new links begin at 0
