"""Continuing text with a trained language model."""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from odjax.core import fold_path
from odjax.models import generate
from odjax_train.errors import UserError
from odjax_train.experiment import Sample
from odjax_train.mesh import replicated
from odjax_train.program import Program, TrainState


def continue_text(program: Program, state: TrainState, sample: Sample, *, seed: int = 0) -> str:
    """Text that the model adds to a prompt.

    Args:
        program: the experiment's functions.
        state: the parameters; the average of them is used where there is one.
        sample: the prompt and how to draw.
        seed: of the draw.

    Raises:
        UserError: when the experiment is not a language model, or prompt and text do not fit into its length.
    """
    experiment = program.experiment
    tokenizer = getattr(experiment.data, "tokenizer", None)
    if experiment.task.name != "language model" or tokenizer is None:
        raise UserError(f"only a language model continues text; this run's task is {experiment.task.name}")
    prompt = np.concatenate([[tokenizer.separator], tokenizer.encode(sample.prompt)]).astype(np.int32)
    total, most = len(prompt) + sample.length, experiment.model.max_length
    if total > most:
        asked = f"prompt ({len(prompt)} tokens) and --length {sample.length} make {total}"
        raise UserError(f"{asked}, the model's maximum is {most}")
    key = fold_path(jax.random.key(seed), "sample")

    @functools.partial(jax.jit, out_shardings=replicated(program.mesh))
    def write(params: Any, collections: Any, prompt: jax.Array, key: jax.Array) -> jax.Array:
        return generate(
            experiment.model,
            params,
            prompt,
            steps=sample.length,
            collections=collections,
            key=key,
            temperature=sample.temperature,
            top_p=sample.top_p,
            eos=tokenizer.separator,
        )

    # One row is not cut up over the data axes.
    whole = [(name, axis) for name, axis in experiment.rules if name != "batch"]
    with jax.set_mesh(program.mesh), nn.logical_axis_rules(whole):
        tokens = write(program.evaluated(state), state.collections, prompt[None], key)
    tokens = np.asarray(tokens)[0, -sample.length :]
    ends = np.flatnonzero(tokens == tokenizer.separator)
    return tokenizer.decode(tokens[: ends[0]] if ends.size else tokens)
