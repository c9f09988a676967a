"""Differential privacy."""

from __future__ import annotations

from odjax.registry.method import Method, Paper

METHODS: tuple[Method, ...] = (
    Method(
        slug="dp-sgd",
        name="DP-SGD",
        family="privacy",
        kind="function",
        paper=Paper(
            "Deep Learning with Differential Privacy",
            "Abadi et al.",
            2016,
            "arXiv 1607.00133",
        ),
        summary="Privacy of single records: clip each example's gradient, sum, noise, for any optimizer.",
        api="odjax.privacy.dp_sgd.private_gradient",
    ),
)
