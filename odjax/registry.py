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
