"""The command line: every verb works, and every mistake is one line that names what is at fault."""

import json
import os
import pathlib

import jax
import pytest

from odjax_train import cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    """A finished run of a small language model on a mesh of eight devices, and its configuration."""
    folder = tmp_path_factory.mktemp("cli")
    config = folder / "small.py"
    config.write_text(
        f'''
import optax
from odjax.models import decoder
from odjax_train import Experiment, Sample, language_model
from odjax_train.data import Text

def experiment(steps: int = 4, batch: int = 8, ema: float | None = 0.9, length: int = 32, every: int = 2,
               rate: float = 1e-3, where: str = ".*", width: int = 96, source: str = "text:{text_file}") -> Experiment:
    """A small model.

    Args:
        steps: optimizer steps.
    """
    return Experiment(
        model=decoder("tiny", max_length=64, width=width), task=language_model(),
        data=Text(source=source, length=length), optimizer=optax.adam(rate),
        schedule=optax.constant_schedule(rate), steps=steps, batch=batch, ema=ema, trainable=where,
        eval_every=every, eval_batches=2, checkpoint_every=every, log_every=1, sample=Sample("line", length=8),
    )
'''
    )
    run = folder / "run"
    with jax.numpy_dtype_promotion("standard"):
        status = cli.run(["train", str(config), "--run", str(run), "--mesh", "2,2,2", "--debug"])
    assert status == 0
    return config, run


