"""The command line: `odjax VERB ...`. A mistake is answered by one line; `--debug` shows the traceback."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from odjax_train.errors import UserError

if TYPE_CHECKING:
    from odjax_train.watch import Watch

HELP = """\
usage: odjax VERB [...]

  train CONFIG [flags]     train; goes on by itself when the run's folder holds a checkpoint
  eval RUN                 judge a checkpoint on the held-out data
  plan CONFIG [flags]      what a pod will do: memory, FLOPs, collectives, step time; without having one
  generate RUN             continue a text with a trained language model
  translate RUN            translate a text, and its BLEU against people's translation
  merge RUN                put the factors of an adapted run into its weights, one .safetensors file
  export RUN               write the factors of an adapted run as an adapter that PEFT loads
  report RUN [RUN ...]     one self-contained HTML page with the plots
  methods                  every method: paper, what it is, where to import it, how its proof stands
  reproduce METHOD         a method's small proof: the claim beside what was measured here

odjax VERB --help says more; odjax train CONFIG --help lists the configuration's flags.
exit status: 0 done, 1 an error of ours, 2 a mistake typed or found, 3 diverged,
             75 stopped, or another process is gone: resumable, 130 stopped at once by a second Ctrl-C
"""

ERROR, MISTAKE, DIVERGED, INTERRUPTED, STOPPED = 1, 2, 3, 75, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits."""
    status = run(list(sys.argv[1:] if arguments is None else arguments))
    if status in (ERROR, MISTAKE, STOPPED) and _several():
        # Leaving the ordinary way waits for the other processes, which may be waiting for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if others := _others():
        others.leave()
    sys.exit(status)


def _several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _others() -> "Watch | None":
    """What watches over the other processes, if there are any."""
    distributed = sys.modules.get("odjax_train.distributed")
    return distributed and distributed.watching


def run(arguments: list[str]) -> int:
    """Runs the command line.

    Returns:
        the exit status.
    """
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(HELP, end="")
            return 0
        if arguments[0] == "--version":
            from odjax.version import __version__

            print(f"odjax {__version__}")
            return 0
        return _verb(arguments[0])(arguments[1:]) or 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _complain("stopped", STOPPED, debug)
    except UserError as error:
        return _complain(str(error), MISTAKE, debug)
    except Exception as error:
        if others := _others():
            others.pause()
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return _complain(text[:2000] + ("" if debug else " (--debug shows where)"), ERROR, debug)


def _complain(text: str, status: int, debug: bool) -> int:
    others = _others()
    if others is not None:
        others.take_over()
    if debug:
        traceback.print_exc()
    print(f"odjax: {text}", file=sys.stderr, flush=True)
    if others is not None:
        others.fail(status, text)
    return status


def _verb(name: str) -> Callable[[list[str]], int | None]:
    from odjax_train import commands

    verbs = {
        "train": commands.train,
        "eval": commands.evaluate,
        "plan": commands.plan,
        "generate": commands.generate,
        "translate": commands.translate,
        "merge": commands.merge,
        "export": commands.export,
        "report": commands.report,
        "methods": commands.methods,
        "reproduce": commands.reproduce,
    }
    if name not in verbs:
        raise UserError(f"unknown verb {name!r}; there are {', '.join(verbs)}")
    return verbs[name]
