"""A row of the registry."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["transform", "edit", "adapter", "module", "statistic", "algorithm", "function"]


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
      kind: one of the five kinds, "algorithm" for a federated one, or "function" for a plain function on
        arrays or trees.
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
