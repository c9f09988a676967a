"""The compiled functions of an experiment on a mesh: init, step, evaluate and one for each edit.

`odjax train`, `eval` and whatever plans a run get them from here, so that what was planned is what runs.
Nothing here touches data.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from odjax.core import Edit, combine, fold_path, fold_step, partition, run_edit
from odjax.federated import Algorithm
from odjax.sparse import DstState, apply_masks
from odjax_train.errors import UserError
from odjax_train.experiment import Experiment
from odjax_train.federated import step as rounds
from odjax_train.measures import CompiledMeasure, compile_measure
from odjax_train.mesh import (
    batch_sharding,
    data_parallelism,
    divided,
    in_force,
    like_parameters,
    parameter_shardings,
    replicated,
)
from odjax_train.tasks import Batch, Sums, add

# A product whose weight is divided waits for all of it: the compiler's own choice, a loop that multiplies the
# part of a neighbour at a time, takes up to 3.5 times the cycles by its own estimates.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
# More of the vector memory for one operation: by the estimates a step of an adapted 7B takes an eighth less.
KIND_OPTIONS = {"TPU v6 lite": {"xla_tpu_scoped_vmem_limit_kib": 65_536}}


class TrainState(NamedTuple):
    """What a run carries from step to step, and what a checkpoint holds.

    Attributes:
        step: int32 scalar, steps done.
        key: uint32 data of the run's random key; it never changes, everything is folded from it.
        params: all parameters.
        opt_state: state of the optimizer, over the trainable parameters.
        collections: the model's other collections (batch statistics, constants).
        ema: float32 average of the trainable parameters, or None.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    opt_state: Any
    collections: Any
    ema: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """An experiment's functions, jitted for one mesh; calling them compiles them.

    Attributes:
        experiment: what they were made from.
        mesh: the mesh they run on.
        state: `TrainState` of shapes.
        shardings: `TrainState` of shardings.
        batch: shapes of a global batch.
        init: `() -> TrainState`.
        step: `(state, batch) -> (state, metrics)`; the state is donated. In a federated run the batch is that
            of `odjax_train.federated.feed.RoundFeed`.
        evaluate: `(params, collections, batch) -> sums`.
        edits: one `(state) -> state` an edit; the state is donated.
        measures: the functions of each measure.
        algorithm: of a federated run.
    """

    experiment: Experiment
    mesh: Mesh
    state: TrainState
    shardings: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Any, Any, Batch], Sums]
    edits: tuple[tuple[Edit, Callable[[TrainState], TrainState]], ...]
    measures: tuple[CompiledMeasure, ...] = ()
    algorithm: Algorithm | None = None

    @contextmanager
    def context(self) -> Iterator[None]:
        """Mesh and axis rules in force: around every trace."""
        with in_force(self.mesh), nn.logical_axis_rules(self.experiment.rules):
            yield

    def compile(self) -> tuple["Program", float]:
        """The same program with its step and its edits compiled ahead; and the seconds that took.

        A round's shapes follow from its cohort: the first of each kind is compiled when it comes.
        """
        start = time.perf_counter()
        with self.context():
            step = self.step
            if self.experiment.federated is None:
                step = step.lower(self.state, self.batch).compile()
            edits = tuple((edit, apply.lower(self.state).compile()) for edit, apply in self.edits)
        return dataclasses.replace(self, step=step, edits=edits), time.perf_counter() - start

    @functools.cached_property
    def shares(self) -> np.ndarray:
        """float64 [steps], which part of the trained numbers takes part in each round of a federated run."""
        experiment = self.experiment
        free, _ = partition(self.state.params, experiment.trainable)
        return rounds.shares_of(self.algorithm, free, experiment.seed, experiment.steps)

    def started(self, state: TrainState, params: Any) -> TrainState:
        """The state with other parameters, before the first step: optimizer and average begin at them."""
        experiment = self.experiment

        def restart(state: TrainState, params: Any) -> TrainState:
            free, _ = partition(params, experiment.trainable)
            opt_state = _optimizer_state(experiment, free)
            params = _linked(params, opt_state)
            ema = None if experiment.ema is None else _float32(partition(params, experiment.trainable)[0])
            return state._replace(params=params, opt_state=opt_state, ema=ema)

        return jax.jit(restart, out_shardings=self.shardings, donate_argnums=0)(state, params)

    def evaluated(self, state: TrainState) -> Any:
        """The parameters that are judged: the average where there is one."""
        if state.ema is None:
            return state.params
        # Links move; an average of weights that were there would bring absent ones back.
        return _linked(_averaged(self.experiment, state.params, state.ema), state.opt_state)


