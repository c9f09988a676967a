"""The federated engine: what its rounds converge to, how well lanes are packed, and non-IID MNIST.

8,000 images of MNIST are dealt out to 400 clients of 20 images with two shards of labels each; an MLP
784-64-10 is trained for 100 rounds with cohorts of 40, one local epoch of SGD at 0.1 in batches of 10. MNIST
is `mnist.npz` in the folder of the environment variable ODJAX_DATA_DIR. The quick version, and the full one
where there is no MNIST, is about fixed points, packing and epsilon alone.
"""

import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.federated import (
    Algorithm,
    efficiency,
    fed_avg,
    fed_avgm,
    group_by_client,
    init,
    label_shards,
    make_round,
    pack_chunks,
    pack_lanes,
    plan_round,
    private_sum,
    scaffold,
)
from odjax.models import MLP
from odjax.privacy import PrivacyPlan, privacy_plan
from odjax_train.proofs.fed_mnist import (
    accuracy,
    dealt,
    mnist,
    mnist_file,
    plain,
    plans,
    simulate,
    whole,
)
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim, Proof

CLIENTS, COHORT, ROUNDS, BATCH, RATE = 400, 40, 100, 10, 0.1
SEEDS = (0, 1, 2, 3)


def private_plan(cohort: int, rounds: int = ROUNDS) -> PrivacyPlan:
    """z = 1, clip 0.5, delta 1e-3 for the population of the proof."""
    return privacy_plan(
        population=CLIENTS, cohort=cohort, clip=0.5, rounds=rounds, delta=1e-3, noise_multiplier=1.0
    )


def algorithms(model: nn.Module) -> dict[str, tuple[Algorithm, Any]]:
    """name -> (algorithm, its cohort: a number or a private plan)."""
    loss, client = whole(model), optax.sgd(RATE)
    adam = optax.adam(1e-2, b2=0.99, eps=1e-3)
    near, far = private_plan(COHORT), private_plan(100)
    return {
        "FedAvg": (fed_avg(loss, client), COHORT),
        "FedAvgM": (fed_avg(loss, client, fed_avgm(0.5, 0.7)), COHORT),
        "FedAdam": (fed_avg(loss, client, adam), COHORT),
        "SCAFFOLD": (scaffold(loss, RATE), COHORT),
        "DP-FedAvg": (fed_avg(loss, client, aggregator=private_sum(near)), near),
        "DP-FedAdam": (fed_avg(loss, client, adam, aggregator=private_sum(near)), near),
        "DP-FedAvg, q = .25": (fed_avg(loss, client, aggregator=private_sum(far)), far),
    }


def table(path: Path, rounds: int, seed: int) -> dict[str, float]:
    """Test accuracy of every algorithm.

    Args:
        path: of MNIST.
        rounds: how many.
        seed: of everything.

    Returns:
        name -> per cent.
    """
    x, y = mnist(path=path)["train"]
    clients = dealt((x[:8000], y[:8000]), label_shards(y[:8000], CLIENTS, 2, seed))
    model, key = MLP((64, 10)), jax.random.key(seed)
    params = nn.unbox(model.init(key, x[:1])["params"])
    found = {}
    for name, (algorithm, cohort) in algorithms(model).items():
        run = plain(jax.jit(make_round(algorithm)))
        several = plans(clients, rounds, cohort, batch=BATCH, seed=seed, lanes=1, uniform=name == "SCAFFOLD")
        state = init(algorithm, params, CLIENTS)
        state, _ = simulate(run, state, None, clients.examples, several, key)
        found[name] = accuracy(model, state.params, (x[8000:10000], y[8000:10000]))
    return found


