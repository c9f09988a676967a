"""The paper's MNIST experiment: a network that knows the digits 0 to 4 is adapted to 5 to 9 at rank 1.

An MLP 784-64-64-5 is trained on the first five digits, then adapted to the other five with frozen biases:
LoRA, a chain of LoRA (COLA), one frozen sketch (Asymmetric LoRA), RAC-LoRA, and full fine-tuning. MNIST is
`mnist.npz` in the folder of the environment variable ODJAX_DATA_DIR. The quick version, and the full one
where there is no MNIST, counts the iterations that projected descent takes on scikit-learn's digits.
"""

import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.lowrank import rac_lora
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof

Params = dict[str, dict[str, jax.Array]]
Data = tuple[jax.Array, jax.Array]
WIDTHS = (784, 64, 64, 5)
BATCH, RATE, DECAY, DROPOUT = 128, 2e-4, 0.01, 0.1
DRAWS = 3  # of sketches and order; one frozen sketch alone varies by several points from draw to draw
LAYERS = tuple(f"layer_{i}" for i in range(len(WIDTHS) - 1))


def mnist(path: Path) -> dict[str, Data]:
    """MNIST in halves: images [n, 784] in 0..1 and labels 0..4.

    Args:
        path: of the npz file with x_train, y_train, x_test, y_test.

    Returns:
        "train 0", "test 0" (digits 0 to 4), "train 1", "test 1" (digits 5 to 9, labels less five).
    """
    halves = {}
    with np.load(path) as file:
        for part, half in itertools.product(("train", "test"), (0, 1)):
            x, y = file[f"x_{part}"], file[f"y_{part}"].astype(np.int32)
            rows = y // 5 == half
            x = x[rows].reshape(-1, 784).astype(np.float32) / 255
            halves[f"{part} {half}"] = (jnp.asarray(x), jnp.asarray(y[rows] - 5 * half))
    return halves


def init(key: jax.Array) -> Params:
    """He initialisation of the MLP."""
    keys = jax.random.split(key, len(LAYERS))
    return {
        name: {
            "kernel": jax.random.normal(k, shape) * jnp.float32((2 / shape[0]) ** 0.5),
            "bias": jnp.zeros(shape[1]),
        }
        for name, k, shape in zip(LAYERS, keys, itertools.pairwise(WIDTHS), strict=True)
    }


def logits(params: Params, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """x [n, 784] -> [n, 5]; with a key, hidden units are dropped."""
    for i, name in enumerate(LAYERS):
        x = x @ params[name]["kernel"] + params[name]["bias"][None]
        if i < len(LAYERS) - 1:
            x = jax.nn.relu(x)
            if key is not None:
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - DROPOUT, x.shape)
                x = jnp.where(kept, x / (1 - DROPOUT), 0.0)
    return x


def accuracy(params: Params, data: Data) -> float:
    """Per cent of the digits named rightly."""
    return 100 * float(jnp.mean((jnp.argmax(logits(params, data[0]), -1) == data[1]).astype(jnp.float32)))


def _loss(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x, key), y))


def _merge(kernels: Any, factors: Any) -> Any:
    return {name: kernels[name] + factors[name]["a"] @ factors[name]["b"] for name in kernels}


def _with(params: Params, kernels: dict[str, jax.Array]) -> Params:
    return {name: {**params[name], "kernel": kernels[name]} for name in params}


def train(
    free: Any, weights: Callable[[Any], Params], optimizer: Any, data: Data, epochs: int, key: jax.Array
) -> tuple[Any, Any]:
    """Trains whatever is free in whole epochs of shuffled batches.

    Args:
        free: what is trained.
        weights: the network's parameters from what is trained.
        optimizer: of optax.
        data: images and labels.
        epochs: how many.
        key: of the order and of dropout.

    Returns:
        What was trained.
    """
    x, y = data
    steps = x.shape[0] // BATCH

    @jax.jit
    def epoch(carry: Any, key: jax.Array) -> Any:
        order = jax.random.permutation(key, x.shape[0])[: steps * BATCH].reshape(steps, BATCH)

        def step(carry: Any, item: Any) -> Any:
            free, state = carry
            rows, key = item
            gradient = jax.grad(lambda free: _loss(weights(free), x[rows], y[rows], key))(free)
            updates, state = optimizer.update(gradient, state, free)
            return (optax.apply_updates(free, updates), state), None

        return jax.lax.scan(step, carry, (order, jax.random.split(key, steps)))[0]

    carry = (free, optimizer.init(free))
    for i in range(epochs):
        carry = epoch(carry, jax.random.fold_in(key, i))
    return carry[0]


