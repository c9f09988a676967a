"""What lies in a device's memory: the state, exactly; what a program makes, from its text."""

import math
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from odjax.core import leaves_with_paths, select
from odjax_kernels import hlo
from odjax_kernels.hlo import HBM, Shape
from odjax_train.experiment import Experiment
from odjax_train.federated.feed import step_inputs
from odjax_train.plan.flops import residuals
from odjax_train.plan.parts import Buffer
from odjax_train.program import Program, packed_masks

SHOWN = 8  # buffers that are named
_NO_BUFFER = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
}


def _buffer(path: str, leaf: jax.ShapeDtypeStruct) -> Buffer:
    shape = leaf.sharding.shard_shape(leaf.shape)
    dtype = np.dtype(leaf.dtype)
    return Buffer(path, math.prod(shape) * dtype.itemsize, f"{dtype.name}{list(shape)}")


def state_memory(program: Program) -> tuple[dict[str, int], tuple[Buffer, ...]]:
    """Bytes of the state on one device, by kind; and its largest arrays.

    Args:
        program: an experiment's functions.

    Returns:
        kind -> bytes (trained parameters, frozen parameters, optimizer, masks, collections, average, batch;
        what is empty is left out), and the largest arrays by path.
    """
    state = program.state
    trained = dict(leaves_with_paths(select(state.params, program.experiment.trainable)))
    masks = packed_masks(state.opt_state)
    words = {id(leaf) for leaf in jax.tree.leaves(masks)}
    groups: dict[str, list[Buffer]] = defaultdict(list)
    for path, leaf in leaves_with_paths(state.params):
        groups["parameters" if trained[path] else "frozen parameters"].append(_buffer(path, leaf))
    for path, leaf in leaves_with_paths(state.opt_state):
        groups["masks" if id(leaf) in words else "optimizer"].append(_buffer(f"optimizer: {path}", leaf))
    for kind, tree in (
        ("collections", state.collections),
        ("average", state.ema),
        ("batch", step_inputs(program)),
    ):
        groups[kind] += [_buffer(f"{kind}: {path}", leaf) for path, leaf in leaves_with_paths(tree)]
    sizes = {kind: sum(each.bytes for each in buffers) for kind, buffers in groups.items() if buffers}
    everything = sorted((b for buffers in groups.values() for b in buffers), key=lambda b: -b.bytes)
    return sizes, tuple(everything[:SHOWN])


def largest(program: hlo.Program) -> tuple[Buffer, ...]:
    """The largest arrays that a compiled program makes in the main memory, by the operation that makes them.

    Args:
        program: as `odjax_kernels.hlo.parse` reads it.
    """
    found: dict[tuple[str, str], Buffer] = {}
    fused = {
        child
        for name, instructions in program.computations.items()
        for i in instructions
        if i.opcode in ("fusion", "fusion-start")
        for child, _ in hlo.children(program, name, i)
    }
    for name, i, _ in hlo.walk(program):
        if name in fused or i.opcode in _NO_BUFFER or i.opcode.endswith(("-start", "-update")):
            continue
        for shape in i.shapes:
            if shape.space == HBM and shape.bytes:
                where = _short(i.op_name) or f"{i.opcode} of the compiler"
                found.setdefault((where, _text(shape)), Buffer(where, shape.bytes, _text(shape)))
    return tuple(sorted(found.values(), key=lambda buffer: -buffer.bytes)[:SHOWN])


def _text(shape: Shape) -> str:
    return f"{shape.dtype}{list(shape.dims)}"


def _short(op_name: str) -> str:
    """An operation's name without what JAX's transformations add to it."""
    noise = ("while", "body", "closed_call", "checkpoint")
    parts = [part for part in op_name.split("/")[1:] if part not in noise]
    return "/".join(parts)


def saved_bytes(experiment: Experiment, program: Program) -> tuple[int, int]:
    """Bytes that the forward pass keeps of a whole batch for the backward pass, all devices together.

    Traced, with rematerialization as configured; nothing is compiled. Weights that are kept do not count.

    Args:
        experiment: whose model and task.
        program: its functions on any mesh.

    Returns:
        all of them, and the largest array.
    """
    jaxpr = residuals(experiment, program.state, program.batch).jaxpr
    inputs = set(jaxpr.invars)
    weights = {leaf.shape for leaf in jax.tree.leaves(program.state.params)}
    kept = {
        id(var): _bytes(var.aval)
        for var in jaxpr.outvars
        if not isinstance(var, Literal) and var not in inputs and var.aval.shape not in weights
    }
    return sum(kept.values()), max(kept.values(), default=0)


def _bytes(aval: Any) -> int:
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):  # a random key
        return 0
    return aval.size * np.dtype(aval.dtype).itemsize
