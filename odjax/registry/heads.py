"""Heads, poolings and statistics of features."""

from __future__ import annotations

from odjax.registry.method import Method, Paper

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
)
