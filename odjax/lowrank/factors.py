"""The factors of one weight: their shapes, their start, the frozen half drawn from its key, the update.

A weight is laid out [batch..., inputs..., outputs...]; the axes of each kind may be several or, for the
batch, none. Beside it lie, in the same scope:

    lora_a          [batch..., inputs..., rank]      trained
    lora_b          [batch..., rank, outputs...]     trained
    lora_magnitude  [batch..., outputs...]           trained (DoRA)
    lora_sketch     [batch..., 3] uint32             two words of a key and the number of the block
    lora_frozen     the frozen half as an array, where it is cached

A method with a frozen half has `lora_a` or `lora_b`, and `lora_sketch`. How many axes are of which kind
follows from the ranks of these arrays alone, so a tree of parameters can be merged without the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from odjax.lowrank.coordinates import added
from odjax.lowrank.frozen import frozen_half as frozen_half
from odjax.lowrank.frozen import frozen_sketch as frozen_sketch
from odjax.lowrank.frozen import new_sketch as new_sketch
from odjax.lowrank.frozen import preconditioned as preconditioned
from odjax.lowrank.methods import LowRank, rank_of, scale_of, side_of, sketch_of
from odjax.lowrank.sizes import Sizes as Sizes
from odjax.lowrank.sizes import dims as dims
from odjax.lowrank.sizes import sizes_of as sizes_of
from odjax.lowrank.sizes import wide as wide
from odjax.lowrank.sketches import COORDINATES

LEAVES = ("lora_a", "lora_b", "lora_magnitude", "lora_sketch", "lora_frozen")


class Recipe(NamedTuple):
    """How a leaf starts, `init(key) -> array`, and which axes of the weight it has, None for the rank's."""

    init: Callable[[jax.Array], jax.Array]
    axes: tuple[int | None, ...]


