"""Every method in one table: what it is, the paper, where to import it, whether it has a proof.

Adding a method is adding a row. `odjax methods`, the README, the contract tests and the proofs all read it
here.
"""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple

Kind = Literal["transform", "edit", "adapter", "module", "statistic", "function"]


class Paper(NamedTuple):
    """Where a method comes from; `link` is 'arXiv <id>' or 'doi <id>'."""

    title: str
    authors: str
    year: int
    link: str


class Method(NamedTuple):
    """One method: what it is called, what kind of thing it is, and where it lives.

    Attributes:
      slug: the name that the command line knows it by.
      name: the name that people know it by.
      family: the folder of `odjax` that it is in.
      kind: one of the five kinds, or "function" for a plain function on arrays or trees.
      paper: where it comes from.
      summary: one line.
      api: the dotted name of its public entry.
      proofs: what `odjax reproduce` knows its proofs by; empty when it has none yet.
    """

    slug: str
    name: str
    family: str
    kind: Kind
    paper: Paper
    summary: str
    api: str
    proofs: tuple[str, ...] = ()


_BRAIN_NETWORKS = Paper(
    "Brain network science modelling of sparse neural networks enables Transformers and LLMs "
    "to perform as fully connected",
    "Zhang et al.",
    2025,
    "arXiv 2501.19107",
)
_EPITOPOLOGICAL = Paper(
    "Epitopological learning and Cannistraci-Hebb network shape intelligence brain-inspired theory "
    "for ultra-sparse advantage in deep learning",
    "Zhang et al.",
    2024,
    "doi 10.20944/preprints202207.0139.v1",
)

_FIXED_CLASSIFIER = Paper(
    "Deep Neural Network Models Trained With A Fixed Random Classifier Transfer Better Across Domains",
    "Tiomoko Ali et al.",
    2024,
    "arXiv 2402.18614",
)
_LARGE_COLLAPSE = Paper(
    "Generalized Neural Collapse for a Large Number of Classes", "Jiang et al.", 2023, "arXiv 2310.05351"
)
_MOMENT_PROBING = Paper("Tuning Pre-trained Model via Moment Probing", "Gao et al.", 2023, "arXiv 2307.11342")

