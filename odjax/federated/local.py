"""What a client does: local steps from the server's parameters to its delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from odjax.core import statistics_dtype

Figures = dict[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, count), both float32 scalars."""

Loss = Callable[[Any, "Shared", Mapping[str, jax.Array], jax.Array, jax.Array], Figures]
"""`(params, shared, batch, mask, key) -> figures`: sums over the examples that count; "loss" is minimized."""


class Shared(NamedTuple):
    """What every client gets from the server.

    Attributes:
      params: what is trained.
      frozen: what is not, the weights beside an adapter for example.
      control: of the server, for SCAFFOLD; a tree like `params`.
      context: whatever is public and new each round, a rank for example.
      collections: of a Flax model, what it has besides parameters.
    """

    params: Any
    frozen: Any = None
    control: Any = None
    context: Any = None
    collections: Any = None


class LocalStep(NamedTuple):
    """A client's computation, cut into steps so that clients can be packed.

    Attributes:
      init: `(shared, private) -> state`, at its first step.
      step: `(state, shared, batch, mask, key) -> (state, figures)`.
      final: `(state, shared) -> (delta, private)`, after its last step.
    """

    init: Callable[[Shared, Any], Any]
    step: Callable[[Any, Shared, Mapping[str, jax.Array], jax.Array, jax.Array], tuple[Any, Figures]]
    final: Callable[[Any, Shared], tuple[Any, Any]]


class LocalState(NamedTuple):
    """State of a client between steps: its parameters, its optimizer's state, what it keeps, steps done."""

    params: Any
    opt_state: Any
    private: Any
    count: jax.Array


def mean_gradient(
    loss: Loss, params: Any, shared: Shared, batch: Mapping[str, jax.Array], mask: jax.Array, key: jax.Array
) -> tuple[Any, Figures]:
    """The gradient of the mean loss over the examples that count, and the figures; zero where none counts.

    Args:
      loss: sums.
      params: where.
      shared: the rest of what the loss sees.
      batch: name -> [batch, ...].
      mask: bool [batch].
      key: for dropout and the like.

    Returns:
      (gradient like `params`, figures).

    Raises:
      ValueError: the loss returns no figure "loss".
    """

    def total(params: Any) -> tuple[jax.Array, Figures]:
        figures = loss(params, shared, batch, mask, key)
        if "loss" not in figures:
            raise ValueError(f"the loss must return a figure named 'loss', got {sorted(figures)}")
        return figures["loss"][0], figures

    gradient, figures = jax.grad(total, has_aux=True)(params)
    count = figures["loss"][1]

    def mean(g: jax.Array) -> jax.Array:
        wide = statistics_dtype(g)
        over = 1 / jnp.maximum(count.astype(wide), wide.type(1e-9))
        return (g.astype(wide) * jnp.where(count > 0, over, jnp.zeros((), wide))).astype(g.dtype)

    return jax.tree.map(mean, gradient), figures


def _delta(new: Any, old: Any) -> Any:
    def difference(a: jax.Array, b: jax.Array) -> jax.Array:
        wide = statistics_dtype(a)
        return a.astype(wide) - b.astype(wide)

    return jax.tree.map(difference, new, old)


def local_sgd(loss: Loss, optimizer: optax.GradientTransformation, *, proximal: float = 0.0) -> LocalStep:
    """Steps of any optax transformation on the client's own loss; its state begins anew with every client.

    With `proximal` mu the gradient is that of f_i(y) + mu / 2 ||y - theta||^2 (FedProx).

    Args:
      loss: sums over a batch.
      optimizer: of the client; schedules in it count the client's own steps.
      proximal: mu, at least 0.

    Returns:
      A `LocalStep` whose delta is y - theta, float32 (float64 for float64), and that keeps what it was given.

    Raises:
      ValueError: a negative `proximal`.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    algorithm 1; Li et al. 2020, "Federated Optimization in Heterogeneous Networks", equation 2.

    Example:
      >>> def loss(params, shared, batch, mask, key):
      ...     return {"loss": (jnp.sum(mask * (params - batch["x"]) ** 2 / 2), jnp.sum(mask * 1.0))}
      >>> client = local_sgd(loss, optax.sgd(0.5))
      >>> shared = Shared(jnp.zeros(()))
      >>> state = client.init(shared, None)
      >>> batch = {"x": jnp.array([2.0, 9.0])}
      >>> state, _ = client.step(state, shared, batch, jnp.array([True, False]), jax.random.key(0))
      >>> client.final(state, shared)
      (Array(1., dtype=float32), None)
    """
    if not proximal >= 0:
        raise ValueError(f"proximal must not be negative, got {proximal}")

    def init(shared: Shared, private: Any) -> LocalState:
        return LocalState(shared.params, optimizer.init(shared.params), private, jnp.zeros((), jnp.int32))

    def step(
        state: LocalState, shared: Shared, batch: Mapping[str, jax.Array], mask: jax.Array, key: jax.Array
    ) -> tuple[LocalState, Figures]:
        gradient, figures = mean_gradient(loss, state.params, shared, batch, mask, key)
        if proximal:
            gradient = jax.tree.map(
                lambda g, y, theta: g + proximal * (y - theta), gradient, state.params, shared.params
            )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return LocalState(params, opt_state, state.private, state.count + 1), figures

    def final(state: LocalState, shared: Shared) -> tuple[Any, Any]:
        return _delta(state.params, shared.params), state.private

    return LocalStep(init, step, final)


class Controlled(NamedTuple):
    """The delta of a SCAFFOLD client: of its parameters and of its control variate."""

    params: Any
    control: Any


def local_scaffold(loss: Loss, learning_rate: float) -> LocalStep:
    """SCAFFOLD, option II: gradients corrected by control variates, which the client keeps.

    y <- y - eta (g_i(y) - c_i + c), and after K steps c_i' = c_i - c + (theta - y) / (K eta).

    Args:
      loss: sums over a batch.
      learning_rate: eta.

    Returns:
      A `LocalStep` whose delta is `Controlled(y - theta, c_i' - c_i)`, and whose private state is c_i, a tree
      like the parameters, float32 (float64 for float64).

    Raises:
      ValueError: a learning rate that is not positive.

    Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
    algorithm 1, option II.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")

    def init(shared: Shared, private: Any) -> LocalState:
        return LocalState(shared.params, (), private, jnp.zeros((), jnp.int32))

    def step(
        state: LocalState, shared: Shared, batch: Mapping[str, jax.Array], mask: jax.Array, key: jax.Array
    ) -> tuple[LocalState, Figures]:
        gradient, figures = mean_gradient(loss, state.params, shared, batch, mask, key)
        params = jax.tree.map(
            lambda y, g, own, c: y - (learning_rate * (g.astype(c.dtype) - own + c)).astype(y.dtype),
            state.params,
            gradient,
            state.private,
            shared.control,
        )
        return LocalState(params, (), state.private, state.count + 1), figures

    def final(state: LocalState, shared: Shared) -> tuple[Any, Any]:
        delta = _delta(state.params, shared.params)
        # A lane that has not begun yet has taken no step; what it gives is not used.
        steps = jnp.maximum(state.count, 1)

        def change_of(c: jax.Array, d: jax.Array) -> jax.Array:
            # c_i' - c_i = -c + (theta - y) / (K eta)
            return -c.astype(d.dtype) - d / (learning_rate * steps.astype(d.dtype))

        change = jax.tree.map(change_of, shared.control, delta)
        private = jax.tree.map(lambda own, by: own + by.astype(own.dtype), state.private, change)
        return Controlled(delta, change), private

    return LocalStep(init, step, final)
