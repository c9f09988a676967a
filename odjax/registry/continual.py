"""Continual learning."""

from __future__ import annotations

from odjax.registry.method import Method, Paper

METHODS: tuple[Method, ...] = (
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