def chain_of_lora(
    params: Params, data: Data, epochs: int, side: str, key: jax.Array, restart: int
) -> tuple[Params, int]:
    """LoRA with both factors trained, merged and begun anew every `restart` epochs (once: LoRA).

    Args:
        params: where it starts.
        data: to adapt to.
        epochs: in all.
        side: "left" begins with random output factors and zero input factors, "right" the other way round.
        key: of the factors and batches.
        restart: epochs between two restarts.

    Returns:
        The adapted parameters and how many numbers were trained at a time.
    """
    kernels = {name: params[name]["kernel"] for name in params}
    factors: Any = {}
    for block in range(epochs // restart):
        block_key = jax.random.fold_in(key, block)
        for i, (name, w) in enumerate(kernels.items()):
            a, b = jnp.zeros((w.shape[0], 1)), jnp.zeros((1, w.shape[1]))
            drawn = partial(jax.random.normal, jax.random.fold_in(block_key, i))
            factors[name] = {"a": a, "b": drawn(b.shape)} if side == "left" else {"a": drawn(a.shape), "b": b}

        def weights(factors: Any, kernels: Any = kernels) -> Params:
            return _with(params, _merge(kernels, factors))

        factors = train(factors, weights, optax.adamw(RATE, weight_decay=DECAY), data, restart, block_key)
        kernels = _merge(kernels, factors)
    return _with(params, kernels), sum(leaf.size for leaf in jax.tree.leaves(factors))


def chain_of_sketches(
    params: Params, data: Data, epochs: int, side: Any, key: jax.Array, block_steps: int, boundary: str
) -> tuple[Params, int]:
    """RAC-LoRA through `rac_lora`; Asymmetric LoRA where the block is never over.

    Args:
        params: where it starts.
        data: to adapt to.
        epochs: in all.
        side: "left" or "right".
        key: of the sketches and batches.
        block_steps: updates between two sketches.
        boundary: "reset" or "keep".

    Returns:
        The adapted parameters and how many numbers were trained at a time.
    """
    inner = optax.chain(optax.scale_by_adam(), optax.scale(-RATE))
    optimizer = rac_lora(
        *(inner, 1, block_steps), key=key, side=side, law="gaussian", on_boundary=boundary, where=".*"
    )
    kernels = {name: params[name]["kernel"] for name in params}
    size = sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(kernels).factors[0].mu))
    return _with(params, train(kernels, partial(_with, params), optimizer, data, epochs, key)), size


def table(data: dict[str, Data], epochs: int, seed: int) -> dict[str, tuple[float, int]]:
    """Accuracy on the new digits and trained numbers of every method.

    Args:
        data: as `mnist` gives it.
        epochs: of the adaptation.
        seed: of everything.

    Returns:
        "method side" -> (accuracy, mean of DRAWS but for LoRA and full, trained numbers).
    """
    key = jax.random.key(seed)
    adamw = optax.adamw(1e-3, weight_decay=DECAY)
    params = train(init(key), lambda p: p, adamw, data["train 0"], 5, jax.random.fold_in(key, 1))
    new, test = data["train 1"], data["test 1"]
    steps = new[0].shape[0] // BATCH
    rows = {"none": (accuracy(params, test), 0)}
    adamw = optax.adamw(RATE, weight_decay=DECAY)
    full = train(params, lambda p: p, adamw, new, epochs, key)
    rows["full"] = (accuracy(full, test), sum(leaf.size for leaf in jax.tree.leaves(params)))
    for side in ("right", "left"):
        runs = {
            "LoRA": partial(chain_of_lora, restart=epochs),
            "COLA": partial(chain_of_lora, restart=2),
            "Asym": partial(chain_of_sketches, block_steps=10**9, boundary="keep"),
            "RAC": partial(chain_of_sketches, block_steps=2 * steps, boundary="reset"),
        }
        for name, run in runs.items():
            found = []
            for draw in range(1 if name == "LoRA" else DRAWS):
                adapted, size = run(params, new, epochs, side, jax.random.fold_in(key, 2 + draw))
                found.append(accuracy(adapted, test))
            rows[f"{name} {side}"] = (sum(found) / len(found), size)
    for boundary in ("reset", "keep"):
        adapted, size = chain_of_sketches(params, new, 20, "left", key, 20, boundary)
        rows[f"RAC left, K = 20, {boundary}"] = (accuracy(adapted, test), size)
    return rows


