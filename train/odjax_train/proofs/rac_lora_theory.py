"""What RAC-LoRA's theorems say, measured: descent, linear rate, the price of rank, and where LoRA stops.

Everything in float64, on quadratics whose constants are known, through the public transform.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.lowrank import lift, project, rac_lora, sketch
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof

Loss = Callable[[jax.Array], jax.Array]

# Section 3 of the paper: f(w) = w^T M w + b^T w with w in R^9, M = diag(10, 1, ..., 1), b = (1, ..., 1).
CURVATURE = np.array([10.0, *[1.0] * 8]).reshape(3, 3)
SMOOTH = 20.0
OPTIMUM = -1 / (2 * CURVATURE)
LOWEST = -np.sum(1 / (4 * CURVATURE))


def counter_example(w: jax.Array) -> jax.Array:
    """f(W) - f* of the paper's counter-example.

    Args:
        w: [3, 3].

    Returns:
        The gap, 0 at `OPTIMUM`.
    """
    return jnp.sum(CURVATURE * w * w) + jnp.sum(w) - LOWEST


def rank_one_floor() -> float:
    """A bound below f - f* at every matrix of rank 1: the smallest curvature times sigma_2(W*)^2.

    f(W) - f* = <W - W*, M (W - W*)> >= |W - W*|_F^2, and no rank-1 matrix is nearer (Eckart and Young).
    """
    return float(np.linalg.svd(OPTIMUM)[1][1] ** 2)


def descend(
    loss: Loss,
    start: jax.Array,
    rank: int,
    rate: float,
    steps: int,
    key: jax.Array,
    side: str = "left",
    **more: Any,
) -> jax.Array:
    """The losses W^0 .. W^steps of one projected gradient step per block.

    Args:
        loss: of a matrix.
        start: W^0.
        rank: of the sketches.
        rate: gamma.
        steps: how many.
        key: of the sketches.
        side: of the sketches.
        **more: for `rac_lora`.

    Returns:
        [steps + 1].
    """
    options = {"key": key, "side": side, "scale": "orthonormal", "where": "w", **more}
    optimizer = rac_lora(optax.sgd(rate), rank, options.pop("block_steps", 1), **options)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        value, gradient = jax.value_and_grad(lambda p: loss(p["w"]))(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    params = {"w": start}
    (last, _), values = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
    return jnp.append(values, loss(last["w"]))


def train_both(
    loss: Loss, start: jax.Array, rate: float, steps: int, restart: int, key: jax.Array
) -> jax.Array:
    """The losses of a chain of LoRA of rank 1, both factors trained; LoRA where `restart` is `steps`.

    Args:
        loss: of a matrix.
        start: W^0.
        rate: of gradient descent on both factors.
        steps: in all.
        restart: steps between two merges.
        key: of the random factors.

    Returns:
        [steps], after every step.
    """

    def block(w: jax.Array, key: jax.Array) -> Any:
        factors = (jnp.zeros((w.shape[0], 1)), jax.random.normal(key, (1, w.shape[1])))

        def step(factors: Any, _: None) -> Any:
            gradient = jax.grad(lambda f: loss(w + f[0] @ f[1]))(factors)
            a, b = jax.tree.map(lambda z, g: z - rate * g, factors, gradient)
            return (a, b), loss(w + a @ b)

        (a, b), values = jax.lax.scan(step, factors, None, length=restart)
        return w + a @ b, values

    return jax.lax.scan(block, start, jax.random.split(key, steps // restart))[1].reshape(-1)


def counter_example_gaps(seeds: int, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The last gaps of every method on the counter-example, with step 1 / L from W = 0.

    Args:
        seeds: draws of the sketches.
        steps: in all.
        seed: of the draws.

    Returns:
        method -> [seeds]; not finite where it diverged.
    """
    keys, start, rate = jax.random.split(jax.random.key(seed), seeds), jnp.zeros((3, 3)), 1 / SMOOTH
    runs = {
        "LoRA": partial(train_both, counter_example, start, rate, steps, steps),
        "COLA, K = 10": partial(train_both, counter_example, start, rate, steps, 10),
        "Asymmetric LoRA": partial(descend, counter_example, start, 1, rate, steps, block_steps=steps),
        "RAC-LoRA": partial(descend, counter_example, start, 1, rate, steps),
    }
    # Only the key is mapped, and the last loss kept.
    return {
        name: np.asarray(jax.jit(jax.vmap(lambda key, run=run: run(key=key)[-1]))(keys))
        for name, run in runs.items()
    }


