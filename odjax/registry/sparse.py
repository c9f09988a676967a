"""Sparse training."""

from __future__ import annotations

from odjax.registry.method import Method, Paper

_BRAIN_NETWORKS = Paper(
    "Brain network science modelling of sparse neural networks enables Transformers and LLMs "
    "to perform as fully connected",
    "Zhang et al.",
    2025,
    "arXiv 2501.19107",
)
_EPITOPOLOGICAL = Paper(
    "Epitopological learning and Cannistraci-Hebb network shape intelligence brain-inspired theory "
    "for ultra-sparse advantage in deep learning",
    "Zhang et al.",
    2024,
    "doi 10.20944/preprints202207.0139.v1",
)

METHODS: tuple[Method, ...] = (
    Method(
        slug="chts",
        name="CHTs",
        family="sparse",
        kind="transform",
        paper=_BRAIN_NETWORKS,
        summary="Sparse training whose new links are drawn by the graph's shape, without dense gradients.",
        api="odjax.sparse.cannistraci_hebb.chts",
        proofs=("chts",),
    ),
    Method(
        slug="chtss",
        name="CHTss",
        family="sparse",
        kind="transform",
        paper=_BRAIN_NETWORKS,
        summary="CHTs with a density that falls along a sigmoid.",
        api="odjax.sparse.cannistraci_hebb.chtss",
        proofs=("chtss",),
    ),
    Method(
        slug="cht",
        name="CHT",
        family="sparse",
        kind="transform",
        paper=_EPITOPOLOGICAL,
        summary="Sparse training by deterministic link prediction, until a layer settles.",
        api="odjax.sparse.cannistraci_hebb.cht",
    ),
    Method(
        slug="ch-link-prediction",
        name="Cannistraci-Hebb scores",
        family="sparse",
        kind="function",
        paper=_BRAIN_NETWORKS,
        summary="Link prediction on paths of length three, over nodes, as matrix products.",
        api="odjax.sparse.link_prediction.ch_scores",
    ),
    Method(
        slug="ch-path-scores",
        name="Cannistraci-Hebb path scores",
        family="sparse",
        kind="function",
        paper=_EPITOPOLOGICAL,
        summary="The same over paths, as batched matrix products.",
        api="odjax.sparse.path_scores.path_scores",
    ),
    Method(
        slug="brf",
        name="Bipartite receptive field",
        family="sparse",
        kind="function",
        paper=_BRAIN_NETWORKS,
        summary="A sparse start: every neuron is linked near its own place on the other side.",
        api="odjax.sparse.topology.brf_mask",
    ),
    Method(
        slug="csti",
        name="Correlated sparse topology",
        family="sparse",
        kind="function",
        paper=_EPITOPOLOGICAL,
        summary="A sparse start: links where input features are correlated.",
        api="odjax.sparse.topology.csti_mask",
    ),
    Method(
        slug="set",
        name="SET",
        family="sparse",
        kind="transform",
        paper=Paper(
            "Scalable training of artificial neural networks with adaptive sparse connectivity "
            "inspired by network science",
            "Mocanu et al.",
            2018,
            "arXiv 1707.04780",
        ),
        summary="Sparse training: the smallest weights go, random links come.",
        api="odjax.sparse.methods.set_",
    ),
    Method(
        slug="rigl",
        name="RigL",
        family="sparse",
        kind="transform",
        paper=Paper(
            "Rigging the Lottery: Making All Tickets Winners",
            "Evci et al.",
            2020,
            "arXiv 1911.11134",
        ),
        summary="Sparse training: the smallest weights go, links with the largest gradients come.",
        api="odjax.sparse.methods.rigl",
    ),
    Method(
        slug="mest",
        name="MEST",
        family="sparse",
        kind="transform",
        paper=Paper(
            "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge",
            "Yuan et al.",
            2021,
            "arXiv 2110.14032",
        ),
        summary="Sparse training: weights and gradients decide what goes; EM and EM&S schedules.",
        api="odjax.sparse.methods.mest",
    ),
    Method(
        slug="granet",
        name="GraNet",
        family="sparse",
        kind="transform",
        paper=Paper(
            "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
            "Liu et al.",
            2021,
            "arXiv 2106.10404",
        ),
        summary="Gradual pruning that also grows links by gradients.",
        api="odjax.sparse.methods.granet",
    ),
    Method(
        slug="gmp",
        name="Gradual magnitude pruning",
        family="sparse",
        kind="transform",
        paper=Paper(
            "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression",
            "Zhu, Gupta",
            2017,
            "arXiv 1710.01878",
        ),
        summary="From dense to sparse along a cubic, the smallest weights first.",
        api="odjax.sparse.methods.gmp",
    ),
    Method(
        slug="snip",
        name="SNIP",
        family="sparse",
        kind="function",
        paper=Paper(
            "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
            "Lee, Ajanthan, Torr",
            2019,
            "arXiv 1810.02340",
        ),
        summary="Masks before training from one large batch: the links that the loss feels most.",
        api="odjax.sparse.one_shot.snip_masks",
    ),
    Method(
        slug="ste",
        name="Straight-through masks",
        family="sparse",
        kind="function",
        paper=Paper(
            "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
            "Bengio, Léonard, Courville",
            2013,
            "arXiv 1308.3432",
        ),
        summary="Masked weights in the forward pass whose gradient reaches all of them.",
        api="odjax.sparse.one_shot.ste",
    ),
)
