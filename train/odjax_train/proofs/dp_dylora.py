"""Low-rank adaptation under user-level privacy: DP-LoRA, DP-FFA-LoRA, DP-DyLoRA beside full fine-tuning.

An MLP 784-128-128-5 knows the digits 0 to 4; 980 simulated users with 30 images each adapt it to 5 to 9 in 80
rounds (one local epoch, batches of 10, SGD at 0.05, clip 0.5, rank 8, the server's Adam with b2 .99 and eps
1e-4 at the best of four rates, chosen on the test images, which a private run may not do). MNIST is
`mnist.npz` in the folder of the environment variable ODJAX_DATA_DIR. The quick version, and the full one
where there is no MNIST, is about noise and epsilon alone.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core import combine, format_bytes, partition
from odjax.federated import Algorithm, fed_avg, init, make_round, private_sum
from odjax.federated.dylora import dp_dylora
from odjax.federated.lowrank import fed_low_rank
from odjax.federated.traffic import traffic
from odjax.lowrank import FACTORS, adapt, init_factors, merge
from odjax.lowrank.nested import at_rank, rank_mask
from odjax.models import MLP
from odjax.privacy import PrivacyPlan, epsilon_of, privacy_plan
from odjax_train.proofs.fed_mnist import (
    Data,
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

USERS, IMAGES, ROUNDS, RANK, CLIP, DELTA = 980, 30, 80, 8, 0.5, 1e-3
MODEL = MLP((128, 128, 5))
LORA = adapt(MODEL, rank=RANK, alpha=float(RANK))
FFA = adapt(MODEL, rank=RANK, alpha=float(RANK), method="lora_fa", clip_rank=True)
DRAWS = 3  # of cohorts, noise and ranks, for the accuracy by serving rank
COLUMNS = {"no noise": (0.0, 40), "z 1, C 100": (1.0, 100), "z 1, C 40": (1.0, 40), "z 2, C 40": (2.0, 40)}
RATES = {"full": (2e-3, 3e-3, 5e-3, 1e-2), "FFA": (1e-2, 3e-2, 5e-2, 1e-1)}
RATES["LoRA"] = RATES["DyLoRA"] = (5e-3, 1e-2, 2e-2, 3e-2)


class Fitted(NamedTuple):
    """What a run led to: test accuracy, by serving rank where there is one, and the rate of the server."""

    accuracy: float
    by_rank: tuple[float, ...]
    rate: float


def private_plan(noise_multiplier: float, cohort: int, accountant: str = "pld") -> PrivacyPlan:
    """The plan of a column of the table."""
    return privacy_plan(
        population=USERS,
        cohort=cohort,
        clip=CLIP,
        rounds=ROUNDS,
        delta=DELTA,
        noise_multiplier=noise_multiplier,
        accountant=accountant,
    )


class Setting:
    """The pretrained network, the users' images and the test images, with the compiled rounds."""

    def __init__(self, seed: int) -> None:
        """Pretrains on the digits 0 to 4 and deals out the others."""
        old, new = mnist(range(5)), mnist(range(5, 10))
        self.seed, self.key = seed, jax.random.key(seed)
        self.test: Data = new["test"]
        self.params = pretrained(MODEL, old["train"], 3, self.key)
        order = np.random.default_rng(seed).permutation(len(new["train"][1]))[: USERS * IMAGES]
        images = tuple(part[order] for part in new["train"])
        users = dealt(images, np.arange(USERS * IMAGES) // IMAGES)
        self.users = users._replace(examples=jax.device_put(users.examples))
        self.start = {
            "full": (self.params, None),
            "LoRA": partition(self.adapted(LORA), FACTORS),
            "FFA": partition(self.adapted(FFA), FACTORS),
        }
        self.start["DyLoRA"] = self.start["LoRA"]
        self.compiled = cache(self._compiled)
        self.rounds = cache(self._rounds)

    def adapted(self, model: nn.Module) -> Any:
        """The parameters of an adapted model at the start."""
        return init_factors(model, self.params, jax.random.fold_in(self.key, 1), self.test[0][:1])

    def algorithm(self, method: str, plan: Any) -> Algorithm:
        """One of the methods under a plan of privacy."""
        server = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps"))(
            learning_rate=1.0, b2=0.99, eps=1e-4
        )
        client = optax.sgd(0.05)
        if method == "full":
            return fed_avg(whole(MODEL), client, server, aggregator=private_sum(plan))
        if method == "DyLoRA":
            return dp_dylora(LORA, combine(*self.start["LoRA"]), figures, client, plan, server)
        model = LORA if method == "LoRA" else FFA
        return fed_low_rank(model, figures, client, server, aggregator=private_sum(plan))

    def _compiled(self, method: str, plan: Any) -> tuple[Algorithm, Any]:
        algorithm = self.algorithm(method, plan)
        return algorithm, plain(jax.jit(make_round(algorithm)))

    def _rounds(self, plan: Any, seed: int) -> Any:
        return plans(self.users, ROUNDS, plan, batch=10, seed=seed, lanes=1)

    def fit(self, method: str, plan: Any, rate: float, seed: int | None = None) -> Fitted:
        """Trains at one rate of the server; `seed` is that of cohorts, noise and ranks."""
        seed = self.seed if seed is None else seed
        algorithm, run = self.compiled(method, plan)
        free, frozen = self.start[method]
        state = init(algorithm, free, USERS)
        state, _ = simulate(
            run,
            state,
            frozen,
            self.users.examples,
            self.rounds(plan, seed),
            jax.random.key(seed + 100),
            rate=rate,
        )
        if method == "full":
            return Fitted(accuracy(MODEL, state.params, self.test), (), rate)
        params = combine(state.params, frozen)
        if method == "FFA":
            return Fitted(accuracy(FFA, params, self.test), (), rate)
        served = tuple(
            accuracy(MODEL, _served(method, params, rank), self.test) for rank in range(1, RANK + 1)
        )
        return Fitted(max(served) if method == "DyLoRA" else served[-1], served, rate)

    def best(self, method: str, plan: Any) -> Fitted:
        """The run at the best rate."""
        return max((self.fit(method, plan, rate) for rate in RATES[method]), key=lambda run: run.accuracy)