def quadratic(inputs: int, outputs: int, condition: float, seed: int) -> tuple[Loss, jax.Array]:
    """f(W) = <W - W*, H (W - W*)> / 2 with eigenvalues of H from 1 / condition to 1, and f(0) = 1.

    Args:
        inputs: rows.
        outputs: columns.
        condition: L / mu; L = 1.
        seed: of H's eigenvectors and W*.

    Returns:
        (f, W^0 = 0).
    """
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(inputs * outputs,) * 2))[0]
    hessian = jnp.asarray(basis * np.linspace(1 / condition, 1, inputs * outputs) @ basis.T)
    best = rng.normal(size=inputs * outputs)
    best = jnp.asarray(best / np.sqrt(best @ np.asarray(hessian) @ best / 2))
    return lambda w: (w.reshape(-1) - best) @ hessian @ (w.reshape(-1) - best) / 2, jnp.zeros(
        (inputs, outputs)
    )


def federated_error(clients: int, seed: int) -> float:
    """Largest difference between the mean of merged clients and one merge of the mean factor.

    Args:
        clients: how many, each with its own factor of the server's sketch.
        seed: of the factors.

    Returns:
        The difference over the largest weight.
    """
    rng = np.random.default_rng(seed)
    w, factors = jnp.asarray(rng.normal(size=(12, 8))), jnp.asarray(rng.normal(size=(clients, 12, 2)))
    q = sketch(jax.random.key(seed), 0, "w", 8, 2, "gaussian", jnp.float64)
    mean = jnp.mean(jax.vmap(lambda z: w + lift(q, z, "left"))(factors), 0)
    once = w + lift(q, jnp.mean(factors, 0), "left")
    return float(jnp.abs(mean - once).max() / jnp.abs(once).max())


