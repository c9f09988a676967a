"""An experiment: everything that defines a training run, as one value."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import grain
import jax
import optax

from odjax.core import Edit, Where
from odjax_train.errors import UserError
from odjax_train.federated.data import ByClient
from odjax_train.federated.section import Federated
from odjax_train.measures import Measure
from odjax_train.mesh import DEFAULT_RULES, MeshShape, Rules
from odjax_train.tasks import Task


class Data(Protocol):
    """A data set that is opened when it is needed and says before that what it will look like."""

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example, without touching the data."""
        ...

    def train(self, seed: int) -> grain.MapDataset:
        """Endless, shuffled; example i is a pure function of (seed, i)."""
        ...

    def evaluation(self) -> grain.MapDataset:
        """The held-out examples, in a fixed order."""
        ...

    def describe(self) -> dict[str, Any]:
        """What was found: sizes and a fingerprint."""
        ...


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text to continue when a language model's training ends.

    Args:
        prompt: the text before.
        length: tokens to add.
        temperature: 0 takes the likeliest token each time.
        top_p: smallest set of tokens with that much probability to draw from.
    """

    prompt: str
    length: int = 200
    temperature: float = 0.8
    top_p: float = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A training run: real objects, composed in Python.

    Args:
        model: a Linen module whose parameters carry logical axis names.
        task: how the model is called and what is minimised.
        data: training and held-out examples.
        optimizer: any optax transformation; its updates are added to the parameters.
        steps: optimizer steps in all.
        batch: examples in a step, over all devices and processes.
        schedule: the learning rate by step, for logs and plots alone (the optimizer has its own copy).
        accumulate: microbatches a step; the gradient is that of the whole batch.
        trainable: parameters that are trained; no gradient of any other is computed.
        start_from: folder of a run whose parameters are taken over at the start; those that it did not have
            (an adapter's, say) keep their initial values.
        edits: structural changes every K steps, compiled apart from the step.
        federated: makes the steps rounds of clients and the optimizer the server's; `data` must then say who
            has which examples (`odjax_train.ByClient`), and `batch` is that of evaluations.
        measures: statistics that are taken when the run is judged (`odjax_train.neural_collapse`).
        ema: decay of an exponential moving average of the parameters, used in evaluation and generation; None
            for none.
        seed: of parameters, data order, dropout and edits.
        mesh: devices along data, fsdp and tensor.
        rules: logical axis -> mesh axis.
        eval_every: steps between evaluations; there is always one at the end.
        eval_batches: batches in an evaluation, None for all held-out examples.
        checkpoint_every: steps between checkpoints; there is always one at the end.
        keep_last: newest checkpoints to keep.
        keep_best: best checkpoints (by `task.best`) to keep beside them.
        log_every: steps between lines of `metrics.jsonl`.
        sample: text to continue at the end.

    Raises:
        UserError: naming the argument that makes no sense.
    """

    model: nn.Module
    task: Task
    data: Data
    optimizer: optax.GradientTransformation
    steps: int
    batch: int
    schedule: optax.Schedule | None = None
    accumulate: int = 1
    trainable: Where = ".*"
    start_from: Path | None = None
    edits: Sequence[Edit] = ()
    federated: Federated | None = None
    measures: Sequence[Measure] = ()
    ema: float | None = None
    seed: int = 0
    mesh: MeshShape = MeshShape()
    rules: Rules = DEFAULT_RULES
    eval_every: int = 100
    eval_batches: int | None = None
    checkpoint_every: int = 100
    keep_last: int = 2
    keep_best: int = 1
    log_every: int = 10
    sample: Sample | None = None

    def __post_init__(self) -> None:
        positive = ("batch", "accumulate", "eval_every", "checkpoint_every", "keep_last", "log_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be 0 to {2**32 - 1}, got {self.seed}")
        if self.steps < 0:
            raise UserError(f"steps must not be negative, got {self.steps}")
        if self.keep_best < 0:
            raise UserError(f"keep_best must not be negative, got {self.keep_best}")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise UserError(f"eval_batches must be at least 1, got {self.eval_batches}")
        longer, shorter = sorted((self.eval_every, self.checkpoint_every), reverse=True)
        if self.keep_best and longer % shorter:
            raise UserError(
                f"eval_every {self.eval_every} and checkpoint_every {self.checkpoint_every}: one must be a "
                "multiple of the other to keep the best checkpoints (or keep_best=0)"
            )
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise UserError(f"ema must be between 0 and 1, got {self.ema}")
        if self.batch % self.accumulate:
            raise UserError(f"batch {self.batch} does not divide into {self.accumulate} microbatches")
        if self.federated is not None:
            self._check_federated(self.federated)
        for kind in ("edits", "measures"):
            names = [each.name for each in getattr(self, kind)]
            if len(set(names)) < len(names):
                raise UserError(f"{kind} must have different names, got {names}")

    def _check_federated(self, federated: Federated) -> None:
        if self.accumulate > 1:
            raise UserError(f"accumulate {self.accumulate}: a federated round has local steps instead")
        if not isinstance(self.data, ByClient):
            raise UserError(
                f"a federated run needs to know who has which examples, which {type(self.data).__name__} "
                "does not say: wrap it, ByClient(data, by_label_shards(100))"
            )
        allowed = None if federated.privacy is None else federated.privacy.rounds
        looked = [each.name for each in self.measures if each.on == "train"]
        if federated.is_private and looked:
            raise UserError(
                f"the measure {looked[0]!r} is of training examples, which a private run must not show: "
                "take it on='held-out'"
            )
        if allowed is not None and self.steps > allowed:
            raise UserError(
                f"steps {self.steps} are more than the {allowed} rounds that the noise of the privacy plan "
                "was chosen for: make the plan with rounds= the steps"
            )

    @property
    def last_step(self) -> int:
        """Where the run ends: at `steps`, or before where a privacy budget is spent by then."""
        if self.federated is None or self.federated.rounds is None:
            return self.steps
        return min(self.steps, self.federated.rounds)

    @property
    def unit(self) -> str:
        """What the throughput counts."""
        return self.task.unit if self.federated is None else "clients"
