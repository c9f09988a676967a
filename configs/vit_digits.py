"""A small vision transformer on scikit-learn's handwritten digits.

odjax train configs/vit_digits.py
"""

import optax

from odjax.models import vit
from odjax_train import Experiment, classification
from odjax_train.data import Images


def experiment(
    steps: int = 400,
    batch: int = 64,
    learning_rate: float = 2e-3,
    warmup: int = 40,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.1,
    ema: float | None = None,
    seed: int = 0,
) -> Experiment:
    """A small vision transformer on scikit-learn's handwritten digits.

    Args:
        steps: optimizer steps.
        batch: images in a step.
        learning_rate: highest, after the warm-up.
        warmup: steps over which the learning rate rises.
        weight_decay: of AdamW.
        label_smoothing: mass taken from the right class.
        ema: decay of an average of the parameters.
        seed: of everything random.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warmup, steps // 2), max(steps, 1), end_value=0.01 * learning_rate
    )
    return Experiment(
        model=vit("tiny-digits", classes=10),
        task=classification(label_smoothing=label_smoothing),
        data=Images(source="digits"),
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay)
        ),
        schedule=schedule,
        steps=steps,
        batch=batch,
        ema=ema,
        seed=seed,
    )
