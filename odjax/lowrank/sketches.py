"""Random sketches: what a low-rank chain draws anew in every block, and never stores.

Kernels are Flax's, [inputs, outputs], the transpose of the papers' W. A side names where the sketch acts:

    "left"   the output side (left of the papers' W):  project = G Q [inputs, rank],   lift = Z Q^T
    "right"  the input side (right of the papers' W):  project = Q^T G [rank, outputs], lift = Q Z
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core.keys import fold_path, fold_step

LAWS = ("orthonormal", "gaussian", "rademacher", "coordinate", "cyclic")
COORDINATES = ("coordinate", "cyclic")
SIDES = ("left", "right", "auto")

Law = str | Callable[[jax.Array, int, int, DTypeLike], jax.Array]
"""One of LAWS, or `(key, dim, rank, dtype) -> [dim, rank]` with entries of about unit mean square."""
Scale = Literal["unit_rms", "orthonormal"] | float
FixedSide = Literal["left", "right"]


class Bernoulli(NamedTuple):
    """The side is drawn anew in every block (Bernoulli-LoRA, arXiv 2508.03820).

    Attributes:
      p: the probability of the left (output) side.
    """

    p: float


Side = Literal["left", "right", "auto"] | Bernoulli


class Coordinates(NamedTuple):
    """A sketch whose columns are multiples of unit vectors.

    Attributes:
      index: int32 [*batch, rank], the coordinates, all different in a row.
      size: the entry of each column that is not 0.
      dim: the length of a column.
    """

    index: jax.Array
    size: float
    dim: int


Sketch = jax.Array | Coordinates


def check_law(law: Law) -> None:
    """Raises when a law is neither known nor callable.

    Args:
      law: what came.

    Raises:
      ValueError: naming the laws.
    """
    if not callable(law) and law not in LAWS:
        raise ValueError(f"law must be one of {LAWS} or a function (key, dim, rank, dtype), got {law!r}")


def check_scale(scale: Scale) -> None:
    """Raises when a scale is neither known nor a positive number.

    Args:
      scale: what came.

    Raises:
      ValueError: naming the choices.
    """
    if scale in ("unit_rms", "orthonormal"):
        return
    if isinstance(scale, str | bool) or not 0 < float(scale) < math.inf:
        raise ValueError(
            f"scale must be 'unit_rms', 'orthonormal' or a positive number (the entries' RMS), got {scale!r}"
        )


def check_side(side: Side) -> None:
    """Raises when a side is unknown.

    Args:
      side: what came.

    Raises:
      ValueError: naming the choices.
    """
    if isinstance(side, Bernoulli):
        if not 0 <= side.p <= 1:
            raise ValueError(f"Bernoulli(p) needs a probability, got {side.p!r}")
    elif side not in SIDES:
        raise ValueError(f"side must be one of {SIDES} or Bernoulli(p), got {side!r}")


def fixed_side(side: Literal["left", "right", "auto"], inputs: int, outputs: int) -> FixedSide:
    """The side of a matrix: "auto" sketches its smaller side, where r/d is largest.

    The trained factor then has the larger side: r max(inputs, outputs) numbers, the faster and larger choice.

    Args:
      side: "left", "right" or "auto".
      inputs: rows of the kernel.
      outputs: columns of the kernel.

    Returns:
      "left" or "right"; "left" for a square matrix under "auto".

    Example:
      >>> fixed_side("auto", inputs=64, outputs=10)
      'left'
    """
    if side == "auto":
        return "left" if outputs <= inputs else "right"
    return side


def column_norm(scale: Scale, dim: int) -> float:
    """The norm of a sketch's columns: exact for orthonormal, Rademacher and coordinates, expected otherwise.

    Args:
      scale: "unit_rms" gives entries of mean square 1 (norm sqrt(dim)), so that learning rates carry over
        between laws and from LoRA; "orthonormal" gives norm 1; a number is the entries' RMS.
      dim: length of a column.

    Returns:
      The norm.

    Example:
      >>> column_norm("unit_rms", 16), column_norm("orthonormal", 16), column_norm(0.5, 16)
      (4.0, 1.0, 2.0)
    """
    if scale == "orthonormal":
        return 1.0
    return math.sqrt(dim) * (1.0 if scale == "unit_rms" else float(scale))


def orthonormalise(a: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns of a tall matrix by shifted Cholesky-QR.

    Only the rank x rank Gram matrix is reduced over a sharded dimension; nothing is gathered. Passes after
    the first repair what the square of the condition number costs it (Yamamoto et al. 2015, "Roundoff error
    analysis of the CholeskyQR2 algorithm"; Fukaya et al. 2020, "Shifted Cholesky QR").

    Args:
      a: [..., dim, rank], dim >= rank, of full rank in its precision.

    Returns:
      [..., dim, rank]. Gaussian columns give the uniform law on orthonormal frames.

    Example:
      >>> q = orthonormalise(jax.random.normal(jax.random.key(0), (20, 3)))
      >>> bool(jnp.abs(q.T @ q - jnp.eye(3)).max() < 1e-6)
      True
    """
    dim, rank = a.shape[-2:]
    eye = jnp.eye(rank, dtype=a.dtype)
    eps = float(jnp.finfo(a.dtype).eps)
    # The shift keeps the first factorisation possible for a nearly singular matrix; it changes the basis not
    # at all, only how nearly orthonormal the first pass is.
    for shift in (eps * (dim + rank + 1), *(0.0,) * (2 if 4 * rank > dim else 1)):
        gram = _matmul(jnp.swapaxes(a, -1, -2), a)
        trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
        gram += jnp.broadcast_to(eye, gram.shape) * (trace * jnp.asarray(shift, a.dtype))
        lower = jnp.linalg.cholesky(gram)
        inverse = jax.scipy.linalg.solve_triangular(lower, jnp.broadcast_to(eye, lower.shape), lower=True)
        a = _matmul(a, jnp.swapaxes(inverse, -1, -2))
    return a


