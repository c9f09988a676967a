"""Federated runs by the command line: rounds, meshes, resume, privacy, what is written down and what is not."""

import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from odjax.core import fold_path, leaves_with_paths, partition
from odjax.federated import FederatedState, fed_avg, make_round, private_sum, scaffold, secure_sum
from odjax.models import MLP
from odjax.privacy import privacy_plan
from odjax_train import ByClient, Experiment, Federated, UserError, classification, cli
from odjax_train.config import load
from odjax_train.data import Images, Text
from odjax_train.federated import by_dirichlet, by_label_shards, evenly
from odjax_train.federated.costs import bytes_of, costs
from odjax_train.federated.feed import RoundFeed
from odjax_train.federated.step import weighted

_spec = importlib.util.spec_from_file_location("processes", pathlib.Path(__file__).with_name("processes.py"))
processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processes)

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "fed_digits.py"
SMALL = ("--steps", "6", "--clients", "12", "--cohort", "4", "--width", "8", "--lanes", "1")


def _train(run, *flags, config=CONFIG):
    with jax.numpy_dtype_promotion("standard"):
        assert cli.run(["train", str(config), "--run", str(run), *SMALL, *flags, "--debug"]) == 0
    return run


def _lines(run, kind):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("kind") == kind or line.get("event") == kind]


@pytest.fixture(scope="module")
def data():
    return ByClient(Images(source="digits"), by_label_shards(12))


@pytest.fixture
def federated(data):
    """Makes a small federated experiment; any argument of `Experiment` and of `Federated` may be given."""

    def algorithm(loss, server, aggregator):
        return fed_avg(loss, optax.sgd(0.1), server, aggregator=aggregator)

    def make(**changes) -> Experiment:
        section = {"algorithm": algorithm, "cohort": 4, "batch": 8}
        section |= {name: changes.pop(name) for name in tuple(changes) if name in Federated.__annotations__}
        defaults = {
            "model": MLP(features=(8, 10)),
            "task": classification(),
            "data": data,
            "optimizer": optax.sgd(1.0),
            "steps": 4,
            "batch": 16,
        }
        return Experiment(**{**defaults, **changes, "federated": Federated(**section)})

    return make