def fixed_points(rounds: int, steps: int) -> tuple[float, float, float]:
    """How far FedAvg and SCAFFOLD end from where theory puts them, on quadratics 0.5 h (theta - b)^2.

    FedAvg: sum w q b / sum w q with q = 1 - (1 - eta h)^K; SCAFFOLD: the minimizer, sum h b / sum h.

    Args:
        rounds: how many, all clients in each.
        steps: K.

    Returns:
        (error of FedAvg, error of SCAFFOLD, distance between the two points).
    """
    h, b = np.array([0.5, 1.0, 4.0, 8.0]), np.array([-1.0, 2.0, 0.5, 3.0])
    rate = 0.05
    data = {"h": np.repeat(h, steps).astype(np.float32), "b": np.repeat(b, steps).astype(np.float32)}
    clients = group_by_client(data, np.repeat(np.arange(4), steps))

    def loss(params: Any, shared: Any, batch: Any, mask: jax.Array, key: jax.Array) -> Any:
        counts = mask.astype(jnp.float32)
        error = 0.5 * batch["h"] * jnp.square(params - batch["b"])
        return {"loss": (jnp.sum(counts * error), jnp.sum(counts))}

    q = 1 - (1 - rate * h) ** steps
    biased, best = np.sum(q * b) / np.sum(q), np.sum(h * b) / np.sum(h)
    ends = []
    for algorithm in (fed_avg(loss, optax.sgd(rate)), scaffold(loss, rate)):
        run = jax.jit(make_round(algorithm))
        state = init(algorithm, jnp.zeros(()), 4)
        for t in range(rounds):
            plan = plan_round(clients, range(4), t, batch=1, seed=0, uniform=True)
            state, _ = run(state, clients.examples, plan, jax.random.key(0))
        ends.append(float(state.params))
    return abs(ends[0] - biased), abs(ends[1] - best), abs(biased - best)


def cohort_steps() -> np.ndarray:
    """Local steps of 50 clients with log-normal numbers of examples; 339 in total, the longest has 28."""
    examples = np.random.default_rng(0).lognormal(np.log(40), 1.0, 50)
    return np.maximum(1, np.rint(examples / BATCH)).astype(np.int64)


def round_times(repeats: int) -> dict[str, float]:
    """Milliseconds of a round of those clients, MLP 784-100-10, the fastest of some.

    Args:
        repeats: how many.

    Returns:
        strategy and lanes -> milliseconds.
    """
    owner = np.repeat(np.arange(50), BATCH * cohort_steps())
    random = np.random.default_rng(0)
    x = random.normal(size=(len(owner), 784)).astype(np.float32)
    clients = group_by_client({"x": x, "y": random.integers(0, 10, len(owner), np.int32)}, owner)
    model = MLP((100, 10))
    algorithm = fed_avg(whole(model), optax.sgd(RATE))
    params = nn.unbox(model.init(jax.random.key(0), x[:1])["params"])
    data, run = jax.device_put(clients.examples), jax.jit(make_round(algorithm))
    found = {}
    for name, strategy, lanes in (
        ("1 lane", "lanes", 1),
        ("2 lanes", "lanes", 2),
        ("10 lanes", "lanes", 10),
        ("chunks of 10", "chunks", 10),
        ("all padded", "chunks", 50),
    ):
        plan = plan_round(
            clients, range(50), 0, batch=BATCH, seed=0, lanes=lanes, strategy=strategy, bucket=1
        )
        times = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            jax.block_until_ready(
                run(init(algorithm, params, 50), data, jax.device_put(plan), jax.random.key(0))
            )
            times.append(time.perf_counter() - begin)
        found[name] = 1000 * min(times[1:])
    return found


