"""A byte-level language model whose output vectors are fixed, against one that learns them.

A decoder is trained on tiny-shakespeare (`tinyshakespeare.txt` in the folder of the environment variable
ODJAX_DATA_DIR; its last tenth is held out) with a learned head, and in its place with a Hadamard code, with
random unit vectors, and with a Hadamard code and a trained bias, one number a byte: the same weights at the
start, the same batches, the same optimizer. The quick version takes the topics of the Python language
reference instead.

The text has 65 of the 256 bytes. A learned head gives all others one direction; a block of the Hadamard code
is an orthonormal basis, so that the squares of its logits add up to those of the features (times the scale
squared) whether its bytes ever occur or not. What is lost to them is therefore measured apart; a bias can
lower them all.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core import fold_path
from odjax.heads import FixedHead
from odjax.models import Decoder
from odjax_train.data.sources import open_source
from odjax_train.errors import UserError
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof

VOCAB = 256
BIASED = "Hadamard + bias"
HEADS: dict[str, dict[str, Any] | None] = {  # name -> settings of the fixed head
    "learned": None,
    "Hadamard": {"kind": "hadamard"},
    "sphere": {"kind": "sphere"},
    BIASED: {"kind": "hadamard", "bias": True},
}
SEEDS = 2
CLOSE = 0.05  # nats per byte
RARE = 1e-3  # of the bytes of the training text


class Recipe(NamedTuple):
    """What is trained, and how.

    Attributes:
        width: d of the features, a power of two.
        layers: of the decoder.
        length: bytes in a sequence.
        batch: sequences in a step.
        steps: in all.
        warmup: steps until the learning rate is highest.
        rate: the highest learning rate, of all heads.
        interval: steps between two reports.
        scale: of the logits of the fixed heads, whose features keep their length.
        heads: keys of `HEADS`, "learned" and `BIASED` among them.
    """

    width: int
    layers: int
    length: int
    batch: int
    steps: int
    warmup: int
    rate: float
    interval: int
    scale: float
    heads: tuple[str, ...]


# After 300 steps of 32 sequences with another seed, at width 64: scales 1, 2 and 4 lose 2.73, 2.41 and 2.31
# nats at rate 3e-3, scales 4 and 8 both 2.18 at 1e-2; the learned head 2.10 and 2.01 at these rates.
FULL = (
    Recipe(64, 2, 128, 16, 600, 60, 1e-2, 50, 4.0, tuple(HEADS)),
    Recipe(128, 2, 128, 16, 600, 60, 1e-2, 50, 4.0, ("learned", "Hadamard", BIASED)),
)
QUICK = Recipe(32, 1, 32, 16, 240, 20, 1e-2, 80, 4.0, ("learned", BIASED))


class Corpus(NamedTuple):
    """Bytes to learn from and bytes to be judged on, uint8 [n]."""

    train: np.ndarray
    held: np.ndarray

    @property
    def frequencies(self) -> np.ndarray:
        """Of every byte in the training text, [256], summing to 1."""
        return np.bincount(self.train, minlength=VOCAB) / len(self.train)

    @property
    def unigram(self) -> float:
        """Nats per held-out byte of a model that knows the frequencies alone, one added to every count."""
        counts = np.bincount(self.train, minlength=VOCAB) + 1
        return float(-np.mean(np.log(counts / counts.sum())[self.held]))


class Judged(NamedTuple):
    """Of the held-out text, in nats per byte.

    Attributes:
        loss: mean cross-entropy.
        absent: the part of it that is lost to bytes the training text never has: -log(1 - their probability).
        rare: mean cross-entropy of the bytes that are rare in the training text.
    """

    loss: float
    absent: float
    rare: float

    @property
    def among(self) -> float:
        """Mean cross-entropy when the bytes that the training text never has are no choice."""
        return self.loss - self.absent


class Fitted(NamedTuple):
    """What training with one head led to.

    Attributes:
        losses: of training, one a step.
        judged: on the held-out text.
    """

    losses: np.ndarray
    judged: Judged


def halves(text: bytes) -> Corpus:
    """A text without its last tenth, and the last tenth."""
    data = np.frombuffer(text, np.uint8)
    cut = len(data) * 9 // 10
    return Corpus(data[:cut], data[cut:])


def shakespeare(path: Path) -> Corpus:
    """Tiny-shakespeare.

    Args:
        path: of the text.

    Raises:
        UserError: the file is missing.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: put tiny-shakespeare there and set ODJAX_DATA_DIR to its folder")
    return halves(path.read_bytes())