METHODS: tuple[Method, ...] = (
    Method(
        slug="chan-moments",
        name="Mergeable moments",
        family="core",
        kind="statistic",
        paper=Paper(
            "Algorithms for Computing the Sample Variance: Analysis and Recommendations",
            "Chan, Golub, LeVeque",
            1983,
            "doi 10.1080/00031305.1983.10483115",
        ),
        summary="Mean and variance that merge across batches, devices and hosts without cancellation.",
        api="odjax.core.statistics.moments",
        proofs=("chan-moments",),
    ),
    Method(
        slug="gumbel-top-k",
        name="Gumbel-top-k",
        family="core",
        kind="function",
        paper=Paper(
            "Stochastic Beams and Where to Find Them: "
            "The Gumbel-Top-k Trick for Sampling Sequences Without Replacement",
            "Kool, van Hoof, Welling",
            2019,
            "arXiv 1903.06059",
        ),
        summary="Exactly k draws without replacement by weight: jitted, sharded, no sort.",
        api="odjax.core.selection.gumbel_top_k_mask",
        proofs=("gumbel-top-k",),
    ),
    Method(
        slug="rac-lora",
        name="RAC-LoRA",
        family="lowrank",
        kind="transform",
        paper=Paper(
            "Randomized Asymmetric Chain of LoRA: "
            "The First Meaningful Theoretical Framework for Low-Rank Adaptation",
            "Malinovsky et al.",
            2024,
            "arXiv 2410.08305",
        ),
        summary="A chain of random low-rank updates with the convergence of full fine-tuning.",
        api="odjax.lowrank.gradient.rac_lora",
        proofs=("rac-lora", "rac-lora-theory", "rac-lora-sst2"),
    ),
    Method(
        slug="lora",
        name="LoRA",
        family="lowrank",
        kind="adapter",
        paper=Paper(
            "LoRA: Low-Rank Adaptation of Large Language Models", "Hu et al.", 2021, "arXiv 2106.09685"
        ),
        summary="Trains two low-rank factors beside each frozen weight.",
        api="odjax.lowrank.adapt.adapt",
    ),
    Method(
        slug="rslora",
        name="rsLoRA",
        family="lowrank",
        kind="adapter",
        paper=Paper(
            "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
            "Kalajdzievski",
            2023,
            "arXiv 2312.03732",
        ),
        summary="LoRA scaled by the square root of the rank, for large ranks.",
        api="odjax.lowrank.adapt.adapt",
    ),
    Method(
        slug="asym-lora",
        name="Asymmetric LoRA",
        family="lowrank",
        kind="adapter",
        paper=Paper(
            "Asymmetry in Low-Rank Adapters of Foundation Models", "Zhu et al.", 2024, "arXiv 2402.16842"
        ),
        summary="LoRA whose first factor is random and frozen.",
        api="odjax.lowrank.adapt.adapt",
    ),
    Method(
        slug="lora-fa",
        name="LoRA-FA",
        family="lowrank",
        kind="adapter",
        paper=Paper(
            "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
            "Zhang et al.",
            2023,
            "arXiv 2308.03303",
        ),
        summary="LoRA with A frozen: a token keeps rank numbers for the backward pass.",
        api="odjax.lowrank.adapt.adapt",
    ),
    Method(
        slug="cola",
        name="Chain of LoRA",
        family="lowrank",
        kind="adapter",
        paper=Paper(
            "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning",
            "Xia et al.",
            2024,
            "arXiv 2401.04151",
        ),
        summary="LoRA that is merged and begun anew, block after block.",
        api="odjax.lowrank.adapt.adapt",
    ),
    Method(
        slug="relora",
        name="ReLoRA",
        family="lowrank",
        kind="adapter",
        paper=Paper(
            "ReLoRA: High-Rank Training Through Low-Rank Updates", "Lialin et al.", 2023, "arXiv 2307.05695"
        ),
        summary="Chain of LoRA for pretraining: pruned moments, jagged learning rate.",
        api="odjax.lowrank.adapt.adapt",
    ),
    Method(
        slug="dora",
        name="DoRA",
        family="lowrank",
        kind="adapter",
        paper=Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", "Liu et al.", 2024, "arXiv 2402.09353"),
        summary="LoRA of the direction of each output, and a trained magnitude.",
        api="odjax.lowrank.adapt.adapt",
    ),
    Method(
        slug="pissa",
        name="PiSSA",
        family="lowrank",
        kind="adapter",
        paper=Paper(
            "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
            "Meng et al.",
            2024,
            "arXiv 2404.02948",
        ),
        summary="LoRA that begins at the principal part of each weight.",
        api="odjax.lowrank.adapt.adapt",
    ),
    Method(
        slug="dylora",
        name="DyLoRA",
        family="lowrank",
        kind="adapter",
        paper=Paper(
            "DyLoRA: Parameter Efficient Tuning of Pre-trained Models "
            "using Dynamic Search-Free Low-Rank Adaptation",
            "Valipour et al.",
            2022,
            "arXiv 2210.07558",
        ),
        summary="LoRA that serves every rank up to the largest.",
        api="odjax.lowrank.adapt.adapt",
    ),
    Method(
        slug="chts",
        name="CHTs",
        family="sparse",
        kind="transform",
        paper=_BRAIN_NETWORKS,
        summary="Sparse training whose new links are drawn by the graph's shape, without dense gradients.",
        api="odjax.sparse.cannistraci_hebb.chts",
        proofs=("chts",),
    ),
    Method(
        slug="chtss",
        name="CHTss",
        family="sparse",
        kind="transform",
        paper=_BRAIN_NETWORKS,
        summary="CHTs with a density that falls along a sigmoid.",
        api="odjax.sparse.cannistraci_hebb.chtss",
        proofs=("chtss",),
    ),
    Method(
        slug="cht",
        name="CHT",
        family="sparse",
        kind="transform",
        paper=_EPITOPOLOGICAL,
        summary="Sparse training by deterministic link prediction, until a layer settles.",
        api="odjax.sparse.cannistraci_hebb.cht",
    ),
    Method(
        slug="ch-link-prediction",
        name="Cannistraci-Hebb scores",
        family="sparse",
        kind="function",
        paper=_BRAIN_NETWORKS,
        summary="Link prediction on paths of length three, over nodes, as matrix products.",
        api="odjax.sparse.link_prediction.ch_scores",
    ),
    Method(
        slug="ch-path-scores",
        name="Cannistraci-Hebb path scores",
        family="sparse",
        kind="function",
        paper=_EPITOPOLOGICAL,
        summary="The same over paths, as batched matrix products.",
        api="odjax.sparse.path_scores.path_scores",
    ),
    Method(
        slug="brf",
        name="Bipartite receptive field",
        family="sparse",
        kind="function",
        paper=_BRAIN_NETWORKS,
        summary="A sparse start: every neuron is linked near its own place on the other side.",
        api="odjax.sparse.topology.brf_mask",
    ),
    Method(
        slug="csti",
        name="Correlated sparse topology",
        family="sparse",
        kind="function",
        paper=_EPITOPOLOGICAL,
        summary="A sparse start: links where input features are correlated.",
        api="odjax.sparse.topology.csti_mask",
    ),
    Method(
        slug="set",
        name="SET",
        family="sparse",
        kind="transform",
        paper=Paper(
            "Scalable training of artificial neural networks with adaptive sparse connectivity "
            "inspired by network science",
            "Mocanu et al.",
            2018,
            "arXiv 1707.04780",
        ),
        summary="Sparse training: the smallest weights go, random links come.",
        api="odjax.sparse.methods.set_",
    ),
    Method(
        slug="rigl",
        name="RigL",
        family="sparse",
        kind="transform",
        paper=Paper(
            "Rigging the Lottery: Making All Tickets Winners",
            "Evci et al.",
            2020,
            "arXiv 1911.11134",
        ),
        summary="Sparse training: the smallest weights go, links with the largest gradients come.",
        api="odjax.sparse.methods.rigl",
    ),
    Method(
        slug="mest",
        name="MEST",
        family="sparse",
        kind="transform",
        paper=Paper(
            "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge",
            "Yuan et al.",
            2021,
            "arXiv 2110.14032",
        ),
        summary="Sparse training: weights and gradients decide what goes; EM and EM&S schedules.",
        api="odjax.sparse.methods.mest",
    ),
    Method(
        slug="granet",
        name="GraNet",
        family="sparse",
        kind="transform",
        paper=Paper(
            "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
            "Liu et al.",
            2021,
            "arXiv 2106.10404",
        ),
        summary="Gradual pruning that also grows links by gradients.",
        api="odjax.sparse.methods.granet",
    ),
    Method(
        slug="gmp",
        name="Gradual magnitude pruning",
        family="sparse",
        kind="transform",
        paper=Paper(
            "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression",
            "Zhu, Gupta",
            2017,
            "arXiv 1710.01878",
        ),
        summary="From dense to sparse along a cubic, the smallest weights first.",
        api="odjax.sparse.methods.gmp",
    ),
    Method(
        slug="snip",
        name="SNIP",
        family="sparse",
        kind="function",
        paper=Paper(
            "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
            "Lee, Ajanthan, Torr",
            2019,
            "arXiv 1810.02340",
        ),
        summary="Masks before training from one large batch: the links that the loss feels most.",
        api="odjax.sparse.one_shot.snip_masks",
    ),
    Method(
        slug="ste",
        name="Straight-through masks",
        family="sparse",
        kind="function",
        paper=Paper(
            "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
            "Bengio, Léonard, Courville",
            2013,
            "arXiv 1308.3432",
        ),
        summary="Masked weights in the forward pass whose gradient reaches all of them.",
        api="odjax.sparse.one_shot.ste",
    ),
    Method(
        slug="etf-head",
        name="Fixed classifier head",
        family="heads",
        kind="module",
        paper=_FIXED_CLASSIFIER,
        summary="A classifier without trainable weights: fixed class vectors, mostly not even stored.",
        api="odjax.heads.fixed.FixedHead",
        proofs=("etf-head", "etf-head-lm"),
    ),
    Method(
        slug="dot-regression",
        name="Dot regression",
        family="heads",
        kind="function",
        paper=Paper(
            "Inducing Neural Collapse in Imbalanced Learning: Do We Really Need a Learnable Classifier at "
            "the End of Deep Neural Network?",
            "Yang et al.",
            2022,
            "arXiv 2203.09081",
        ),
        summary="Pulls a feature to the vertex of its class, and pushes from none.",
        api="odjax.heads.losses.dot_regression_loss",
        proofs=("etf-head",),
    ),
    Method(
        slug="class-codes",
        name="Class codes",
        family="heads",
        kind="function",
        paper=_LARGE_COLLAPSE,
        summary="Class vectors spread as far as they go: simplex, orthoplex, Hadamard, random, optimized.",
        api="odjax.heads.codes.class_code",
    ),
    Method(
        slug="code-cross-entropy",
        name="Cross-entropy over a code",
        family="heads",
        kind="function",
        paper=Paper(
            "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
            "Shoeybi et al.",
            2019,
            "arXiv 1909.08053",
        ),
        summary="The loss of a vocabulary in chunks and over a mesh axis; no logits and no code are kept.",
        api="odjax.heads.vocab.code_cross_entropy",
        proofs=("etf-head-lm",),
    ),
    Method(
        slug="neural-collapse",
        name="Neural-collapse statistics",
        family="heads",
        kind="statistic",
        paper=Paper(
            "Prevalence of neural collapse during the terminal phase of deep learning training",
            "Papyan, Han, Donoho",
            2020,
            "arXiv 2008.08186",
        ),
        summary="NC1 to NC4 and CDNV from sums that merge, without a matrix of features by features.",
        api="odjax.heads.collapse.collapse_gram",
        proofs=("etf-head",),
    ),
    Method(
        slug="one-vs-rest-margins",
        name="One-vs-rest margins",
        family="heads",
        kind="function",
        paper=_LARGE_COLLAPSE,
        summary="The distance of each class vector to the convex hull of the others.",
        api="odjax.heads.margins.one_vs_rest_margins",
    ),
    Method(
        slug="ggem",
        name="Group generalized-mean pooling",
        family="heads",
        kind="module",
        paper=Paper(
            "Group Generalized Mean Pooling for Vision Transformer", "Ko et al.", 2022, "arXiv 2212.04114"
        ),
        summary="Pools tokens by a power mean with an exponent for each group of channels.",
        api="odjax.heads.ggem.GGeM",
        proofs=("ggem",),
    ),
    Method(
        slug="moment-probing",
        name="Moment probing",
        family="heads",
        kind="module",
        paper=_MOMENT_PROBING,
        summary="A probe of frozen tokens by their mean and by second moments between groups of channels.",
        api="odjax.heads.moment_probing.MomentProbe",
        proofs=("moment-probing",),
    ),
    Method(
        slug="psrp",
        name="Partially shared recalibration (MP+)",
        family="heads",
        kind="module",
        paper=_MOMENT_PROBING,
        summary="Scales and shifts each block of a frozen model by what it sees, through a few channels.",
        api="odjax.heads.recalibration.PSRP",
    ),
    Method(
        slug="shrink-perturb",
        name="Shrink and perturb",
        family="continual",
        kind="edit",
        paper=Paper("On Warm-Starting Neural Network Training", "Ash, Adams", 2020, "arXiv 1910.08475"),
        summary="Shrinks the weights and adds noise before training goes on with more data.",
        api="odjax.continual.shrink_perturb.shrink_perturb",
        proofs=("shrink-perturb",),
    ),
)


