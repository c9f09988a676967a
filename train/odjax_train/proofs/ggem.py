"""Power means of tokens instead of their average: GGeM on frozen features, and inside a small ViT.

The features are maps of a ResNet-20 trained on CIFAR-10, of MNIST digits, 1,000 labelled ones a seed, see
`odjax_train.proofs.cifar_features`; on the pooled vector come a LayerNorm and a linear classifier. The ViT (4
layers, width 64, 4 heads, patch 4) learns from 10,000 digits. The quick version pools what a random network
sees in scikit-learn's digits.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from odjax.heads.ggem import GGeM, ggem_pool
from odjax.heads.pooling import TokenPool, max_pool, mean_pool
from odjax.models import ViT
from odjax_train.proofs.cifar_features import (
    FILES,
    Fitted,
    Maps,
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

SEEDS, RATE, STEPS = 5, 3e-3, 1500
VIT_IMAGES, VIT_JUDGED, VIT_RECIPE = 10_000, 5_000, Recipe(300, 2e-3, 50)
EPS = 1e-6


def probes() -> dict[str, nn.Module]:
    """The probes that are compared, by name."""
    pools = {"average": TokenPool("mean"), "max": TokenPool("max"), "GeM": GGeM(1)}
    pools |= {f"GGeM({groups})": GGeM(groups) for groups in (4, 16, 64)}
    named: dict[str, nn.Module] = {name: PooledProbe(pool) for name, pool in pools.items()}
    return named | {"average, no LayerNorm": PooledProbe(TokenPool("mean"), norm=False)}


def theory_claims(x: jax.Array) -> list[Claim]:
    """Limits and derivatives of the pooling on real tokens.

    Args:
        x: [n, N, D] without negative entries.

    Returns:
        Three claims.
    """

    @jax.jit
    def limits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        positive, one = jnp.maximum(x, EPS), jnp.ones(1)
        mean = ggem_pool(x, one) / mean_pool(positive) - 1
        return jnp.max(jnp.abs(mean)), jnp.log(max_pool(positive)) - jnp.log(ggem_pool(x, 200 * one))

    average, gap = limits(x)
    bound = float(np.log(x.shape[1]) / 200)
    low, high = float(gap.min()), float(gap.max())
    with jax.enable_x64(True):
        wide, p = jnp.asarray(np.asarray(x[:8]), jnp.float64), jnp.asarray([0.7, 1.0, 3.0, 8.0], jnp.float64)

        def direct(x: jax.Array, p: jax.Array) -> jax.Array:
            each = jnp.repeat(p, x.shape[-1] // len(p))
            powers = jnp.maximum(x, EPS) ** each[None, None]
            return jnp.mean(powers, 1) ** (1 / each)[None]

        # Weights of both signs, so that no two errors hide each other.
        weights = jnp.asarray(np.random.default_rng(0).normal(size=(len(wide), wide.shape[-1])))
        ours, theirs = (
            jax.jit(jax.grad(lambda x, p, f=f: jnp.sum(weights * f(x, p)), (0, 1)))(wide, p)
            for f in (ggem_pool, direct)
        )
        error = max(
            float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(ours, theirs, strict=True)
        )
    return [
        Claim(
            "With the exponent 1 the pooling is the average.",
            "within 1e-5",
            f"{average:.1e}",
            bool(average < 1e-5),
        ),
        Claim(
            "With the exponent 200 the pooling is the maximum.",
            f"below it by at most a factor exp(log N / 200), a logarithm of {bound:.4f}",
            f"logarithms of {low:.4f} to {high:.4f}",
            low >= -1e-5 and high <= bound + 1e-5,
        ),
        Claim(
            "The derivatives in closed form are those of the power mean.",
            "relative to the largest, within 1e-9 in float64, for exponents from 0.7 to 8",
            f"{error:.1e}",
            error < 1e-9,
        ),
    ]


def table(fitted: dict[str, Fitted]) -> str:
    """Accuracies in a line.

    Args:
        fitted: by name.

    Returns:
        Mean and standard deviation over seeds, and trained numbers.
    """
    return ", ".join(f"{name} {spread(run.accuracy)} ({run.size:,})" for name, run in fitted.items())


def vits() -> dict[str, ViT]:
    """A small ViT with its class token, the mean of the patches, or GGeM with a group a head.

    The last LayerNorm makes half of the entries negative; the plain GGeM cuts them off, the signed one pools
    both parts.
    """
    sizes = {"image": (28, 28), "patch": 4, "channels": 1, "layers": 4, "width": 64, "heads": 4}
    pools: dict[str, Any] = {"class token": "cls", "average": "mean", "GGeM(4)": GGeM(4)}
    pools["GGeM(4), signed"] = GGeM(4, signed=True)
    return {
        name: ViT(**sizes, mlp_width=128, classes=10, pool=pool, scan=False) for name, pool in pools.items()
    }


def vit_images(data: Path, seeds: int) -> Maps:
    """MNIST for the ViT: every seed learns from the same images.

    Args:
        data: as from `data_folder`.
        seeds: number of trainings.

    Returns:
        Images [n, 28, 28, 1] in -1 to 1 in place of tokens.
    """
    counts = {"train": VIT_IMAGES, "test": VIT_JUDGED}
    with np.load(data / FILES[2]) as file:
        x, y = ([jnp.asarray(file[f"{a}_{part}"][:n]) for part, n in counts.items()] for a in ("x", "y"))
    x = [images[..., None].astype(jnp.float32) / 127.5 - 1 for images in x]
    y = [labels.astype(jnp.int32) for labels in y]
    return Maps([x[0]] * seeds, [y[0]] * seeds, x[1], y[1], x[1], y[1])


def vit_claims(data: Path, seeds: int, seed: int) -> list[Claim]:
    """GGeM is not worse than the average in a ViT that is trained whole.

    Args:
        data: as from `data_folder`.
        seeds: number of trainings.
        seed: of the first one.

    Returns:
        The claims about both forms.
    """
    images = vit_images(data, seeds)
    found = {name: fit(model, images, VIT_RECIPE, seed) for name, model in vits().items()}

    def claim(name: str, text: str) -> Claim:
        gain = found[name].accuracy - found["average"].accuracy
        error = gain.std(ddof=1) / len(gain) ** 0.5
        exponents = np.mean([np.asarray(params["pool"]["p"]) for params in found[name].params], 0)
        return Claim(
            text,
            f"{name} - average at least -0.5 points, mean of {seeds} seeds (same start, same batches), "
            f"{VIT_IMAGES:,} digits, {VIT_RECIPE.steps} steps of {VIT_RECIPE.batch}",
            f"{gain.mean():+.2f} ± {error:.2f} points ({table(found)}; exponents from 3 to "
            f"{', '.join(f'{p:.2f}' for p in exponents)})",
            bool(gain.mean() >= -0.5),
        )

    return [
        claim("GGeM(4)", "In a 4-layer ViT, a power mean a head is not worse than the average."),
        claim("GGeM(4), signed", "It is not when it pools positive and negative parts apart."),
    ]


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Compares poolings on frozen features and in a ViT.

    Args:
        folder: where the plot and the converted weights are written.
        quick: limits and derivatives, and features of a random network.
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
    claims = [cifar_claim(data, model, variables)]
    maps = mnist_maps(data, model, variables, SEEDS, seed)
    claims += theory_claims(maps.test[:200])
    recipe = Recipe(STEPS, RATE)
    found = {name: fit(probe, maps, recipe, seed) for name, probe in probes().items()}
    plot = bars(folder / "ggem.svg", found, f"1,000 MNIST digits, frozen ResNet-20, {SEEDS} seeds")
    gain = found["GGeM(16)"].accuracy - found["average"].accuracy
    exponents = np.concatenate([np.asarray(params["pool"]["p"]) for params in found["GGeM(16)"].params])
    tuned, rates = {}, {}
    for name in ("average", "max", "GGeM(16)", "average, no LayerNorm"):
        rates[name] = best_rate(probes()[name], maps, recipe, seed)
        tuned[name] = fit(probes()[name], maps, recipe._replace(rate=rates[name]), seed)
    own = tuned["GGeM(16)"].accuracy - tuned["average"].accuracy
    claims += [
        Claim(
            "On 1,000 labelled digits, 16 power means of frozen features are better than the average.",
            f"GGeM(16) - average at least 2 points, mean of {SEEDS} seeds, AdamW {STEPS:,} steps at {RATE:g}",
            f"{gain.mean():+.1f} ± {gain.std(ddof=1):.1f} points ({table(found)}; exponents from 3 to "
            f"{exponents.min():.2f} .. {exponents.max():.2f})",
            bool(gain.mean() >= 2),
        ),
        Claim(
            "They are when each has the learning rate that is best for it on other images, too.",
            f"GGeM(16) - average at least 1 point, mean of {SEEDS} seeds",
            f"{own.mean():+.1f} ± {own.std(ddof=1):.1f} points ("
            + ", ".join(f"{name} {spread(run.accuracy)} at {rates[name]:g}" for name, run in tuned.items())
            + ")",
            bool(own.mean() >= 1),
        ),
        *vit_claims(data, SEEDS, seed),
    ]
    return Proof("ggem", tuple(claims), False, (plot,))


def _quick(folder: Path, seed: int) -> Proof:
    maps = digits_maps(seed)
    names = ("average", "max", "GGeM(16)")
    found = {name: fit(probes()[name], maps, Recipe(200, 1e-2), seed) for name in names}
    plot = bars(folder / "ggem.svg", found, "scikit-learn's digits, random network")
    least = min(run.accuracy.min() for run in found.values())
    claims = [
        *theory_claims(maps.test),
        Claim(
            "What a random network sees in digits is enough for a linear classifier, however it is pooled.",
            "all above 50 %, chance is 10 %",
            table(found),
            bool(least > 50),
        ),
    ]
    return Proof("ggem", tuple(claims), True, (plot,))
