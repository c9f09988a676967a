"""Sparse training of perceptrons: CHTs beside dense, static masks, SET, RigL and its own deterministic rules.

The paper's experiment is an MLP on MNIST with 1 % of the links in its hidden layers; here with 20,000
training images and 20 epochs instead of 60,000 and 100. MNIST is `mnist.npz` in the folder of the environment
variable ODJAX_DATA_DIR. The quick version, and the full one where there is no MNIST, trains an MLP on
scikit-learn's digits at 98 %.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.models import MLP
from odjax.sparse import (
    DstState,
    chts,
    compress,
    compressed_model,
    csti_mask,
    live_units,
    restrict_wiring,
    rigl,
    set_,
    static,
    swi,
    to_bcsr,
    uniform,
    unpack,
    wiring_of,
)
from odjax.sparse.plans import Plan
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof

Data = tuple[jax.Array, jax.Array]
BATCH = 64
WIDTHS = (784, 784, 784, 10)
EPOCHS, IMAGES, RATE, DECAY = 20, 20_000, 0.05, 5e-4
HARD = {"removal_rule": "hard", "regrowth_rule": "top"}


class Run(NamedTuple):
    """What a training leaves.

    Attributes:
      accuracy: on the test images, per cent.
      active: share of the hidden neurons of sparse layers with links on both sides, per cent.
      overlap: mean over changes and layers of the share of new links that had just been removed.
      params: the parameters.
      masks: {path: bool mask}, empty for dense training.
    """

    accuracy: float
    active: float
    overlap: float
    params: Any
    masks: dict[str, jax.Array]


def _accuracy(model: MLP, params: Any, data: Data) -> jax.Array:
    named = jnp.argmax(model.apply({"params": params}, data[0]), -1) == data[1]
    return 100 * jnp.mean(named.astype(jnp.float32))


def _epochs(
    model: MLP, optimizer: Any, train: Data, steps: int
) -> Callable[[Any, jax.Array], tuple[Any, Any]]:
    """`(parameters and state, key) -> (the same after some steps, overlaps)`, one shuffled pass or less."""
    x, y = train

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, x[rows])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]))

    def step(carry: Any, rows: jax.Array) -> tuple[Any, Any]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), getattr(state, "overlap", {})

    def epoch(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        order = jax.random.permutation(key, x.shape[0])[: steps * BATCH].reshape(steps, BATCH)
        return jax.lax.scan(step, carry, order)

    return epoch


def _unpacked(state: Any, plan: Plan) -> dict[str, jax.Array]:
    return {path: unpack(state.masks[path], leaf.shape) for path, leaf in plan.items()}


def mnist(path: Path) -> dict[str, Data]:
    """MNIST: images [n, 784] in 0..1 and labels, IMAGES for training and all for testing."""
    with np.load(path) as file:
        found = {}
        for part, count in (("train", IMAGES), ("test", None)):
            x, y = file[f"x_{part}"][:count], file[f"y_{part}"][:count]
            found[part] = (jnp.asarray(x.reshape(-1, 784), jnp.float32) / 255, jnp.asarray(y, jnp.int32))
    return found


def _mnist_methods(steps: int) -> dict[str, tuple[str, Callable[..., Any]]]:
    """name -> (topology at the start, optimizer of (inner, plan, key, masks))."""
    # After the last epoch links stay: new ones could not learn any more.
    changes = {"interval": steps, "zeta": 0.3, "end": (EPOCHS - 1) * steps}
    ours = {
        **changes,
        "adaptive_zeta": False,
        "temperature": (1.0, 3.0),
        "wiring": restrict_wiring(
            wiring_of(MLP(WIDTHS)), dict.fromkeys(f"dense_{i}/kernel" for i in range(3))
        ),
    }
    return {
        "dense": ("dense", lambda inner, plan, **_: inner),
        "static, CSTI": ("CSTI", static),
        "SET, ER": ("ER", partial(set_, **changes)),
        "SET, CSTI": ("CSTI", partial(set_, **changes)),
        "RigL, ER": ("ER", partial(rigl, **changes)),
        "hard and top, CSTI": ("CSTI", partial(chts, **{**ours, **HARD, "temperature": 1.0})),
        "CHTs, ER": ("ER", partial(chts, **ours)),
        "CHTs, CSTI": ("CSTI", partial(chts, **ours)),
    }


def mnist_run(name: str, data: dict[str, Data], seeds: int, epochs: int = EPOCHS) -> list[Run]:
    """Trains the MLP with 1 % of the links in its three hidden layers, once a seed.

    Args:
        name: of a method, a key of `_mnist_methods`.
        data: as `mnist` gives it.
        seeds: how many runs.
        epochs: of each.

    Returns:
        The runs.
    """
    model, (x, _) = MLP(WIDTHS), data["train"]
    steps = x.shape[0] // BATCH
    start, method = _mnist_methods(steps)[name]
    shapes = jax.eval_shape(model.init, jax.random.key(0), x[:1])["params"]
    plan = uniform(shapes, 0.99, where="dense_[012]/kernel")
    schedule = optax.linear_schedule(RATE, 0.0, epochs * steps)
    inner = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(schedule, momentum=0.9))
    correlated = csti_mask(x, (784, 784), 0.01) if start == "CSTI" else None
    wiring = restrict_wiring(wiring_of(model), plan)
    runs, epoch = [], None
    for seed in range(seeds):
        key = jax.random.key(seed)
        masks = None if correlated is None else dict.fromkeys(plan, correlated)
        optimizer = method(inner, plan, key=key, masks=masks)
        params = model.init(jax.random.fold_in(key, 1), x[:1])["params"]
        state = optimizer.init(params)
        if isinstance(state, DstState):
            for i, (path, mask) in enumerate(_unpacked(state, plan).items()):
                draw = jax.random.fold_in(key, 100 + i)
                params[path.split("/")[0]]["kernel"] = swi(mask)(draw, mask.shape)
            state = state._replace(inner=inner.init(params))
        # The key of a method is in its state, so one compiled epoch serves all seeds.
        epoch = epoch or jax.jit(_epochs(model, optimizer, data["train"], steps), donate_argnums=0)
        carry, overlaps = (params, state), []
        for i in range(epochs):
            carry, seen = epoch(carry, jax.random.fold_in(key, 1000 + i))
            if i < epochs - 1:
                overlaps += [float(jnp.mean(value[-1])) for value in seen.values()]
        params, state = carry
        sparse = _unpacked(state, plan) if isinstance(state, DstState) else {}
        alive = [float(jnp.mean(units)) for units in live_units(sparse, wiring)] if sparse else [1.0]
        runs.append(
            Run(
                float(_accuracy(model, params, data["test"])),
                100 * float(np.mean(alive)),
                float(np.mean(overlaps)) if overlaps else 0.0,
                params,
                sparse,
            )
        )
    return runs


def compressed(run: Run, data: Data) -> tuple[float, float, float, tuple[int, ...]]:
    """The run's network without its dead neurons, and as compressed rows.

    Args:
        run: a sparse one.
        data: to judge it by.

    Returns:
        (accuracy of the smaller dense network in per cent, its time over that of the whole one, the time of
        compressed rows over that of a dense product in the first layer, both for 64 images on this machine;
        its widths).
    """
    model = MLP(WIDTHS)
    small = compress(run.params, run.masks, wiring_of(model))
    smaller = compressed_model(model, small.sizes)
    x = data[0][:BATCH]
    kernel = run.params["dense_0"]["kernel"]
    rows = to_bcsr(kernel.T, run.masks["dense_0/kernel"].T)
    ratio = _ratio(
        jax.jit(lambda x: smaller.apply({"params": small.params}, x)),
        jax.jit(lambda x: model.apply({"params": run.params}, x)),
        x,
    )
    sparse = _ratio(jax.jit(lambda x: (rows @ x.T).T), jax.jit(lambda x: x @ kernel), x)
    return float(_accuracy(smaller, small.params, data)), ratio, sparse, tuple(smaller.features)


def _ratio(one: Callable[..., Any], other: Callable[..., Any], x: jax.Array, rounds: int = 200) -> float:
    """Median time of one over that of the other, measured in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (one, other):
        jax.block_until_ready(function(x))
    for _ in range(rounds):
        for function, seen in zip((one, other), times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(function(x))
            seen.append(time.perf_counter() - begin)
    return float(np.median(times[0]) / np.median(times[1]))


def digits() -> dict[str, Data]:
    """scikit-learn's digits: 1300 to train on, 497 to test, after a fixed shuffle."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    x = jnp.asarray(raw.data[order] / 16, jnp.float32)
    y = jnp.asarray(raw.target[order], jnp.int32)
    return {"train": (x[:1300], y[:1300]), "test": (x[1300:], y[1300:])}


def digits_table(
    names: tuple[str, ...], seeds: int, sparsity: float = 0.98
) -> dict[str, tuple[float, float]]:
    """Means over seeds of an MLP 64-128-128-10 whose first two layers are sparse from random links.

    Args:
        names: of "static", "SET", "RigL", "hard and top", "CHTs".
        seeds: how many, all at once.
        sparsity: of the two layers.

    Returns:
        name -> (test accuracy in per cent, mean overlap of removed and new links).
    """
    data, model = digits(), MLP((128, 128, 10))
    steps, end = 20, 450
    shapes = jax.eval_shape(model.init, jax.random.key(0), data["train"][0][:1])["params"]
    plan = uniform(shapes, sparsity, where="dense_[01]/kernel")
    changes = {"interval": 20, "end": end}
    ours = {**changes, "temperature": (1.0, 3.0), "wiring": wiring_of(model)}
    methods = {
        "static": static,
        "SET": partial(set_, zeta=optax.cosine_decay_schedule(0.3, end), **changes),
        "RigL": partial(rigl, **changes),
        "hard and top": partial(chts, **{**ours, **HARD, "temperature": 1.0}),
        "CHTs": partial(chts, **ours),
    }

    def train(key: jax.Array, method: Callable[..., Any]) -> tuple[jax.Array, jax.Array]:
        optimizer = method(optax.adam(3e-3), plan, key=key)
        params = model.init(jax.random.fold_in(key, 1), data["train"][0][:1])["params"]
        carry = (params, optimizer.init(params))
        epoch = _epochs(model, optimizer, data["train"], steps)
        keys = jax.random.split(jax.random.fold_in(key, 2), 30)
        with jax.numpy_dtype_promotion("standard"):
            (params, _), overlaps = jax.lax.scan(epoch, carry, keys)
        changed = jnp.stack([value[: end // steps, -1] for value in overlaps.values()])
        return _accuracy(model, params, data["test"]), jnp.mean(changed)

    keys = jax.random.split(jax.random.key(0), seeds)
    found = {}
    for name in names:
        accuracy, overlap = jax.jit(jax.vmap(partial(train, method=methods[name])))(keys)
        found[name] = (float(jnp.mean(accuracy)), float(jnp.mean(overlap)))
    return found


def _digits_claims(quick: bool) -> list[Claim]:
    names = ("hard and top", "CHTs") if quick else ("static", "SET", "RigL", "hard and top", "CHTs")
    # Single seeds scatter by two points: few of them tell overlaps apart, but not accuracies.
    seeds = 2 if quick else 16
    found = digits_table(names, seeds)
    shown = ", ".join(f"{name} {value:.2f} %" for name, (value, _) in found.items())
    soft, hard = found["CHTs"], found["hard and top"]
    claims = [
        Claim(
            "Deterministic rules take back what they removed, soft ones explore (digits, 98 % sparsity).",
            "share of new links that had just been removed: above 0.6 and below 0.4",
            f"{hard[1]:.2f} and {soft[1]:.2f}",
            hard[1] > 0.6 and soft[1] < 0.4,
        )
    ]
    if not quick:
        claims.append(
            Claim(
                "Soft rules beat deterministic ones on digits at 98 % sparsity.",
                f"CHTs - hard and top at least 0 points, means of {seeds} seeds",
                f"{soft[0] - hard[0]:+.2f} points ({shown})",
                soft[0] >= hard[0],
            )
        )
    return claims


def _mnist_claims(
    rows: dict[str, list[Run]], small: tuple[float, float, float, tuple[int, ...]]
) -> list[Claim]:
    mean = {name: float(np.mean([run.accuracy for run in runs])) for name, runs in rows.items()}
    overlap = {name: runs[0].overlap for name, runs in rows.items()}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in mean.items())
    ours = mean["CHTs, CSTI"]
    accuracy, ratio, sparse, widths = small
    first = rows["CHTs, CSTI"][0]
    return [
        Claim(
            "CHTs from correlated links beats SET from random ones on MNIST with 1 % of the links.",
            "at least 1 point, means of 2 seeds",
            f"{ours - mean['SET, ER']:+.2f} points (test accuracy in %: {shown})",
            ours - mean["SET, ER"] >= 1,
        ),
        Claim(
            "From the same links it beats SET and links that stay where they are.",
            "above 0 points over each, means of 2 seeds",
            f"{ours - mean['SET, CSTI']:+.2f} and {ours - mean['static, CSTI']:+.2f} points",
            ours > mean["SET, CSTI"] and ours > mean["static, CSTI"],
        ),
        Claim(
            "It is as good as the dense network (the paper: 98.76 and 98.78 after 100 epochs).",
            "dense - CHTs at most 0.1 points",
            f"{mean['dense'] - ours:+.2f} points",
            mean["dense"] - ours <= 0.1,
        ),
        Claim(
            "Deterministic rules take back what they removed, soft ones explore.",
            "share of new links that had just been removed: above 0.8 and below 0.2",
            f"{overlap['hard and top, CSTI']:.2f} and {overlap['CHTs, CSTI']:.2f}",
            overlap["hard and top, CSTI"] > 0.8 and overlap["CHTs, CSTI"] < 0.2,
        ),
        Claim(
            "Neurons fall out by themselves (the paper: 70 to 80 % of them after 100 epochs).",
            "below 90 % active with CHTs, above 99 % with SET from random links",
            ", ".join(f"{name} {runs[0].active:.0f} %" for name, runs in rows.items()),
            first.active < 90 and rows["SET, ER"][0].active > 99,
        ),
        Claim(
            "Without its dead neurons the network is smaller, and the same.",
            "accuracy equal to 0.01 points, narrower layers",
            f"{accuracy:.2f} and {first.accuracy:.2f} %, widths {widths}, {ratio:.2f} of the time; as "
            f"compressed rows the first layer takes {sparse:.2f} of the time (batch {BATCH})",
            abs(accuracy - first.accuracy) < 0.01 and sum(widths) < sum(WIDTHS),
        ),
    ]


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures CHTs beside other methods on MNIST and on digits.

    Args:
        folder: where the plot is written.
        quick: digits alone, with few seeds.
        seed: not used: the seeds are part of the experiment.

    Returns:
        The claims, as they come out.
    """
    claims = _digits_claims(quick)
    path = Path(os.environ.get("ODJAX_DATA_DIR", ".")) / "mnist.npz"
    if quick or not path.is_file():
        return Proof("chts", tuple(claims), quick)
    data = mnist(path)
    twice = ("static, CSTI", "SET, ER", "SET, CSTI", "CHTs, CSTI")
    rows = {}
    for name in _mnist_methods(IMAGES // BATCH):
        rows[name] = mnist_run(name, data, 2 if name in twice else 1)
        print(name, [f"{run.accuracy:.2f} % ({run.active:.0f} % active)" for run in rows[name]], flush=True)
    claims += _mnist_claims(rows, compressed(rows["CHTs, CSTI"][0], data["test"]))

    def plot(axes: Any) -> None:
        names = list(rows)[::-1]
        axes.barh(names, [np.mean([run.accuracy for run in rows[name]]) for name in names])
        axes.set(xlabel="test accuracy (%)", title="MNIST, 1 % of the links, 20 epochs", xlim=(94, 99))

    return Proof("chts", tuple(claims), quick, (save_figure(folder / "chts.svg", plot, (7, 4)),))
