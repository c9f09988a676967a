"""Tasks: how a model is called on a batch, and what is summed over it.

A task returns sums and counts, never means: they add up over microbatches, devices, hosts and evaluation
batches, and the mean that comes out at the end is the one over all of them.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from odjax.lowrank import Adapted, PositiveWeights, guard_loss

Batch = Mapping[str, jax.Array]
Variables = Mapping[str, Any]


class Mean(NamedTuple):
    """A mean that is not divided yet: `total / count`."""

    total: jax.Array
    count: jax.Array


Sums = dict[str, Mean]
Loss = Callable[[nn.Module, Variables, Batch, jax.Array | None], tuple[Sums, Variables]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What training a model on a data set means.

    Args:
        name: shown in logs and reports.
        unit: what is counted for the throughput, `"tokens"` or `"images"`.
        units: number of units in a batch, from its shapes.
        inputs: batch -> the model's positional arguments, for `model.init`.
        loss: `(model, variables, batch, key) -> (sums, new collections)`; `key` is None in evaluation.
            `sums["loss"]` is what is minimised.
        best: the metric that decides which checkpoints are the best, and whether `"min"` or `"max"` is
            better.
    """

    name: str
    unit: str
    units: Callable[[Batch], int]
    inputs: Callable[[Batch], tuple[jax.Array, ...]]
    loss: Loss
    best: tuple[str, str] = ("loss", "min")


def _apply(
    model: nn.Module,
    variables: Variables,
    key: jax.Array | None,
    *inputs: Any,
    method: str = "__call__",
) -> tuple[Any, Variables]:
    """Applies the model; in training with dropout keys and mutable collections."""
    train = {"train": key is not None} if _takes_train(model, method) else {}
    if key is None:
        return model.apply(variables, *inputs, method=method, **train), {}
    mutable = [name for name in variables if name != "params"]
    rngs = {"dropout": key}
    out, changed = model.apply(variables, *inputs, rngs=rngs, mutable=mutable, method=method, **train)
    return out, changed


def _takes_train(model: nn.Module, method: str) -> bool:
    model = model.inner if isinstance(model, Adapted) else model
    return "train" in inspect.signature(getattr(type(model), method)).parameters


