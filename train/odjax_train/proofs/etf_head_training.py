"""Training one backbone below three heads, and how far its features collapse.

The backbone ends in a linear layer, so that its features have both signs and can reach the vertices of a
simplex. The heads are a trained linear layer, and a fixed simplex, turned at random, by cross-entropy or by
dot regression. Everything else is the same: initial values, batches, optimizer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core.class_moments import class_moments
from odjax.heads import Classifier, FixedHead
from odjax.heads.collapse import collapse_gram, collapse_metrics
from odjax.heads.losses import unit_features

Data = tuple[jax.Array, jax.Array]
LEARNABLE, CE, DR = "learnable", "ETF + CE", "ETF + DR"
HEADS = (LEARNABLE, CE, DR)


class Recipe(NamedTuple):
    """How a backbone is trained: AdamW with a cosine to zero, decay of every parameter that has two axes.

    Attributes:
        widths: of the backbone's dense layers, the last one that of the features.
        epochs: passes through the images.
        batch: images a step.
        rate: the first learning rate.
        decay: weight decay.
    """

    widths: tuple[int, ...] = (128, 64)
    epochs: int = 60
    batch: int = 100
    rate: float = 5e-3
    decay: float = 0.1


class Trained(NamedTuple):
    """What a training leaves, once a seed.

    Attributes:
        model: backbone and head.
        before: the variables at the start, every leaf [seeds, ...].
        variables: those at the end.
        head_bytes: of the parameters of one head.
        optimizer_bytes: of what the optimizer keeps for one head.
    """

    model: Classifier
    before: Any
    variables: Any
    head_bytes: int
    optimizer_bytes: int


class Backbone(nn.Module):
    """Dense layers with BatchNorm and ReLU between them; nothing after the last one.

    Attributes:
        widths: of the layers.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `x` [n, pixels] to features [n, widths[-1]]."""
        for width in self.widths[:-1]:
            x = nn.Dense(width, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.widths[-1])(x)


def model_of(head: str, num_classes: int, widths: tuple[int, ...]) -> Classifier:
    """Backbone and head.

    Args:
        head: one of HEADS.
        num_classes: K.
        widths: of the backbone.

    Returns:
        The model.
    """
    heads = {
        LEARNABLE: nn.Dense(num_classes),
        CE: FixedHead(num_classes, "simplex", rotate=True, scale=16.0),
        DR: FixedHead(num_classes, "simplex", rotate=True, loss="dr"),
    }
    return Classifier(Backbone(widths), heads[head])


def _bytes_of_head(tree: Any) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(
        leaf.size * leaf.dtype.itemsize for path, leaf in leaves if "'head'" in jax.tree_util.keystr(path)
    )


def train(head: str, data: Data, num_classes: int, recipe: Recipe, seeds: int, seed: int) -> Trained:
    """Trains a model of several seeds side by side.

    Args:
        head: one of HEADS.
        data: images [n, pixels] and labels [n].
        num_classes: K.
        recipe: of the training.
        seeds: how many.
        seed: of initial values and batches; all heads get the same ones.

    Returns:
        The models.
    """
    (x, y), model = data, model_of(head, num_classes, recipe.widths)
    steps = x.shape[0] // recipe.batch
    schedule = optax.cosine_decay_schedule(recipe.rate, recipe.epochs * steps)
    optimizer = optax.adamw(
        schedule,
        weight_decay=recipe.decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )

    def start(key: jax.Array) -> tuple[Any, Any]:
        variables = nn.unbox(model.init(key, x[:2]))
        return variables, optimizer.init(variables["params"])

    def loss(params: Any, rest: Any, rows: jax.Array) -> tuple[jax.Array, Any]:
        found, updated = model.apply(
            {**rest, "params": params},
            (x[rows],),
            y[rows],
            train=True,
            method="losses",
            mutable=["batch_stats"],
        )
        return jnp.mean(found.loss), updated

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        variables, state = carry
        params = variables["params"]
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        gradient, updated = jax.grad(loss, has_aux=True)(params, rest, rows)
        updates, state = optimizer.update(gradient, state, params)
        return ({**rest, **updated, "params": optax.apply_updates(params, updates)}, state), None

    def epoch(carry: Any, key: jax.Array) -> tuple[Any, None]:
        rows = jax.random.permutation(key, x.shape[0])[: steps * recipe.batch]
        return jax.lax.scan(step, carry, jnp.reshape(rows, (steps, recipe.batch)))

    @jax.jit
    @jax.vmap
    def run(key: jax.Array) -> tuple[Any, Any]:
        carry = start(key)
        keys = jax.random.split(jax.random.fold_in(key, 1), recipe.epochs)
        return carry[0], jax.lax.scan(epoch, carry, keys)[0][0]

    keys = jax.random.split(jax.random.key(seed), seeds)
    with jax.numpy_dtype_promotion("standard"):
        before, after = run(keys)
        variables, state = jax.eval_shape(start, keys[0])
    return Trained(model, before, after, _bytes_of_head(variables["params"]), _bytes_of_head(state))


def features(model: Classifier, variables: Any, x: jax.Array) -> jax.Array:
    """What the backbone gives, before any normalization.

    Args:
        model: backbone and head.
        variables: every leaf [seeds, ...].
        x: images [n, pixels].

    Returns:
        [seeds, n, d].
    """
    return jax.jit(jax.vmap(lambda v: model.apply(v, x, method="features")))(variables)


def accuracy(trained: Trained, data: Data) -> np.ndarray:
    """Per cent of the images named rightly, [seeds]."""
    x, y = data
    logits = jax.jit(jax.vmap(lambda v: trained.model.apply(v, x)))(trained.variables)
    return 100 * np.mean(np.asarray(logits.argmax(-1)) == np.asarray(y)[None], axis=1)


def class_vectors(model: Classifier, variables: Any) -> jax.Array:
    """The columns that features are compared with, [seeds, d, K]."""
    if isinstance(model.head, FixedHead):
        return variables["constants"]["head"]["code"]
    return variables["params"]["head"]["kernel"]


def collapse(trained: Trained, data: Data, *, normalized: bool) -> dict[str, np.ndarray]:
    """The statistics of neural collapse of a set of images.

    Args:
        trained: the models.
        data: images and labels.
        normalized: whether the features are brought to length 1 first, as a fixed head does itself.

    Returns:
        Name of the metric -> [seeds].
    """
    x, y = data
    h = features(trained.model, trained.variables, x)
    vectors = class_vectors(trained.model, trained.variables)

    @jax.jit
    @jax.vmap
    def metrics(h: jax.Array, vectors: jax.Array) -> dict[str, jax.Array]:
        h = unit_features(h) if normalized else h
        first = class_moments(vectors.shape[1], h.shape[1])
        moments = first.result(first.observe(first.zero(), h, y))
        second = collapse_gram(moments.mean, classifier=vectors)
        gram = second.result(second.observe(second.zero(), h, y))
        return collapse_metrics(moments, gram, vectors)

    return {name: np.asarray(value, np.float64) for name, value in metrics(h, vectors).items()}
