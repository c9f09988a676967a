"""The perceptron on scikit-learn's handwritten digits with a tenth of its links, which move while it learns.

odjax train configs/mlp_digits_sparse.py
"""

import jax
import jax.numpy as jnp
import optax

from odjax.models import MLP
from odjax.sparse import set_, uniform
from odjax_train import Experiment, classification
from odjax_train.data import Images


def experiment(
    steps: int = 1200,
    batch: int = 64,
    width: int = 128,
    learning_rate: float = 1e-3,
    sparsity: float = 0.9,
    interval: int = 25,
    seed: int = 0,
) -> Experiment:
    """The perceptron on scikit-learn's handwritten digits with a tenth of its links, which move.

    Args:
        steps: optimizer steps.
        batch: images in a step.
        width: hidden units in a layer.
        learning_rate: of Adam.
        sparsity: share of the links that are not there, in all layers but the last.
        interval: steps between two changes of links.
        seed: of everything random.
    """
    model = MLP(features=(width, width, 10))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    plan = uniform(params, sparsity, where="dense_[01]/kernel")
    key, end = jax.random.key(seed), steps * 3 // 4
    return Experiment(
        model=model,
        task=classification(),
        data=Images(source="digits"),
        optimizer=set_(optax.adam(learning_rate), plan, key=key, interval=interval, end=end),
        steps=steps,
        batch=batch,
        seed=seed,
    )
