"""Logs: what is written is read back, also after a kill, and the report shows it."""

import io
import json
import re

import pytest
from rich.console import Console

from odjax_train import report
from odjax_train.errors import UserError
from odjax_train.metrics import Recorder, read


@pytest.fixture
def folder(tmp_path):
    """A run's folder as a run that was killed and resumed leaves it."""
    record = {
        "config": "x.py", "text": "# <configuration>", "arguments": {"steps": 20, "rate": 0.1}, "data": {"source": "digits"},
        "started": "2026-01-02T03:04:05+00:00", "devices": "8 x cpu", "processes": 1, "commit": None,
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "unit": "images", "steps": 20, "best": ["accuracy", "max"],
        "parameters": "path shape", "versions": {"jax": "1"},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(record))
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    recorder = Recorder(tmp_path, 20, "images", console, active=True)
    recorder.train(10, {"loss": 2.0, "grad_norm": 1.0}, None, 0.0)
    recorder.train(20, {"loss": 9.0, "grad_norm": 1.0}, 100.0, 0.01)
    recorder.event("resume", 10)
    recorder.train(20, {"loss": 1.0, "grad_norm": float("inf")}, 100.0, 0.01)
    recorder.evaluation(20, {"accuracy": 0.75, "loss": 1.5})
    recorder.event("sample", 20, prompt="<a>", text="& b")
    recorder.close()
    (tmp_path / "console").write_text(shown.getvalue())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    return tmp_path


def test_the_newest_line_of_a_step_counts_and_a_cut_line_is_passed_over(folder):
    series, events = read(folder)
    assert list(series["train"]) == [10, 20]
    assert series["train"][20]["loss"] == 1.0
    assert series["train"][20]["grad_norm"] == "inf"
    assert series["eval"][20]["accuracy"] == 0.75
    assert [event["event"] for event in events] == ["resume", "sample"]


def test_people_read_the_loss_the_rate_and_the_time_left(folder):
    shown = (folder / "console").read_text()
    assert re.search(r"step 20/20  loss 1.0000  100 images/s  ETA 0:00", shown)
    assert "held out: accuracy 0.7500  loss 1.5000" in shown


def test_tensorboard_gets_the_same_numbers(folder):
    (events,) = (folder / "events").iterdir()
    content = events.read_bytes()
    for tag in (b"train/loss", b"eval/accuracy"):
        assert tag in content


def test_the_report_is_one_file_with_plots_and_nothing_from_elsewhere(folder):
    page = report.write([folder], folder / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    assert "&lt;a&gt;&amp; b" in page
    assert "&lt;configuration&gt;" in page
    assert "best held-out accuracy, at step 20" in page


def test_several_runs_are_put_side_by_side(folder, tmp_path):
    record = json.loads((folder / "run.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text(json.dumps({**record, "arguments": {"steps": 20, "rate": 0.2}}))
    (other / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    page = report.write([folder, other], tmp_path / "both.html").read_text()
    assert "Side by side" in page
    assert "<th>rate</th><td>0.1</td><td>0.2</td>" in page
    assert "<th>steps</th><td>20</td>" not in page.split("Side by side")[1].split("</table>")[0]


def test_a_folder_that_is_no_run_or_has_no_metrics_says_so(tmp_path):
    with pytest.raises(UserError, match="is not a run: there is no"):
        report.read(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has no metrics yet"):
        report.read(tmp_path)
    (tmp_path / "run.json").write_text("{broken")
    with pytest.raises(UserError, match="run.json cannot be read"):
        report.read(tmp_path)