def recipes(
    spec: LowRank, path: str, sizes: Sizes, kernel: jax.Array, *, table: bool = False
) -> dict[str, Recipe]:
    """What is added beside one weight.

    Args:
      spec: the method.
      path: of the weight.
      sizes: of the weight.
      kernel: the weight, for what starts from it (DoRA).
      table: whether it is the table of an embedding, where A starts at zero and B is random.

    Returns:
      name -> `Recipe`, in the order in which the leaves are made.

    Raises:
      ValueError: the rank is too large, or the weight is not of real floating numbers.

    Example:
      >>> kernel = jnp.ones((6, 4))
      >>> leaves = recipes(LowRank(rank=2), "kernel", Sizes((), (6,), (4,)), kernel)
      >>> {name: leaf.init(jax.random.key(0)).shape for name, leaf in leaves.items()}
      {'lora_a': (6, 2), 'lora_b': (2, 4)}
    """
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"{path!r} is {kernel.dtype}: only real floating weights can be adapted")
    inputs, outputs = dims(sizes)
    rank = rank_of(spec, path, inputs, outputs)
    n, i, o = len(sizes.batch), len(sizes.inputs), len(sizes.outputs)
    a_shape, b_shape = (*sizes.batch, *sizes.inputs, rank), (*sizes.batch, rank, *sizes.outputs)
    a_axes = (*range(n + i), None)
    b_axes = (*range(n), None, *range(n + i, n + i + o))
    side = side_of(spec, inputs, outputs)

    def zeros(shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
        return lambda key: jnp.zeros(shape, spec.dtype)

    if side is not None:
        name, shape, axes = ("lora_b", b_shape, b_axes) if side == "right" else ("lora_a", a_shape, a_axes)
        return {
            name: Recipe(zeros(shape), axes),
            "lora_sketch": Recipe(lambda key: new_sketch(key, sizes.batch), (*range(n), None)),
        }
    start = zeros(a_shape) if table else lambda key: _random_a(spec, key, a_shape, inputs, rank)
    other = (lambda key: jax.random.normal(key, b_shape, spec.dtype)) if table else zeros(b_shape)
    held = {"lora_a": Recipe(start, a_axes), "lora_b": Recipe(other, b_axes)}
    if spec.method == "dora":
        held["lora_magnitude"] = Recipe(
            lambda key: column_norms(kernel, sizes).astype(spec.dtype), (*range(n), *range(n + i, n + i + o))
        )
    return held


def _random_a(spec: LowRank, key: jax.Array, shape: tuple[int, ...], inputs: int, rank: int) -> jax.Array:
    if spec.init == "gaussian":
        return jax.random.normal(key, shape, spec.dtype) / rank
    bound = 1 / math.sqrt(inputs)
    return jax.random.uniform(key, shape, spec.dtype, -bound, bound)


def redrawn(
    spec: LowRank, key: jax.Array, leaves: Mapping[str, Any], sizes: Sizes, *, table: bool = False
) -> dict[str, Any]:
    """The leaves at the start of the next block of a chain: trained zeros, a fresh random half.

    Args:
      spec: the method.
      key: for the random half, where it is not drawn from a key of its own.
      leaves: name -> array of the block that ends.
      sizes: of the weight.
      table: whether it is the table of an embedding, as in `recipes`.

    Returns:
      name -> array, same shapes and dtypes.
    """
    new = {name: jnp.zeros_like(leaf) for name, leaf in leaves.items() if name in ("lora_a", "lora_b")}
    if "lora_sketch" in leaves:
        new["lora_sketch"] = leaves["lora_sketch"].at[..., 2].add(jnp.uint32(1))
        if "lora_frozen" in leaves:
            new["lora_frozen"] = frozen_half(spec, new, sizes).astype(leaves["lora_frozen"].dtype)
        return new
    if table:
        b = leaves["lora_b"]
        return {**new, "lora_b": jax.random.normal(key, b.shape, spec.dtype).astype(b.dtype)}
    inputs, _ = dims(sizes)
    a = leaves["lora_a"]
    new["lora_a"] = _random_a(spec, key, a.shape, inputs, a.shape[-1]).astype(a.dtype)
    return new


def both(spec: LowRank, leaves: Mapping[str, Any], sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """A and B, the frozen half among them.

    Args:
      spec: the method.
      leaves: name -> array.
      sizes: of the weight.

    Returns:
      (A [batch..., inputs..., rank], B [batch..., rank, outputs...]).
    """
    if "lora_sketch" not in leaves:
        return leaves["lora_a"], leaves["lora_b"]
    frozen = leaves["lora_frozen"] if "lora_frozen" in leaves else frozen_half(spec, leaves, sizes)
    return (frozen, leaves["lora_b"]) if "lora_b" in leaves else (leaves["lora_a"], frozen)


def as_matrices(a: jax.Array, b: jax.Array, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """A and B as float32 matrices.

    Args:
      a: [batch..., inputs..., rank].
      b: [batch..., rank, outputs...].
      sizes: of the weight.

    Returns:
      ([batch..., in, rank], [batch..., rank, out]).
    """
    inputs, outputs = dims(sizes)
    rank = a.shape[-1]
    kind = wide(a.dtype)
    return (
        a.reshape(*sizes.batch, inputs, rank).astype(kind),
        b.reshape(*sizes.batch, rank, outputs).astype(kind),
    )


def update_of(a: jax.Array, b: jax.Array, scale: float, sizes: Sizes) -> jax.Array:
    """The update s A B in the layout of the weight, float32 (float64 for float64 factors).

    Args:
      a: [batch..., inputs..., rank].
      b: [batch..., rank, outputs...].
      scale: s.
      sizes: of the weight.

    Returns:
      [batch..., inputs..., outputs...].
    """
    n, i, o = (len(part) for part in sizes)
    letters = "abcdefghijklmnopqstuvwxyz"
    batch, ins, outs = letters[:n], letters[n : n + i], letters[n + i : n + i + o]
    kind = wide(max(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize))
    # In the axes of the weight, not as matrices: merging two sharded axes would gather them.
    return jnp.einsum(
        f"{batch}{ins}r,{batch}r{outs}->{batch}{ins}{outs}",
        a.astype(kind) * scale,
        b.astype(kind),
        precision=jax.lax.Precision.HIGHEST,
    )


def truncated(
    a: jax.Array, b: jax.Array, keep: int | jax.Array, batch: int, *, train_all: bool = True
) -> tuple[jax.Array, jax.Array]:
    """The first `keep` columns of A and rows of B, the others zero; the shapes stay.

    Args:
      a: [batch..., inputs..., rank].
      b: [batch..., rank, outputs...].
      keep: how many, 1 to rank; may be traced.
      batch: number of batch axes.
      train_all: whether all that is kept gets a gradient, or only the last column and row of it.

    Returns:
      A and B.

    Source: Valipour et al. 2022, "DyLoRA", section 3.

    Example:
      >>> truncated(jnp.ones((1, 3)), jnp.ones((3, 1)), 2, 0)[0]
      Array([[1., 1., 0.]], dtype=float32)
    """
    index = jnp.arange(a.shape[-1])

    def cut(leaf: jax.Array, axis: int) -> jax.Array:
        at = jnp.expand_dims(index, [i for i in range(leaf.ndim) if i != axis])
        if not train_all:
            leaf = jnp.where(at == keep - 1, leaf, jax.lax.stop_gradient(leaf))
        return jnp.where(at < keep, leaf, jnp.zeros_like(leaf))

    return cut(a, a.ndim - 1), cut(b, batch)


def column_norms(
    kernel: jax.Array,
    sizes: Sizes,
    a: jax.Array | None = None,
    b: jax.Array | None = None,
    scale: float = 1.0,
) -> jax.Array:
    """Length of every column (one per output) of W + s A B, without forming the sum.

    |w_j + s A b_j|^2 = |w_j|^2 + 2 s <A^T w_j, b_j> + s^2 b_j^T (A^T A) b_j.

    Args:
      kernel: W [batch..., inputs..., outputs...].
      sizes: of the weight.
      a: [batch..., inputs..., rank], or None for W alone.
      b: [batch..., rank, outputs...].
      scale: s.

    Returns:
      float32 [batch..., outputs...].

    Source: Liu et al. 2024, "DoRA", equation 5.

    Example:
      >>> column_norms(jnp.array([[3.0], [4.0]]), Sizes((), (2,), (1,)))
      Array([5.], dtype=float32)
    """
    inputs, outputs = dims(sizes)
    kind = wide(kernel.dtype)
    w = kernel.astype(kind).reshape(*sizes.batch, inputs, outputs)
    square = jnp.sum(w * w, axis=-2)
    if a is not None and b is not None:
        a, b = (leaf.astype(kind) for leaf in as_matrices(a, b, sizes))
        exact = jax.lax.Precision.HIGHEST
        cross = jnp.sum(jnp.einsum("...ir,...io->...ro", a, w, precision=exact) * b, axis=-2)
        gram = jnp.einsum("...ir,...is->...rs", a, a, precision=exact)
        own = jnp.sum(b * jnp.einsum("...rs,...so->...ro", gram, b, precision=exact), axis=-2)
        square = jnp.maximum(square + 2 * scale * cross + scale * scale * own, 1e-30)
    return jnp.sqrt(square).reshape(*sizes.batch, *sizes.outputs)


def with_scaled_update(
    spec: LowRank, path: str, kernel: jax.Array, leaves: Mapping[str, Any], sign: float = 1.0
) -> jax.Array:
    """W + s A B, or W - s A B, in float32 and not yet rounded.

    Args:
      spec: the method.
      path: of the weight.
      kernel: W [batch..., inputs..., outputs...].
      leaves: name -> array, what lies beside it.
      sign: 1 or -1.

    Returns:
      float32 (float64 for a float64 weight), shaped like the weight.
    """
    sizes = sizes_of(kernel.shape, leaves)
    total = kernel.astype(wide(kernel.dtype))
    if "lora_sketch" in leaves and sketch_of(spec)[0] in COORDINATES:
        right = "lora_b" in leaves
        factor = leaves["lora_b" if right else "lora_a"]
        rank = factor.shape[len(sizes.batch)] if right else factor.shape[-1]
        made = frozen_sketch(spec, leaves, sizes)
        return added(total, factor, made, sign * scale_of(spec, path, rank), sizes, right=right)
    a, b = both(spec, leaves, sizes)
    return total + update_of(a, b, sign * scale_of(spec, path, a.shape[-1]), sizes).astype(total.dtype)


def with_update(spec: LowRank, path: str, kernel: jax.Array, leaves: Mapping[str, Any]) -> jax.Array:
    """The weight that the method stands for, W + s A B, in float32 and not yet rounded.

    Args:
      spec: the method.
      path: of the weight.
      kernel: W [batch..., inputs..., outputs...].
      leaves: name -> array, what lies beside it.

    Returns:
      float32 (float64 for a float64 weight), shaped like the weight.
    """
    sizes = sizes_of(kernel.shape, leaves)
    leaves = preconditioned(spec, path, leaves, sizes)
    total = with_scaled_update(spec, path, kernel, leaves)
    if "lora_magnitude" in leaves:
        a, b = both(spec, leaves, sizes)
        kind, scale = total.dtype, scale_of(spec, path, a.shape[-1])
        ratio = leaves["lora_magnitude"].astype(kind) / column_norms(kernel, sizes, a, b, scale).astype(kind)
        n, i = len(sizes.batch), len(sizes.inputs)
        total = total * jnp.expand_dims(ratio, tuple(range(n, n + i)))
    return total


def principal_split(
    spec: LowRank, path: str, kernel: jax.Array, leaves: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, Any]]:
    """PiSSA: the principal part of a weight as factors.

    W = U S V^T, A = U_r sqrt(S_r / s), B = sqrt(S_r / s) V_r^T.

    Args:
      spec: the method.
      path: of the weight.
      kernel: W.
      leaves: name -> array with `lora_a` and `lora_b`.

    Returns:
      (W - s A B in the dtype of W, {"lora_a": A, "lora_b": B}).

    Source: Meng et al. 2024, "PiSSA", equations 2 to 4.
    """
    sizes = sizes_of(kernel.shape, leaves)
    inputs, outputs = dims(sizes)
    rank = leaves["lora_a"].shape[-1]
    scale = scale_of(spec, path, rank)
    kind = wide(kernel.dtype)
    w = kernel.astype(kind).reshape(*sizes.batch, inputs, outputs)
    u, singular, v = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(singular[..., :rank] / scale)
    a = (u[..., :, :rank] * root[..., None, :]).reshape(leaves["lora_a"].shape)
    b = (root[..., :, None] * v[..., :rank, :]).reshape(leaves["lora_b"].shape)
    a, b = a.astype(leaves["lora_a"].dtype), b.astype(leaves["lora_b"].dtype)
    rest = kernel.astype(kind) - update_of(a, b, scale, sizes).astype(kind)
    return rest.astype(kernel.dtype), {"lora_a": a, "lora_b": b}
