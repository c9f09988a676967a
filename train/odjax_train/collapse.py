"""Neural collapse while a classifier trains: NC1 to NC4 and their kin, as a measure of a run."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from odjax.core import Statistic, class_moments
from odjax.heads import Classifier, FixedHead, collapse_gram, collapse_metrics, margin_metrics
from odjax.lowrank import Adapted
from odjax_train.errors import UserError
from odjax_train.measures import Found, Measure, Pass
from odjax_train.tasks import Batch, Variables

Linear = tuple[jax.Array, jax.Array | None]


def neural_collapse(
    num_classes: int,
    *,
    on: Literal["train", "held-out"] = "train",
    batches: int = 16,
    features: Callable[[nn.Module, Variables, jax.Array], jax.Array] | None = None,
    classifier: Callable[[nn.Module, Variables, int], Linear] | None = None,
) -> Measure:
    """Statistics of neural collapse (`odjax.heads.collapse_metrics`) of an image classifier.

    Two passes over the same examples: class means, then what is around them.

    Args:
        num_classes: K.
        on: "train": the first batches of the training order; "held-out": the held-out examples.
        batches: at most as many.
        features: `(model, variables, images) -> [B, d]`, what the classifier sees; None: known for
            `odjax.heads.Classifier` and for models with `features`, `pooled` and `head` (ViT, ResNet).
        classifier: `(model, variables, d) -> (W [d, K], b [K] or None)`; None: known for the same models.

    Returns:
        The measure, with the figures nc1, nc2, nc3, nc4, within_between, cdnv, equinorm, cosine_spread,
        cosine_excess and self_duality. With more classes than d + 1, where no simplex fits, also min_margin,
        mean_margin and log_distance_variance of the directions of the classifier's vectors.

    Source: Papyan, Han and Donoho 2020, "Prevalence of neural collapse during the terminal phase of deep
    learning training".
    """
    features = features or _features
    classifier = classifier or _classifier

    def look(model: nn.Module, variables: Variables, batch: Batch) -> tuple[jax.Array, ...]:
        return features(model, variables, batch["image"]), batch["label"], batch["weight"]

    def means(model: nn.Module, variables: Variables, found: Found, looked: Any) -> Statistic:
        return class_moments(num_classes, looked[0].shape[-1])

    def around(model: nn.Module, variables: Variables, found: Found, looked: Any) -> Statistic:
        (moments,) = found
        weights, bias = classifier(model, variables, looked[0].shape[-1])
        return collapse_gram(moments.mean, moments.count > 0, classifier=weights, bias=bias)

    def figures(model: nn.Module, variables: Variables, found: Found) -> dict[str, jax.Array]:
        moments, gram = found
        weights, _ = classifier(model, variables, moments.mean.shape[1])
        values = collapse_metrics(moments, gram, weights)
        if num_classes > moments.mean.shape[1] + 1:
            values |= margin_metrics(weights / jnp.linalg.norm(weights, axis=0, keepdims=True))
        return values

    return Measure("collapse", (Pass(means, look), Pass(around, look)), figures, on=on, batches=batches)


def _features(model: nn.Module, variables: Variables, images: jax.Array) -> jax.Array:
    if isinstance(_bare(model), Classifier):
        return model.apply(variables, images, method="seen")
    if hasattr(model, "pooled") and hasattr(model, "features"):
        return model.apply(variables, images, method=lambda m, x: m.pooled(m.features(x)))
    raise UserError(
        f"neural_collapse does not know what the classifier of a {type(model).__name__} sees: use "
        "Classifier(backbone, head), or give features= and classifier="
    )


def _bare(model: nn.Module) -> nn.Module:
    return model.inner if isinstance(model, Adapted) else model


def _classifier(model: nn.Module, variables: Variables, dim: int) -> Linear:
    bare = _bare(model)
    if isinstance(bare, Classifier) and isinstance(bare.head, FixedHead):
        matrix = bare.apply(variables, dim, method=lambda m, d: m.head.matrix(d))
        compared = bare.head.eval_classes or bare.head.num_classes
        bias = variables["params"]["head"]["bias"][:compared] if bare.head.bias else None
        return bare.head.inverse_temperature() * matrix[:, :compared], bias
    head = variables["params"].get("head", {})
    if "kernel" not in head:
        raise UserError("neural_collapse finds no head/kernel among the parameters: give classifier=")
    return head["kernel"], head.get("bias")
