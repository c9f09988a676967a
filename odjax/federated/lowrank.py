"""Low-rank methods across clients: factors are what is sent, averaged, clipped and noised.

One function makes the algorithm of any adapter (`fed_low_rank`), one the round of those that merge and go on
(`chain_round`: Fed-RAC-LoRA, federated COLA). Ranks that change from round to round are in
`odjax.federated.dylora`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import optax
from jax.sharding import Mesh

from odjax.core import Where, combine, partition, run_edit, run_edits
from odjax.federated.aggregate import Aggregator, weighted_mean
from odjax.federated.algorithms import Algorithm, FederatedState, make_round
from odjax.federated.local import Figures, Shared, local_sgd
from odjax.federated.server import fed_avg as fed_avg_server

if TYPE_CHECKING:
    from odjax.lowrank import Adapted

ModelLoss = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array, jax.Array], Figures]
"""`(model, params, batch, mask, key) -> figures`: sums over the examples that count; "loss" is minimized.

The model is the one that fits the parameters: `model.apply({"params": params}, batch["x"])`.
"""


def fed_low_rank(
    model: Adapted,
    loss: ModelLoss,
    client: optax.GradientTransformation,
    server: optax.GradientTransformation | None = None,
    *,
    aggregator: Aggregator | None = None,
    proximal: float = 0.0,
) -> Algorithm:
    """Federated training of what an adapter trains; with `private_sum(plan)` DP-LoRA and DP-FFA-LoRA.

    | method of the model      | across clients                                                              |
    |--------------------------|-----------------------------------------------------------------------------|
    | "lora"                   | FedIT, DP-LoRA; mean A times mean B is not the mean of A B                  |
    | "asym", "lora_fa"        | FFA-LoRA: A is drawn once and frozen, and the mean is exact                 |
    | "rac", "cola", "relora"  | run the rounds of `chain_round`, which merge; for "rac" the mean is exact   |

    What is trained and sent is what the parameters are split by: `free, frozen = partition(params, FACTORS)`
    (or more, a head for example); the state is `init(algorithm, free, N)`, and the round takes `frozen`.

    Args:
      model: what `odjax.lowrank.adapt` returned.
      loss: sums over a client's batch, of the whole parameters.
      client: optimizer of local steps.
      server: optimizer of the server; None for `optax.sgd(1.0)`.
      aggregator: None for the weighted mean.
      proximal: mu of FedProx.

    Returns:
      The algorithm.

    Raises:
      ValueError: "dylora", which draws a rank in every call, on the client.
      TypeError: a model that is not adapted.

    Source: Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA), section 3;
    Malinovsky et al. 2024, "RAC-LoRA", appendix (Fed-RAC-LoRA).

    Example:
      >>> import flax.linen as nn
      >>> from odjax.lowrank import adapt
      >>> from odjax.federated import private_sum
      >>> from odjax.privacy import privacy_plan
      >>> model = adapt(nn.Dense(1), rank=1, method="lora")
      >>> def loss(model, params, batch, mask, key):
      ...     error = jnp.square(model.apply({"params": params}, batch["x"])[:, 0] - batch["y"])
      ...     return {"loss": (jnp.sum(mask * error), jnp.sum(mask * 1.0))}
      >>> plan = privacy_plan(
      ...     population=10**6, cohort=1000, clip=0.1, rounds=100, delta=1e-7, noise_multiplier=1.0
      ... )
      >>> dp_lora = fed_low_rank(model, loss, optax.sgd(0.5), aggregator=private_sum(plan))
      >>> dp_lora.aggregator.sensitivity("add_or_remove_one")
      0.1
    """
    from odjax.lowrank.merge import spec_of

    if spec_of(model).method == "dylora":
        raise ValueError(
            "method 'dylora' draws a rank in every call, on the client: use fed_dylora or dp_dylora, where "
            "the server draws it"
        )

    def whole(
        params: Any, shared: Shared, batch: Mapping[str, jax.Array], mask: jax.Array, key: jax.Array
    ) -> Figures:
        return loss(model, combine(params, shared.frozen), batch, mask, key)

    return Algorithm(
        local_sgd(whole, client, proximal=proximal),
        aggregator or weighted_mean(),
        server or fed_avg_server(),
    )


def chain_round(
    model: Adapted,
    algorithm: Algorithm,
    *,
    every: int = 1,
    on_boundary: str | None = None,
    stochastic: bool = False,
    trainable: Where | None = None,
    mesh: Mesh | None = None,
    axis: str | tuple[str, ...] = "clients",
    rows: str = "compiled",
    local_data: bool = False,
) -> Callable[..., tuple[FederatedState, Any, Figures]]:
    """A round of a chain: the cohort trains the factors, their mean is merged once, the next block begins.

    For "rac" the server sends a seed and the number of the block, from which every client draws the same
    sketch Q; Z starts at zero. Merging is linear in Z, so that

        W + s lift(Q, mean_i Z_i) = mean_i (W + s lift(Q, Z_i)),

    and the mean of the factors is the mean of the clients' models. Where both factors are trained ("cola",
    "relora") it is not.

    Args:
      model: the adapted model, of a method that is a chain.
      algorithm: of `fed_low_rank`.
      every: rounds of a block.
      on_boundary: what becomes of the server's moments, see `odjax.lowrank.restart`. "reset" is the default
        of "rac"; with one round a block, an adaptive server then takes every step as its first.
      stochastic: see `odjax.lowrank.restart`.
      trainable: the `where` that the parameters were split by; None for `odjax.lowrank.FACTORS`.
      mesh: see `make_round`.
      axis: see `make_round`.
      rows: see `make_round`.
      local_data: see `make_round`.

    Returns:
      `(state, frozen, data, plan, key) -> (state, frozen, figures)`; `frozen` holds the weights and sketches,
      and is another one after every block.

    Raises:
      ValueError: a method that is no chain, or an algorithm whose clients keep something: it would be of the
        factors of another block.

    Source: Malinovsky et al. 2024, "RAC-LoRA", appendix (Fed-RAC-LoRA).

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from odjax.federated import group_by_client, init, plan_round
      >>> from odjax.lowrank import FACTORS, adapt
      >>> model = adapt(nn.Dense(1, use_bias=False), rank=1, method="rac")
      >>> def loss(model, params, batch, mask, key):
      ...     error = jnp.square(model.apply({"params": params}, batch["x"])[:, 0] - batch["y"])
      ...     return {"loss": (jnp.sum(mask * error), jnp.sum(mask * 1.0))}
      >>> examples = {"x": np.eye(4, dtype=np.float32), "y": np.ones(4, np.float32)}
      >>> clients = group_by_client(examples, np.array([0, 0, 1, 1]))
      >>> params = model.init(jax.random.key(0), examples["x"])["params"]
      >>> free, frozen = partition(params, FACTORS)
      >>> algorithm = fed_low_rank(model, loss, optax.sgd(0.5))
      >>> state = init(algorithm, free, clients.count)
      >>> round = jax.jit(chain_round(model, algorithm))
      >>> for t in range(40):
      ...     plan = plan_round(clients, [0, 1], t, batch=2, seed=0)
      ...     state, frozen, figures = round(state, frozen, clients.examples, plan, jax.random.key(1))
      >>> bool(figures["loss"][0] / figures["loss"][1] < 0.01), int(frozen["lora_sketch"][2])
      (True, 40)
    """
    from odjax.lowrank import FACTORS, restart

    where = FACTORS if trainable is None else trainable
    if algorithm.control or algorithm.private is not None:
        raise ValueError(
            "the clients of this algorithm keep something like the factors, and these are of other sketches "
            "in every block: use fed_low_rank, whose clients keep nothing"
        )
    edit = restart(
        model,
        every=every,
        on_boundary=on_boundary,
        trainable=where,
        stochastic=stochastic,
        init=algorithm.server.init,
    )
    run = make_round(algorithm, mesh=mesh, axis=axis, rows=rows, local_data=local_data)

    def round(
        state: FederatedState, frozen: Any, data: Any, plan: Any, key: jax.Array
    ) -> tuple[FederatedState, Any, Figures]:
        state, figures = run(state, data, plan, key, frozen)
        carry = (combine(state.params, frozen), state.server)
        if every == 1:
            carry = run_edit(edit, key, state.round, *carry)
        else:
            carry = run_edits([edit], key, state.round, *carry)
        free, rest = partition(carry[0], where)
        return state._replace(params=free, server=carry[1]), rest, figures

    return round
