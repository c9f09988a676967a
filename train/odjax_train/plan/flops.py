"""Operations that a model needs, counted on what JAX traces, for all devices together."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from odjax.core import combine, partition
from odjax_train.experiment import Experiment
from odjax_train.program import TrainState


def product_flops(jaxpr: Jaxpr) -> int:
    """Floating-point operations of the products in a traced function.

    A multiplication and an addition are two. A scan counts as often as it runs, of two branches the one with
    more, a loop without a known length once. What is elementwise does not count, nor does what kernels do
    inside.

    Args:
        jaxpr: of `jax.make_jaxpr(f)(...).jaxpr`.

    >>> product_flops(jax.make_jaxpr(lambda a: a @ a)(jax.numpy.ones((3, 3))).jaxpr)
    54
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (lhs, _), _ = params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in lhs)
        elif name == "conv_general_dilated":
            spec = params["dimension_numbers"]
            kernel = eqn.invars[1].aval.shape
            fan_in = math.prod(kernel) // kernel[spec.rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * fan_in
        elif name == "cond":
            total += max(product_flops(branch.jaxpr) for branch in params["branches"])
        elif name != "pallas_call":
            times = params["length"] if name == "scan" else 1
            total += times * sum(product_flops(inner) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    found = []
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, Jaxpr):
            found.append(value)
    return found


def plain(model: nn.Module) -> nn.Module:
    """The model without rematerialization and with attention in plain products.

    Args:
        model: any; its attributes `remat` and `attention`, and those of the modules among its attributes, are
            set to what is plain.
    """
    fields = {field.name for field in dataclasses.fields(model)}
    changes: dict[str, Any] = {}
    if "remat" in fields:
        changes["remat"] = False if isinstance(model.remat, bool) else "none"
    if "attention" in fields and isinstance(model.attention, str | None):
        changes["attention"] = "xla"
    for name in fields - {"parent", "name"}:
        value = getattr(model, name)
        if isinstance(value, nn.Module):
            changes[name] = plain(value)
    return model.clone(**changes) if changes else model


def gradient(
    experiment: Experiment,
    state: TrainState,
    batch: dict[str, jax.ShapeDtypeStruct],
    model: nn.Module | None = None,
) -> ClosedJaxpr:
    """The gradient of the summed loss of a batch, traced; what is frozen has none.

    Args:
        experiment: whose task, and model where none is given.
        state: of shapes.
        batch: shapes.
        model: in its place.
    """
    return _traced(experiment, state, batch, model, jax.grad)


def model_flops(
    experiment: Experiment, state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]
) -> tuple[int, int]:
    """Floating-point operations of a training step and of an evaluation, nothing computed twice.

    Forward and backward pass of the products, attention in full (without its causal half); gradients of
    frozen parameters are not computed. All devices together.

    Args:
        experiment: whose model and task.
        state: of shapes.
        batch: shapes.

    Source: Chowdhery et al. 2022, "PaLM", appendix B, for what counts in a model's utilization.
    """
    model = plain(experiment.model)
    step = gradient(experiment, state, batch, model)
    evaluation = _traced(experiment, state, batch, model, lambda loss: loss)
    return product_flops(step.jaxpr), product_flops(evaluation.jaxpr)


def _traced(
    experiment: Experiment,
    state: TrainState,
    batch: dict[str, jax.ShapeDtypeStruct],
    model: nn.Module | None,
    transform: Callable[[Callable[[Any], jax.Array]], Callable[[Any], Any]],
) -> ClosedJaxpr:
    model = experiment.model if model is None else model
    params, collections, batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state.params, state.collections, batch)
    )
    free, frozen = partition(params, experiment.trainable)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def run(free: Any, frozen: Any, collections: Any, batch: Any, key: Any) -> Any:
        def loss(free: Any) -> jax.Array:
            variables = {"params": combine(free, frozen), **collections}
            return experiment.task.loss(model, variables, batch, key)[0]["loss"].total

        return transform(loss)(free)

    return jax.make_jaxpr(run)(free, frozen, collections, batch, key)


def residuals(
    experiment: Experiment, state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]
) -> ClosedJaxpr:
    """What the forward pass keeps for the backward pass, traced: the outputs, beside the inputs among them.

    Args:
        experiment: whose model and task.
        state: of shapes.
        batch: shapes.
    """
    return _traced(experiment, state, batch, None, lambda loss: lambda free: jax.vjp(loss, free)[1])