def find(slug: str) -> Method:
    """The method of a slug.

    Args:
      slug: such as 'shrink-perturb'.

    Returns:
      Its row.

    Raises:
      ValueError: there is no such method; the closest slugs are named.

    Example:
      >>> find("shrink-perturb").paper.year
      2020
    """
    for method in METHODS:
        if method.slug == slug:
            return method
    slugs = [method.slug for method in METHODS]
    near = difflib.get_close_matches(slug, slugs, n=3, cutoff=0.3) or slugs
    raise ValueError(f"there is no method {slug!r}; the closest are {', '.join(map(repr, near))}")


def methods_table_markdown() -> str:
    """The methods as a Markdown table, by family and slug.

    Returns:
      The table, one row a method.

    Example:
      >>> print(methods_table_markdown().splitlines()[0])
      | Method | What it does | Kind | Import | Paper |
    """
    lines = ["| Method | What it does | Kind | Import | Paper |", "|---|---|---|---|---|"]
    for method in sorted(METHODS, key=lambda m: (m.family, m.slug)):
        scheme, _, identifier = method.paper.link.partition(" ")
        address = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}[scheme] + identifier
        paper = f"[{method.paper.authors} {method.paper.year}]({address})"
        cells = (f"`{method.slug}`", method.summary, method.kind, f"`{method.api}`", paper)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
