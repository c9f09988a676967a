"""Translation with a tenth of the links: Cannistraci-Hebb training beside SET, RigL, GraNet and all links.

Multi30k German to English (`multi30k/train.de.gz`, `train.en.gz` and `test_2016_flickr` in the folder of the
environment variable ODJAX_DATA_DIR). The recipe is the paper's (arXiv 2501.19107, table of hyper-parameters)
on a size for two cores: a width of 128, 2 + 2 layers and 1,500 steps of 64 pairs, where its own are 512,
6 + 6 and 5,000. All kernels but the embeddings are sparse. BLEU is that of the last parameters on the 1,000
sentences of test 2016, beam 2. What is claimed is what the paper's table of Multi30k at 90 % sparsity says;
its BLEU stands beside each claim.

The quick version translates made-up sentences and checks what does not depend on the data.
"""

import gzip
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core import fold_path, leaves_with_paths
from odjax.models import EncoderDecoder, encoder_decoder
from odjax.sparse import (
    DstState,
    brf_mask,
    chts,
    chtss,
    drawn,
    granet,
    rigl,
    set_,
    uniform,
    unpack,
    wiring_of,
)
from odjax.sparse.schedules import rewarm
from odjax_train.data import BpeTokenizer, Pairs
from odjax_train.data.pairs import read_lines
from odjax_train.errors import UserError
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof
from odjax_train.schedules import noam
from odjax_train.tasks import translation
from odjax_train.translations import bleu, bleu_difference, translator

SPARSITY, ZETA = 0.9, 0.3
PAPER = {"dense": 31.38, "SET": 29.73, "RigL": 30.26, "CHTs": 29.81, "GraNet": 31.62, "CHTss": 32.86}


class Recipe(NamedTuple):
    """How long is trained, and how.

    Attributes:
        preset: size of the model.
        layers: of each of its stacks.
        where: what is sparse.
        vocab: of the joint byte-pair encoding.
        length: tokens on each side.
        batch: pairs in a step.
        steps: in all.
        interval: steps between two changes of links.
        factor: of the learning rate.
        warmup: steps until the learning rate is highest.
        rewarm: steps over which it rises again after each change.
    """

    preset: str
    layers: int
    where: str
    vocab: int
    length: int
    batch: int
    steps: int
    interval: int
    factor: float
    warmup: int
    rewarm: int

    @property
    def end(self) -> int:
        """The last change of links: three quarters of the training."""
        return self.steps * 3 // 4 // self.interval * self.interval


FULL = Recipe(
    preset="multi30k-small",
    layers=2,
    where=r"(encoder|decoder)/.*/kernel",
    vocab=4000,
    length=32,
    batch=64,
    steps=1500,
    interval=50,
    factor=1.0,  # the better of 0.5 and 1.0 for all links, by the loss after 400 steps
    warmup=300,
    rewarm=10,
)
QUICK = FULL._replace(
    preset="tiny",
    layers=1,
    where=r"decoder/.*/mlp/.*/kernel",
    vocab=300,
    length=16,
    batch=16,
    steps=48,
    interval=6,
)
QUICK = QUICK._replace(factor=0.3, warmup=12, rewarm=2)


class Fitted(NamedTuple):
    """What one way of training led to.

    Attributes:
        params: at the end.
        losses: one a step.
        links: numbers of links, by path, at the start and at the end; empty where all links are
            trained.
        outside: the largest weight where there is no link.
    """

    params: Any
    losses: np.ndarray
    links: tuple[dict[str, int], ...]
    outside: float


class Corpus(NamedTuple):
    """Pairs to learn from, sentences to translate, and how people translated them."""

    pairs: Pairs
    sources: list[str]
    references: list[str]


