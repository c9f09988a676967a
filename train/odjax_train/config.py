"""Configurations: a Python file with a function `experiment`, whose arguments are the flags."""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import io
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from odjax_train.errors import UserError
from odjax_train.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration with its arguments.

    Attributes:
        path: the file.
        text: what it says.
        function: its `experiment`.
        arguments: the resolved arguments, by name.
        defaults: the arguments' defaults, by name.
        flags: what was typed for them, among the flags of the command.
    """

    path: Path
    text: str
    function: Callable[..., Experiment]
    arguments: Mapping[str, Any]
    defaults: Mapping[str, Any]
    flags: tuple[str, ...] = ()

    def experiment(self) -> Experiment:
        """Builds the experiment.

        Raises:
            UserError: when the function refuses its arguments or returns something else.
        """
        try:
            built = self.function(**self.arguments)
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path}: {' '.join(str(error).split())}") from error
        if not isinstance(built, Experiment):
            raise UserError(f"{self.path}: experiment() returned {type(built).__name__}, not an Experiment")
        return built


def load(path: Path, arguments: Mapping[str, Any] | None = None) -> Config:
    """Loads a configuration file.

    Args:
        path: the file.
        arguments: arguments of its `experiment`; the defaults where not given.

    Raises:
        UserError: when there is no such file, it does not run, or it has no function `experiment`.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"no configuration file {path}{hint}")
    text = path.read_text()
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(path.stem, path))
    try:
        ast.parse(text, filename=str(path))
        exec(compile(text, str(path), "exec"), module.__dict__)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        raise UserError(f"{path} does not run: {type(error).__name__}: {error}") from error
    function = getattr(module, "experiment", None)
    if not inspect.isfunction(function):
        raise UserError(f"{path} has no function experiment()")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return Config(path, text, function, {**defaults, **(arguments or {})}, defaults)


def parse(config: Config, options: type, flags: Sequence[str], command: str) -> tuple[Config, Any]:
    """Reads the flags of a configuration together with those of a command.

    Args:
        config: the configuration, whose function's arguments become flags.
        options: dataclass of the command's own flags.
        flags: what was typed.
        command: how the help calls it.

    Returns:
        the configuration with its arguments, and the options.

    Raises:
        UserError: naming the flag at fault.
    """
    taken = {field.name for field in dataclasses.fields(options)}
    for name in inspect.signature(config.function).parameters:
        if name in taken:
            raise UserError(
                f"{config.path}: experiment() has an argument {name!r}, which is a flag of {command}"
            )
    experiment = _recorder(config.function)
    both = dataclasses.make_dataclass(
        "Flags",
        [
            ("options", Annotated[options, tyro.conf.arg(name="")]),
            ("experiment", Annotated[dict, tyro.conf.arg(name="", constructor=experiment)]),
        ],
    )
    doc = inspect.getdoc(config.function) or str(config.path)
    parsed = cli(both, flags, command, doc.splitlines()[0])
    config = dataclasses.replace(config, arguments=parsed.experiment, flags=tuple(flags))
    return config, parsed.options


def _recorder(function: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """The function's signature, returning its arguments."""

    def record(**arguments: Any) -> dict[str, Any]:
        return arguments

    hints = typing.get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    record.__signature__ = signature.replace(
        parameters=[
            p.replace(annotation=hints.get(p.name, p.annotation)) for p in signature.parameters.values()
        ]
    )
    record.__annotations__ = {**hints, "return": dict}
    record.__doc__ = function.__doc__
    return record


def cli(kind: Any, flags: Sequence[str], command: str, description: str) -> Any:
    """`tyro.cli` whose errors are one line.

    Raises:
        UserError: what tyro says, in a line.
        SystemExit: after `--help`.
    """
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            return tyro.cli(kind, args=list(flags), prog=command, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(heard.getvalue()) + f" (see {command} --help)") from None


def _one_line(boxed: str) -> str:
    """The text of one of tyro's boxes."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╰╮╯─ \t") for line in boxed.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("For full helptext", "Parsing error"))]
    return " ".join(lines)