def _packing_claims(quick: bool) -> list[Claim]:
    steps = cohort_steps()
    lanes = {n: efficiency(pack_lanes(steps, n)) for n in (2, 5, 10)}
    padding, blocks = efficiency(pack_chunks(steps, 50)), efficiency(pack_chunks(steps, 10))
    claims = [
        Claim(
            "Lanes are packed nearly full where clients differ log-normally (50 clients, 339 steps, at most "
            "28 each).",
            "efficiency at least 0.98 in 2, 5 and 10 lanes; at most 0.25 padded to the longest client",
            f"{', '.join(f'{value:.3f} in {n} lanes' for n, value in lanes.items())}; padded {padding:.3f}, "
            f"in sorted blocks of 10 {blocks:.3f}",
            min(lanes.values()) >= 0.98 and padding <= 0.25,
        )
    ]
    if not quick:
        times = round_times(10)
        fast = min(times[name] for name in times if "lane" in name)
        slow = min(times["chunks of 10"], times["all padded"])
        claims.append(
            Claim(
                "A round in lanes takes less time than a padded one (MLP 784-100-10, these clients).",
                "the fastest number of lanes below the faster of two ways of padding",
                "times of one lane: "
                + ", ".join(f"{name} {ms / times['1 lane']:.2f}" for name, ms in times.items()),
                fast < slow,
            )
        )
    return claims


def _theory_claims(quick: bool) -> list[Claim]:
    average, controlled, apart = fixed_points(150 if quick else 400, 5)
    claims = [
        Claim(
            "On quadratics of clients FedAvg ends at the point that its local steps bias it to.",
            "error at most 1e-5",
            f"{average:.1e}, the minimizer is {apart:.2f} away",
            average <= 1e-5 < apart,
        ),
        Claim(
            "SCAFFOLD ends at the minimizer of their sum.",
            "error at most 1e-4",
            f"{controlled:.1e}",
            controlled <= 1e-4,
        ),
    ]
    rows = ((40, 4.8), (100, 13.8))
    spent = {cohort: private_plan(cohort).epsilon() for cohort, _ in rows}
    claims.append(
        Claim(
            "100 rounds at z = 1 and delta = 1e-3 cost what the PLD accountant said before.",
            "epsilon 4.8 for q = .1 and 13.8 for q = .25, to 0.05",
            ", ".join(f"{value:.3f} for q = {cohort / CLIENTS:g}" for cohort, value in spent.items()),
            all(abs(spent[cohort] - value) <= 0.05 for cohort, value in rows),
        )
    )
    return claims


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures fixed points, packing, epsilon and the table of MNIST.

    Args:
        folder: where the plot is written.
        quick: no MNIST and no times.
        seed: the first of the seeds of the table.

    Returns:
        The claims, as they come out.
    """
    claims = [*_theory_claims(quick), *_packing_claims(quick)]
    if quick or not mnist_file().is_file():
        return Proof("fed-engine", tuple(claims), quick)
    rows = [table(mnist_file(), ROUNDS, seed + one) for one in SEEDS]
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    shown = ", ".join(f"{name} {value:.1f} %" for name, value in mean.items())

    def plot(axes: Any) -> None:
        axes.barh(list(mean)[::-1], list(mean.values())[::-1])
        axes.set(
            xlabel="test accuracy (%)",
            xlim=(70, 100),
            title=f"non-IID MNIST, {CLIENTS} clients, {ROUNDS} rounds of {COHORT}",
        )

    name = save_figure(folder / "fed_engine.svg", plot, (7, 3.5))
    gain = mean["FedAdam"] - mean["FedAvg"]
    prices = [row["FedAvg"] - row["DP-FedAvg"] for row in rows]
    price = float(np.mean(prices))
    claims += [
        Claim(
            "On non-IID MNIST FedAdam beats FedAvg.",
            f"at least 2 points, means of {len(SEEDS)} seeds",
            f"{gain:+.1f} points ({shown})",
            gain >= 2,
        ),
        Claim(
            "User-level privacy at an epsilon near 5 costs some points, with only 400 clients.",
            f"FedAvg - DP-FedAvg 3 to 6 points, means of {len(SEEDS)} seeds",
            f"{price:.1f} points at epsilon {private_plan(COHORT).epsilon():.2f} (by seed "
            f"{', '.join(f'{one:.1f}' for one in prices)})",
            3 <= price <= 6,
        ),
    ]
    return Proof("fed-engine", tuple(claims), quick, (name,))
