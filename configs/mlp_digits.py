"""A perceptron with two hidden layers on scikit-learn's handwritten digits: the smallest run there is.

odjax train configs/mlp_digits.py
"""

import optax

from odjax.models import MLP
from odjax_train import Experiment, classification
from odjax_train.data import Images


def experiment(
    steps: int = 300,
    batch: int = 64,
    width: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Experiment:
    """A perceptron with two hidden layers on scikit-learn's handwritten digits.

    Args:
        steps: optimizer steps.
        batch: images in a step.
        width: hidden units in a layer.
        learning_rate: of Adam.
        seed: of everything random.
    """
    return Experiment(
        model=MLP(features=(width, width, 10)),
        task=classification(),
        data=Images(source="digits"),
        optimizer=optax.adam(learning_rate),
        steps=steps,
        batch=batch,
        seed=seed,
    )