def worst_descent(loss: Loss, start: jax.Array, smooth: float, steps: int, key: jax.Array) -> float:
    """The largest f(W+) - f(W) + gamma/2 <G, H G> along a walk with gamma = 1 / L; the lemma says at most 0.

    Args:
        loss: L-smooth.
        start: W^0.
        smooth: L.
        steps: how many.
        key: of the sketches.

    Returns:
        The largest violation.
    """
    dim = start.shape[1]

    def step(w: jax.Array, t: jax.Array) -> Any:
        q, g = sketch(key, t, "w", dim, 1, dtype=w.dtype, scale="orthonormal"), jax.grad(loss)(w)
        z = project(q, g, "left")
        after = w - lift(q, z, "left") / smooth
        return after, loss(after) - loss(w) + jnp.sum(z * z) / (2 * smooth)

    return float(jnp.max(jax.lax.scan(step, start, jnp.arange(steps))[1]))


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures what the theorems predict.

    Args:
        folder: where the plot is written.
        quick: fewer seeds and ranks.
        seed: of the problems and sketches.

    Returns:
        The claims.
    """
    with jax.enable_x64(True):
        return _prove(folder, quick, seed)


def _prove(folder: Path, quick: bool, seed: int) -> Proof:
    seeds, inputs, outputs, condition = (8, 8, 6, 12.6) if quick else (40, 20, 15, 12.6)
    loss, start = quadratic(inputs, outputs, condition, seed)
    ranks = (1, 3) if quick else (1, 2, 5, 10, 15)
    curves, counts = {}, {}
    for side, dim in (("left", outputs), ("right", inputs)):
        for rank in ranks:
            steps = int(1.2 * condition * np.log(1000) * dim / rank)
            keys = jax.random.split(jax.random.key(seed), seeds)
            run = partial(descend, loss, start, rank, 1.0, steps, side=side)
            curve = np.asarray(jax.jit(jax.vmap(lambda key, run=run: run(key=key)))(keys)).mean(0)
            curves[side, rank] = curve
            counts[side, rank] = float(np.argmax(curve <= 1e-3) * rank / dim)
    dims = {"left": outputs, "right": inputs}
    bound = max(
        float(np.max(curve / (1 - rank / dims[side] / condition) ** np.arange(len(curve))))
        for (side, rank), curve in curves.items()
    )
    gaps = counter_example_gaps(20, 1000 if quick else 4000, seed)
    worst = worst_descent(loss, start, 1.0, 50 if quick else 500, jax.random.key(seed))
    federated = federated_error(7, seed)

    def plot(axes: Any) -> None:
        for (side, rank), curve in curves.items():
            at = np.arange(len(curve)) * rank / dims[side]
            axes.semilogy(at, curve, color="C0" if side == "left" else "C1", lw=1, alpha=0.7)
        longest = np.linspace(0, 1.2 * condition * np.log(1000), 50)
        axes.semilogy(longest, np.exp(-longest / condition), "k--", lw=1)
        axes.set(
            xlabel="iterations × rank / dim",
            ylabel="mean of f - f* over the first gap",
            title="all ranks, left (blue), right (orange), and the bound (dashed)",
        )

    name = save_figure(folder / "rac_lora_theory.svg", plot)
    floor = rank_one_floor()
    stuck = [np.nanmin(np.where(np.isfinite(gaps[m]), gaps[m], np.nan)) for m in ("LoRA", "Asymmetric LoRA")]
    diverged = int(np.sum(~(gaps["COLA, K = 10"] < 1e6)))
    low, high = min(counts.values()), max(counts.values())
    claims = (
        Claim(
            "Every projected step descends: f(W+) <= f(W) - gamma/2 <G, H G>.",
            "largest violation below 1e-12",
            f"{worst:.1e}",
            worst < 1e-12,
        ),
        Claim(
            "The mean gap is below (1 - gamma mu r/d)^T of the first, for every rank and side.",
            "largest ratio to the bound at most 1",
            f"{bound:.3f} ({len(curves)} curves, {seeds} seeds)",
            bound <= 1 + 1e-9,
        ),
        Claim(
            "Iterations to a thousandth of the gap, times r/d, do not depend on rank or side.",
            "largest / smallest below 1.15",
            f"{high / low:.3f} ({low:.1f} to {high:.1f})",
            high / low < 1.15,
        ),
        Claim(
            "On the counter-example LoRA and a frozen sketch stop above the rank-1 floor.",
            f"smallest gap of 20 seeds at least {floor:.3f}",
            f"LoRA {stuck[0]:.3f}, Asymmetric LoRA {stuck[1]:.3f}",
            min(stuck) >= floor - 1e-12,
        ),
        Claim(
            "A chain of LoRA with ten steps of 1 / L a block diverges there.",
            "20 of 20 seeds",
            f"{diverged} of 20 seeds",
            diverged == 20,
        ),
        Claim(
            "RAC-LoRA reaches the optimum there.",
            "largest gap of 20 seeds below 1e-12",
            f"{gaps['RAC-LoRA'].max():.1e}",
            bool(gaps["RAC-LoRA"].max() < 1e-12),
        ),
        Claim(
            "Averaging the factors of clients that share a sketch is exact.",
            "relative difference below 1e-14",
            f"{federated:.1e}",
            federated < 1e-14,
        ),
    )
    return Proof("rac-lora-theory", claims, quick, (name,))
