"""How a leaf of any rank is a stack of matrices: which axes are inputs, outputs, and copies."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from odjax.core.paths import STACKED, is_stacked

_INTO_HEADS = ("q", "k", "v", "query", "key", "value")
_FROM_HEADS = ("o", "out")


class MatrixView(NamedTuple):
    """Which axes of a leaf are which: the leaf is a stack of matrices [inputs, outputs].

    Attributes:
      batch: axes that count separate matrices (layers of a scan, experts).
      inputs: axes that are summed over when the kernel is applied, in the order of the matrix's rows.
      outputs: axes that the kernel gives.
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


DimensionNumbers = Mapping[str, MatrixView] | Callable[[str, tuple[int, ...]], MatrixView] | None
"""A regular expression for whole paths -> view, or a function `(path, shape) -> view`, or the default."""


def _fix(path: str, view: str) -> str:
    return f"say which axes are which with dimension_numbers={{{path!r}: {view}}}"


def _checked(path: str, shape: Sequence[int], view: MatrixView) -> MatrixView:
    if not isinstance(view, MatrixView):
        raise TypeError(f"dimension numbers of {path!r} must be a MatrixView, got {view!r}")
    n = len(shape)
    axes = [*view.batch, *view.inputs, *view.outputs]
    if not all(-n <= axis < n for axis in axes) or sorted(axis % n for axis in axes) != list(range(n)):
        raise ValueError(
            f"{view} does not name each axis of {path!r}, which has shape {tuple(shape)}, exactly once"
        )
    if not view.inputs or not view.outputs:
        raise ValueError(f"{view} of {path!r} needs at least one input and one output axis")
    return MatrixView(*(tuple(axis % n for axis in group) for group in view))


def _default(path: str, shape: tuple[int, ...], stacked: str | None) -> MatrixView:
    names = path.split("/")
    module = names[-2].lower() if len(names) > 1 else ""
    first = int(is_stacked(path, stacked))
    batch, axes = tuple(range(first)), tuple(range(first, len(shape)))
    n = len(axes)
    if n < 2:
        what = "a stack of vectors" if first else "no matrix"
        raise ValueError(
            f"the leaf {path!r} of shape {shape} is {what}: narrow where= to leaves of two axes or more, or "
            + _fix(path, "MatrixView(batch, inputs, outputs)")
        )
    if n == 2:
        return MatrixView(batch, axes[:1], axes[1:])
    if n == 3 and module in _INTO_HEADS:
        return MatrixView(batch, axes[:1], axes[1:])
    if (n == 3 and module in _FROM_HEADS) or "conv" in module:
        return MatrixView(batch, axes[:-1], axes[-1:])
    if n in (4, 5) and "qkv" not in module and names[-1] in ("kernel", ""):
        return MatrixView(batch, axes[:-1], axes[-1:])
    raise ValueError(
        f"the leaf {path!r} of shape {shape} could be several matrices: "
        + _fix(path, f"MatrixView(batch={batch}, inputs={axes[:1]}, outputs={axes[1:]})")
        + ", for example"
    )


def view_of(
    path: str,
    shape: Sequence[int],
    dimension_numbers: DimensionNumbers = None,
    *,
    stacked: str | None = STACKED,
) -> MatrixView:
    """How one leaf is a stack of matrices.

    By default a leaf of two axes is (inputs, outputs); the kernels of Flax attention are
    (width, heads, head_dim) into heads and (heads, head_dim, width) out of them; the kernel of a convolution
    is (window..., inputs, outputs), whose matrix has a row for every place of the window. The first axis of a
    leaf whose path matches `stacked` counts layers.

    Args:
      path: of the leaf, '/'-joined.
      shape: of the leaf.
      dimension_numbers: views by pattern, or a function of path and shape; leaves that no pattern matches
        have the default.
      stacked: regular expression for the paths of stacked layers; None where there are none.

    Returns:
      The view, with axis numbers from 0.

    Raises:
      ValueError: the leaf has fewer than two axes, its view is ambiguous (the message has the remedy), two
        patterns match with different views, or a view does not name each axis once.
      TypeError: what was given is no `MatrixView`.

    Example:
      >>> view_of("layers/attn/q/kernel", (12, 64, 4, 16))
      MatrixView(batch=(0,), inputs=(1,), outputs=(2, 3))
    """
    shape = tuple(shape)
    if callable(dimension_numbers):
        return _checked(path, shape, dimension_numbers(path, shape))
    given = {p: v for p, v in (dimension_numbers or {}).items() if re.fullmatch(p, path)}
    if len(set(given.values())) > 1:
        patterns = " and ".join(map(repr, given))
        raise ValueError(
            f"the leaf {path!r} has different dimension numbers by the patterns {patterns}: narrow one"
        )
    if given:
        return _checked(path, shape, next(iter(given.values())))
    return _default(path, shape, stacked)


def check_patterns(dimension_numbers: DimensionNumbers, paths: Iterable[str]) -> None:
    """Makes sure that every pattern of the dimension numbers matches a path.

    Args:
      dimension_numbers: as for `view_of`.
      paths: of all leaves.

    Raises:
      ValueError: a pattern matches nothing.
    """
    if dimension_numbers is None or callable(dimension_numbers):
        return
    paths = list(paths)
    for pattern in dimension_numbers:
        if not any(re.fullmatch(pattern, path) for path in paths):
            some = ", ".join(map(repr, paths[:3]))
            raise ValueError(f"dimension_numbers has {pattern!r}, which matches no path such as {some}")


def matrix_shape(shape: Sequence[int], view: MatrixView) -> tuple[tuple[int, ...], int, int]:
    """The sizes of a leaf as a stack of matrices.

    Args:
      shape: of the leaf.
      view: of the leaf.

    Returns:
      (sizes of the batch axes, number of inputs, number of outputs).

    Example:
      >>> matrix_shape((12, 64, 4, 16), MatrixView((0,), (1,), (2, 3)))
      ((12,), 64, 64)
    """
    batch, inputs, outputs = (tuple(shape[axis] for axis in axes) for axes in view)
    return batch, math.prod(inputs), math.prod(outputs)


def to_matrices(x: jax.Array, view: MatrixView) -> jax.Array:
    """A leaf as a stack of matrices.

    Args:
      x: the leaf.
      view: of the leaf.

    Returns:
      [*batch, inputs, outputs].

    Example:
      >>> to_matrices(jnp.zeros((12, 64, 4, 16)), MatrixView((0,), (1,), (2, 3))).shape
      (12, 64, 64)
    """
    batch, inputs, outputs = matrix_shape(x.shape, view)
    moved = jnp.transpose(x, (*view.batch, *view.inputs, *view.outputs))
    return moved.reshape(*batch, inputs, outputs)


def from_matrices(matrices: jax.Array, view: MatrixView, shape: Sequence[int]) -> jax.Array:
    """The inverse of `to_matrices`.

    Args:
      matrices: [*batch, inputs, outputs].
      view: of the leaf.
      shape: of the leaf.

    Returns:
      The leaf.

    Example:
      >>> view = MatrixView((), (0, 1), (2,))
      >>> x = jnp.arange(24.0).reshape(2, 3, 4)
      >>> bool((from_matrices(to_matrices(x, view), view, x.shape) == x).all())
      True
    """
    order = (*view.batch, *view.inputs, *view.outputs)
    moved = matrices.reshape([shape[axis] for axis in order])
    return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])
