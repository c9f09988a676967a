"""Measures: statistics in passes while a run is judged; neural collapse as one of them."""

import dataclasses
import json
import pathlib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.core import class_moments, leaves_with_paths, weighted_mean
from odjax.heads import Classifier, FixedHead, collapse_gram, collapse_metrics
from odjax.models import MLP, Decoder
from odjax_train import classification, language_model, neural_collapse
from odjax_train.data import feed
from odjax_train.errors import UserError
from odjax_train.loop import measure
from odjax_train.measures import Measure, Pass
from odjax_train.mesh import batch_sharding

MODELS = {
    "fixed": Classifier(MLP((64, 64)), FixedHead(10, rotate=True, loss="dr")),
    "learned": Classifier(MLP((64, 64)), nn.Dense(10)),
}


@pytest.fixture(scope="module")
def programs(images, program_of):
    """Programs of both models on one device and on eight, with three batches of 16 looked at."""
    return {
        (name, sizes): program_of(
            images(
                model=model,
                task=classification(head_losses=name == "fixed"),
                measures=[neural_collapse(10, batches=3)],
                batch=16,
            ),
            *sizes,
        )
        for name, model in MODELS.items()
        for sizes in ((1, 1, 1), (2, 2, 2))
    }


def state_of(program):
    with program.context():
        return program.init()


@pytest.mark.parametrize("name", MODELS)
def test_the_figures_are_those_of_the_statistics_on_the_same_examples(programs, name):
    program = programs[name, (1, 1, 1)]
    state, model = state_of(program), MODELS[name]
    data = program.experiment.data.train(0)
    rows = [data[i] for i in range(48)]
    images, labels = (jnp.asarray(np.stack([row[k] for row in rows])) for k in ("image", "label"))
    variables = {"params": state.params, **state.collections}
    h = model.apply(variables, images, method="seen")
    if name == "fixed":
        np.testing.assert_allclose(jnp.linalg.norm(h, axis=1), 1, rtol=1e-5)
        weights, bias = state.collections["constants"]["head"]["code"], None
    else:
        weights, bias = state.params["head"]["kernel"], state.params["head"]["bias"]
    first = class_moments(10, 64)
    moments = first.result(first.observe(first.zero(), h, labels))
    second = collapse_gram(moments.mean, moments.count > 0, classifier=weights, bias=bias)
    expected = collapse_metrics(moments, second.result(second.observe(second.zero(), h, labels)), weights)
    found = measure(program, state)
    assert set(found) == {f"collapse/{key}" for key in expected}
    for key, value in expected.items():
        np.testing.assert_allclose(found[f"collapse/{key}"], value, rtol=2e-3, atol=1e-5, err_msg=key)


def test_a_bias_and_reserved_classes_are_measured_as_they_predict(images, program_of):
    model = Classifier(MLP((16, 32)), FixedHead(20, scale=2.0, bias=True, eval_classes=10))
    program = program_of(images(model=model, measures=[neural_collapse(10, batches=1)], batch=64), 1, 1, 1)
    state = state_of(program)
    state.params["head"]["bias"] = 100 * jnp.eye(20)[3]  # everything is a three
    found = measure(program, state)
    data = program.experiment.data.train(0)
    x, labels = (jnp.asarray(np.stack([data[i][k] for i in range(64)])) for k in ("image", "label"))
    h = model.apply({"params": state.params}, x, method="seen")
    means = jnp.stack([h[labels == k].mean(axis=0) for k in range(10)])
    nearest = jnp.argmin(jnp.linalg.norm(h[:, None] - means[None], axis=-1), axis=1)
    np.testing.assert_allclose(found["collapse/nc4"], np.mean(nearest == 3), atol=1e-6)


def test_with_more_classes_than_a_simplex_takes_the_margins_are_measured(images, program_of):
    model = Classifier(
        MLP((16, 5)), FixedHead(10)
    )  # an orthoplex: every vector at distance 1 from the others
    program = program_of(images(model=model, measures=[neural_collapse(10, batches=1)], batch=16), 1, 1, 1)
    found = measure(program, state_of(program))
    assert found["collapse/min_margin"] == pytest.approx(1, abs=1e-4)
    assert found["collapse/mean_margin"] == pytest.approx(1, abs=1e-4)
    assert found["collapse/log_distance_variance"] > 0


@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_measure_what_one_does(programs, name):
    one, eight = (
        measure(programs[name, sizes], state_of(programs[name, sizes])) for sizes in ((1, 1, 1), (2, 2, 2))
    )
    for key, value in one.items():
        np.testing.assert_allclose(eight[key], value, rtol=2e-3, atol=1e-5, err_msg=key)


