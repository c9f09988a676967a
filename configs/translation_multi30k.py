"""Multi30k by a sparse Transformer: the translation recipe of Cannistraci-Hebb training.

    odjax train configs/translation_multi30k.py --size small                     # two cores
    odjax train configs/translation_multi30k.py --size small --method dense      # and rigl, set, granet, ...
    odjax train configs/translation_multi30k.py                                  # the paper's size

Zhang et al., NeurIPS 2025, arXiv 2501.19107: Multi30k at 90 % sparsity, BLEU of all links 31.38, SET 29.73,
RigL 30.26, CHTs 29.81, GraNet 31.62, CHTss 32.86 (5,000 steps, best validation checkpoint, beam 2). Two
things differ here: the vocabulary is one joint byte-pair encoding, and source, target and output share its
embeddings. BLEU of a run's best checkpoint, and `odjax reproduce chtss` for the small size:

    odjax translate runs/NAME --best --source text:test2016.de.gz --target text:test2016.en.gz
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from odjax.models import encoder_decoder
from odjax.sparse.schedules import rewarm as rewarmed
from odjax_train import Experiment, translation
from odjax_train.data import BpeTokenizer, Pairs
from odjax_train.schedules import noam
from odjax_train.sparse import Degrees, Distribution, Method, Predictor, Topology, moves, sparse_optimizer

DATA = Path(os.environ.get("ODJAX_DATA_DIR", ".")) / "multi30k"
WHERE = r"(encoder|decoder)/.*/kernel"
"""Every kernel; embeddings, which are the output's kernel too, have all their links."""


class Size(NamedTuple):
    """What goes with a size of the model."""

    preset: str
    vocab: int
    length: int
    steps: int
    interval: int
    factor: float
    warmup: int
    rewarm: int


SIZES = {
    "full": Size("multi30k", 8000, 64, 5000, 100, 0.25, 1000, 20),
    "small": Size("multi30k-small", 4000, 32, 1500, 50, 1.0, 300, 10),
}


