"""Low-rank adaptation."""

from __future__ import annotations

from odjax.registry.method import Method, Paper

METHODS: tuple[Method, ...] = (
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
        slug="lora-guard",
        name="LoRA-Guard",
        family="lowrank",
        kind="module",
        paper=Paper(
            "LoRA-Guard: Parameter-Efficient Guardrail Adaptation for Content Moderation "
            "of Large Language Models",
            "Elesedy et al.",
            2024,
            "arXiv 2407.02987",
        ),
        summary="Moderation by low-rank factors and a head that leave the chat model as it is, bit for bit.",
        api="odjax.lowrank.guard.Guard",
        proofs=("lora-guard",),
    ),
)