def _head_sums(
    model: nn.Module,
    variables: Variables,
    key: jax.Array | None,
    inputs: tuple[jax.Array, ...],
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[Sums, Variables]:
    """Loss and accuracy as the model's `losses` give them."""
    (loss, right), changed = _apply(model, variables, key, inputs, targets, weights, method="losses")
    return {"loss": _weighted(loss, weights), "accuracy": _weighted(right, weights)}, changed


def _weighted(values: jax.Array, weights: jax.Array) -> Mean:
    weights = weights.astype(jnp.float32)
    return Mean(jnp.sum(values.astype(jnp.float32) * weights), jnp.sum(weights))


def _token_sums(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, train: bool, smoothing: float, z_loss: float
) -> Sums:
    """Cross-entropy (nats) and accuracy of `logits [..., K]` for `targets [...]`, with `weights [...]`."""
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = normalizer - target_logits
    if train and smoothing:
        uniform = normalizer - jnp.mean(logits, axis=-1)
        loss = (1.0 - smoothing) * loss + smoothing * uniform
    if train and z_loss:
        loss = loss + z_loss * jnp.square(normalizer)
    right = jnp.argmax(logits, axis=-1) == targets
    return {"loss": _weighted(loss, weights), "accuracy": _weighted(right, weights)}


def language_model(*, z_loss: float = 0.0, head_losses: bool = False) -> Task:
    """Next-token prediction on packed sequences.

    Batches hold `tokens`, `targets`, `segments`, `positions [B, T]` int32 and `weights [B, T]` float32; the
    model is called as `model(tokens, segments=..., positions=...)` and returns logits `[B, T, vocab]`.

    Args:
        z_loss: weight of the squared log-normalizer that keeps logits from drifting (Chowdhery et al. 2022,
            section 5), in training only.
        head_losses: take the losses from the model's own `losses` (`odjax.heads.FixedHead` needs no logits
            for them), not from its logits.
    """
    if z_loss and head_losses:
        raise ValueError(f"z_loss {z_loss} needs the logits: give head_losses=False")

    def loss(
        model: nn.Module, variables: Variables, batch: Batch, key: jax.Array | None
    ) -> tuple[Sums, Variables]:
        if head_losses:
            inputs = (batch["tokens"], batch["segments"], batch["positions"])
            return _head_sums(model, variables, key, inputs, batch["targets"], batch["weights"])
        logits, changed = _apply(
            model, variables, key, batch["tokens"], batch["segments"], batch["positions"]
        )
        train = key is not None
        return _token_sums(logits, batch["targets"], batch["weights"], train, 0.0, z_loss), changed

    return Task(
        name="language model",
        unit="tokens",
        units=lambda batch: batch["tokens"].size,
        inputs=lambda batch: (batch["tokens"], batch["segments"], batch["positions"]),
        loss=loss,
    )


def classification(*, label_smoothing: float = 0.0, head_losses: bool = False) -> Task:
    """Image classification: `image [B, H, W, C]` float32, `label [B]` int32, `weight [B]` float32.

    Args:
        label_smoothing: mass taken from the right class and spread over all of them (Szegedy et al. 2016,
            section 7), in training only.
        head_losses: take the losses from the model's own `losses` (a dot regression of
            `odjax.heads.FixedHead`, say), not from its logits.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if label_smoothing and head_losses:
        raise ValueError(f"label_smoothing {label_smoothing} needs the logits: give head_losses=False")

    def loss(
        model: nn.Module, variables: Variables, batch: Batch, key: jax.Array | None
    ) -> tuple[Sums, Variables]:
        if head_losses:
            return _head_sums(model, variables, key, (batch["image"],), batch["label"], batch["weight"])
        logits, changed = _apply(model, variables, key, batch["image"])
        train = key is not None
        sums = _token_sums(logits, batch["label"], batch["weight"], train, label_smoothing, 0.0)
        return sums, changed

    return Task(
        name="classification",
        unit="images",
        units=lambda batch: batch["label"].size,
        inputs=lambda batch: (batch["image"],),
        loss=loss,
        best=("accuracy", "max"),
    )


def translation(*, label_smoothing: float = 0.1) -> Task:
    """Sequence to sequence: the next token of a translation, given its source.

    Batches hold `source [B, S]`, `tokens [B, T]`, `targets [B, T]` int32, `source_mask [B, S]` and
    `weights [B, T]` float32; the model is called as `model(source, tokens, source_mask)`.

    Args:
        label_smoothing: as in Vaswani et al. 2017, section 5.4; in training only.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")

    def loss(
        model: nn.Module, variables: Variables, batch: Batch, key: jax.Array | None
    ) -> tuple[Sums, Variables]:
        logits, changed = _apply(
            model, variables, key, batch["source"], batch["tokens"], batch["source_mask"]
        )
        train = key is not None
        return _token_sums(logits, batch["targets"], batch["weights"], train, label_smoothing, 0.0), changed

    return Task(
        name="translation",
        unit="tokens",
        units=lambda batch: batch["tokens"].size,
        inputs=lambda batch: (batch["source"], batch["tokens"], batch["source_mask"]),
        loss=loss,
    )


def moderation(*, weights: Callable[[], PositiveWeights] | None = None) -> Task:
    """Moderation of texts by an `odjax.lowrank.Guard`, with labels of harm that may be missing.

    Batches hold `tokens [B, T]` int32, `mask [B, T]` bool, `labels [B, C]` (1, 0, or -1 where it is not
    known) and `weight [B]` float32; the model is called as `model.guard(tokens, mask)`. A text is unsafe when
    a known label is 1; `unsafe_accuracy` is that of the sign of its logit.

    Args:
        weights: gives the weights of positives (`Moderation.weights`), asked for when the step is traced;
            None: ones.
    """

    def loss(
        model: nn.Module, variables: Variables, batch: Batch, key: jax.Array | None
    ) -> tuple[Sums, Variables]:
        verdict, changed = _apply(model, variables, key, batch["tokens"], batch["mask"], method="guard")
        positive, known = batch["labels"] == 1, batch["labels"] >= 0
        by_category, by_unsafe = (None, None) if weights is None else weights()
        each = guard_loss(
            *verdict, positive, pos_weight=by_category, unsafe_pos_weight=by_unsafe, label_mask=known
        )
        right = (verdict.unsafe >= 0) == jnp.any(positive, axis=1)
        counted = batch["weight"] * jnp.any(known, axis=1).astype(batch["weight"].dtype)
        sums = {"loss": _weighted(each, batch["weight"]), "unsafe_accuracy": _weighted(right, counted)}
        return sums, changed

    return Task(
        name="moderation",
        unit="tokens",
        units=lambda batch: batch["tokens"].size,
        inputs=lambda batch: (batch["tokens"],),
        loss=loss,
    )


def mean(sums: Mapping[str, Mean]) -> dict[str, jax.Array]:
    """Divides sums by counts; nothing counted gives 0."""
    return {name: s.total / jnp.maximum(s.count, 1e-9) for name, s in sums.items()}


def add(left: Sums, right: Sums) -> Sums:
    """Adds two sums, metric by metric."""
    return optax.tree.add(left, right)
