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
      proof: whether `odjax_train.proofs` has a proof of it.
    """

    slug: str
    name: str
    family: str
    kind: Kind
    paper: Paper
    summary: str
    api: str
    proof: bool


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
        proof=True,
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
        proof=True,
    ),
    Method(
        slug="shrink-perturb",
        name="Shrink and perturb",
        family="continual",
        kind="edit",
        paper=Paper("On Warm-Starting Neural Network Training", "Ash, Adams", 2020, "arXiv 1910.08475"),
        summary="Shrinks the weights and adds noise before training goes on with more data.",
        api="odjax.continual.shrink_perturb.shrink_perturb",
        proof=True,
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