def draw(
    key: jax.Array,
    block: int | jax.Array,
    path: str,
    dim: int,
    rank: int,
    law: Law = "orthonormal",
    dtype: DTypeLike = jnp.float32,
    *,
    batch: tuple[int, ...] = (),
    scale: Scale = "unit_rms",
) -> Sketch:
    """A sketch for one leaf in one block, in the form that is cheapest to apply.

    Args:
      key: the typed key of the run; folded with the block, then with the path.
      block: number of the block; may be traced.
      path: of the leaf.
      dim: size of the side that is sketched.
      rank: at most `dim`.
      law: one of `LAWS` or a function.
      dtype: of the entries.
      batch: sizes of the batch axes; every matrix of a stack has a sketch of its own.
      scale: see `column_norm`.

    Returns:
      [*batch, dim, rank], or `Coordinates` for the laws "coordinate" (uniform without replacement) and
      "cyclic" (block t has the window that starts at t rank modulo dim, for every key).

    Raises:
      ValueError: the law or scale is unknown, rank is not in 1..dim, or a function gave another shape.

    Example:
      >>> draw(jax.random.key(0), 2, "w", dim=5, rank=2, law="cyclic").index.tolist()
      [4, 0]
    """
    check_law(law)
    check_scale(scale)
    if not 1 <= rank <= dim:
        raise ValueError(f"a sketch of {path!r} has {dim} rows: rank must be 1 to {dim}, got {rank}")
    norm = column_norm(scale, dim)
    if law == "cyclic":
        start = (jnp.asarray(block).astype(jnp.int32) % dim) * rank % dim
        index = (start + jnp.arange(rank, dtype=jnp.int32)) % dim
        return Coordinates(jnp.broadcast_to(index, (*batch, rank)), norm, dim)
    keys = jax.random.split(fold_path(fold_step(key, block), path), math.prod(batch))
    if law == "coordinate":
        # Of floats: the top of integers takes three times as long on a CPU.
        index = jax.vmap(lambda k: jax.lax.top_k(jax.random.uniform(k, (dim,)), rank)[1])(keys)
        return Coordinates(jnp.sort(index, axis=-1).reshape(*batch, rank), norm, dim)

    def one(key: jax.Array) -> jax.Array:
        if callable(law):
            made = law(key, dim, rank, dtype)
            if jnp.shape(made) != (dim, rank):
                raise ValueError(
                    f"the law {law!r} gave shape {jnp.shape(made)} for {path!r}, needed {(dim, rank)}"
                )
            return jnp.asarray(made, dtype)
        if law == "rademacher":
            return jax.random.rademacher(key, (dim, rank), dtype)
        return jax.random.normal(key, (dim, rank), dtype)

    made = jax.vmap(one)(keys)
    size = norm / math.sqrt(dim)
    if law == "orthonormal":
        made, size = orthonormalise(made), norm
    return (made * jnp.asarray(size, dtype)).reshape(*batch, dim, rank)


