"""Federated learning."""

from __future__ import annotations

from odjax.registry.method import Method, Paper

METHODS: tuple[Method, ...] = (
    Method(
        slug="lane-packing",
        name="Lane packing",
        family="federated",
        kind="function",
        paper=Paper(
            "pfl-research: simulation framework for accelerating research in Private Federated Learning",
            "Granqvist et al.",
            2024,
            "arXiv 2404.06430",
        ),
        summary="A round of clients of any size in one loop of full lanes, and one sum over devices.",
        api="odjax.federated.algorithms.make_round",
        proofs=("fed-engine",),
    ),
    Method(
        slug="fed-avg",
        name="FedAvg",
        family="federated",
        kind="algorithm",
        paper=Paper(
            "Communication-Efficient Learning of Deep Networks from Decentralized Data",
            "McMahan et al.",
            2017,
            "arXiv 1602.05629",
        ),
        summary="Clients take local steps, the server takes over their weighted mean.",
        api="odjax.federated.algorithms.fed_avg",
        proofs=("fed-engine",),
    ),
    Method(
        slug="fed-avgm",
        name="FedAvgM",
        family="federated",
        kind="transform",
        paper=Paper(
            "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
            "Hsu, Qi, Brown",
            2019,
            "arXiv 1909.06335",
        ),
        summary="FedAvg with momentum on the server.",
        api="odjax.federated.server.fed_avgm",
        proofs=("fed-engine",),
    ),
    Method(
        slug="fed-adam",
        name="FedAdam",
        family="federated",
        kind="transform",
        paper=Paper("Adaptive Federated Optimization", "Reddi et al.", 2021, "arXiv 2003.00295"),
        summary="The server takes the mean of the clients for a gradient of Adam, as its paper has it.",
        api="odjax.federated.server.fed_adam",
        proofs=("fed-engine",),
    ),
    Method(
        slug="fed-prox",
        name="FedProx",
        family="federated",
        kind="algorithm",
        paper=Paper(
            "Federated Optimization in Heterogeneous Networks", "Li et al.", 2020, "arXiv 1812.06127"
        ),
        summary="FedAvg whose local losses pull towards the server (proximal=).",
        api="odjax.federated.algorithms.fed_avg",
    ),
    Method(
        slug="scaffold",
        name="SCAFFOLD",
        family="federated",
        kind="algorithm",
        paper=Paper(
            "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
            "Karimireddy et al.",
            2020,
            "arXiv 1910.06378",
        ),
        summary="Control variates of clients and server take out the drift of local steps.",
        api="odjax.federated.algorithms.scaffold",
        proofs=("fed-engine",),
    ),
    Method(
        slug="dp-fed-avg",
        name="DP-FedAvg",
        family="federated",
        kind="function",
        paper=Paper(
            "Learning Differentially Private Recurrent Language Models",
            "McMahan et al.",
            2018,
            "arXiv 1710.06963",
        ),
        summary="Privacy of whole users: clip each delta, sum, noise once, divide by a fixed number.",
        api="odjax.federated.aggregate.private_sum",
        proofs=("fed-engine",),
    ),
    Method(
        slug="fed-rac-lora",
        name="Fed-RAC-LoRA",
        family="federated",
        kind="function",
        paper=Paper(
            "Randomized Asymmetric Chain of LoRA: "
            "The First Meaningful Theoretical Framework for Low-Rank Adaptation",
            "Malinovsky et al.",
            2024,
            "arXiv 2410.08305",
        ),
        summary="Clients draw the same sketches from a seed; the mean of their factors is exact, and merged.",
        api="odjax.federated.lowrank.chain_round",
        proofs=("fed-rac-lora",),
    ),
    Method(
        slug="dp-lora",
        name="DP-LoRA, FFA-LoRA",
        family="federated",
        kind="algorithm",
        paper=Paper(
            "Improving LoRA in Privacy-preserving Federated Learning", "Sun et al.", 2024, "arXiv 2403.12313"
        ),
        summary="Clients train low-rank factors, or one of them; noise is for these numbers alone.",
        api="odjax.federated.lowrank.fed_low_rank",
        proofs=("dp-dylora",),
    ),
    Method(
        slug="dp-dylora",
        name="DP-DyLoRA",
        family="federated",
        kind="algorithm",
        paper=Paper(
            "DP-DyLoRA: Fine-Tuning Transformer-Based Models On-Device under Differentially Private "
            "Federated Learning using Dynamic Low-Rank Adaptation",
            "Xu et al.",
            2024,
            "arXiv 2405.06368",
        ),
        summary="Private low-rank factors of a rank that the server draws each round; any can be served.",
        api="odjax.federated.dylora.dp_dylora",
        proofs=("dp-dylora",),
    ),
)
