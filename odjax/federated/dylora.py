"""LoRA across clients at a rank that the server draws for every round, and its private form.

A rank is never drawn by a client: which numbers it moved would tell about its draw, and the sum would be over
other numbers for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.core import Where, combine, fold_path, fold_step, partition
from odjax.federated.aggregate import Aggregator, private_sum, weighted_mean
from odjax.federated.algorithms import Algorithm
from odjax.federated.local import Figures, LocalStep, Shared, local_sgd
from odjax.federated.lowrank import ModelLoss
from odjax.federated.server import fed_avg as fed_avg_server

if TYPE_CHECKING:
    from odjax.lowrank import Adapted

MODES = ("nested", "frozen")


def draw_rank(
    key: jax.Array, round: int | jax.Array, largest: int, ranks: Sequence[float] | None = None
) -> jax.Array:
    """The rank that the server draws for a round: public, a function of the run's key and the round alone.

    Args:
      key: of the run, as given to the round.
      round: number of the round; may be traced.
      largest: R.
      ranks: probabilities of 1 to R; None for equal ones.

    Returns:
      int32 scalar, 1 to R.

    Raises:
      ValueError: probabilities that are not R numbers of at least 0 with a sum of 1.

    Source: Xu et al. 2024, "DP-DyLoRA", algorithm 1.

    Example:
      >>> draw_rank(jax.random.key(0), 3, 8, [0, 0, 0, 0, 1, 0, 0, 0])
      Array(5, dtype=int32)
    """
    return _drawn(fold_step(fold_path(key, "context"), round), largest, _probabilities(largest, ranks))


def _probabilities(largest: int, ranks: Sequence[float] | None) -> np.ndarray | None:
    if ranks is None:
        return None
    p = np.asarray(ranks, np.float64)
    if p.shape != (largest,) or not (p >= 0).all() or not abs(p.sum() - 1) < 1e-6:
        raise ValueError(
            f"ranks must be {largest} probabilities, of the ranks 1 to {largest}, with a sum of 1; "
            f"got {ranks!r}"
        )
    return p


def _drawn(key: jax.Array, largest: int, p: np.ndarray | None) -> jax.Array:
    if p is None:
        return jax.random.randint(key, (), 1, largest + 1, jnp.int32)
    below = jnp.asarray(np.cumsum(p / p.sum())[:-1], jnp.float32)
    return 1 + jnp.sum(jax.random.uniform(key) >= below, dtype=jnp.int32)


def fed_dylora(
    model: Adapted,
    params: Any,
    loss: ModelLoss,
    client: optax.GradientTransformation,
    server: optax.GradientTransformation | None = None,
    *,
    aggregator: Aggregator | None = None,
    ranks: Sequence[float] | None = None,
    rank: int | None = None,
    mode: str = "nested",
    trainable: Where | None = None,
) -> Algorithm:
    """LoRA at a rank that the server draws for every round; served at any rank.

    At rank b clients train the first b columns of A and rows of B; the update is (alpha / b) A[:, :b] B[:b].
    Everything above takes no part: no gradient, no delta, no noise, and in the server neither parameters nor
    moments change by a bit. `odjax.lowrank.merge(model, at_rank(model, params, b))` serves rank b.

    Args:
      model: the adapted model; its method is "lora" or "dylora", R its largest rank. The loss gets a model
        that draws nothing.
      params: its parameters, arrays or `jax.ShapeDtypeStruct`.
      loss: sums over a client's batch, of the whole parameters.
      client: optimizer of local steps.
      server: optimizer of the server; None for `optax.sgd(1.0)`.
      aggregator: None for the weighted mean.
      ranks: probabilities of the ranks 1 to R; None for equal ones.
      rank: no draw, but this rank, to which the parameters of the clients are cut: less to compute and to
        send, and one compiled round a rank. Take it from `draw_rank`, round by round, for the numbers of the
        drawn one; states fit all ranks.
      mode: "nested" trains all of the drawn rank, "frozen" its last column and row alone, as DyLoRA's
        frozen mode does.
      trainable: the `where` that the parameters were split by; None for `odjax.lowrank.FACTORS`. What is no
        factor always takes part.

    Returns:
      The algorithm. Its context is the rank, an int32 scalar.

    Raises:
      ValueError: another method, an unknown mode, probabilities that do not fit, `rank` and `ranks` at once,
        a rank outside 1 to R, or `rank` with the mode "frozen".

    Source: Xu et al. 2024, "DP-DyLoRA", algorithm 1; Valipour et al. 2022, "DyLoRA", algorithm 1.

    Example:
      >>> import flax.linen as nn
      >>> from odjax.lowrank import FACTORS, adapt
      >>> model = adapt(nn.Dense(3), rank=2)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
      >>> algorithm = fed_dylora(model, params, lambda *_: {}, optax.sgd(0.1), ranks=[1.0, 0.0])
      >>> rank = algorithm.context(jax.random.key(1), 0)
      >>> algorithm.mask(partition(params, FACTORS)[0], rank)["lora_b"]
      Array([[1., 1., 1.],
             [0., 0., 0.]], dtype=float32)
    """
    from odjax.lowrank import FACTORS, nested

    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if rank is not None and ranks is not None:
        raise ValueError("rank= is one rank for all rounds and ranks= the probabilities of many: give one")
    if rank is not None and mode == "frozen":
        raise ValueError("mode='frozen' trains inside the full factors: there is nothing to cut, drop rank=")
    where = FACTORS if trainable is None else trainable
    nested.check_nested(model)
    axes = nested.rank_axes(params)
    largest = max(place.rank for place in axes.values())
    fixed = nested.model_at(model, rank if rank is not None else largest)
    server, aggregator = server or fed_avg_server(), aggregator or weighted_mean()

    if rank is not None:
        if not 1 <= rank <= largest:
            raise ValueError(f"rank must be 1 to {largest}, got {rank}")

        def at_this(
            params: Any, shared: Shared, batch: Mapping[str, jax.Array], mask: jax.Array, key: jax.Array
        ) -> Figures:
            return loss(fixed, combine(params, shared.frozen), batch, mask, key)

        return Algorithm(
            _cut(local_sgd(at_this, client), rank, axes, where),
            aggregator,
            server,
            mask=lambda params, context: nested.masks_of(axes, params, rank),
        )

    p = _probabilities(largest, ranks)

    def at_drawn(
        params: Any, shared: Shared, batch: Mapping[str, jax.Array], mask: jax.Array, key: jax.Array
    ) -> Figures:
        if mode == "frozen":
            own = nested.masks_of(axes, params, shared.context, last=True)
            params = jax.tree.map(lambda m, new, old: jnp.where(m != 0, new, old), own, params, shared.params)
        whole = nested.at_rank(fixed, combine(params, shared.frozen), shared.context)
        return loss(fixed, whole, batch, mask, key)

    return Algorithm(
        local_sgd(at_drawn, client),
        aggregator,
        server,
        context=lambda key, round: _drawn(key, largest, p),
        mask=lambda params, context: nested.masks_of(axes, params, context, last=mode == "frozen"),
    )


def dp_dylora(
    model: Adapted,
    params: Any,
    loss: ModelLoss,
    client: optax.GradientTransformation,
    plan: Any,
    server: optax.GradientTransformation | None = None,
    *,
    ranks: Sequence[float] | None = None,
    rank: int | None = None,
    mode: str = "nested",
    trainable: Where | None = None,
) -> Algorithm:
    """DP-DyLoRA: user-level privacy, and a rank per round, so that a round pays noise for its rank alone.

    The energy of a round's noise is z^2 S^2 d_b / C^2 with d_b = b sum(in + out) trained numbers. DP-LoRA is
    `fed_low_rank(..., aggregator=private_sum(plan))`: all ranks in all rounds.

    Args:
      model: see `fed_dylora`.
      params: see `fed_dylora`.
      loss: see `fed_dylora`.
      client: optimizer of local steps.
      plan: `odjax.privacy.PrivacyPlan`, or its forecast.
      server: optimizer of the server; None for `optax.sgd(1.0)`.
      ranks: see `fed_dylora`.
      rank: see `fed_dylora`.
      mode: see `fed_dylora`.
      trainable: see `fed_dylora`.

    Returns:
      The algorithm. One public draw on the server makes the sum one over a fixed set of numbers with the
      sensitivity of the clip; the choice of a rank does not depend on data and costs no privacy.

    Raises:
      ValueError: as `fed_dylora`.

    Source: Xu et al. 2024, "DP-DyLoRA: Fine-Tuning Transformer-Based Models On-Device under Differentially
    Private Federated Learning using Dynamic Low-Rank Adaptation", algorithm 1.

    Example:
      >>> import flax.linen as nn
      >>> from odjax.lowrank import adapt
      >>> from odjax.privacy import privacy_plan
      >>> model = adapt(nn.Dense(1), rank=4, method="lora")
      >>> def loss(model, params, batch, mask, key):
      ...     error = jnp.square(model.apply({"params": params}, batch["x"])[:, 0] - batch["y"])
      ...     return {"loss": (jnp.sum(mask * error), jnp.sum(mask * 1.0))}
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> plan = privacy_plan(
      ...     population=10**6, cohort=1000, clip=0.1, rounds=100, delta=1e-7, noise_multiplier=1.0
      ... )
      >>> algorithm = dp_dylora(model, params, loss, optax.sgd(0.5), plan)
      >>> int(algorithm.context(jax.random.key(1), 0)) in (1, 2, 3, 4)  # the rank of a round
      True
    """
    return fed_dylora(
        model,
        params,
        loss,
        client,
        server,
        aggregator=private_sum(plan),
        ranks=ranks,
        rank=rank,
        mode=mode,
        trainable=trainable,
    )


def _cut(local: LocalStep, rank: int, axes: Any, where: Where) -> LocalStep:
    """The same steps on parameters that are cut to a rank; their deltas in full shapes."""
    from odjax.lowrank import nested

    def cut(shared: Shared) -> Shared:
        free, frozen = partition(nested.slice_rank(combine(shared.params, shared.frozen), rank), where)
        return shared._replace(params=free, frozen=frozen)

    def step(
        state: Any, shared: Shared, batch: Mapping[str, jax.Array], mask: jax.Array, key: jax.Array
    ) -> tuple[Any, Figures]:
        return local.step(state, cut(shared), batch, mask, key)

    def final(state: Any, shared: Shared) -> tuple[Any, Any]:
        delta, private = local.final(state, cut(shared))
        return nested.padded(delta, axes), private

    return LocalStep(lambda shared, private: local.init(cut(shared), private), step, final)
