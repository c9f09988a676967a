"""Memory and time of a step by a model that compiles nothing, to order the candidates of a search."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from odjax.core import partition
from odjax_train.experiment import Experiment
from odjax_train.mesh import bytes_per_device
from odjax_train.plan.chips import Topology
from odjax_train.plan.flops import gradient, product_flops
from odjax_train.plan.memory import saved_bytes, state_memory
from odjax_train.program import Program

EFFICIENCY = 0.6  # of the peak rate, in products
HIDDEN = 0.7  # of the collectives' time, beside the products


class OnMesh(NamedTuple):
    """What a mesh decides, bytes of one device.

    Attributes:
        state: the state and a batch.
        gradient: of what is trained, float32.
    """

    state: int
    gradient: int


class Setting(NamedTuple):
    """What the configuration's flags decide, all devices together.

    Attributes:
        flops: of the products of a step, with what is computed again.
        saved: bytes that the forward keeps for the backward pass, of the whole batch.
        largest: bytes of the largest array that is kept.
        weights: numbers in all parameters.
        trained: numbers in those that are trained.
        tokens: rows of the products: examples of a step times the first dimension of one, its length in text.
        stream: bytes that cross the tensor axis in a step: the inputs of all layers, twice.
        batch: examples of a step.
        accumulate: microbatches of a step.
    """

    flops: int
    saved: int
    largest: int
    weights: int
    trained: int
    tokens: int
    stream: int
    batch: int
    accumulate: int


def on_mesh(experiment: Experiment, program: Program) -> OnMesh:
    """What the mesh of a program decides."""
    free, _ = partition(program.state.params, experiment.trainable)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, free)
    floats = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32), free)
    return OnMesh(sum(state_memory(program)[0].values()), bytes_per_device(floats, shardings))


def setting(experiment: Experiment, program: Program) -> Setting:
    """What the flags of an experiment decide; the program may be that of one device."""
    params = program.state.params
    free, _ = partition(params, experiment.trainable)
    saved, largest = saved_bytes(experiment, program)
    matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 2]
    tokens = math.prod(next(iter(program.batch.values())).shape[:2])
    layers = max((leaf.shape[0] for leaf in matrices), default=1)
    width = max((leaf.shape[-1] for leaf in matrices), default=1)
    return Setting(
        flops=product_flops(gradient(experiment, program.state, program.batch).jaxpr),
        saved=saved,
        largest=largest,
        weights=_elements(params),
        trained=_elements(free),
        tokens=tokens,
        stream=2 * 2 * tokens * layers * width,
        batch=experiment.batch,
        accumulate=experiment.accumulate,
    )


def expected(
    place: OnMesh, flags: Setting, mesh: tuple[int, int, int], accumulate: int, topology: Topology
) -> tuple[float, float]:
    """Bytes and seconds of a step on one device; its operations for seconds, where the speed is not known.

    Memory: state, gradient, what a microbatch keeps, and the largest of that twice more. Time: the products
    at 0.6 of the peak rate, less where a device has few rows; in bfloat16, gathers of the parameters over
    fsdp for both passes of each microbatch and sums of the gradients; along the tensor axis the residual
    stream. 0.7 of the transfers run beside the products.

    Args:
        place: what the mesh decides.
        flags: what the configuration's flags decide.
        mesh: devices along data, fsdp, tensor.
        accumulate: microbatches.
        topology: of the devices.
    """
    data, fsdp, tensor = mesh
    rows = data * fsdp
    peak = place.state + place.gradient + (flags.saved + 2 * flags.largest) / (rows * accumulate)
    if topology.chip is None:
        return peak, float(flags.flops)
    chip = topology.chip
    # A product with fewer rows than operations fit between two bytes of a weight waits for the weight.
    intensity = flags.tokens / (rows * accumulate) * chip.bandwidth / chip.flops
    seconds = flags.flops / math.prod(mesh) / (EFFICIENCY * chip.flops * min(1.0, intensity))
    bandwidth = chip.link * max(1, 2 * chip.dimensions)
    gathered = 2 * flags.weights / tensor * (fsdp - 1) / fsdp * 2 * accumulate
    reduced = 2 * flags.trained / tensor * ((fsdp - 1) / fsdp * accumulate + 2 * (data - 1) / data / fsdp)
    exchanged = 2 * flags.stream / rows * (tensor - 1) / tensor
    transfers = (gathered + reduced) / bandwidth + exchanged / (2 * chip.link)
    return peak, seconds + transfers - min(HIDDEN * transfers, seconds)


def _elements(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