def packed_masks(opt_state: Any) -> dict[str, Any]:
    """The packed masks in an optimizer's state, wherever it holds a `DstState`.

    Args:
        opt_state: of any optimizer; arrays or their shapes.

    Returns:
        path of the parameter -> words; empty when nothing is sparse.
    """
    found: dict[str, Any] = {}
    states = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, DstState))
    for state in states:
        if isinstance(state, DstState):
            found |= {**packed_masks(state.inner), **state.masks}
    return found


def _linked(params: Any, opt_state: Any) -> Any:
    """The parameters with zeros where a sparse optimizer has no links, for the first step too."""
    masks = packed_masks(opt_state)
    return apply_masks(params, masks) if masks else params


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _averaged(experiment: Experiment, params: Any, ema: Any) -> Any:
    free, frozen = partition(params, experiment.trainable)
    return combine(jax.tree.map(lambda e, p: e.astype(p.dtype), ema, free), frozen)


def compiler_options(mesh: Mesh) -> dict[str, int | str | bool]:
    """What the compiler is told besides the program, by the kind of the mesh's devices."""
    device = mesh.devices.flat[0]
    return {**TPU_OPTIONS, **KIND_OPTIONS.get(device.device_kind, {})} if device.platform == "tpu" else {}


def build(experiment: Experiment, mesh: Mesh) -> Program:
    """Builds the functions of an experiment for a mesh.

    Raises:
        UserError: when the batch does not divide by the data axes.
        ValueError: when `trainable` selects nothing, or the model refuses the shapes.
    """
    microbatch = experiment.batch // experiment.accumulate
    parts = data_parallelism(mesh)
    if microbatch % parts:
        what = f"batch {experiment.batch}" + (
            f" in {experiment.accumulate} microbatches of {microbatch}" if experiment.accumulate > 1 else ""
        )
        raise UserError(f"{what} does not divide by the {parts} parts of the mesh axes data x fsdp")

    rows = batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((experiment.batch, *leaf.shape), leaf.dtype, sharding=rows)
        for name, leaf in experiment.data.element_spec().items()
    }
    init = _init(experiment, batch)
    with in_force(mesh), nn.logical_axis_rules(experiment.rules):
        boxed = jax.eval_shape(init)
        _check_outputs(experiment, nn.unbox(boxed), batch)
    state = nn.unbox(boxed)
    shardings = _shardings(experiment, boxed, state, mesh)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
    whole = replicated(mesh)
    options = compiler_options(mesh)
    with in_force(mesh), nn.logical_axis_rules(experiment.rules):
        variables = {"params": state.params, **state.collections}
        laid_out = (shardings.params, shardings.collections)
        measures = tuple(
            compile_measure(measure, experiment.model, variables, batch, laid_out, rows, whole)
            for measure in experiment.measures
        )
    return Program(
        experiment=experiment,
        mesh=mesh,
        state=state,
        shardings=shardings,
        batch=batch,
        init=jax.jit(lambda: nn.unbox(init()), out_shardings=shardings, compiler_options=options),
        step=_compiled_step(experiment, shardings, mesh),
        evaluate=jax.jit(
            _evaluate(experiment),
            in_shardings=(shardings.params, shardings.collections, rows),
            out_shardings=whole,
            compiler_options=options,
        ),
        edits=tuple(
            (
                edit,
                jax.jit(
                    _edit(experiment, edit),
                    in_shardings=(shardings,),
                    out_shardings=shardings,
                    donate_argnums=0,
                    compiler_options=options,
                ),
            )
            for edit in experiment.edits
        ),
        measures=measures,
        algorithm=None if experiment.federated is None else _algorithm(experiment),
    )


