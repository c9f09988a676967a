"""A fixed simplex head on scikit-learn's handwritten digits, and neural collapse in the report.

odjax train configs/mlp_digits_etf.py
odjax train configs/mlp_digits_etf.py --head learned --run runs/mlp_digits_learned
odjax report runs/mlp_digits_etf runs/mlp_digits_learned
"""

from typing import Literal

import flax.linen as nn
import optax

from odjax.heads import Classifier, FixedHead
from odjax.models import MLP
from odjax_train import Experiment, classification, neural_collapse
from odjax_train.data import Images


def experiment(
    steps: int = 600,
    batch: int = 64,
    width: int = 128,
    dim: int = 64,
    head: Literal["dr", "ce", "learned"] = "dr",
    kind: str = "auto",
    rotate: bool = False,
    norm: Literal["l2", "bn+l2"] = "l2",
    probability: float | None = None,
    lengths: bool = False,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
) -> Experiment:
    """A fixed simplex head on scikit-learn's handwritten digits.

    Args:
        steps: optimizer steps.
        batch: images in a step.
        width: hidden units.
        dim: of the features that the head sees.
        head: dot regression or cross-entropy with a fixed head, or a learned head.
        kind: code of a fixed head, see `odjax.heads.ClassCode`.
        rotate: turn the code by a random rotation.
        norm: what makes features of length 1, with a BatchNorm before it or without.
        probability: the highest that cross-entropy can reach with the fixed head; None: 0.999.
        lengths: class vectors that make up for imbalanced labels.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        seed: of everything random.
    """
    classes = 10
    fixed = head != "learned"
    model = Classifier(
        MLP((width, width, dim)),
        FixedHead(
            classes, kind, rotate=rotate, probability=probability, loss=head, norm=norm, lengths=lengths
        )
        if fixed
        else nn.Dense(classes),
    )
    return Experiment(
        model=model,
        task=classification(head_losses=fixed),
        data=Images(source="digits"),
        optimizer=optax.adamw(learning_rate, weight_decay=weight_decay),
        measures=[neural_collapse(classes)],
        steps=steps,
        batch=batch,
        seed=seed,
    )
