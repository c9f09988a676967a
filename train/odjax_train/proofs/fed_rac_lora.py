"""Fed-RAC-LoRA: a chain of sketched updates across clients, beside federated LoRA, FFA-LoRA and all weights.

An MLP 784-64-64-5 knows the digits 0 to 4; 580 clients with 50 images and two shards of labels each adapt it
to 5 to 9 at rank 2, in rounds of 20 clients with one local epoch of Adam in batches of 10, at the best of
four rates (chosen on the test images, alike for all). MNIST is `mnist.npz` in the folder of the environment
variable ODJAX_DATA_DIR. The quick version, and the full one where there is no MNIST, is about the mean of
clients and about bytes alone, on random images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core import combine, format_bytes, leaves_with_paths, partition
from odjax.federated import Clients, fed_avg, init, label_shards, make_round, plan_round
from odjax.federated.lowrank import chain_round, fed_low_rank
from odjax.federated.traffic import Traffic, traffic
from odjax.lowrank import FACTORS, adapt, init_factors, merge
from odjax.models import MLP
from odjax_train.proofs.fed_mnist import (
    accuracy,
    dealt,
    figures,
    mnist,
    mnist_file,
    plain,
    plans,
    pretrained,
    simulate,
    whole,
)
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof

CLIENTS, IMAGES, COHORT, ROUNDS, BATCH, RANK = 580, 50, 20, 60, 10, 2
MODEL = MLP((64, 64, 5))
ADAPTED = {
    "LoRA": adapt(MODEL, rank=RANK),
    "FFA": adapt(MODEL, rank=RANK, method="lora_fa"),
    "RAC left": adapt(MODEL, rank=RANK, method="rac", side="left"),
    "RAC right": adapt(MODEL, rank=RANK, method="rac", side="right"),
}
RATES = (3e-3, 1e-2, 3e-2, 1e-1)


class Fitted(NamedTuple):
    """Test accuracy in per cent, the rate of the clients, the parameters at the end (None for "full")."""

    accuracy: float
    rate: float
    params: Any


def started(method: str, params: Any, key: jax.Array) -> Any:
    """The parameters of an adapted model from those of the bare one."""
    return init_factors(ADAPTED[method], params, key, jnp.zeros((1, 784)))


def fit(method: str, params: Any, clients: Clients, rounds: Any, test: Any, rate: float, key: Any) -> Fitted:
    """Adapts the network in rounds.

    Args:
        method: "full" or one of the adapted models.
        params: of the bare network.
        clients: their images.
        rounds: the plans.
        test: images to be judged on.
        rate: of the clients' Adam.
        key: of the run.

    Returns:
        What it led to.
    """
    client = optax.adam(rate)
    if method == "full":
        algorithm = fed_avg(whole(MODEL), client)
        run, free, frozen = plain(jax.jit(make_round(algorithm))), params, None
    else:
        model = ADAPTED[method]
        algorithm = fed_low_rank(model, figures, client)
        free, frozen = partition(started(method, params, key), FACTORS)
        chain = method.startswith("RAC")
        run = jax.jit(chain_round(model, algorithm)) if chain else plain(jax.jit(make_round(algorithm)))
    state = init(algorithm, free, clients.count)
    state, frozen = simulate(run, state, frozen, clients.examples, rounds, key)
    if method == "full":
        return Fitted(accuracy(MODEL, state.params, test), rate, None)
    adapted = combine(state.params, frozen)
    return Fitted(accuracy(MODEL, merge(ADAPTED[method], adapted), test), rate, adapted)


def aggregation_gap(method: str, params: Any, clients: Clients, ids: Sequence[int], key: jax.Array) -> float:
    """How far the model of the mean factors is from the mean of the clients' models after a round.

    Args:
        method: one of the adapted models.
        params: of the adapted model, at the start of the round.
        clients: their images.
        ids: the cohort.
        key: of the round.

    Returns:
        The distance over the length of the mean change, all kernels together.
    """
    model = ADAPTED[method]
    algorithm = fed_low_rank(model, figures, optax.adam(RATES[0]))
    run = jax.jit(make_round(algorithm))
    free, frozen = partition(params, FACTORS)

    def kernels(state: Any) -> list[np.ndarray]:
        merged = merge(model, combine(state.params, frozen))
        return [np.asarray(x, np.float64) for path, x in leaves_with_paths(merged) if path.endswith("kernel")]

    plan = plan_round(clients, ids, 0, batch=BATCH, seed=0, epochs=3, uniform=True)

    def after(cohort: Sequence[int]) -> list[np.ndarray]:
        # All train, and those who weigh nothing have no influence.
        part = plan._replace(weight=np.where(np.isin(plan.client, list(cohort)), plan.weight, 0))
        return kernels(run(init(algorithm, free, clients.count), clients.examples, part, key, frozen)[0])

    begin, together = kernels(init(algorithm, free, clients.count)), after(ids)
    alone = [np.mean(several, 0) for several in zip(*(after([i]) for i in ids), strict=True)]

    def length(a: list[np.ndarray], b: list[np.ndarray]) -> float:
        return float(np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(a, b, strict=True))))

    return length(together, alone) / length(alone, begin)


def bytes_of(missed: int, sketches: str = "seed") -> dict[str, Traffic]:
    """Bytes of a client and round by method, for a client that was last there `missed` rounds ago."""

    def shapes(model: nn.Module) -> Any:
        return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 784)))["params"])

    found = {"full": traffic(shapes(MODEL))}
    for name, model in ADAPTED.items():
        found[name] = traffic(shapes(model), model=model, missed=missed, sketches=sketches)
    return found


def _exact_claim(params: Any, clients: Clients, key: jax.Array, trained: Any) -> Claim:
    ids = range(5)
    gaps = {name: aggregation_gap(name, started(name, params, key), clients, ids, key) for name in ADAPTED}
    gaps["LoRA"] = aggregation_gap("LoRA", trained, clients, ids, key)
    exact = max(gap for name, gap in gaps.items() if name != "LoRA")
    return Claim(
        "The mean factor is the mean model where one half is frozen, and is not where both are trained.",
        "distance over the mean change: below 1e-5 for FFA and RAC, above 1e-3 for LoRA",
        ", ".join(f"{gap:.1e} {name}" for name, gap in gaps.items()),
        exact < 1e-5 and gaps["LoRA"] > 1e-3,
    )


def _bytes_claim() -> Claim:
    every, seldom, arrays = bytes_of(1), bytes_of(CLIENTS // COHORT), bytes_of(1, "array")
    shown = "; ".join(
        f"{name} {format_bytes(t.up)} up, {format_bytes(t.down)} down"
        + (
            f" ({format_bytes(arrays[name].down)} with arrays, {format_bytes(seldom[name].down)} for one of "
            f"{CLIENTS // COHORT} rounds)"
            if name.startswith("RAC")
            else ""
        )
        for name, t in every.items()
    )
    left, lora = every["RAC left"], every["LoRA"]
    return Claim(
        "A chain sends less than LoRA, and seeds in place of sketches cost next to nothing; but a client "
        "that missed rounds has their factors to fetch.",
        "RAC below LoRA up and down in every round; 12 bytes a matrix for the seeds",
        shown,
        left.up < lora.up
        and left.down < lora.down
        and every["RAC right"].down - every["FFA"].down == 36
        and seldom["RAC left"].down > lora.down,
    )


def _random_clients(seed: int) -> Clients:
    random = np.random.default_rng(seed)
    x = random.uniform(size=(5 * 20, 784)).astype(np.float32)
    return dealt((x, random.integers(0, 5, len(x), np.int32)), np.repeat(np.arange(5), 20))


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures the exactness of the mean, bytes, and the table of MNIST.

    Args:
        folder: where the plot is written.
        quick: random images alone.
        seed: of everything.

    Returns:
        The claims, as they come out.
    """
    key = jax.random.key(seed)
    if quick or not mnist_file().is_file():
        params = nn.unbox(MODEL.init(key, jnp.zeros((1, 784)))["params"])
        trained = started("LoRA", params, key)
        noise = jax.tree.map(lambda x: 0.1 * jax.random.normal(key, x.shape), partition(trained, FACTORS)[0])
        free, frozen = partition(trained, FACTORS)
        trained = combine(jax.tree.map(jnp.add, free, noise), frozen)
        with jax.numpy_dtype_promotion("standard"):  # of optax's Adam
            exact = _exact_claim(params, _random_clients(seed), key, trained)
        claims = (exact, _bytes_claim())
        return Proof("fed-rac-lora", claims, quick)
    old, new = mnist(range(5)), mnist(range(5, 10))
    params = pretrained(MODEL, old["train"], 3, key)
    rows = np.random.default_rng(seed).permutation(len(new["train"][1]))[: CLIENTS * IMAGES]
    x, y = (part[rows] for part in new["train"])
    clients = dealt((x, y), label_shards(y, CLIENTS, 2, seed))
    several = plans(clients, ROUNDS, COHORT, batch=BATCH, seed=seed, lanes=1)
    best = {
        method: max(
            (fit(method, params, clients, several, new["test"], rate, key) for rate in RATES),
            key=lambda run: run.accuracy,
        )
        for method in ("full", *ADAPTED)
    }
    found = {name: run.accuracy for name, run in best.items()}
    sent = {name: t.up for name, t in bytes_of(1).items()}

    def plot(axes: Any) -> None:
        for name, value in found.items():
            axes.plot(sent[name] / 1e3, value, "o")
            axes.annotate(name, (sent[name] / 1e3, value), textcoords="offset points", xytext=(6, -3))
        axes.set(
            xscale="log",
            xlabel="kB a client sends in a round",
            ylabel="test accuracy (%)",
            title=f"digits 5 to 9, {ROUNDS} rounds of {COHORT} of {CLIENTS} clients",
        )

    name = save_figure(folder / "fed_rac_lora.svg", plot, (6, 4))
    shown = ", ".join(f"{name} {value:.1f} % (rate {best[name].rate:g})" for name, value in found.items())
    gain, loss = found["RAC right"] - found["FFA"], found["LoRA"] - found["RAC left"]
    return Proof(
        "fed-rac-lora",
        (
            _exact_claim(params, clients, key, best["LoRA"].params),
            _bytes_claim(),
            Claim(
                "A fresh sketch in every round beats a frozen one at the same bytes up.",
                f"RAC right - FFA at least 5 points after {ROUNDS} rounds, one seed",
                f"{gain:+.1f} points ({shown})",
                gain >= 5,
            ),
            Claim(
                "A chain of sketches on the output side keeps up with federated LoRA.",
                "LoRA - RAC left at most 1 point after as many rounds, one seed",
                f"{loss:+.1f} points with {100 * (1 - sent['RAC left'] / sent['LoRA']):.0f} % fewer bytes up",
                loss <= 1,
            ),
        ),
        quick,
        (name,),
    )