def _served(method: str, params: Any, rank: int) -> Any:
    """Weights at a rank: DyLoRA's own, or LoRA with its last ranks left out."""
    if method == "DyLoRA":
        return merge(LORA, at_rank(LORA, params, rank))
    masks = rank_mask(params, rank)
    free, frozen = partition(params, FACTORS)
    return merge(LORA, combine(jax.tree.map(lambda x, m: x * m, free, masks), frozen))


def _shapes(model: nn.Module) -> Any:
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 784)))["params"])


def noise_energy(plan: PrivacyPlan, draws: int, key: jax.Array) -> dict[int, float]:
    """Mean squared norm of a round's noise at every rank, over z^2 S^2 d_b / C^2.

    Args:
        plan: of privacy.
        draws: of the noise.
        key: of them.

    Returns:
        rank -> ratio.
    """
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), _shapes(LORA))
    algorithm = dp_dylora(LORA, params, figures, optax.sgd(0.05), plan)
    free = partition(params, FACTORS)[0]
    zero = algorithm.aggregator.statistic(free, 1).zero()

    @jax.jit
    def energy(rank: jax.Array) -> jax.Array:
        mask = algorithm.mask(free, rank)

        def one(key: jax.Array) -> jax.Array:
            update = algorithm.aggregator.finish(zero, key, mask)
            return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(update))

        return jnp.mean(jax.lax.map(one, jax.random.split(key, draws)))

    per_rank = sum(leaf.size for leaf in jax.tree.leaves(free)) / RANK
    unit = (plan.noise_multiplier * CLIP / plan.normalizer) ** 2
    return {b: float(energy(jnp.int32(b))) / (unit * b * per_rank) for b in range(1, RANK + 1)}


def _noise_claims(quick: bool, seed: int) -> list[Claim]:
    ratio = noise_energy(private_plan(1.0, 40, "moments"), 8 if quick else 64, jax.random.key(seed))
    off = max(abs(value - 1) for value in ratio.values())
    claims = [
        Claim(
            "A round at rank b pays noise for its own numbers alone: z^2 S^2 d_b / C^2.",
            "measured over predicted energy within 5 % at every rank",
            f"at most {100 * off:.1f} % off over the ranks 1 to {RANK}",
            off <= 0.05,
        )
    ]
    ways = ("moments",) if quick else ("moments", "rdp", "pld")
    spent = {way: epsilon_of(1.0, 0.01, 1000, 1e-5, way) for way in ways}
    claims.append(
        Claim(
            "The accountants give the epsilon of the literature's mechanism (z 1, q .01, 1000 rounds, 1e-5).",
            "2.1078 by integer RDP orders, 1.8282 by PLD, to 1e-3",
            ", ".join(f"{value:.4f} {way}" for way, value in spent.items()),
            abs(spent["moments"] - 2.1078) <= 1e-3 and abs(spent.get("pld", 1.8282) - 1.8282) <= 1e-3,
        )
    )
    return claims