def reference(size: int) -> Corpus:
    """The first bytes of the topics of the Python language reference, which come with Python.

    Args:
        size: how many bytes.
    """
    topics = open_source("pydoc", "all")
    return halves(b"\n".join(topics[i]["text"] for i in range(len(topics)))[:size])


def model_of(recipe: Recipe, name: str) -> Decoder:
    """The decoder of a recipe, with one of the heads.

    Args:
        recipe: its sizes.
        name: a key of `HEADS`.
    """
    settings, head = HEADS[name], None
    if settings is not None:
        head = FixedHead(VOCAB, norm="none", scale=recipe.scale, stored=False, **settings)
    return Decoder(
        vocab=VOCAB,
        layers=recipe.layers,
        width=recipe.width,
        heads=max(1, recipe.width // 32),
        mlp_width=8 * recipe.width // 3,
        max_length=recipe.length,
        head=head,
        attention="xla",
        scan=False,
    )


def start(model: Decoder, key: jax.Array) -> Any:
    """The parameters at the start; those below the head are the same for all heads."""
    example = jnp.zeros((1, 4), jnp.int32)
    return nn.unbox(jax.jit(model.init)(fold_path(key, "init"), example))["params"]


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine decay."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, recipe.rate, recipe.warmup, recipe.steps, end_value=0.1 * recipe.rate
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.1))


def sizes(recipe: Recipe, name: str) -> tuple[int, int]:
    """Of what is trained with a head: how many numbers, and the bytes of the optimizer's state."""
    params = jax.eval_shape(partial(start, model_of(recipe, name)), jax.random.key(0))
    state = jax.tree.leaves(jax.eval_shape(optimizer(recipe).init, params))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return count, sum(leaf.size * leaf.dtype.itemsize for leaf in state)