def _plan(**changes):
    settings = {
        "population": 12,
        "cohort": 4,
        "clip": 0.5,
        "rounds": 4,
        "delta": 1e-2,
        "noise_multiplier": 1.0,
    }
    return privacy_plan(**{**settings, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("federated") / "run")


def test_a_step_of_the_run_is_a_round_of_the_library(federated, data, program_of):
    experiment = federated()
    program = program_of(experiment, 1, 1, 1)
    with program.context():
        state = program.init()
        with RoundFeed(experiment.federated, data.clients(), "", experiment.seed, program.mesh) as rounds:
            batch = next(rounds)
        before = jax.tree.map(jnp.copy, state.params)
        after, metrics = program.step(state, batch)

    def loss(params, shared, batch, mask, key):
        sums, _ = experiment.task.loss(experiment.model, {"params": params}, weighted(batch, mask), key)
        return {name: tuple(s) for name, s in sums.items()}

    algorithm = fed_avg(loss, optax.sgd(0.1), optax.sgd(1.0))
    start = FederatedState(before, optax.sgd(1.0).init(before), None, None, jnp.int32(0))
    plan = jax.device_get(batch["plan"])
    key = fold_path(jax.random.wrap_key_data(after.key), "federated")
    expected, sums = jax.jit(make_round(algorithm))(start, data.clients().examples, plan, key)
    for (path, ours), (_, theirs) in zip(
        leaves_with_paths(after.params), leaves_with_paths(expected.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7, err_msg=path)
    assert float(metrics["loss"]) == pytest.approx(float(sums["loss"][0] / sums["loss"][1]), rel=1e-5)
    assert float(metrics["cohort"]) == 4


@pytest.mark.parametrize("flags", [("--mesh", "1,2,4"), ("--mesh", "2,2,2", "--lanes", "2")])
def test_lanes_and_meshes_change_nothing_but_rounding(run, tmp_path, flags):
    other = _train(tmp_path / "other", *flags)
    for ours, theirs in zip(_lines(run, "eval"), _lines(other, "eval"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_two_processes_run_the_rounds_of_one(run, tmp_path):
    address = f"localhost:{processes.free_port()}"
    both = [
        processes.start(
            "train", CONFIG, "--run", tmp_path / "two", *SMALL, "--cpu-devices", 4,
            "--coordinator", address, "--processes", 2, "--process", i,
        )
        for i in (0, 1)
    ]  # fmt: skip
    for process in both:
        status, output = processes.finish(process)
        assert status == 0, output
    for ours, theirs in zip(_lines(run, "eval"), _lines(tmp_path / "two", "eval"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_resumed_run_goes_through_the_same_rounds_bit_for_bit(tmp_path):
    config = tmp_path / "often.py"
    config.write_text(CONFIG.read_text().replace("checkpoint_every=50", "checkpoint_every=2, log_every=1"))
    whole = _train(tmp_path / "whole", "--method", "scaffold", config=config)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "6")
    _train(cut, "--method", "scaffold", config=config)
    assert [line["step"] for line in _lines(cut, "resume")] == [4]
    again = _lines(cut, "train")[-2:]
    for ours, theirs in zip(_lines(whole, "train")[-2:], again, strict=True):
        assert (ours["step"], ours["loss"], ours["update_norm"]) == (
            theirs["step"],
            theirs["loss"],
            theirs["update_norm"],
        )


def test_what_clients_keep_lies_over_the_lanes_and_stays_where_they_are_not_asked(
    federated, data, program_of
):
    experiment = federated(
        algorithm=lambda loss, server, aggregator: scaffold(loss, 0.1, server), uniform=True
    )
    program = program_of(experiment, 4, 1, 1)
    with program.context():
        state = program.init()
        leaf = state.opt_state.population["dense_0"]["kernel"]
        assert leaf.shape[0] == 12
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 3
        with RoundFeed(experiment.federated, data.clients(), "", 0, program.mesh) as rounds:
            batch = next(rounds)
        asked = set(np.asarray(batch["plan"].cohort).tolist())
        state, _ = program.step(state, batch)
    moved = np.abs(np.asarray(state.opt_state.population["dense_0"]["kernel"])).sum((1, 2)) > 0
    assert set(np.flatnonzero(moved).tolist()) == asked


def test_a_python_loop_over_rows_gives_the_same_run(federated, data, program_of):
    found = []
    for strategy in ("lanes", "loop"):
        experiment = federated(strategy=strategy)
        program = program_of(experiment, 2, 1, 1)
        with (
            program.context(),
            RoundFeed(experiment.federated, data.clients(), "", 0, program.mesh) as rounds,
        ):
            state, metrics = program.step(program.init(), next(rounds))
        found.append((state.params["dense_0"]["kernel"], metrics["loss"]))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_private_run_writes_what_it_spends_and_nothing_of_a_client(tmp_path):
    flags = ("--epsilon", "8", "--delta", "0.01", "--method", "fedadam")
    run = _train(tmp_path / "private", *flags)
    plan = load(CONFIG, {"steps": 6, "clients": 12, "cohort": 4, "epsilon": 8.0, "delta": 0.01}).experiment()
    plan = plan.federated.privacy
    for line in _lines(run, "train"):
        assert set(line) <= {"kind", "step", "time", "update_norm", "clients_per_second", "data_wait"}
    (spent,) = _lines(run, "measures")
    assert spent["federated/epsilon"] == pytest.approx(plan.epsilon(6))
    assert spent["federated/epsilon"] <= 8
    report = (run / "report.html").read_text()
    assert "epsilon spent" in report
    assert str(plan) in report
    stored = json.loads((run / "run.json").read_text())["federated"]
    assert stored["privacy"] == str(plan)
    assert "parameters and epsilon, nothing else" in report
    secret = (run / "secret").read_text().strip()
    assert len(secret) == 32
    assert (run / "secret").stat().st_mode & 0o777 == 0o600
    told = [path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "secret"]
    data = ByClient(Images(source="digits"), by_label_shards(12))
    for hidden in (secret, data.fingerprint, data.describe()["train_fingerprint"]):
        assert not any(hidden.encode() in text for text in told)
    names = {path.name for path in (run / "checkpoints" / "6").rglob("*")}
    assert not any("population" in name or "control" in name for name in names)


def test_the_state_of_a_private_run_has_no_place_for_clients(federated, program_of):
    program = program_of(federated(privacy=_plan(), cohort=None), 2, 1, 1)
    clients = program.experiment.data.clients().count
    assert program.state.opt_state.population is None
    assert program.state.opt_state.control is None
    assert all(clients not in leaf.shape for leaf in jax.tree.leaves(program.state))


def test_a_run_ends_before_the_round_that_its_budget_does_not_allow(tmp_path, capsys):
    flags = ("--epsilon", "8", "--delta", "0.01", "--budget", "6", "--steps", "6")
    run = _train(tmp_path / "budget", *flags)
    last = _lines(run, "measures")[-1]
    assert last["step"] < 6
    assert last["federated/epsilon"] <= 6
    plan = load(CONFIG, {"steps": 6, "clients": 12, "cohort": 4, "epsilon": 8.0, "delta": 0.01}).experiment()
    assert plan.federated.privacy.epsilon(last["step"] + 1) > 6
    assert "another round would exceed it" in capsys.readouterr().out
    with jax.numpy_dtype_promotion("standard"):
        assert cli.run(["train", str(CONFIG), "--run", str(run), *SMALL, *flags]) == 0
    assert "has finished already" in capsys.readouterr().out
    assert _lines(run, "measures")[-1] == last


def test_bytes_are_those_of_the_trained_numbers(federated, program_of):
    program = program_of(federated(), 1, 1, 1)
    numbers = 64 * 8 + 8 + 8 * 10 + 10
    assert bytes_of(program) == (4 * numbers, 4 * numbers)
    moved = 3 * 4 * 4 * numbers / 1e6
    assert costs(program, 3) == {"federated/uploaded_mb": moved, "federated/downloaded_mb": moved}


def test_the_noise_of_a_round_does_not_depend_on_the_mesh(federated, data, program_of):
    found = []
    for parts in (1, 4):
        experiment = federated(privacy=_plan(clip=1e-6, noise_multiplier=1e6), cohort=None)
        program = program_of(experiment, parts, 1, 1)
        with (
            program.context(),
            RoundFeed(experiment.federated, data.clients(), "", 0, program.mesh) as rounds,
        ):
            state, metrics = program.step(program.init(), next(rounds))
        found.append(np.asarray(state.params["dense_0"]["kernel"]))
        assert set(metrics) == {"update_norm"}
        # 602 numbers with deviation z C / (q N) = 1 / 4 each.
        assert float(metrics["update_norm"]) == pytest.approx(np.sqrt(610) / 4, rel=0.15)
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": 0}, "cohort must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"lanes": 0}, "federated lanes must be at least 1"),
        ({"local_steps": 0}, "local_steps must be at least 1"),
        ({"strategy": "queue"}, "strategy must be one of lanes, chunks, loop"),
        ({"budget": 1.0}, "it needs privacy="),
        ({"seed": -1}, "seed must be 0 to 4294967295"),
        ({"seed": 2**32}, "seed must be 0 to 4294967295"),
        ({"accumulate": 2}, "a federated round has local steps instead"),
        ({"data": Images(source="digits")}, "wrap it, ByClient"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(federated, changes, message):
    with pytest.raises(UserError, match=message):
        federated(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": 4}, "the plan samples the cohort"),
        ({"uniform": True}, "drop aggregator= and uniform="),
        ({"budget": 1e-6}, "not even one round is within it"),
        ({"budget": float("nan")}, "budget must be a positive epsilon, got nan"),
        ({"steps": 5}, "steps 5 are more than the 4 rounds"),
    ],
)
def test_a_section_that_would_break_the_promise_is_refused(federated, changes, message):
    with pytest.raises(UserError, match=message):
        federated(**{"privacy": _plan(), "cohort": None, **changes})


@pytest.mark.parametrize(
    "algorithm",
    [
        lambda loss, server, aggregator: fed_avg(loss, optax.sgd(0.1), server),
        lambda loss, server, aggregator: scaffold(loss, 0.1, server),
        lambda loss, server, aggregator: fed_avg(
            loss, optax.sgd(0.1), server, aggregator=secure_sum(1.0, bits=8)
        ),
        lambda loss, server, aggregator: fed_avg(
            loss, optax.sgd(0.1), server, aggregator=private_sum(_plan(clip=1e6, noise_multiplier=0.5))
        ),
    ],
)
def test_an_algorithm_that_goes_around_the_private_sum_is_refused(federated, program_of, algorithm):
    experiment = federated(algorithm=algorithm, privacy=_plan(), cohort=None)
    with pytest.raises(UserError, match="must use the aggregator that it is given"):
        program_of(experiment, 1, 1, 1)


def test_an_algorithm_that_keeps_something_of_a_client_is_refused_with_privacy(federated, program_of):
    def algorithm(loss, server, aggregator):
        return dataclasses.replace(
            scaffold(loss, 0.1, server), aggregator=dataclasses.replace(aggregator, private=False)
        )

    experiment = federated(algorithm=algorithm, privacy=_plan(), cohort=None)
    with pytest.raises(UserError, match="must keep nothing of a client"):
        program_of(experiment, 1, 1, 1)


def test_two_private_runs_have_different_noise_and_a_resumed_one_the_same(tmp_path):
    config = tmp_path / "often.py"
    config.write_text(CONFIG.read_text().replace("checkpoint_every=50", "checkpoint_every=2, log_every=1"))
    flags = ("--epsilon", "8", "--delta", "0.01")
    runs = [_train(tmp_path / name, *flags, config=config) for name in ("one", "two")]
    norms = [[line["update_norm"] for line in _lines(run, "train")] for run in runs]
    assert norms[0] != norms[1]
    shutil.rmtree(runs[0] / "checkpoints" / "6")
    _train(runs[0], *flags, config=config)
    assert [line["update_norm"] for line in _lines(runs[0], "train")][-2:] == norms[0][-2:]
    shutil.rmtree(runs[0] / "checkpoints" / "6")
    (runs[0] / "secret").unlink()
    with jax.numpy_dtype_promotion("standard"):
        assert cli.run(["train", str(config), "--run", str(runs[0]), *SMALL, *flags]) == 2


def test_a_measure_of_training_examples_is_refused_with_privacy(federated):
    from odjax_train import neural_collapse

    measure = neural_collapse(10)
    assert measure.on == "train"
    with pytest.raises(UserError, match="of training examples, which a private run must not show"):
        federated(privacy=_plan(), cohort=None, measures=(measure,))


def test_a_forecast_simulates_a_large_deployment_with_the_clients_there_are(federated, data, program_of):
    plan = _plan(population=10**6, cohort=1000, delta=1e-7).forecast(4, population=12)
    experiment = federated(privacy=plan, cohort=None)
    program = program_of(experiment, 1, 1, 1)
    with program.context(), RoundFeed(experiment.federated, data.clients(), "", 0, program.mesh) as rounds:
        _, metrics = program.step(program.init(), next(rounds))
    assert {"loss", "cohort", "clipped"} <= set(metrics)
    assert "federated/epsilon" not in costs(program, 2)
    with pytest.raises(UserError, match=r"give forecast\(cohort, population=\)"):
        RoundFeed(
            federated(privacy=plan.plan.forecast(4), cohort=None).federated,
            data.clients(),
            "",
            0,
            program.mesh,
        )


def test_a_plan_for_another_population_is_refused(federated, data, program_of):
    experiment = federated(privacy=_plan(population=13), cohort=None)
    program = program_of(experiment, 1, 1, 1)
    with pytest.raises(UserError, match="population of 13, the data has 12 clients"):
        RoundFeed(experiment.federated, data.clients(), "", 0, program.mesh)


def test_a_cohort_that_is_larger_than_the_population_is_refused(federated, data, program_of):
    experiment = federated(cohort=13)
    with pytest.raises(UserError, match="a cohort of 13 is larger than the 12 clients"):
        RoundFeed(experiment.federated, data.clients(), "", 0, program_of(experiment, 1, 1, 1).mesh)


def test_an_empty_poisson_cohort_is_a_round_of_noise_alone(federated, data, program_of):
    plan = _plan(cohort=0.01, rounds=1)
    seed = next(seed for seed in range(100) if not plan.sample(seed, 0).mask.any())
    experiment = federated(privacy=plan, cohort=None, steps=1, seed=seed)
    program = program_of(experiment, 1, 1, 1)
    with program.context(), RoundFeed(experiment.federated, data.clients(), "", seed, program.mesh) as rounds:
        _, metrics = program.step(program.init(), next(rounds))
    assert float(metrics["update_norm"]) > 0


@pytest.mark.parametrize("split", [evenly(12), by_dirichlet(12, 0.5), by_label_shards(12)])
def test_every_training_example_has_one_owner(split):
    data = ByClient(Images(source="digits"), split)
    assert data.clients().sizes.sum() == len(data.clients().examples["label"]) == 1438
    assert data.describe()["clients"] == 12


def test_a_client_without_examples_is_a_client():
    data = ByClient(Images(source="digits"), by_dirichlet(200, 0.05))
    assert data.clients().count == 200
    assert data.clients().sizes.min() == 0


def test_label_shards_leave_a_client_a_few_labels(data):
    clients = data.clients()
    labels = [
        len(set(clients.examples["label"][begin:end].tolist()))
        for begin, end in zip(clients.offsets[:-1], clients.offsets[1:], strict=True)
    ]
    assert max(labels) <= 4


def test_texts_are_clients_too(text_file):
    data = ByClient(Text(source=f"text:{text_file}", length=32), evenly(4))
    assert data.clients().count == 4
    with pytest.raises(UserError, match="a split by label needs examples with a label"):
        ByClient(Text(source=f"text:{text_file}", length=32), by_label_shards(4)).clients()


def test_the_state_of_the_data_is_the_number_of_the_round(federated, data, program_of):
    experiment = federated()
    mesh = program_of(experiment, 1, 1, 1).mesh
    with RoundFeed(experiment.federated, data.clients(), "a", 0, mesh) as rounds:
        next(rounds)
        state, expected = rounds.get_state(), next(rounds)
    with RoundFeed(experiment.federated, data.clients(), "a", 0, mesh) as rounds:
        rounds.set_state(state)
        np.testing.assert_array_equal(next(rounds)["plan"].index, expected["plan"].index)
    with (
        RoundFeed(experiment.federated, data.clients(), "b", 0, mesh) as rounds,
        pytest.raises(UserError, match="stored position is of clients a"),
    ):
        rounds.set_state(state)


def test_only_trainable_parameters_move(federated, data, program_of):
    experiment = federated(trainable="dense_1/.*")
    program = program_of(experiment, 1, 1, 1)
    with program.context(), RoundFeed(experiment.federated, data.clients(), "", 0, program.mesh) as rounds:
        state = program.init()
        before = jax.tree.map(jnp.copy, state.params)
        state, _ = program.step(state, next(rounds))
    moved, held = partition(
        jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, before), "dense_1/.*"
    )
    assert all(jax.tree.leaves(moved))
    assert not any(jax.tree.leaves(held))