def multi30k(folder: Path, recipe: Recipe, test: str = "test_2016_flickr") -> Corpus:
    """Multi30k, German to English.

    Args:
        folder: with `train`, and the test set, as `.de.gz` and `.en.gz`.
        recipe: sizes.
        test: name of the test set.

    Raises:
        UserError: a file is missing.
    """
    names = {(part, side): folder / f"{part}.{side}.gz" for part in ("train", test) for side in ("de", "en")}
    for path in names.values():
        if not path.is_file():
            raise UserError(
                f"{path} is missing: put Multi30k there (task 1, raw) and set ODJAX_DATA_DIR to the folder "
                "above it"
            )
    specs = {name: f"text:{path}" for name, path in names.items()}
    train, held = ((specs[part, "de"], specs[part, "en"]) for part in ("train", test))
    tokenizer = BpeTokenizer(train, recipe.vocab)
    pairs = Pairs(
        source=train[0],
        target=train[1],
        evaluation_source=held[0],
        evaluation_target=held[1],
        length=recipe.length,
        tokenizer=tokenizer,
    )
    return Corpus(pairs, read_lines(held[0]), read_lines(held[1]))


def made_up(folder: Path, seed: int) -> None:
    """Sentences of two made-up languages, the second of which says the words backwards, as Multi30k's files.

    Args:
        folder: where to write.
        seed: of the sentences.
    """
    rng = np.random.default_rng(seed)
    words = ("an", "du", "ei", "gu", "ho", "ja", "ka", "li")
    for part, lines in (("train", 192), ("test_2016_flickr", 12)):
        drawn = [rng.choice(words, rng.integers(2, 5)) for _ in range(lines)]
        for side, text in (
            ("de", [" ".join(line) for line in drawn]),
            ("en", [" ".join(word[::-1] for word in line) for line in drawn]),
        ):
            (folder / f"{part}.{side}.gz").write_bytes(gzip.compress("\n".join(text).encode() + b"\n"))


def model_of(recipe: Recipe) -> EncoderDecoder:
    """The model of a recipe."""
    sizes = {"layers": recipe.layers, "vocab": recipe.vocab, "max_length": 2 * recipe.length}
    return encoder_decoder(recipe.preset, **sizes, scan=False)


