"""Gumbel-top-k draws sets with the probabilities of successive sampling, exactly k of them, on any layout."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from odjax.core.selection import gumbel_top_k_mask
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof

WEIGHTS = (1.0, 2.0, 3.0, 4.0, 8.0)


def set_probabilities(weights: tuple[float, ...], k: int) -> dict[frozenset[int], float]:
    """Probability of every set that k draws without replacement can give, by enumerating the orders.

    Args:
        weights: of the entries.
        k: how many are drawn.

    Returns:
        set -> probability.
    """
    table: dict[frozenset[int], float] = {}
    for order in itertools.permutations(range(len(weights)), k):
        left, probability = sum(weights), 1.0
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        table[frozenset(order)] = table.get(frozenset(order), 0.0) + probability
    return table


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Compares the frequencies of drawn sets with their exact probabilities.

    Args:
        folder: where the plot is written.
        quick: fewer draws.
        seed: of the draws.

    Returns:
        The claims.
    """
    draws, k = (20_000 if quick else 1_000_000), 3
    chunk = 20_000
    draw = jax.jit(jax.vmap(lambda key: gumbel_top_k_mask(key, jnp.log(jnp.asarray(WEIGHTS)), k)))
    counts = np.zeros(2 ** len(WEIGHTS), np.int64)
    sizes: set[int] = set()
    for i in range(draws // chunk):
        masks = np.asarray(draw(jax.random.split(jax.random.fold_in(jax.random.key(seed), i), chunk)))
        sizes |= set(np.unique(masks.sum(1)).tolist())
        counts += np.bincount(masks @ (1 << np.arange(len(WEIGHTS))), minlength=counts.size)
    expected = set_probabilities(WEIGHTS, k)
    observed = {s: counts[sum(1 << i for i in s)] / draws for s in expected}
    statistic = sum((observed[s] - p) ** 2 * draws / p for s, p in expected.items())
    degrees = len(expected) - 1
    # The 99.99 % quantile of chi-square with 9 degrees of freedom is 33.72 (standard tables).
    limit = 33.72

    n, m = (20_000 if quick else 1_000_000), (500 if quick else 30_000)
    log_weights = jax.random.normal(jax.random.key(seed), (n,))
    many = int(gumbel_top_k_mask(jax.random.key(seed + 1), log_weights, m).sum())

    def plot(axes: object) -> None:
        axes.plot([0, 0.4], [0, 0.4], color="0.7", zorder=0)
        axes.scatter(list(expected.values()), list(observed.values()), s=18)
        axes.set(
            xlabel="probability of the set",
            ylabel="frequency",
            title=f"{draws:,} draws of {k} of {len(WEIGHTS)}",
        )

    name = save_figure(folder / "gumbel_top_k.svg", plot)
    claims = (
        Claim(
            "Sets are drawn with the probabilities of successive sampling (Plackett-Luce).",
            f"chi-square below {limit} ({degrees} degrees of freedom, 99.99 %)",
            f"{statistic:.2f} over {draws:,} draws",
            bool(statistic < limit),
        ),
        Claim(
            "Every draw holds exactly k entries.", f"{k}", ", ".join(map(str, sorted(sizes))), sizes == {k}
        ),
        Claim(f"Exactly k of {n:,} entries are drawn.", f"{m:,}", f"{many:,}", many == m),
    )
    return Proof("gumbel-top-k", claims, quick, (name,))
