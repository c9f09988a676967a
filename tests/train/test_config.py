"""Configurations: flags are a function's arguments, and every mistake is one line."""

import dataclasses
import json

import pytest

from odjax_train import run_folder
from odjax_train.config import load, parse
from odjax_train.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of a command."""

    run: str | None = None
    """A folder."""


def test_the_flags_are_the_arguments_of_the_function(config_file):
    config, options = parse(
        load(config_file()), Flags, ["--steps", "9", "--run", "x", "--ema", "0.5"], "odjax train"
    )
    assert (config.arguments["steps"], config.arguments["ema"], config.arguments["batch"]) == (9, 0.5, 8)
    assert options == Flags("x")
    assert config.experiment().steps == 9


def test_help_shows_the_flags_of_both(config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(load(config_file()), Flags, ["--help"], "odjax train small.py")
    assert not stop.value.code
    shown = capsys.readouterr().out
    for text in ("--steps", "optimizer steps", "--run", "A folder", "A small model"):
        assert text in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stepz", "3"], "--stepz"),
        (["--steps", "many"], "--steps"),
        (["--steps"], "--steps"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(config_file, flags, message):
    with pytest.raises(UserError, match=message) as error:
        parse(load(config_file()), Flags, flags, "odjax train small.py")
    assert "\n" not in str(error.value)
    assert "odjax train small.py --help" in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "has no function experiment"),
        ("def experiment(:\n", "small.py:1: "),
        ("import nothing_like_this", "does not run: ModuleNotFoundError"),
        ("experiment = 3", "has no function experiment"),
    ],
)
def test_a_broken_file_says_what_is_wrong(config_file, body, message):
    with pytest.raises(UserError, match=message):
        load(config_file(body=body))


def test_a_missing_file_suggests_the_nearest(config_file):
    path = config_file()
    with pytest.raises(UserError, match="no configuration file .*smal.py; did you mean .*small.py"):
        load(path.with_name("smal.py"))


def test_what_the_function_refuses_names_the_file(config_file):
    config = load(config_file(), {"steps": -1})
    with pytest.raises(UserError, match="steps must not be negative, got -1"):
        config.experiment()
    body = "def experiment():\n    return 3\n"
    with pytest.raises(UserError, match=r"experiment\(\) returned int, not an Experiment"):
        load(config_file(body=body)).experiment()


def test_a_folder_takes_its_own_run_back_and_refuses_another(config_file, tmp_path):
    path = config_file()
    folder = tmp_path / "run"
    config = load(path)
    assert not run_folder.claim(folder, config, {"steps": 6})
    assert run_folder.claim(folder, config, {})
    before = (folder / "run.json").read_bytes()
    with pytest.raises(
        UserError, match=r"different experiment \(batch: 8 there, 16 now; steps: 6 there, 7 now\)"
    ):
        run_folder.claim(folder, load(path, {"steps": 7, "batch": 16}), {})
    changed = path.read_text().replace("A small model.", "A changed model.", 1)
    path.write_text(changed)
    with pytest.raises(UserError, match=r"the text of small.py has changed from line 1"):
        run_folder.claim(folder, load(path), {})
    assert (folder / "run.json").read_bytes() == before
    assert json.loads(before)["arguments"]["steps"] == 6


def test_other_flags_get_another_folder(config_file):
    path = config_file()
    plain, changed = load(path), load(path, {"steps": 7})
    assert str(run_folder.default_folder(plain)) == "runs/small"
    assert str(run_folder.default_folder(changed)).startswith("runs/small-")


def test_a_disk_without_room_is_noticed_before_training(tmp_path):
    with pytest.raises(UserError, match=r"free, the checkpoints need 1"):
        run_folder.require_space(tmp_path, 2**50)
