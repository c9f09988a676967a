"""Server optimizers: optax transforms of minus the aggregated delta."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from odjax.core import leaves_with_paths, map_params_state, statistics_dtype


class FedAdamState(NamedTuple):
    """First and second moment of the aggregated delta, float32 (float64 for float64)."""

    mu: Any
    nu: Any


def fed_avg(learning_rate: float = 1.0) -> optax.GradientTransformation:
    """theta <- theta + learning_rate * delta.

    Args:
      learning_rate: 1 takes over the mean of the clients.

    Returns:
      `optax.sgd(learning_rate)`.

    Source: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 1.
    """
    return optax.sgd(learning_rate)


def fed_avgm(learning_rate: float = 1.0, momentum: float = 0.9) -> optax.GradientTransformation:
    """FedAvg with momentum on the server.

    Args:
      learning_rate: of the server.
      momentum: m <- momentum * m + delta.

    Returns:
      `optax.sgd(learning_rate, momentum)`.

    Source: Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification", section 3.

    Example:
      >>> server = fed_avgm(1.0, 0.5)
      >>> _, state = server.update(-jnp.ones(1), server.init(jnp.zeros(1)))
      >>> server.update(-jnp.ones(1), state)[0]
      Array([1.5], dtype=float32)
    """
    return optax.sgd(learning_rate, momentum)


def fed_adam(
    learning_rate: float, *, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> optax.GradientTransformation:
    """Adam of the server as its paper has it: no bias correction, and a second moment that starts at tau^2.

    m <- b1 m + (1 - b1) D, v <- b2 v + (1 - b2) D^2, theta <- theta + learning_rate m / (sqrt(v) + tau).
    `optax.adam(learning_rate, b1, b2, eps=tau)` differs in both; either is a server optimizer.

    Args:
      learning_rate: of the server.
      b1: decay of the first moment.
      b2: decay of the second moment.
      tau: degree of adaptivity, positive.

    Returns:
      A transform of g = -D.

    Raises:
      ValueError: a decay outside [0, 1) or a tau that is not positive.

    Source: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2 (FedAdam).

    Example:
      >>> server = fed_adam(1.0, b1=0.0, b2=0.0, tau=1.0)
      >>> updates, _ = server.update(-jnp.array([1.0, -3.0]), server.init(jnp.zeros(2)))
      >>> updates
      Array([ 0.5 , -0.75], dtype=float32)
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        if not 0 <= decay < 1:
            raise ValueError(f"{name} must be in [0, 1), got {decay}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")

    def init(params: Any) -> FedAdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, statistics_dtype(p)), params)
        return FedAdamState(zeros, jax.tree.map(lambda z: jnp.full_like(z, tau**2), zeros))

    def update(updates: Any, state: FedAdamState, params: Any = None) -> tuple[Any, FedAdamState]:
        del params
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g.astype(m.dtype), state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g.astype(v.dtype)), state.nu, updates)
        steps = jax.tree.map(
            lambda m, v, g: (-learning_rate * m / (jnp.sqrt(v) + tau)).astype(g.dtype), mu, nu, updates
        )
        return steps, FedAdamState(mu, nu)

    return optax.GradientTransformation(init, update)


def server_step(
    server: optax.GradientTransformation, params: Any, state: Any, update: Any, mask: Any = None
) -> tuple[Any, Any]:
    """One step of the server along an aggregated delta.

    Args:
      server: treats minus the delta as a gradient.
      params: of the server.
      state: of `server`.
      update: the aggregated delta, a tree like `params`.
      mask: 0 and 1 for every entry, or None: where it is 0 the parameters and all that the server's state
        holds of them stay bit for bit, momentum and decay included.

    Returns:
      (params, state).

    Raises:
      ValueError: the update has another structure, or other shapes, than the parameters.

    Example:
      >>> server = fed_avg()
      >>> server_step(server, jnp.zeros(2), server.init(jnp.zeros(2)), jnp.ones(2), jnp.array([1, 0]))[0]
      Array([1., 0.], dtype=float32)
    """
    if jax.tree.structure(update) != jax.tree.structure(params):
        raise ValueError(
            f"the update is a tree {jax.tree.structure(update)}, the parameters are "
            f"{jax.tree.structure(params)}: the local step must return a delta like the parameters"
        )
    for (path, param), new in zip(leaves_with_paths(params), jax.tree.leaves(update), strict=True):
        if jnp.shape(param) != jnp.shape(new):
            raise ValueError(
                f"the update of {path!r} has shape {jnp.shape(new)}, the parameter {jnp.shape(param)}: "
                f"an update for every client (`mixed`) is for simulate_cohort, not for one server"
            )
    gradient = jax.tree.map(lambda u, p: -u.astype(p.dtype), update, params)
    steps, new_state = server.update(gradient, state, params)
    new = optax.apply_updates(params, steps)
    if mask is None:
        return new, new_state
    kept = jax.tree.map(lambda m, a, b: jnp.where(m != 0, a, b), mask, new, params)
    return kept, _state_where(mask, new_state, state, params)


def _state_where(mask: Any, new: Any, old: Any, params: Any) -> Any:
    """The new state; the old one where it is about entries whose mask is 0."""
    masks = dict(leaves_with_paths(mask))
    held: list[jax.Array] = []
    map_params_state(lambda path, param, leaf: held.append(leaf) or leaf, old, params)
    before = iter(held)

    def chosen(path: str, param: Any, leaf: jax.Array) -> jax.Array:
        return jnp.where(masks[path] != 0, leaf, next(before))

    return map_params_state(chosen, new, params)