def digits_iterations(ranks: dict[str, tuple[int, ...]], seed: int) -> dict[str, float]:
    """Iterations of projected descent to 2 % of the first gap, times rank / dim, on scikit-learn's digits.

    Multinomial logistic regression of 1797 digits (64 pixels in 0..1 and a bias) with l2 penalty 0.01 and
    step 1 / L, L = lambda_max(X^T X / n) / 2 + 0.01.

    Args:
        ranks: the ranks to try, by side.
        seed: of the sketches.

    Returns:
        "side rank" -> iterations * rank / dim, and "descent" -> iterations of gradient descent.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = np.concatenate([raw.data / 16, np.ones((len(raw.data), 1))], 1)
    smooth = float(np.linalg.eigvalsh(x.T @ x / len(x))[-1] / 2 + 0.01)
    xs, ys = jnp.asarray(x, jnp.float32), jnp.asarray(raw.target, jnp.int32)

    def loss(w: jax.Array) -> jax.Array:
        nll = optax.softmax_cross_entropy_with_integer_labels(xs @ w, ys)
        return jnp.mean(nll) + 0.005 * jnp.sum(w * w)

    start = jnp.zeros((65, 10))
    solver = optax.lbfgs()

    def solve(carry: Any, _: None) -> tuple[Any, None]:
        w, state = carry
        value, gradient = optax.value_and_grad_from_state(loss)(w, state=state)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = solver.update(gradient, state, w, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(w, updates), state), None

    best = jax.jit(lambda w: jax.lax.scan(solve, (w, solver.init(w)), None, length=300)[0][0])(start)
    low = float(loss(best))
    target = low + 0.02 * (float(loss(start)) - low)

    def iterations(optimizer: Any) -> int:
        def more(carry: Any) -> jax.Array:
            return (carry[2] > target) & (carry[3] < 60_000)

        def step(carry: Any) -> Any:
            params, state, _, count = carry
            value, gradient = jax.value_and_grad(lambda p: loss(p["w"]))(params)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(params, updates), state, value, count + 1

        params = {"w": start}
        first = (params, optimizer.init(params), jnp.float32(jnp.inf), jnp.int32(-1))
        return int(jax.jit(lambda c: jax.lax.while_loop(more, step, c))(first)[3])

    key = jax.random.key(seed)
    result = {"descent": float(iterations(optax.sgd(1 / smooth)))}
    for side, several in ranks.items():
        for rank in several:
            optimizer = rac_lora(
                *(optax.sgd(1 / smooth), rank, 1), key=key, side=side, scale="orthonormal", where="w"
            )
            result[f"{side} {rank}"] = iterations(optimizer) * rank / (10 if side == "left" else 65)
    return result


def _digits_claim(seed: int, quick: bool) -> Claim:
    ranks = {"left": (2, 10), "right": (5, 10)} if quick else {"left": (1, 2, 5, 10), "right": (1, 2, 5, 10)}
    found = digits_iterations(ranks, seed)
    low, high = min(found.values()), max(found.values())
    return Claim(
        "On digits, iterations of projected descent times rank / dim do not depend on rank or side.",
        "largest / smallest below 1.03, gradient descent among them",
        f"{high / low:.3f} ({', '.join(f'{name}: {value:.0f}' for name, value in found.items())})",
        high / low < 1.03,
    )


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures the paper's MNIST table, and iterations on digits.

    Args:
        folder: where the plot is written.
        quick: digits alone.
        seed: of everything.

    Returns:
        The claims, as they come out.
    """
    claims = [_digits_claim(seed, quick)]
    path = Path(os.environ.get("ODJAX_DATA_DIR", ".")) / "mnist.npz"
    if quick or not path.is_file():
        return Proof("rac-lora", tuple(claims), quick)
    rows = table(mnist(path), 50, seed)
    a = {name: value for name, (value, _) in rows.items()}
    shown = ", ".join(f"{name} {value:.1f} % ({size:,})" for name, (value, size) in rows.items())

    def plot(axes: Any) -> None:
        axes.barh(list(rows)[::-1], list(a.values())[::-1])
        axes.set(xlabel="test accuracy on the digits 5 to 9 (%)", title="rank 1, 50 epochs", xlim=(0, 100))

    name = save_figure(folder / "rac_lora.svg", plot, (7, 4.5))
    for side in ("right", "left"):
        gain, loss = a[f"RAC {side}"] - a[f"Asym {side}"], a[f"COLA {side}"] - a[f"RAC {side}"]
        fewer = 1 - rows[f"RAC {side}"][1] / rows[f"COLA {side}"][1]
        claims += [
            Claim(
                f"A chain of sketches beats one frozen sketch ({side}).",
                f"RAC - Asym at least 15 points, means of {DRAWS} draws",
                f"{gain:+.1f} points ({shown})" if side == "right" else f"{gain:+.1f} points",
                gain >= 15,
            ),
            Claim(
                f"It comes within a point of a chain of LoRA with fewer trained numbers ({side}).",
                f"COLA - RAC at most 1 point, means of {DRAWS} draws",
                f"{loss:+.1f} points with {100 * fewer:.0f} % fewer",
                loss <= 1,
            ),
        ]
    resets = a["RAC left, K = 20, reset"] - a["RAC left, K = 20, keep"]
    claims += [
        Claim(
            "Sketching the output side reaches 94 %.",
            "at least 94 %",
            f"{a['RAC left']:.1f} %",
            a["RAC left"] >= 94,
        ),
        Claim(
            "Resetting the moments beats keeping them in blocks of 20 steps at this rate.",
            "reset - keep at least 1 point after 20 epochs",
            f"{resets:+.1f} points",
            resets >= 1,
        ),
    ]
    return Proof("rac-lora", tuple(claims), quick, (name,))