def optimizer(
    name: str, model: EncoderDecoder, params: Any, recipe: Recipe, key: jax.Array
) -> optax.GradientTransformation:
    """Adam under one of the methods, each with the initial links that its paper gives it.

    Args:
        name: a key of `PAPER`.
        model: whose neurons percolate.
        params: its parameters.
        recipe: steps and rates.
        key: of the links.

    Returns:
        The transform; its state is a `DstState` unless all links are trained.
    """
    rate = noam(model.width, recipe.factor, recipe.warmup)
    if name == "dense":
        return optax.adam(rate, b2=0.998, eps=1e-9)
    inner = optax.adam(rewarm(rate, recipe.interval, recipe.rewarm), b2=0.998, eps=1e-9)
    fields = drawn(partial(brf_mask, r=0.25, degrees="fixed"))
    hebb = {"masks": fields, "wiring": wiring_of(model)}
    methods: dict[str, Callable[..., Any]] = {
        "SET": set_,
        "RigL": rigl,
        "CHTs": partial(chts, **hebb),
        "GraNet": partial(granet, density=0.5),
        # Twice as fast as GraNet's cubic decay: the same number of links on average.
        "CHTss": partial(chtss, density=0.5, decay="sigmoid", decay_end=max(1, recipe.end // 2), **hebb),
    }
    return methods[name](
        inner,
        uniform(params, SPARSITY, where=recipe.where),
        key=key,
        zeta=ZETA,
        interval=recipe.interval,
        end=recipe.end,
        skip_step=False,
    )


def start(recipe: Recipe, seed: int) -> Any:
    """The weights with which all ways begin."""
    example = jnp.zeros((1, 4), jnp.int32)
    key = fold_path(jax.random.key(seed), "init")
    return nn.unbox(jax.jit(model_of(recipe).init)(key, example, example))["params"]


def fit(
    name: str, params: Any, corpus: Corpus, recipe: Recipe, seed: int, say: Callable[[str], None]
) -> Fitted:
    """Trains in one way; all ways see the same batches.

    Args:
        name: a key of `PAPER`.
        params: the weights at the start.
        corpus: to learn from.
        recipe: sizes, steps and rates.
        seed: of links, order and dropout.
        say: told the loss now and then.

    Returns:
        The outcome.
    """
    task, pairs, key = translation(label_smoothing=0.1), corpus.pairs, jax.random.key(seed)
    model = model_of(recipe)
    update = optimizer(name, model, params, recipe, fold_path(key, "links"))

    def step(carry: tuple[Any, Any], given: tuple[Any, jax.Array]) -> tuple[tuple[Any, Any], jax.Array]:
        (params, state), (batch, count) = carry, given

        def loss(params: Any) -> jax.Array:
            dropout = jax.random.fold_in(key, count)
            total, weight = task.loss(model, {"params": params}, batch, dropout)[0]["loss"]
            return total / weight

        value, gradient = jax.value_and_grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):
            change, state = update.update(gradient, state, params)
        return (optax.apply_updates(params, change), state), value

    run = jax.jit(partial(jax.lax.scan, step), donate_argnums=0)
    params = jax.tree.map(jnp.array, params)  # the others need theirs
    state = jax.jit(update.init)(params)
    begin = _links(state, params)
    # The first update leaves nothing but links; the loss of the first step is that of all weights.
    data, carry, losses = pairs.train(seed), (params, state), []
    for first in range(0, recipe.steps, recipe.interval):
        rows = np.arange(first * recipe.batch, (first + recipe.interval) * recipe.batch)
        batches = {
            field: column.reshape(recipe.interval, recipe.batch, *column.shape[1:])
            for field, column in data.take(rows).items()
        }
        carry, values = run(carry, (batches, jnp.arange(first, first + recipe.interval, dtype=jnp.int32)))
        losses.append(np.asarray(values))
        say(f"{name}: step {first + recipe.interval} of {recipe.steps}, loss {losses[-1].mean():.3f}")
    params, state = carry
    outside = 0.0
    if isinstance(state, DstState):
        leaves = dict(leaves_with_paths(params))
        absent = [
            jnp.max(jnp.abs(jnp.where(unpack(words, leaves[path].shape), 0, leaves[path])))
            for path, words in state.masks.items()
        ]
        outside = float(max(absent))
    return Fitted(
        params,
        np.concatenate(losses),
        () if begin is None else (begin, _links(state, params)),
        outside,
    )


def translations(fits: dict[str, Fitted], corpus: Corpus, recipe: Recipe) -> dict[str, list[str]]:
    """The test sentences in English, by each of the ways, with a beam of 2."""
    tokenizer = corpus.pairs.tokenizer
    translate = translator(model_of(recipe), tokenizer, length=recipe.length, batch=50, beam=2)
    return {name: translate(found.params, corpus.sources) for name, found in fits.items()}


def _links(state: Any, params: Any) -> dict[str, int] | None:
    if not isinstance(state, DstState):
        return None
    shapes = {path: leaf.shape for path, leaf in leaves_with_paths(params)}
    return {path: int(unpack(words, shapes[path]).sum()) for path, words in state.masks.items()}


def _invariants(fits: dict[str, Fitted]) -> list[Claim]:
    sparse = {name: found for name, found in fits.items() if found.links}
    leaves = {path: leaf.size for path, leaf in leaves_with_paths(fits["CHTss"].params)}
    planned = {path: size - int(size * 9 // 10) for path, size in leaves.items()}
    ends = {name: found.links[1] for name, found in sparse.items()}
    right = all(count == planned[path] for end in ends.values() for path, count in end.items())
    begin = {
        name: sum(found.links[0].values()) / sum(leaves[path] for path in found.links[0])
        for name, found in sparse.items()
    }
    fall = ("GraNet", "CHTss")
    return [
        Claim(
            "Every sparse method ends with a tenth of the links in every kernel, and nothing beside them.",
            "N - floor(0.9 N) links of N, and weights of exactly 0 where there is none",
            f"{sum(next(iter(ends.values())).values()):,} links in {len(ends['CHTss'])} kernels, largest "
            f"other weight {max(found.outside for found in sparse.values()):g}",
            right and all(found.outside == 0 for found in sparse.values()),
        ),
        Claim(
            "Where the density falls it begins with half of the links, else with a tenth.",
            "densities of 0.5 and 0.1",
            ", ".join(f"{name} {share:.3f}" for name, share in begin.items()),
            all(abs(share - (0.5 if name in fall else 0.1)) < 0.005 for name, share in begin.items()),
        ),
    ]


def _quick(folder: Path, seed: int) -> list[Claim]:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        made_up(Path(made), seed)
        corpus = multi30k(Path(made), QUICK)
        fits = {"CHTss": fit("CHTss", start(QUICK, seed), corpus, QUICK, seed, lambda text: None)}
    losses = fits["CHTss"].losses
    first, last = losses[:6].mean(), losses[-6:].mean()
    score = bleu(translations(fits, corpus, QUICK)["CHTss"], corpus.references).score
    return [
        *_invariants(fits),
        Claim(
            "Training lowers the loss while links go.",
            "mean loss of the first six steps above that of the last six",
            f"{first:.3f} to {last:.3f} (BLEU {score:.1f}, which says nothing yet)",
            bool(first > last),
        ),
    ]


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures BLEU of six ways of training, five of which end with a tenth of the links.

    Args:
        folder: where the plot is written, and a line for every 50 steps into `chtss.log`.
        quick: made-up sentences in place of Multi30k, CHTss alone.
        seed: of everything.

    Returns:
        The claims, as they come out.

    Raises:
        UserError: Multi30k or sacrebleu is missing.
    """
    if quick:
        return Proof("chtss", tuple(_quick(folder, seed)), quick)
    corpus = multi30k(Path(os.environ.get("ODJAX_DATA_DIR", ".")) / "multi30k", FULL)

    def say(text: str) -> None:
        with (folder / "chtss.log").open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    bleu(["a"], ["a"])  # whether it is installed, rather now than after half an hour
    params = start(FULL, seed)
    fits = {name: fit(name, params, corpus, FULL, seed, say) for name in PAPER}
    lines = translations(fits, corpus, FULL)
    scores = {name: bleu(found, corpus.references) for name, found in lines.items()}
    for name, score in scores.items():
        say(f"{name}: BLEU {score.score:.2f} ({score.signature})")

    def plot(axes: Any) -> None:
        for name, found in fits.items():
            smooth = found.losses.reshape(-1, FULL.interval).mean(axis=1)
            steps = FULL.interval * (1 + np.arange(len(smooth)))
            axes.plot(steps, smooth, label=f"{name}, BLEU {scores[name].score:.1f}")
        axes.set(xlabel="step", ylabel="training loss (label smoothing 0.1)", yscale="log")
        axes.set(title="Multi30k de-en, width 128, 10 % of the links")
        axes.legend()

    plot_name = save_figure(folder / "chtss.svg", plot)

    def above(left: str, right: str, least: float, text: str) -> Claim:
        gap, error = bleu_difference(lines[left], lines[right], corpus.references, seed=seed)
        paper = f"{PAPER[left]} - {PAPER[right]} = {PAPER[left] - PAPER[right]:+.2f}"
        return Claim(
            text,
            f"{left} - {right} above {least:g} BLEU (paper: {paper})",
            f"{scores[left].score:.2f} - {scores[right].score:.2f} = {gap:+.2f} ± {error:.2f} (over the test "
            f"sentences, one seed; {scores[left].signature})",
            gap > least,
        )

    claims = (
        above("CHTss", "CHTs", 0, "A density that falls from a half to a tenth is worth BLEU."),
        above("CHTss", "GraNet", 0, "CHTss beats GraNet, at the same mean density."),
        above("CHTss", "SET", 0, "CHTss beats SET, whose new links are drawn uniformly."),
        above("CHTss", "RigL", 0, "CHTss beats RigL, whose new links follow gradients."),
        above("CHTss", "dense", 0, "A tenth of the links translates better than all of them."),
        above("CHTs", "SET", -1, "CHTs without the decay is about as good as SET."),
        *_invariants(fits),
    )
    return Proof("chtss", claims, quick, (plot_name,))
