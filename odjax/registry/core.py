"""Statistics and selections that every family uses."""

from __future__ import annotations

from odjax.registry.method import Method, Paper

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
)