def test_held_out_examples_are_measured_whole_and_a_pass_sees_what_the_ones_before_found(images, program_of):
    def look(model, variables, batch):
        return batch["image"].mean(axis=(1, 2, 3)), batch["weight"]

    def deviation(model, variables, found, looked):
        (mean,) = found
        assert looked[0].shape == (16,)
        statistic = weighted_mean()

        def observe(state, x, w):
            return statistic.observe(state, (x - mean) ** 2, w)

        return dataclasses.replace(statistic, observe=observe)

    program = program_of(
        images(
            measures=[
                Measure(
                    "brightness",
                    (Pass(lambda *_: weighted_mean(), look), Pass(deviation, look)),
                    lambda model, variables, found: {"mean": found[0], "variance": found[1]},
                    on="held-out",
                    batches=1000,
                )
            ],
            batch=16,
        ),
        1,
        1,
        1,
    )
    found = measure(program, state_of(program))
    data = program.experiment.data.evaluation()
    brightness = np.array([data[i]["image"].mean() for i in range(len(data))], np.float64)
    np.testing.assert_allclose(found["brightness/mean"], brightness.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["brightness/variance"], brightness.var(), rtol=1e-4)


def test_a_run_logs_its_figures_and_the_report_and_eval_show_them(odjax, tmp_path):
    run = tmp_path / "run"
    config = pathlib.Path(__file__).parents[2] / "configs" / "mlp_digits_etf.py"
    status, out, _ = odjax("train", config, "--steps", 4, "--width", 16, "--dim", 16, "--run", run)
    assert status == 0
    assert "step 4/4  collapse: " in out
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (figures,) = [record for record in records if record.get("kind") == "measures"]
    assert figures["step"] == 4
    assert figures["collapse/nc4"] <= 1
    page = (run / "report.html").read_text()
    assert "<h2>Collapse</h2>" in page
    status, out, _ = odjax("eval", run, "--json")
    assert status == 0
    assert json.loads(out)["collapse/within_between"] == pytest.approx(
        figures["collapse/within_between"], rel=1e-4
    )


def test_stopping_gives_a_measure_up(programs):
    program = programs["learned", (1, 1, 1)]
    assert measure(program, state_of(program), True) is None


def test_what_cannot_be_measured_is_named(images, program_of):
    with pytest.raises(
        UserError, match="sees: use Classifier.backbone, head., or give features= and classifier="
    ):
        program_of(images(model=MLP((8, 10)), measures=[neural_collapse(10)]), 1, 1, 1)
    with pytest.raises(UserError, match="on 'train' or on 'held-out' examples, got 'test'"):
        neural_collapse(10, on="test")
    with pytest.raises(UserError, match="needs at least 1 batch, got 0"):
        neural_collapse(10, batches=0)
    with pytest.raises(UserError, match="measures must have different names"):
        images(measures=[neural_collapse(10), neural_collapse(10)])


def test_a_vision_transformer_is_measured_as_it_is(images, program_of):
    program = program_of(images(measures=[neural_collapse(10, batches=1)], batch=64), 1, 1, 1)
    found = measure(program, state_of(program))
    assert np.isfinite(found["collapse/within_between"])
    assert found["collapse/within_between"] > 0


def test_tasks_that_need_logits_refuse_the_losses_of_a_head():
    with pytest.raises(ValueError, match="label_smoothing 0.1 needs the logits"):
        classification(label_smoothing=0.1, head_losses=True)


def losses_of(program, steps=4):
    experiment = program.experiment
    batches = feed(experiment.data.train(0), experiment.batch, batch_sharding(program.mesh))
    found = []
    with program.context(), batches:
        state = program.init()
        for _ in range(steps):
            state, metrics = program.step(state, next(batches))
            found.append(float(metrics["loss"]))
    return found, state


def test_a_fixed_head_loses_the_same_on_every_mesh(programs):
    one, eight = (losses_of(programs["fixed", sizes])[0] for sizes in ((1, 1, 1), (2, 2, 2)))
    np.testing.assert_allclose(eight, one, rtol=1e-4)


def test_a_language_model_with_a_hadamard_head_loses_the_same_on_every_mesh(lm, program_of):
    head = FixedHead(256, norm="none", chunk=64)
    sizes_of_model = {"vocab": 256, "layers": 2, "width": 32, "heads": 2, "mlp_width": 64, "max_length": 64}
    model = Decoder(**sizes_of_model, head=head)
    found = {}
    for sizes in ((1, 1, 1), (2, 2, 2)):
        program = program_of(lm(model=model, task=language_model(head_losses=True)), *sizes)
        found[sizes], state = losses_of(program)
        assert not [path for path, _ in leaves_with_paths(state.params) if "head" in path]
    np.testing.assert_allclose(found[2, 2, 2], found[1, 1, 1], rtol=1e-4)
    with pytest.raises(ValueError, match="z_loss 0.1 needs the logits"):
        language_model(z_loss=0.1, head_losses=True)
