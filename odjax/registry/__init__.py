"""Every method in one table: what it is, the paper, where to import it, whether it has a proof.

Adding a method is adding a row to its family's file. `odjax methods`, the README, the contract tests and the
proofs all read it here.
"""

from __future__ import annotations

import difflib

from odjax.registry import continual, core, federated, heads, lowrank, privacy, sparse
from odjax.registry.method import Kind as Kind
from odjax.registry.method import Method as Method
from odjax.registry.method import Paper as Paper

METHODS: tuple[Method, ...] = (
    *core.METHODS,
    *lowrank.METHODS,
    *sparse.METHODS,
    *heads.METHODS,
    *continual.METHODS,
    *federated.METHODS,
    *privacy.METHODS,
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
