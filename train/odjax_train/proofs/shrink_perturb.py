"""The warm-start gap on handwritten digits, and what shrinking and perturbing does to it.

A small MLP is trained to convergence on half of the training data, then on all of it: from where it stands
(warm), from there after shrinking and perturbing, and from a new initialisation (fresh). Many seeds run side
by side (vmap).
"""

import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.continual.shrink_perturb import shrink_perturb
from odjax.core.edits import run_edit
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof

Params = dict[str, dict[str, jax.Array]]
WIDTHS = (64, 128, 128, 10)


def digits() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """1797 digits of scikit-learn in a fixed order: x_train [897, 64], y_train, x_test [900, 64], y_test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = jnp.asarray(data.data[order] / 16.0, jnp.float32)
    y = jnp.asarray(data.target[order], jnp.int32)
    return x[:-900], y[:-900], x[-900:], y[-900:]


def init(key: jax.Array) -> Params:
    """He initialisation of the MLP."""
    keys = jax.random.split(key, len(WIDTHS) - 1)
    shapes = itertools.pairwise(WIDTHS)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(keys[i], shape) * jnp.float32((2 / shape[0]) ** 0.5),
            "bias": jnp.zeros(shape[1]),
        }
        for i, shape in enumerate(shapes)
    }


def logits(params: Params, x: jax.Array) -> jax.Array:
    """x [n, 64] -> [n, 10]."""
    for i in range(len(WIDTHS) - 1):
        x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"][None]
        x = jax.nn.relu(x) if i < len(WIDTHS) - 2 else x
    return x


def accuracy(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The share of digits named rightly."""
    return jnp.mean((jnp.argmax(logits(params, x), -1) == y).astype(jnp.float32))


def train(params: Params, x: jax.Array, y: jax.Array, rows: jax.Array, key: jax.Array, steps: int) -> Params:
    """SGD with batches of 32 from x[rows].

    Args:
        params: where it starts.
        x: [n, 64].
        y: [n].
        rows: the rows to learn from.
        key: draws the batches.
        steps: how many updates.

    Returns:
        The trained parameters.
    """
    optimizer = optax.sgd(0.1)

    def loss(params: Params, batch: jax.Array) -> jax.Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x[batch]), y[batch]))

    def step(
        carry: tuple[Params, optax.OptState], key: jax.Array
    ) -> tuple[tuple[Params, optax.OptState], None]:
        params, state = carry
        batch = rows[jax.random.randint(key, (32,), 0, rows.shape[0])]
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures test accuracy after warm, shrunk-and-perturbed, and fresh training.

    Args:
        folder: where the plot is written.
        quick: fewer seeds and updates.
        seed: of the data split, the networks and the batches.

    Returns:
        The claims, as they come out.
    """
    seeds, steps = (4, 300) if quick else (48, 3000)
    x, y, x_test, y_test = digits()
    edit = shrink_perturb(every=steps, shrink=0.4, scale=0.1, fresh=init)

    @partial(jax.jit, static_argnames="steps")
    @partial(jax.vmap, in_axes=(0, None))
    def outcome(key: jax.Array, steps: int) -> dict[str, jax.Array]:
        split, first, start, batches, again = jax.random.split(key, 5)
        rows = jax.random.permutation(split, x.shape[0])
        half = train(init(first), x, y, rows[: x.shape[0] // 2], batches, steps)
        shrunk, _ = run_edit(edit, key, steps, half, ())
        final = {
            name: train(begin, x, y, rows, again, steps)
            for name, begin in {"warm": half, "shrink-perturb": shrunk, "fresh": init(start)}.items()
        }
        scores = {name: accuracy(params, x_test, y_test) for name, params in final.items()}
        fits = {f"{name} (training)": accuracy(params, x, y) for name, params in final.items()}
        return {"half": accuracy(half, x_test, y_test), **scores, **fits}

    keys = jax.random.split(jax.random.key(seed), seeds)
    scores = {name: 100 * np.asarray(value, np.float64) for name, value in outcome(keys, steps).items()}

    def paired(a: str, b: str) -> tuple[float, float]:
        difference = scores[a] - scores[b]
        return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)

    names = ("half", "warm", "shrink-perturb", "fresh")

    def plot(axes: object) -> None:
        means = [scores[name].mean() for name in names]
        errors = [scores[name].std(ddof=1) / seeds**0.5 for name in names]
        axes.errorbar(names, means, yerr=errors, fmt="o", capsize=4)
        axes.set(ylabel="test accuracy (%), mean and its standard error", title=f"digits, {seeds} seeds")

    name = save_figure(folder / "shrink_perturb.svg", plot)
    gap, gap_error = paired("fresh", "warm")
    gain, gain_error = paired("shrink-perturb", "warm")
    rest, rest_error = paired("fresh", "shrink-perturb")
    fit = min(scores[f"{n} (training)"].mean() for n in names[1:])
    table = ", ".join(f"{n} {scores[n].mean():.2f} %" for n in names)
    claims = (
        Claim(
            "A network trained on half of the data and then on all of it generalises worse than a fresh one.",
            "fresh - warm above two standard errors",
            f"{gap:+.2f} ± {gap_error:.2f} points ({table})",
            gap > 2 * gap_error,
        ),
        Claim(
            "Shrinking and perturbing in between generalises better than the plain warm start.",
            "shrink-perturb - warm above two standard errors",
            f"{gain:+.2f} ± {gain_error:.2f} points",
            gain > 2 * gain_error,
        ),
        Claim(
            "It closes the gap to a fresh network.",
            "fresh - shrink-perturb not above two standard errors",
            f"{rest:+.2f} ± {rest_error:.2f} points",
            rest <= 2 * rest_error,
        ),
        Claim(
            "All three fit the training data equally.",
            "training accuracy above 99 %",
            f"{fit:.2f} %",
            fit > 99,
        ),
    )
    return Proof("shrink-perturb", claims, quick, (name,))
