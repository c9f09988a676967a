"""Tiny experiments that every test of the application shares."""

import gc
import math
import pathlib
import textwrap

import jax
import optax
import pytest

from odjax.models import decoder, vit
from odjax_train import Experiment, MeshShape, classification, cli, language_model
from odjax_train.data import Images, Text
from odjax_train.mesh import make_mesh
from odjax_train.program import build


def lenient(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, with the promotions that optax does itself (a float to the power of a count) allowed."""

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args)

    return optax.GradientTransformation(optimizer.init, update)


@pytest.fixture
def forgotten_reads():
    """Lets what Orbax forgot come up in the module that damages checkpoints and not in another one."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> pathlib.Path:
    """A text of some kilobytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}: {i * i % 97} {'ab' * (i % 7)}\n" for i in range(1500)))
    return path


@pytest.fixture(scope="session")
def lm(text_file):
    """Makes a language-model experiment; any argument of `Experiment` may be given."""
    data = Text(source=f"text:{text_file}", length=32)

    def make(**changes) -> Experiment:
        model = changes.pop("model", None) or decoder("tiny", max_length=64, **changes.pop("sizes", {}))
        defaults = {
            "task": language_model(),
            "data": data,
            "optimizer": lenient(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))),
            "steps": 6,
            "batch": 8,
            "eval_batches": 2,
        }
        return Experiment(model=model, **{**defaults, **changes})

    return make


@pytest.fixture(scope="session")
def images():
    """Makes an image-classification experiment with a ViT; any argument of `Experiment` may be given."""
    data = Images(source="digits")

    def make(**changes) -> Experiment:
        defaults = {
            "model": vit("tiny-digits", classes=10),
            "task": classification(),
            "data": data,
            "optimizer": lenient(optax.adamw(1e-3)),
            "steps": 6,
            "batch": 8,
        }
        return Experiment(**{**defaults, **changes})

    return make


@pytest.fixture(scope="session")
def program_of():
    """Builds an experiment's program on some of the eight virtual devices."""

    def make(experiment: Experiment, *sizes: int):
        return build(experiment, make_mesh(MeshShape(*sizes), jax.devices()[: math.prod(sizes)]))

    return make


@pytest.fixture
def config_file(tmp_path, text_file):
    """Writes a configuration of a small language model and returns its path."""

    def write(name: str = "small.py", body: str | None = None) -> pathlib.Path:
        path = tmp_path / name
        path.write_text(
            body
            or textwrap.dedent(
                f'''\
                """A small model."""
                import optax
                from odjax.models import decoder
                from odjax_train import Experiment, Sample, language_model
                from odjax_train.data import Text

                def experiment(steps: int = 6, batch: int = 8, learning_rate: float = 1e-3, ema: float | None = None,
                               length: int = 32, every: int = 3, where: str = ".*", width: int = 96) -> Experiment:
                    """A small model.

                    Args:
                        steps: optimizer steps.
                        batch: sequences in a step.
                        learning_rate: of Adam.
                    """
                    return Experiment(
                        model=decoder("tiny", max_length=64, width=width), task=language_model(),
                        data=Text(source="text:{text_file}", length=length),
                        optimizer=optax.adam(learning_rate), steps=steps, batch=batch, ema=ema, trainable=where,
                        eval_every=every, eval_batches=2, checkpoint_every=every, log_every=1,
                        sample=Sample("line", length=8),
                    )
                '''
            )
        )
        return path

    return write


@pytest.fixture
def odjax(capsys):
    """Runs `odjax ARGUMENTS` here; exit status and what was printed."""

    def call(*arguments):
        with jax.numpy_dtype_promotion("standard"):
            status = cli.run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
