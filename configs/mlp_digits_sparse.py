"""The perceptron on scikit-learn's handwritten digits with a tenth of its links, which move while it learns.

    odjax train configs/mlp_digits_sparse.py
    odjax train configs/mlp_digits_sparse.py --method rigl    # or dense, static, set, granet, cht, chtss

CHTs (Zhang et al., NeurIPS 2025, arXiv 2501.19107) by default; `odjax report` shows where the links went.
"""

import jax
import jax.numpy as jnp
import optax

from odjax.models import MLP
from odjax_train import Experiment, classification
from odjax_train.data import Images
from odjax_train.sparse import Method, Predictor, Topology, sparse_optimizer


def experiment(
    method: Method = "chts",
    steps: int = 1200,
    batch: int = 64,
    width: int = 128,
    learning_rate: float = 1e-3,
    sparsity: float = 0.9,
    interval: int = 25,
    zeta: float = 0.3,
    initial_topology: Topology | None = None,
    predictor: Predictor | None = None,
    temperature: tuple[float, float] = (1.0, 3.0),
    seed: int = 0,
) -> Experiment:
    """The perceptron on scikit-learn's handwritten digits with a tenth of its links, which move.

    Args:
        method: how links move; `dense` has all of them.
        steps: optimizer steps.
        batch: images in a step.
        width: hidden units in a layer.
        learning_rate: of Adam.
        sparsity: share of the links that are not there, in all layers but the last.
        interval: steps between two changes of links.
        zeta: share of the links that a change replaces at first.
        initial_topology: links at the start, see `odjax_train.sparse`.
        predictor: of new links; None: the method's.
        temperature: exponent of the soft removal at the start and at the end.
        seed: of everything random.
    """
    model = MLP(features=(width, width, 10))
    optimizer, edits = sparse_optimizer(
        method,
        optax.adam(learning_rate),
        model,
        [jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)],
        sparsity=sparsity,
        where="dense_[01]/kernel",
        end=steps * 3 // 4,
        interval=interval,
        zeta=zeta,
        topology=initial_topology,
        predictor=predictor,
        temperature=temperature,
        seed=seed,
    )
    return Experiment(
        model=model,
        task=classification(),
        data=Images(source="digits"),
        optimizer=optimizer,
        edits=edits,
        steps=steps,
        batch=batch,
        seed=seed,
    )
