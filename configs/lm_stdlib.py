"""A byte-level language model of the Python standard library's source text.

    odjax train configs/lm_stdlib.py

The main job: real text on every machine, no download.
"""

import optax

from odjax.models import decoder
from odjax_train import Experiment, Sample, language_model
from odjax_train.data import Text


def experiment(
    steps: int = 260,
    batch: int = 32,
    length: int = 128,
    preset: str = "byte-small",
    learning_rate: float = 3e-3,
    warmup: int = 40,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    accumulate: int = 1,
    ema: float | None = None,
    source: str = "stdlib",
    dtype: str = "float32",
    attention: str | None = "blocked",
    scan: bool = False,
    seed: int = 0,
) -> Experiment:
    """A byte-level language model of the Python standard library's source text.

    Args:
        steps: optimizer steps.
        batch: sequences in a step.
        length: bytes in a sequence.
        preset: size of the decoder.
        learning_rate: highest, after the warm-up.
        warmup: steps over which the learning rate rises.
        weight_decay: of AdamW.
        clip: largest norm of a gradient.
        accumulate: microbatches a step.
        ema: decay of an average of the parameters.
        source: the text, `stdlib`, `text:<file or glob>` or `arrayrecord:<glob>`.
        dtype: of the computation; bfloat16 on accelerators.
        attention: how it is computed: `blocked` is fastest on CPUs; `xla`, `cudnn` or None on accelerators.
        scan: scan the layers (faster to compile) instead of unrolling them (faster on CPUs).
        seed: of everything random.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warmup, steps // 2), max(steps, 1), end_value=0.1 * learning_rate
    )
    return Experiment(
        model=decoder(preset, max_length=max(length, 512), dtype=dtype, attention=attention, scan=scan),
        task=language_model(),
        data=Text(source=source, length=length),
        optimizer=optax.chain(
            optax.clip_by_global_norm(clip), optax.adamw(schedule, b2=0.98, weight_decay=weight_decay)
        ),
        schedule=schedule,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        ema=ema,
        seed=seed,
        eval_every=100,
        eval_batches=16,
        checkpoint_every=100,
        sample=Sample("def read(", length=300),
    )
