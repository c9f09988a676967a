"""Figures of a model that are no means: statistics of some examples, in passes, whenever a run is judged."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Sharding

from odjax.core import Statistic
from odjax_train.errors import UserError
from odjax_train.tasks import Batch, Variables

Found = tuple[Any, ...]


class Pass(NamedTuple):
    """One pass over the examples.

    Attributes:
        statistic: `(model, variables, found, looked) -> Statistic`; `found` holds the results of the passes
            before it, `looked` the shapes of what `look` returns.
        look: `(model, variables, batch) -> arguments of the statistic's observe`.
    """

    statistic: Callable[[nn.Module, Variables, Found, Any], Statistic]
    look: Callable[[nn.Module, Variables, Batch], tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is measured, on which examples.

    Args:
        name: of the plots' section in the report.
        passes: over the same examples, in turn.
        figures: `(model, variables, found) -> {name: scalar}`.
        on: "train": the first batches of the training order, always the same; "held-out": the held-out
            examples.
        batches: at most as many.

    Raises:
        UserError: naming the argument that makes no sense.
    """

    name: str
    passes: Sequence[Pass]
    figures: Callable[[nn.Module, Variables, Found], dict[str, jax.Array]]
    on: Literal["train", "held-out"] = "train"
    batches: int = 16

    def __post_init__(self) -> None:
        if self.on not in ("train", "held-out"):
            raise UserError(f"a measure is on 'train' or on 'held-out' examples, got {self.on!r}")
        if self.batches < 1:
            raise UserError(f"a measure needs at least 1 batch, got {self.batches}")


class CompiledPass(NamedTuple):
    """Jitted functions of a pass: `zero`, `observe` and `result` of its statistic."""

    zero: Callable[[Any, Any, Found], Any]
    observe: Callable[[Any, Any, Found, Any, Batch], Any]
    result: Callable[[Any, Any, Found, Any], Any]


class CompiledMeasure(NamedTuple):
    """A measure's functions, jitted for one mesh; `figures(params, collections, found)`."""

    measure: Measure
    passes: tuple[CompiledPass, ...]
    figures: Callable[[Any, Any, Found], dict[str, jax.Array]]


def compile_measure(
    measure: Measure,
    model: nn.Module,
    variables: Variables,
    batch: Batch,
    shardings: tuple[Any, Any],
    rows: Sharding,
    whole: Sharding,
) -> CompiledMeasure:
    """Jits a measure.

    Args:
        measure: the measure.
        model: of the experiment.
        variables: shapes of the parameters ("params") and of the other collections.
        batch: shapes of a global batch.
        shardings: of the parameters and of the other collections.
        rows: of batches.
        whole: replicated; of states and figures.

    Returns:
        Its functions.
    """

    def compiled(one: Pass) -> CompiledPass:
        looked = jax.eval_shape(lambda v, b: one.look(model, v, b), variables, batch)

        def statistic(params: Any, collections: Any, found: Found) -> Statistic:
            return one.statistic(model, {"params": params, **collections}, found, looked)

        def observe(params: Any, collections: Any, found: Found, state: Any, batch: Batch) -> Any:
            seen = one.look(model, {"params": params, **collections}, batch)
            return statistic(params, collections, found).observe(state, *seen)

        return CompiledPass(
            jax.jit(lambda p, c, f: statistic(p, c, f).zero(), out_shardings=whole),
            jax.jit(observe, in_shardings=(*shardings, whole, whole, rows), out_shardings=whole),
            jax.jit(lambda p, c, f, state: statistic(p, c, f).result(state), out_shardings=whole),
        )

    def figures(params: Any, collections: Any, found: Found) -> dict[str, jax.Array]:
        return measure.figures(model, {"params": params, **collections}, found)

    passes = tuple(compiled(one) for one in measure.passes)
    return CompiledMeasure(measure, passes, jax.jit(figures, out_shardings=whole))


def take(
    compiled: CompiledMeasure,
    params: Any,
    collections: Any,
    examples: Callable[[], Any],
    stop: Callable[[], bool],
) -> dict[str, float] | None:
    """Measures.

    Args:
        compiled: the measure's functions.
        params: what is judged.
        collections: the model's other collections.
        examples: opens the examples: a context manager over global batches, the same ones each time.
        stop: turns true when it should be given up.

    Returns:
        Figures by "measure/name", or None when it was given up.
    """
    found: Found = ()
    for one in compiled.passes:
        state = one.zero(params, collections, found)
        with examples() as batches:
            for batch in itertools.islice(batches, compiled.measure.batches):
                if stop():
                    return None
                state = one.observe(params, collections, found, state, batch)
        found = (*found, one.result(params, collections, found, state))
    figures = jax.device_get(compiled.figures(params, collections, found))
    return {f"{compiled.measure.name}/{name}": float(value) for name, value in figures.items()}
