"""Second moments of frozen tokens beside their mean: moment probing on few labels.

The features are maps of a ResNet-20 trained on CIFAR-10, of MNIST digits, 1,000 labelled ones a seed, see
`odjax_train.proofs.cifar_features`. The probe is the paper's variant for CNNs (first order: mean, LayerNorm,
linear; heads of interleaved channels) with D = 128 and four heads; beside it the first order alone, and the
best first-order pooling, GGeM with 16 groups. The quick version probes what a random network sees in
scikit-learn's digits.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from odjax.heads.ggem import GGeM
from odjax.heads.moment_probing import MomentProbe
from odjax.heads.pooling import TokenPool
from odjax.heads.second_moments import column_normalize, cross_moments
from odjax_train.proofs.cifar_features import (
    PooledProbe,
    Recipe,
    bars,
    best_rate,
    cifar_claim,
    data_folder,
    digits_maps,
    fit,
    mnist_maps,
    network,
    spread,
)
from odjax_train.proofs.proof import Claim, Proof

SEEDS, RATE, STEPS = 3, 3e-3, 1500
DIM, HEADS, CLASSES = 128, 4, 10
PUBLISHED = 10_676  # trained numbers for 64 channels and 10 classes, by hand


def probe(first_order: str = "mean_norm", *, interleaved: bool = True) -> MomentProbe:
    """The probe of this proof."""
    return MomentProbe(CLASSES, first_order, DIM, HEADS, interleaved=interleaved)


def size_of(module: nn.Module, channels: int) -> int:
    """How many numbers a probe trains on tokens of so many channels."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, channels)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def size_claim() -> Claim:
    """The parameters are counted by hand.

    Returns:
        The claim: 64 -> 128 with biases, a LayerNorm of 32, two convolutions of 3x3x3x3, linear 64 -> 10 and
        3 * 7 * 7 -> 10 with biases; a LayerNorm of 64 more where the mean is normalized.
    """
    by_hand = (64 * DIM + DIM) + 2 * 32 + 2 * 81 + (64 * 10 + 10) + (3 * 49 * 10 + 10)
    plain, normed = size_of(probe("mean"), 64), size_of(probe(), 64)
    return Claim(
        "The probe has the number of parameters that its layers add up to.",
        f"{PUBLISHED:,} with the plain mean, 128 more with the LayerNorm of the mean",
        f"{plain:,} and {normed:,}",
        plain == by_hand == PUBLISHED and normed == by_hand + 128,
    )