def test_a_run_leaves_what_the_documentation_says(trained):
    _, run = trained
    names = {path.name for path in run.iterdir()}
    assert names == {"run.json", "config.py", "metrics.jsonl", "events", "checkpoints", "report.html"}
    record = json.loads((run / "run.json").read_text())
    assert record["arguments"]["steps"] == 4
    assert record["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert record["versions"]["jax"] == jax.__version__
    page = (run / "report.html").read_text()
    assert "held-out loss" in page
    assert "A sample" in page


def test_eval_gives_the_numbers_of_the_run_on_any_mesh(odjax, trained):
    _, run = trained
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (wanted,) = [line for line in lines if line.get("kind") == "eval" and line["step"] == 4]
    for flags in ((), ("--mesh", "8,1,1"), ("--best",), ("--step", 4)):
        status, out, err = odjax("eval", run, "--json", *flags)
        assert status == 0, err
        assert json.loads(out) == {
            "step": 4,
            "loss": pytest.approx(wanted["loss"], rel=1e-5),
            "accuracy": pytest.approx(wanted["accuracy"], rel=1e-5),
        }


def test_generate_continues_a_prompt_and_the_seed_decides(odjax, trained):
    _, run = trained
    texts = [
        odjax("generate", run, "--prompt", "line", "--length", 12, "--seed", seed)[1] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("line") for text in texts)
    greedy = [odjax("generate", run, "--prompt", "line", "--temperature", 0, "--seed", s)[1] for s in (1, 2)]
    assert greedy[0] == greedy[1]


def test_report_of_several_runs(odjax, trained, tmp_path):
    _, run = trained
    status, out, _ = odjax("report", run, run, "--out", tmp_path / "both.html")
    assert status == 0
    assert pathlib.Path(out.strip()).read_text().count("<svg") >= 4


def test_methods_lists_every_method_with_its_proof(odjax):
    from odjax.registry import METHODS

    status, out, _ = odjax("methods")
    assert status == 0
    joined = "".join(out.split())
    for method in METHODS:
        assert method.slug in joined


def test_reproduce_runs_a_proof_and_leaves_it_in_a_folder(odjax, tmp_path):
    status, out, _ = odjax("reproduce", "gumbel-top-k", "--quick", "--out", tmp_path / "proof")
    assert status == 0
    assert (tmp_path / "proof" / "proof.txt").exists()
    assert str(tmp_path / "proof") in out


def test_a_profile_is_a_trace_of_some_steps(odjax, trained, tmp_path):
    config, _ = trained
    status, _, err = odjax("train", config, "--run", tmp_path / "run", "--steps", 6, "--profile", 2)
    assert status == 0, err
    assert list((tmp_path / "run" / "profile").rglob("*.trace.json.gz"))


def test_help_of_everything(odjax):
    for arguments in ((), ("--help",), ("-h",), ("train", "--help"), ("eval", "--help"), ("generate", "--help"),
                      ("report", "--help"), ("methods", "--help"), ("reproduce", "--help")):  # fmt: skip
        status, out, err = odjax(*arguments)
        assert (status, err) == (0, "")
        assert "usage: odjax" in out
    assert odjax("--version")[1].startswith("odjax ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "unknown verb 'trian'; there are train, eval"),
        (("train",), "needs a configuration file"),
        (("train", "--steps", 3), "takes a configuration file first, got --steps"),
        (("train", "nowhere.py"), "no configuration file nowhere.py"),
        (("train", "CONFIG", "--stepz", 3), "--stepz"),
        (("train", "CONFIG", "--steps", "many"), "--steps"),
        (("train", "CONFIG", "--mesh", "3,1,1"), "mesh 3,1,1 (data,fsdp,tensor) needs 3 devices, there are 8"),
        (("train", "CONFIG", "--mesh", "x"), "--mesh 'x': give three whole numbers"),
        (("train", "CONFIG", "--batch", 6), "batch 6 does not divide by the 8 parts of the mesh axes data x fsdp"),
        (("train", "CONFIG", "--length", 100), "100"),
        (("train", "CONFIG", "--source", "text:/no/such/file"), "/no/such/file"),
        (("train", "CONFIG", "--source", "ftp:thing"), "ftp"),
        (("train", "CONFIG", "--where", "nothing"), "nothing"),
        (("train", "CONFIG", "--processes", 2), "--coordinator, --processes and --process together"),
        (("train", "CONFIG", "--run", "RUN", "--steps", 5), "different experiment (steps: 4 there, 5 now)"),
        (("eval",), "needs a run's folder"),
        (("eval", "nowhere"), "nowhere is not a run"),
        (("eval", "RUN", "--step", 3), "no checkpoint of step 3"),
        (("generate", "nowhere"), "nowhere is not a run"),
        (("translate", "RUN"), "odjax translate needs --source, such as --source text:test.de.gz"),
        (("generate", "RUN", "--length", 1000), "the model's maximum is 64"),
        (("report", "nowhere"), "nowhere is not a run"),
        (("report",), "needs at least one run"),
        (("reproduce",), "needs a method"),
        (("reproduce", "gumbel-topk"), "gumbel-top-k"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_what_is_at_fault(
    odjax, trained, tmp_path, monkeypatch, arguments, message
):
    config, run = trained
    monkeypatch.chdir(tmp_path)
    names = {"CONFIG": config, "RUN": run}
    status, out, err = odjax(*[names.get(argument, argument) for argument in arguments])
    assert status == cli.MISTAKE
    assert err.startswith("odjax: ")
    assert err.count("\n") == 1, err
    assert message in err
    assert "Traceback" not in out + err


def test_debug_shows_the_traceback(odjax):
    status, _, err = odjax("eval", "nowhere", "--debug")
    assert status == cli.MISTAKE
    assert "Traceback" in err


def test_a_folder_that_cannot_be_written_is_refused_before_training(odjax, trained, tmp_path):
    config, _ = trained
    (tmp_path / "file").write_text("")
    status, _, err = odjax("train", config, "--run", tmp_path / "file" / "run")
    assert status == cli.MISTAKE
    assert "cannot be written" in err


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(odjax, trained, tmp_path):
    config, run = trained
    copy = tmp_path / "diverging.py"
    # The rate explodes after the checkpoint of step 2.
    copy.write_text(
        config.read_text().replace("optax.adam(rate)", "optax.adam(lambda step: rate * 1e33 ** (step > 1))")
    )
    run = tmp_path / "run"
    status, out, _ = odjax("train", copy, "--run", run, "--steps", 9, "--every", 2)
    assert status == cli.DIVERGED
    step = int(out.split("diverged at step ")[1].split(":")[0])
    assert f"on batch {step - 1} of the data order (seed 0" in out
    assert "the last good checkpoint is of step 2" in out
    assert max(int(path.name) for path in (run / "checkpoints").iterdir()) == 2
    assert odjax("eval", run, "--step", 2)[0] == 0


def test_a_run_of_no_steps_leaves_a_checkpoint_of_the_start(odjax, trained, tmp_path):
    config, _ = trained
    assert odjax("train", config, "--run", tmp_path / "run", "--steps", 0)[0] == 0
    assert odjax("eval", tmp_path / "run", "--json")[0] == 0


def test_more_labels_than_outputs_are_refused_before_training(odjax, tmp_path):
    config = tmp_path / "few.py"
    config.write_text(
        """
from __future__ import annotations
from typing import Literal
import optax
from odjax.models import MLP
from odjax_train import Experiment, classification
from odjax_train.data import Images

def experiment(kind: Literal["a", "b"] = "a") -> Experiment:
    return Experiment(model=MLP(features=(8, 5)), task=classification(), data=Images(source="digits"),
                      optimizer=optax.adam(1e-3), steps=2, batch=8)
"""
    )
    status, _, err = odjax("train", config, "--run", tmp_path / "run")
    assert (status, err) == (cli.MISTAKE, "odjax: the model has 5 outputs, the data 10 labels\n")
    config.write_text("def experiment(mesh: str = 'x'):\n    return None\n")
    status, _, err = odjax("train", config)
    assert status == cli.MISTAKE
    assert "an argument 'mesh', which is a flag of odjax train" in err


def test_labels_outside_the_classes_name_the_example(odjax, tmp_path):
    config = tmp_path / "labels.py"
    config.write_text(
        """
import optax
from odjax.models import MLP
from odjax_train import Experiment, classification
from odjax_train.data import Images

def experiment() -> Experiment:
    return Experiment(model=MLP(features=(16, 5)), task=classification(), data=Images(source="digits", classes=5),
                      optimizer=optax.adam(1e-3), steps=2, batch=8)
"""
    )
    status, _, err = odjax("train", config, "--run", tmp_path / "run")
    assert status == cli.MISTAKE
    assert "digits" in err
    assert "label" in err
    assert not os.path.exists(tmp_path / "run" / "checkpoints")


def test_a_checkpoint_of_an_incompatible_model_names_the_first_path(odjax, trained, tmp_path):
    import shutil

    config, run = trained
    other = tmp_path / "other"
    assert odjax("train", config, "--run", other, "--width", 128)[0] == 0
    shutil.rmtree(other / "checkpoints")
    shutil.copytree(run / "checkpoints", other / "checkpoints")
    status, _, err = odjax("train", config, "--run", other, "--width", 128)
    assert status == cli.MISTAKE
    assert "is of another model" in err
    assert "embed/embedding" in err
    assert "96" in err
    assert "128" in err


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(odjax, trained, tmp_path, monkeypatch):
    import errno

    from odjax_train.metrics import Recorder

    config, _ = trained
    evaluation = Recorder.evaluation

    def full(self, step, metrics):
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        evaluation(self, step, metrics)

    run = tmp_path / "run"
    monkeypatch.setattr(Recorder, "evaluation", full)
    status, _, err = odjax("train", config, "--run", run)
    assert status == cli.MISTAKE
    assert err == f"odjax: {run}: No space left on device; the last good checkpoint is of step 2\n"
    monkeypatch.undo()
    status, out, _ = odjax("train", config, "--run", run)
    assert status == 0
    assert "resuming from the checkpoint of step 2" in out


def test_a_run_starts_from_the_parameters_of_another(odjax, trained, tmp_path):
    config, run = trained
    text = (
        config.read_text()
        .replace("experiment(steps", "experiment(start: str, steps")
        .replace("steps=steps", "start_from=pathlib.Path(start), steps=steps")
    )
    tuned = tmp_path / "tuned.py"
    tuned.write_text("import pathlib\n" + text)
    flags = ("--start", run, "--every", 1)
    status, out, err = odjax("train", tuned, "--run", tmp_path / "run", *flags, "--steps", 1, "--rate", 0.0)
    assert status == 0, err
    assert f"starting from {run} (step 4): 11 parameters taken over" in out
    # Without a single step, the new run is judged like the old one's average.
    judged = [json.loads(odjax("eval", folder, "--json")[1])["loss"] for folder in (run, tmp_path / "run")]
    assert judged[1] == pytest.approx(judged[0], rel=1e-6)
    status, _, err = odjax("train", tuned, "--run", tmp_path / "wide", *flags, "--width", 128)
    assert status == cli.MISTAKE
    assert "has embed/embedding with shape (256, 96), this model with (256, 128)" in err
    status, _, err = odjax("train", tuned, "--run", tmp_path / "none", "--start", tmp_path)
    assert status == cli.MISTAKE
    assert "is not a run" in err