def experiment(
    method: Method = "chtss",
    size: Literal["full", "small"] = "full",
    data: Path = DATA,
    direction: Literal["de-en", "en-de"] = "de-en",
    steps: int | None = None,
    batch: int = 64,
    length: int | None = None,
    vocab: int | None = None,
    sparsity: float = 0.9,
    where: str = WHERE,
    distribution: Distribution = "uniform",
    per_head: bool = False,
    initial_topology: Topology | None = None,
    r: float = 0.25,
    degrees: Degrees = "fixed",
    interval: int | None = None,
    end: float = 0.75,
    zeta: float = 0.3,
    density: float = 0.5,
    decay: Literal["sigmoid", "cubic"] = "sigmoid",
    decay_end: float = 1.0,
    across: bool = False,
    predictor: Predictor | None = None,
    removal: Literal["soft", "hard"] | None = None,
    regrowth: Literal["soft", "top"] | None = None,
    alpha: float = 1.0,
    temperature: tuple[float, float] = (1.0, 9.0),
    percolation: bool = True,
    history: bool = False,
    skip_step: bool = False,
    factor: float | None = None,
    warmup: int | None = None,
    rewarm: int | None = None,
    dropout: float = 0.1,
    label_smoothing: float = 0.1,
    dtype: str = "float32",
    attention: str | None = None,
    scan: bool = True,
    eval_every: int = 250,
    seed: int = 0,
) -> Experiment:
    """Multi30k by a sparse Transformer: the translation recipe of Cannistraci-Hebb training.

    Args:
        method: how links move; `dense` has all of them.
        size: `full` is the paper's (width 512, 6 + 6 layers), `small` is for two cores (128, 2 + 2).
        data: folder with `train` and `val` as `.de.gz` and `.en.gz`; by default `multi30k` in the folder of
            the environment variable ODJAX_DATA_DIR.
        direction: from which language to which.
        steps: optimizer steps; None: the size's, 5,000 or 1,500.
        batch: pairs in a step; 64 are about 1,000 tokens a side.
        length: tokens on each side; what is longer is cut off.
        vocab: ids of the joint byte-pair encoding.
        sparsity: share of absent links in every sparse kernel, at the end.
        where: which weights are sparse.
        distribution: the same sparsity for all kernels, or more links for small ones.
        per_head: every attention head of q, k and v is a graph of its own.
        initial_topology: links at the start: receptive fields, a small world, or uniformly random; None:
            receptive fields for Cannistraci-Hebb methods, else random.
        r: randomness of receptive fields, from 0 (the nearest inputs) to 1 (any); share of moved links (beta)
            of a small world.
        degrees: links of each output of a receptive field.
        interval: steps between two changes of links.
        end: share of the steps after which links stay.
        zeta: share of the links that a change replaces at first; it falls to 0 at the end (not for set, cht).
        density: at the start, of chtss, granet and gmp.
        decay: how the density falls, of chtss.
        decay_end: share of the time up to `end` in which chtss comes to its density; 0.5 costs as much as
            granet.
        across: whether the density falls by the scores of all kernels together.
        predictor: of new links; None: CH2_L3n for chts and chtss, CH3_L3p for cht.
        removal: whether links that stay are drawn (soft) or ranked (hard); None: the method's.
        regrowth: whether new links are drawn (soft) or ranked (top); None: the method's.
        alpha: removal by weight magnitude (1) or relative importance (0).
        temperature: exponent of the soft removal at the start and at the end.
        percolation: links of dead neurons go too.
        history: a link that comes back has its last weight.
        skip_step: a change of links takes the place of an optimizer step.
        factor: of the learning rate.
        warmup: steps until the learning rate is highest.
        rewarm: steps over which it rises again after each change, 0 for none.
        dropout: of the model.
        label_smoothing: mass taken from the right token.
        dtype: of the computation; bfloat16 on accelerators.
        attention: how it is computed, see `odjax.models`.
        scan: whether layers are scanned.
        eval_every: steps between two looks at the validation set.
        seed: of everything random.
    """
    chosen = SIZES[size]
    given = {"vocab": vocab, "length": length, "steps": steps, "interval": interval}
    given |= {"factor": factor, "warmup": warmup, "rewarm": rewarm}
    chosen = chosen._replace(**{name: value for name, value in given.items() if value is not None})

    source, target = direction.split("-")
    lines = {
        part: [f"text:{data / f'{part}.{side}.gz'}" for side in (source, target)] for part in ("train", "val")
    }
    pairs = Pairs(
        source=lines["train"][0],
        target=lines["train"][1],
        evaluation_source=lines["val"][0],
        evaluation_target=lines["val"][1],
        length=chosen.length,
        tokenizer=BpeTokenizer(tuple(sorted(lines["train"])), chosen.vocab),
    )
    model = encoder_decoder(
        chosen.preset,
        vocab=chosen.vocab,
        max_length=max(256, chosen.length),
        dropout=dropout,
        dtype=dtype,
        attention=attention,
        scan=scan,
    )
    rate = noam(model.width, chosen.factor, chosen.warmup)
    if moves(method) and chosen.rewarm:
        last = int(end * chosen.steps)
        rate = rewarmed(rate, chosen.interval, chosen.rewarm, skip_step=skip_step, end=last)
    last = int(end * chosen.steps)
    optimizer, edits = sparse_optimizer(
        method,
        optax.adam(rate, b2=0.998, eps=1e-9),
        model,
        2 * [jax.ShapeDtypeStruct((1, 2), jnp.int32)],
        sparsity=sparsity,
        where=where,
        end=last,
        interval=chosen.interval,
        distribution=distribution,
        per_head=per_head,
        topology=initial_topology,
        r=r,
        degrees=degrees,
        zeta=zeta,
        density=density,
        decay=decay,
        decay_end=max(1, int(decay_end * last)),
        across=across,
        predictor=predictor,
        removal=removal,
        regrowth=regrowth,
        alpha=alpha,
        temperature=temperature,
        percolation=percolation,
        history=history,
        skip_step=skip_step,
        seed=seed,
    )
    return Experiment(
        model=model,
        task=translation(label_smoothing=label_smoothing),
        data=pairs,
        optimizer=optimizer,
        schedule=rate,
        edits=edits,
        steps=chosen.steps,
        batch=batch,
        seed=seed,
        eval_every=eval_every,
        checkpoint_every=eval_every,
    )