def theory_claims(params: Any, x: jax.Array) -> list[Claim]:
    """What a trained probe keeps to on real tokens.

    Args:
        params: of `probe()`.
        x: [n, N, D].

    Returns:
        Three claims.
    """

    @jax.jit
    def run(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        first, second = probe().apply({"params": params}, x, method="branches")
        return probe().apply({"params": params}, x), first, second

    logits, first, second = run(x)
    order = np.random.default_rng(0).permutation(x.shape[1])
    scale = float(jnp.max(jnp.abs(logits)))
    moved = float(jnp.max(jnp.abs(run(x[:, order])[0] - logits))) / scale
    doubled = float(jnp.max(jnp.abs(run(jnp.concatenate([x, x], 1))[0] - logits))) / scale
    mean = float(jnp.max(jnp.abs(logits - (first + second) / 2))) / scale
    heads = jnp.reshape(x, (*x.shape[:2], HEADS, -1))
    columns = column_normalize(cross_moments(heads, center="none"))
    norms = np.asarray(jnp.linalg.norm(columns, axis=-2), np.float64)
    off = float(np.minimum(np.abs(norms - 1), norms).max())
    return [
        Claim(
            "The order and the number of copies of the tokens change nothing.",
            "logits within 1e-4 of the largest, permuted and doubled",
            f"{moved:.1e} and {doubled:.1e}",
            moved < 1e-4 and doubled < 1e-4,
        ),
        Claim(
            "The logits are the mean of those of the first and the second order.",
            "within 1e-6 of the largest",
            f"{mean:.1e}",
            mean < 1e-6,
        ),
        Claim(
            "Every column of a map of second moments has the length 1, or 0 where a channel is dead.",
            "within 1e-5",
            f"{off:.1e}, {100 * float((norms < 0.5).mean()):.1f} % are 0",
            off < 1e-5,
        ),
    ]


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Compares moment probing with probes of the first order on frozen features.

    Args:
        folder: where the plot and the converted weights are written.
        quick: features of a random network, with what does not depend on the data.
        seed: of everything.

    Returns:
        The claims, as they come out.

    Raises:
        UserError: the full proof without its data.
    """
    if quick:
        return _quick(folder, seed)
    data = data_folder()
    model, variables = network(data, folder)
    claims = [cifar_claim(data, model, variables), size_claim()]
    maps = mnist_maps(data, model, variables, SEEDS, seed)
    recipe = Recipe(STEPS, RATE)
    mean, ggem = PooledProbe(TokenPool("mean")), PooledProbe(GGeM(16))
    found = {
        "mean": fit(mean, maps, recipe, seed),
        "GGeM(16)": fit(ggem, maps, recipe, seed),
        "moment probing": fit(probe(), maps, recipe, seed),
    }
    rate = best_rate(mean, maps, recipe, seed)
    tuned = fit(mean, maps, recipe._replace(rate=rate), seed)
    claims += theory_claims(found["moment probing"].params[0], maps.test[:100])
    plot = bars(folder / "moment_probing.svg", found, f"1,000 MNIST digits, frozen ResNet-20, {SEEDS} seeds")
    shown = ", ".join(f"{name} {spread(run.accuracy)} ({run.size:,})" for name, run in found.items())
    gain = found["moment probing"].accuracy - found["mean"].accuracy
    own = found["moment probing"].accuracy - tuned.accuracy
    first = found["moment probing"].accuracy - found["GGeM(16)"].accuracy
    claims += [
        Claim(
            "On 1,000 labelled digits, first and second moments of frozen features are better than the mean.",
            f"at least 4 points, mean of {SEEDS} seeds, AdamW {STEPS:,} steps at {RATE:g}",
            f"{gain.mean():+.1f} ± {gain.std(ddof=1):.1f} points ({shown})",
            bool(gain.mean() >= 4),
        ),
        Claim(
            "They are when the probe of the mean alone has the learning rate that is best for it, too.",
            f"at least 4 points, mean of {SEEDS} seeds, rate of the mean's probe chosen on other images",
            f"{own.mean():+.1f} ± {own.std(ddof=1):.1f} points (mean {spread(tuned.accuracy)} at {rate:g})",
            bool(own.mean() >= 4),
        ),
        Claim(
            "They are better than the best pooling of the first order.",
            f"above GGeM(16), mean of {SEEDS} seeds at the same rate",
            f"{first.mean():+.1f} ± {first.std(ddof=1):.1f} points",
            bool(first.mean() > 0),
        ),
    ]
    return Proof("moment-probing", tuple(claims), False, (plot,))


def _quick(folder: Path, seed: int) -> Proof:
    maps = digits_maps(seed)
    probes = {"mean": PooledProbe(TokenPool("mean")), "moment probing": probe()}
    found = {name: fit(module, maps, Recipe(60, 1e-2, 50), seed) for name, module in probes.items()}
    plot = bars(folder / "moment_probing.svg", found, "scikit-learn's digits, random network")
    least = min(run.accuracy.min() for run in found.values())
    claims = [
        size_claim(),
        *theory_claims(found["moment probing"].params[0], maps.test[:50]),
        Claim(
            "What a random network sees in digits is enough for both probes.",
            "both above 50 %, chance is 10 %",
            ", ".join(f"{name} {spread(run.accuracy)} ({run.size:,})" for name, run in found.items()),
            bool(least > 50),
        ),
    ]
    return Proof("moment-probing", tuple(claims), True, (plot,))