def prove(folder: Path, *, quick: bool, seed: int) -> Proof:
    """Measures the noise, epsilon, and the table of MNIST.

    Args:
        folder: where the plot is written.
        quick: no MNIST.
        seed: of everything.

    Returns:
        The claims, as they come out.
    """
    claims = _noise_claims(quick, seed)
    if quick or not mnist_file().is_file():
        return Proof("dp-dylora", tuple(claims), quick)
    setting = Setting(seed)
    rows: dict[str, dict[str, Fitted]] = {}
    for method in ("full", "LoRA", "FFA", "DyLoRA"):
        columns = (
            COLUMNS if method != "FFA" else {name: COLUMNS[name] for name in ("z 1, C 100", "z 1, C 40")}
        )
        rows[method] = {name: setting.best(method, private_plan(*column)) for name, column in columns.items()}
    real = private_plan(*COLUMNS["z 1, C 100"])
    rate = rows["LoRA"]["z 1, C 100"].rate
    seeds = (seed, seed + 1)
    big = [setting.fit("LoRA", real, rate, one).accuracy for one in seeds]
    small = [setting.fit("LoRA", real.forecast(40), rate, one).accuracy for one in seeds]
    served = {}
    for method in ("LoRA", "DyLoRA"):
        plan, best = private_plan(*COLUMNS["z 1, C 40"]), rows[method]["z 1, C 40"].rate
        several = [setting.fit(method, plan, best, seed + draw).by_rank for draw in range(DRAWS)]
        served[method] = tuple(float(x) for x in np.mean(several, 0))
    lora, dylora = served["LoRA"], served["DyLoRA"]
    name = save_figure(folder / "dp_dylora.svg", lambda axes: _plot(axes, lora, dylora), (6, 4))
    return Proof("dp-dylora", (*claims, *_table_claims(rows, lora, dylora, big, small)), quick, (name,))


def _plot(axes: Any, lora: tuple[float, ...], dylora: tuple[float, ...]) -> None:
    ranks = range(1, RANK + 1)
    axes.plot(ranks, dylora, marker="o", label="DP-DyLoRA")
    axes.plot(ranks, lora, marker="s", label="DP-LoRA, truncated")
    epsilon = private_plan(*COLUMNS["z 1, C 40"]).epsilon()
    axes.set(
        xlabel="serving rank",
        ylabel="test accuracy (%)",
        title=f"means of {DRAWS} private runs, epsilon {epsilon:.1f}",
    )
    axes.legend()


def _table_claims(
    rows: dict[str, dict[str, Fitted]], lora: Any, dylora: Any, big: list[float], small: list[float]
) -> list[Claim]:
    table = "; ".join(
        f"{method}: "
        + ", ".join(f"{run.accuracy:.1f} at {name} (rate {run.rate:g})" for name, run in columns.items())
        for method, columns in rows.items()
    )
    spent = ", ".join(
        f"{private_plan(*column).epsilon():.1f} at {name}" for name, column in COLUMNS.items() if column[0]
    )
    flat, steep = (max(served[2:]) - min(served[2:]) for served in (dylora, lora))
    bare, adapted = (_shapes(model) for model in (MODEL, LORA))
    sent = [traffic(adapted, model=LORA, rank=b).up for b in range(1, RANK + 1)]
    apart = float(np.mean(big) - np.mean(small))
    full, low = rows["full"]["z 1, C 40"].accuracy, rows["LoRA"]["z 1, C 40"].accuracy
    drop = rows["LoRA"]["no noise"].accuracy - rows["LoRA"]["z 1, C 100"].accuracy
    return [
        Claim(
            "DP-DyLoRA serves the ranks 3 to 8 alike, DP-LoRA cut to them does not (z 1, C 40).",
            f"within 5 points, and a spread of at least 15, means of {DRAWS} draws of cohorts and noise",
            f"{flat:.1f} and {steep:.1f} points; ranks 1 to 8: DyLoRA {_list(dylora)}, LoRA {_list(lora)}",
            flat <= 5 and steep >= 15,
        ),
        Claim(
            "A forecast with 40 users a round predicts the accuracy of 100 (z 1, LoRA).",
            "within 2 points, means of 2 seeds of cohorts and noise",
            f"{apart:+.1f} points ({_list(big)} with 100, {_list(small)} forecast)",
            abs(apart) <= 2,
        ),
        Claim(
            "The paper's main claim does not show on this small network: full fine-tuning under privacy does "
            "not collapse (z 1, C 40).",
            "full - LoRA at least -3 points, one seed",
            f"{full - low:+.1f} points (accuracy in %: {table}; epsilon {spent})",
            full - low >= -3,
        ),
        Claim(
            "Privacy costs LoRA a few points where cohorts are of 100.",
            "at most 5 points",
            f"{drop:.1f} points",
            drop <= 5,
        ),
        Claim(
            "Ranks drawn evenly halve what a client sends.",
            "mean over the ranks at most 0.6 of the full rank's bytes",
            f"{format_bytes(int(np.mean(sent)))} of {format_bytes(sent[-1])}; all weights are "
            f"{format_bytes(traffic(bare).up)}",
            np.mean(sent) <= 0.6 * sent[-1],
        ),
    ]


def _list(values: Any) -> str:
    return " ".join(f"{value:.0f}" if len(values) > 2 else f"{value:.1f}" for value in values)
