"""The device mesh, and which mesh axis each logical axis of a model goes to."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.core import leaves_with_paths
from odjax_train.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# The one table: the models know these names and nothing about meshes (their meaning: odjax/models/axes.py).
DEFAULT_RULES: Rules = (
    ("batch", BATCH_AXES),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices each axis has; one of them may be -1, "all that are left".

    Args:
        data: replicas of the parameters, each with its own part of the batch.
        fsdp: parts of the parameters and of the batch (fully sharded data parallelism).
        tensor: parts of heads, hidden units and vocabulary.

    >>> MeshShape.parse("2,-1,2")
    MeshShape(data=2, fsdp=-1, tensor=2)
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(f"mesh {_join(sizes)}: axis sizes are positive, and at most one may be -1")

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Reads `"data,fsdp,tensor"`, for example `"1,8,1"`."""
        try:
            sizes = [int(part) for part in text.split(",")]
        except ValueError:
            sizes = []
        if len(sizes) != len(AXES):
            raise UserError(f"--mesh {text!r}: give three whole numbers, data,fsdp,tensor, such as 1,8,1")
        return cls(*sizes)

    def resolve(self, devices: int) -> tuple[int, int, int]:
        """The three sizes for that many devices.

        Raises:
            UserError: when they do not multiply to the number of devices.
        """
        sizes = dataclasses.astuple(self)
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and devices % known == 0:
            sizes = tuple(devices // known if size == -1 else size for size in sizes)
        if -1 in sizes or math.prod(sizes) != devices:
            raise UserError(
                f"mesh {_join(sizes)} (data,fsdp,tensor) needs "
                f"{'a multiple of ' if -1 in sizes else ''}{known} devices, there are {devices}"
            )
        return sizes


def _join(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the devices out as `data x fsdp x tensor`, following the interconnect.

    Over several TPU slices (or GPU hosts that report one each) the `data` axis crosses the slow network where
    it divides by their number, else `fsdp`; the others stay inside.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = shape.resolve(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        across = _across(sizes, slices)
        inside = [size // outer for size, outer in zip(sizes, across, strict=True)]
        layout = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices=devices, allow_split_physical_axes=True
        )
    else:
        layout = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    return Mesh(layout, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _across(sizes: tuple[int, int, int], slices: int) -> tuple[int, int, int]:
    """How many parts of each axis lie on different slices."""
    for axis in (0, 1):
        if sizes[axis] % slices == 0:
            return tuple(slices if i == axis else 1 for i in range(len(sizes)))
    raise UserError(
        f"mesh {_join(sizes)}: its data or its fsdp axis must be a multiple of the {slices} slices"
    )


def in_force(mesh: Mesh) -> AbstractContextManager[Any]:
    """The mesh as the one that a trace belongs to.

    Of devices that are not here, which a plan is for, only the shape is: what is computed while tracing
    (`jax.ensure_compile_time_eval`) has to run somewhere.
    """
    try:
        here = mesh.devices.flat[0] in jax.devices(mesh.devices.flat[0].platform)
    except RuntimeError:  # no such platform
        here = False
    return jax.set_mesh(mesh) if here else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of the batch over the data axes."""
    return NamedSharding(mesh, P(BATCH_AXES))


def divided(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The first dimension over the mesh axis `data`, where that divides it."""
    return NamedSharding(mesh, _fitting(shape, P("data"), mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def data_parallelism(mesh: Mesh) -> int:
    """Into how many parts the batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def parameter_shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings of a tree of parameters that carry Flax logical axis names.

    An axis that does not divide by its mesh axis stays whole.

    Args:
        boxed: tree of arrays or shapes in Flax partitioning boxes, as `model.init` returns it.
        mesh: the device mesh.
        rules: logical axis -> mesh axis.

    Returns:
        tree of `NamedSharding`, in the structure of the unboxed parameters.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules)
    return jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, _fitting(leaf.shape, spec, mesh)), nn.unbox(boxed), specs
    )


def _fitting(shape: Sequence[int], spec: P | None, mesh: Mesh) -> P:
    """The spec without the mesh axes that do not divide their dimension."""
    axes = []
    for size, axis in zip(shape, [*(spec or P())] + [None] * len(shape), strict=False):
        names = (axis,) if isinstance(axis, str) else (axis or ())
        parts = math.prod(mesh.shape[name] for name in names)
        axes.append(axis if parts > 1 and size % parts == 0 else None)
    return P(*axes)


def like_parameters(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of a tree that holds things that belong to parameters: optimizer state, averages, masks.

    A leaf belongs to the parameter whose path its own path ends with. It takes over the mesh axes of those
    dimensions that have the parameter's size; everything else is replicated.

    Args:
        tree: tree of arrays or shapes.
        params: tree of parameters (arrays or shapes), unboxed.
        shardings: tree of `NamedSharding`, in the structure of `params`.
        mesh: the device mesh.
    """
    owners = {
        path: (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(leaves_with_paths(params), jax.tree.leaves(shardings), strict=True)
    }
    found = [
        NamedSharding(mesh, _inherited(leaf.shape, _owner(path, owners), mesh))
        for path, leaf in leaves_with_paths(tree)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _owner(path: str, owners: Mapping[str, tuple[Sequence[int], P]]) -> tuple[Sequence[int], P] | None:
    parts = path.split("/")
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((owners[tail] for tail in tails if tail in owners), None)


def _inherited(shape: Sequence[int], owner: tuple[Sequence[int], P] | None, mesh: Mesh) -> P:
    if owner is None or len(owner[0]) != len(shape):
        return P()
    of, spec = owner
    spec = [*spec] + [None] * (len(of) - len(spec))
    kept = [axis if size == full else None for size, full, axis in zip(shape, of, spec, strict=True)]
    return _fitting(shape, P(*kept), mesh)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that one device holds of a tree laid out like that."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))