def loss_of(model: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of int32 [B, T + 1] tokens, each but the first from those before it."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if model.head is not None:
        losses = model.apply({"params": params}, (inputs,), targets, method="losses", train=True)[0]
    else:
        logits = model.apply({"params": params}, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses)


def judge(model: Decoder, params: Any, corpus: Corpus, length: int) -> Judged:
    """Measures a model on the held-out text, cut into sequences.

    Args:
        model: the decoder.
        params: its parameters.
        corpus: training text, for what is rare in it, and held-out text.
        length: bytes in a sequence; the first of each and the last sequences, at most 15, are not judged.

    Returns:
        Means over the bytes.
    """
    size = 16 * (length + 1)
    parts = corpus.held[: len(corpus.held) // size * size].reshape(16, -1, length + 1)
    absent = jnp.asarray(corpus.frequencies == 0)

    @jax.jit
    def measure(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        present = jnp.where(absent[None, None], -jnp.inf, logits)
        lost = jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(present, axis=-1)
        return losses, lost

    found = [measure(jnp.asarray(part, jnp.int32)) for part in parts]
    losses, lost = (np.stack(values).astype(np.float64) for values in zip(*found, strict=True))
    rare = (corpus.frequencies < RARE)[parts[..., 1:]]
    return Judged(float(losses.mean()), float(lost.mean()), float(losses[rare].mean()))


def trainer(
    model: Decoder, corpus: Corpus, recipe: Recipe, say: Callable[[str], None]
) -> Callable[[jax.Array], Fitted]:
    """Training with one head, compiled once for all seeds.

    Args:
        model: the decoder.
        corpus: to learn from and to be judged on.
        recipe: sizes, steps and rates.
        say: told the loss now and then.

    Returns:
        key -> what it led to. The key gives the weights and the order, whatever the head.
    """
    text, update = jnp.asarray(corpus.train), optimizer(recipe)
    window = jnp.arange(recipe.length + 1, dtype=jnp.int32)

    def step(carry: tuple[Any, Any], first: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        tokens = text[first[:, None] + window[None]].astype(jnp.int32)
        value, gradient = jax.value_and_grad(partial(loss_of, model))(params, tokens)
        with jax.numpy_dtype_promotion("standard"):
            change, state = update.update(gradient, state, params)
        return (optax.apply_updates(params, change), state), value

    run = jax.jit(partial(jax.lax.scan, step), donate_argnums=0)

    @jax.jit
    def begin(key: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params = start(model, key)
        shape = (recipe.steps // recipe.interval, recipe.interval, recipe.batch)
        order = jax.random.randint(fold_path(key, "order"), shape, 0, len(corpus.train) - recipe.length)
        return (params, update.init(params)), order

    def fit(key: jax.Array) -> Fitted:
        (carry, order), losses = begin(key), []
        for part in order:
            carry, values = run(carry, part)
            losses.append(np.asarray(values))
            say(f"step {recipe.interval * len(losses)} of {recipe.steps}, loss {losses[-1].mean():.3f}")
        judged = judge(model, carry[0], corpus, recipe.length)
        say(f"held out: {judged}")
        return Fitted(np.concatenate(losses), judged)

    return fit


def compare(
    recipe: Recipe, corpus: Corpus, seeds: range, say: Callable[[str], None]
) -> dict[str, tuple[Fitted, ...]]:
    """Trains with every head of a recipe.

    Args:
        recipe: sizes, steps and rates.
        corpus: to learn from and to be judged on.
        seeds: of weights and order.
        say: told the loss now and then.

    Returns:
        Head -> one outcome a seed.
    """
    fits = {}
    for name in recipe.heads:

        def tell(text: str, name: str = name) -> None:
            say(f"width {recipe.width}, {name}: {text}")

        fit = trainer(model_of(recipe, name), corpus, recipe, tell)
        fits[name] = tuple(fit(jax.random.key(seed)) for seed in seeds)
    return fits


def _shown(fits: dict[str, tuple[Fitted, ...]], field: str, digits: int = 3) -> str:
    def values(several: tuple[Fitted, ...]) -> str:
        return " ".join(f"{getattr(found.judged, field):.{digits}f}" for found in several)

    return ", ".join(f"{name} {values(several)}" for name, several in fits.items())


def _sizes(recipe: Recipe) -> Claim:
    found = {name: sizes(recipe, name) for name in dict.fromkeys([*recipe.heads, "Hadamard"])}
    # AdamW keeps two moments of 4 bytes of every parameter.
    saved = {name: VOCAB * (recipe.width - (name == BIASED)) for name in found if name != "learned"}
    plain, biased, learned = saved["Hadamard"], saved[BIASED], found["learned"]
    return Claim(
        "A fixed head has no parameters and no optimizer state, with a bias K parameters and their state "
        f"(d = {recipe.width}).",
        f"K d = {plain:,} parameters and 2 K d 4 = {8 * plain:,} bytes of AdamW less; with a bias "
        f"K (d - 1) = {biased:,} and 2 K (d - 1) 4 = {8 * biased:,}",
        "parameters and bytes: "
        + ", ".join(f"{name} {params:,} and {state:,}" for name, (params, state) in found.items()),
        all(found[name] == (learned[0] - n, learned[1] - 8 * n) for name, n in saved.items()),
    )


def _learns(recipe: Recipe, fits: dict[str, tuple[Fitted, ...]], corpus: Corpus) -> Claim:
    worst = max(found.judged.loss for several in fits.values() for found in several)
    return Claim(
        f"With every head the model learns more than how frequent bytes are (d = {recipe.width}).",
        f"held-out loss below that of the frequencies, {corpus.unigram:.3f} nats per byte",
        _shown(fits, "loss"),
        worst < corpus.unigram,
    )


def _quality(recipe: Recipe, fits: dict[str, tuple[Fitted, ...]]) -> list[Claim]:
    def above(mine: str, other: str, field: str) -> tuple[str, float]:
        """By how much a head loses more than another one, of every seed and at most."""
        pairs = zip(fits[mine], fits[other], strict=True)
        gaps = [getattr(a.judged, field) - getattr(b.judged, field) for a, b in pairs]
        return " ".join(f"{gap:+.3f}" for gap in gaps), max(gaps)

    def claim(statement: str, expected: str, found: tuple[str, float], most: float, note: str = "") -> Claim:
        return Claim(f"{statement} (d = {recipe.width}).", expected, found[0] + note, found[1] <= most)

    alike = "fixed Hadamard head predicts as well as a learned one"
    limit = f"at most {CLOSE} nats per held-out byte more,"
    each, among = f"with each of {SEEDS} seeds", "without what is lost to bytes that never occur"
    plain, biased = above("Hadamard", "learned", "loss"), above(BIASED, "learned", "loss")
    shown = f" ({_shown(fits, 'loss')}; bytes rarer than {RARE:g}: {_shown(fits, 'rare', 2)})"
    lost = f" (lost to the others: {_shown(fits, 'absent')})"
    rest = f" ({among}: {above(BIASED, 'learned', 'among')[0]})"
    present = "It does so among the bytes that occur at all"
    claims = [
        claim(f"A {alike}", f"{limit} {each}", plain, CLOSE, shown),
        claim(present, f"{limit} {among}", above("Hadamard", "learned", "among"), CLOSE, lost),
        claim(f"With a bias a class a {alike}", f"{limit} {each}", biased, CLOSE, rest),
    ]
    if "sphere" in fits:
        statement = "Hadamard bases are at least as good as random unit vectors"
        expected = f"Hadamard - sphere at most 0 nats per held-out byte, {each}"
        claims.append(claim(statement, expected, above("Hadamard", "sphere", "loss"), 0))
    return claims


def _draw(axes: Any, found: dict[Recipe, dict[str, tuple[Fitted, ...]]]) -> None:
    colors = {name: f"C{i}" for i, name in enumerate(HEADS)}
    for (recipe, fits), line in zip(found.items(), ("-", "--"), strict=True):
        steps = 25 * (1 + np.arange(recipe.steps // 25))
        for name, several in fits.items():
            smooth = np.mean([one.losses.reshape(-1, 25).mean(axis=1) for one in several], axis=0)
            text = f"{name}, d = {recipe.width}: {np.mean([one.judged.loss for one in several]):.3f} held out"
            axes.plot(steps, smooth, line, color=colors[name], label=text)
    axes.set(xlabel="step", ylabel="training loss (nats per byte)", title="tiny-shakespeare, K = 256 bytes")
    axes.set_ylim(top=4)
    axes.legend()


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures the held-out loss, the parameters and the optimizer's bytes with each head.

    Args:
        folder: where the plot is written, and a line for every 50 steps into `etf_head_lm.log`.
        quick: a small model of the Python language reference, which nobody judges by its loss.
        seed: the first of the weights and the order.

    Returns:
        The claims, as they come out.

    Raises:
        UserError: tiny-shakespeare is missing.
    """
    if quick:
        corpus = reference(200_000)
        fits = compare(QUICK, corpus, range(seed, seed + 1), lambda text: None)
        return Proof("etf-head-lm", (_sizes(QUICK), _learns(QUICK, fits, corpus)), quick)
    corpus = shakespeare(Path(os.environ.get("ODJAX_DATA_DIR", ".")) / "tinyshakespeare.txt")

    def say(text: str) -> None:
        with (folder / "etf_head_lm.log").open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    claims, found = [], {}
    for recipe in FULL:
        fits = compare(recipe, corpus, range(seed, seed + SEEDS), say)
        found[recipe] = fits
        claims += [*_quality(recipe, fits), _sizes(recipe)]
    name = save_figure(folder / "etf_head_lm.svg", partial(_draw, found=found), (7, 4.5))
    return Proof("etf-head-lm", tuple(claims), quick, (name,))