def sketch(
    key: jax.Array,
    block: int | jax.Array,
    path: str,
    dim: int,
    rank: int,
    law: Law = "orthonormal",
    dtype: DTypeLike = jnp.float32,
    *,
    batch: tuple[int, ...] = (),
    scale: Scale = "unit_rms",
) -> jax.Array:
    """A sketch as an array: `draw`, with coordinates written out.

    Args:
      key: as for `draw`, like all that follow.
      block: number of the block.
      path: of the leaf.
      dim: size of the side that is sketched.
      rank: number of columns.
      law: of the entries.
      dtype: of the entries.
      batch: sizes of the batch axes.
      scale: of the columns.

    Returns:
      [*batch, dim, rank], the same values on any mesh.

    Raises:
      ValueError: as `draw`.

    Source: Malinovsky et al. 2024, arXiv 2410.08305, section 4.

    Example:
      >>> q = sketch(jax.random.key(0), 0, "mlp/kernel", dim=16, rank=2)
      >>> q.shape, bool(jnp.allclose(q.T @ q, 16 * jnp.eye(2), atol=1e-4))
      ((16, 2), True)
    """
    return dense(draw(key, block, path, dim, rank, law, dtype, batch=batch, scale=scale), dtype)


def dense(made: Sketch, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """A sketch as an array [*batch, dim, rank].

    Args:
      made: what `draw` gave.
      dtype: of the entries, where they are written out.

    Returns:
      The array.
    """
    if isinstance(made, Coordinates):
        rows = jax.nn.one_hot(made.index, made.dim, axis=-2, dtype=dtype)
        return rows * jnp.asarray(made.size, dtype)
    return made


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def project(made: Sketch, matrices: jax.Array, side: FixedSide) -> jax.Array:
    """The gradient of the trained factor from the gradient of the kernel (without the scale s).

    Args:
      made: Q [*batch, dim, rank] or `Coordinates`; dim is the number of outputs ("left") or of inputs.
      matrices: G [*batch, inputs, outputs].
      side: "left" gives G Q, "right" gives Q^T G.

    Returns:
      [*batch, inputs, rank] or [*batch, rank, outputs].

    Example:
      >>> project(jnp.ones((3, 1)), jnp.ones((2, 3)), "left").tolist()
      [[3.0], [3.0]]
    """
    if isinstance(made, Coordinates):

        def pick(index: jax.Array, g: jax.Array) -> jax.Array:
            rows = g.at[:, index] if side == "left" else g.at[index]
            return rows.get(mode="promise_in_bounds", unique_indices=True)

        for _ in range(matrices.ndim - 2):
            pick = jax.vmap(pick)
        return pick(made.index, matrices) * jnp.asarray(made.size, matrices.dtype)
    if side == "left":
        return _matmul(matrices, made)
    return _matmul(jnp.swapaxes(made, -1, -2), matrices)


def lift(made: Sketch, factor: jax.Array, side: FixedSide) -> jax.Array:
    """The low-rank kernel of a trained factor (without the scale s); the adjoint of `project`.

    Args:
      made: Q [*batch, dim, rank] or `Coordinates`.
      factor: Z [*batch, inputs, rank] ("left") or [*batch, rank, outputs] ("right").
      side: "left" gives Z Q^T, "right" gives Q Z.

    Returns:
      [*batch, inputs, outputs].

    Example:
      >>> lift(Coordinates(jnp.array([2]), 1.0, 3), jnp.ones((1, 2)), "right").tolist()
      [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """
    if isinstance(made, Coordinates):
        factor = factor * jnp.asarray(made.size, factor.dtype)

        def place(index: jax.Array, z: jax.Array) -> jax.Array:
            shape, at = (
                ((z.shape[0], made.dim), (slice(None), index))
                if side == "left"
                else ((made.dim, z.shape[1]), (index, slice(None)))
            )
            return jnp.zeros(shape, z.dtype).at[at].set(z, mode="promise_in_bounds", unique_indices=True)

        for _ in range(factor.ndim - 2):
            place = jax.vmap(place)
        return place(made.index, factor)
    if side == "left":
        return _matmul(factor, jnp.swapaxes(made, -1, -2))
    return _matmul(made, factor)


def inverse_gram(made: Sketch, law: Law, scale: Scale, dim: int) -> jax.Array | float:
    """(Q^T Q)^+, which turns the gradient of a factor into that of the projected step.

    Args:
      made: Q [*batch, dim, rank] or `Coordinates`.
      law: that it was drawn with.
      scale: that it was drawn with.
      dim: length of its columns.

    Returns:
      [*batch, rank, rank]; a number where it is a multiple of the identity.

    Source: Malinovsky et al. 2024, arXiv 2410.08305, section 4.

    Example:
      >>> inverse_gram(Coordinates(jnp.array([2]), 2.0, 4), "coordinate", "unit_rms", 4)
      0.25
    """
    norm2 = column_norm(scale, dim) ** 2
    if isinstance(made, Coordinates) or law == "orthonormal":
        return 1.0 / norm2
    gram = _matmul(jnp.swapaxes(made, -1, -2), made)
    inverse = jnp.linalg.pinv(gram * jnp.asarray(1.0 / norm2, gram.dtype), hermitian=True)
    return inverse * jnp.asarray(1.0 / norm2, gram.dtype)