def _check_outputs(experiment: Experiment, state: TrainState, batch: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Raises when the model's outputs are fewer than the data's labels, or a step changes what it carries."""
    labels = getattr(experiment.data, "classes", None)
    if labels is None and hasattr(experiment.data, "tokenizer"):
        labels = experiment.data.tokenizer.vocab
    variables = {"params": state.params, **state.collections}
    logits = jax.eval_shape(experiment.model.apply, variables, *experiment.task.inputs(batch))
    if labels is not None and logits.shape[-1] < labels:
        raise UserError(f"the model has {logits.shape[-1]} outputs, the data {labels} labels")
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, changed = jax.eval_shape(
        lambda v, b, k: experiment.task.loss(experiment.model, v, b, k), variables, batch, key
    )
    if experiment.federated is not None and "batch_stats" in state.collections:
        raise UserError(
            "the model keeps statistics of batches, which clients would have to share: for a federated run "
            "use a model with layer or group normalization"
        )
    for name, collection in changed.items():
        if jax.tree.structure(collection) != jax.tree.structure(state.collections[name]):
            raise UserError(
                f"the model's collection {name!r} grows with every call (sow?): it cannot be carried"
            )


def _init(experiment: Experiment, batch: dict[str, jax.ShapeDtypeStruct]) -> Callable[[], TrainState]:
    def init() -> TrainState:
        key = jax.random.key(experiment.seed)
        # One example is enough to see the shapes.
        example = {name: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in batch.items()}
        collections = dict(experiment.model.init(fold_path(key, "init"), *experiment.task.inputs(example)))
        params = collections.pop("params", {})
        opt_state = _optimizer_state(experiment, partition(nn.unbox(params), experiment.trainable)[0])
        params = _linked(params, opt_state)
        free, _ = partition(nn.unbox(params), experiment.trainable)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(key),
            params=params,
            opt_state=opt_state,
            collections=collections,
            ema=None if experiment.ema is None else _float32(free),
        )

    return init


def _shardings(experiment: Experiment, boxed: TrainState, state: TrainState, mesh: Mesh) -> TrainState:
    params = parameter_shardings(boxed.params, mesh, experiment.rules)
    opt_state = like_parameters(state.opt_state, state.params, params, mesh)
    if isinstance(opt_state, rounds.ServerState):
        held = jax.tree.map(lambda leaf: divided(leaf.shape, mesh), state.opt_state.population)
        opt_state = opt_state._replace(population=held)
    return TrainState(
        step=replicated(mesh),
        key=replicated(mesh),
        params=params,
        opt_state=opt_state,
        collections=parameter_shardings(boxed.collections, mesh, experiment.rules),
        ema=like_parameters(state.ema, state.params, params, mesh),
    )


def _algorithm(experiment: Experiment) -> Algorithm:
    return rounds.algorithm_of(
        experiment.federated, experiment.model, experiment.task, experiment.optimizer, experiment.rules
    )


def _optimizer_state(experiment: Experiment, free: Any) -> Any:
    """Of the optimizer; in a federated run that of the server, and what clients keep."""
    if experiment.federated is None:
        return experiment.optimizer.init(free)
    algorithm = _algorithm(experiment)
    clients = 1 if algorithm.private is None else experiment.data.clients().count
    return rounds.start(algorithm, free, clients)


def _compiled_step(experiment: Experiment, shardings: TrainState, mesh: Mesh) -> Callable[..., Any]:
    whole, options = replicated(mesh), compiler_options(mesh)
    if experiment.federated is None:
        return jax.jit(
            _step(experiment, shardings.params),
            in_shardings=(shardings, batch_sharding(mesh)),
            out_shardings=(shardings, whole),
            donate_argnums=0,
            compiler_options=options,
        )
    step = _round(experiment, mesh)
    if experiment.federated.strategy == "loop":
        return step
    batch = {"examples": whole, "plan": rounds.plan_shardings(mesh)}
    if experiment.federated.privacy is not None:
        batch["noise"] = whole
    return jax.jit(
        step,
        in_shardings=(shardings, batch),
        out_shardings=(shardings, whole),
        donate_argnums=0,
        compiler_options=options,
    )


def _round(
    experiment: Experiment, mesh: Mesh
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """A step that is a round of clients."""
    one_round = rounds.round_step(experiment.federated, _algorithm(experiment), mesh)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = fold_path(jax.random.wrap_key_data(state.key), "federated")
        free, frozen = partition(state.params, experiment.trainable)
        free, opt_state, metrics = one_round(
            free, frozen, state.collections, state.opt_state, state.step, batch, key
        )
        ema = _moved_average(experiment, state, free)
        params = combine(free, frozen)
        return TrainState(state.step + 1, state.key, params, opt_state, state.collections, ema), metrics

    return step


def _moved_average(experiment: Experiment, state: TrainState, free: Any) -> Any:
    """The average of the parameters, a step on; it forgets its start faster while it is young."""
    if experiment.ema is None:
        return state.ema
    done = state.step.astype(jnp.float32)
    rate = 1.0 - jnp.minimum(experiment.ema, (1.0 + done) / (10.0 + done))
    return jax.tree.map(lambda e, p: e + rate * (p.astype(jnp.float32) - e), state.ema, free)


def _step(
    experiment: Experiment, layout: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    task, model, optimizer = experiment.task, experiment.model, experiment.optimizer
    free_layout, _ = partition(layout, experiment.trainable)

    def gradient(free: Any, frozen: Any, collections: Any, batch: Batch, key: jax.Array) -> Any:
        """Gradient of the summed loss, with the sums; and the model's changed collections."""

        def total(free: Any) -> tuple[jax.Array, Any]:
            variables = {"params": combine(free, frozen), **collections}
            sums, changed = task.loss(model, variables, batch, key)
            return sums["loss"].total, (sums, {**collections, **changed})

        grads, sums = jax.grad(total, has_aux=True)(free)
        # Laid out like the parameters: what is summed up and squared from here on is a device's own part.
        return jax.lax.with_sharding_constraint(grads, free_layout), sums

    def accumulated(free: Any, frozen: Any, collections: Any, batch: Batch, key: jax.Array) -> Any:
        # Row r goes to microbatch r % accumulate, so every device cuts up the rows it has already.
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, experiment.accumulate, *x.shape[1:]), 1, 0), batch
        )

        def body(carry: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            grads, sums, collections = carry
            index, rows = part
            g, (s, collections) = gradient(free, frozen, collections, rows, fold_step(key, index))
            grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, g)
            return (grads, add(sums, s), collections), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), free)
        first = jax.tree.map(lambda x: x[0], parts)
        _, (shapes, _) = jax.eval_shape(gradient, free, frozen, collections, first, key)
        sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        indices = jnp.arange(experiment.accumulate, dtype=jnp.int32)
        (grads, sums, collections), _ = jax.lax.scan(body, (zeros, sums, collections), (indices, parts))
        return grads, (sums, collections)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = fold_step(fold_path(jax.random.wrap_key_data(state.key), "step"), state.step)
        free, frozen = partition(state.params, experiment.trainable)
        compute = gradient if experiment.accumulate == 1 else accumulated
        grads, (sums, collections) = compute(free, frozen, state.collections, batch, key)
        # A batch without a single weighted target moves nothing.
        count = jnp.maximum(sums["loss"].count, 1e-9)
        grads = jax.tree.map(lambda g, p: (g.astype(jnp.float32) / count).astype(p.dtype), grads, free)
        updates, opt_state = optimizer.update(grads, state.opt_state, free)
        free = optax.apply_updates(free, updates)
        ema = _moved_average(experiment, state, free)
        metrics = {name: s.total / jnp.maximum(s.count, 1e-9) for name, s in sums.items()}
        metrics["grad_norm"] = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        state = TrainState(state.step + 1, state.key, combine(free, frozen), opt_state, collections, ema)
        return state, metrics

    return step


def _evaluate(experiment: Experiment) -> Callable[[Any, Any, Batch], Sums]:
    def evaluate(params: Any, collections: Any, batch: Batch) -> Sums:
        sums, _ = experiment.task.loss(experiment.model, {"params": params, **collections}, batch, None)
        return sums

    return evaluate


def _edit(experiment: Experiment, edit: Edit) -> Callable[[TrainState], TrainState]:
    def apply(state: TrainState) -> TrainState:
        key = jax.random.wrap_key_data(state.key)
        params, opt_state = run_edit(edit, key, state.step, state.params, state.opt_state)
        ema = state.ema
        if ema is not None:
            # What an edit changes means something else from now on: its average begins anew.
            before, after = (partition(tree, experiment.trainable)[0] for tree in (state.params, params))
            ema = jax.tree.map(
                lambda e, old, new: jnp.where(new == old, e, new.astype(jnp.float32)), ema, before, after
            )
        return state._replace(params=params, opt_state=opt_state, ema=ema)

    return apply
